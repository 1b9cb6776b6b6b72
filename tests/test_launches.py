"""The launches of the CUDA kernels, on a GPU and emulated: every tile, grid and limit, bad labels."""

from __future__ import annotations

import math

import pytest
import simt
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    HIERARCHY,
    KERNELS,
    LAUNCHED,
    check,
    device_of,
    make_logits,
    make_target,
    poisoned,
    run,
)

from ial_cuda import Hierarchy, backends, importance_aware_loss

#: Some numbers of classes for each tile, and the limits of its range. One for each under the slow sanitizers.
CLASSES = (
    [1, 12, 20, 25, 33, 59]
    if simt.SANITIZED
    else [1, 8, 9, 11, 12, 16, 19, 20, 24, 25, 32, 33, 59, 171, 1000]
)
LAYOUTS = ["contiguous", "cropped", "channels_last"]
ONE_LAUNCH = [backend for backend in LAUNCHED if backends.get(backend.values[0]).one_launch]


def levelled(classes, levels):
    return Hierarchy([list(range(k, classes, levels)) for k in range(min(levels, classes))])


def tiled(dtype, classes, layout):
    """Logits and target."""
    logits = make_logits((2, classes, 4, 64), dtype)
    target = make_target((2, 4, 64), classes, ignore_index=-1)
    if layout == "cropped":
        return logits[..., 1:4, 8:56], target[..., 1:4, 8:56]
    if layout == "channels_last":
        return logits.to(memory_format=torch.channels_last), target
    return logits, target


@pytest.mark.parametrize("backend", LAUNCHED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tile(backend, dtype, classes, layout):
    """Rows that can be read in vectors, for every number of classes, contiguous and in a larger image."""
    logits, target = tiled(dtype, classes, layout)
    check(backend, logits, target, levelled(classes, 4), ignore_index=-1)


@pytest.mark.parametrize("backend", LAUNCHED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tile_of_one_pass(backend, dtype, classes, layout):
    logits, target = tiled(dtype, classes, layout)
    check(backend, logits, target, Hierarchy.flat(classes), ignore_index=-1)


@pytest.mark.parametrize("backend", LAUNCHED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 24, 33, 65])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("levels", [1, 4])
def test_every_tile_with_label_smoothing(backend, dtype, classes, layout, levels):
    logits, target = tiled(dtype, classes, layout)
    check(backend, logits, target, levelled(classes, levels), ignore_index=-1, label_smoothing=0.1)


@pytest.mark.parametrize("backend", [b for b in LAUNCHED if b not in ONE_LAUNCH])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("classes", "smoothing"), [*((classes, 0.0) for classes in CLASSES), (24, 0.1), (33, 0.1)]
)
@pytest.mark.parametrize("layout", [*LAYOUTS, "coarse, x2", "coarse, x4"])
def test_every_tile_of_pixel_nll(backend, dtype, classes, layout, smoothing):
    """The map is that of PyTorch, with NaN where a label is bad. The gradient has the bits of
    reduce_backward."""
    operators, device = backends.get(backend).operators(), device_of(backend)
    logits, target = (tensor.to(device) for tensor in tiled(dtype, classes, layout))
    fine, corners = logits.double(), None
    if layout.startswith("coarse"):
        logits, corners = logits[..., ::2, :: int(layout[-1])], False
        fine = F.interpolate(logits.double(), target.shape[1:], mode="bilinear")
    target[1, 1, 7], target[1, 2, 11:13] = classes, -7
    is_class, bad = (target >= 0) & (target < classes), (target < -1) | (target >= classes)
    weight = torch.linspace(0.5, 1.5, classes, dtype=torch.float64, device=device)
    options = {"reduction": "none", "label_smoothing": smoothing}
    expected = F.cross_entropy(fine, target.where(is_class, -100), weight, **options)

    with poisoned():
        nll = operators.pixel_nll(logits, target, weight, -1, smoothing, corners)
    assert torch.equal(nll.isnan(), bad) and (nll[target == -1] == 0).all()
    # differences of logits, rounded a few times
    atol = 4 * torch.finfo(nll.dtype).eps * float(fine.max() - fine.min())
    torch.testing.assert_close(nll[~bad].double(), expected[~bad], rtol=0, atol=atol)

    incoming = torch.randn(target.shape, generator=torch.Generator().manual_seed(1)).to(nll)
    with poisoned():
        grad = operators.pixel_nll_backward(logits, incoming, target, weight, -1, smoothing, corners)
    unit = torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64, device=device).expand(2, 1, 5).contiguous()
    pixels = (target, weight, incoming, [0] * classes, -1, "exact", smoothing)
    assert torch.equal(grad, operators.reduce_backward(logits, unit, *pixels, corners))


