"""The Triton kernels of combine and combine_backward: the loss and its derivative from the five sums.

Also the derivative for one level, which does not need the sums. csrc/loss.h has the mathematics. Each kernel
is one program, since there are few sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pixels import P2, PIXELS, Q2, STATS, WEIGHT, S, to_int64

# Images in registers at a time.
_IMAGES = tl.constexpr(128)
# Terms of the divisor in registers at a time.
_TERMS = tl.constexpr(1024)
# Not specialised: Triton would compile another kernel for bits that are 1 or divisible by 16.
_BITS = ["lambda_low", "lambda_high", "alpha_low", "alpha_high"]


@triton.jit
def _float64(low, high):
    """A float64 passed as its bits: Triton passes a float as float32."""
    return ((to_int64(high) << 32) | (to_int64(low) & 0xFFFFFFFF)).to(tl.float64, bitcast=True)


@triton.jit
def _stat(stats_ptr, n, N, k, i, G: tl.constexpr, POOL: tl.constexpr):
    """stats[n, k, i] of each image, or the sum over all images."""
    if POOL:
        total = tl.zeros(n.shape, tl.float64)
        for first in range(0, N, _IMAGES):
            m = first + tl.arange(0, _IMAGES)
            total += tl.load(stats_ptr + (m.to(tl.int64) * G + k) * STATS + i, mask=m < N, other=0)
        return tl.zeros(n.shape, tl.float64) + tl.sum(total, axis=0)
    else:
        return tl.load(stats_ptr + (n.to(tl.int64) * G + k) * STATS + i, mask=n < N, other=0)


@triton.jit
def _or_one(divisor):
    return tl.where(divisor != 0, divisor, 1)


@triton.jit
def _mean(value, divisor):
    return tl.where(divisor != 0, value / _or_one(divisor), 0)


@triton.jit
def _lambda(lambda_ptr, lambda_low, lambda_high, t, G: tl.constexpr):
    """lambda_t: a single value given as its bits, or one of the values in memory."""
    if lambda_ptr is None:
        return _float64(lambda_low, lambda_high)
    else:
        return tl.load(lambda_ptr + t, mask=t < G - 1, other=0)


@triton.jit
def _factor(
    stats_ptr, n, N, t, count, above, lam, G: tl.constexpr, NORMALIZE: tl.constexpr, POOL: tl.constexpr
):
    """f_t and Z_t of Eq. 3. Adds level t to `count` (pixels) and to `above` (Q2 of the levels above)."""
    count += _stat(stats_ptr, n, N, t, PIXELS, G, POOL)
    z = _or_one(count) if NORMALIZE else tl.full(n.shape, 1, tl.float64)
    f = 0.5 * (lam * _stat(stats_ptr, n, N, t, P2, G, POOL) + (1 + lam) * above) / z
    return tl.where(t < G - 1, f, 0), z, count, above + _stat(stats_ptr, n, N, t, Q2, G, POOL)


@triton.jit
def _mean_divisor(stats_ptr, divisor_ptr, N, G: tl.constexpr):
    """The divisor of reduction="mean": the given one, or the summed weight of the valid pixels."""
    if divisor_ptr is not None:
        return tl.load(divisor_ptr)
    else:
        total = tl.zeros([_IMAGES], tl.float64)
        for k in range(G):
            total += _stat(stats_ptr, tl.arange(0, _IMAGES), N, k, WEIGHT, G, True)
        return tl.max(total, axis=0)


@triton.jit
def _below(n, t, bound):
    """t < bound, in the shape of n. In the interpreter t is an int, and Triton 3.9 rejects bools as masks."""
    return tl.zeros_like(n) + t < bound


@triton.jit(do_not_specialize=_BITS)
def combine_kernel(
    stats_ptr,  # [N, G, STATS]
    divisor_ptr,  # [] of float64, or None
    lambda_ptr,  # [G - 1] or None
    f_ptr,  # [N or 1, G - 1]
    loss_ptr,  # [N] or []
    N,
    lambda_low,
    lambda_high,
    alpha_low,
    alpha_high,
    G: tl.constexpr,
    REDUCTION: tl.constexpr,
    NORMALIZE: tl.constexpr,
    POOL: tl.constexpr,
):
    """T_k = S_k + (f_k + alpha) T_{k+1}, IAL = T_0 (Eqs. 5 to 8). Pooled images share one row of f."""
    alpha = _float64(alpha_low, alpha_high)
    rows = 1 if POOL else N
    for first in range(0, rows, _IMAGES):
        n = first + tl.arange(0, _IMAGES)
        count = tl.zeros([_IMAGES], tl.float64)
        above = tl.zeros([_IMAGES], tl.float64)
        for i in range(G):
            t = G - 1 - i
            lam = _lambda(lambda_ptr, lambda_low, lambda_high, t, G)
            f, _, count, above = _factor(stats_ptr, n, N, t, count, above, lam, G, NORMALIZE, POOL)
            tl.store(f_ptr + n.to(tl.int64) * (G - 1) + t, f, mask=(n < rows) & _below(n, t, G - 1))
    tl.debug_barrier()

    total = tl.zeros([_IMAGES], tl.float64)
    for first in range(0, N, _IMAGES):
        n = first + tl.arange(0, _IMAGES)
        row = tl.zeros_like(n) if POOL else n
        chain = tl.zeros([_IMAGES], tl.float64)
        for i in range(G):
            t = G - 1 - i
            f = tl.load(f_ptr + row.to(tl.int64) * (G - 1) + t, mask=(n < N) & _below(n, t, G - 1), other=0)
            chain = _stat(stats_ptr, n, N, t, S, G, False) + (f + alpha) * chain
        if REDUCTION == "none":
            tl.store(loss_ptr + n, chain, mask=n < N)
        total += tl.where(n < N, chain, 0)
    if REDUCTION == "sum":
        tl.store(loss_ptr, tl.sum(total, axis=0))
    if REDUCTION == "mean":
        divisor = _mean_divisor(stats_ptr, divisor_ptr, N, G)
        tl.store(loss_ptr, tl.where(divisor != 0, tl.sum(total, axis=0) / _or_one(divisor), 0))


@triton.jit
def _load_or_one(ptr):
    if ptr is None:
        return tl.full([], 1, tl.float64)
    else:
        return tl.load(ptr).to(tl.float64)


@triton.jit
def _image_gradient(grad_loss_ptr, n, N, divisor, REDUCTION: tl.constexpr):
    """dL/dIAL_n."""
    if REDUCTION == "none":
        return tl.load(grad_loss_ptr + n, mask=n < N, other=0).to(tl.float64)
    else:
        value = _load_or_one(grad_loss_ptr)
        if REDUCTION == "mean":
            value = _mean(value, divisor)
        return tl.zeros(n.shape, tl.float64) + value


@triton.jit
def _incoming_s(
    stats_ptr, grad_loss_ptr, n, N, t, divisor, G: tl.constexpr, REDUCTION: tl.constexpr, POOL: tl.constexpr
):
    """G_n S_nt with G_n = dL/dIAL_n, of each image or summed over all images."""
    if POOL:
        total = tl.zeros(n.shape, tl.float64)
        for first in range(0, N, _IMAGES):
            m = first + tl.arange(0, _IMAGES)
            total += _image_gradient(grad_loss_ptr, m, N, divisor, REDUCTION) * _stat(
                stats_ptr, m, N, t, S, G, False
            )
        return tl.zeros(n.shape, tl.float64) + tl.sum(total, axis=0)
    else:
        return _image_gradient(grad_loss_ptr, n, N, divisor, REDUCTION) * _stat(
            stats_ptr, n, N, t, S, G, False
        )


@triton.jit(do_not_specialize=_BITS)
def combine_backward_kernel(
    stats_ptr,  # [N, G, STATS]
    divisor_ptr,  # [] of float64, or None
    grad_loss_ptr,  # [N] or [], or None for 1
    lambda_ptr,  # [G - 1] or None
    grad_stats_ptr,  # [N, G, STATS]
    N,
    lambda_low,
    lambda_high,
    alpha_low,
    alpha_high,
    G: tl.constexpr,
    REDUCTION: tl.constexpr,
    NORMALIZE: tl.constexpr,
    POOL: tl.constexpr,
):
    """dL/dstats. csrc/loss.h has the formulas.

    The first loop goes down the levels. It stores F_t and T_{t+1} / Z_t in the last two columns of an image's
    rows, or of the first image's rows if images are pooled. The second loop goes up the levels and reads
    them. The third loop sets these columns to 0.
    """
    alpha = _float64(alpha_low, alpha_high)
    divisor = _mean_divisor(stats_ptr, divisor_ptr, N, G)
    rows = 1 if POOL else N
    for first in range(0, rows, _IMAGES):
        n = first + tl.arange(0, _IMAGES)
        count = tl.zeros([_IMAGES], tl.float64)
        above = tl.zeros([_IMAGES], tl.float64)
        chain = tl.zeros([_IMAGES], tl.float64)
        for i in range(G):
            t = G - 1 - i
            lam = _lambda(lambda_ptr, lambda_low, lambda_high, t, G)
            f, z, count, above = _factor(stats_ptr, n, N, t, count, above, lam, G, NORMALIZE, POOL)
            to = grad_stats_ptr + (n.to(tl.int64) * G + t) * STATS
            tl.store(to + PIXELS, f + alpha, mask=n < rows)
            tl.store(to + WEIGHT, chain / z, mask=n < rows)
            chain = (
                _incoming_s(stats_ptr, grad_loss_ptr, n, N, t, divisor, G, REDUCTION, POOL)
                + (f + alpha) * chain
            )
    tl.debug_barrier()

    for first in range(0, N, _IMAGES):
        n = first + tl.arange(0, _IMAGES)
        row = tl.zeros_like(n) if POOL else n
        incoming = _image_gradient(grad_loss_ptr, n, N, divisor, REDUCTION)
        lead = tl.full([_IMAGES], 1, tl.float64)
        dq2 = tl.zeros([_IMAGES], tl.float64)
        for k in range(G):
            kept = grad_stats_ptr + (row.to(tl.int64) * G + k) * STATS
            lam = _lambda(lambda_ptr, lambda_low, lambda_high, k, G)
            half_b_over_z = 0.5 * lead * tl.load(kept + WEIGHT, mask=n < N, other=0)
            to = grad_stats_ptr + (n.to(tl.int64) * G + k) * STATS
            tl.store(to + S, lead * incoming, mask=n < N)
            tl.store(to + P2, half_b_over_z * lam, mask=n < N)
            tl.store(to + Q2, dq2, mask=n < N)
            dq2 += half_b_over_z * (1 + lam)
            lead *= tl.load(kept + PIXELS, mask=n < N, other=0)
    tl.debug_barrier()

    for first in range(0, N, _IMAGES):
        n = first + tl.arange(0, _IMAGES)
        for k in range(G):
            to = grad_stats_ptr + (n.to(tl.int64) * G + k) * STATS
            tl.store(to + PIXELS, 0.0, mask=n < N)
            tl.store(to + WEIGHT, 0.0, mask=n < N)


@triton.jit
def one_level_gradient_of_s(
    divisor_ptr, terms, expected_ptr, total_ptr, grad_stats_ptr, computed_for_ptr, blocks
):
    """dL/dS of one level for the expected incoming gradient.

    The first program of each image stores its row of grad_stats. Program 0 stores the divisor and
    `computed_for`.
    """
    computed_for = _load_or_one(expected_ptr)
    divisor = tl.full([], 1, tl.float64)
    if divisor_ptr is not None:
        each = tl.zeros([_TERMS], tl.float64)
        for first in range(0, terms, _TERMS):
            i = first + tl.arange(0, _TERMS)
            each += tl.load(divisor_ptr + i, mask=i < terms, other=0)
        divisor = tl.sum(each, axis=0)
    ds = _mean(tl.full([], 1, tl.float64), divisor)
    if tl.program_id(0) == 0:
        tl.store(total_ptr, divisor)
        tl.store(computed_for_ptr, computed_for)
    if tl.program_id(0) % blocks == 0:
        row_ptr = grad_stats_ptr + (tl.program_id(0) // blocks).to(tl.int64) * STATS
        tl.store(row_ptr + S, ds)
        for i in tl.static_range(S + 1, STATS):
            tl.store(row_ptr + i, 0.0)
    return ds * computed_for
