"""Coarse logits: every backend against the float64 oracle, and against interpolate-then-loss."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import (
    BACKENDS,
    DTYPES,
    EMULATED,
    HIERARCHY,
    KERNELS,
    ONE_AND_FOUR,
    OPTIONS,
    check_upsampled,
    device_of,
    make_logits,
    make_target,
    run,
)

from ial_cuda import Hierarchy, backends, cross_entropy, importance_aware_loss

ROOT = Path(__file__).resolve().parents[1]

WEIGHT = torch.tensor([0.3, 1.0, 2.5, 0.7, 1.9])
CORNERS = pytest.mark.parametrize("align_corners", [False, True], ids=["centres", "corners"])
RATIOS = [1, 2, 3, 4, 7.3, 8, 16, 0.5]
#: Sizes of the coarse logits: odd, of one pixel in each direction, and wider than a vector or a warp.
SIZES = [(5, 7), (1, 1), (1, 9), (6, 1), (3, 37)]


def thin(backend, *indices):
    """Skips half of the cases on emulated backends. Each value is tested with half of the others."""
    if backend in EMULATED and sum(indices) % 2:
        pytest.skip(f"{backend} is emulated: one in two of these cases")


def sizes(ratio, size):
    return tuple(max(1, round(ratio * length)) for length in size)


def test_the_oracle_interpolates_as_torch():
    for coarse, ratio, align_corners in itertools.product((1, 2, 5, 9), RATIOS, (False, True)):
        fine = max(1, round(coarse * ratio))
        line = torch.eye(coarse, dtype=torch.float64)[:, None]  # (N, C, length): unit vectors
        expected = F.interpolate(line, fine, mode="linear", align_corners=align_corners)[:, 0].T
        matrix = torch.from_numpy(oracle.interpolation(coarse, fine, align_corners))
        torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@CORNERS
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("ratio", RATIOS)
def test_equals_interpolate_then_loss(backend, ratio, size, align_corners):
    """Value and gradient are those of the two-step loss, in float64 to 1e-12."""
    thin(backend, RATIOS.index(ratio), SIZES.index(size), align_corners)
    logits = make_logits((2, 5, *size))
    target = make_target((2, *sizes(ratio, size)), 5)
    loss, grad, _ = run(
        backend, logits, target, weight=WEIGHT.double(), upsample="bilinear", align_corners=align_corners
    )
    leaf = logits.clone().requires_grad_()
    fine = F.interpolate(leaf, target.shape[1:], mode="bilinear", align_corners=align_corners)
    expected = importance_aware_loss(fine, target, HIERARCHY, weight=WEIGHT.double(), backend="reference")
    (expected_grad,) = torch.autograd.grad(expected, leaf)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12 * expected_grad.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CORNERS
@pytest.mark.parametrize("ratio", [4, 2.7, 0.6])
@ONE_AND_FOUR
def test_every_dtype(backend, dtype, ratio, align_corners, hierarchy):
    logits = make_logits((2, 5, 9, 13), dtype)
    target = make_target((2, *sizes(ratio, (9, 13))), 5)
    check_upsampled(backend, logits, target, hierarchy, weight=WEIGHT, align_corners=align_corners)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", OPTIONS["gradient"])
@pytest.mark.parametrize("reduction", OPTIONS["reduction"])
@pytest.mark.parametrize("scope", OPTIONS["factor_scope"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@ONE_AND_FOUR
def test_options(backend, gradient, reduction, scope, smoothing, hierarchy):
    target = make_target((3, 21, 26), 5, dtype=torch.uint8)
    grad_output = torch.tensor([0.7, -1.3, 2.0]) if reduction == "none" else torch.tensor(-0.6)
    check_upsampled(
        backend,
        make_logits((3, 5, 6, 7), torch.float32),
        target,
        hierarchy,
        weight=WEIGHT,
        pixel_weight=torch.rand(target.shape, generator=torch.Generator().manual_seed(1)),
        grad_output=grad_output,
        gradient=gradient,
        reduction=reduction,
        factor_scope=scope,
        label_smoothing=smoothing,
        divisor=40 if reduction == "mean" and smoothing else None,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [1, 2, 19, 32, 33, 150, 1000])
@pytest.mark.parametrize("most", [1, 4])
def test_every_number_of_classes(backend, dtype, classes, most):
    if backend in EMULATED and classes > 150:
        pytest.skip(f"{backend} is emulated: many classes take half a minute, see test_most_classes_of_cuda")
    levels = [list(range(k, classes, most)) for k in range(min(most, classes))]
    target = make_target((1, 9, 14), classes, ignore_index=-1)
    logits = make_logits((1, classes, 3, 4), dtype)
    check_upsampled(backend, logits, target, Hierarchy(levels), ignore_index=-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_most_classes_of_cuda(backend, smoothing):
    """In double, one pass over 1024 classes needs more than 48 KiB of shared memory."""
    logits, target = make_logits((1, 1024, 2, 1)), make_target((1, 3, 1), 1024, ignore_index=-1)
    check_upsampled(backend, logits, target, Hierarchy.flat(1024), ignore_index=-1, label_smoothing=smoothing)


LAYOUTS = {
    "channels_last": lambda make: make(2, 5, 6, 9).to(memory_format=torch.channels_last),
    "cropped": lambda make: make(2, 5, 9, 15)[..., 1:7, 3:12],
    "transposed": lambda make: make(2, 5, 9, 6).transpose(2, 3),
    "every_other_pixel": lambda make: make(2, 5, 6, 18)[..., ::2],
    "some_channels": lambda make: make(2, 9, 6, 9)[:, 2:7],
    "expanded": lambda make: make(1, 5, 6, 9).expand(2, 5, 6, 9),
    "odd_offset": lambda make: make(2 * 5 * 6 * 9 + 3)[3:].view(2, 5, 6, 9),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@ONE_AND_FOUR
def test_every_layout(backend, dtype, layout, hierarchy):
    logits = LAYOUTS[layout](lambda *shape: make_logits(shape, dtype))
    assert logits.shape == (2, 5, 6, 9)
    check_upsampled(backend, logits, make_target((2, 23, 31), 5), hierarchy, weight=WEIGHT)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
@ONE_AND_FOUR
def test_every_target(backend, dtype, hierarchy):
    target = make_target((2, 23, 62), 5, dtype=dtype)[..., ::2]
    weights = torch.rand(2, 31, 23, generator=torch.Generator().manual_seed(3)).transpose(1, 2)
    logits, weight = make_logits((2, 5, 6, 9), torch.float32), WEIGHT.repeat_interleave(2)[::2]
    check_upsampled(backend, logits, target, hierarchy, weight=weight, pixel_weight=weights)


@pytest.mark.parametrize("backend", BACKENDS)
@CORNERS
@pytest.mark.parametrize("fine", [(6, 9), (2, 2)], ids=["up", "down"])
def test_gradcheck(backend, align_corners, fine):
    device = device_of(backend)
    logits = make_logits((2, 5, 3, 4), spread=1.0).to(device).requires_grad_()
    target = make_target((2, *fine), 5).to(device)
    assert torch.autograd.gradcheck(
        lambda x: importance_aware_loss(
            x, target, HIERARCHY, upsample="bilinear", align_corners=align_corners, backend=backend
        ),
        logits,
        fast_mode=backend in EMULATED,  # one random direction, not each of 120 logits
    )


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_more_accurate_than_two_steps_in_half_precision(backend, dtype):
    """The two steps round the fine logits and their gradient; we round the coarse gradient only."""
    logits = make_logits((2, 5, 9, 13), dtype)
    target = make_target((2, 36, 52), 5)
    leaf = logits.clone().requires_grad_()
    two_steps = F.cross_entropy(
        F.interpolate(leaf, (36, 52), mode="bilinear").float(), target, ignore_index=255
    )
    (two_step_grad,) = torch.autograd.grad(two_steps, leaf)
    flat = Hierarchy.flat(5)
    true_loss, true_grad, _ = run("reference", logits.double(), target, flat, upsample="bilinear")
    loss, grad, _ = run(backend, logits, target, flat, upsample="bilinear")
    assert (loss - true_loss).abs() < (two_steps.detach() - true_loss).abs()
    error, two_step_error = ((g.double() - true_grad).square().mean().sqrt() for g in (grad, two_step_grad))
    assert error < two_step_error


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", OPTIONS["reduction"])
@CORNERS
def test_cross_entropy(backend, reduction, align_corners):
    device = device_of(backend)
    logits = make_logits((3, 5, 6, 9)).to(device).requires_grad_()
    target, weight = make_target((3, 23, 31), 5, ignore_index=-100).to(device), WEIGHT.double().to(device)
    options = dict(ignore_index=-100, reduction=reduction)
    corners = dict(upsample="bilinear", align_corners=align_corners)
    loss = cross_entropy(logits, target, weight, backend=backend, **corners, **options)
    fine = F.interpolate(logits, (23, 31), mode="bilinear", align_corners=align_corners)
    expected = F.cross_entropy(fine, target, weight, **options)
    grad, expected_grad = (torch.autograd.grad(value.sum(), logits)[0] for value in (loss, expected))
    # both in float64, eps 2.2e-16; sums of 700 terms and the positions lose a few digits
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12 * expected_grad.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e4, 1e5, 3e9])
@pytest.mark.parametrize("alike", [False, True], ids=["random", "signs"])
def test_huge_logits(backend, dtype, size, alike):
    """The most likely class changes between two coarse logits, so neither of their maxima is close."""
    logits = make_logits((2, 5, 6, 9), spread=1.0)
    logits = (size * (logits.sign() if alike else logits)).to(dtype)
    check_upsampled(backend, logits, make_target((2, 23, 31), 5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e5, 3e9, 2e37])
@pytest.mark.parametrize("ratio", [4, 2.7])
def test_an_own_logit_equals_itself(backend, dtype, size, ratio):
    """The loss of a pixel with a very large correct logit is exactly 0: the sum of its softmax is e^0. It
    would not be 0 if the logit were interpolated twice with different rounding."""
    logits = size * make_logits((2, 5, 6, 9), spread=1.0)
    logits[:, 2] = size * (10 + make_logits((2, 6, 9), spread=1.0, seed=1))
    target = torch.full((2, *sizes(ratio, (6, 9))), 2)
    loss, grad, _ = run(backend, logits.to(dtype), target, Hierarchy.flat(5), upsample="bilinear")
    assert loss == 0 and (grad == 0).all()


# ---- logits that are not finite, or nearly so -----------------------------------------------------------


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_a_masked_logit(backend, dtype, ratio):
    """-inf at a class that no pixel around it has: interpolate-then-loss is finite."""
    logits = torch.zeros(1, 3, 8, 8, dtype=dtype)
    logits[0, 2, 4, 4] = -torch.inf
    target = torch.zeros(1, 8 * ratio, 8 * ratio, dtype=torch.long)
    leaf = logits.double().requires_grad_()
    fine = F.interpolate(leaf, target.shape[1:], mode="bilinear")
    expected = F.cross_entropy(fine, target)
    (expected_grad,) = torch.autograd.grad(expected, leaf)
    assert expected.isfinite() and expected_grad.isfinite().all()
    loss, grad, _ = run(backend, logits, target, Hierarchy.flat(3), upsample="bilinear")
    # a mean of log 3 and log 2 in the arithmetic's precision, sums of up to 256 pixels in the output's
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0)
    limits = torch.finfo(dtype)
    atol = 1e-6 * expected_grad.abs().max().item() + limits.smallest_normal * limits.eps
    torch.testing.assert_close(grad.double(), expected_grad, rtol=2 * limits.eps, atol=atol)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("which", ["own", "other", "all"])
@pytest.mark.parametrize("ratio", [4, 3, 0.5])
@CORNERS
def test_what_is_not_finite_is_where_eager_has_it(backend, value, which, ratio, align_corners):
    """Logits with a weight other than 0 have the same effect as in eager PyTorch. Logits of weight 0 are left
    out. Only the second image has logits that are not finite, and the others must not be affected."""
    thin(backend, RATIOS.index(ratio), ["own", "other", "all"].index(which), align_corners)
    logits = make_logits((3, 5, 5, 9), torch.float32)
    logits[1, slice(None) if which == "all" else 2, 2, 4] = value
    target = make_target((3, *sizes(ratio, (5, 9))), 5, ignored=0.1)
    target[target != 255] = 2 if which == "own" else 1
    options = dict(hierarchy=Hierarchy.flat(5), align_corners=align_corners, reduction="none")
    check_upsampled(backend, logits, target, **options)
    del options["hierarchy"]
    loss, grad, _ = run(backend, logits, target, Hierarchy.flat(5), upsample="bilinear", **options)
    assert loss[[0, 2]].isfinite().all() and grad[[0, 2]].isfinite().all()
    y, x = (oracle.interpolation(*s, align_corners) for s in zip((5, 9), target.shape[1:], strict=True))
    fine = torch.from_numpy(oracle.upsample(logits.double().numpy(), y, x)).requires_grad_()
    eager = F.cross_entropy(fine, target, ignore_index=255, reduction="none").sum((1, 2))
    assert torch.equal(loss.isnan(), eager.isnan()) and torch.equal(loss.isinf(), eager.isinf())
    (fine_grad,) = torch.autograd.grad(eager.sum(), fine)
    fine_grad[(target == 255).unsqueeze(1).expand_as(fine_grad)] = 0
    odd = torch.from_numpy(oracle.upsample(fine_grad.numpy(), y.T, x.T)).isnan()
    assert grad.isnan()[odd].all()
    # as in eager, a NaN may spread to logits of weight 0 in the same pixel, but no further
    near = F.max_pool2d(odd.double(), 3, 1, 1).bool() if odd.any() else odd
    assert (grad.isnan() <= near).all() and not grad.isinf().any()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ratio", [2, 3, 4])
@CORNERS
def test_logits_at_the_limit(backend, dtype, ratio, align_corners):
    """All classes of a coarse pixel are equal, and its neighbours have the other sign. Differences between
    neighbours overflow, those within a pixel do not."""
    thin(backend, DTYPES.index(dtype), RATIOS.index(ratio), align_corners)
    limit = torch.finfo(dtype).max
    sign = make_logits((2, 1, 6, 9), torch.float64, seed=1).sign()
    apart = 1 - torch.tensor([0, 1, 2, 3, 40], dtype=torch.float64).view(1, 5, 1, 1) / 64
    logits = (sign * apart * limit * 0.9).to(dtype)
    assert (logits[..., 1:] - logits[..., :-1]).isinf().any() and logits.isfinite().all()
    target = make_target((2, *sizes(ratio, (6, 9))), 5)
    flat, corners = Hierarchy.flat(5), dict(align_corners=align_corners)
    _, grad, (*_, S, _) = run(backend, logits, target, flat, upsample="bilinear", **corners)
    assert grad.isfinite().all() and not S.isnan().any()
    check_upsampled(backend, logits, target, flat, **corners)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
def test_logits_of_void_pixels_have_no_effect(backend, value):
    """Coarse logits and weights that only void pixels and absent classes use."""
    logits, target = make_logits((2, 5, 4, 6), torch.float32), make_target((2, 16, 24), 5, ignored=0)
    target[target == 4] = 3
    target[0, 6:14, 10:18] = 255  # all pixels closer than one logit
    changed, weight, pixel_weight = logits.clone(), WEIGHT.clone(), torch.rand(target.shape)
    changed[0, :, 2, 3], weight[4] = value, value
    clean = run(backend, logits, target, weight=WEIGHT, pixel_weight=pixel_weight, upsample="bilinear")
    pixel_weight = pixel_weight.masked_fill(target == 255, value)
    loss, grad, rest = run(
        backend, changed, target, weight=weight, pixel_weight=pixel_weight, upsample="bilinear"
    )
    assert (grad[0, :, 2, 3] == 0).all()
    # float32 throughout; the cells around that logit use another interpolation
    for ours, expected in zip((loss, grad, *rest), (*clean[:2], *clean[2]), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


# ---- sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("size", [2**30, 2**31 + 5, 2**40])
@pytest.mark.parametrize("dim", [1, 2])
def test_a_line_too_long_for_32_bits(backend, size, dim):
    device = device_of(backend)
    shape = [1, 1, 1]
    shape[dim] = size
    target = torch.zeros(1, 1, 1, dtype=torch.uint8, device=device).expand(shape)
    logits, flat = torch.zeros(1, 1, 2, 2, device=device), Hierarchy.flat(1)
    shapes = rf"logits has shape .1, 1, 2, 2. and target .1, .*{size}.*, expected"
    message = f"{shapes} h, w, H and W up to {2**30 - 1}"
    for align_corners in (False, True):
        with pytest.raises(ValueError, match=message):
            importance_aware_loss(
                logits, target, flat, upsample="bilinear", align_corners=align_corners, backend=backend
            )
        operators = backends.get(backend).operators()
        pixels = (target, None, None, [0], 255, "exact", 0.0)
        grad_stats = torch.zeros(1, 1, 5, dtype=torch.float64, device=device)
        with pytest.raises(ValueError, match=message):
            operators.reduce(logits, *pixels, False, align_corners)
        with pytest.raises(ValueError, match=message):
            operators.reduce_backward(logits, grad_stats, *pixels, align_corners)
    wide = torch.zeros(1, 1, 1, 1, device=device).expand(1, 1, *shape[1:])
    with pytest.raises(ValueError, match="expected h, w, H and W up to"):
        importance_aware_loss(wide, target[:, :1, :1], flat, upsample="bilinear", backend=backend)


@pytest.mark.parametrize("backend", [b for b in KERNELS if b.values[0] != "cpu"])
def test_more_pixels_between_logits_than_32_bits_count(backend):
    target = torch.zeros(1, 1, 1, dtype=torch.uint8, device=device_of(backend)).expand(1, 2**26, 2**26)
    logits = torch.zeros(1, 1, 1, 1, device=device_of(backend))
    with pytest.raises(
        ValueError, match=r"target has \d+ x \d+ pixels between four logits, expected at most"
    ):
        importance_aware_loss(logits, target, Hierarchy.flat(1), upsample="bilinear", backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@CORNERS
@pytest.mark.parametrize("coarse", [1, 2, 40])
def test_many_pixels_between_logits(backend, coarse, align_corners):
    """More pixels than the CPU stores positions for."""
    logits = make_logits((1, 3, 2, coarse))
    check_upsampled(
        backend,
        logits,
        make_target((1, 3, coarse * 150), 3, ignore_index=-1),
        Hierarchy.flat(3),
        ignore_index=-1,
        align_corners=align_corners,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@CORNERS
def test_blocks_of_logits_without_a_pixel(backend, align_corners):
    logits = make_logits((2, 5, 3, 200))
    check_upsampled(backend, logits, make_target((2, 2, 5), 5), align_corners=align_corners)


@pytest.mark.parametrize("backend", [b for b in KERNELS if b.values[0] == "cpu"])
def test_memory_of_a_wide_image(backend):
    """In a separate process: 10 million columns of labels, 10 MB, between two logits."""
    code = """
