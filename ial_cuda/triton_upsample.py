"""reduce and gradient of coarse logits, upsampled bilinearly while they are read.

csrc/bilinear.h says where a pixel lies between coarse logits. Cells are counted otherwise here: cell i of
a line is what lies between logits i - 1 and i, so that cell 0 has what is before the first logit, which
F.interpolate gives that logit's value. Then none has more pixels than the ratio, rounded up.

A thread owns a cell and ROWS x COLUMNS of its pixels, all in registers, so that a class costs it four loads
for all of them; cells with more pixels take several rounds. A tile is (ROWS, COLUMNS, THREADS), a tensor of
corners (THREADS,), and sums over rows and columns stay in the thread. Along x a class is interpolated once
for all rows, and the gradient is summed over the rows before it is shared between left and right. The
(h + 1) (w + 1) cells of an image count as one line.

In the fewest instructions, a pixel is NaN where a logit of weight 0 is infinite. Then the pixels of the
program are interpolated once more, carefully.

gradient sums over a cell what its pixels give its four corners, and adds the right corners of a cell to the
left corners of the next. What a logit gets from the cells below it and from those above it, its `halves`,
goes to memory in the precision of the arithmetic, and the operator adds them. A program's first cell is the
last of the program before, here for its right corners only. Those of a row's last cell are 0, so that nothing
passes from a row to the next.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch.torch_version import TorchVersion

from .triton_kernels import (
    _STATS,
    _add_pixels,
    _class_gradient,
    _classify,
    _config,
    _inverse,
    _level_of,
    _no_sums,
    _pixel_gradient,
    _softmax,
    _store_sums,
    _weights,
    _whole,
    _wide,
)

#: As in triton_kernels. An interpreted tile costs by the operation: it is large.
_INTERPRETED = triton.knobs.runtime.interpret
REDUCE_CONFIG = _config(128)
GRADIENT_CONFIGS = [REDUCE_CONFIG] if _INTERPRETED else [_config(threads) for threads in (64, 128)]
#: Rows and columns of pixels that a thread has in registers at a time: of float32, and of float64.
MOST_PIXELS = ((16, 16), (16, 16)) if _INTERPRETED else ((4, 2), (2, 1))
# Classes at a time in the softmax: their corners and their pixels are in registers too.
_REDUCE_CHUNK = _GRADIENT_CHUNK = tl.constexpr(2)
if not _INTERPRETED and TorchVersion(triton.__version__) < (3, 7):
    # Triton 3.6 gives the pixels of a cell to several threads: more of them would spill.
    MOST_PIXELS = ((4, 1), (1, 1))
    _REDUCE_CHUNK = tl.constexpr(1)


# ---- a tile ---------------------------------------------------------------------------------------------


@triton.jit
def _cells(first, cells, columns, THREADS: tl.constexpr, WIDE: tl.constexpr):
    """The row and column of THREADS cells from `first`, and which of them there are. The last one stands for
    those that are not, so that nothing is loaded from elsewhere."""
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    q = first.to(INDEX) + tl.arange(0, THREADS)
    at = tl.minimum(q, (_wide(cells) - 1).to(INDEX))
    columns = _wide(columns).to(INDEX)
    return at // columns, at % columns, q < cells


@triton.jit
def _along(axis, cell, k, A: tl.constexpr):
    """Pixel k of cells along an axis, whether it is theirs, and how far it is from their first logit to their
    second one: 0 to 1. Beyond the ends of the line there is one logit only."""
    coarse, fine, step, origin, unit = axis
    unit = _wide(unit).to(cell.dtype)
    start = (cell - 1) * unit - origin  # in steps from pixel 0
    pixel = tl.maximum((start + step - 1) // step, 0) + k
    beyond = pixel * step - start
    inside = (pixel < fine) & ((beyond < unit) | (cell == coarse))
    fraction = beyond.to(A) * _inverse(unit.to(A))
    return pixel, inside, tl.where(cell == 0, 1, tl.where(cell == coarse, 0, fraction))


@triton.jit
def _pixels(
    y_axis,
    x_axis,
    row,
    column,
    there,
    round,
    x_rounds,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    A: tl.constexpr,
):
    """Pixels of each cell, in the image as one line; whether they are in it; the fractions of their rows and
    of their columns."""
    ky = tl.arange(0, ROWS)[:, None] + round // x_rounds * ROWS
    kx = tl.arange(0, COLUMNS)[:, None] + round % x_rounds * COLUMNS
    y, inside_y, fy = _along(y_axis, row[None, :], ky, A)
    x, inside_x, fx = _along(x_axis, column[None, :], kx, A)
    p = (y.to(tl.int64) * x_axis[1])[:, None, :] + x[None, :, :]
    # That the pixels of a row lie side by side is not to be seen: they would be given to different threads.
    p = tl.max_contiguous(p, (1, 1, 1))
    return p, inside_y[:, None, :] & (inside_x & there[None, :])[None, :, :], fy, fx


@triton.jit
def _corners(ptr, row, column, h, w, row_stride, stride):
    """Where the four logits around each cell are: above left, above right, below left, below right."""
    above = tl.maximum(row - 1, 0).to(tl.int64) * row_stride
    below = tl.minimum(row, h - 1).to(tl.int64) * row_stride
    left = tl.maximum(column - 1, 0).to(tl.int64) * stride
    right = tl.minimum(column, w - 1).to(tl.int64) * stride
    return ptr + above + left, ptr + above + right, ptr + below + left, ptr + below + right


@triton.jit
def _load_corners(logits, c, A: tl.constexpr, EVICT: tl.constexpr):
    x = ()
    for i in tl.static_range(4):
        x += (tl.load(logits[0][i] + logits[1] * c, eviction_policy=EVICT).to(A)[None, :],)
    return x


@triton.jit
def _between(a, b, f):
    """f of the way from a to b. The difference is halved, since as a whole it may overflow."""
    return tl.fma(*_alike(2 * f, 0.5 * b - 0.5 * a, a))


@triton.jit
def _between_carefully(a, b, f):
    """`_between` without the one whose weight is 0. Every use rounds alike, or a pixel's own logit would not
    equal itself."""
    f, b, a = _alike(f, b, a)
    return tl.where(f == 0, a, tl.where(f == 1, b, tl.fma(f, b, (1 - f) * a)))


@triton.jit
def _alike(x, y, z):
    """Of one shape, which tl.fma does not see to."""
    x, y = tl.broadcast(x, y)
    x, z = tl.broadcast(x, z)
    y, z = tl.broadcast(y, z)
    return x, y, z


@triton.jit
def _interpolate(logits, first, COUNT: tl.constexpr, A: tl.constexpr, EVICT: tl.constexpr):
    """`_load_chunk` of pixels between corners. NaN where one of these is not finite, though its weight may be
    0; or right."""
    _, _, fy, fx = logits
    x = ()
    for i in tl.static_range(COUNT):
        corners = _load_corners(logits, first + i, A, EVICT)
        above, below = _between(corners[0], corners[1], fx), _between(corners[2], corners[3], fx)
        x += (_between(above[None, :, :], below[None, :, :], fy[:, None, :]),)
    return x


@triton.jit
def _interpolate_carefully(logits, first, COUNT: tl.constexpr, A: tl.constexpr, EVICT: tl.constexpr):
    """`_interpolate` without the logits whose weight is 0, in more instructions."""
    _, _, fy, fx = logits
    x = ()
    for i in tl.static_range(COUNT):
        corners = _load_corners(logits, first + i, A, EVICT)
        above = _between_carefully(corners[0], corners[1], fx)
        below = _between_carefully(corners[2], corners[3], fx)
        x += (_between_carefully(above[None, :, :], below[None, :, :], fy[:, None, :]),)
    return x


@triton.jit
def _upsampled_softmax(CHUNK: tl.constexpr, logits, label, valid, C: tl.constexpr, A: tl.constexpr):
    """`_softmax`, and whether it took care."""
    max, sum, own = _softmax(_interpolate, CHUNK, logits, label, C, A)
    careful = tl.max(tl.ravel((valid & (sum != sum)).to(tl.int32)), axis=0) > 0
    if careful:
        max, sum, own = _softmax(_interpolate_carefully, 1, logits, label, C, A)
    return max, sum, own, careful


# ---- reduce ---------------------------------------------------------------------------------------------


@triton.autotune([REDUCE_CONFIG], key=[])
@triton.jit
def upsampled_reduce_kernel(
    logits_ptr,
    target_ptr,  # [N, H, W]
    weight_ptr,  # [C] or None
    pixel_weight_ptr,  # [N, H, W] or None
    partial_ptr,  # [N, G, STATS, blocks] of float64
    blocks,  # programs of an image
    ignore_index,
    batch,
    channel,
    row_stride,
    stride,
    h,
    H,
    step_y,
    origin_y,
    unit_y,
    w,
    W,
    step_x,
    origin_x,
    unit_x,
    rounds,  # until the pixels of a cell are through
    x_rounds,  # until those of its rows are
    C: tl.constexpr,
    G: tl.constexpr,
    LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    HIGH: tl.constexpr,  # of the ints from ignore_index to stride
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    THREADS: tl.constexpr,
    WIDE: tl.constexpr,  # whether positions need 64 bits
):
    """Grid (N blocks, groups of levels)."""
    ignore_index, batch, channel, row_stride, stride = _whole(
        (ignore_index, batch, channel, row_stride, stride), HIGH
    )
    A: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    n, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    first_level = tl.program_id(1) * GROUP
    cells = (_wide(h) + 1) * (w + 1)
    sums = _no_sums(GROUP, THREADS, A)
    for tile in range(block, tl.cdiv(cells, THREADS) * rounds, blocks):
        row, column, there = _cells(_wide(tile) // rounds * THREADS, cells, w + 1, THREADS, WIDE)
        p, inside, fy, fx = _pixels(
            (h, H, step_y, origin_y, unit_y),
            (w, W, step_x, origin_x, unit_x),
            row,
            column,
            there,
            tile % rounds,
            x_rounds,
            ROWS,
            COLUMNS,
            A,
        )
        p += n * H * W
        label, valid, bad = _classify(target_ptr, p, inside, ignore_index, C)
        weight = _weights(weight_ptr, pixel_weight_ptr, p, label, valid, A)
        corners = _corners(logits_ptr + n * batch, row, column, h, w, row_stride, stride)
        logits = (corners, _wide(channel), fy, fx)
        max, sum, own, _ = _upsampled_softmax(_REDUCE_CHUNK, logits, label, valid, C, A)
        level = _level_of(label, LEVELS, BITS)
        sums = _add_pixels(sums, max, sum, own, weight, valid, bad, level, first_level, GROUP)
    _store_sums(sums, partial_ptr, n, block, blocks, first_level, G, GROUP)


# ---- gradient -------------------------------------------------------------------------------------------


@triton.jit
def _to_logits(value, fx):
    """What columns (COLUMNS, THREADS) give the logit on the left of each cell: its own columns, and those of
    the cell before, which have it on their right."""
    right = tl.sum(value * fx, axis=0)
    left = tl.sum(value, axis=0) - right
    before = tl.maximum(tl.arange(0, right.shape[0]) - 1, 0)
    return left + tl.gather(right, before, 0)


@triton.jit
def _add_to(ptrs, value, mask, again):
    tl.store(ptrs, tl.load(ptrs, mask=mask & again, other=0) + value, mask=mask)


@triton.autotune(GRADIENT_CONFIGS, key=["C", "ROWS", "COLUMNS"])
@triton.jit
def upsampled_gradient_kernel(
    logits_ptr,
    table_ptr,  # [N, G, STATS] of float64
    target_ptr,  # [N, H, W]
    weight_ptr,  # [C] or None
    pixel_weight_ptr,  # [N, H, W] or None
    halves_ptr,  # [2, N, C, h, w]: from the cells above each logit, and from those below
    N,
    ignore_index,
    batch,
    channel,
    row_stride,
    stride,
    h,
    H,
    step_y,
    origin_y,
    unit_y,
    w,
    W,
    step_x,
    origin_x,
    unit_x,
    rounds,
    x_rounds,
    C: tl.constexpr,
    G: tl.constexpr,
    LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    HIGH: tl.constexpr,  # of the ints from ignore_index to stride
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    THREADS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Grid (N tiles)."""
    ignore_index, batch, channel, row_stride, stride = _whole(
        (ignore_index, batch, channel, row_stride, stride), HIGH
    )
    A: tl.constexpr = halves_ptr.dtype.element_ty
    cells = (_wide(h) + 1) * (w + 1)
    tiles = tl.cdiv(cells - 1, THREADS - 1)
    n, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row, column, there = _cells(tile * (THREADS - 1), cells, w + 1, THREADS, WIDE)
    corners = _corners(logits_ptr + n * batch, row, column, h, w, row_stride, stride)

    size = _wide(h) * w
    logit = (row - 1).to(tl.int64) * w + (column - 1)
    mine = there & (column > 0) & (tl.arange(0, THREADS) > 0)
    from_below = halves_ptr + n * C * size + logit
    from_above = halves_ptr + (N + n) * C * size + logit + w
    for round in range(rounds):
        p, inside, fy, fx = _pixels(
            (h, H, step_y, origin_y, unit_y),
            (w, W, step_x, origin_x, unit_x),
            row,
            column,
            there,
            round,
            x_rounds,
            ROWS,
            COLUMNS,
            A,
        )
        p += n * H * W
        label, valid, _ = _classify(target_ptr, p, inside, ignore_index, C)
        weight = _weights(weight_ptr, pixel_weight_ptr, p, label, valid, A)
        logits = (corners, _wide(channel), fy, fx)
        max, sum, own, careful = _upsampled_softmax(_GRADIENT_CHUNK, logits, label, valid, C, A)
        row_ptr = table_ptr + n * (G * _STATS) + _level_of(label, LEVELS, BITS) * _STATS
        scale, extra = _pixel_gradient(row_ptr, max, sum, own, weight, EXACT)

        again = tl.zeros_like(row) + round > 0
        for c in range(C):
            if careful:
                x = _interpolate_carefully(logits, c, 1, A, "evict_first")
            else:
                x = _interpolate(logits, c, 1, A, "evict_first")
            value = _class_gradient(x[0], c, label, valid, max, scale, extra)
            below = tl.sum(value * fy[:, None, :], axis=0)
            above = tl.sum(value, axis=0) - below
            _add_to(from_below + c * size, _to_logits(above, fx), mine & (row > 0), again)
            _add_to(from_above + c * size, _to_logits(below, fx), mine & (row < h), again)
        tl.debug_barrier()
