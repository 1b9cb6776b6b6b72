"""Launches the Triton kernels: their grids, and their arguments from sizes and strides.

Nothing synchronises, except the tuning of reduce_backward in its first call.
"""

from __future__ import annotations

import functools
import math
import struct
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import wrap_triton

from . import combine as combine_kernels
from . import kernels, pixels, upsample

STATS: int = pixels.STATS.value
#: The limit of what a kernel counts in 32 bits: programs, and patches of a cell.
_MAX_COUNT = 2**31 - 1
# Programs of reduce per multiprocessor. Waves are full if 1, 2 or 4 programs run on it at a time.
_PROGRAMS = 4


class Inputs(NamedTuple):
    """The arguments that the operators of the logits share."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    pixel_weight: Tensor | None
    class_levels: list[int]
    ignore_index: int
    gradient: str
    label_smoothing: float
    align_corners: bool | None = None

    @property
    def levels(self) -> int:
        return max(self.class_levels) + 1

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The other tensors, contiguous for the kernels."""
        others = (self.target, self.weight, self.pixel_weight)
        return tuple(None if tensor is None else tensor.contiguous() for tensor in others)

    @property
    def arithmetic(self) -> torch.dtype:
        return torch.float64 if self.logits.dtype == torch.float64 else torch.float32


@functools.lru_cache
def _hierarchy(class_levels: tuple[int, ...]) -> dict[str, Any]:
    """The classes and levels as constants of a kernel."""
    levels = max(class_levels) + 1
    return {
        "C": len(class_levels),
        "G": levels,
        "LEVELS": pixels.pack_levels(class_levels),
        "BITS": pixels.level_bits(levels),
    }


def launch_kernel(kernel: Any, like: Tensor, grid: Any, *arguments: Any, **constants: Any) -> None:
    """Launches a kernel on the device of ``like``. Kernels in the interpreter cannot be traced."""
    if not triton.knobs.runtime.interpret:
        kernel = wrap_triton(kernel)
    with torch.cuda.device_of(like):
        kernel[grid](*arguments, **constants)


# ---- pixels of an image, or cells of coarse logits ------------------------------------------------------


class _Pixels(NamedTuple):
    """How the kernels find the pixels of an image."""

    arguments: tuple[int, ...]
    constants: dict[str, Any]
    size: int  # in pixels, or in cells
    patches: int = 1  # of a cell


def _full_size(inputs: Inputs, grad: Tensor | None = None) -> _Pixels:
    tensors = [inputs.logits] if grad is None else [inputs.logits, grad]
    size = math.prod(inputs.logits.shape[2:])
    sizes, strides, vector = _merge(tensors)
    dims, missing = len(sizes), kernels.MAX_DIMS - len(sizes)
    sizes = (sizes + (1,) * missing)[:-1]  # the outermost one is not needed
    padded = [
        tensor.stride()[:2] + stride + (0,) * missing for tensor, stride in zip(tensors, strides, strict=True)
    ]
    arguments, high = pixels.split(size, inputs.ignore_index, *sizes, *padded[0])
    constants = {
        "HIGH": high,
        "DIMS": dims,
        "LANES": 16 // inputs.logits.element_size() if vector else kernels.STRIDED_LANES,
        "VECTOR": vector,
        # Classes in registers at a time. With label smoothing a class needs more registers.
        "CHUNK": 2 if inputs.label_smoothing and inputs.logits.element_size() == 2 else 4,
    }
    if grad is not None:
        low, constants["GRAD_HIGH"] = pixels.split(*padded[1])
        arguments += low
    return _Pixels(tuple(arguments), constants, size)


def _merge(tensors: list[Tensor]) -> tuple[tuple[int, ...], list[tuple[int, ...]], bool]:
    """The spatial dimensions of tensors (N, C, *spatial), innermost first.

    Returns the sizes, the strides of each tensor, and whether Triton can load vectors of 16 bytes. Dimensions
    that are contiguous with each other in every tensor are merged. Usually one is left.
    """
    merged: list[list[int]] = []  # size, and the stride in each tensor
    for d in reversed(range(2, tensors[0].dim())):
        size, steps = tensors[0].shape[d], [tensor.stride(d) for tensor in tensors]
        if size == 1:
            continue
        if merged and steps == [merged[-1][0] * inner for inner in merged[-1][1:]]:
            merged[-1][0] *= size
        else:
            merged.append([size, *steps])
    if len(merged) > kernels.MAX_DIMS:
        raise ValueError(
            f"logits has {len(merged)} spatial dimensions that cannot be merged, expected at most "
            f"{kernels.MAX_DIMS}; pass logits.contiguous()"
        )
    merged = merged or [[1] * (1 + len(tensors))]
    sizes, *strides = (tuple(values) for values in zip(*merged, strict=True))
    steps = [sizes[0], *(step for stride in strides for step in stride[1:])]
    steps += [tensor.stride(d) for tensor in tensors for d in (0, 1)]
    vector = all(stride[0] == 1 for stride in strides) and all(step % 16 == 0 for step in steps)
    return sizes, strides, vector and len(merged) <= 2  # vectors of more dimensions would spill


