"""The Triton kernels for logits of full size: reduce, the sum of its partial sums, and reduce_backward.

A program owns a tile of (THREADS, LANES) pixels. Where memory allows it, the LANES of a thread are adjacent,
16 bytes of a row, so that its loads are wide. A sum over LANES stays in the thread. reduce_backward reads the
logits twice, the second time from the caches.

Sums are added in a fixed order, without atomics. Only THREADS of reduce_backward is tuned on the device: no
sum depends on it. reduce is not tuned: the order of its sums, and so their last bits, would depend on a
clock.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pixels import (
    INTERPRETED,
    STATS,
    add_pixels,
    class_gradient,
    classify,
    config,
    join,
    level_of,
    load_chunk,
    load_weights,
    pixel_gradient,
    softmax,
    store_sums,
    to_int64,
    zero_sums,
)

#: The one configuration of reduce. An interpreted tile is large: the interpreter pays for each operation.
REDUCE_CONFIG = config(1024 if INTERPRETED else 128)
#: The configurations tried for reduce_backward. The interpreter has nothing to tune.
REDUCE_BACKWARD_CONFIGS = [REDUCE_CONFIG] if INTERPRETED else [config(threads) for threads in (64, 128, 256)]
#: Sums that a program of sum_kernel makes, and how many partial sums of each it reads at a time.
SUM_ROWS, SUM_WIDTH = 4, 128
#: Lanes that are not adjacent: each has an address of its own, and more of them would spill.
STRIDED_LANES = 2
#: The most spatial dimensions, after merging, that a kernel takes.
MAX_DIMS = 4

# Classes in registers at a time.
_CHUNK = tl.constexpr(4)


# ---- a tile ---------------------------------------------------------------------------------------------


@triton.jit
def num_tiles(P, SIZE: tl.constexpr):
    """Tiles of an image of 1 pixel or more. In tl.cdiv, P + SIZE - 1 may overflow int32."""
    return (P - 1) // SIZE + 1


@triton.jit
def _pixels(tile, P, THREADS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Pixels of a tile, and whether they are in the image. 64 bits: N C P exceeds 2^31, and P may."""
    thread, lane = tl.arange(0, THREADS)[:, None], tl.arange(0, LANES)[None, :]
    pixel = thread * LANES + lane if VECTOR else thread + lane * THREADS
    first = to_int64(tile) * (THREADS * LANES)
    return first + pixel, pixel < P - first


@triton.jit
def _offset(p, P, DIMS: tl.constexpr, size0, size1, size2, stride0, stride1, stride2, stride3):
    """The offset of pixel p. Dimensions are innermost first; the outermost one's size is not needed."""
    if DIMS == 1:
        return p * stride0
    else:
        # 32-bit divisions where P allows them. Then p may wrap outside the image, where nothing is loaded.
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


# ---- reduce ---------------------------------------------------------------------------------------------


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
    VECTOR: tl.constexpr,  # the lanes of a thread are adjacent
):
    """Grid (N blocks, groups of levels)."""
    P, ignore_index, size0, size1, size2, batch, channel, stride0, stride1, stride2, stride3 = join(
        (P, ignore_index, size0, size1, size2, batch, channel, stride0, stride1, stride2, stride3), HIGH
    )
    A: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    n, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    first_level = tl.program_id(1) * GROUP
    n = n.to(tl.int64)
    sums = zero_sums(GROUP, THREADS, A)
    for tile in range(block, num_tiles(P, THREADS * LANES), blocks):
        p, inside = _pixels(tile, P, THREADS, LANES, VECTOR)
        label, valid, bad = classify(target_ptr, n * P + p, inside, ignore_index, C)
        ptrs = logits_ptr + n * batch
        ptrs += _offset(p, P, DIMS, size0, size1, size2, stride0, stride1, stride2, stride3)
        max, sum, own = softmax(load_chunk, _CHUNK, (ptrs, to_int64(channel), inside), label, C, A)
        w = load_weights(weight_ptr, pixel_weight_ptr, n * P + p, label, valid, A)
        level = level_of(label, LEVELS, BITS)
        sums = add_pixels(sums, max, sum, own, w, valid, bad, level, first_level, GROUP)
    store_sums(sums, partial_ptr, n, block, blocks, first_level, G, GROUP)


