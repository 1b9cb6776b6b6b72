"""The CUDA kernels as they are launched, on a GPU and on the CPU: every tile, grid and limit, bad labels."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, LAUNCHED, check, device_of, make_logits, make_target, run

from ial_cuda import Hierarchy, importance_aware_loss


@pytest.mark.parametrize("backend", LAUNCHED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 4, 5, 11, 16, 19, 21, 24, 25, 32, 33, 59, 171, 1000])
@pytest.mark.parametrize("layout", ["contiguous", "cropped", "channels_last"])
def test_every_tile(backend, dtype, classes, layout):
    """Rows that can be cut into vectors, for every number of classes, in one piece and in a larger image."""
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
                backend=backend,
            )


@pytest.mark.parametrize("backend", LAUNCHED)
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
