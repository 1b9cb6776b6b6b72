"""The Importance-Aware Loss in plain PyTorch, written like the paper (Chen, Gong and Yang, IJCAI 2017).

The other backends are tested and timed against this file. It runs on every device and in every floating
dtype, and autograd differentiates it any number of times. The code below is Eqs. 1 to 8. Its derivative by
autograd is Eqs. 9 to 19 with ``gradient="paper"``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .options import Options


class Pixels(NamedTuple):
    """N images of P pixels, with C classes. A pixel is valid if its label is a class and not void."""

    x: Tensor  # (N, C, P) logits, 0 if not valid
    y: Tensor  # (N, P) classes, 0 if not valid
    is_class: Tensor  # (N, P) whether the pixel is valid
    bad: Tensor  # (N, P) whether the label is neither a class nor ignore_index
    w: Tensor  # (N, P) class weight times pixel weight, 0 if not valid
    nll: Tensor  # (N, P) -log pi, Eq. 1
    ce: Tensor  # (N, P) weighted cross-entropy: w nll, or its smoothed form


def _pixels(
    logits: Tensor, target: Tensor, options: Options, weight: Tensor | None, pixel_weight: Tensor | None
) -> Pixels:
    ignore_index, smoothing = options.void_label, options.label_smoothing
    x = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    if options.upsample is not None:  # coarse logits (N, C, h, w), target (N, H, W)
        x = F.interpolate(x, target.shape[1:], mode=options.upsample, align_corners=options.align_corners)
    x = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)  # (N, C, P)
    # (N, P), like the tensors below. int64: a number outside the range of a smaller dtype would wrap
    target = target.reshape(x.shape[0], x.shape[2]).long()

    is_class = (target >= 0) & (target < x.shape[1]) & (target != ignore_index)
    bad = ~is_class & (target != ignore_index)
    y = torch.where(is_class, target, 0)
    x = torch.where(is_class.unsqueeze(1), x, 0)  # a product of 0 and NaN or infinity is NaN
    w = is_class.to(x.dtype)
    if weight is not None:
        w = torch.where(is_class, weight.to(x.dtype)[y], 0)
    if pixel_weight is not None:
        w = torch.where(is_class, w * pixel_weight.reshape_as(target).to(x.dtype), 0)

    log_p = F.log_softmax(x, dim=1)
    nll = -log_p.gather(1, y.unsqueeze(1)).squeeze(1)
    ce = w * nll
    if smoothing > 0:  # each class has its own weight in the mean, as in F.cross_entropy
        terms = log_p if weight is None else log_p * weight.to(x.dtype).unsqueeze(1)
        mean = -terms.mean(dim=1)
        if pixel_weight is not None:
            mean = mean * pixel_weight.reshape_as(target).to(x.dtype)
        ce = (1 - smoothing) * ce + smoothing * torch.where(is_class, mean, 0)
    return Pixels(x, y, is_class, bad, w, nll, ce)


def pixel_nll(logits: Tensor, target: Tensor, options: Options, *, weight: Tensor | None = None) -> Tensor:
    """The weighted cross-entropy of each pixel, in the shape of ``target``.

    It is 0 for void pixels and NaN for labels that are no class.
    """
    pixels = _pixels(logits, target, options, weight, None)
    return pixels.ce.masked_fill(pixels.bad, torch.nan).reshape(target.shape)


def _level(pixels: Pixels, options: Options) -> Tensor:
    """(N, P) the level of each pixel, -1 if it is not valid."""
    levels = torch.tensor(options.hierarchy.class_levels, device=pixels.y.device)
    return torch.where(pixels.is_class, levels[pixels.y], -1)


def _pi(pixels: Pixels, options: Options) -> Tensor:
    """(N, P) the predicted probability of the pixel's own class, with the derivative of ``gradient``."""
    if options.gradient == "exact":
        return torch.exp(-pixels.nll)
    # Eq. 15: X-bar depends on its own channel only, pi = 1 / (1 + sum_{c != y} exp(x_c - x_y))
    y = pixels.y.unsqueeze(1)
    x = pixels.x - pixels.x.detach().amax(1, keepdim=True)  # first: logsumexp of large logits rounds more
    others = x.detach().scatter(1, y, -torch.inf).logsumexp(1)
    return torch.sigmoid(x.gather(1, y).squeeze(1) - others)


def _total(value: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, value, 0).sum(dim=1)


