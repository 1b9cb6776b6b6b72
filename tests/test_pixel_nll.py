"""`pixel_nll`: the map and its gradient against the float64 oracle, void pixels, autograd, errors."""

from __future__ import annotations

import re

import numpy as np
import oracle
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from cases import (
    BACKENDS,
    DOUBLE,
    DTYPES,
    EMULATED,
    JVP,
    KERNELS,
    arithmetic_of,
    assert_rule,
    device_of,
    largest,
    make_logits,
    make_target,
    move,
    poisoned,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from ial_cuda import backends, cross_entropy, pixel_nll

FAST = [backend for backend in BACKENDS if backend.values[0] not in EMULATED]
CORNERS = pytest.mark.parametrize("align_corners", [False, True], ids=["centres", "corners"])
COARSE = pytest.mark.parametrize("upsample", [None, "bilinear"], ids=["full", "coarse"])
WEIGHT = torch.tensor([0.3, 1.0, 2.5, 0.7, 1.9])
LABELS = [torch.int64, torch.int32, torch.uint8]


def number(shape, seed=1):
    """Incoming gradients of both signs, float32 as the map is."""
    return make_logits(shape, torch.float32, spread=1.0, seed=seed)


def map_and_grad(backend, logits, target, grad_nll, weight=None, **options):
    """The map of a backend and the gradient of the logits, on the CPU."""
    device = device_of(backend)
    leaf, target, grad_nll = (
        move(logits, device).requires_grad_(),
        move(target, device),
        move(grad_nll, device),
    )
    weight = None if weight is None else move(weight, device)
    with poisoned():
        nll = pixel_nll(leaf, target, weight, backend=backend, **{"ignore_index": 255} | options)
        (grad,) = torch.autograd.grad(nll, leaf, grad_nll.to(nll))
    assert nll.dtype == arithmetic_of(logits) and nll.shape == target.shape and nll.is_contiguous()
    assert grad.dtype == logits.dtype and grad.shape == logits.shape
    return nll.detach().cpu(), grad.cpu()


def eager(logits, target, grad_nll, weight=None, *, upsample=None, align_corners=False, **options):
    """The same by F.interpolate and F.cross_entropy, in the precision of the logits."""
    leaf = logits.detach().requires_grad_()
    fine = leaf
    if upsample:
        fine = F.interpolate(leaf, target.shape[1:], mode=upsample, align_corners=align_corners)
    weight = None if weight is None else weight.to(fine)
    options = {"ignore_index": 255} | options
    nll = F.cross_entropy(fine, target.long(), weight, reduction="none", **options)
    return nll.detach(), torch.autograd.grad(nll, leaf, grad_nll.to(nll))[0]


def check(backend, logits, target, grad_nll=None, weight=None, **options):
    """Asserts the error rule of `cases.check` for each element of the map and of the gradient.

    The rounding of -log pi is at its own size plus the weight, since pi rounds near 1. That of the gradient is
    at the weight times the incoming gradient. Interpolated logits are rounded themselves, and a coarse gradient
    is a sum over the pixels around it.
    """
    grad_nll = number(target.shape) if grad_nll is None else grad_nll
    upsample, align_corners = options.get("upsample"), options.get("align_corners", False)
    true_options = {name: options[name] for name in ("ignore_index", "label_smoothing") if name in options}
    x = logits.detach().double().numpy()
    if upsample:
        sizes = zip(logits.shape[2:], target.shape[1:], strict=True)
        rows, columns = (oracle.interpolation(*pair, align_corners) for pair in sizes)
        x = oracle.upsample(x, rows, columns)
    true, true_grad = oracle.pixel_nll(
        x, target.numpy(), grad_nll.numpy(), weight=None if weight is None else weight.numpy(), **true_options
    )
    most = 1.0 if weight is None else largest(weight.double().numpy())
    scale = most + np.where(np.isfinite(true), abs(true), 0)
    grad_scale = (most * grad_nll.double().abs()).unsqueeze(1).expand(x.shape).numpy()
    if upsample:
        rounded = 1 + largest(x)
        true_grad, grad_scale = (oracle.upsample(g, rows.T, columns.T) for g in (true_grad, grad_scale))
        scale, grad_scale = scale * rounded, grad_scale * rounded
    nll, grad = map_and_grad(backend, logits, target, grad_nll, weight, **options)
    eager_nll, eager_grad = eager(logits.to(nll.dtype), target, grad_nll, weight, **options)
    assert_rule(f"map of {backend}", nll, eager_nll, true, scale, backend=backend)
    assert_rule(f"gradient of {backend}", grad, eager_grad, true_grad, grad_scale, backend=backend)
    void = target == options.get("ignore_index", 255)
    assert (nll[void] == 0).all()
    if not upsample:
        assert (grad.movedim(1, -1)[void] == 0).all()


# ---- the oracle -----------------------------------------------------------------------------------------

# Views of a larger or permuted tensor, (2, 5, *spatial).
LAYOUTS = {
    "contiguous": lambda make: make(2, 5, 9, 17),
    "channels_last": lambda make: make(2, 5, 9, 17).to(memory_format=torch.channels_last),
    "cropped": lambda make: make(2, 5, 12, 40)[..., 1:10, 3:37:2],
    "transposed": lambda make: make(2, 5, 17, 9).transpose(2, 3),
    "every_other_channel": lambda make: make(2, 9, 9, 17)[:, ::2],
    "expanded": lambda make: make(1, 5, 9, 17).expand(2, 5, 9, 17),
    "odd_offset": lambda make: make(2 * 5 * 9 * 17 + 3)[3:].view(2, 5, 9, 17),
    "rows": lambda make: make(150, 5),
    "rows_of_an_image": lambda make: make(5, 150).t(),
    "line": lambda make: make(2, 5, 65),
    "volume": lambda make: make(2, 5, 3, 4, 7).permute(0, 1, 4, 2, 3),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(backend, dtype, layout):
    """Each with one dtype of the labels, and the options in turn."""
    turn = 4 * list(LAYOUTS).index(layout) + DTYPES.index(dtype) + list(LAYOUTS).index(layout) // 3
    logits = LAYOUTS[layout](lambda *shape: make_logits(shape, dtype))
    target = make_target((len(logits), *logits.shape[2:]), 5, dtype=LABELS[turn % 3])
    options = dict(weight=WEIGHT if turn % 2 else None, label_smoothing=0.1 * (turn // 2 % 2))
    check(backend, logits, target, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("labels", LABELS, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2, 1.0])
@COARSE
def test_every_option(backend, labels, strided, weighted, label_smoothing, upsample):
    target = make_target((2, 11, 34), 5, dtype=labels)[..., ::2]
    if not strided:
        target = target.contiguous()
    logits = make_logits((2, 5, 5, 6) if upsample else (2, 5, 11, 17), torch.float32)
    options = dict(label_smoothing=label_smoothing, upsample=upsample)
    check(backend, logits, target, weight=WEIGHT if weighted else None, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 11, 19, 33, 70, 300])
def test_every_number_of_classes(backend, dtype, classes):
    """With an odd number of pixels in each case, side by side by channel or by pixel."""
    turn = classes + DTYPES.index(dtype)
    layout = torch.channels_last if turn % 2 else torch.contiguous_format
    logits = make_logits((1, classes, 1, [1, 17, 63, 64, 65][turn % 5]), dtype).contiguous(
        memory_format=layout
    )
    target = make_target((1, *logits.shape[2:]), classes, ignore_index=-1)
    weight = torch.rand(classes, generator=torch.Generator().manual_seed(0))
    check(backend, logits, target, weight=weight, ignore_index=-1, label_smoothing=0.1 * (turn // 2 % 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignore_index", [255, -100, 2, 2**32 + 2])
@COARSE
def test_every_ignore_index(backend, ignore_index, upsample):
    target = make_target((2, 10, 15), 5, ignore_index=ignore_index)
    logits = make_logits((2, 5, 5, 5) if upsample else (2, 5, 10, 15), torch.float32)
    check(backend, logits, target, ignore_index=ignore_index, upsample=upsample)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fine", [(24, 36), (19, 23), (6, 9), (4, 5), (1, 1)], ids=str)
@CORNERS
def test_coarse_logits(backend, dtype, fine, align_corners):
    turn = DTYPES.index(dtype) + align_corners
    make = LAYOUTS_OF_COARSE[turn % len(LAYOUTS_OF_COARSE)]
    logits = make(lambda *shape: make_logits(shape, dtype))
    options = dict(weight=WEIGHT if turn % 2 else None, label_smoothing=0.1 * (turn // 2 % 2))
    target = make_target((2, *fine), 5, dtype=LABELS[turn % 3])
    check(backend, logits, target, upsample="bilinear", align_corners=align_corners, **options)


LAYOUTS_OF_COARSE = [
    lambda make: make(2, 5, 6, 9),
    lambda make: make(2, 5, 6, 9).to(memory_format=torch.channels_last),
    lambda make: make(2, 9, 9, 6).transpose(2, 3)[:, 2:7],
    lambda make: make(1, 5, 8, 20).expand(2, 5, 8, 20)[..., 1:7, 1:19:2],
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", [1, 2, 19, 33, 150])
def test_coarse_logits_of_any_number_of_classes(backend, classes):
    logits, target = make_logits((1, classes, 3, 5), torch.float32), make_target((1, 9, 13), classes)
    check(backend, logits, target, upsample="bilinear", label_smoothing=0.1)


@st.composite
def problems(draw):
    classes, seed = draw(st.integers(1, 40)), draw(st.integers(0, 2**20))
    upsample = draw(st.sampled_from([None, "bilinear"]))
    sides = st.integers(1, 20)
    spatial = draw(st.lists(sides, min_size=2 if upsample else 0, max_size=2 if upsample else 3))
    fine = draw(st.lists(sides, min_size=2, max_size=2)) if upsample else spatial
    images, dtype = draw(st.integers(1, 3)), draw(st.sampled_from(DTYPES))
    order = [0, 1, *(2 + axis for axis in draw(st.permutations(range(len(spatial)))))]
    if draw(st.booleans()):
        order.append(order.pop(1))  # channels last
    logits = make_logits((images, classes, *spatial), dtype, seed=seed)
    logits = logits.permute(order).contiguous().permute(torch.tensor(order).argsort().tolist())
    ignored, labels = draw(st.sampled_from([0.0, 0.3, 1.0])), draw(st.sampled_from(LABELS))
    target = make_target((images, *fine), classes, ignored=ignored, dtype=labels, seed=seed)
    weight = torch.rand(classes, generator=torch.Generator().manual_seed(seed))
    options = dict(label_smoothing=draw(st.sampled_from([0.0, 0.2])), upsample=upsample)
    options |= dict(align_corners=upsample is not None and draw(st.booleans()))
    return logits, target, number(target.shape, seed), draw(st.sampled_from([None, weight])), options


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_problems(backend):
    @settings(
        max_examples=20 if backend in EMULATED or backend == "triton" else 150,  # compiled for each on a GPU
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(problem=problems())
    def anything(problem):
        *given, options = problem
        check(backend, *given, **options)

    anything()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 1e4], ids=str)
@pytest.mark.parametrize("which", ["own", "other", "all"])
def test_extreme_logits_of_valid_pixels(backend, value, which):
    """They change the pixels that see them, as in eager PyTorch, and no others."""
    logits, target = make_logits((2, 5, 3, 31), torch.float32), make_target((2, 3, 31), 5)
    target[1, 2, 4] = 2 if which == "own" else 1
    logits[1, slice(None) if which == "all" else 2, 2, 4] = value
    check(backend, logits, target)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("way", ["full", "centres", "corners"])
def test_gradcheck(backend, label_smoothing, way):
    device = device_of(backend)
    options = {} if way == "full" else dict(upsample="bilinear", align_corners=way == "corners")
    logits = make_logits((2, 5, 4, 3), spread=1.0).to(device).requires_grad_()
    target = make_target((2, 4, 3) if way == "full" else (2, 6, 5), 5).to(device)
    options |= dict(weight=WEIGHT.to(device), ignore_index=255, label_smoothing=label_smoothing)
    assert torch.autograd.gradcheck(
        lambda x: pixel_nll(x, target, backend=backend, **options),
        logits,
        fast_mode=backend in EMULATED,  # one random direction, not each of 120 logits
    )


# ---- void pixels and bad labels -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_void_pixels_are_zero(backend, value, layout, label_smoothing):
    """Whatever their logits and their incoming gradient are. The other pixels keep their bits."""
    logits, target = make_logits((2, 5, 6, 33), torch.float32), make_target((2, 6, 33), 5, ignored=0.3)
    logits, void, grad_nll = logits.contiguous(memory_format=layout), target == 255, number(target.shape)
    changed = torch.where(void.unsqueeze(1), value, logits).contiguous(memory_format=layout)
    options = dict(weight=WEIGHT, label_smoothing=label_smoothing)
    clean, clean_grad = map_and_grad(backend, logits, target, grad_nll, **options)
    nll, grad = map_and_grad(backend, changed, target, grad_nll.masked_fill(void, value), **options)
    assert (nll[void] == 0).all() and (grad.movedim(1, -1)[void] == 0).all()
    assert torch.equal(nll, clean) and torch.equal(grad, clean_grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@CORNERS
def test_a_coarse_logit_that_void_pixels_alone_see(backend, value, label_smoothing, align_corners):
    logits, target = make_logits((2, 5, 4, 6), torch.float32), make_target((2, 16, 24), 5, ignored=0.1)
    sees = oracle.interpolation(4, 16, align_corners)[:, 2] != 0
    sees = sees[:, None] & (oracle.interpolation(6, 24, align_corners)[:, 3] != 0)
    target[0, torch.from_numpy(sees)] = 255
    void, grad_nll = target == 255, number(target.shape)
    changed = logits.clone()
    changed[0, :, 2, 3] = value
    options = dict(weight=WEIGHT, label_smoothing=label_smoothing)
    options |= dict(upsample="bilinear", align_corners=align_corners)
    clean, clean_grad = map_and_grad(backend, logits, target, grad_nll, **options)
    nll, grad = map_and_grad(backend, changed, target, grad_nll.masked_fill(void, value), **options)
    assert (nll[void] == 0).all() and (grad[0, :, 2, 3] == 0).all()
    # float32 throughout; the cells around that logit may use another interpolation
    torch.testing.assert_close(nll, clean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, clean_grad, rtol=1e-5, atol=1e-6 * clean_grad.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("spatial", [(), (0, 4), (6, 7), "coarse"], ids=str)
def test_nothing_valid_and_nothing_at_all(backend, images, spatial):
    options = dict(upsample="bilinear") if spatial == "coarse" else {}
    coarse, fine = ((3, 4), (12, 16)) if options else (spatial, spatial)
    logits, target = torch.full((images, 5, *coarse), torch.nan), torch.full((images, *fine), 255)
    nll, grad = map_and_grad(backend, logits, target, number(target.shape), label_smoothing=0.1, **options)
    assert (nll == 0).all() and (grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label", [5, -1, 200, 2**32 + 1])
@COARSE
def test_a_label_that_is_no_class(backend, label, upsample):
    target = make_target((2, 12, 16), 5)
    logits = make_logits((2, 5, 3, 4) if upsample else (2, 5, 12, 16), torch.float32)
    bad = torch.zeros(target.shape, dtype=torch.bool)
    bad[1, 2, 3] = True
    options = dict(upsample=upsample, label_smoothing=0.1)
    given = target.masked_fill(bad, label), number(target.shape)
    if backend in ("cpu", "reference"):
        with pytest.raises(
            ValueError, match=rf"^target has label {label} at \(1, 2, 3\), the first of 1 bad pi"
        ):
            map_and_grad(backend, logits, *given, **options)
        return
    nll, grad = map_and_grad(backend, logits, *given, **options)
    void, void_grad = map_and_grad(backend, logits, target.masked_fill(bad, 255), given[1], **options)
    assert torch.equal(nll.isnan(), bad) and torch.equal(nll.masked_fill(bad, 0), void)
    assert torch.equal(grad, void_grad)


# ---- equal to other losses ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@COARSE
def test_cross_entropy(backend, label_smoothing, upsample):
    """The map is that of reduction="none" without `pixel_weight`, and its sum is the fused loss."""
    device = device_of(backend)
    target = make_target((2, 12, 16), 5).to(device)
    logits = make_logits((2, 5, 3, 4) if upsample else (2, 5, 12, 16)).to(device).requires_grad_()
    options = dict(ignore_index=255, label_smoothing=label_smoothing, upsample=upsample, backend=backend)
    weight, pixel_weight = WEIGHT.double().to(device), number(target.shape).double().to(device)
    nll = pixel_nll(logits, target, weight, **options)
    (grad,) = torch.autograd.grad(nll.sum(), logits, retain_graph=True)
    (weighted_grad,) = torch.autograd.grad(nll, logits, pixel_weight)
    # a pixel weight beneath void has no effect
    weights = pixel_weight.masked_fill(target == 255, torch.nan)
    for factor, expected, expected_grad in ((None, nll, grad), (weights, nll * pixel_weight, weighted_grad)):
        options["pixel_weight"] = factor
        losses = cross_entropy(logits, target, weight, reduction="none", **options)
        total = cross_entropy(logits, target, weight, reduction="sum", **options)
        (losses_grad,) = torch.autograd.grad(losses.sum(), logits)
        (total_grad,) = torch.autograd.grad(total, logits)
        # all in float64, eps 2.2e-16: sums of 300 terms in another order, of both signs with pixel weights
        close = dict(rtol=1e-13, atol=1e-12)
        torch.testing.assert_close(losses, expected, **close)
        torch.testing.assert_close(losses_grad, expected_grad, **close)
        torch.testing.assert_close(total, expected.sum(), **close)
        torch.testing.assert_close(total_grad, expected_grad, **close)
        assert (losses[target == 255] == 0).all()


# ---- autograd -------------------------------------------------------------------------------------------


def on_device(backend, upsample=None, dtype=torch.float32):
    """A leaf, its target, and the map as a function of logits."""
    device = device_of(backend)
    leaf = make_logits((2, 5, 4, 8) if upsample else (2, 5, 12, 16), dtype).to(device).requires_grad_()
    target, weight = make_target((2, 12, 16), 5).to(device), WEIGHT.to(device)
    options = dict(ignore_index=255, label_smoothing=0.1, upsample=upsample, backend=backend)
    return leaf, target, lambda logits, labels=target: pixel_nll(logits, labels, weight, **options)


def focal(nll):
    return ((1 - torch.exp(-nll)) ** 2 * nll).sum()


def rounded(backend):
    """The reference adds in another order when it is transformed, a few float32 roundings. Kernels do not."""
    return dict(rtol=1e-5, atol=1e-6) if backend == "reference" else dict(rtol=0, atol=0)


@pytest.mark.parametrize("backend", [b for b in KERNELS if b.values[0] == "cpu"])
@pytest.mark.parametrize("ratio", [4, 2.7, 0.6])
def test_same_bits_every_time_and_for_any_number_of_threads(backend, ratio):
    logits, fine = make_logits((2, 5, 40, 37), torch.float32), (round(ratio * 40), round(ratio * 37))
    target, threads, results = make_target((2, *fine), 5), torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(map_and_grad(backend, logits, target, number(target.shape), upsample="bilinear"))
    finally:
        torch.set_num_threads(threads)
    for nll, grad in results[1:]:
        assert torch.equal(nll, results[0][0]) and torch.equal(grad, results[0][1])


INCOMING = {
    "scalar": lambda full: full[:1, :1, :1].expand_as(full),
    "transposed": lambda full: full.mT.contiguous().mT,
    "sliced": lambda full: torch.stack([full, -full], -1)[..., 0],
    "of one row": lambda full: full[:, :1].expand_as(full),
    "float16": lambda full: full.half(),
    "float64": lambda full: full.double(),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("incoming", INCOMING)
@COARSE
def test_every_incoming_gradient(backend, incoming, upsample):
    """Any strides have the bits of a contiguous one. Other dtypes are converted."""
    leaf, target, nll_of = on_device(backend, upsample)
    grad_nll = INCOMING[incoming](number(target.shape).to(leaf.device))
    nll = nll_of(leaf)
    (grad,) = torch.autograd.grad(nll, leaf, grad_nll, retain_graph=True)
    (expected,) = torch.autograd.grad(nll, leaf, grad_nll.float().contiguous())
    assert torch.equal(grad, expected) and grad.any()
    if backend != "reference":
        corners = None if upsample is None else False
        rest = (target, WEIGHT.to(leaf.device), 255, 0.1, corners)
        operator = backends.get(backend).operators().pixel_nll_backward
        assert torch.equal(operator(leaf.detach(), grad_nll, *rest), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@COARSE
def test_several_backward_passes(backend, upsample):
    """Of one map with retain_graph, whose first gradient the caller overwrites, and of two maps."""
    leaf, target, nll_of = on_device(backend, upsample)
    nll, other = nll_of(leaf), nll_of(leaf)
    ones, incoming = torch.ones_like(nll), number(target.shape).to(leaf.device)
    (first,) = torch.autograd.grad(nll, leaf, incoming, retain_graph=True)
    expected = first.clone()
    first.fill_(torch.nan)
    assert torch.equal(torch.autograd.grad(nll, leaf, incoming, retain_graph=True)[0], expected)
    (both,) = torch.autograd.grad([nll, other], leaf, [incoming, ones])
    (second,) = torch.autograd.grad(nll_of(leaf), leaf, ones)
    torch.testing.assert_close(both, expected + second, rtol=1e-6, atol=1e-7)  # a sum in float32
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(nll, leaf, incoming)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_no_graph(backend):
    leaf, _, nll_of = on_device(backend)
    nll = nll_of(leaf)
    with torch.no_grad():
        evaluated = nll_of(leaf)
    assert nll.requires_grad and not evaluated.requires_grad and not nll_of(leaf.detach()).requires_grad
    assert torch.equal(evaluated, nll)


@pytest.mark.parametrize("backend", BACKENDS)
@COARSE
def test_the_second_derivative(backend, upsample):
    """With create_graph the gradient has its value. Only the reference differentiates it."""
    leaf, _, nll_of = on_device(backend, upsample, torch.float64)
    (expected,) = torch.autograd.grad(focal(nll_of(leaf)), leaf)
    factor = torch.ones((), dtype=torch.float64, device=leaf.device, requires_grad=True)
    (grad,) = torch.autograd.grad(factor * focal(nll_of(leaf)), leaf, create_graph=True)
    torch.testing.assert_close(grad.detach(), expected, rtol=1e-12, atol=1e-15)
    for variable in (leaf, factor):
        derive = lambda variable=variable: torch.autograd.grad(
            grad.square().sum(), variable, retain_graph=True
        )  # noqa: E731
        if backend == "reference":
            assert derive()[0].isfinite().all() and derive()[0].any()
        else:
            with pytest.raises(NotImplementedError, match=f"^{DOUBLE}$"):
                derive()


@pytest.mark.parametrize("backend", BACKENDS)
@COARSE
def test_forward_mode(backend, upsample):
    leaf, _, nll_of = on_device(backend, upsample, torch.float64)
    logits = leaf.detach()
    if backend == "reference":
        _, tangent = torch.func.jvp(lambda x: focal(nll_of(x)), (logits,), (logits,))
        expected = (torch.autograd.grad(focal(nll_of(leaf)), leaf)[0] * logits).sum()
        torch.testing.assert_close(tangent, expected, rtol=1e-12, atol=0)
        return
    for function in (nll_of, torch.func.grad(lambda x: focal(nll_of(x)))):
        with pytest.raises(NotImplementedError, match=f"^{JVP}$"):
            torch.func.jvp(function, (logits,), (logits,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"^{JVP}$"):
        nll_of(torch.autograd.forward_ad.make_dual(logits, logits))


# ---- torch.func, torch.compile, autocast ----------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@COARSE
def test_torch_func(backend, upsample):
    """grad, vmap over images, and vmap of grad."""
    leaf, target, nll_of = on_device(backend, upsample)
    images = leaf.detach().unsqueeze(1), target.unsqueeze(1)
    (expected,) = torch.autograd.grad(focal(nll_of(leaf)), leaf)
    close = rounded(backend)
    grad, loss = torch.func.grad_and_value(lambda x: focal(nll_of(x)))(leaf.detach())
    torch.testing.assert_close(grad, expected, **close)
    torch.testing.assert_close(torch.vmap(nll_of)(*images).squeeze(1), nll_of(leaf).detach(), **close)
    grads = torch.vmap(torch.func.grad(lambda x, y: focal(nll_of(x, y))))(*images)
    torch.testing.assert_close(grads.squeeze(1), expected, **close)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(backend, reentrant):
    leaf, _, nll_of = on_device(backend)
    (expected,) = torch.autograd.grad(focal(nll_of(leaf * 2)), leaf)
    checkpoint(lambda x: focal(nll_of(x * 2)), leaf, use_reentrant=reentrant).backward()
    assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@COARSE
def test_compiled_equals_eager(backend, compiler, upsample):
    torch._dynamo.reset()
    leaf, _, nll_of = on_device(backend, upsample)
    compiled = torch.compile(lambda x: focal(nll_of(x * 2)), fullgraph=True, backend=compiler)
    loss, expected = compiled(leaf), focal(nll_of(leaf * 2))
    # float32: the compiler fuses the function of the map, and adds the pixels in another order
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    (grad,), (expected,) = (torch.autograd.grad(value, leaf) for value in (loss, expected))
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(backend, dtype):
    """Logits of half precision are not converted. The map is float32."""
    leaf, _, nll_of = on_device(backend)
    head = torch.nn.Conv2d(5, 5, 1).to(leaf.device)
    with torch.autocast(leaf.device.type, dtype):
        logits = head(leaf)
        nll = nll_of(logits)
    assert logits.dtype == dtype and nll.dtype == torch.float32
    assert torch.equal(nll, nll_of(logits))
    focal(nll).backward()
    assert head.weight.grad.isfinite().all() and head.weight.grad.any()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["meta", "fake"])
def test_tensors_without_values(backend, dtype, way):
    mode = FakeTensorMode() if way == "fake" else torch.device("meta")
    device = "meta" if way == "meta" else device_of(backend)
    with mode:
        logits = torch.empty(2, 5, 3, 4, dtype=dtype, device=device, requires_grad=True)
        for size, upsample in (((3, 4), None), ((12, 16), "bilinear")):
            target = torch.empty(2, *size, dtype=torch.int64, device=device)
            nll = pixel_nll(logits, target, upsample=upsample, backend=backend)
            assert nll.shape == target.shape and nll.dtype == arithmetic_of(logits)
            (grad,) = torch.autograd.grad(nll.sum(), logits)
            assert grad.shape == logits.shape and grad.dtype == dtype


# ---- errors ---------------------------------------------------------------------------------------------

LOGITS, TARGET = make_logits((2, 5, 6, 7), torch.float32), make_target((2, 6, 7), 5)
COARSE_LOGITS = "logits has shape (2, 5, 7) and target (2, 6, 7), expected (N, C, h, w) and (N, H, W)"
# (arguments that replace the good ones, exception, message)
BAD = {
    "type": (dict(logits=LOGITS.numpy()), TypeError, "logits is a ndarray, expected a torch.Tensor"),
    "dtype": (dict(logits=TARGET), TypeError, "logits has dtype torch.int64, expected one of torch.float64, "),
    "shape": (dict(logits=LOGITS[:, 0, 0, 0]), ValueError, "logits has shape (2,), expected (N, C, *spatial)"),
    "target type": (dict(target=1), TypeError, "target is a int, expected a torch.Tensor"),
    "target dtype": (dict(target=TARGET.short()), TypeError, "target has dtype torch.int16, expected one of torch.int64, torch.int32, torch.uint8"),
    "probabilities": (dict(target=LOGITS.softmax(1)), TypeError, "target has dtype torch.float32, expected one of torch.int64, torch.int32, torch.uint8: class indices only"),
    "target shape": (dict(target=TARGET[:, :5]), ValueError, "target has shape (2, 5, 7), expected (N, *spatial) = (2, 6, 7) for logits (2, 5, 6, 7)"),
    "target channel": (dict(target=TARGET[:, None]), ValueError, "target has shape (2, 1, 6, 7), expected (N, *spatial) = (2, 6, 7) for logits (2, 5, 6, 7): pass target.squeeze(1)"),
    "target device": (dict(target=TARGET.to("meta")), ValueError, "target is on meta, expected cpu like logits"),
    "coarse shape": (dict(logits=LOGITS[:, :, 0], upsample="bilinear"), ValueError, COARSE_LOGITS),
    "weight shape": (dict(weight=[1.0, 2.0]), ValueError, "weight has shape (2,), expected (5,), one per class"),
    "weight dtype": (dict(weight=torch.ones(5).long()), TypeError, "weight has dtype torch.int64, expected one of"),
    "weight type": (dict(weight=1.0), TypeError, "weight is a float, expected a torch.Tensor, an array or a list of numbers"),
    "weight device": (dict(weight=torch.ones(5, device="meta")), ValueError, "weight is on meta, expected cpu like logits"),
    "weight gradient": (dict(weight=torch.ones(5, requires_grad=True)), ValueError, "weight requires a gradient, expected a constant: only logits are differentiated"),
    "ignore_index": (dict(ignore_index=None), TypeError, "ignore_index is None (NoneType), expected an integer"),
    "label_smoothing": (dict(label_smoothing=1.5), ValueError, "label_smoothing is 1.5, expected a number from 0 to 1"),
    "label_smoothing type": (dict(label_smoothing="0.1"), TypeError, "label_smoothing is '0.1' (str), expected a number"),
    "upsample": (dict(upsample="nearest"), ValueError, "upsample is 'nearest', expected one of None, 'bilinear'"),
    "align_corners": (dict(align_corners=True), ValueError, "align_corners is True, expected False: upsample is None"),
    "align_corners type": (dict(align_corners=1, upsample="bilinear"), TypeError, "align_corners is 1 (int), expected a bool"),
    "backend": (dict(backend="gpu"), ValueError, "backend is 'gpu', expected one of 'auto', 'cpu', 'cuda', "),
    "backend device": (dict(backend="cuda"), ValueError, "backend is 'cuda', expected one of 'auto', 'cpu', "),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_argument(backend, case):
    bad, error, message = BAD[case]
    arguments = dict(logits=LOGITS, target=TARGET, ignore_index=255, backend=backend)
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        pixel_nll(**arguments | bad)
