"""The operators of the Triton kernels: those of csrc/library.cpp, under torch.ops.ial_triton.

`torch.library.triton_op` lets torch.compile see the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op

from ..arguments import check_choice
from ..fakes import register_fakes
from ..options import FACTOR_NORMALIZATIONS, FACTOR_SCOPES, GRADIENTS, REDUCTIONS
from ..validation import check_inputs, class_weight
from . import launch
from .launch import STATS, Combine, Inputs

# ---- checks ---------------------------------------------------------------------------------------------


def _check(inputs: Inputs, gradient: str) -> None:
    logits, classes = inputs.logits, len(inputs.class_levels)
    class_weight(inputs.weight, classes)
    upsample = inputs.align_corners is not None
    check_inputs(logits, inputs.target, inputs.weight, inputs.pixel_weight, classes, upsample=upsample)
    if not inputs.class_levels:
        raise ValueError("class_levels is [], expected a level for each class")
    for level in inputs.class_levels:
        if not 0 <= level < classes:
            raise ValueError(f"class_levels has level {level}, expected 0 to {classes - 1}")
    check_choice(gradient, "gradient", GRADIENTS)


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
    inplace: bool,
    align_corners: bool | None = None,
) -> Tensor:
    inputs = Inputs(logits, target, weight, pixel_weight, class_levels, ignore_index, align_corners)
    _check(inputs, gradient)
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
    align_corners: bool | None = None,
) -> Tensor:
    grad = torch.empty_like(logits)
    inputs = Inputs(logits, target, weight, pixel_weight, class_levels, ignore_index, align_corners)
    _reduce_backward(inputs, grad_stats, gradient, grad)
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
    inputs = Inputs(logits, target, weight, pixel_weight, class_levels, ignore_index)
    _reduce_backward(inputs, grad_stats, gradient, logits)


def _reduce_backward(inputs: Inputs, grad_stats: Tensor, gradient: str, grad: Tensor) -> None:
    _check(inputs, gradient)
    shape = (inputs.logits.shape[0], inputs.levels, STATS)
    _check_stats("grad_stats", grad_stats, shape, inputs.logits.device)
    launch.reduce_backward(inputs, grad_stats, gradient, grad)


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
    problem = Combine(stats, lambdas, alpha, reduction, factor_normalization, factor_scope)
    _check_combine(problem)
    return launch.combine(problem, dtype)


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
    problem = Combine(stats, lambdas, alpha, reduction, factor_normalization, factor_scope)
    _check_combine(problem)
    values = stats.shape[0] if reduction == "none" else 1
    if grad_loss.numel() != values:
        raise ValueError(
            f"grad_loss has shape {tuple(grad_loss.shape)}, expected {values} value(s) for "
            f"reduction={reduction!r}"
        )
    if grad_loss.device != stats.device:
        raise ValueError(f"grad_loss is on {grad_loss.device}, expected {stats.device} like stats")
    return launch.combine_backward(problem, grad_loss)


# Traced, a kernel would run: on meta tensors, and in the interpreter.
register_fakes("ial_triton")
