"""The launches of the CUDA kernels, on a GPU and emulated: every tile, grid and limit, bad labels."""

from __future__ import annotations

import pytest
import simt
import torch
from cases import DTYPES, HIERARCHY, KERNELS, LAUNCHED, check, device_of, make_logits, make_target, run

from ial_cuda import Hierarchy, backends, importance_aware_loss

#: Some for each tile, and the ends of its range; under the slow sanitizers, one for each.
CLASSES = (
    [1, 12, 20, 25, 33, 59]
    if simt.SANITIZED
    else [1, 8, 9, 11, 12, 16, 19, 20, 24, 25, 32, 33, 59, 171, 1000]
)
ONE_LAUNCH = [backend for backend in LAUNCHED if backends.get(backend.values[0]).one_launch]


@pytest.mark.parametrize("backend", LAUNCHED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("layout", ["contiguous", "cropped", "channels_last"])
def test_every_tile(backend, dtype, classes, layout):
    """Rows that can be cut into vectors, for every number of classes, contiguous and in a larger image."""
    hierarchy = Hierarchy([list(range(k, classes, 4)) for k in range(min(4, classes))])
    logits, target = (
        make_logits((2, classes, 4, 64), dtype),
        make_target((2, 4, 64), classes, ignore_index=-1),
    )
    if layout == "cropped":
        logits, target = logits[..., 1:4, 8:56], target[..., 1:4, 8:56]
    if layout == "channels_last":
        logits = logits.to(memory_format=torch.channels_last)
    check(backend, logits, target, hierarchy, ignore_index=-1)


@pytest.mark.parametrize("backend", ONE_LAUNCH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "shape", [(1, 19, 64, 256), (3, 5, 64, 256), (5, 5, 64, 256), (7, 3, 64, 64), (4, 5, 63, 61)], ids=str
)
def test_one_launch(backend, dtype, scope, reduction, shape):
    """Tiles in shared memory, in registers, read again, and all three; one wave and several. Also what the
    cooperative kernel cannot do: odd rows, more pooled images than multiprocessors, float64."""
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
    """The first takes the gradient of the launch, the second computes another."""
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
            logits, target, None, None, [0, levels - 1], 255, "exact", False
        )


@pytest.mark.parametrize("backend", [b for b in LAUNCHED if b not in ONE_LAUNCH])
def test_a_gradient_that_cannot_be_overwritten(backend):
    device = device_of(backend)
    logits, target = make_logits((2, 5, 4, 8), torch.float32).to(device), make_target((2, 4, 8), 5).to(device)
    grad_stats, grad_loss = (
        torch.zeros(2, 4, 5, dtype=torch.float64, device=device),
        torch.ones((), device=device),
    )
    for grad, exception, message in (
        (
            logits.double(),
            ValueError,
            "grad has shape .* of Double on .*, expected .* of Float on .* as logits",
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
                grad, grad_loss, logits, grad_stats, target, None, None, [1, 2, 3, 0, 1], 255, "exact"
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
    target[0, 6:14, 10:18] = 255  # every pixel less than one logit away
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
