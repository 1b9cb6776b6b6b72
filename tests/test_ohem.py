"""`ohem_cross_entropy`: ties, one valid pixel, no sort. Its values are tested in test_pixel_losses.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import BACKENDS, device_of
from formulas import CLASSES, FAST, SPATIAL, VOID, Recorder, assert_close, check, ours, problem

from ial_cuda import ohem_cross_entropy


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keep", [1, 7, 41])
def test_equal_pixels_share_the_last_place(backend, keep):
    """The sum and the mean are those of topk, whichever pixels it takes. The gradient is symmetric."""
    logits = torch.zeros(1, CLASSES, *SPATIAL)
    logits[0, 1, 0, 0] = 3.0  # one pixel with a larger loss
    target = torch.zeros((1, *SPATIAL), dtype=torch.int64)
    options = dict(thresh=None, min_kept=keep)
    losses, _ = ours(backend, ohem_cross_entropy, logits, target, reduction="none", **options)
    mean, grad = ours(backend, ohem_cross_entropy, logits, target, **options)
    exact = F.cross_entropy(logits.double(), target, reduction="none").flatten()
    assert_close(losses.sum(), exact.topk(keep).values.sum())
    assert_close(mean, exact.topk(keep).values.mean())
    shared = losses.flatten()[1:]
    assert (shared == shared[0]).all() and (grad.flatten(2)[..., 1:] == grad.flatten(2)[..., 1:2]).all()
    assert_close(shared[0], exact[1] * (keep - 1) / 41)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("keep", [2, 5, 9, 50])
def test_void_takes_no_place_of_pixels_with_loss_zero(backend, keep):
    """Of ten pixels three have a loss, four are valid and have loss 0, three are void."""
    logits, target = torch.zeros(1, 2, 10), torch.zeros(1, 10, dtype=torch.int64)
    logits[0, 0] = torch.tensor([1.0, 2, 3, 1000, 1000, 1000, 1000, 0, 0, 0])
    target[0, 7:] = VOID
    check(backend, ohem_cross_entropy, logits, target, thresh=None, min_kept=keep)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("keep", [3, 10, 50])
def test_equal_pixels_at_the_threshold_are_dropped(backend, keep):
    """As by mmsegmentation, which keeps what is strictly below."""
    logits, target = torch.zeros(1, 2, 40), torch.zeros(1, 40, dtype=torch.int64)
    logits[0, 1, :5] = 1.0  # harder: pi = 0.27, the others have pi = 0.5
    for thresh, kept in ((0.4, 5), (0.5, 5), (0.6, 40), (0.2, 5 if keep >= 5 else 0)):
        losses, _ = ours(
            backend, ohem_cross_entropy, logits, target, thresh=thresh, min_kept=keep, reduction="none"
        )
        assert (losses > 0).sum() == kept
        check(backend, ohem_cross_entropy, logits, target, thresh=thresh, min_kept=keep)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("min_kept", [0, 1, 5, 0.5, 1.0])
@pytest.mark.parametrize("thresh", [0.01, 0.7, None])
def test_one_valid_pixel(backend, min_kept, thresh):
    logits, target = problem()
    target = torch.full_like(target, VOID)
    target[1, 2, 3] = 1
    check(backend, ohem_cross_entropy, logits, target, thresh=thresh, min_kept=min_kept)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("options", [dict(min_kept=20), dict(thresh=None, min_kept=0.5)], ids=str)
def test_nothing_is_sorted(backend, options):
    logits, target = (tensor.to(device_of(backend)) for tensor in problem())
    with Recorder() as ran:
        ohem_cross_entropy(logits, target, ignore_index=VOID, backend=backend, **options)
    selects = "aten::kthvalue" if device_of(backend) == "cpu" else "aten::topk"
    assert selects in ran.names and not any("sort" in name for name in ran.names)