@triton.jit
def sum_kernel(
    partial_ptr, stats_ptr, rows, blocks, HIGH: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """stats[i] = sum over b of partial[i, b], for ROWS values of i in a program."""
    rows = join((rows,), HIGH)[0]
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, WIDTH], tl.float64)
    for first in range(0, blocks, WIDTH):
        b = first + tl.arange(0, WIDTH)
        inside = (i < rows)[:, None] & (b < blocks)[None, :]
        total += tl.load(partial_ptr + i[:, None] * blocks + b[None, :], mask=inside, other=0)
    tl.store(stats_ptr + i, tl.sum(total, axis=1), mask=i < rows)


# ---- reduce_backward ------------------------------------------------------------------------------------


@triton.jit
def _gradient_chunk(logits, to, to_channel, label, valid, max, scale, extra, first, COUNT: tl.constexpr):
    # Marked as the last use. Otherwise the compiler keeps what it loaded for the softmax, and spills.
    x = load_chunk(logits, first, COUNT, max.dtype, "evict_first")
    inside = logits[2]
    for i in tl.static_range(COUNT):
        value = class_gradient(x[i], first + i, label, valid, max, scale, extra).to(to.dtype.element_ty)
        # Streamed past the caches: the gradient is not read again soon.
        tl.store(to + to_channel * (first + i), value, mask=inside, cache_modifier=".cs")


@triton.autotune(REDUCE_BACKWARD_CONFIGS, key=["C", "VECTOR", "DIMS"], restore_value=["grad_ptr"])
@triton.jit
def reduce_backward_kernel(
    logits_ptr,
    grad_stats_ptr,  # [N, G, STATS] of float64
    target_ptr,  # [N, P]
    weight_ptr,  # [C] or None
    pixel_weight_ptr,  # [N, P] or None
    grad_ptr,  # may be logits_ptr: a thread reads a chunk of classes before it writes that chunk
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
    GRAD_HIGH: tl.constexpr,  # of the ints after stride3
    EXACT: tl.constexpr,
    DIMS: tl.constexpr,
    THREADS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Grid (N tiles), in reverse order: the L2 cache holds what reduce read last."""
    P, ignore_index, size0, size1, size2, batch, channel, stride0, stride1, stride2, stride3 = join(
        (P, ignore_index, size0, size1, size2, batch, channel, stride0, stride1, stride2, stride3), HIGH
    )
    grad_batch, grad_channel, grad_stride0, grad_stride1, grad_stride2, grad_stride3 = join(
        (grad_batch, grad_channel, grad_stride0, grad_stride1, grad_stride2, grad_stride3), GRAD_HIGH
    )
    A: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    tiles = num_tiles(P, THREADS * LANES)
    n = (index // tiles).to(tl.int64)
    p, inside = _pixels(index % tiles, P, THREADS, LANES, VECTOR)
    label, valid, _ = classify(target_ptr, n * P + p, inside, ignore_index, C)
    ptrs = logits_ptr + n * batch
    ptrs += _offset(p, P, DIMS, size0, size1, size2, stride0, stride1, stride2, stride3)
    logits = (ptrs, to_int64(channel), inside)
    max, sum, own = softmax(load_chunk, _CHUNK, logits, label, C, A)
    w = load_weights(weight_ptr, pixel_weight_ptr, n * P + p, label, valid, A)
    row_ptr = grad_stats_ptr + n * (G * STATS) + level_of(label, LEVELS, BITS) * STATS
    scale, extra = pixel_gradient(row_ptr, max, sum, own, w, EXACT)

    to = grad_ptr + n * grad_batch
    to += _offset(p, P, DIMS, size0, size1, size2, grad_stride0, grad_stride1, grad_stride2, grad_stride3)
    to_channel = to_int64(grad_channel)
    # In reverse order too, for the L1 cache.
    WHOLE: tl.constexpr = C // _CHUNK * _CHUNK
    if WHOLE < C:
        _gradient_chunk(logits, to, to_channel, label, valid, max, scale, extra, WHOLE, C - WHOLE)
    for done in range(_CHUNK, WHOLE + _CHUNK, _CHUNK):
        _gradient_chunk(logits, to, to_channel, label, valid, max, scale, extra, WHOLE - done, _CHUNK)