class _Axis(NamedTuple):
    """Axis of csrc/bilinear.h: pixel d is at position (step d + origin) / unit among the coarse logits."""

    coarse: int
    fine: int
    step: int
    origin: int
    unit: int

    @property
    def span(self) -> int:
        """The largest number of pixels in a cell."""
        return int(triton.cdiv(self.unit, self.step))


def _axis(coarse: int, fine: int, align_corners: bool) -> _Axis:
    if align_corners and coarse > 1:  # a single logit has no neighbour, but the step must not be 0
        return _Axis(coarse, fine, coarse - 1, 0, max(fine - 1, 1))
    return _Axis(coarse, fine, 2 * coarse, coarse - fine, 2 * fine)


def _upsampled(inputs: Inputs) -> _Pixels:
    logits = inputs.logits
    y, x = (
        _axis(*lengths, bool(inputs.align_corners))
        for lengths in zip(logits.shape[2:], inputs.target.shape[1:], strict=True)
    )
    cells = (y.coarse + 1) * (x.coarse + 1)
    rows, columns = (
        min(triton.next_power_of_2(int(axis.span)), most)
        for axis, most in zip((y, x), upsample.MAX_PATCH[logits.dtype == torch.float64], strict=True)
    )
    x_patches = triton.cdiv(x.span, columns)
    patches = triton.cdiv(y.span, rows) * x_patches
    if patches > _MAX_COUNT:
        raise ValueError(
            f"target has {y.span} x {x.span} pixels between four logits, expected at most "
            f"{_MAX_COUNT * rows * columns}"
        )
    largest = max(2 * (axis.coarse + 1) * (axis.fine + 2 * axis.span) for axis in (y, x))
    low, high = pixels.split(inputs.ignore_index, *logits.stride())
    wide = max(largest, 2 * cells) >= 2**31
    constants = {"HIGH": high, "ROWS": rows, "COLUMNS": columns, "WIDE": wide}
    return _Pixels((*low, *y, *x, patches, x_patches), constants, cells, patches)


def _tiles(inputs: Inputs) -> tuple[_Pixels, int]:
    """The pixels or cells of an image, and the tiles of reduce and pixel_nll that cover them."""
    if inputs.align_corners is None:
        config, image = kernels.REDUCE_CONFIG, _full_size(inputs)
    else:
        config, image = upsample.REDUCE_CONFIG, _upsampled(inputs)
    size = config.kwargs["THREADS"] * image.constants.get("LANES", 1)
    return image, image.patches * triton.cdiv(image.size, size)


# ---- reduce, its backward, and one pass -----------------------------------------------------------------


def reduce(inputs: Inputs) -> Tensor:
    """The partial sums of each program, then stats (N, g, STATS), their sum."""
    logits, images, levels = inputs.logits, inputs.logits.shape[0], inputs.levels
    if logits.numel() == 0:
        return logits.new_zeros((images, levels, STATS), dtype=torch.float64)
    image, tiles = _tiles(inputs)
    blocks = _programs(logits, tiles, images)
    groups = triton.cdiv(levels, pixels.REGISTER_LEVELS)
    partial = logits.new_empty((images, levels, STATS, blocks), dtype=torch.float64)
    launch_kernel(
        kernels.reduce_kernel if inputs.align_corners is None else upsample.upsampled_reduce_kernel,
        logits,
        (images * blocks, groups),
        logits,
        *inputs.tensors,
        partial,
        blocks,
        *image.arguments,
        **_hierarchy(tuple(inputs.class_levels)),
        GROUP=triton.cdiv(levels, groups),
        SMOOTHING=inputs.label_smoothing,
        **image.constants,
    )
    return _sum(partial)


