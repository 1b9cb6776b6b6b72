"""The Triton kernels: reduce, combine, table and gradient, in the mathematics of csrc/loss.h.

They see pointers, sizes and strides, never a tensor; triton_ops.py launches them.

A program of reduce or gradient owns a tile of (THREADS, LANES) pixels. Where memory allows it the LANES of
a thread lie side by side, 16 bytes of a row, so that its loads are wide; in any case a sum over them stays in
the thread. The classes pass CHUNK at a time, each chunk a tuple of tiles in registers, with an online softmax
from chunk to chunk; gradient reads them a second time, from the caches. An axis of the tile for the classes
would have to be a power of two: 32 rows of exponentials for 19 classes. A kernel is compiled for its number
of classes, so that none needs a mask; the chunks stay a loop, since unrolled it has all their loads in
registers, and spills.

Sums are added in a fixed order, without atomics. What is tuned on the device, gradient's THREADS, adds no
pixels together; reduce is not tuned, since the order of its sums, and so their last bits, would depend on a
clock.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

#: Threads of a warp: 64 on AMD's data centre GPUs. Where it is not so, tiles are wide or narrow, and right.
WARP = 64 if torch.version.hip else 32


def _config(threads: int) -> triton.Config:
    # Three programs of 128 threads on a multiprocessor. Without a number ptxas aims at more, and spills.
    registers = None if torch.version.hip else 168
    return triton.Config({"THREADS": threads}, num_warps=max(1, threads // WARP), maxnreg=registers)


#: The one configuration of reduce. Interpreted programs cost by the operation, not by the pixel.
REDUCE_CONFIG = _config(1024 if triton.knobs.runtime.interpret else 128)
#: What is tried for gradient. The interpreter cannot tell them apart.
GRADIENT_CONFIGS = (
    [REDUCE_CONFIG] if triton.knobs.runtime.interpret else [_config(threads) for threads in (64, 128, 256)]
)
#: Sums that a program of the second launch of reduce makes, and how many of their parts it reads at a time.
SUM_ROWS, SUM_WIDTH = 4, 128
#: Lanes where they do not lie side by side: each has an address of its own, and more of them would spill.
LOOSE_LANES = 2
#: Levels whose sums a program of reduce has in registers; for more the logits are read again.
MOST_LEVELS = 8
#: Spatial dimensions, merged where memory allows it, that a kernel can walk along.
MOST_DIMS = 4

# Bits of a word of packed levels, of an int32 that stays positive.
_WORD = tl.constexpr(31)
_CHUNK = tl.constexpr(4)
# The columns of stats and table: enum Stat of csrc/loss.h.
_S, _P2, _Q2, _COUNT, _WEIGHT, _STATS = (tl.constexpr(i) for i in range(6))
# Images that combine and table have in registers at a time.
_IMAGES = tl.constexpr(128)


def level_bits(levels: int) -> int:
    return max(1, (levels - 1).bit_length())


def pack_levels(class_levels: list[int]) -> tuple[int, ...]:
    """The level of each class, as many to a word as fit: a constant of the kernels, which needs no copy."""
    bits = level_bits(max(class_levels) + 1)
    count = _WORD.value // bits
    words = [class_levels[first : first + count] for first in range(0, len(class_levels), count)]
    return tuple(sum(level << bits * i for i, level in enumerate(word)) for word in words)


def split(*values: int) -> tuple[list[int], tuple[int, ...]]:
    """Ints as int32 arguments of a kernel, and what goes beyond as a constant of it: mostly zeros.

    Inductor of torch 2.11 refuses ints beyond 2^31, and any Inductor passes those below -2^31 as int32.
    """
    half = 2**_WORD.value
    low = [value if -half <= value < half else value % half for value in values]
    return low, tuple(int(value - rest) for value, rest in zip(values, low, strict=True))


# ---- a tile ---------------------------------------------------------------------------------------------


@triton.jit
def _wide(x):
    """An int64 of an argument, which Triton makes a constant where it is 1."""
    return tl.zeros([], tl.int64) + x


@triton.jit
def _whole(low, HIGH: tl.constexpr):
    """The ints that `split` has split."""
    whole = ()
    for i in tl.static_range(len(HIGH)):
        if HIGH[i] == 0:
            whole += (low[i],)
        else:
            whole += (_wide(low[i]) + HIGH[i],)
    return whole


@triton.jit
def _tiles(P, SIZE: tl.constexpr):
    """Tiles of an image of 1 pixel or more. In tl.cdiv, P + SIZE - 1 may be beyond int32."""
    return (P - 1) // SIZE + 1


@triton.jit
def _tile(tile, P, THREADS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Pixels of a tile, and which of them are in the image. 64 bits: N C P passes 2^31, and P may."""
    thread, lane = tl.arange(0, THREADS)[:, None], tl.arange(0, LANES)[None, :]
    pixel = thread * LANES + lane if VECTOR else thread + lane * THREADS
    first = _wide(tile) * (THREADS * LANES)
    return first + pixel, pixel < P - first


