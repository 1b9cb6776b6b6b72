"""The operators of the Triton kernels: those of csrc/library.cpp once more, as torch.ops.ial_triton.

Importing this module registers them and imports Triton; `_ops.operators` does so when they are first wanted.
`torch.library.triton_op` lets torch.compile see the kernels. Nothing waits for the device but the tuning of
gradient at its first call.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
import triton
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import Function, _SingleLevelFunction
from torch.library import triton_op, wrap_triton

from .. import _ops
from ..validation import MAX_SIDE
from . import combine as combine_kernels
from . import kernels, pixels, upsample

_LOGITS_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_TARGET_DTYPES = (torch.int64, torch.int32, torch.uint8)
_STATS = 5
#: What a kernel counts in 32 bits: programs, and tiles of a cell.
_MAX_COUNT = 2**31 - 1
_DOUBLE_BACKWARD = (
    'ial_cuda: double backward is not implemented; use backend="reference" where gradients of gradients '
    "are needed"
)
_JVP = "ial_cuda: forward-mode derivatives (jvp) are not implemented; backend='reference' has them"
# Programs of reduce for each multiprocessor: in rounds of equal size, whether it holds 1, 2 or 4 at a time.
_PROGRAMS = 4


# ---- checks: the messages are those of csrc/library.cpp -------------------------------------------------


def _dtype(tensor: Tensor) -> str:
    """The dtype as C++ prints it."""
    return tensor.type().rpartition(".")[2].removesuffix("Tensor")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


class _Inputs(NamedTuple):
    """The arguments that reduce and reduce_backward share."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    pixel_weight: Tensor | None
    class_levels: list[int]
    ignore_index: int
    align_corners: bool | None = None

    @property
    def levels(self) -> int:
        return max(self.class_levels) + 1

    def check(self) -> None:
        logits, count = self.logits, len(self.class_levels)
        if logits.dim() < 2:
            raise ValueError(f"logits has shape {_shape(logits)}, expected (N, C, *spatial)")
        if logits.dtype not in _LOGITS_DTYPES:
            raise TypeError(
                f"logits has dtype {_dtype(logits)}, expected float64, float32, float16 or bfloat16"
            )
        if count == 0 or logits.shape[1] != count:
            raise ValueError(
                f"logits has shape {_shape(logits)}, expected (N, C, *spatial) with C = {count} "
                "classes of the hierarchy"
            )
        for level in self.class_levels:
            if not 0 <= level < count:
                raise ValueError(f"class_levels has level {level}, expected 0 to {count - 1}")
        if self.align_corners is not None:
            self._check_upsampling()
        self._check_pixels("target", self.target)
        if self.target.dtype not in _TARGET_DTYPES:
            raise TypeError(f"target has dtype {_dtype(self.target)}, expected int64, int32 or uint8")
        if self.weight is not None:
            if self.weight.shape != (count,):
                raise ValueError(
                    f"weight has shape {_shape(self.weight)}, expected ({count},), one per class"
                )
            self._check_place("weight", self.weight)
            self._check_floating("weight", self.weight)
        if self.pixel_weight is not None:
            self._check_pixels("pixel_weight", self.pixel_weight)
            self._check_floating("pixel_weight", self.pixel_weight)

    def _check_upsampling(self) -> None:
        logits, target = self.logits, self.target
        if (
            logits.dim() != 4
            or target.dim() != 3
            or target.shape[0] != logits.shape[0]
            or 0 in logits.shape[2:] + target.shape[1:]
        ):
            raise ValueError(
                f"logits has shape {_shape(logits)} and target {_shape(target)}, expected (N, C, h, w) and "
                "(N, H, W), none of h, w, H and W 0, to upsample"
            )
        if max(logits.shape[2:] + target.shape[1:]) > MAX_SIDE:
            raise ValueError(
                f"logits has shape {_shape(logits)} and target {_shape(target)}, expected none of h, w, H "
                f"and W above {MAX_SIDE} to upsample"
            )

    def _check_pixels(self, name: str, tensor: Tensor) -> None:
        coarse = self.align_corners is None
        if tensor.shape != (self.logits.shape[:1] + self.logits.shape[2:] if coarse else self.target.shape):
            raise ValueError(
                f"{name} has shape {_shape(tensor)}, expected (N, *spatial) of logits {_shape(self.logits)}"
            )
        self._check_place(name, tensor)

    def _check_place(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self.logits.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {self.logits.device} as logits")

    def _check_floating(self, name: str, tensor: Tensor) -> None:
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {_dtype(tensor)}, expected a floating type")

    def check_grad_stats(self, grad_stats: Tensor) -> None:
        expected = (self.logits.shape[0], self.levels, _STATS)
        if (
            grad_stats.shape != expected
            or not grad_stats.is_contiguous()
            or grad_stats.dtype != torch.float64
            or grad_stats.device != self.logits.device
        ):
            raise ValueError(
                f"grad_stats has shape {_shape(grad_stats)} of {_dtype(grad_stats)} on {grad_stats.device}, "
                f"expected {expected} of Double, contiguous, on {self.logits.device}"
            )


_CHOICES = {
    "reduction": ("mean", "sum", "none"),
    "factor_normalization": ("mean", "sum"),
    "factor_scope": ("image", "batch"),
    "gradient": ("exact", "paper"),
}


def _check_choices(**options: str) -> None:
    for name, value in options.items():
        *most, last = map(repr, _CHOICES[name])
        if value not in _CHOICES[name]:
            raise ValueError(f"{name} is {value!r}, expected {', '.join(most)} or {last}")


def _check_stats(stats: Tensor, lambdas: list[float]) -> None:
    if (
        stats.dim() != 3
        or stats.shape[1] < 1
        or stats.shape[2] != _STATS
        or not stats.is_contiguous()
        or stats.dtype != torch.float64
    ):
        raise ValueError(
            f"stats has shape {_shape(stats)} of {_dtype(stats)}, expected (N, g, {_STATS}) of Double, "
            "contiguous"
        )
    if len(lambdas) != stats.shape[1] - 1:
        raise ValueError(
            f"lambdas has {len(lambdas)} values, expected {stats.shape[1] - 1} for {stats.shape[1]} levels"
        )


# ---- launches -------------------------------------------------------------------------------------------


def _launch(kernel: Any, like: Tensor, grid: Any, *arguments: Any, **constants: Any) -> None:
    """Runs a kernel on the device of ``like``. Those of the interpreter are not for tracing."""
    if not triton.knobs.runtime.interpret:
        kernel = wrap_triton(kernel)
    with torch.cuda.device_of(like):
        kernel[grid](*arguments, **constants)


class _Walk(NamedTuple):
    """How kernels walk along the pixels of an image, innermost dimension first."""

    sizes: tuple[int, ...]  # MOST_DIMS - 1 of them: the outermost one is not needed
    strides: list[tuple[int, ...]]  # of each tensor: batch, channel, and MOST_DIMS of pixels
    dims: int
    vector: bool  # whether runs of 16 bytes lie side by side, as Triton can know it
    lanes: int  # of a thread


def _walk(*tensors: Tensor) -> _Walk:
    """Tensors (N, C, *spatial). Dimensions that all traverse as one are merged: mostly one is left."""
    merged: list[list[int]] = []  # size, and the stride in each tensor
    for d in reversed(range(2, tensors[0].dim())):
        size, steps = tensors[0].shape[d], [tensor.stride(d) for tensor in tensors]
        if size == 1:
            continue
        if merged and steps == [merged[-1][0] * inner for inner in merged[-1][1:]]:
            merged[-1][0] *= size
        else:
            merged.append([size, *steps])
    most = kernels.MAX_DIMS
    if len(merged) > most:
        raise ValueError(
            f"logits has {len(merged)} spatial dimensions that cannot be merged, expected at most {most}; "
            "pass logits.contiguous()"
        )
    merged = merged or [[1] * (1 + len(tensors))]
    sizes, *strides = (tuple(values) for values in zip(*merged, strict=True))
    missing = most - len(merged)
    steps = [sizes[0], *(step for stride in strides for step in stride[1:])]
    steps += [tensor.stride(d) for tensor in tensors for d in (0, 1)]
    vector = all(stride[0] == 1 for stride in strides) and all(step % 16 == 0 for step in steps)
    vector = vector and len(merged) <= 2  # registers, again
    return _Walk(
        sizes=(sizes + (1,) * missing)[: most - 1],
        strides=[
            tensor.stride()[:2] + stride + (0,) * missing
            for tensor, stride in zip(tensors, strides, strict=True)
        ],
        dims=len(merged),
        vector=vector,
        lanes=16 // tensors[0].element_size() if vector else kernels.STRIDED_LANES,
    )


def _pixels(logits: Tensor) -> int:
    return math.prod(logits.shape[2:])


class _Axis(NamedTuple):
    """Axis of csrc/bilinear.h: pixel d is at (step d + origin) / unit on a line of coarse logits."""

    coarse: int
    fine: int
    step: int
    origin: int
    unit: int

    @property
    def span(self) -> int:
        """The most pixels of a cell."""
        return int(triton.cdiv(self.unit, self.step))


def _axis(coarse: int, fine: int, align_corners: bool) -> _Axis:
    if align_corners and coarse > 1:  # with one logit any position will do, but no step of 0
        return _Axis(coarse, fine, coarse - 1, 0, max(fine - 1, 1))
    return _Axis(coarse, fine, 2 * coarse, coarse - fine, 2 * fine)


class _Upsampling(NamedTuple):
    """How kernels walk along the pixels of cells."""

    arguments: tuple[int, ...]  # from `ignore_index` to `x_rounds`
    constants: dict[str, Any]
    cells: int  # of an image
    rounds: int


def _upsampling(inputs: _Inputs) -> _Upsampling:
    logits, size = inputs.logits, inputs.target.shape[1:]
    y, x = (
        _axis(coarse, fine, bool(inputs.align_corners))
        for coarse, fine in zip(logits.shape[2:], size, strict=True)
    )
    cells = (y.coarse + 1) * (x.coarse + 1)
    rows, columns = (
        min(triton.next_power_of_2(int(axis.span)), most)
        for axis, most in zip((y, x), upsample.MAX_PATCH[logits.dtype == torch.float64], strict=True)
    )
    x_rounds = triton.cdiv(x.span, columns)
    rounds = triton.cdiv(y.span, rows) * x_rounds
    if rounds > _MAX_COUNT:
        raise ValueError(
            f"target has {y.span} x {x.span} pixels between four logits, expected at most "
            f"{_MAX_COUNT * rows * columns}"
        )
    reach = max(2 * (axis.coarse + 1) * (axis.fine + 2 * axis.span) for axis in (y, x))
    low, high = pixels.split(inputs.ignore_index, *logits.stride())
    return _Upsampling(
        arguments=(*low, *y, *x, rounds, x_rounds),
        constants={"HIGH": high, "ROWS": rows, "COLUMNS": columns, "WIDE": max(reach, 2 * cells) >= 2**31},
        cells=cells,
        rounds=rounds,
    )


def _hierarchy(inputs: _Inputs) -> dict[str, Any]:
    """The constants by which a kernel knows its classes."""
    return {
        "C": len(inputs.class_levels),
        "G": inputs.levels,
        "LEVELS": pixels.pack_levels(inputs.class_levels),
        "BITS": pixels.level_bits(inputs.levels),
    }


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _bits(value: float) -> tuple[int, int]:
    """Of a double, as two int32: a kernel takes a float as float32."""
    return struct.unpack("<ii", struct.pack("<d", value))


def _lambdas(stats: Tensor, lambdas: list[float]) -> tuple[Tensor | None, tuple[int, int]]:
    """One for all as the bits of a kernel's argument; else in memory, filled on the device, since a copy from
    the host would wait, and no graph could replay it."""
    if len(set(lambdas)) <= 1:
        return None, _bits(lambdas[0] if lambdas else 0.0)
    return torch.cat([stats.new_full((1,), value) for value in lambdas]), _bits(0.0)


# ---- operators ------------------------------------------------------------------------------------------


@triton_op("ial_triton::reduce", mutates_args=())
def reduce(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pixel_weight: Tensor | None,
    class_levels: list[int],
    ignore_index: int,
    gradient: str,
    inplace: bool,
    align_corners: bool | None = None,
) -> Tensor:
    inputs = _Inputs(logits, target, weight, pixel_weight, class_levels, ignore_index, align_corners)
    inputs.check()
    _check_choices(gradient=gradient)
    images, levels = logits.shape[0], inputs.levels
    if logits.numel() == 0:
        return logits.new_zeros((images, levels, _STATS), dtype=torch.float64)
    partial = _partial_sums(inputs) if align_corners is None else _upsampled_partial_sums(inputs)
    stats = partial.new_empty((images, levels, _STATS))
    (rows,), high = pixels.split(stats.numel())
    grid = (triton.cdiv(stats.numel(), kernels.SUM_ROWS),)
    _launch(
        kernels.sum_kernel,
        logits,
        grid,
        partial,
        stats,
        rows,
        partial.shape[-1],
        HIGH=high,
        ROWS=kernels.SUM_ROWS,
        WIDTH=kernels.SUM_WIDTH,
    )
    return stats


def _partial_sums(inputs: _Inputs) -> Tensor:
    logits, size = inputs.logits, _pixels(inputs.logits)
    walk = _walk(logits)
    low, high = pixels.split(size, inputs.ignore_index, *walk.sizes, *walk.strides[0])
    partial = _partial(inputs, triton.cdiv(size, kernels.REDUCE_CONFIG.kwargs["THREADS"] * walk.lanes))
    images, *_, blocks = partial.shape
    groups = triton.cdiv(inputs.levels, pixels.REGISTER_LEVELS)
    _launch(
        kernels.reduce_kernel,
        logits,
        (images * blocks, groups),
        logits,
        inputs.target.contiguous(),
        _dense(inputs.weight),
        _dense(inputs.pixel_weight),
        partial,
        blocks,
        *low,
        **_hierarchy(inputs),
        HIGH=high,
        GROUP=triton.cdiv(inputs.levels, groups),
        DIMS=walk.dims,
        LANES=walk.lanes,
        VECTOR=walk.vector,
    )
    return partial


def _upsampled_partial_sums(inputs: _Inputs) -> Tensor:
    logits, walk = inputs.logits, _upsampling(inputs)
    threads = upsample.REDUCE_CONFIG.kwargs["THREADS"]
    partial = _partial(inputs, triton.cdiv(walk.cells, threads) * walk.rounds)
    images, *_, blocks = partial.shape
    groups = triton.cdiv(inputs.levels, pixels.REGISTER_LEVELS)
    _launch(
        upsample.upsampled_reduce_kernel,
        logits,
        (images * blocks, groups),
        logits,
        inputs.target.contiguous(),
        _dense(inputs.weight),
        _dense(inputs.pixel_weight),
        partial,
        blocks,
        *walk.arguments,
        **_hierarchy(inputs),
        GROUP=triton.cdiv(inputs.levels, groups),
        **walk.constants,
    )
    return partial


def _partial(inputs: _Inputs, tiles: int) -> Tensor:
    """Room for the sums of each program, (N, g, 5, programs of an image)."""
    images = inputs.logits.shape[0]
    blocks = min(tiles, triton.cdiv(_PROGRAMS * _multiprocessors(inputs.logits), images))
    return inputs.logits.new_empty((images, inputs.levels, _STATS, blocks), dtype=torch.float64)


def _multiprocessors(logits: Tensor) -> int:
    return torch.cuda.get_device_properties(logits.device).multi_processor_count if logits.is_cuda else 1


def _gradient_into(inputs: _Inputs, grad_stats: Tensor, gradient: str, grad: Tensor) -> None:
    inputs.check()
    inputs.check_grad_stats(grad_stats)
    _check_choices(gradient=gradient)
    if inputs.logits.numel() == 0:
        return
    if inputs.align_corners is not None:
        return _upsampled_gradient_into(inputs, grad_stats, gradient, grad)
    logits = inputs.logits
    walk = _walk(logits, grad)
    images, size = logits.shape[0], _pixels(logits)
    low, high = pixels.split(size, inputs.ignore_index, *walk.sizes, *walk.strides[0])
    grad_low, grad_high = pixels.split(*walk.strides[1])

    def grid(constants: dict[str, Any]) -> tuple[int]:
        return (images * triton.cdiv(size, constants["THREADS"] * constants["LANES"]),)

    _launch(
        kernels.reduce_backward_kernel,
        logits,
        grid,
        logits,
        grad_stats,
        inputs.target.contiguous(),
        _dense(inputs.weight),
        _dense(inputs.pixel_weight),
        grad,
        *low,
        *grad_low,
        **_hierarchy(inputs),
        HIGH=high,
        GRAD_HIGH=grad_high,
        EXACT=gradient == "exact",
        DIMS=walk.dims,
        LANES=walk.lanes,
        VECTOR=walk.vector,
    )


def _upsampled_gradient_into(inputs: _Inputs, grad_stats: Tensor, gradient: str, grad: Tensor) -> None:
    logits, walk = inputs.logits, _upsampling(inputs)
    images = logits.shape[0]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    halves = logits.new_empty((2, *logits.shape), dtype=dtype)

    def grid(constants: dict[str, Any]) -> tuple[int]:
        return (images * triton.cdiv(walk.cells - 1, constants["THREADS"] - 1),)

    _launch(
        upsample.upsampled_reduce_backward_kernel,
        logits,
        grid,
        logits,
        grad_stats,
        inputs.target.contiguous(),
        _dense(inputs.weight),
        _dense(inputs.pixel_weight),
        halves,
        images,
        *walk.arguments,
        **_hierarchy(inputs),
        EXACT=gradient == "exact",
        **walk.constants,
    )
    torch.add(halves[0], halves[1], out=grad)


@triton_op("ial_triton::reduce_backward", mutates_args=())
def reduce_backward(
    logits: Tensor,
    grad_stats: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pixel_weight: Tensor | None,
    class_levels: list[int],
    ignore_index: int,
    gradient: str,
    align_corners: bool | None = None,
) -> Tensor:
    grad = torch.empty_like(logits)
    inputs = _Inputs(logits, target, weight, pixel_weight, class_levels, ignore_index, align_corners)
    _gradient_into(inputs, grad_stats, gradient, grad)
    return grad


@triton_op("ial_triton::reduce_backward_", mutates_args={"logits"})
def reduce_backward_(
    logits: Tensor,
    grad_stats: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pixel_weight: Tensor | None,
    class_levels: list[int],
    ignore_index: int,
    gradient: str,
) -> None:
    if torch._debug_has_internal_overlap(logits) == 1:
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory "
            "location. Please clone() the tensor before performing the operation."
        )
    _gradient_into(
        _Inputs(logits, target, weight, pixel_weight, class_levels, ignore_index),
        grad_stats,
        gradient,
        logits,
    )