def _sum(partial: Tensor) -> Tensor:
    stats = partial.new_empty(partial.shape[:-1])
    (rows,), high = pixels.split(stats.numel())
    launch_kernel(
        kernels.sum_kernel,
        partial,
        (triton.cdiv(stats.numel(), kernels.SUM_ROWS),),
        partial,
        stats,
        rows,
        partial.shape[-1],
        HIGH=high,
        ROWS=kernels.SUM_ROWS,
        WIDTH=kernels.SUM_WIDTH,
    )
    return stats


def _programs(like: Tensor, tiles: int, images: int = 1) -> int:
    """The number of programs that share the tiles of an image."""
    multiprocessors = 1
    if like.is_cuda:
        multiprocessors = torch.cuda.get_device_properties(like.device).multi_processor_count
    return int(min(tiles, triton.cdiv(_PROGRAMS * multiprocessors, images)))


class Incoming(NamedTuple):
    """The incoming gradient, the number that the gradient was computed for, and the expected number."""

    grad_loss: Tensor
    computed_for: Tensor
    expected: Tensor | None


def reduce_backward(
    inputs: Inputs, grad_stats: Tensor | None, grad: Tensor, incoming: Incoming | None = None
) -> None:
    """Writes dL/dlogits to ``grad``, which may be the logits if they are not upsampled.

    Without ``grad_stats`` there is one level, and dL/dS is 1.
    With ``incoming``, grad_stats is multiplied by it. ``grad`` is kept if it was computed for that number.
    """
    logits, images = inputs.logits, inputs.logits.shape[0]
    if logits.numel() == 0:
        return
    rescale = incoming is not None
    scale = incoming or (None, None, None)
    constants = _hierarchy(tuple(inputs.class_levels)) | {
        "EXACT": inputs.gradient == "exact",
        "SMOOTHING": inputs.label_smoothing,
    }
    if inputs.align_corners is None:
        image = _full_size(inputs, grad)
        launch_kernel(
            kernels.rescale_kernel if rescale else kernels.reduce_backward_kernel,
            logits,
            lambda tuned: (images * triton.cdiv(image.size, tuned["THREADS"] * tuned["LANES"]),),
            logits,
            grad_stats,
            *scale,
            *inputs.tensors,
            grad,
            *image.arguments,
            **constants,
            **image.constants,
        )
        return
    image = _upsampled(inputs)
    halves = logits.new_empty((2, *logits.shape), dtype=inputs.arithmetic)
    launch_kernel(
        upsample.upsampled_rescale_kernel if rescale else upsample.upsampled_reduce_backward_kernel,
        logits,
        lambda tuned: (images * triton.cdiv(image.size - 1, tuned["THREADS"] - 1),),
        logits,
        grad_stats,
        *scale,
        *inputs.tensors,
        halves,
        images,
        *image.arguments,
        **constants,
        **image.constants,
    )
    if incoming is None:
        torch.add(halves[0], halves[1], out=grad)
        return
    arguments, high = pixels.split(logits.numel(), *logits.shape[2:], *grad.stride())
    launch_kernel(
        upsample.add_halves_kernel,
        logits,
        (triton.cdiv(logits.numel(), upsample.ADD_BLOCK),),
        halves,
        incoming.grad_loss,
        incoming.computed_for,
        grad,
        *arguments,
        HIGH=high,
        C=logits.shape[1],
        BLOCK=upsample.ADD_BLOCK,
    )