@triton.jit
def _offset(p, P, DIMS: tl.constexpr, size0, size1, size2, stride0, stride1, stride2, stride3):
    """Where pixel p lies. Innermost dimension first; the outermost one's size is not needed."""
    if DIMS == 1:
        return p * stride0
    else:
        # 32-bit divisions where P allows them. Then p may wrap beyond the image: it is not loaded there.
        rest = p.to(P.dtype)
        offset = (rest % size0).to(tl.int64) * stride0
        rest = rest // size0
        if DIMS > 2:
            offset += (rest % size1).to(tl.int64) * stride1
            rest = rest // size1
        if DIMS > 3:
            offset += (rest % size2).to(tl.int64) * stride2
            rest = rest // size2
        outermost = stride1 if DIMS == 2 else stride2 if DIMS == 3 else stride3
        return offset + rest.to(tl.int64) * outermost


@triton.jit
def _classify(target_ptr, at, inside, ignore_index, C: tl.constexpr):
    """The class of each pixel, 0 where it has none; whether it has one; whether its label is none at all."""
    y = tl.load(target_ptr + at, mask=inside, other=0).to(tl.int64)
    valid = inside & (y >= 0) & (y < C) & (y != ignore_index)
    bad = inside & (y != ignore_index) & ~valid
    return tl.where(valid, y, 0).to(tl.int32), valid, bad


@triton.jit
def _weights(weight_ptr, pixel_weight_ptr, at, label, valid, A: tl.constexpr):
    w = valid.to(A)
    if weight_ptr is not None:
        w *= tl.load(weight_ptr + label, mask=valid, other=0).to(A)
    if pixel_weight_ptr is not None:
        w *= tl.load(pixel_weight_ptr + at, mask=valid, other=0).to(A)
    return w


