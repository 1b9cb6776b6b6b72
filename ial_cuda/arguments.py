"""Converts arguments that are not tensors. Every error has the argument, its value and what was expected."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection
from numbers import Real
from typing import Any, SupportsFloat

import numpy as np
import torch


def as_int(value: object, argument: str) -> int:
    """``value`` as a Python int. Raises a TypeError for booleans and for what is not an integer."""
    boolean = isinstance(value, bool) or (isinstance(value, torch.Tensor) and value.dtype == torch.bool)
    if not boolean:
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise TypeError(f"{argument} is {value!r} ({type(value).__name__}), expected an integer")


def as_label(value: object, argument: str) -> int:
    """``value`` as a Python int in the range of int64."""
    label = as_int(value, argument)
    if not -(2**63) <= label < 2**63:
        raise ValueError(f"{argument} is {label}, expected a 64-bit integer")
    return label


def as_bool(value: object, argument: str) -> bool:
    """``value`` as a Python bool."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise TypeError(f"{argument} is {value!r} ({type(value).__name__}), expected a bool")


def as_float(value: Any, argument: str) -> float:
    """``value`` as a Python float. Raises for booleans and for tensors that require a gradient."""
    if type(value) is float:
        return value
    number = value
    if not isinstance(value, int | float):  # torch.compile's symbolic numbers are, and have no attributes
        if getattr(value, "requires_grad", False):
            raise ValueError(
                f"{argument} requires a gradient, expected a constant: only logits are differentiated"
            )
        if is_scalar(value):
            if getattr(value, "is_meta", False):
                raise TypeError(f"{argument} is a meta tensor, expected a number")
            number = value.item()
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{argument} is {value!r} ({type(value).__name__}), expected a number")
    try:
        return float(number)
    except OverflowError:  # an integer too large for a float
        raise ValueError(f"{argument} is {value!r}, expected a finite number") from None


def as_finite(value: SupportsFloat, argument: str) -> float:
    """``value`` as a finite Python float."""
    number = as_float(value, argument)
    if not -math.inf < number < math.inf:
        raise ValueError(f"{argument} is {value!r}, expected a finite number")
    return number


def is_scalar(value: Any) -> bool:
    """Whether ``value`` is a NumPy number, a 0-d tensor or a 0-d array."""
    return getattr(value, "shape", None) == ()


def check_choice(value: object, argument: str, choices: Collection[str | None]) -> None:
    """Raises a ValueError if ``value`` is not one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{argument} is {value!r}, expected one of {', '.join(map(repr, choices))}")
