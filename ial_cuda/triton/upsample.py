"""The Triton kernels for coarse logits, which are interpolated inside the kernel.

They are reduce, reduce_backward, for one level the sums and the gradient in one pass, and the negative
log-likelihood of each pixel.

csrc/bilinear.h defines the positions of pixels between coarse logits. Cells are numbered differently here:
cell i of a line is the interval between logits i - 1 and i. Cell 0 has the pixels before the first logit,
where F.interpolate returns that logit. No cell has more pixels than the ratio, rounded up. An image is one
line of (h + 1) (w + 1) cells.

A thread owns a cell. It keeps a patch of ROWS x COLUMNS of the cell's pixels in registers, so a class needs
four loads for the whole patch. A cell with more pixels has several patches. A tile is (ROWS, COLUMNS,
THREADS), and a tensor of corners is (THREADS,). Sums over rows and columns stay in the thread. A class is
interpolated along x once for all rows. Its gradient is summed over the rows before it is split between left
and right.

The fastest interpolation makes a pixel NaN if a logit of weight 0 is infinite. In that case the program
interpolates its pixels again and leaves out logits of weight 0.

The gradient of the four corners of a cell is summed over the cell. The sum of the right corners is added to
the left corners of the next cell. The gradient of a logit from the cells below it and from the cells above it
is stored as two halves, in the precision of the arithmetic. The operator adds the halves. The first cell of a
tile is the last cell of the previous tile, and only its right corners are used. The right corners of the last
cell of a row are 0, so nothing is carried to the next row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch.torch_version import TorchVersion

from .combine import one_level_gradient_of_s
from .pixels import (
    INTERPRETED,
    STATS,
    add_pixels,
    broadcast,
    class_gradient,
    classify,
    config,
    fma,
    is_current,
    join,
    level_of,
    load_weights,
    one_level_gradient,
    pixel_gradient,
    pixel_nll,
    reciprocal,
    softmax,
    store_sums,
    to_int64,
    zero_sums,
)

REDUCE_CONFIG = config(128)
REDUCE_BACKWARD_CONFIGS = [REDUCE_CONFIG] if INTERPRETED else [config(threads) for threads in (64, 128)]
#: The most rows and columns of a patch, for float32 and for float64. Patches in the interpreter are large.
MAX_PATCH = ((16, 16), (16, 16)) if INTERPRETED else ((4, 2), (2, 1))
#: Logits per program of add_halves_kernel.
ADD_BLOCK = 1024
# Classes of the softmax in registers at a time, with their corners and pixels.
_REDUCE_CHUNK = _BACKWARD_CHUNK = tl.constexpr(2)
if not INTERPRETED and TorchVersion(triton.__version__) < (3, 7):
    # Triton 3.6 distributes the pixels of a cell over several threads. Larger patches would spill.
    MAX_PATCH = ((4, 1), (1, 1))
    _REDUCE_CHUNK = tl.constexpr(1)


# ---- a tile ---------------------------------------------------------------------------------------------


@triton.jit
def _cells(first, cells, columns, THREADS: tl.constexpr, WIDE: tl.constexpr):
    """The row and column of THREADS cells from `first`, and whether they exist.

    The last cell replaces those that do not exist, so that every load is inside the tensor.
    """
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    q = first.to(INDEX) + tl.arange(0, THREADS)
    at = tl.minimum(q, (to_int64(cells) - 1).to(INDEX))
    columns = to_int64(columns).to(INDEX)
    return at // columns, at % columns, q < cells


@triton.jit
def _axis_pixels(axis, cell, k, A: tl.constexpr):
    """Pixel k of each cell along an axis, and whether it is in the cell.

    Also the weight of the cell's second logit. Cells at the ends of the line have one logit.
    """
    coarse, fine, step, origin, unit = axis
    unit = to_int64(unit).to(cell.dtype)
    start = (cell - 1) * unit - origin  # in steps from pixel 0
    pixel = tl.maximum((start + step - 1) // step, 0) + k
    beyond = pixel * step - start
    inside = (pixel < fine) & ((beyond < unit) | (cell == coarse))
    fraction = beyond.to(A) * reciprocal(unit.to(A))
    return pixel, inside, tl.where(cell == 0, 1, tl.where(cell == coarse, 0, fraction))


@triton.jit
def _pixels(
    y_axis,
    x_axis,
    row,
    column,
    exists,
    patch,
    x_patches,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    A: tl.constexpr,
):
    """The pixels of a patch of each cell, as positions in the image, and whether they are in the cell.

    Also the weights of the logits below them and of the logits on their right.
    """
    ky = tl.arange(0, ROWS)[:, None] + patch // x_patches * ROWS
    kx = tl.arange(0, COLUMNS)[:, None] + patch % x_patches * COLUMNS
    y, inside_y, fy = _axis_pixels(y_axis, row[None, :], ky, A)
    x, inside_x, fx = _axis_pixels(x_axis, column[None, :], kx, A)
    p = (y.to(tl.int64) * x_axis[1])[:, None, :] + x[None, :, :]
    # Hides that the pixels of a row are adjacent. Otherwise Triton assigns them to different threads.
    p = tl.max_contiguous(p, (1, 1, 1))
    return p, inside_y[:, None, :] & (inside_x & exists[None, :])[None, :, :], fy, fx


@triton.jit
def _corners(ptr, row, column, h, w, row_stride, stride):
    """Pointers to the four logits around each cell: above left, above right, below left, below right."""
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
def _lerp(a, b, f):
    """a + f (b - a). It uses half the difference, since b - a may overflow."""
    return fma(2 * f, 0.5 * b - 0.5 * a, a)


@triton.jit
def _safe_lerp(a, b, f):
    """`_lerp` that leaves out a or b if its weight is 0.

    All uses round alike: a pixel's own logit must equal the same logit in the loop over the classes.
    """
    f, b, a = broadcast(f, b, a)
    return tl.where(f == 0, a, tl.where(f == 1, b, tl.fma(f, b, (1 - f) * a)))


@triton.jit
def _interpolate(logits, first, COUNT: tl.constexpr, A: tl.constexpr, EVICT: tl.constexpr):
    """`load_chunk` for interpolated pixels. A pixel is NaN if a corner of weight 0 is not finite."""
    _, _, fy, fx = logits
    x = ()
    for i in tl.static_range(COUNT):
        corners = _load_corners(logits, first + i, A, EVICT)
        above, below = _lerp(corners[0], corners[1], fx), _lerp(corners[2], corners[3], fx)
        x += (_lerp(above[None, :, :], below[None, :, :], fy[:, None, :]),)
    return x


@triton.jit
def _safe_interpolate(logits, first, COUNT: tl.constexpr, A: tl.constexpr, EVICT: tl.constexpr):
    """`_interpolate` that leaves out logits of weight 0. It takes more instructions."""
    _, _, fy, fx = logits
    x = ()
    for i in tl.static_range(COUNT):
        corners = _load_corners(logits, first + i, A, EVICT)
        above = _safe_lerp(corners[0], corners[1], fx)
        below = _safe_lerp(corners[2], corners[3], fx)
        x += (_safe_lerp(above[None, :, :], below[None, :, :], fy[:, None, :]),)
    return x


@triton.jit
def _upsampled_softmax(
    CHUNK: tl.constexpr,
    logits,
    label,
    valid,
    weight_ptr,
    C: tl.constexpr,
    SMOOTHING: tl.constexpr,
    A: tl.constexpr,
):
    """`softmax`, and whether it needed `_safe_interpolate`."""
    COUNT: tl.constexpr = CHUNK if SMOOTHING == 0 else 1  # smoothing needs registers
    pixel = softmax(_interpolate, COUNT, logits, label, weight_ptr, C, SMOOTHING, A)
    sum = pixel[1]
    safe = tl.max(tl.ravel((valid & (sum != sum)).to(tl.int32)), axis=0) > 0
    if safe:
        pixel = softmax(_safe_interpolate, 1, logits, label, weight_ptr, C, SMOOTHING, A)
    return pixel, safe


@triton.jit
def _read_patch(
    target_ptr,
    weight_ptr,
    pixel_weight_ptr,
    n,
    y_axis,
    x_axis,
    row,
    column,
    exists,
    patch,
    x_patches,
    ignore_index,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    A: tl.constexpr,
):
    """The pixels of a patch of each cell: class, whether it is valid or bad, weights.

    Also the interpolation weights of the logits below and on the right.
    """
    p, inside, fy, fx = _pixels(y_axis, x_axis, row, column, exists, patch, x_patches, ROWS, COLUMNS, A)
    p += n * y_axis[1] * x_axis[1]
    label, valid, bad = classify(target_ptr, p, inside, ignore_index, C)
    return label, valid, bad, load_weights(weight_ptr, pixel_weight_ptr, p, label, valid, A), fy, fx


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
    patches,  # of a cell
    x_patches,  # side by side in a cell
    C: tl.constexpr,
    G: tl.constexpr,
    LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    HIGH: tl.constexpr,  # of the ints from ignore_index to stride
    GROUP: tl.constexpr,
    SMOOTHING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    THREADS: tl.constexpr,
    WIDE: tl.constexpr,  # whether positions need 64 bits
):
    """Grid (N blocks, groups of levels)."""
    ignore_index, batch, channel, row_stride, stride = join(
        (ignore_index, batch, channel, row_stride, stride), HIGH
    )
    A: tl.constexpr = tl.float64 if logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    n, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    first_level = tl.program_id(1) * GROUP
    cells = (to_int64(h) + 1) * (w + 1)
    sums = zero_sums(GROUP, THREADS, A)
    for tile in range(block, tl.cdiv(cells, THREADS) * patches, blocks):
        row, column, exists = _cells(to_int64(tile) // patches * THREADS, cells, w + 1, THREADS, WIDE)
        label, valid, bad, weights, fy, fx = _read_patch(
            target_ptr,
            weight_ptr,
            pixel_weight_ptr,
            n,
            (h, H, step_y, origin_y, unit_y),
            (w, W, step_x, origin_x, unit_x),
            row,
            column,
            exists,
            tile % patches,
            x_patches,
            ignore_index,
            C,
            ROWS,
            COLUMNS,
            A,
        )
        corners = _corners(logits_ptr + n * batch, row, column, h, w, row_stride, stride)
        logits = (corners, to_int64(channel), fy, fx)
        pixel, _ = _upsampled_softmax(_REDUCE_CHUNK, logits, label, valid, weight_ptr, C, SMOOTHING, A)
        level = level_of(label, LEVELS, BITS)
        sums = add_pixels(sums, pixel, weights, valid, bad, level, first_level, C, SMOOTHING, GROUP, True)
    store_sums(sums, partial_ptr, n, block, blocks, first_level, G, GROUP)


# ---- reduce_backward ------------------------------------------------------------------------------------


@triton.jit
def _to_logits(value, fx):
    """The gradient of the logit on the left of each cell, from columns (COLUMNS, THREADS).

    It sums the columns of this cell and of the previous cell, which has this logit on its right.
    """
    right = tl.sum(value * fx, axis=0)
    left = tl.sum(value, axis=0) - right
    before = tl.maximum(tl.arange(0, right.shape[0]) - 1, 0)
    return left + tl.gather(right, before, 0)


@triton.jit
def _accumulate(ptrs, value, mask, again):
    tl.store(ptrs, tl.load(ptrs, mask=mask & again, other=0) + value, mask=mask)


@triton.jit
def _halves(halves_ptr, n, N, row, column, exists, h, w, C: tl.constexpr):
    """Pointers to both halves of the gradient of class 0, the stride between classes, and a mask.

    The mask is true for the logits that this program writes.
    """
    size = to_int64(h) * w
    logit = (row - 1).to(tl.int64) * w + (column - 1)
    owned = exists & (column > 0) & (tl.arange(0, row.shape[0]) > 0)
    from_below = halves_ptr + n * C * size + logit
    from_above = halves_ptr + (N + n) * C * size + logit + w
    return from_below, from_above, size, owned


@triton.jit
def _add_gradient(
    halves, patch, row, h, logits, safe, label, valid, max, gradient, weight_ptr, C: tl.constexpr
):
    """Adds the gradient of a patch of each cell to the halves."""
    from_below, from_above, size, owned = halves
    _, _, fy, fx = logits
    again = tl.zeros_like(row) + patch > 0
    for c in range(C):
        if safe:
            x = _safe_interpolate(logits, c, 1, max.dtype, "evict_first")
        else:
            x = _interpolate(logits, c, 1, max.dtype, "evict_first")
        value = class_gradient(x[0], c, label, valid, max, gradient, weight_ptr)
        below = tl.sum(value * fy[:, None, :], axis=0)
        above = tl.sum(value, axis=0) - below
        _accumulate(from_below + c * size, _to_logits(above, fx), owned & (row > 0), again)
        _accumulate(from_above + c * size, _to_logits(below, fx), owned & (row < h), again)
    tl.debug_barrier()


@triton.autotune(REDUCE_BACKWARD_CONFIGS, key=["C", "ROWS", "COLUMNS"])
@triton.jit
def upsampled_reduce_backward_kernel(
    logits_ptr,
    grad_stats_ptr,  # [N, G, STATS] of float64; None for one level with dL/dS = 1
    scale_ptr,  # a factor of grad_stats, or None
    computed_for_ptr,  # the factor that the gradient is already for, or None
    expected_ptr,
    target_ptr,  # [N, H, W]
    weight_ptr,  # [C] or None
    pixel_weight_ptr,  # [N, H, W] or None
    halves_ptr,  # [2, N, C, h, w]: from the cells below each logit, and from those above
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
    patches,
    x_patches,
    C: tl.constexpr,
    G: tl.constexpr,
    LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    HIGH: tl.constexpr,  # of the ints from ignore_index to stride
    EXACT: tl.constexpr,
    SMOOTHING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    THREADS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Grid (N tiles)."""
    ignore_index, batch, channel, row_stride, stride = join(
        (ignore_index, batch, channel, row_stride, stride), HIGH
    )
    A: tl.constexpr = halves_ptr.dtype.element_ty
    if computed_for_ptr is not None:  # noqa: SIM102 (Triton evaluates both sides of an `and`)
        if is_current(scale_ptr, computed_for_ptr, expected_ptr):
            return
    cells = (to_int64(h) + 1) * (w + 1)
    tiles = tl.cdiv(cells - 1, THREADS - 1)
    n, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row, column, exists = _cells(tile * (THREADS - 1), cells, w + 1, THREADS, WIDE)
    corners = _corners(logits_ptr + n * batch, row, column, h, w, row_stride, stride)
    halves = _halves(halves_ptr, n, N, row, column, exists, h, w, C)
    for patch in range(patches):
        label, valid, _, weights, fy, fx = _read_patch(
            target_ptr,
            weight_ptr,
            pixel_weight_ptr,
            n,
            (h, H, step_y, origin_y, unit_y),
            (w, W, step_x, origin_x, unit_x),
            row,
            column,
            exists,
            patch,
            x_patches,
            ignore_index,
            C,
            ROWS,
            COLUMNS,
            A,
        )
        logits = (corners, to_int64(channel), fy, fx)
        pixel, safe = _upsampled_softmax(_BACKWARD_CHUNK, logits, label, valid, weight_ptr, C, SMOOTHING, A)
        if grad_stats_ptr is None:
            gradient = one_level_gradient(1, pixel, weights, C, SMOOTHING)
        else:
            row_ptr = grad_stats_ptr + n * (G * STATS) + level_of(label, LEVELS, BITS) * STATS
            gradient = pixel_gradient(row_ptr, scale_ptr, pixel, weights, C, SMOOTHING, EXACT)
        _add_gradient(halves, patch, row, h, logits, safe, label, valid, pixel[0], gradient, weight_ptr, C)


