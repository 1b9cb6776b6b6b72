"""What the Triton kernels share: a pixel's label, weight and softmax, the sums over pixels, and the gradient.

The mathematics is that of csrc/loss.h. The functions see pointers, sizes and strides, never a tensor.

The classes pass in chunks, each chunk a tuple of tiles in registers, with an online softmax from chunk to
chunk. An axis of the tile for the classes would have to be a power of two: 32 rows of exponentials for 19
classes. A kernel is compiled for its number of classes, so no class needs a mask. The chunks are a loop:
unrolled, the compiler moves all their loads to the front, and spills.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Threads of a warp: 64 on AMD's data centre GPUs. Where that is wrong, tiles have another shape, no more.
WARP = 64 if torch.version.hip else 32
INTERPRETED = triton.knobs.runtime.interpret
#: Levels whose sums a program of reduce holds in registers. For more levels the logits are read again.
REGISTER_LEVELS = 8

# The columns of stats and grad_stats: enum Stat of csrc/loss.h.
S, P2, Q2, PIXELS, WEIGHT, STATS = (tl.constexpr(i) for i in range(6))
# Bits in a word of packed levels, an int32 that stays positive.
_WORD = tl.constexpr(31)


def config(threads: int) -> triton.Config:
    # Three programs of 128 threads on a multiprocessor. Without a limit ptxas aims at more, and spills.
    registers = None if torch.version.hip else 168
    return triton.Config({"THREADS": threads}, num_warps=max(1, threads // WARP), maxnreg=registers)


def level_bits(levels: int) -> int:
    return max(1, (levels - 1).bit_length())


def pack_levels(class_levels: tuple[int, ...]) -> tuple[int, ...]:
    """The level of each class, packed into words: a constant of the kernels, which needs no copy."""
    bits = level_bits(max(class_levels) + 1)
    count = _WORD.value // bits
    words = [class_levels[first : first + count] for first in range(0, len(class_levels), count)]
    return tuple(sum(level << bits * i for i, level in enumerate(word)) for word in words)


def split(*values: int) -> tuple[list[int], tuple[int, ...]]:
    """Ints as int32 arguments of a kernel, and the rest of each as a constant of the kernel, usually 0.

    Inductor of torch 2.11 refuses ints above 2^31, and every Inductor passes those below -2^31 as int32.
    """
    half = 2**_WORD.value
    low = [value if -half <= value < half else value % half for value in values]
    return low, tuple(int(value - rest) for value, rest in zip(values, low, strict=True))


@triton.jit
def to_int64(x):
    """An argument as int64. Triton makes an argument that is 1 a constant."""
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
    """The class of each pixel, or 0; whether it has a class; whether its label is bad."""
    y = tl.load(target_ptr + at, mask=inside, other=0).to(tl.int64)
    valid = inside & (y >= 0) & (y < C) & (y != ignore_index)
    bad = inside & (y != ignore_index) & ~valid
    return tl.where(valid, y, 0).to(tl.int32), valid, bad


@triton.jit
def load_weights(weight_ptr, pixel_weight_ptr, at, label, valid, A: tl.constexpr):
    w = valid.to(A)
    if weight_ptr is not None:
        w *= tl.load(weight_ptr + label, mask=valid, other=0).to(A)
    if pixel_weight_ptr is not None:
        w *= tl.load(pixel_weight_ptr + at, mask=valid, other=0).to(A)
    return w


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
    """Logits of the classes [first, first + COUNT), a tensor each. `logits`: pointers to class 0, the stride
    from class to class, and a mask."""
    ptrs, channel, inside = logits
    x = ()
    for i in tl.static_range(COUNT):
        at = ptrs + channel * (first + i)
        x += (tl.load(at, mask=inside, other=0, eviction_policy=EVICT).to(A),)
    return x


@triton.jit
def _softmax_chunk(x, COUNT: tl.constexpr, label, first, max, sum, own):
    seen = max
    for i in tl.static_range(COUNT):
        max = tl.maximum(max, x[i])
    # While all logits are -inf, shift by 0, so that their terms are exp(-inf) = 0: -inf - -inf is NaN.
    shift = tl.where(max == float("-inf"), 0, max)
    sum *= tl.exp(seen - shift)
    for i in tl.static_range(COUNT):
        sum += tl.exp(x[i] - shift)
        own = tl.where(label == first + i, x[i], own)
    return max, sum, own


@triton.jit
def softmax(LOAD: tl.constexpr, CHUNK: tl.constexpr, logits, label, C: tl.constexpr, A: tl.constexpr):
    """max_c x_c, sum_c exp(x_c - max), and x_y of each pixel. LOAD reads a chunk, as `load_chunk` does."""
    max = tl.full(label.shape, float("-inf"), A)
    sum = tl.zeros(label.shape, A)
    own = tl.zeros(label.shape, A)
    WHOLE: tl.constexpr = C // CHUNK * CHUNK
    for first in range(0, WHOLE, CHUNK):
        x = LOAD(logits, first, CHUNK, A, "")
        max, sum, own = _softmax_chunk(x, CHUNK, label, first, max, sum, own)
    if WHOLE < C:
        x = LOAD(logits, WHOLE, C - WHOLE, A, "")
        max, sum, own = _softmax_chunk(x, C - WHOLE, label, WHOLE, max, sum, own)
    return max, sum, own


@triton.jit
def reciprocal(x):
    # Triton's own division of float32 is approximate.
    if x.dtype == tl.float32:
        return tl.div_rn(1.0, x)
    else:
        return 1 / x


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
def add_pixels(sums, max, sum, own, w, valid, bad, level, first_level, GROUP: tl.constexpr):
    """A bad label makes S_0 of its image NaN. No gradient needs S_0."""
    pi = tl.exp(own - max) * reciprocal(sum)
    s = tl.where(bad, float("nan"), w * (tl.log(sum) - (own - max)))
    terms = (s, pi * pi, (1 - pi) * (1 - pi), valid.to(w.dtype), w)
    added = ()
    for k in tl.static_range(GROUP):
        here = valid & (level - first_level == k)
        for i in tl.static_range(STATS):
            counts = here | (bad & (first_level + k == 0)) if i == S else here
            added += (sums[k * STATS + i] + _thread_sums(tl.where(counts, terms[i], 0)),)
    return added


@triton.jit
def store_sums(sums, partial_ptr, n, block, blocks, first_level, G: tl.constexpr, GROUP: tl.constexpr):
    for k in tl.static_range(GROUP):
        for i in tl.static_range(STATS):
            row = (n * G + first_level + k) * STATS + i
            total = tl.sum(sums[k * STATS + i], axis=0).to(tl.float64)
            tl.store(partial_ptr + row * blocks + block, total, mask=first_level + k < G)


# ---- the gradient of reduce_backward --------------------------------------------------------------------


@triton.jit
def pixel_gradient(row_ptr, max, sum, own, w, EXACT: tl.constexpr):
    """dL/dx_c of a pixel is exp(x_c - max) times the first result, and for c = y plus the second. row_ptr
    points to the row of grad_stats of the pixel's level. See PixelGradient of csrc/loss.h."""
    A: tl.constexpr = w.dtype
    inverse = reciprocal(sum)
    pi = tl.exp(own - max) * inverse
    factor_term = 2 * pi * (pi * tl.load(row_ptr + P2).to(A) - (1 - pi) * tl.load(row_ptr + Q2).to(A))
    # Loaded last: before the exponential it would stay in a register, and Triton 3.6 would spill.
    ce = w * tl.load(row_ptr + S).to(A)
    if EXACT:
        scale, extra = ce - factor_term, factor_term - ce
    else:
        scale, extra = ce, factor_term * (1 - pi) - ce
    return scale * inverse, extra


@triton.jit
def class_gradient(x, c, label, valid, max, scale, extra):
    """dL/dx_c. A pixel without a class has gradient 0 whatever its logits are."""
    return tl.where(valid, tl.exp(x - max) * scale + tl.where(label == c, extra, 0), 0)
