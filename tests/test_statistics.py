"""`level_statistics` against sums in float64, and `importance_aware_loss` computed from them."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from cases import (
    BACKENDS,
    DTYPES,
    EMULATED,
    HIERARCHY,
    KERNELS,
    OPTIONS,
    device_of,
    make_logits,
    make_target,
    poisoned,
)
from formulas import CLASSES, FAST, VOID, WEIGHT, assert_close, problem

from ial_cuda import LevelStatistics, importance_aware_loss, level_statistics

#: What the random combination of the sums adds: their incoming gradients.
INCOMING = torch.rand(5, 2, CLASSES, generator=torch.Generator().manual_seed(0)).double() - 0.3
PIXEL_WEIGHT = torch.rand(2, 6, 7, generator=torch.Generator().manual_seed(1))


def expected_sums(leaf, target, levels, *, weight=None, pixel_weight=None, ignore_index=VOID, **options):
    """The five sums, (5, N, g), of the valid pixels of each image and level."""
    if options.get("upsample"):
        leaf = F.interpolate(
            leaf, target.shape[1:], mode="bilinear", align_corners=options.get("align_corners", False)
        )
    of_class = torch.ones(leaf.shape[1]) if weight is None else torch.as_tensor(weight)
    of_pixel = torch.ones(target.shape) if pixel_weight is None else pixel_weight
    sums = []
    for image, labels, factor in zip(leaf, target.long(), of_pixel.double(), strict=True):
        for level in levels:
            of_level = torch.isin(labels, torch.tensor(list(level))) & (labels != ignore_index)
            x, y, w = image.movedim(0, -1)[of_level], labels[of_level], factor[of_level]
            smoothing = options.get("label_smoothing", 0.0)
            nll = F.cross_entropy(x, y, of_class.double(), reduction="none", label_smoothing=smoothing)
            own = x.gather(1, y.unsqueeze(1)).squeeze(1)
            pi = torch.exp(own - x.logsumexp(1))
            if options.get("gradient") == "paper":  # Eq. 15: the logits of the other classes are constants
                others = F.one_hot(y, x.shape[1]).bool()
                pi = torch.sigmoid(own - x.detach().masked_fill(others, -torch.inf).logsumexp(1))
            values = (w * nll, pi**2, (1 - pi) ** 2, torch.ones_like(w), of_class.double()[y] * w)
            sums.append(torch.stack([value.sum() for value in values]))
    return torch.stack(sums).T.reshape(5, len(target), len(levels))


def combined(sums, incoming):
    return sum((value * factor.to(value)).sum() for value, factor in zip(sums, incoming, strict=True))


def check(backend, logits, target, levels, **options):
    device = device_of(backend)
    incoming = INCOMING[:, :1, : len(levels)].expand(5, len(target), len(levels))
    moved = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in options.items()}
    leaf = logits.detach().to(device).requires_grad_()
    with poisoned():
        sums = level_statistics(
            leaf, target.to(device), levels, backend=backend, **{"ignore_index": VOID, **moved}
        )
        (grad,) = torch.autograd.grad(combined(sums, incoming), leaf)
    exact = logits.detach().double().requires_grad_()
    expected = expected_sums(exact, target, levels, **options)
    (expected_grad,) = torch.autograd.grad(combined(expected, incoming), exact)
    arithmetic = torch.promote_types(logits.dtype, torch.float32)
    for got, value in zip(sums, expected.detach(), strict=True):
        assert got.dtype == torch.float64 and got.shape == (len(target), len(levels))
        assert_close(got.detach().to(arithmetic), value)
    assert torch.equal(sums.count.cpu(), expected[3].detach())
    assert grad.dtype == logits.dtype
    assert_close(grad, expected_grad)


CASES = {
    "plain": {},
    "class weights": dict(weight=WEIGHT),
    "pixel weights": dict(pixel_weight=PIXEL_WEIGHT),
    "smoothed": dict(weight=WEIGHT, pixel_weight=PIXEL_WEIGHT, label_smoothing=0.3),
    "paper": dict(weight=WEIGHT, gradient="paper"),
    "a class is void": dict(ignore_index=2),
}
LEVELS = {
    "one": [range(5)],
    "four": [list(level) for level in HIERARCHY.levels],
    "each": [[c] for c in range(5)],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("case", CASES)
def test_sums_and_gradients(backend, levels, case):
    options = CASES[case]
    logits, target = problem(ignore_index=options.get("ignore_index", VOID))
    check(backend, logits, target, LEVELS[levels], **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("case", ["smoothed", "paper"])
def test_coarse_logits(backend, align_corners, case):
    logits, target = make_logits((2, CLASSES, 3, 4), torch.float32), problem()[1]
    options = dict(upsample="bilinear", align_corners=align_corners)
    check(backend, logits, target, LEVELS["four"], **options, **CASES[case])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(backend, dtype):
    logits, target = problem(dtype=dtype)
    check(backend, logits, target.to(torch.uint8), LEVELS["four"], **CASES["smoothed"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_row_is_an_image(backend):
    check(backend, make_logits((9, CLASSES), torch.float32), make_target((9,), CLASSES), LEVELS["four"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, CLASSES, 6, 7), (2, CLASSES, 0, 7), (2, CLASSES, 6, 7)], ids=str)
def test_no_valid_pixel_gives_zero(backend, shape):
    leaf = torch.full(shape, torch.nan, device=device_of(backend)).requires_grad_()
    target = torch.full((shape[0], *shape[2:]), VOID, device=leaf.device)
    sums = level_statistics(leaf, target, HIERARCHY, weight=WEIGHT, label_smoothing=0.1, backend=backend)
    (grad,) = torch.autograd.grad(sum(value.sum() for value in sums), leaf)
    assert all(value.shape == (shape[0], 4) and (value == 0).all() for value in sums)
    assert (grad == 0).all()


def test_the_reference_sums_in_float64():
    """Otherwise it would round the number of pixels of an image with more than 2^24."""
    pixel_weight = torch.tensor([[2.0**24, 1.0, 1.0, 1.0]])
    logits, target = torch.zeros(1, 2, 4), torch.zeros(1, 4, dtype=torch.int64)
    sums = level_statistics(logits, target, 2, pixel_weight=pixel_weight, backend="reference")
    assert sums.weight.item() == 2**24 + 3


# ---- the loss of the package from its sums --------------------------------------------------------------


def rebuilt(sums: LevelStatistics, *, lambdas, alpha, reduction, factor_normalization, factor_scope):
    """Eqs. 3 to 8 and the options of `importance_aware_loss`."""
    images, levels = sums.nll.shape
    lambdas = lambdas if isinstance(lambdas, tuple) else (lambdas,) * (levels - 1)
    pooled = [value.sum(0, keepdim=True) for value in sums] if factor_scope == "batch" else sums
    _, pi_squared, one_minus_pi_squared, count, _ = pooled
    rest = torch.zeros(images, device=sums.nll.device)
    for t in reversed(range(levels - 1)):
        above = one_minus_pi_squared[:, t + 1 :].sum(1)
        f = (lambdas[t] * pi_squared[:, t] + (1 + lambdas[t]) * above) / 2
        if factor_normalization == "mean":
            f = f / count[:, t:].sum(1).clamp(min=1)
        rest = (f + alpha) * (sums.nll[:, t + 1] + rest)
    loss = sums.nll[:, 0] + rest
    if reduction == "none":
        return loss
    return loss.sum() / (sums.weight.sum() if reduction == "mean" else 1)


#: Each option away from the default, alone and all together.
CHANGED = [{name: values[1]} for name, values in OPTIONS.items()] + [{n: v[1] for n, v in OPTIONS.items()}]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changed", [{}, *CHANGED, dict(reduction="none")], ids=str)
def test_importance_aware_loss_from_its_sums(backend, changed):
    options = {name: values[0] for name, values in OPTIONS.items()} | changed
    device, gradient = device_of(backend), options.pop("gradient")
    logits, target = (tensor.to(device) for tensor in problem(dtype=torch.float64))
    leaf = logits.requires_grad_()
    pixels = dict(weight=WEIGHT, pixel_weight=PIXEL_WEIGHT.to(device), gradient=gradient, backend=backend)
    loss = rebuilt(level_statistics(leaf, target, HIERARCHY, **pixels), **options)
    expected = importance_aware_loss(leaf, target, HIERARCHY, **pixels, **options)
    incoming = torch.ones_like(expected)
    assert_close(loss.detach(), expected.detach())
    assert_close(*(torch.autograd.grad(value, leaf, incoming)[0] for value in (loss, expected)))


# ---- labels that are no class, errors -------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label", [CLASSES, -1, 2**32])
def test_bad_labels(backend, label):
    """The pixel is left out, and the image's first sum of level 0 is NaN."""
    device = device_of(backend)
    logits, target = (tensor.to(device) for tensor in problem())
    target[1, 2, 3] = VOID
    clean = level_statistics(logits, target, HIERARCHY, backend=backend)
    target[1, 2, 3] = label
    if device == "cpu" and backend not in EMULATED:
        with pytest.raises(ValueError, match=rf"target has label {label} at \(1, 2, 3\), the first of 1"):
            level_statistics(logits, target, HIERARCHY, backend=backend)
        return
    leaf = logits.requires_grad_()
    sums = level_statistics(leaf, target, HIERARCHY, backend=backend)
    where = torch.zeros(2, 4, dtype=torch.bool, device=device)
    where[1, 0] = True
    assert torch.equal(sums.nll.isnan(), where)
    assert torch.equal(sums.nll[~where], clean.nll[~where])
    assert all(torch.equal(value, other) for value, other in zip(sums[1:], clean[1:], strict=True))
    (grad,) = torch.autograd.grad(sums.nll.sum(), leaf)
    assert (grad[1, :, 2, 3] == 0).all()