def one_pass(
    inputs: Inputs, divisor: Tensor | None, reduction: str, expected: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """For one level: stats, divisor, grad_stats, dL/dlogits, and the incoming gradient that it is for."""
    logits, images = inputs.logits, inputs.logits.shape[0]
    if reduction == "sum":
        divisor = None
    elif divisor is None:
        divisor = _partial_weight(inputs)
    grad = torch.empty_like(logits)
    if inputs.align_corners is None:
        kernel, image, to = kernels.one_pass_kernel, _full_size(inputs, grad), grad
        tile = kernels.REDUCE_CONFIG.kwargs["THREADS"] * image.constants["LANES"]
        tiles = triton.cdiv(image.size, tile)
        count: tuple[int, ...] = ()
    else:
        kernel, image = upsample.upsampled_one_pass_kernel, _upsampled(inputs)
        to = logits.new_empty((2, *logits.shape), dtype=inputs.arithmetic)
        tiles = triton.cdiv(image.size - 1, upsample.REDUCE_CONFIG.kwargs["THREADS"] - 1)
        count = (images,)
    blocks = _programs(logits, tiles, images)
    partial = logits.new_empty((images, 1, STATS, blocks), dtype=torch.float64)
    grad_stats = partial.new_empty((images, 1, STATS))
    total, computed_for = partial.new_empty(()), partial.new_empty(())
    launch_kernel(
        kernel,
        logits,
        (images * blocks,),
        logits,
        divisor,
        expected,
        *inputs.tensors,
        to,
        partial,
        total,
        grad_stats,
        computed_for,
        1 if divisor is None else divisor.numel(),
        blocks,
        *count,
        *image.arguments,
        C=len(inputs.class_levels),
        SMOOTHING=inputs.label_smoothing,
        **image.constants,
    )
    if inputs.align_corners is not None:
        torch.add(to[0], to[1], out=grad)
    return _sum(partial), None if divisor is None else total, grad_stats, grad, computed_for


def _partial_weight(inputs: Inputs) -> Tensor:
    """The summed weight of the valid pixels, as one term per program."""
    target = inputs.target
    lanes = 16 // target.element_size()
    tiles = triton.cdiv(target.numel(), kernels.REDUCE_CONFIG.kwargs["THREADS"] * lanes)
    programs = _programs(target, tiles)
    partial = target.new_empty(programs, dtype=torch.float64)
    arguments, high = pixels.split(target.numel(), inputs.ignore_index)
    launch_kernel(
        kernels.weight_kernel,
        target,
        (programs,),
        *inputs.tensors,
        partial,
        *arguments,
        HIGH=high,
        C=len(inputs.class_levels),
        DOUBLE=inputs.arithmetic == torch.float64,
        LANES=lanes,
    )
    return partial


# ---- pixel_nll ------------------------------------------------------------------------------------------


def pixel_nll(inputs: Inputs) -> Tensor:
    """-log pi of each pixel, in the shape of the target. Its backward is reduce_backward."""
    logits, (target, weight, _) = inputs.logits, inputs.tensors
    nll = logits.new_empty(inputs.target.shape, dtype=inputs.arithmetic)
    if nll.numel() == 0:
        return nll
    image, tiles = _tiles(inputs)
    launch_kernel(
        kernels.pixel_nll_kernel if inputs.align_corners is None else upsample.upsampled_pixel_nll_kernel,
        logits,
        (logits.shape[0] * tiles,),
        logits,
        target,
        weight,
        nll,
        *image.arguments,
        C=len(inputs.class_levels),
        SMOOTHING=inputs.label_smoothing,
        **image.constants,
    )
    return nll


# ---- combine and its backward ---------------------------------------------------------------------------


class Combine(NamedTuple):
    """The arguments that combine and combine_backward share."""

    stats: Tensor
    divisor: Tensor | None
    lambdas: list[float]
    alpha: float
    reduction: str
    factor_normalization: str
    factor_scope: str

    @property
    def pooled(self) -> bool:
        return self.factor_scope == "batch"

    def launch(self, kernel: Any, read: list[Tensor | None], written: list[Tensor]) -> None:
        """Launches a kernel on the sums and the tensors ``read``."""
        stats, values = self.stats, self.lambdas
        each, one = None, values[0] if values else 0.0
        if len(set(values)) > 1:
            # Filled on the device: a copy from the host synchronises, and a CUDA graph cannot replay it.
            each, one = torch.cat([stats.new_full((1,), value) for value in values]), 0.0
        launch_kernel(
            kernel,
            stats,
            (1,),
            stats,
            self.divisor,
            *read,
            each,
            *written,
            stats.shape[0],
            *_bits(one),
            *_bits(self.alpha),
            G=stats.shape[1],
            REDUCTION=self.reduction,
            NORMALIZE=self.factor_normalization == "mean",
            POOL=self.pooled,
        )


def _bits(value: float) -> tuple[int, int]:
    """A double as two int32, since a kernel takes a float as float32."""
    return struct.unpack("<ii", struct.pack("<d", value))


def combine(problem: Combine, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The loss, (N,) or (), and the factors (N or 1, g-1)."""
    images, levels, _ = problem.stats.shape
    factors = problem.stats.new_empty((1 if problem.pooled else images, levels - 1))
    loss = problem.stats.new_empty((images,) if problem.reduction == "none" else (), dtype=dtype)
    problem.launch(combine_kernels.combine_kernel, [], [factors, loss])
    return loss, factors


def combine_backward(problem: Combine, grad_loss: Tensor) -> Tensor:
    grad_stats = torch.empty_like(problem.stats)
    if grad_stats.numel() > 0:  # the kernel writes to the row of its first image
        problem.launch(combine_kernels.combine_backward_kernel, [grad_loss.contiguous()], [grad_stats])
    return grad_stats