#: Like rescale_kernel of kernels.py.
upsampled_rescale_kernel = triton.autotune([REDUCE_CONFIG], key=[])(upsampled_reduce_backward_kernel.fn)


@triton.jit
def add_halves_kernel(
    halves_ptr,  # [2, size]
    scale_ptr,
    computed_for_ptr,
    grad_ptr,  # [N, C, h, w]
    size,
    h,
    w,
    batch,
    channel,
    row_stride,
    stride,
    HIGH: tl.constexpr,  # of the ints from size
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds the halves of upsampled_rescale_kernel. Grid (blocks of logits,)."""
    if is_current(scale_ptr, computed_for_ptr, None):
        return
    size, h, w, batch, channel, row_stride, stride = join(
        (size, h, w, batch, channel, row_stride, stride), HIGH
    )
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    x, line = i % w, i // w
    y, plane = line % h, line // h
    to = grad_ptr + plane // C * batch + plane % C * channel + y * row_stride + x * stride
    value = tl.load(halves_ptr + i, mask=inside) + tl.load(halves_ptr + size + i, mask=inside)
    tl.store(to, value.to(grad_ptr.dtype.element_ty), mask=inside)


# ---- one level ------------------------------------------------------------------------------------------


@triton.autotune([REDUCE_CONFIG], key=[])
@triton.jit
def upsampled_one_pass_kernel(
    logits_ptr,
    divisor_ptr,  # [terms]: their sum is the divisor of the loss; None for reduction="sum"
    expected_ptr,
    target_ptr,  # [N, H, W]
    weight_ptr,  # [C] or None
    pixel_weight_ptr,  # [N, H, W] or None
    halves_ptr,  # [2, N, C, h, w]
    partial_ptr,  # [N, 1, STATS, blocks] of float64
    total_ptr,
    grad_stats_ptr,  # [N, 1, STATS] of float64
    computed_for_ptr,
    terms,
    blocks,  # programs of an image
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
    patches,
    x_patches,
    C: tl.constexpr,
    HIGH: tl.constexpr,  # of the ints from ignore_index to stride
    SMOOTHING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    THREADS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Grid (N blocks,)."""
    ignore_index, batch, channel, row_stride, stride = join(
        (ignore_index, batch, channel, row_stride, stride), HIGH
    )
    A: tl.constexpr = halves_ptr.dtype.element_ty
    ds = one_level_gradient_of_s(
        divisor_ptr, terms, expected_ptr, total_ptr, grad_stats_ptr, computed_for_ptr, blocks
    ).to(A)
    n, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    cells = (to_int64(h) + 1) * (w + 1)
    sums = zero_sums(1, THREADS, A)
    for tile in range(block, tl.cdiv(cells - 1, THREADS - 1), blocks):
        row, column, exists = _cells(to_int64(tile) * (THREADS - 1), cells, w + 1, THREADS, WIDE)
        corners = _corners(logits_ptr + n * batch, row, column, h, w, row_stride, stride)
        halves = _halves(halves_ptr, n, N, row, column, exists, h, w, C)
        # The first cell of a tile is also the last cell of the previous tile, and is summed there.
        summed = ((tl.arange(0, THREADS) > 0) | (tl.zeros_like(row) + tile == 0))[None, None, :]
        for patch in range(patches):
            label, valid, bad, weights, fy, fx = _read_patch(
                target_ptr,
                weight_ptr,
                pixel_weight_ptr,
                n,
                (h, H, step_y, origin_y, unit_y),
                (w, W, step_x, origin_x, unit_x),
                row,
                column,
                exists,
                patch,
                x_patches,
                ignore_index,
                C,
                ROWS,
                COLUMNS,
                A,
            )
            logits = (corners, to_int64(channel), fy, fx)
            pixel, safe = _upsampled_softmax(
                _BACKWARD_CHUNK, logits, label, valid, weight_ptr, C, SMOOTHING, A
            )
            sums = add_pixels(
                sums,
                pixel,
                weights,
                valid & summed,
                bad & summed,
                tl.zeros_like(label),
                0,
                C,
                SMOOTHING,
                1,
                False,
            )
            gradient = one_level_gradient(ds, pixel, weights, C, SMOOTHING)
            _add_gradient(
                halves, patch, row, h, logits, safe, label, valid, pixel[0], gradient, weight_ptr, C
            )
    store_sums(sums, partial_ptr, n, block, blocks, tl.program_id(1), 1, 1)


# ---- pixel_nll ------------------------------------------------------------------------------------------


@triton.autotune([REDUCE_CONFIG], key=[])
@triton.jit
def upsampled_pixel_nll_kernel(
    logits_ptr,
    target_ptr,  # [N, H, W]
    weight_ptr,  # [C] or None
    nll_ptr,  # [N, H, W]
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
    patches,
    x_patches,
    C: tl.constexpr,
    HIGH: tl.constexpr,  # of the ints from ignore_index to stride
    SMOOTHING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    THREADS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Grid (N tiles,). Patches of the same cells are neighbours, since they share sectors of the map."""
    ignore_index, batch, channel, row_stride, stride = join(
        (ignore_index, batch, channel, row_stride, stride), HIGH
    )
    A: tl.constexpr = nll_ptr.dtype.element_ty
    cells = (to_int64(h) + 1) * (w + 1)
    tiles = tl.cdiv(cells, THREADS) * patches
    n, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row, column, exists = _cells(tile // patches * THREADS, cells, w + 1, THREADS, WIDE)
    y_axis, x_axis = (h, H, step_y, origin_y, unit_y), (w, W, step_x, origin_x, unit_x)
    # Not by _read_patch: the positions must not be a result of a function that takes the pointers.
    p, inside, fy, fx = _pixels(
        y_axis, x_axis, row, column, exists, tile % patches, x_patches, ROWS, COLUMNS, A
    )
    p += n * H * W
    label, valid, bad = classify(target_ptr, p, inside, ignore_index, C)
    weights = load_weights(weight_ptr, None, p, label, valid, A)
    corners = _corners(logits_ptr + n * batch, row, column, h, w, row_stride, stride)
    logits = (corners, to_int64(channel), fy, fx)
    pixel, _ = _upsampled_softmax(_REDUCE_CHUNK, logits, label, valid, weight_ptr, C, SMOOTHING, A)
    nll = pixel_nll(pixel, weights, bad, C, SMOOTHING)
    tl.store(nll_ptr + p, tl.where(valid | bad, nll, 0), mask=inside)
