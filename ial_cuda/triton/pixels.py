"""Functions that the Triton kernels share: label, weight, softmax and gradient of a pixel, sums over pixels.

csrc/loss.h has the mathematics. The functions take pointers, sizes and strides, never a tensor.

The classes are processed in chunks with an online softmax. A chunk is a tuple of tiles in registers. A class
axis of the tile would have to be a power of two: 32 rows of exponentials for 19 classes. A kernel is compiled
for its number of classes, so classes need no mask. The chunks are a loop: if it is unrolled, the compiler
moves all loads to the front, and spills.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Threads of a warp: 64 on AMD's data centre GPUs. A wrong number changes only the shape of the tiles.
WARP = 64 if torch.version.hip else 32
INTERPRETED = triton.knobs.runtime.interpret
#: The levels whose sums a program of reduce keeps in registers. For more levels the logits are read again.
REGISTER_LEVELS = 8

# The columns of stats and grad_stats: enum Stat of csrc/loss.h.
S, P2, Q2, PIXELS, WEIGHT, STATS = (tl.constexpr(i) for i in range(6))
# Bits in a word of packed levels, an int32 that stays positive.
_WORD = tl.constexpr(31)


def config(threads: int) -> triton.Config:
    # For three programs of 128 threads on a multiprocessor. Without a limit ptxas aims for more, and spills.
    registers = None if torch.version.hip else 168
    return triton.Config({"THREADS": threads}, num_warps=max(1, threads // WARP), maxnreg=registers)


def level_bits(levels: int) -> int:
    return max(1, (levels - 1).bit_length())


def pack_levels(class_levels: tuple[int, ...]) -> tuple[int, ...]:
    """The level of each class, packed into words. They are constants of the kernels and need no copy."""
    bits = level_bits(max(class_levels) + 1)
    count = _WORD.value // bits
    words = [class_levels[first : first + count] for first in range(0, len(class_levels), count)]
    return tuple(sum(level << bits * i for i, level in enumerate(word)) for word in words)


def split(*values: int) -> tuple[list[int], tuple[int, ...]]:
    """Splits ints into int32 arguments of a kernel and constants of the kernel, which are usually 0.

    Inductor of torch 2.11 rejects ints above 2^31, and every Inductor passes those below -2^31 as int32.
    """
    half = 2**_WORD.value
    low = [value if -half <= value < half else value % half for value in values]
    return low, tuple(int(value - rest) for value, rest in zip(values, low, strict=True))


@triton.jit
def to_int64(x):
    """An argument as int64. Triton turns an argument of 1 into a constant, which has no `.to`."""
    return tl.zeros([], tl.int64) + x


@triton.jit
def join(low, HIGH: tl.constexpr):
    """The ints that `split` has split."""
    whole = ()
    for i in tl.static_range(len(HIGH)):
        if HIGH[i] == 0:
            whole += (low[i],)
        else:
            whole += (to_int64(low[i]) + HIGH[i],)
    return whole


# ---- a pixel's label, weight and softmax ----------------------------------------------------------------


@triton.jit
def classify(target_ptr, at, inside, ignore_index, C: tl.constexpr):
    """The class of each pixel, or 0 if it has none; whether it has a class; whether its label is bad."""
    y = tl.load(target_ptr + at, mask=inside, other=0).to(tl.int64)
    valid = inside & (y >= 0) & (y < C) & (y != ignore_index)
    bad = inside & (y != ignore_index) & ~valid
    return tl.where(valid, y, 0).to(tl.int32), valid, bad


@triton.jit
def load_weights(weight_ptr, pixel_weight_ptr, at, label, valid, A: tl.constexpr):
    """The weight of each pixel, with and without the weight of its class."""
    w = valid.to(A)
    v = w
    if weight_ptr is not None:
        # No mask: with this one, Triton 3.6 fails to compile reduce for int32 and uint8 labels.
        w = tl.where(valid, tl.load(weight_ptr + label).to(A), 0)
    if pixel_weight_ptr is not None:
        v = tl.load(pixel_weight_ptr + at, mask=valid, other=0).to(A)
        w *= v
    return w, v


@triton.jit
def _class_weight(weight_ptr, c, A: tl.constexpr):
    if weight_ptr is None:
        return tl.full([], 1, A)
    else:
        return tl.load(weight_ptr + c).to(A)


@triton.jit
def level_of(label, LEVELS: tl.constexpr, BITS: tl.constexpr):
    """Unpacks what `pack_levels` packed. A gather would need the levels in memory."""
    COUNT: tl.constexpr = _WORD // BITS
    word = tl.zeros_like(label)
    for i in tl.static_range(len(LEVELS)):
        word = tl.where(label // COUNT == i, LEVELS[i], word)
    return (word >> (label % COUNT * BITS)) & ((1 << BITS) - 1)


@triton.jit
def load_chunk(logits, first, COUNT: tl.constexpr, A: tl.constexpr, EVICT: tl.constexpr):
    """The logits of the classes [first, first + COUNT), a tensor each.

    `logits`: pointers to class 0, the stride between classes, and a mask.
    """
    ptrs, channel, inside = logits
    x = ()
    for i in tl.static_range(COUNT):
        at = ptrs + channel * (first + i)
        x += (tl.load(at, mask=inside, other=0, eviction_policy=EVICT).to(A),)
    return x


@triton.jit
def _softmax_chunk(x, COUNT: tl.constexpr, label, first, pixel, weight_ptr):
    max, sum, own = pixel[0], pixel[1], pixel[2]
    seen = max
    for i in tl.static_range(COUNT):
        max = tl.maximum(max, x[i])
    # While all logits are -inf, shift by 0, so that their terms are exp(-inf) = 0. -inf - -inf is NaN.
    shift = tl.where(max == float("-inf"), 0, max)
    sum *= tl.exp(seen - shift)
    for i in tl.static_range(COUNT):
        sum += tl.exp(x[i] - shift)
        own = tl.where(label == first + i, x[i], own)
    if len(pixel) == 3:
        return max, sum, own
    else:
        dot, total = pixel[3], pixel[4]
        dot -= total * (shift - tl.where(seen == float("-inf"), 0, seen))
        for i in tl.static_range(COUNT):
            w = _class_weight(weight_ptr, first + i, max.dtype)
            dot += w * (x[i] - shift)
            total += w
        return max, sum, own, dot, total


@triton.jit
def softmax(
    LOAD: tl.constexpr,
    CHUNK: tl.constexpr,
    logits,
    label,
    weight_ptr,
    C: tl.constexpr,
    SMOOTHING: tl.constexpr,
    A: tl.constexpr,
):
    """max_c x_c, sum_c exp(x_c - max) and x_y of each pixel.

    With label smoothing also the sums of w_c (x_c - max) and of w_c. LOAD reads a chunk like `load_chunk`.
    """
    pixel = (tl.full(label.shape, float("-inf"), A), tl.zeros(label.shape, A), tl.zeros(label.shape, A))
    if SMOOTHING != 0:
        pixel += (tl.zeros(label.shape, A), tl.zeros([], A))
    WHOLE: tl.constexpr = C // CHUNK * CHUNK
    for first in range(0, WHOLE, CHUNK):
        x = LOAD(logits, first, CHUNK, A, "")
        pixel = _softmax_chunk(x, CHUNK, label, first, pixel, weight_ptr)
    if WHOLE < C:
        x = LOAD(logits, WHOLE, C - WHOLE, A, "")
        pixel = _softmax_chunk(x, C - WHOLE, label, WHOLE, pixel, weight_ptr)
    return pixel


@triton.jit
def broadcast(x, y, z):
    """Broadcasts three tensors to one shape."""
    x, y = tl.broadcast(x, y)
    x, z = tl.broadcast(x, z)
    y, z = tl.broadcast(y, z)
    return x, y, z


@triton.jit
def fma(x, y, z):
    """tl.fma of tensors with different shapes."""
    return tl.fma(*broadcast(x, y, z))


@triton.jit
def reciprocal(x):
    # The operator / is approximate in float32.
    if x.dtype == tl.float32:
        return tl.div_rn(1.0, x)
    else:
        return 1 / x


@triton.jit
def pixel_nll(pixel, weights, bad, C: tl.constexpr, SMOOTHING: tl.constexpr):
    """-log pi of each pixel, weighted and smoothed. NaN for a bad label."""
    max, sum, own = pixel[0], pixel[1], pixel[2]
    w, v = weights
    nll = w * (tl.log(sum) - (own - max))
    if SMOOTHING != 0:
        nll = (1 - SMOOTHING) * nll + SMOOTHING / C * v * (pixel[4] * tl.log(sum) - pixel[3])
    return tl.where(bad, float("nan"), nll)


# ---- the sums of reduce ---------------------------------------------------------------------------------


@triton.jit
def zero_sums(GROUP: tl.constexpr, THREADS: tl.constexpr, A: tl.constexpr):
    """The five sums of GROUP levels, one of each in each thread."""
    sums = ()
    for _ in tl.static_range(GROUP * STATS):
        sums += (tl.zeros([THREADS], A),)
    return sums


@triton.jit
def _thread_sums(x):
    """Sums over the pixels of each thread: LANES of a tile, or ROWS and COLUMNS of a tile of cells."""
    if len(x.shape) == 2:
        return tl.sum(x, axis=1)
    else:
        return tl.sum(tl.sum(x, axis=0), axis=0)


@triton.jit
def add_pixels(
    sums,
    pixel,
    weights,
    valid,
    bad,
    level,
    first_level,
    C: tl.constexpr,
    SMOOTHING: tl.constexpr,
    GROUP: tl.constexpr,
    FACTORS: tl.constexpr,
):
    """Adds the terms of the pixels to the sums. Without FACTORS, P2 and Q2 stay 0.

    A bad label makes S_0 of its image NaN. No gradient needs S_0.
    """
    max, sum, own = pixel[0], pixel[1], pixel[2]
    w = weights[0]
    pi = tl.exp(own - max) * reciprocal(sum)
    s = pixel_nll(pixel, weights, bad, C, SMOOTHING)
    terms = (s, pi * pi, (1 - pi) * (1 - pi), valid.to(w.dtype), w)
    added = ()
    for k in tl.static_range(GROUP):
        here = valid & (level - first_level == k)
        for i in tl.static_range(STATS):
            if FACTORS or (i != P2 and i != Q2):
                counts = here | (bad & (first_level + k == 0)) if i == S else here
                added += (sums[k * STATS + i] + _thread_sums(tl.where(counts, terms[i], 0)),)
            else:
                added += (sums[k * STATS + i],)
    return added


@triton.jit
def store_sums(sums, partial_ptr, n, block, blocks, first_level, G: tl.constexpr, GROUP: tl.constexpr):
    for k in tl.static_range(GROUP):
        for i in tl.static_range(STATS):
            row = (n * G + first_level + k) * STATS + i
            total = tl.sum(sums[k * STATS + i], axis=0).to(tl.float64)
            tl.store(partial_ptr + row * blocks + block, total, mask=first_level + k < G)


# ---- the gradient ---------------------------------------------------------------------------------------
#
# The gradient of a pixel is a tuple: the factor of exp(x_c - max), the term added for c = y, and with label
# smoothing the factor of -w_c. See PixelGradient of csrc/loss.h. Smoothing adds with `fma`. Otherwise a
# compiler might round the product before the addition in one kernel and not in another.


@triton.jit
def _cross_entropy(ds, weights, SMOOTHING: tl.constexpr):
    """`ce`: the cross-entropy adds ce (p_c - [c = y]) to dL/dx_c."""
    if SMOOTHING == 0:
        return weights[0] * ds
    else:
        return weights[0] * ds * (1 - SMOOTHING)


@triton.jit
def _gradient(scale, extra, ds, inverse, pixel, weights, C: tl.constexpr, SMOOTHING: tl.constexpr):
    if SMOOTHING == 0:
        return scale * inverse, extra
    else:
        soft = weights[1] * ds * (SMOOTHING / C)
        return fma(soft, pixel[4], scale) * inverse, extra, soft


@triton.jit
def _entry(ptr, scale_ptr, A: tl.constexpr):
    """An entry of grad_stats, multiplied before it is rounded."""
    value = tl.load(ptr)
    if scale_ptr is not None:
        # 0 stays 0 if the incoming gradient is infinite.
        value = tl.where(value == 0, value, value * tl.load(scale_ptr).to(tl.float64))
    return value.to(A)


@triton.jit
def pixel_gradient(
    row_ptr, scale_ptr, pixel, weights, C: tl.constexpr, SMOOTHING: tl.constexpr, EXACT: tl.constexpr
):
    """The gradient of each pixel, as the tuple above.

    row_ptr points to the row of grad_stats of the pixel's level. scale_ptr points to a factor of it, or is
    None.
    """
    max, sum, own = pixel[0], pixel[1], pixel[2]
    A: tl.constexpr = sum.dtype
    inverse = reciprocal(sum)
    pi = tl.exp(own - max) * inverse
    factor_term = (
        2 * pi * (pi * _entry(row_ptr + P2, scale_ptr, A) - (1 - pi) * _entry(row_ptr + Q2, scale_ptr, A))
    )
    # Loaded last: loaded before the exponential it would occupy a register, and Triton 3.6 would spill.
    ds = _entry(row_ptr + S, scale_ptr, A)
    ce = _cross_entropy(ds, weights, SMOOTHING)
    if EXACT:
        scale, extra = ce - factor_term, factor_term - ce
    else:
        scale, extra = ce, factor_term * (1 - pi) - ce
    return _gradient(scale, extra, ds, inverse, pixel, weights, C, SMOOTHING)


@triton.jit
def one_level_gradient(ds, pixel, weights, C: tl.constexpr, SMOOTHING: tl.constexpr):
    """`pixel_gradient` for dL/dP2 = dL/dQ2 = 0, bitwise equal."""
    ce = _cross_entropy(ds, weights, SMOOTHING)
    return _gradient(ce, -ce, ds, reciprocal(pixel[1]), pixel, weights, C, SMOOTHING)


@triton.jit
def class_gradient(x, c, label, valid, max, gradient, weight_ptr):
    """dL/dx_c. A pixel without a class has gradient 0 for any logits."""
    value = tl.exp(x - max) * gradient[0] + tl.where(label == c, gradient[1], 0)
    if len(gradient) == 3:
        value = fma(-gradient[2], _class_weight(weight_ptr, c, max.dtype), value)
    return tl.where(valid, value, 0)


@triton.jit
def is_current(grad_loss_ptr, computed_for_ptr, expected_ptr):
    """Whether the gradient was computed for this incoming gradient.

    The first program updates `expected`, if given: an incoming gradient that arrives twice in a row becomes
    the expected one.
    """
    g = tl.load(grad_loss_ptr).to(tl.float64)
    if expected_ptr is not None:  # noqa: SIM102 (Triton evaluates both sides of an `and`)
        if tl.program_id(0) == 0:
            again = (g == tl.load(expected_ptr + 1)) & (tl.abs(g) < float("inf"))
            tl.store(expected_ptr, g, mask=again)
            tl.store(expected_ptr + 1, g)
    return g == tl.load(computed_for_ptr)