@triton_op("ial_triton::combine", mutates_args=())
def combine(
    stats: Tensor,
    lambdas: list[float],
    alpha: float,
    reduction: str,
    factor_normalization: str,
    factor_scope: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    _check_stats(stats, lambdas)
    _check_choices(reduction=reduction, factor_normalization=factor_normalization, factor_scope=factor_scope)
    images, levels, _ = stats.shape
    pool = factor_scope == "batch"
    factors = stats.new_empty((1 if pool else images, levels - 1))
    loss = stats.new_empty((images,) if reduction == "none" else (), dtype=dtype)
    each, one = _lambdas(stats, lambdas)
    _launch(
        combine_kernels.combine_kernel,
        stats,
        (1,),
        stats,
        each,
        factors,
        loss,
        images,
        *one,
        *_bits(alpha),
        G=levels,
        REDUCTION=reduction,
        NORMALIZE=factor_normalization == "mean",
        POOL=pool,
    )
    return loss, factors


@triton_op("ial_triton::combine_backward", mutates_args=())
def combine_backward(
    stats: Tensor,
    grad_loss: Tensor,
    lambdas: list[float],
    alpha: float,
    reduction: str,
    factor_normalization: str,
    factor_scope: str,
) -> Tensor:
    _check_stats(stats, lambdas)
    _check_choices(reduction=reduction, factor_normalization=factor_normalization, factor_scope=factor_scope)
    images, levels, _ = stats.shape
    values = images if reduction == "none" else 1
    if grad_loss.numel() != values:
        raise ValueError(
            f"grad_loss has shape {_shape(grad_loss)}, expected {values} value(s) for reduction={reduction!r}"
        )
    if grad_loss.device != stats.device:
        raise ValueError(f"grad_loss is on {grad_loss.device}, expected {stats.device} as stats")
    result = torch.empty_like(stats)
    each, one = _lambdas(stats, lambdas)
    _launch(
        combine_kernels.combine_backward_kernel,
        stats,
        (1,),
        stats,
        grad_loss.contiguous(),
        each,
        result,
        images,
        *one,
        *_bits(alpha),
        G=levels,
        REDUCTION=reduction,
        NORMALIZE=factor_normalization == "mean",
        POOL=factor_scope == "batch",
    )
    return result


# ---- autograd: the derivatives of reduce and combine are operators, too; theirs is not written ----


def _save_reduce(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.class_levels, ctx.ignore_index, ctx.gradient, ctx.inplace = inputs[:8]
    ctx.align_corners = inputs[8] if len(inputs) > 8 else None  # torch leaves a default out
    ctx.save_for_backward(*tensors)


def _backward_of_reduce(ctx: Any, grad_stats: Tensor) -> tuple[Tensor | None, ...]:
    logits, *rest = ctx.saved_tensors
    arguments = (logits, grad_stats.contiguous(), *rest, ctx.class_levels, ctx.ignore_index, ctx.gradient)
    # A gradient that is to be differentiated keeps its history, and so the logits.
    if ctx.inplace and not torch.is_grad_enabled():
        reduce_backward_(*arguments)
        grad = logits.detach()
    else:
        grad = reduce_backward(*arguments, ctx.align_corners)
    return grad, *[None] * (len(ctx.needs_input_grad) - 1)


def _save_combine(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    stats, *ctx.options, _ = inputs
    ctx.save_for_backward(stats)
    ctx.mark_non_differentiable(output[1])


def _backward_of_combine(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return combine_backward(*ctx.saved_tensors, grad_loss, *ctx.options), *[None] * 6


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _save_written(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_dirty(output)


def _no_double_backward(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError(_DOUBLE_BACKWARD)


def _no_jvp(ctx: Any, *tangents: Tensor | None) -> NoReturn:
    raise NotImplementedError(_JVP)


_library = torch.library.Library("ial_triton", "FRAGMENT")


def _register_autograd(op: Any, save: Callable[..., None], backward: Callable[..., Any]) -> None:
    """`op.register_autograd` that torch.func takes too. torch calls an Autograd kernel at each level of its
    transforms, where the autograd.Function that register_autograd makes raises, or leaves out the tangent.
    """

    def forward(*args: Any) -> Any:
        # Autograd switches gradients off here, and the levels below need them.
        with torch.enable_grad(), _set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
            result = op(*args)
        return args[0] if result is None else result

    members = {"forward": forward, "setup_context": save, "backward": backward, "jvp": _no_jvp}
    members["_compiled_autograd_key"] = Function._compiled_autograd_key
    function: Any = type(
        f"{op._name}_autograd", (_SingleLevelFunction,), {k: staticmethod(v) for k, v in members.items()}
    )
    schema = op._opoverload._schema
    weights = [(i, a.name) for i, a in enumerate(schema.arguments) if a.name in ("weight", "pixel_weight")]

    def apply(*args: Any) -> Any:
        for i, name in weights:
            if torch.is_grad_enabled() and args[i] is not None and args[i].requires_grad:
                raise ValueError(
                    f"{name} requires a gradient, expected a constant: only logits are differentiated"
                )
        with enable_single_level_autograd_function():
            result = function.apply(*args)
        return None if schema.is_mutable else result

    _library.impl(op._name, apply, "Autograd", allow_override=True)


_register_autograd(reduce, _save_reduce, _backward_of_reduce)
_register_autograd(combine, _save_combine, _backward_of_combine)
_register_autograd(reduce_backward, _save_nothing, _no_double_backward)
_register_autograd(reduce_backward_, _save_written, _no_double_backward)
_register_autograd(combine_backward, _save_nothing, _no_double_backward)

# Traced, kernels would run: on meta tensors, and in the interpreter.
_ops.register_fakes("ial_triton")