@pytest.mark.parametrize("backend", ONE_LAUNCH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "shape", [(1, 19, 64, 256), (3, 5, 64, 256), (5, 5, 64, 256), (7, 3, 64, 64), (4, 5, 63, 61)], ids=str
)
def test_one_launch(backend, dtype, scope, reduction, shape):
    """Tiles in shared memory, in registers, read again, and all three, in one wave and in several.

    Also cases that the cooperative kernel does not support: odd rows, more pooled images than
    multiprocessors, float64.
    """
    hierarchy = Hierarchy([list(range(k, shape[1], 3)) for k in range(3)])
    target = make_target((shape[0], *shape[2:]), shape[1])
    generator = torch.Generator().manual_seed(1)
    options = {
        "weight": torch.rand(shape[1], generator=generator) + 0.5,
        "pixel_weight": torch.rand(target.shape, generator=generator),
        "factor_scope": scope,
        "reduction": reduction,
    }
    check(backend, make_logits(shape, dtype), target, hierarchy, **options)


@pytest.mark.parametrize("backend", ONE_LAUNCH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("incoming", [1.0, -0.3, 65536.0])
def test_every_backward_pass_of_one_launch(backend, dtype, incoming):
    """The first pass returns the gradient of the launch, the second computes another."""
    device = device_of(backend)
    leaf = make_logits((2, 5, 16, 32), dtype).to(device).requires_grad_()
    target = make_target((2, 16, 32), 5).to(device)
    two_launches = {"simt_one_launch": "simt", "cuda_one_launch": "cuda_two_launches"}[backend]
    grads = {}
    for name in (two_launches, backend):
        loss = importance_aware_loss(leaf, target, HIERARCHY, backend=name)
        grads[name] = [
            torch.autograd.grad(loss, leaf, torch.tensor(incoming).to(loss), retain_graph=True)[0]
            for _ in range(3)
        ]
    expected = grads[two_launches][0]
    for grad in grads[backend]:
        # sums of other blocks, then rounded to the dtype of the logits
        atol = 1e-6 * float(grad.abs().max())
        torch.testing.assert_close(grad, expected, rtol=2 * torch.finfo(dtype).eps, atol=atol)
    assert torch.equal(*grads[backend][1:])


class Step:
    """The operators of a training step with one level. By default it has all kinds of weights."""

    def __init__(self, backend, dtype, size, *, smoothing=0.0, reduction="mean", corners=None, **changes):
        self.operators, device = backends.get(backend).operators(), device_of(backend)
        shape = changes.pop("shape", (2, 5, 16, 32))
        generator = torch.Generator().manual_seed(1)
        self.logits = make_logits(shape, dtype).to(device)
        target = make_target((shape[0], *size), shape[1]).to(device)
        weight = (torch.rand(shape[1], generator=generator) + 0.5).to(device)
        pixel_weight = torch.rand(target.shape, generator=generator).to(device)
        levels = [0] * shape[1]
        self.pixels = (target, weight, pixel_weight, levels, 255, "exact", smoothing)
        self.options, self.corners = ([], 1.0, reduction, "mean", "image"), corners

    def forward(self, expected=None, divisor=None):
        return self.operators.loss_and_grad(
            self.logits, *self.pixels, divisor, *self.options, self.corners, expected, None
        )

    def rescale_(self, grad, incoming, results, expected=None):
        loss, _, _, grad_stats, _, computed_for = results
        grad_loss = torch.full_like(loss, incoming)
        self.operators.rescale_(
            grad, grad_loss, computed_for, self.logits, grad_stats, *self.pixels, self.corners, expected
        )

    def reduce(self):
        return self.operators.reduce(self.logits, *self.pixels, False, self.corners)

    def backward(self, grad_stats):
        return self.operators.reduce_backward(self.logits, grad_stats, *self.pixels, self.corners)


SIZES = pytest.mark.parametrize(
    ("size", "corners"), [((16, 32), None), ((64, 128), False), ((33, 17), True)], ids=str
)


@pytest.mark.parametrize("backend", [b for b in LAUNCHED if b not in ONE_LAUNCH])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@SIZES
def test_the_gradient_of_one_pass_has_the_bits_of_reduce_backward(backend, dtype, smoothing, size, corners):
    step = Step(backend, dtype, size, smoothing=smoothing, corners=corners)
    state = torch.tensor([0.3, 1.0], dtype=torch.float64, device=step.logits.device)
    for expected in (state, *[None] * (dtype != torch.float16)):
        with poisoned():
            results = step.forward(expected)
        _, _, stats, grad_stats, grad, computed_for = results
        # Both add float32 to float64, in different orders.
        rtol = 1e-13 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(stats[..., [0, 3, 4]], step.reduce()[..., [0, 3, 4]], rtol=rtol, atol=0)
        assert (stats[..., [1, 2]] == 0).all()
        assert computed_for == (1 if expected is None else 0.3)
        assert torch.equal(grad, step.backward(grad_stats * computed_for))
        for incoming in (0.3, -7.0, 65536.0):
            rescaled = grad.clone()
            step.rescale_(rescaled, incoming, results)
            as_loss = torch.tensor(incoming, dtype=results[0].dtype).item()  # rounded like the loss
            assert torch.equal(rescaled, step.backward(grad_stats * as_loss))


@pytest.mark.parametrize("backend", [b for b in LAUNCHED if b not in ONE_LAUNCH])
@SIZES
def test_rescaling_is_decided_on_the_device(backend, size, corners):
    """A gradient that is right for the incoming one is not written. A number that arrives twice in a row
    becomes the expected one."""
    step = Step(backend, torch.float32, size, corners=corners)
    state = torch.tensor([4.0, math.nan], dtype=torch.float64, device=step.logits.device)
    results = step.forward(state)
    untouched = torch.full_like(step.logits, 12)
    for incoming, expected in (
        (4.0, 4.0),
        (1.0, 4.0),
        (1.0, 1.0),
        (4.0, 1.0),
        (math.inf, 1.0),
        (math.inf, 1.0),
        (math.nan, 1.0),
        (math.nan, 1.0),
        (0.5, 1.0),
        (0.5, 0.5),
    ):
        grad = untouched.clone()
        step.rescale_(grad, incoming, results, state)
        assert torch.equal(grad, untouched) == (incoming == 4.0)
        assert state[0] == expected and (state[1] == incoming or math.isnan(incoming))
    assert results[-1] == 4.0  # a snapshot


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("divisor", [None, 100.0])
@SIZES
def test_launches_of_one_pass(reduction, divisor, size, corners):
    """One kernel reads the logits and writes the gradient. The others read labels or sums.

    In bytes, the logits are read twice, and the labels twice if their weight is needed first. The backward
    pass adds one launch. It returns at once if the incoming gradient is the expected one.
    """
    simt.load()
    step = Step("simt", torch.float32, size, reduction=reduction, corners=corners)
    given = None if divisor is None else torch.tensor(divisor, dtype=torch.float64)
    simt.launches()
    results = step.forward(divisor=given)
    weights = reduction == "mean" and divisor is None
    assert simt.launches() == 3 + weights  # weights, the pass, sums, the loss
    step.rescale_(results[4], 1.0, results)
    assert simt.launches() == 1


@pytest.mark.parametrize("backend", LAUNCHED)
@pytest.mark.parametrize("shape", [(3, 5, 13), (2, 3, 7, 11), (1, 4, 3, 5, 7), (2, 4, 40, 64)], ids=str)
@pytest.mark.parametrize("strides", ["contiguous", "transposed", "step 2"])
def test_the_weight_of_every_layout_of_labels(backend, shape, strides):
    """In vectors or one by one, which depends on the labels only."""
    size = (shape[0], *shape[2:])
    target = make_target(size, shape[1])
    pixel_weight = torch.rand(size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    if strides == "transposed":
        target = target.transpose(1, -1).contiguous().transpose(1, -1)
    if strides == "step 2":
        pixel_weight = torch.stack([pixel_weight, torch.full_like(pixel_weight, math.nan)], -1)[..., 0]
    options = dict(weight=torch.linspace(0.1, 3, shape[1]), pixel_weight=pixel_weight)
    check(backend, make_logits(shape), target, Hierarchy.flat(shape[1]), **options)


@pytest.mark.parametrize("backend", LAUNCHED)
@pytest.mark.parametrize(
    ("dtype", "levels"),
    [(torch.float64, 9), (torch.float64, 10), (torch.float32, 18), (torch.float32, 19), (torch.float32, 256)],
)
def test_more_levels_than_a_block_has_room_for(backend, dtype, levels):
    hierarchy = Hierarchy([[c] for c in range(levels)])
    logits = make_logits((1, levels, 3, 128), dtype)
    check(
        backend,
        logits,
        make_target((1, 3, 128), levels, ignore_index=-1),
        hierarchy,
        ignore_index=-1,
        lambdas=0.1,
        alpha=0.5,
    )


@pytest.mark.parametrize("backend", LAUNCHED)
@pytest.mark.parametrize("scope", ["image", "batch"])
def test_more_images_than_fit_into_shared_memory(backend, scope):
    check(backend, make_logits((400, 5, 3), torch.float32), make_target((400, 3), 5), factor_scope=scope)


@pytest.mark.parametrize("backend", LAUNCHED)
def test_limits_are_errors(backend):
    for classes, levels, message in (
        (1025, 1, "1025 classes, expected at most 1024"),
        (300, 300, "300 levels, expected at most 256"),
    ):
        hierarchy = Hierarchy([list(range(k, classes, levels)) for k in range(levels)])
        with pytest.raises(ValueError, match=message):
            importance_aware_loss(
                make_logits((1, classes)).to(device_of(backend)),
                torch.zeros(1, dtype=torch.long, device=device_of(backend)),
                hierarchy,
                ignore_index=-100,
                backend=backend,
            )


@pytest.mark.parametrize("backend", LAUNCHED)
@pytest.mark.parametrize("levels", [1, 2])
def test_more_images_than_a_grid_has_blocks(backend, levels):
    """Each of the five sums of an image and level has a block. The check comes before any allocation."""
    device, images = device_of(backend), 2**31 // (5 * levels)
    logits = torch.zeros(1, 2, device=device).expand(images, 2)
    target = torch.zeros(1, dtype=torch.uint8, device=device).expand(images)
    message = rf"logits has {images} images, expected at most \d+ with {levels} levels on CUDA"
    with pytest.raises(ValueError, match=message):
        backends.get(backend).operators().reduce(
            logits, target, None, None, [0, levels - 1], 255, "exact", 0.0, False
        )


@pytest.mark.parametrize("backend", [b for b in LAUNCHED if b not in ONE_LAUNCH])
def test_a_gradient_that_cannot_be_overwritten(backend):
    device = device_of(backend)
    logits, target = make_logits((2, 5, 4, 8), torch.float32).to(device), make_target((2, 4, 8), 5).to(device)
    grad_stats = torch.zeros(2, 4, 5, dtype=torch.float64, device=device)
    grad_loss, computed_for = (
        torch.ones((), device=device),
        torch.ones((), dtype=torch.float64, device=device),
    )
    pixels = (target, None, None, [1, 2, 3, 0, 1], 255, "exact", 0.0)
    for grad, exception, message in (
        (
            logits.double(),
            ValueError,
            "grad has shape .* of Double on .*, expected .* of Float on .* like logits",
        ),
        (
            logits[:1].clone(),
            ValueError,
            "grad has shape .1, 5, 4, 8. of Float on .*, expected .2, 5, 4, 8. of",
        ),
        (logits[:, :1].clone().expand_as(logits), RuntimeError, "more than one element of the written-to"),
    ):
        with pytest.raises(exception, match=message):
            backends.get(backend).operators().rescale_(
                grad, grad_loss, computed_for, logits, grad_stats, *pixels
            )


#: The backends whose kernels cannot raise an error.
@pytest.mark.parametrize("backend", [backend for backend in KERNELS if backend.values[0] != "cpu"])
@pytest.mark.parametrize("label", [5, 200, -1, 2**31, -(2**40)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_bad_label_is_left_out_and_makes_the_loss_nan(backend, label, reduction):
    logits, target = make_logits((2, 5, 6, 32), torch.float32), make_target((2, 6, 32), 5)
    without = target.clone()
    target[1, 4, 7], without[1, 4, 7] = label, 255
    loss, grad, (*_, count) = run(backend, logits, target, reduction=reduction)
    expected, expected_grad, (*_, expected_count) = run(backend, logits, without, reduction=reduction)
    assert torch.equal(count, expected_count)
    if reduction == "mean":
        assert loss.isnan()
    else:
        assert loss.isnan().tolist() == [False, True] and loss[0] == expected[0]
        assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("backend", LAUNCHED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [5, 40])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_ignored_pixels_have_gradient_zero(backend, dtype, classes, value):
    hierarchy = Hierarchy.flat(classes)
    logits, target = make_logits((1, classes, 4, 32), dtype), make_target((1, 4, 32), classes, ignored=0)
    logits[0, :, 1, 3:9] = value
    target[0, 1, 3:9] = 255
    loss, grad, _ = run(backend, logits, target, hierarchy)
    assert loss.isfinite() and grad.isfinite().all()
    assert (grad[0, :, 1, 3:9] == 0).all()


@pytest.mark.parametrize("backend", LAUNCHED)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_upsampled_to_ignored_pixels_has_gradient_zero(backend, value):
    logits, target = make_logits((1, 5, 4, 6), torch.float32), make_target((1, 16, 24), 5, ignored=0)
    logits[0, :, 2, 3] = value
    target[0, 6:14, 10:18] = 255  # all pixels closer than one logit
    loss, grad, _ = run(backend, logits, target, upsample="bilinear")
    assert loss.isfinite() and grad.isfinite().all()
    assert (grad[0, :, 2, 3] == 0).all()


@pytest.mark.parametrize("backend", LAUNCHED)
def test_the_gradient_may_overwrite_the_logits(backend):
    for classes in (5, 40):
        logits, target = make_logits((2, classes, 6, 32)), make_target((2, 6, 32), classes)
        hierarchy = Hierarchy.flat(classes)
        expected = run(backend, logits, target, hierarchy)[1]
        leaf = logits.to(device_of(backend)).requires_grad_()
        copy = leaf.clone()
        target = target.to(device_of(backend))
        importance_aware_loss(copy, target, hierarchy, inplace=True, backend=backend).backward()
        assert torch.equal(leaf.grad.cpu(), expected) and torch.equal(copy.detach().cpu(), expected)
