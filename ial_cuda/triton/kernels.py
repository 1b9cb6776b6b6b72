"""The Triton kernels for full-resolution logits.

They are reduce, the sum of its partial sums, reduce_backward, for one level the sums and the gradient in one
pass, and the negative log-likelihood of each pixel.

A program owns a tile of (THREADS, LANES) pixels. If the strides allow it, the LANES of a thread are adjacent,
16 bytes of a row, and loads are vectorised. A sum over LANES stays in the thread. reduce_backward and the
one-pass kernel read the logits twice, the second time from the caches.

Sums are added in a fixed order, without atomics. Only THREADS of reduce_backward is tuned on the device,
since no sum depends on it. Tuning the other kernels would make the order of their sums, and so their last
bits, depend on a timing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .combine import one_level_gradient_of_s
from .pixels import (
    INTERPRETED,
    STATS,
    add_pixels,
    class_gradient,
    classify,
    config,
    is_current,
    join,
    level_of,
    load_chunk,
    load_weights,
    one_level_gradient,
    pixel_gradient,
    pixel_nll,
    softmax,
    store_sums,
    to_int64,
    zero_sums,
)

#: The configuration of reduce. In the interpreter each operation is slow, so tiles are large.
REDUCE_CONFIG = config(1024 if INTERPRETED else 128)
#: The configurations tried for reduce_backward. The interpreter has nothing to tune.
REDUCE_BACKWARD_CONFIGS = [REDUCE_CONFIG] if INTERPRETED else [config(threads) for threads in (64, 128, 256)]
#: The number of sums of a program of sum_kernel, and of the partial sums of each that it reads at a time.
SUM_ROWS, SUM_WIDTH = 4, 128
#: The number of lanes that are not adjacent. Each has its own address, and more of them would spill.
STRIDED_LANES = 2
#: The most spatial dimensions of a kernel, after merging.
MAX_DIMS = 4


# ---- a tile ---------------------------------------------------------------------------------------------


@triton.jit
def num_tiles(P, SIZE: tl.constexpr):
    """The number of tiles of an image with at least 1 pixel. P + SIZE - 1 of tl.cdiv may overflow int32."""
    return (P - 1) // SIZE + 1


@triton.jit
def _pixels(tile, P, THREADS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """The pixels of a tile, and whether they are in the image. int64, since N C P and P may exceed 2^31."""
    thread, lane = tl.arange(0, THREADS)[:, None], tl.arange(0, LANES)[None, :]
    pixel = thread * LANES + lane if VECTOR else thread + lane * THREADS
    first = to_int64(tile) * (THREADS * LANES)
    return first + pixel, pixel < P - first


@triton.jit
def _offset(p, P, DIMS: tl.constexpr, sizes, strides):
    """The offset of pixel p. Dimensions are innermost first. The size of the outermost one is not needed."""
    if DIMS == 1:
        return p * strides[0]
    else:
        # 32-bit divisions if P fits. p may then wrap outside the image, where nothing is loaded.
        rest = p.to(P.dtype)
        offset = (rest % sizes[0]).to(tl.int64) * strides[0]
        rest = rest // sizes[0]
        if DIMS > 2:
            offset += (rest % sizes[1]).to(tl.int64) * strides[1]
            rest = rest // sizes[1]
        if DIMS > 3:
            offset += (rest % sizes[2]).to(tl.int64) * strides[2]
            rest = rest // sizes[2]
        return offset + rest.to(tl.int64) * strides[DIMS - 1]


@triton.jit
def _read_tile(
    logits_ptr,
    target_ptr,
    weight_ptr,
    pixel_weight_ptr,
    n,
    p,
    inside,
    P,
    ignore_index,
    sizes,
    batch,
    channel,
    strides,
    C: tl.constexpr,
    SMOOTHING: tl.constexpr,
    CHUNK: tl.constexpr,
    DIMS: tl.constexpr,
):
    """The pixels p of a tile: class, whether it is valid or bad, weights, logits and softmax.

    The positions are no result of it. torch.compile takes each result of a function to depend on all its
    arguments, and would take a kernel that stores at such positions to write the logits, labels and weights.
    """
    A: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    label, valid, bad = classify(target_ptr, n * P + p, inside, ignore_index, C)
    ptrs = logits_ptr + n * batch
    ptrs += _offset(p, P, DIMS, sizes, strides)
    logits = (ptrs, to_int64(channel), inside)
    pixel = softmax(load_chunk, CHUNK, logits, label, weight_ptr, C, SMOOTHING, A)
    weights = load_weights(weight_ptr, pixel_weight_ptr, n * P + p, label, valid, A)
    return label, valid, bad, weights, logits, pixel


@triton.jit
def _gradient_chunk(
    logits, to, to_channel, label, valid, max, gradient, weight_ptr, first, COUNT: tl.constexpr
):
    # Another eviction policy than in the softmax. Otherwise the compiler keeps those loads, and spills.
    x = load_chunk(logits, first, COUNT, max.dtype, "evict_first")
    inside = logits[2]
    for i in tl.static_range(COUNT):
        value = class_gradient(x[i], first + i, label, valid, max, gradient, weight_ptr)
        value = value.to(to.dtype.element_ty)
        # A streaming store: the gradient is not read again soon.
        tl.store(to + to_channel * (first + i), value, mask=inside, cache_modifier=".cs")


@triton.jit
def _write_gradient(
    logits, to, to_channel, label, valid, max, gradient, weight_ptr, C: tl.constexpr, CHUNK: tl.constexpr
):
    """Writes the classes in reverse order, to hit the L1 cache."""
    WHOLE: tl.constexpr = C // CHUNK * CHUNK
    if WHOLE < C:
        _gradient_chunk(logits, to, to_channel, label, valid, max, gradient, weight_ptr, WHOLE, C - WHOLE)
    for done in range(CHUNK, WHOLE + CHUNK, CHUNK):
        _gradient_chunk(logits, to, to_channel, label, valid, max, gradient, weight_ptr, WHOLE - done, CHUNK)


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
    SMOOTHING: tl.constexpr,
    CHUNK: tl.constexpr,
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
        label, valid, bad, weights, _, pixel = _read_tile(
            logits_ptr,
            target_ptr,
            weight_ptr,
            pixel_weight_ptr,
            n,
            p,
            inside,
            P,
            ignore_index,
            (size0, size1, size2),
            batch,
            channel,
            (stride0, stride1, stride2, stride3),
            C,
            SMOOTHING,
            CHUNK,
            DIMS,
        )
        level = level_of(label, LEVELS, BITS)
        sums = add_pixels(sums, pixel, weights, valid, bad, level, first_level, C, SMOOTHING, GROUP, True)
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


@triton.autotune(REDUCE_BACKWARD_CONFIGS, key=["C", "VECTOR", "DIMS"], restore_value=["grad_ptr"])
@triton.jit
def reduce_backward_kernel(
    logits_ptr,
    grad_stats_ptr,  # [N, G, STATS] of float64; None for one level with dL/dS = 1
    scale_ptr,  # a factor of grad_stats, or None
    computed_for_ptr,  # the factor that the gradient is already for, or None
    expected_ptr,
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
    SMOOTHING: tl.constexpr,
    CHUNK: tl.constexpr,
    DIMS: tl.constexpr,
    THREADS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Grid (N tiles), in reverse order, since the L2 cache holds what reduce read last."""
    P, ignore_index, size0, size1, size2, batch, channel, stride0, stride1, stride2, stride3 = join(
        (P, ignore_index, size0, size1, size2, batch, channel, stride0, stride1, stride2, stride3), HIGH
    )
    grad_batch, grad_channel, grad_stride0, grad_stride1, grad_stride2, grad_stride3 = join(
        (grad_batch, grad_channel, grad_stride0, grad_stride1, grad_stride2, grad_stride3), GRAD_HIGH
    )
    if computed_for_ptr is not None:  # noqa: SIM102 (Triton evaluates both sides of an `and`)
        if is_current(scale_ptr, computed_for_ptr, expected_ptr):
            return
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    tiles = num_tiles(P, THREADS * LANES)
    n = (index // tiles).to(tl.int64)
    sizes = (size0, size1, size2)
    p, inside = _pixels(index % tiles, P, THREADS, LANES, VECTOR)
    label, valid, _, weights, logits, pixel = _read_tile(
        logits_ptr,
        target_ptr,
        weight_ptr,
        pixel_weight_ptr,
        n,
        p,
        inside,
        P,
        ignore_index,
        sizes,
        batch,
        channel,
        (stride0, stride1, stride2, stride3),
        C,
        SMOOTHING,
        CHUNK,
        DIMS,
    )
    if grad_stats_ptr is None:
        gradient = one_level_gradient(1, pixel, weights, C, SMOOTHING)
    else:
        row_ptr = grad_stats_ptr + n * (G * STATS) + level_of(label, LEVELS, BITS) * STATS
        gradient = pixel_gradient(row_ptr, scale_ptr, pixel, weights, C, SMOOTHING, EXACT)

    to = grad_ptr + n * grad_batch
    to += _offset(p, P, DIMS, sizes, (grad_stride0, grad_stride1, grad_stride2, grad_stride3))
    _write_gradient(
        logits, to, to_int64(grad_channel), label, valid, pixel[0], gradient, weight_ptr, C, CHUNK
    )


#: reduce_backward that keeps a gradient that is already right. Not tuned: tuning would time the early return.
rescale_kernel = triton.autotune([REDUCE_CONFIG], key=[])(reduce_backward_kernel.fn)


# ---- one level ------------------------------------------------------------------------------------------


@triton.autotune([REDUCE_CONFIG], key=[])
@triton.jit
def weight_kernel(
    target_ptr,  # [pixels]
    weight_ptr,  # [C] or None
    pixel_weight_ptr,  # [pixels] or None
    partial_ptr,  # [programs] of float64
    pixels,
    ignore_index,
    HIGH: tl.constexpr,
    C: tl.constexpr,
    DOUBLE: tl.constexpr,  # whether the arithmetic is in float64
    THREADS: tl.constexpr,
    LANES: tl.constexpr,
):
    """The summed weight of the valid pixels of all images, a partial sum per program. Grid (programs,)."""
    pixels, ignore_index = join((pixels, ignore_index), HIGH)
    total = tl.zeros([THREADS], tl.float64)
    for tile in range(tl.program_id(0), num_tiles(pixels, THREADS * LANES), tl.num_programs(0)):
        p, inside = _pixels(tile, pixels, THREADS, LANES, True)
        label, valid, _ = classify(target_ptr, p, inside, ignore_index, C)
        A: tl.constexpr = tl.float64 if DOUBLE else tl.float32
        w, _ = load_weights(weight_ptr, pixel_weight_ptr, p, label, valid, A)
        total += tl.sum(w, axis=1).to(tl.float64)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.autotune([REDUCE_CONFIG], key=[])
@triton.jit
def one_pass_kernel(
    logits_ptr,
    divisor_ptr,  # [terms]: their sum is the divisor of the loss; None for reduction="sum"
    expected_ptr,
    target_ptr,  # [N, P]
    weight_ptr,  # [C] or None
    pixel_weight_ptr,  # [N, P] or None
    grad_ptr,
    partial_ptr,  # [N, 1, STATS, blocks] of float64
    total_ptr,
    grad_stats_ptr,  # [N, 1, STATS] of float64
    computed_for_ptr,
    terms,
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
    grad_batch,
    grad_channel,
    grad_stride0,
    grad_stride1,
    grad_stride2,
    grad_stride3,
    C: tl.constexpr,
    HIGH: tl.constexpr,  # of the ints from P to stride3
    GRAD_HIGH: tl.constexpr,  # of the ints after stride3
    SMOOTHING: tl.constexpr,
    CHUNK: tl.constexpr,
    DIMS: tl.constexpr,
    THREADS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Grid (N blocks,)."""
    P, ignore_index, size0, size1, size2, batch, channel, stride0, stride1, stride2, stride3 = join(
        (P, ignore_index, size0, size1, size2, batch, channel, stride0, stride1, stride2, stride3), HIGH
    )
    grad_batch, grad_channel, grad_stride0, grad_stride1, grad_stride2, grad_stride3 = join(
        (grad_batch, grad_channel, grad_stride0, grad_stride1, grad_stride2, grad_stride3), GRAD_HIGH
    )
    A: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    ds = one_level_gradient_of_s(
        divisor_ptr, terms, expected_ptr, total_ptr, grad_stats_ptr, computed_for_ptr, blocks
    ).to(A)
    n, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    sizes = (size0, size1, size2)
    sums = zero_sums(1, THREADS, A)
    for tile in range(block, num_tiles(P, THREADS * LANES), blocks):
        p, inside = _pixels(tile, P, THREADS, LANES, VECTOR)
        label, valid, bad, weights, logits, pixel = _read_tile(
            logits_ptr,
            target_ptr,
            weight_ptr,
            pixel_weight_ptr,
            n,
            p,
            inside,
            P,
            ignore_index,
            sizes,
            batch,
            channel,
            (stride0, stride1, stride2, stride3),
            C,
            SMOOTHING,
            CHUNK,
            DIMS,
        )
        sums = add_pixels(sums, pixel, weights, valid, bad, tl.zeros_like(label), 0, C, SMOOTHING, 1, False)
        gradient = one_level_gradient(ds, pixel, weights, C, SMOOTHING)
        to = grad_ptr + n * grad_batch
        to += _offset(p, P, DIMS, sizes, (grad_stride0, grad_stride1, grad_stride2, grad_stride3))
        _write_gradient(
            logits, to, to_int64(grad_channel), label, valid, pixel[0], gradient, weight_ptr, C, CHUNK
        )
    store_sums(sums, partial_ptr, n, block, blocks, tl.program_id(1), 1, 1)


# ---- pixel_nll ------------------------------------------------------------------------------------------


@triton.autotune([REDUCE_CONFIG], key=[])
@triton.jit
def pixel_nll_kernel(
    logits_ptr,
    target_ptr,  # [N, P]
    weight_ptr,  # [C] or None
    nll_ptr,  # [N, P]
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
    HIGH: tl.constexpr,  # of the ints from P to stride3
    SMOOTHING: tl.constexpr,
    CHUNK: tl.constexpr,
    DIMS: tl.constexpr,
    THREADS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Grid (N tiles,)."""
    P, ignore_index, size0, size1, size2, batch, channel, stride0, stride1, stride2, stride3 = join(
        (P, ignore_index, size0, size1, size2, batch, channel, stride0, stride1, stride2, stride3), HIGH
    )
    tiles = num_tiles(P, THREADS * LANES)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    p, inside = _pixels(tl.program_id(0) % tiles, P, THREADS, LANES, VECTOR)
    _, valid, bad, weights, _, pixel = _read_tile(
        logits_ptr,
        target_ptr,
        weight_ptr,
        None,
        n,
        p,
        inside,
        P,
        ignore_index,
        (size0, size1, size2),
        batch,
        channel,
        (stride0, stride1, stride2, stride3),
        C,
        SMOOTHING,
        CHUNK,
        DIMS,
    )
    nll = pixel_nll(pixel, weights, bad, C, SMOOTHING)
    tl.store(nll_ptr + n * P + p, tl.where(valid | bad, nll, 0), mask=inside)
