"""An independent oracle: the Importance-Aware Loss in float64 NumPy, in the paper's notation.

Chen, Gong, Yang, "Importance-Aware Semantic Segmentation for Autonomous Driving System", IJCAI 2017,
Eqs. 1-19: the matrices M_t with their "x" entries, the one-hot q, the matrix X-bar, the recursion of the Q_t
and its derivative. The package computes the loss in another way, from sums per level, and the oracle shares
nothing with it: no torch, no import from ial_cuda, no step that is not in the paper.

Notation. An H x W matrix of the paper is a vector here, over the P pixels that are not ignored. So ignored
pixels have no effect, whatever their logits are. X, q, p, h are (C, P); Y, M_t, X-bar, A, l, w are (P,).
Indices start at 0: `t` is the paper's t + 1, level k its Group k + 1, level 0 the least important; t runs
over the g - 1 importance factors. Indicators select (`where=`, np.where) instead of multiplying: 0 * NaN is
not 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Result:
    """The results. With factor_scope="batch" the factors are pooled: f and F are (1, g-1)."""

    loss: Array  # () for "mean" and "sum", (N,) for "none"
    grad: Array  # (N, C, *spatial): d sum(loss * grad_output) / d logits
    f: Array  # (N, g-1): f_t of Eq. 3
    F: Array  # (N, g-1): the importance factors f_t + alpha
    S: Array  # (N, g): w^T l of each group
    count: NDArray[np.int64]  # (N, g): valid pixels of each group


def _valid(
    logits: Array, target: NDArray[np.int64], ignore_index: int
) -> tuple[NDArray[np.bool_], Array, NDArray[np.int64]]:
    """Which pixels are valid, and those of all images side by side: X (C, P) and Y (P,)."""
    C, valid = logits.shape[1], target.ravel() != ignore_index
    Y = target.ravel()[valid]
    assert ((Y >= 0) & (Y < C)).all(), "a label outside [0, C) that is not ignore_index"
    return valid, np.moveaxis(logits, 1, 0).reshape(C, -1)[:, valid], Y


def _of_logits(dX: Array, valid: NDArray[np.bool_], shape: tuple[int, ...]) -> Array:
    """The derivative of the valid pixels (C, P) in the shape of the logits, 0 for ignored pixels."""
    N, C, *spatial = shape
    grad = np.zeros((C, valid.size))
    grad[:, valid] = dX
    return np.moveaxis(grad.reshape(C, N, *spatial), 0, 1)


def _smoothed(q: NDArray[np.bool_], w: Array, label_smoothing: float) -> Array:
    """W (C, P), the weight of -log p of each class. w (C, P) or (C, 1): for the class as the pixel's own."""
    mixed = q if label_smoothing == 0 else (1 - label_smoothing) * q + label_smoothing / len(q)
    return np.where(mixed != 0, mixed * w, 0.0)


def _pixels(X: Array, q: NDArray[np.bool_], W: Array) -> tuple[Array, Array, Array, Array]:
    """The values of each pixel: w l (Eq. 1), w h (Eq. 18), X-bar, and its exact derivative with respect to X.

    W (C, P) is the weight of -log p of each class: w for the pixel's own. Smoothing gives others a share.

    X-bar_ij is entry c = Y_ij of the pixel's vector "normalized to [0, 1]" (footnote 1): of its softmax.
    """
    X = X - X.max(axis=0)  # the softmax does not change, and exp cannot overflow
    log_p = X - np.log(np.exp(X).sum(axis=0))
    p = np.exp(log_p)
    wl = -(W * log_p).sum(axis=0, where=W != 0)  # Eqs. 1, 2
    wh = W.sum(axis=0) * p - W  # Eq. 18: w (p - q)
    X_bar = p.sum(axis=0, where=q)
    dX_bar = X_bar * (q - p)  # (C, P): row Y of the softmax's Jacobian
    return wl, wh, X_bar, dX_bar