LOGITS, TARGET = problem()
BAD = {
    "logits": (LOGITS[:, :4], "logits has shape (2, 4, 6, 7), expected (N, C, *spatial) with the C = 5"),
    "target": (TARGET[:, :3], "target has shape (2, 3, 7), expected (N, *spatial) = (2, 6, 7)"),
    "hierarchy": (0.5, "hierarchy is 0.5 (float), expected an ial_cuda.Hierarchy"),
    "weight": ([1.0], "weight has shape (1,), expected (5,), one per class"),
    "pixel_weight": (torch.ones(6, 7), "pixel_weight has shape (6, 7), expected (N, *spatial) = (2, 6, 7)"),
    "ignore_index": (0.5, "ignore_index is 0.5 (float), expected an integer"),
    "gradient": ("true", "gradient is 'true', expected one of 'exact', 'paper'"),
    "label_smoothing": (1.5, "label_smoothing is 1.5, expected a number from 0 to 1"),
    "backend": ("gpu", "backend is 'gpu', expected one of 'auto', 'cpu', 'cuda', "),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_the_argument(name):
    value, message = BAD[name]
    arguments = dict(logits=LOGITS, target=TARGET, hierarchy=HIERARCHY) | {name: value}
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}"):
        level_statistics(**arguments)


# ---- derivatives, transforms ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("upsample", [None, "bilinear"])
def test_gradcheck(backend, upsample):
    device = device_of(backend)
    leaf = make_logits((2, 3, 1, 2)).to(device).requires_grad_()
    target = make_target((2, 2, 3) if upsample else (2, 1, 2), 3).to(device)
    function = partial(
        level_statistics,
        target=target,
        hierarchy=[[0], [2, 1]],
        weight=WEIGHT[:3],
        label_smoothing=0.1,
        upsample=upsample,
        backend=backend,
    )
    assert torch.autograd.gradcheck(lambda leaf: tuple(function(leaf)[:3]), leaf)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(lambda leaf: tuple(function(leaf)[:3]), leaf)


