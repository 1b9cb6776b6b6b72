"""The Triton operators: those of csrc/library.cpp, under torch.ops.ial_triton.

`torch.library.triton_op` makes the kernels visible to torch.compile.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op

from ..arguments import check_choice
from ..fakes import computes_in_one_pass, register_fakes
from ..options import FACTOR_NORMALIZATIONS, FACTOR_SCOPES, GRADIENTS, REDUCTIONS
from ..validation import check_inputs, class_weight
from . import launch
from .launch import STATS, Combine, Inputs

# ---- checks ---------------------------------------------------------------------------------------------


def _check(inputs: Inputs) -> None:
    logits, classes = inputs.logits, len(inputs.class_levels)
    class_weight(inputs.weight, classes)
    upsample = inputs.align_corners is not None
    check_inputs(logits, inputs.target, inputs.weight, inputs.pixel_weight, classes, upsample=upsample)
    if not inputs.class_levels:
        raise ValueError("class_levels is [], expected a level for each class")
    for level in inputs.class_levels:
        if not 0 <= level < classes:
            raise ValueError(f"class_levels has level {level}, expected 0 to {classes - 1}")
    check_choice(inputs.gradient, "gradient", GRADIENTS)
    if not 0 <= inputs.label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {inputs.label_smoothing}, expected 0 to 1")


def _check_grad(grad: Tensor, logits: Tensor) -> None:
    if grad.shape != logits.shape or grad.dtype != logits.dtype or grad.device != logits.device:
        raise ValueError(
            f"grad has shape {tuple(grad.shape)} of {grad.dtype} on {grad.device}, expected "
            f"{tuple(logits.shape)} of {logits.dtype} on {logits.device} like logits"
        )
    _check_no_overlap(grad)


def _check_no_overlap(written: Tensor) -> None:
    if torch._debug_has_internal_overlap(written) == 1:
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory "
            "location. Please clone() the tensor before performing the operation."
        )


def _check_grad_nll(grad_nll: Tensor, target: Tensor, device: torch.device) -> None:
    if grad_nll.shape != target.shape or not grad_nll.is_floating_point() or grad_nll.device != device:
        raise ValueError(
            f"grad_nll has shape {tuple(grad_nll.shape)} of {grad_nll.dtype} on {grad_nll.device}, expected "
            f"{tuple(target.shape)} of a floating type on {device} like logits"
        )


def _check_doubles(name: str, tensor: Tensor | None, count: int, device: torch.device) -> None:
    if tensor is not None and (
        tensor.numel() != count
        or not tensor.is_contiguous()
        or tensor.dtype != torch.float64
        or tensor.device != device
    ):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}, expected {count} "
            f"value(s) of torch.float64, contiguous, on {device}"
        )


def _check_grad_loss(grad_loss: Tensor, values: int, device: torch.device) -> None:
    if grad_loss.numel() != values:
        raise ValueError(f"grad_loss has shape {tuple(grad_loss.shape)}, expected {values} value(s)")
    if grad_loss.device != device:
        raise ValueError(f"grad_loss is on {grad_loss.device}, expected {device} like stats")


def _check_stats(name: str, stats: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if (
        stats.shape != shape
        or not stats.is_contiguous()
        or stats.dtype != torch.float64
        or stats.device != device
    ):
        raise ValueError(
            f"{name} has shape {tuple(stats.shape)} of {stats.dtype} on {stats.device}, expected {shape} of "
            f"torch.float64, contiguous, on {device}"
        )


def _check_combine(problem: Combine) -> None:
    stats, levels = problem.stats, len(problem.lambdas) + 1
    if stats.dim() == 3 and stats.shape[1] not in (0, levels):
        raise ValueError(
            f"lambdas has {levels - 1} values, expected {stats.shape[1] - 1} for {stats.shape[1]} levels"
        )
    _check_stats("stats", stats, (*stats.shape[:1], levels, STATS), stats.device)
    _check_doubles("divisor", problem.divisor, 1, stats.device)
    check_choice(problem.reduction, "reduction", REDUCTIONS)
    check_choice(problem.factor_normalization, "factor_normalization", FACTOR_NORMALIZATIONS)
    check_choice(problem.factor_scope, "factor_scope", FACTOR_SCOPES)


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
    label_smoothing: float,
    inplace: bool,
    align_corners: bool | None = None,
) -> Tensor:
    pixels = (target, weight, pixel_weight, class_levels, ignore_index, gradient, label_smoothing)
    inputs = Inputs(logits, *pixels, align_corners)
    _check(inputs)
    return launch.reduce(inputs)


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
    label_smoothing: float,
    align_corners: bool | None = None,
) -> Tensor:
    pixels = (target, weight, pixel_weight, class_levels, ignore_index, gradient, label_smoothing)
    grad = torch.empty_like(logits)
    _reduce_backward(Inputs(logits, *pixels, align_corners), grad_stats, grad)
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
    label_smoothing: float,
) -> None:
    pixels = (target, weight, pixel_weight, class_levels, ignore_index, gradient, label_smoothing)
    _check_no_overlap(logits)
    _reduce_backward(Inputs(logits, *pixels), grad_stats, logits)


@triton_op("ial_triton::rescale_", mutates_args={"grad", "expected"})
def rescale_(
    grad: Tensor,
    grad_loss: Tensor,
    computed_for: Tensor,
    logits: Tensor,
    grad_stats: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pixel_weight: Tensor | None,
    class_levels: list[int],
    ignore_index: int,
    gradient: str,
    label_smoothing: float,
    align_corners: bool | None = None,
    expected: Tensor | None = None,
) -> None:
    pixels = (target, weight, pixel_weight, class_levels, ignore_index, gradient, label_smoothing)
    _check_grad(grad, logits)
    _check_grad_loss(grad_loss, 1, logits.device)
    _check_doubles("computed_for", computed_for, 1, logits.device)
    _check_doubles("expected", expected, 2, logits.device)
    incoming = launch.Incoming(grad_loss, computed_for, expected)
    _reduce_backward(Inputs(logits, *pixels, align_corners), grad_stats, grad, incoming)


def _reduce_backward(
    inputs: Inputs, grad_stats: Tensor, grad: Tensor, incoming: launch.Incoming | None = None
) -> None:
    _check(inputs)
    shape = (inputs.logits.shape[0], inputs.levels, STATS)
    _check_stats("grad_stats", grad_stats, shape, inputs.logits.device)
    launch.reduce_backward(inputs, grad_stats, grad, incoming)


@triton_op("ial_triton::combine", mutates_args=())
def combine(
    stats: Tensor,
    divisor: Tensor | None,
    lambdas: list[float],
    alpha: float,
    reduction: str,
    factor_normalization: str,
    factor_scope: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    problem = Combine(stats, divisor, lambdas, alpha, reduction, factor_normalization, factor_scope)
    _check_combine(problem)
    return launch.combine(problem, dtype)


@triton_op("ial_triton::combine_backward", mutates_args=())
def combine_backward(
    stats: Tensor,
    grad_loss: Tensor,
    divisor: Tensor | None,
    lambdas: list[float],
    alpha: float,
    reduction: str,
    factor_normalization: str,
    factor_scope: str,
) -> Tensor:
    problem = Combine(stats, divisor, lambdas, alpha, reduction, factor_normalization, factor_scope)
    _check_combine(problem)
    _check_grad_loss(grad_loss, stats.shape[0] if reduction == "none" else 1, stats.device)
    return launch.combine_backward(problem, grad_loss)


@triton_op("ial_triton::loss_and_grad", mutates_args=())
def loss_and_grad(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pixel_weight: Tensor | None,
    class_levels: list[int],
    ignore_index: int,
    gradient: str,
    label_smoothing: float,
    divisor: Tensor | None,
    lambdas: list[float],
    alpha: float,
    reduction: str,
    factor_normalization: str,
    factor_scope: str,
    align_corners: bool | None = None,
    expected: Tensor | None = None,
    one_launch: bool = False,  # for backends with cooperative launches
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    pixels = (target, weight, pixel_weight, class_levels, ignore_index, gradient, label_smoothing)
    inputs = Inputs(logits, *pixels, align_corners)
    _check(inputs)
    _check_doubles("expected", expected, 2, logits.device)
    if reduction == "none":
        raise ValueError("reduction is 'none', expected 'mean' or 'sum'")
    options = (lambdas, alpha, reduction, factor_normalization, factor_scope)
    if computes_in_one_pass(logits, inputs.levels, expected):
        _check_doubles("divisor", divisor, 1, logits.device)
        stats, divisor, grad_stats, grad, computed_for = launch.one_pass(inputs, divisor, reduction, expected)
        problem = Combine(stats, divisor, *options)
        _check_combine(problem)
        loss, factors = launch.combine(problem, inputs.arithmetic)
    else:
        problem = Combine(launch.reduce(inputs), divisor, *options)
        _check_combine(problem)
        loss, factors = launch.combine(problem, inputs.arithmetic)
        # The backward pass computes the gradient: computing it here would save no pass over the logits.
        grad = logits.new_empty((0,))
        grad_stats, computed_for = (problem.stats.new_empty((0,)) for _ in range(2))
    return loss, factors, problem.stats, grad_stats, grad, computed_for


@triton_op("ial_triton::pixel_nll", mutates_args=())
def pixel_nll(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool | None = None,
) -> Tensor:
    return launch.pixel_nll(_nll_inputs(logits, target, weight, ignore_index, label_smoothing, align_corners))


@triton_op("ial_triton::pixel_nll_backward", mutates_args=())
def pixel_nll_backward(
    logits: Tensor,
    grad_nll: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool | None = None,
) -> Tensor:
    inputs = _nll_inputs(logits, target, weight, ignore_index, label_smoothing, align_corners)
    _check_grad_nll(grad_nll, target, logits.device)
    grad = torch.empty_like(logits)
    launch.reduce_backward(inputs._replace(pixel_weight=grad_nll), None, grad)
    return grad


def _nll_inputs(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool | None,
) -> Inputs:
    """The checked arguments, as those of one level. In the backward pass grad_nll is the pixel_weight."""
    class_levels = [0] * (logits.shape[1] if logits.dim() >= 2 else 0)
    pixels = (target, weight, None, class_levels, ignore_index, "exact", label_smoothing)
    inputs = Inputs(logits, *pixels, align_corners)
    _check(inputs)
    return inputs


# Without fakes, tracing would run the kernels: on meta tensors, or in the interpreter.
register_fakes("ial_triton")