def _chain(
    X_bar: Array,
    dX_bar: Array,
    dl: Array,
    level: NDArray[np.int64],
    S: Array,
    r: Array,
    alpha: float,
    lambdas: Array,
    mean: bool,
) -> tuple[Array, Array, Array]:
    """Eqs. 3-17 over the pixels of n images that share their factors (the paper has n = 1).

    S (n, g) holds w^T l of each image and group, r (n,) the incoming gradient of each image's IAL, dl (C, P)
    Eq. 19 times the r of the pixel's image. Returns f (g-1,), IAL (n,) and d sum(r * IAL) / d X (C, P).
    A Q_t is n numbers, one per image. f_t is shared, so its derivative sums over the images: r @ rest below,
    where the paper has a plain product.
    """
    f = np.zeros(len(lambdas))
    Q, dQ = np.zeros(len(S)), np.zeros_like(dl)  # nothing beyond the most important group (Eqs. 7, 13)
    for t in reversed(range(len(lambdas))):
        M = np.where(level == t, 0.0, np.where(level > t, 1.0, np.nan))  # Fig. 2(b)-(d), NaN for "x"
        compared = ~np.isnan(M)  # I{M_t != "x"}
        Z = max(1, np.count_nonzero(compared)) if mean else 1  # our option; with none compared f_t = 0 / 1
        # Eq. 3. The square cancels the root of the Frobenius norm.
        f[t] = np.sum((M + lambdas[t]) * (X_bar - M) ** 2, where=compared) / (2 * Z)
        A = (M + lambdas[t]) * (X_bar - M)  # Eq. 16, "x" still in it
        df = np.where(compared, A * dX_bar, 0.0) / Z  # Eqs. 14, 17

        F = f[t] + alpha
        rest, d_rest = S[:, t + 1] + Q, np.where(level == t + 1, dl, 0.0) + dQ
        Q = F * rest  # Eqs. 5-7
        # Eqs. 10-13. d_rest is nonzero only for the groups above t, where M_t = 1.
        dQ = np.where(compared, df * (r @ rest), 0.0) + np.where(M == 1, F * d_rest, 0.0)
    return f, S[:, 0] + Q, np.where(level == 0, dl, 0.0) + dQ  # Eqs. 8, 9


@np.errstate(invalid="ignore", over="ignore")
def importance_aware_loss(
    logits: ArrayLike,
    target: ArrayLike,
    levels: Sequence[Sequence[int]],
    *,
    weight: ArrayLike | None = None,
    pixel_weight: ArrayLike | None = None,
    alpha: float = 1.0,
    lambdas: float | Sequence[float] = 0.5,
    ignore_index: int = 255,
    reduction: str = "mean",
    factor_normalization: str = "mean",
    factor_scope: str = "image",
    gradient: str = "exact",
    label_smoothing: float = 0.0,
    divisor: float | None = None,
    grad_output: ArrayLike | None = None,
) -> Result:
    """Loss and gradient for logits (N, C, *spatial), target (N, *spatial); levels least important first.

    reduction="mean" divides the sum of the images' IAL by the sum of w = weight[Y] * pixel_weight, or by
    divisor.
    label_smoothing mixes the one-hot q with the uniform distribution, as F.cross_entropy does, in l alone.
    gradient="exact" is the derivative. "paper" is Eqs. 9-19 as printed, where Eq. 15 lets X-bar depend on its
    own channel only.
    """
    assert factor_normalization in ("mean", "sum"), factor_normalization
    assert factor_scope in ("image", "batch"), factor_scope
    assert gradient in ("exact", "paper"), gradient
    logits, target = np.asarray(logits, dtype=np.float64), np.asarray(target).astype(np.int64)
    N, C, *spatial = logits.shape
    g = len(levels)
    assert target.shape == (N, *spatial), (target.shape, logits.shape)
    assert sorted(c for group in levels for c in group) == list(range(C)), "each class in exactly one level"
    level_of_class = np.array([next(k for k in range(g) if c in levels[k]) for c in range(C)])

    valid, X, Y = _valid(logits, target, ignore_index)
    image = np.repeat(np.arange(N), int(np.prod(spatial)))[valid]
    level = level_of_class[Y]
    of_class = np.ones(C) if weight is None else np.asarray(weight, dtype=np.float64)
    of_pixel = np.ones(len(Y))
    if pixel_weight is not None:
        assert np.shape(pixel_weight) == target.shape, np.shape(pixel_weight)
        of_pixel = np.asarray(pixel_weight, dtype=np.float64).ravel()[valid]
    w = of_class[Y] * of_pixel

    q = np.arange(C)[:, None] == Y
    wl, wh, X_bar, dX_bar = _pixels(X, q, _smoothed(q, of_class[:, None] * of_pixel, label_smoothing))
    if gradient == "paper":
        dX_bar = np.where(q, dX_bar, 0.0)  # Eq. 15: X-bar (1 - X-bar) at c = Y, zero elsewhere

    groups = [[(image == n) & (level == k) for k in range(g)] for n in range(N)]
    S = np.array([[wl[G].sum() for G in row] for row in groups]).reshape(N, g)  # w^T l
    count = np.array([[G.sum() for G in row] for row in groups], dtype=np.int64).reshape(N, g)

    # The gradient of each image's IAL: grad_output over the reduction's divisor.
    assert divisor is None or reduction == "mean", reduction
    divisor = {"mean": w.sum() if divisor is None else divisor, "sum": 1.0, "none": 1.0}[reduction]
    scale = 1 / divisor if divisor != 0 else 0.0
    shape = (N,) if reduction == "none" else ()
    upstream = np.ones(shape) if grad_output is None else np.asarray(grad_output, dtype=np.float64)
    assert upstream.shape == shape, (upstream.shape, shape)
    r = np.broadcast_to(upstream * scale, (N,))
    dl = r[image] * wh  # Eq. 19

    scopes = [[n] for n in range(N)] if factor_scope == "image" else [list(range(N))]
    f, IAL, dX = np.zeros((len(scopes), g - 1)), np.zeros(N), np.zeros_like(X)
    lam = np.broadcast_to(np.asarray(lambdas, dtype=np.float64), (g - 1,))
    mean = factor_normalization == "mean"
    for i, images in enumerate(scopes):
        on = np.isin(image, images)
        f[i], IAL[images], dX[:, on] = _chain(
            X_bar[on], dX_bar[:, on], dl[:, on], level[on], S[images], r[images], alpha, lam, mean
        )

    loss = IAL if reduction == "none" else np.asarray(IAL.sum() * scale if divisor != 0 else 0.0)
    return Result(loss, _of_logits(dX, valid, logits.shape), f, f + alpha, S, count)


