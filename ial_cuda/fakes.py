"""The shapes and dtypes that the operators return, for torch.compile, meta tensors and fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Arguments that do not affect a shape have no name here. csrc/library.cpp has the full schemas.


def _reduce(
    logits: Tensor, target: Tensor, weight: Any, pixel_weight: Any, class_levels: list[int], *_: Any
) -> Tensor:
    return logits.new_empty((logits.shape[0], max(class_levels) + 1, 5), dtype=torch.float64)


def _like_first(tensor: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(tensor)


def _nothing(*_: Any) -> None:
    return None


def _combine(
    stats: Tensor,
    divisor: Any,
    lambdas: Any,
    alpha: Any,
    reduction: str,
    factor_normalization: Any,
    factor_scope: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    images, levels, _ = stats.shape
    loss = stats.new_empty((images,) if reduction == "none" else (), dtype=dtype)
    return loss, stats.new_empty((1 if factor_scope == "batch" else images, levels - 1))


def computes_in_one_pass(logits: Tensor, levels: int, expected: Tensor | None) -> bool:
    """Whether loss_and_grad returns the gradient after one pass: Inputs::one_pass of csrc/inputs.cpp."""
    return levels == 1 and logits.numel() > 0 and (logits.dtype != torch.float16 or expected is not None)


def _loss_and_grad(
    logits: Tensor,
    target: Tensor,
    weight: Any,
    pixel_weight: Any,
    class_levels: list[int],
    ignore_index: Any,
    gradient: Any,
    label_smoothing: Any,
    divisor: Any,
    lambdas: Any,
    alpha: Any,
    reduction: str,
    factor_normalization: Any,
    factor_scope: str,
    align_corners: bool | None = None,
    expected: Tensor | None = None,
    one_launch: bool = False,
) -> tuple[Tensor, ...]:
    stats = _reduce(logits, target, weight, pixel_weight, class_levels)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss, f = _combine(stats, divisor, lambdas, alpha, reduction, factor_normalization, factor_scope, dtype)
    # Whether several levels are computed in one launch is not known here.
    if not computes_in_one_pass(logits, stats.shape[1], expected):
        return loss, f, stats, stats.new_empty((0,)), logits.new_empty((0,)), stats.new_empty((0,))
    return loss, f, stats, torch.empty_like(stats), torch.empty_like(logits), stats.new_empty(())


def _pixel_nll(logits: Tensor, target: Tensor, *_: Any) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(target.shape, dtype=dtype)


_FAKES: dict[str, Callable[..., Any]] = {
    "reduce": _reduce,
    "reduce_backward": _like_first,
    "reduce_backward_": _nothing,
    "combine": _combine,
    "combine_backward": _like_first,
    "loss_and_grad": _loss_and_grad,
    "rescale_": _nothing,
    "pixel_nll": _pixel_nll,
    "pixel_nll_backward": _like_first,
}


def register_fakes(library: str) -> None:
    """Registers the fakes of the operators that the library has."""
    operators = getattr(torch.ops, library)
    for name, fake in _FAKES.items():
        if hasattr(operators, name):
            torch.library.register_fake(f"{library}::{name}", fake)
