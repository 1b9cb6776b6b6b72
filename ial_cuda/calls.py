"""What the functions share before they call operators: checks of the tensors, the backend, transforms."""

from __future__ import annotations

import functools
import os
from dataclasses import replace

import torch
from torch import Tensor

from . import backends
from .hierarchy import Hierarchy
from .options import Options
from .validation import (
    ClassWeights,
    check_inputs,
    check_logits,
    checked_target,
    class_weight,
    is_dtensor,
    validate_target,
)

#: A placeholder until the number of classes is known.
FLAT = Hierarchy.flat(1)


def of_classes(options: Options, classes: int) -> Options:
    """The options with one level of ``classes`` classes."""
    # A cache would keep process groups alive.
    make = _of_classes if torch.compiler.is_compiling() or options.split else _cached_of_classes
    return make(options, classes)


def _of_classes(options: Options, classes: int) -> Options:
    return replace(options, hierarchy=Hierarchy.flat(classes))


_cached_of_classes = functools.lru_cache(_of_classes)  # Dynamo warns about lru_cache


def prepare(
    logits: Tensor,
    target: Tensor,
    weight: ClassWeights | None,
    pixel_weight: Tensor | None,
    options: Options,
    name: str,
) -> tuple[backends.Backend, Tensor | None]:
    """Checks the tensors. Returns the backend and the class weights on the logits' device.

    ``name``: of the logits in errors.
    """
    check_plain(logits, name)
    weights = check_shapes(logits, target, weight, pixel_weight, options, name)
    return backends.choose(options.backend, logits.device), weights


def check_plain(logits: Tensor, name: str = "logits") -> None:
    """Raises a TypeError for a DTensor."""
    if is_dtensor(logits):
        raise TypeError(
            f"{name} is a DTensor, expected a plain tensor: only importance_aware_loss, cross_entropy and "
            "pixel_nll take DTensors"
        )


def check_shapes(
    logits: Tensor,
    target: Tensor,
    weight: ClassWeights | None,
    pixel_weight: Tensor | None,
    options: Options,
    name: str,
) -> Tensor | None:
    """Checks types, dtypes, shapes and devices. Returns the class weights on the logits' device."""
    classes = options.hierarchy.num_classes
    weights = class_values(weight, classes, logits, name)
    coarse = options.upsample is not None
    check_inputs(logits, target, weights, pixel_weight, classes, upsample=coarse, name=name)
    return weights


def class_values(
    values: ClassWeights | None, classes: int | None, logits: Tensor, logits_name: str, name: str = "weight"
) -> Tensor | None:
    """`class_weight`, with a list or an array moved to the logits' device. A tensor stays where it is."""
    checked = class_weight(values, classes, name)
    if checked is None or checked is values:
        return checked
    check_logits(logits, logits_name)
    return checked.to(logits.device)


def with_checked_labels(
    logits: Tensor, target: Tensor, backend: backends.Backend, options: Options
) -> Tensor:
    """``target``, after a check of its labels if the kernels have none or IAL_CUDA_DEBUG asks for it."""
    if is_debugging() if logits.is_cuda else backend.library is None:
        target = checked_target(target, options.hierarchy.num_classes, options.void_label)
    return target


def is_debugging() -> bool:
    """Whether checks that synchronise are requested."""
    return os.environ.get("IAL_CUDA_DEBUG") == "1"


def pixel_arguments(tensors: tuple[Tensor | None, ...], options: Options) -> tuple[object, ...]:
    """The arguments that reduce and loss_and_grad share."""
    levels = options.hierarchy.class_levels
    return (*tensors, levels, options.void_label, options.gradient, options.label_smoothing)


def is_transformed() -> bool:
    """Whether the operators are traced or transformed. Nothing is then written in place or computed early.

    torch.compile plans memory itself, a transform of torch.func needs results of its own level, and a trace
    must not contain a gradient.
    """
    return bool(
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def as_image(
    logits: Tensor, target: Tensor, pixel_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows (M, C) as the pixels of one image (1, C, M), without a copy."""
    weights = None if pixel_weight is None else pixel_weight.unsqueeze(0)
    return logits.t().unsqueeze(0), target.unsqueeze(0), weights


def raise_of_labels(target: Tensor, classes: int, options: Options) -> None:
    """Raises for bad labels on the CPU, with positions in the target as the caller passed it."""
    if target.device.type == "cpu" and not (is_dtensor(target) or torch.compiler.is_compiling()):
        validate_target(target, classes, options.void_label)