import resource, torch
from ial_cuda import Hierarchy, importance_aware_loss

logits = torch.zeros(1, 2, 1, 2, requires_grad=True)
target = torch.zeros(1, 1, {columns}, dtype=torch.uint8)
importance_aware_loss(logits, target, Hierarchy.flat(2), upsample="bilinear", backend="cpu").backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = []
    for columns in (1000, 10_000_000):
        command = [sys.executable, "-c", code.format(columns=columns)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) * (1 if sys.platform == "darwin" else 1024))
    assert peaks[1] - peaks[0] < 64 << 20, "the labels and little else"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio", [4, 2.7])
def test_more_than_one_block_of_rows(backend, ratio):
    logits = make_logits((1, 5, 40, 67), torch.float32)
    check_upsampled(backend, logits, make_target((1, *sizes(ratio, (40, 67))), 5), weight=WEIGHT)


@pytest.mark.parametrize("backend", KERNELS)
def test_same_bits_every_time_and_for_any_number_of_threads(backend):
    logits, target = make_logits((2, 5, 40, 37), torch.float32), make_target((2, 160, 148), 5)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(run(backend, logits, target, upsample="bilinear"))
    finally:
        torch.set_num_threads(threads)
    for loss, grad, _ in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("label", [5, -1, 200])