def level_statistics(
    logits: Tensor,
    target: Tensor,
    options: Options,
    *,
    weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
) -> Tensor:
    """(N, g, 5) float64 sums of each image and level for `ial_cuda.level_statistics`.

    A label that is neither a class nor ``ignore_index`` makes the image's first sum of level 0 NaN.
    """
    pixels = _pixels(logits, target, options, weight, pixel_weight)
    level, pi = _level(pixels, options), _pi(pixels, options)
    values = (pixels.ce, pi**2, (1 - pi) ** 2, pixels.is_class.to(pi.dtype), pixels.w)
    # float64: float32 cannot represent the number of pixels of an image with more than 2^24
    stats = torch.stack(
        [
            torch.stack([_total(value.double(), level == k) for value in values], dim=1)
            for k in range(options.hierarchy.num_levels)
        ],
        dim=1,
    )
    bad = torch.zeros_like(stats, dtype=torch.bool)
    bad[:, 0, 0] = pixels.bad.any(dim=1)
    return stats.masked_fill(bad, torch.nan)


def importance_aware_loss(
    logits: Tensor,
    target: Tensor,
    options: Options,
    *,
    weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
    divisor: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, f_t (N or 1, g-1), S_k (N, g) and pixel counts (N, g) for `ial_cuda.importance_aware_loss`.

    A pixel whose label is neither a class nor ``ignore_index`` is left out and makes the loss NaN, without a
    synchronisation. The logits and weights of pixels that are left out affect no result, even if they are
    NaN. Their gradient is 0.
    """
    g, alpha, lambdas = options.hierarchy.num_levels, options.alpha, options.factor_lambdas
    pixels = _pixels(logits, target, options, weight, pixel_weight)
    level, pi = _level(pixels, options), _pi(pixels, options)

    S = [_total(pixels.ce, level == k) for k in range(g)]  # w'l of Eqs. 1, 2, each (N,)
    count = [(level == k).sum(dim=1) for k in range(g)]

    f = []  # Eq. 3, each (N,) or, pooled, (1,)
    for t in range(g - 1):
        M = (level > t).to(pi.dtype)
        compared = level >= t  # where M_t is not the paper's "x"
        f_t = 0.5 * _total((M + lambdas[t]) * (pi - M) ** 2, compared)
        Z_t = torch.stack(count[t:]).sum(0)
        if options.factor_scope == "batch":
            f_t, Z_t = f_t.sum(0, keepdim=True), Z_t.sum(0, keepdim=True)
        f.append(f_t / Z_t.clamp(min=1) if options.factor_normalization == "mean" else f_t)

    Q = torch.zeros_like(S[-1])
    for t in reversed(range(g - 1)):
        Q = (f[t] + alpha) * (S[t + 1] + Q)  # Eqs. 5 to 7
    ial = S[0] + Q  # Eq. 8

    if options.reduction == "none":
        loss = ial
    elif options.reduction == "sum":
        loss = ial.sum()
    else:
        total_weight = pixels.w.sum() if divisor is None else divisor.to(pi.dtype)
        loss = ial.sum() * torch.where(total_weight != 0, 1 / total_weight, 0)
    loss = loss.masked_fill(pixels.bad.any(), torch.nan)
    f_all = (
        torch.stack(f, dim=1) if f else pi.new_zeros(1 if options.factor_scope == "batch" else pi.shape[0], 0)
    )
    return loss, f_all, torch.stack(S, dim=1), torch.stack(count, dim=1)


def combine(
    stats: Tensor,
    divisor: Tensor | None,
    lambdas: tuple[float, ...],
    alpha: float,
    reduction: str,
    factor_normalization: str,
    factor_scope: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Loss and f_t (N or 1, g-1) from the sums of `level_statistics`, which may be those of many processes.

    It is the operator combine of the other backends. `importance_aware_loss` has the same equations.
    """
    S, P2, Q2, count, weight = stats.unbind(-1)  # each (N, g)
    pooled = factor_scope == "batch"
    P2, Q2, Z = (x.sum(0, keepdim=True) if pooled else x for x in (P2, Q2, count.detach()))

    def from_level(x: Tensor, t: int) -> Tensor:
        return x[:, t:].sum(1)

    f = [  # Eq. 3: (pi - M_t)^2 is pi^2 at level t and (1 - pi)^2 above
        0.5
        * (lambdas[t] * P2[:, t] + (1 + lambdas[t]) * from_level(Q2, t + 1))
        / (from_level(Z, t).clamp(min=1) if factor_normalization == "mean" else 1)
        for t in range(len(lambdas))
    ]
    T = S[:, -1]
    for t in reversed(range(len(lambdas))):
        T = S[:, t] + (f[t] + alpha) * T  # Eqs. 5 to 8
    if reduction == "none":
        loss = T
    elif reduction == "sum":
        loss = T.sum()
    else:
        total_weight = weight.detach().sum() if divisor is None else divisor
        loss = T.sum() * torch.where(total_weight != 0, 1 / total_weight, 0)
    return loss.to(dtype), torch.stack(f, dim=1) if f else P2[:, :0]
