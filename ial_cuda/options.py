"""The options of the loss: what there are, and the one place where they are validated."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any, Literal, NamedTuple, TypeAlias, TypeGuard, get_args

import numpy as np

from . import _ops
from .hierarchy import Hierarchy, as_label, resolve_ignore_index

Reduction: TypeAlias = Literal["mean", "sum", "none"]
FactorNormalization: TypeAlias = Literal["mean", "sum"]
FactorScope: TypeAlias = Literal["image", "batch"]
Gradient: TypeAlias = Literal["exact", "paper"]
Upsample: TypeAlias = Literal["bilinear"]
Backend: TypeAlias = Literal["auto", "cuda", "fused", "triton", "cpu", "reference"]

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "reduction": get_args(Reduction),
    "factor_normalization": get_args(FactorNormalization),
    "factor_scope": get_args(FactorScope),
    "gradient": get_args(Gradient),
    "upsample": (None, *get_args(Upsample)),
}


class Options(NamedTuple):
    """All options of `importance_aware_loss`, which explains them, as `Options.of` has validated them.

    A tuple, since each call of the function makes one: a frozen dataclass takes three times as long.
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

    @classmethod
    def of(cls, **given: Any) -> Options:
        """The options that a caller has given, validated. Numbers of NumPy and 0-d tensors become Python's.

        Raises:
            TypeError: an option of a wrong type.
            ValueError: a value that is not one of the option's.
            NotImplementedError: ``process_group``.
        """
        options = cls(**given)
        # What is right already must cost next to nothing.
        changed: dict[str, Any] = {}
        if not isinstance(options.hierarchy, Hierarchy):
            changed["hierarchy"] = Hierarchy.of(options.hierarchy)
        if type(options.alpha) is not float or not -math.inf < options.alpha < math.inf:
            changed["alpha"] = _as_finite(options.alpha, "alpha")
        if type(options.lambdas) is not float:
            changed["lambdas"] = _as_lambdas(options.lambdas)
        if options.ignore_index is not None:
            changed["ignore_index"] = as_label(options.ignore_index, "ignore_index")
        for name, choices in _CHOICES.items():
            value = getattr(options, name)
            if type(value) is not str or value not in choices:
                _check_choice(name, value, choices)
        if options.backend != "auto":
            _check_choice("backend", options.backend, ("auto", *_ops.unavailable))
        for name in ("align_corners", "inplace", "return_components"):
            value = getattr(options, name)
            if type(value) is not bool:
                changed[name] = _as_bool(value, name)
        if options.process_group is not None:
            raise NotImplementedError(
                f"process_group is a {type(options.process_group).__name__}, expected None: sums over "
                "processes are not in this version"
            )
        if changed:
            options = options._replace(**changed)
        if options.upsample is None and options.align_corners:
            raise ValueError("align_corners is True, expected False: upsample is None")
        if options.upsample is not None and options.inplace:
            raise ValueError(
                f"inplace is True, expected False: with upsample={options.upsample!r} gradients depend on "
                "logits nearby"
            )
        options._check_lambdas()
        _ = options.void_label  # raises where it is not known
        return options

    def _check_lambdas(self) -> None:
        values, factors = self.lambdas, self.hierarchy.num_levels - 1
        if isinstance(values, float):
            values = (values,)
        elif len(values) != factors:
            raise ValueError(
                f"lambdas has {len(values)} values, expected one, or {factors} for {factors + 1} levels"
            )
        for value in values:
            if not 0 <= value < math.inf:
                raise ValueError(f"lambdas is {self.lambdas!r}, expected finite numbers from 0")

    @property
    def factor_lambdas(self) -> tuple[float, ...]:
        """``lambdas``, one for each of the g - 1 factors."""
        values = self.lambdas
        return values if isinstance(values, tuple) else (values,) * (self.hierarchy.num_levels - 1)

    @property
    def void_label(self) -> int:
        """``ignore_index``, or what None means for ``hierarchy``."""
        return resolve_ignore_index(
            self.ignore_index, self.hierarchy.num_classes, self.hierarchy.ignore_index
        )

    def changed(self) -> dict[str, object]:
        """The options that are not their defaults."""
        defaults = self._field_defaults
        return {
            name: value
            for name, value in self._asdict().items()
            if name in defaults and value != defaults[name]
        }


def as_number(value: object, argument: str) -> float:
    """``value`` as a Python float; errors name ``argument`` if it is a boolean, no number, or no constant."""
    number = value
    if getattr(value, "requires_grad", False):
        raise ValueError(
            f"{argument} requires a gradient, expected a constant: only logits are differentiated"
        )
    if _is_scalar(value):
        number = value.item()
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{argument} is {value!r} ({type(value).__name__}), expected a number")
    try:
        return float(number)
    except OverflowError:  # of an integer
        raise ValueError(f"{argument} is {value!r}, expected a finite number") from None


def _is_scalar(value: object) -> TypeGuard[Any]:
    """Whether it is a number of NumPy, or a 0-d tensor or array."""
    return getattr(value, "shape", None) == ()


def _as_finite(value: object, argument: str) -> float:
    number = as_number(value, argument)
    if not -math.inf < number < math.inf:
        raise ValueError(f"{argument} is {value!r}, expected a finite number")
    return number


def _as_lambdas(value: object) -> float | tuple[float, ...]:
    if isinstance(value, str | bytes) or _is_scalar(value) or not isinstance(value, Iterable):
        return as_number(value, "lambdas")
    return tuple(as_number(number, f"lambdas[{t}]") for t, number in enumerate(value))


def _as_bool(value: object, argument: str) -> bool:
    if isinstance(value, np.bool_):
        return bool(value)
    raise TypeError(f"{argument} is {value!r} ({type(value).__name__}), expected a bool")


def _check_choice(argument: str, value: object, choices: tuple[str | None, ...]) -> None:
    if not isinstance(value, str | None) or value not in choices:
        raise ValueError(f"{argument} is {value!r}, expected one of {', '.join(map(repr, choices))}")