@triton.jit
def _level_of(label, LEVELS: tl.constexpr, BITS: tl.constexpr):
    """What `pack_levels` packed. A gather from memory would need the levels there."""
    COUNT: tl.constexpr = _WORD // BITS
    word = tl.zeros_like(label)
    for i in tl.static_range(len(LEVELS)):
        word = tl.where(label // COUNT == i, LEVELS[i], word)
    return (word >> (label % COUNT * BITS)) & ((1 << BITS) - 1)


@triton.jit
def _load_chunk(logits, first, COUNT: tl.constexpr, A: tl.constexpr, EVICT: tl.constexpr):
    """Logits of the classes [first, first + COUNT), as many tensors. They lie at the pointers, a channel's
    stride apart."""
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
    # While all logits are -inf, exp(x - 0) = 0 stands for their terms: -inf - -inf would be NaN.
    shift = tl.where(max == float("-inf"), 0, max)
    sum *= tl.exp(seen - shift)
    for i in tl.static_range(COUNT):
        sum += tl.exp(x[i] - shift)
        own = tl.where(label == first + i, x[i], own)
    return max, sum, own


@triton.jit
def _softmax(LOAD: tl.constexpr, CHUNK: tl.constexpr, logits, label, C: tl.constexpr, A: tl.constexpr):
    """max_c x_c, sum_c exp(x_c - max), and x_y of each pixel, of logits that LOAD reads as `_load_chunk`."""
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
def _inverse(x):
    # Triton's own division of float32 is approximate.
    if x.dtype == tl.float32:
        return tl.div_rn(1.0, x)
    else:
        return 1 / x


# ---- reduce ---------------------------------------------------------------------------------------------


@triton.jit
def _no_sums(GROUP: tl.constexpr, THREADS: tl.constexpr, A: tl.constexpr):
    """The statistics of GROUP levels before any pixel, those of each thread."""
    sums = ()
    for _ in tl.static_range(GROUP * _STATS):
        sums += (tl.zeros([THREADS], A),)
    return sums


@triton.jit
def _of_threads(x):
    """Sums over the pixels of each thread: LANES of a tile, ROWS and COLUMNS of a tile of cells."""
    if len(x.shape) == 2:
        return tl.sum(x, axis=1)
    else:
        return tl.sum(tl.sum(x, axis=0), axis=0)


@triton.jit
def _add_pixels(sums, max, sum, own, w, valid, bad, level, first_level, GROUP: tl.constexpr):
    """A bad label makes its image's S_0 NaN: no gradient needs it."""
    pi = tl.exp(own - max) * _inverse(sum)
    s = tl.where(bad, float("nan"), w * (tl.log(sum) - (own - max)))
    terms = (s, pi * pi, (1 - pi) * (1 - pi), valid.to(w.dtype), w)
    added = ()
    for k in tl.static_range(GROUP):
        here = valid & (level - first_level == k)
        for i in tl.static_range(_STATS):
            counts = here | (bad & (first_level + k == 0)) if i == _S else here
            added += (sums[k * _STATS + i] + _of_threads(tl.where(counts, terms[i], 0)),)
    return added


@triton.jit
def _store_sums(sums, partial_ptr, n, block, blocks, first_level, G: tl.constexpr, GROUP: tl.constexpr):
    for k in tl.static_range(GROUP):
        for i in tl.static_range(_STATS):
            row = (n * G + first_level + k) * _STATS + i
            total = tl.sum(sums[k * _STATS + i], axis=0).to(tl.float64)
            tl.store(partial_ptr + row * blocks + block, total, mask=first_level + k < G)


@triton.autotune([REDUCE_CONFIG], key=[])
@triton.jit
def reduce_kernel(
    logits_ptr,
    target_ptr,  # [N, P]
    weight_ptr,  # [C] or None
    pixel_weight_ptr,  # [N, P] or None
    partial_ptr,  # [N, G, STATS, blocks] of float64
    blocks,  # programs of an image
    P,
    ignore_index,
    size0,
    size1,
    size2,
    batch,
    channel,
    stride0,
    stride1,
    stride2,
    stride3,
    C: tl.constexpr,
    G: tl.constexpr,
    LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    HIGH: tl.constexpr,  # of the ints from P to stride3
    GROUP: tl.constexpr,  # levels that a program sums
    DIMS: tl.constexpr,
    THREADS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,  # the lanes of a thread lie side by side
):
    """Grid (N blocks, groups of levels)."""
    P, ignore_index, size0, size1, size2, batch, channel, stride0, stride1, stride2, stride3 = _whole(
        (P, ignore_index, size0, size1, size2, batch, channel, stride0, stride1, stride2, stride3), HIGH
    )
    A: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    n, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    first_level = tl.program_id(1) * GROUP
    n = n.to(tl.int64)
    sums = _no_sums(GROUP, THREADS, A)
    for tile in range(block, _tiles(P, THREADS * LANES), blocks):
        p, inside = _tile(tile, P, THREADS, LANES, VECTOR)
        label, valid, bad = _classify(target_ptr, n * P + p, inside, ignore_index, C)
        ptrs = logits_ptr + n * batch
        ptrs += _offset(p, P, DIMS, size0, size1, size2, stride0, stride1, stride2, stride3)
        max, sum, own = _softmax(_load_chunk, _CHUNK, (ptrs, _wide(channel), inside), label, C, A)
        w = _weights(weight_ptr, pixel_weight_ptr, n * P + p, label, valid, A)
        level = _level_of(label, LEVELS, BITS)
        sums = _add_pixels(sums, max, sum, own, w, valid, bad, level, first_level, GROUP)
    _store_sums(sums, partial_ptr, n, block, blocks, first_level, G, GROUP)


@triton.jit
def sum_kernel(
    partial_ptr, stats_ptr, rows, blocks, HIGH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """stats[i] = sum over b of partial[i, b], ROWS of them by a program."""
    rows = _whole((rows,), HIGH)[0]
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, WIDTH], tl.float64)
    for first in range(0, blocks, WIDTH):
        b = first + tl.arange(0, WIDTH)
        inside = (i < rows)[:, None] & (b < blocks)[None, :]
        total += tl.load(partial_ptr + i[:, None] * blocks + b[None, :], mask=inside, other=0)
    tl.store(stats_ptr + i, tl.sum(total, axis=1), mask=i < rows)


