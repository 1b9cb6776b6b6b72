"""The losses of the map of -log pi as formulas in float64, and the check of a backend against them.

The formulas see the valid pixels alone, so void has no part in them. OHEM is mmsegmentation's
`OHEMPixelSampler` in NumPy, with a full sort.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from cases import BACKENDS, EMULATED, device_of, make_logits, make_target, poisoned
from torch.utils._python_dispatch import TorchDispatchMode

from ial_cuda import focal_loss, ohem_cross_entropy, poly1_cross_entropy

CLASSES, SPATIAL, VOID = 5, (6, 7), 255
WEIGHT = [0.5, 1.0, 2.0, 1.5, 0.25]
FAST = [backend for backend in BACKENDS if backend.values[0] not in EMULATED]
LOSSES = [focal_loss, ohem_cross_entropy, poly1_cross_entropy]


def problem(*, shape=(2, CLASSES, *SPATIAL), dtype=torch.float32, ignore_index=VOID):
    return make_logits(shape, dtype), make_target((shape[0], *shape[2:]), shape[1], ignore_index=ignore_index)


# ---- formulas: (M,) losses of the valid pixels, and what each adds to the divisor of the mean -----------


def own(values, y):
    return torch.ones(len(y)).double() if values is None else torch.as_tensor(values).double()[y]


def focal(nll, y, images, *, gamma=2.0, alpha=None):
    return own(alpha, y) * (1 - torch.exp(-nll)) ** gamma * nll, torch.ones_like(nll)


def poly1(nll, y, images, *, epsilon=1.0, weight=None):
    return own(weight, y) * (nll + epsilon * (1 - torch.exp(-nll))), own(weight, y)


def ohem(nll, y, images, *, thresh=0.7, min_kept=100_000, weight=None):
    losses, counted, count = own(weight, y) * nll, own(weight, y), len(y)
    keep = int(min_kept * count) if isinstance(min_kept, float) else min_kept * images
    if thresh is None:
        kept = np.zeros(count)
        kept[np.argsort(-losses.detach().numpy(), kind="stable")[:keep]] = 1
    else:
        prob = np.exp(-nll.detach().numpy())
        if count:
            thresh = max(np.sort(prob)[min(keep, count - 1)], thresh)
        kept = prob < thresh
    return losses * torch.tensor(kept), counted * torch.tensor(kept)


FORMULAS = dict(zip(LOSSES, [focal, ohem, poly1], strict=True))


def expected_of(loss_of, logits, target, incoming, reduction, ignore_index, upsample, corners, **options):
    """The loss and its gradient in float64, by autograd through the valid pixels."""
    leaf = logits.detach().double().requires_grad_()
    size = target.shape[1:]
    fine = F.interpolate(leaf, size, mode=upsample, align_corners=corners) if upsample else leaf
    labels = target.long()
    valid = labels != ignore_index
    nll = F.cross_entropy(fine.movedim(1, -1)[valid], labels[valid], reduction="none")
    losses, counted = FORMULAS[loss_of](nll, labels[valid], len(target), **options)
    if reduction == "none":
        loss = torch.zeros(target.shape).double().masked_scatter(valid, losses)
    else:
        loss = losses.sum()
        if reduction == "mean":
            loss = loss / counted.sum() if counted.sum() != 0 else loss * 0
    (grad,) = torch.autograd.grad(loss, leaf, incoming.double())
    return loss.detach(), grad


def assert_close(got, expected):
    """Asserts a difference of at most 64 roundings of the tensor's largest value, or of 1.

    The roundings are those of logits of up to 10, of their exponentials and of sums of some hundred terms.
    A gradient in half precision is rounded once more.
    """
    arithmetic = torch.float64 if got.dtype == torch.float64 else torch.float32
    half, limits = got.dtype != arithmetic, torch.finfo(got.dtype)
    scale = max(expected.abs().max().item(), 1.0) if expected.numel() else 1.0
    torch.testing.assert_close(
        got.double().cpu(),
        expected.double().cpu(),
        rtol=limits.eps if half else 0,
        atol=64 * torch.finfo(arithmetic).eps * scale + half * limits.smallest_normal,
    )


def ours(backend, loss_of, logits, target, incoming=None, **options):
    """The loss of a backend and its gradient, on the CPU."""
    device = device_of(backend)
    leaf = logits.detach().to(device).requires_grad_()
    with poisoned():
        loss = loss_of(leaf, target.to(device), backend=backend, **options)
        given = torch.ones_like(loss) if incoming is None else incoming.to(loss)
        (grad,) = torch.autograd.grad(loss, leaf, given)
    return loss.detach().cpu(), grad.cpu()


def check(backend, loss_of, logits, target, *, reduction="mean", ignore_index=VOID, **options):
    shape = target.shape if reduction == "none" else ()
    incoming = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.5
    common = dict(reduction=reduction, ignore_index=ignore_index)
    loss, grad = ours(backend, loss_of, logits, target, incoming, **common, **options)
    upsample, corners = options.pop("upsample", None), options.pop("align_corners", False)
    expected, expected_grad = expected_of(
        loss_of, logits, target, incoming, **common, upsample=upsample, corners=corners, **options
    )
    assert loss.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert loss.shape == expected.shape and grad.dtype == logits.dtype
    assert_close(loss, expected)
    assert_close(grad, expected_grad)


class Recorder(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))