def test_bad_labels(backend, label):
    logits, target = make_logits((2, 5, 9, 13), torch.float32), make_target((2, 36, 52), 5, dtype=torch.int32)
    target[1, 35, 7] = label
    if backend == "cpu":
        message = rf"target has label {label} at \(1, 35, 7\), the first of 1 bad pixels"
        with pytest.raises(ValueError, match=message):
            run(backend, logits, target, upsample="bilinear")
        return
    loss, grad, _ = run(backend, logits, target, upsample="bilinear")
    assert loss.isnan() and grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_valid_and_no_image(backend):
    for images in (0, 2):
        logits, target = make_logits((images, 5, 3, 4)), torch.full((images, 12, 16), 255)
        loss, grad, _ = run(backend, logits, target, upsample="bilinear")
        assert loss == 0 and grad.shape == logits.shape and (grad == 0).all()


BAD = {
    "upsample": (dict(upsample="nearest"), ValueError, "upsample is 'nearest', expected one of None"),
    "alone": (dict(upsample=None, align_corners=True), ValueError, "align_corners is True, expected False"),
    "type": (dict(align_corners=1), TypeError, r"align_corners is 1 \(int\), expected a bool"),
    "inplace": (dict(inplace=True), ValueError, "inplace is True, expected False: with upsample='bilinear'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_options(name):
    bad, exception, message = BAD[name]
    logits, target = make_logits((2, 5, 3, 4)), make_target((2, 12, 16), 5)
    with pytest.raises(exception, match=message):
        importance_aware_loss(logits, target, HIERARCHY, **({"upsample": "bilinear"} | bad))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    ("logits", "target"),
    [((2, 5, 4), (2, 12)), ((2, 5, 3, 4), (2, 12)), ((2, 5, 3, 4), (1, 12, 16)), ((2, 5, 0, 4), (2, 12, 16))],
    ids=str,
)
def test_bad_shapes(backend, logits, target):
    device = device_of(backend)
    with pytest.raises(
        ValueError, match=r"expected \(N, C, h, w\) and \(N, H, W\) with h, w, H and W above 0"
    ):
        importance_aware_loss(
            torch.zeros(logits, device=device),
            torch.zeros(target, dtype=torch.int64, device=device),
            HIERARCHY,
            upsample="bilinear",
            backend=backend,
        )