@np.errstate(invalid="ignore", over="ignore")
def pixel_nll(
    logits: ArrayLike,
    target: ArrayLike,
    grad_nll: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    ignore_index: int = 255,
    label_smoothing: float = 0.0,
) -> tuple[Array, Array]:
    """w l of each pixel, (N, *spatial), and d sum(grad_nll * w l) / d logits. Both are 0 if ignored."""
    logits, target = np.asarray(logits, dtype=np.float64), np.asarray(target).astype(np.int64)
    valid, X, Y = _valid(logits, target, ignore_index)
    q = np.arange(len(X))[:, None] == Y
    w = np.ones(len(X)) if weight is None else np.asarray(weight, dtype=np.float64)
    wl, wh, _, _ = _pixels(X, q, _smoothed(q, w[:, None], label_smoothing))
    nll = np.zeros(target.shape)
    nll.ravel()[valid] = wl
    incoming = np.asarray(grad_nll, dtype=np.float64).ravel()[valid]
    return nll, _of_logits(incoming * wh, valid, logits.shape)  # Eq. 19


def interpolation(coarse: int, fine: int, align_corners: bool) -> Array:
    """The (fine, coarse) matrix of F.interpolate(mode="bilinear") on a line, computed with rationals."""
    A = np.zeros((fine, coarse))
    for d in range(fine):
        if align_corners:
            at = Fraction(d * (coarse - 1), max(fine - 1, 1))
        else:
            at = max(Fraction(2 * d + 1, 2) * Fraction(coarse, fine) - Fraction(1, 2), Fraction(0))
        i = min(int(at), coarse - 1)
        A[d, i] += 1 - float(at - i)
        A[d, min(i + 1, coarse - 1)] += float(at - i)
    return A


def leave_out(A: Array, X: Array) -> Array:
    """A @ X without the terms of coefficient 0, since 0 times infinity would be NaN."""
    coefficients = A[..., :, :, None]
    with np.errstate(invalid="ignore"):
        return np.where(coefficients == 0, 0.0, coefficients * X[..., None, :, :]).sum(axis=-2)


def upsample(X: Array, y: Array, x: Array) -> Array:
    """Images X (..., h, w) times the matrices of both axes. With the transposes: the gradient of X."""
    return np.swapaxes(leave_out(x, np.swapaxes(leave_out(y, X), -1, -2)), -1, -2)
