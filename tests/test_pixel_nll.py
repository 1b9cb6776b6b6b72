"""`pixel_nll`: the map and its gradient against the float64 oracle, void pixels, other losses."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import (
    BACKENDS,
    DTYPES,
    EMULATED,
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

from ial_cuda import cross_entropy, pixel_nll

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
    leaf, weight = move(logits, device).requires_grad_(), None if weight is None else move(weight, device)
    target, grad_nll = move(target, device), move(grad_nll, device)
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

    The rounding of -log pi is at its own size plus the weight, since pi rounds near 1. That of the gradient
    is at the weight times the incoming gradient. Interpolated logits are rounded themselves, and a coarse
    gradient is a sum over the pixels around it.
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
@pytest.mark.parametrize("classes", [1, 2, 19, 33, 70])
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
        max_examples=10 if backend in EMULATED or backend == "triton" else 150,  # compiled for each on a GPU
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
    if backend == "reference" and align_corners:
        pytest.skip(
            "F.interpolate multiplies logits by a weight of 0, where a pixel is exactly on another one"
        )
    logits, target = make_logits((2, 5, 4, 6), torch.float32), make_target((2, 16, 24), 5, ignored=0.1)
    rows, columns = (oracle.interpolation(*pair, align_corners) for pair in ((4, 16), (6, 24)))
    target[0, torch.from_numpy(np.outer(rows[:, 2], columns[:, 3]) != 0)] = 255
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
