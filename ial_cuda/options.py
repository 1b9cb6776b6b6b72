"""The options of the loss: what there are, and the one place where they are validated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, Literal, NamedTuple, SupportsFloat, TypeAlias, get_args

import numpy as np

from . import _ops
from .hierarchy import Hierarchy, as_label, resolve_ignore_index

Reduction: TypeAlias = Literal["mean", "sum", "none"]
FactorNormalization: TypeAlias = Literal["mean", "sum"]
FactorScope: TypeAlias = Literal["image", "batch"]
Gradient: TypeAlias = Literal["exact", "paper"]
Upsample: TypeAlias = Literal["bilinear"]
Backend: TypeAlias = Literal["auto", "cuda", "fused", "triton", "cpu", "reference"]

_REDUCTIONS = get_args(Reduction)
_FACTOR_NORMALIZATIONS = get_args(FactorNormalization)
_FACTOR_SCOPES = get_args(FactorScope)
_GRADIENTS = get_args(Gradient)
_UPSAMPLES = (None, *get_args(Upsample))


class Options(NamedTuple):
    """All options of `importance_aware_loss`, which explains them.

    A tuple, since each call of the function makes one: a frozen dataclass takes four times as long.
    """

    hierarchy: Hierarchy
    alpha: float = 1.0
    lambdas: float | tuple[float, ...] = 0.5
    ignore_index: int | None = None
    reduction: Reduction = "mean"
    factor_normalization: FactorNormalization = "mean"
    factor_scope: FactorScope = "image"
    gradient: Gradient = "exact"
    upsample: Upsample | None = None
    align_corners: bool = False
    backend: Backend = "auto"
    inplace: bool = False
    return_components: bool = False
    process_group: None = None

    def validated(self) -> Options:
        """These options, of whatever types a caller has given, with Python's numbers in place of NumPy's and
        of 0-d tensors.

        Raises:
            TypeError: an option of a wrong type.
            ValueError: a value that is not one of the option's.
            NotImplementedError: ``process_group``.
        """
        (
            hierarchy,
            alpha,
            lambdas,
            ignore_index,
            reduction,
            factor_normalization,
            factor_scope,
            gradient,
            upsample,
            align_corners,
            backend,
            inplace,
            return_components,
            process_group,
        ) = self
        # What is right already must cost next to nothing.
        changed: dict[str, Any] = {}
        if not isinstance(hierarchy, Hierarchy):
            changed["hierarchy"] = hierarchy = Hierarchy.of(hierarchy)
        if type(alpha) is not float or not -math.inf < alpha < math.inf:
            changed["alpha"] = _as_finite(alpha, "alpha")
        if type(lambdas) is not float or not 0 <= lambdas < math.inf:
            changed["lambdas"] = _as_lambdas(lambdas, hierarchy.num_levels)
        if ignore_index is not None:
            changed["ignore_index"] = as_label(ignore_index, "ignore_index")
        _check_choice("reduction", reduction, _REDUCTIONS)
        _check_choice("factor_normalization", factor_normalization, _FACTOR_NORMALIZATIONS)
        _check_choice("factor_scope", factor_scope, _FACTOR_SCOPES)
        _check_choice("gradient", gradient, _GRADIENTS)
        if upsample is not None:
            _check_choice("upsample", upsample, _UPSAMPLES)
        if backend != "auto":
            _check_choice("backend", backend, ("auto", *_ops.unavailable))
        if type(align_corners) is not bool:
            changed["align_corners"] = align_corners = _as_bool(align_corners, "align_corners")
        if type(inplace) is not bool:
            changed["inplace"] = inplace = _as_bool(inplace, "inplace")
        if type(return_components) is not bool:
            changed["return_components"] = _as_bool(return_components, "return_components")
        if align_corners and upsample is None:
            raise ValueError("align_corners is True, expected False: upsample is None")
        if inplace and upsample is not None:
            raise ValueError(
                f"inplace is True, expected False: with upsample={upsample!r} gradients depend on logits "
                "nearby"
            )
        if process_group is not None:
            raise NotImplementedError(
                f"process_group is a {type(process_group).__name__}, expected None: sums over processes are "
                "not in this version"
            )
        return self._replace(**changed) if changed else self

    @property
    def factor_lambdas(self) -> tuple[float, ...]:
        """``lambdas``, one for each of the g - 1 factors."""
        values = self.lambdas
        return values if isinstance(values, tuple) else (values,) * (self.hierarchy.num_levels - 1)

    @property
    def void_label(self) -> int:
        """``ignore_index``, or what None means for ``hierarchy``: a ValueError where that is nothing."""
        if self.ignore_index is not None:
            return self.ignore_index
        return resolve_ignore_index(None, self.hierarchy.num_classes, self.hierarchy.ignore_index)

    def changed(self) -> dict[str, object]:
        """The options that are not their defaults."""
        defaults = self._field_defaults
        return {
            name: value
            for name, value in self._asdict().items()
            if name in defaults and value != defaults[name]
        }


def as_number(value: Any, argument: str) -> float:
    """``value`` as a Python float; errors name ``argument`` if it is a boolean, no number, or no constant."""
    if type(value) is float:  # or what a compiler has in its place, of which nothing else may be asked
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _as_float(value, argument)
    number = value
    if getattr(value, "requires_grad", False):
        raise ValueError(
            f"{argument} requires a gradient, expected a constant: only logits are differentiated"
        )
    if _is_scalar(value):
        if getattr(value, "is_meta", False):
            raise TypeError(f"{argument} is a meta tensor, expected a number")
        number = value.item()
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{argument} is {value!r} ({type(value).__name__}), expected a number")
    return _as_float(number, argument)


def _as_float(number: SupportsFloat, argument: str) -> float:
    try:
        return float(number)
    except OverflowError:  # of an integer
        raise ValueError(f"{argument} is {number!r}, expected a finite number") from None


def _is_scalar(value: Any) -> bool:
    """Whether it is a number of NumPy, or a 0-d tensor or array."""
    return getattr(value, "shape", None) == ()


def _as_finite(value: object, argument: str) -> float:
    number = as_number(value, argument)
    if not -math.inf < number < math.inf:
        raise ValueError(f"{argument} is {value!r}, expected a finite number")
    return number


def _as_lambdas(value: object, levels: int) -> float | tuple[float, ...]:
    if isinstance(value, Iterable) and not isinstance(value, str | bytes) and not _is_scalar(value):
        numbers = tuple(as_number(number, f"lambdas[{t}]") for t, number in enumerate(value))
        if len(numbers) != levels - 1:
            raise ValueError(
                f"lambdas has {len(numbers)} values, expected one, or {levels - 1} for {levels} levels"
            )
        result: float | tuple[float, ...] = numbers
    else:
        result = as_number(value, "lambdas")
        numbers = (result,)
    for number in numbers:
        if not 0 <= number < math.inf:
            raise ValueError(f"lambdas is {value!r}, expected finite numbers from 0")
    return result


def _as_bool(value: object, argument: str) -> bool:
    if isinstance(value, np.bool_):
        return bool(value)
    raise TypeError(f"{argument} is {value!r} ({type(value).__name__}), expected a bool")


def _check_choice(argument: str, value: object, choices: tuple[str | None, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{argument} is {value!r}, expected one of {', '.join(map(repr, choices))}")


#: `Options` of arguments whose types nobody has looked at, for `validated`.
unchecked: Callable[..., Options] = Options