# ---- gradient -------------------------------------------------------------------------------------------


@triton.jit
def _pixel_gradient(row_ptr, max, sum, own, w, EXACT: tl.constexpr):
    """exp(x_c - max) times the first, and for c = y plus the second, is dL/dx_c of a pixel whose level's row
    of the table is at row_ptr. See PixelGradient of csrc/loss.h."""
    A: tl.constexpr = w.dtype
    inverse = _inverse(sum)
    pi = tl.exp(own - max) * inverse
    reach = 2 * pi * (pi * tl.load(row_ptr + _P2).to(A) - (1 - pi) * tl.load(row_ptr + _Q2).to(A))
    # Last: loaded before the exponential it would stay in registers, and Triton 3.6 would spill.
    ce = w * tl.load(row_ptr + _S).to(A)
    if EXACT:
        scale, extra = ce - reach, reach - ce
    else:
        scale, extra = ce, reach * (1 - pi) - ce
    return scale * inverse, extra


@triton.jit
def _class_gradient(x, c, label, valid, max, scale, extra):
    """dL/dx_c. A pixel without a class has gradient 0 whatever its logits are."""
    return tl.where(valid, tl.exp(x - max) * scale + tl.where(label == c, extra, 0), 0)


@triton.jit
def _gradient_chunk(logits, to, to_channel, label, valid, max, scale, extra, first, COUNT: tl.constexpr):
    # Said to be the last use, else the compiler would keep what it has loaded for the softmax, and spill.
    x = _load_chunk(logits, first, COUNT, max.dtype, "evict_first")
    inside = logits[2]
    for i in tl.static_range(COUNT):
        value = _class_gradient(x[i], first + i, label, valid, max, scale, extra).to(to.dtype.element_ty)
        # Past what the caches keep: nobody reads it again soon.
        tl.store(to + to_channel * (first + i), value, mask=inside, cache_modifier=".cs")