@pytest.mark.parametrize("backend", KERNELS)
def test_second_derivatives_of_kernels_raise(backend):
    logits, target = (tensor.to(device_of(backend)) for tensor in problem())
    leaf = logits.requires_grad_()
    sums = level_statistics(leaf, target, HIERARCHY, backend=backend)
    (grad,) = torch.autograd.grad(sums.pi_squared.sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not implemented"):
        grad.square().sum().backward()


def worst_level(logits, target, backend):
    """The summed largest mean of each image."""
    sums = level_statistics(logits, target, HIERARCHY, backend=backend)
    return (sums.nll / sums.count.clamp(min=1)).amax(1).sum()


@pytest.mark.parametrize("backend", FAST)
def test_compiled_equals_eager(backend):
    torch._dynamo.reset()
    logits, target = (tensor.to(device_of(backend)) for tensor in problem())
    leaf, step = logits.requires_grad_(), partial(worst_level, backend=backend)
    compiled = torch.compile(lambda leaf: step(leaf * 2, target), fullgraph=True, backend="aot_eager")
    loss, expected = compiled(leaf), step(leaf * 2, target)
    assert_close(loss.detach(), expected.detach())
    assert_close(*(torch.autograd.grad(value, leaf)[0] for value in (loss, expected)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_func(backend):
    logits, target = (tensor.to(device_of(backend)) for tensor in problem())
    function = partial(worst_level, backend=backend)
    grads, values = torch.vmap(torch.func.grad_and_value(function))(logits.unsqueeze(1), target.unsqueeze(1))
    leaf = logits.requires_grad_()
    loss = function(leaf, target)
    assert_close(values.sum(), loss.detach())
    assert_close(grads.squeeze(1), torch.autograd.grad(loss, leaf)[0])


@pytest.mark.parametrize("backend", FAST)
def test_symbolic_trace(backend):
    """The trace has one node for the sums."""
    logits, target = (tensor.to(device_of(backend)) for tensor in problem())
    traced = torch.fx.symbolic_trace(lambda logits, target: worst_level(logits, target, backend))
    assert "compute_level_statistics" in traced.code
    assert torch.equal(traced(logits, target), worst_level(logits, target, backend))