@triton.autotune(GRADIENT_CONFIGS, key=["C", "VECTOR", "DIMS"], restore_value=["grad_ptr"])
@triton.jit
def gradient_kernel(
    logits_ptr,
    table_ptr,  # [N, G, STATS] of float64
    target_ptr,  # [N, P]
    weight_ptr,  # [C] or None
    pixel_weight_ptr,  # [N, P] or None
    grad_ptr,  # may be logits_ptr: a thread reads its classes, or a chunk of them, before it writes them
    P,
    ignore_index,
    size0,
    size1,
    size2,
    batch,
    channel,
    stride0,
    stride1,
    stride2,
    stride3,
    grad_batch,
    grad_channel,
    grad_stride0,
    grad_stride1,
    grad_stride2,
    grad_stride3,
    C: tl.constexpr,
    G: tl.constexpr,
    LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    HIGH: tl.constexpr,  # of the ints from P to stride3
    GRAD_HIGH: tl.constexpr,  # of those after them
    EXACT: tl.constexpr,
    DIMS: tl.constexpr,
    THREADS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Grid (N tiles), backwards: the L2 cache has what reduce read last."""
    P, ignore_index, size0, size1, size2, batch, channel, stride0, stride1, stride2, stride3 = _whole(
        (P, ignore_index, size0, size1, size2, batch, channel, stride0, stride1, stride2, stride3), HIGH
    )
    grad_batch, grad_channel, grad_stride0, grad_stride1, grad_stride2, grad_stride3 = _whole(
        (grad_batch, grad_channel, grad_stride0, grad_stride1, grad_stride2, grad_stride3), GRAD_HIGH
    )
    A: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    tiles = _tiles(P, THREADS * LANES)
    n = (index // tiles).to(tl.int64)
    p, inside = _tile(index % tiles, P, THREADS, LANES, VECTOR)
    label, valid, _ = _classify(target_ptr, n * P + p, inside, ignore_index, C)
    ptrs = logits_ptr + n * batch
    ptrs += _offset(p, P, DIMS, size0, size1, size2, stride0, stride1, stride2, stride3)
    logits = (ptrs, _wide(channel), inside)
    max, sum, own = _softmax(_load_chunk, _CHUNK, logits, label, C, A)
    w = _weights(weight_ptr, pixel_weight_ptr, n * P + p, label, valid, A)
    row_ptr = table_ptr + n * (G * _STATS) + _level_of(label, LEVELS, BITS) * _STATS
    scale, extra = _pixel_gradient(row_ptr, max, sum, own, w, EXACT)

    to = grad_ptr + n * grad_batch
    to += _offset(p, P, DIMS, size0, size1, size2, grad_stride0, grad_stride1, grad_stride2, grad_stride3)
    to_channel = _wide(grad_channel)
    # Backwards too, for the sake of the L1 cache.
    WHOLE: tl.constexpr = C // _CHUNK * _CHUNK
    if WHOLE < C:
        _gradient_chunk(logits, to, to_channel, label, valid, max, scale, extra, WHOLE, C - WHOLE)
    for done in range(_CHUNK, WHOLE + _CHUNK, _CHUNK):
        _gradient_chunk(logits, to, to_channel, label, valid, max, scale, extra, WHOLE - done, _CHUNK)


# ---- combine and table: one program ---------------------------------------------------------------------


# Triton would compile once more for bits that are a 1 or divisible by 16.
_BITS = ["lambda_low", "lambda_high", "alpha_low", "alpha_high"]


@triton.jit
def _float64(low, high):
    """A number that came as its bits: Triton makes a float of Python a float32."""
    return ((_wide(high) << 32) | (_wide(low) & 0xFFFFFFFF)).to(tl.float64, bitcast=True)


@triton.jit
def _stat(stats_ptr, n, N, k, i, G: tl.constexpr, POOL: tl.constexpr):
    """stats[n, k, i] of each image, or its sum over all of them."""
    if POOL:
        total = tl.zeros(n.shape, tl.float64)
        for first in range(0, N, _IMAGES):
            m = first + tl.arange(0, _IMAGES)
            total += tl.load(stats_ptr + (m.to(tl.int64) * G + k) * _STATS + i, mask=m < N, other=0)
        return tl.zeros(n.shape, tl.float64) + tl.sum(total, axis=0)
    else:
        return tl.load(stats_ptr + (n.to(tl.int64) * G + k) * _STATS + i, mask=n < N, other=0)


@triton.jit
def _or_one(divisor):
    return tl.where(divisor != 0, divisor, 1)


@triton.jit
def _lambda(lambda_ptr, lambda_low, lambda_high, t, G: tl.constexpr):
    """lambda_t: one for all in the bits, or one for each in memory."""
    if lambda_ptr is None:
        return _float64(lambda_low, lambda_high)
    else:
        return tl.load(lambda_ptr + t, mask=t < G - 1, other=0)


@triton.jit
def _factor(
    stats_ptr, n, N, t, count, above, lam, G: tl.constexpr, NORMALIZE: tl.constexpr, POOL: tl.constexpr
):
    """f_t and Z_t of Eq. 3, with the pixels of the levels above t and their Q2 before and after t."""
    count += _stat(stats_ptr, n, N, t, _COUNT, G, POOL)
    z = _or_one(count) if NORMALIZE else tl.full(n.shape, 1, tl.float64)
    f = 0.5 * (lam * _stat(stats_ptr, n, N, t, _P2, G, POOL) + (1 + lam) * above) / z
    return tl.where(t < G - 1, f, 0), z, count, above + _stat(stats_ptr, n, N, t, _Q2, G, POOL)


@triton.jit
def _total_weight(stats_ptr, N, G: tl.constexpr):
    total = tl.zeros([_IMAGES], tl.float64)
    for k in range(G):
        total += _stat(stats_ptr, tl.arange(0, _IMAGES), N, k, _WEIGHT, G, True)
    return tl.max(total, axis=0)


@triton.jit
def _below(n, t, bound):
    """t < bound, in the shape of n: interpreted, t is an int, and Triton 3.9 takes no bool in a mask."""
    return tl.zeros_like(n) + t < bound


@triton.jit(do_not_specialize=_BITS)
def combine_kernel(
    stats_ptr,  # [N, G, STATS]
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
    """T_k = S_k + (f_k + alpha) T_{k+1}, IAL = T_0 (Eqs. 5 to 8). Images pooled share one row of f."""
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
            chain = _stat(stats_ptr, n, N, t, _S, G, False) + (f + alpha) * chain
        if REDUCTION == "none":
            tl.store(loss_ptr + n, chain, mask=n < N)
        total += tl.where(n < N, chain, 0)
    if REDUCTION == "sum":
        tl.store(loss_ptr, tl.sum(total, axis=0))
    if REDUCTION == "mean":
        weight = _total_weight(stats_ptr, N, G)
        tl.store(loss_ptr, tl.where(weight != 0, tl.sum(total, axis=0) / _or_one(weight), 0))


@triton.jit
def _image_gradient(grad_loss_ptr, n, N, weight, REDUCTION: tl.constexpr):
    """dL/dIAL_n."""
    if REDUCTION == "none":
        return tl.load(grad_loss_ptr + n, mask=n < N, other=0).to(tl.float64)
    else:
        value = tl.load(grad_loss_ptr).to(tl.float64)
        if REDUCTION == "mean":
            value = tl.where(weight != 0, value / _or_one(weight), 0)
        return tl.zeros(n.shape, tl.float64) + value


@triton.jit
def _incoming_s(
    stats_ptr, grad_loss_ptr, n, N, t, weight, G: tl.constexpr, REDUCTION: tl.constexpr, POOL: tl.constexpr
):
    """G_n S_nt with G_n = dL/dIAL_n, of each image or summed over all."""
    if POOL:
        total = tl.zeros(n.shape, tl.float64)
        for first in range(0, N, _IMAGES):
            m = first + tl.arange(0, _IMAGES)
            total += _image_gradient(grad_loss_ptr, m, N, weight, REDUCTION) * _stat(
                stats_ptr, m, N, t, _S, G, False
            )
        return tl.zeros(n.shape, tl.float64) + tl.sum(total, axis=0)
    else:
        return _image_gradient(grad_loss_ptr, n, N, weight, REDUCTION) * _stat(
            stats_ptr, n, N, t, _S, G, False
        )


@triton.jit(do_not_specialize=_BITS)
def table_kernel(
    stats_ptr,  # [N, G, STATS]
    grad_loss_ptr,  # [N] or []
    lambda_ptr,  # [G - 1] or None
    table_ptr,  # [N, G, STATS]
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
    """dL/dstats; `table` of csrc/loss.h has the formulas. Down the levels, F_t and T_{t+1} / Z_t are left in
    the last two columns of an image's rows, the first image's where they are pooled, for the way up."""
    alpha = _float64(alpha_low, alpha_high)
    weight = _total_weight(stats_ptr, N, G)
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
            to = table_ptr + (n.to(tl.int64) * G + t) * _STATS
            tl.store(to + _COUNT, f + alpha, mask=n < rows)
            tl.store(to + _WEIGHT, chain / z, mask=n < rows)
            chain = (
                _incoming_s(stats_ptr, grad_loss_ptr, n, N, t, weight, G, REDUCTION, POOL)
                + (f + alpha) * chain
            )
    tl.debug_barrier()

    for first in range(0, N, _IMAGES):
        n = first + tl.arange(0, _IMAGES)
        row = tl.zeros_like(n) if POOL else n
        incoming = _image_gradient(grad_loss_ptr, n, N, weight, REDUCTION)
        lead = tl.full([_IMAGES], 1, tl.float64)
        dq2 = tl.zeros([_IMAGES], tl.float64)
        for k in range(G):
            kept = table_ptr + (row.to(tl.int64) * G + k) * _STATS
            lam = _lambda(lambda_ptr, lambda_low, lambda_high, k, G)
            half_b_over_z = 0.5 * lead * tl.load(kept + _WEIGHT, mask=n < N, other=0)
            to = table_ptr + (n.to(tl.int64) * G + k) * _STATS
            tl.store(to + _S, lead * incoming, mask=n < N)
            tl.store(to + _P2, half_b_over_z * lam, mask=n < N)
            tl.store(to + _Q2, dq2, mask=n < N)
            dq2 += half_b_over_z * (1 + lam)
            lead *= tl.load(kept + _COUNT, mask=n < N, other=0)
    tl.debug_barrier()

    for first in range(0, N, _IMAGES):
        n = first + tl.arange(0, _IMAGES)
        for k in range(G):
            to = table_ptr + (n.to(tl.int64) * G + k) * _STATS
            tl.store(to + _COUNT, 0.0, mask=n < N)
            tl.store(to + _WEIGHT, 0.0, mask=n < N)
