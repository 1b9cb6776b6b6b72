"""The options of the loss: one frozen dataclass, validated when it is constructed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, SupportsFloat, SupportsIndex, TypeAlias, TypedDict, get_args

from typing_extensions import Unpack

from . import backends
from .arguments import as_bool, as_finite, as_float, as_label, check_choice, is_scalar
from .distributed import Group, Split, split_of
from .hierarchy import Hierarchy, HierarchyLike, resolve_ignore_index

Lambdas: TypeAlias = SupportsFloat | Iterable[SupportsFloat]
Reduction: TypeAlias = Literal["mean", "sum", "none"]
FactorNormalization: TypeAlias = Literal["mean", "sum"]
FactorScope: TypeAlias = Literal["image", "batch"]
Gradient: TypeAlias = Literal["exact", "paper"]
Upsample: TypeAlias = Literal["bilinear"]
Backend: TypeAlias = Literal["auto", "cuda", "triton", "cpu", "reference"]

REDUCTIONS = get_args(Reduction)
FACTOR_NORMALIZATIONS = get_args(FactorNormalization)
FACTOR_SCOPES = get_args(FactorScope)
GRADIENTS = get_args(Gradient)
UPSAMPLES = (None, *get_args(Upsample))


class OptionArguments(TypedDict, total=False):
    """The types that callers may pass as options, for type checkers."""

    alpha: SupportsFloat
    lambdas: Lambdas
    ignore_index: SupportsIndex | None
    reduction: Reduction
    factor_normalization: FactorNormalization
    factor_scope: FactorScope
    gradient: Gradient
    label_smoothing: SupportsFloat
    upsample: Upsample | None
    align_corners: bool
    backend: Backend
    inplace: bool
    grad_in_forward: bool
    process_group: Group | None
    spatial_group: Group | None


@dataclass(frozen=True)
class Options:
    """All options of `importance_aware_loss`, which documents them, converted to Python types.

    Raises:
        TypeError: an option has a wrong type.
        ValueError: an option has a value that is not allowed.
    """

    hierarchy: Hierarchy
    alpha: float = 1.0
    lambdas: float | tuple[float, ...] = 0.5
    ignore_index: int | None = None
    reduction: Reduction = "mean"
    factor_normalization: FactorNormalization = "mean"
    factor_scope: FactorScope = "image"
    gradient: Gradient = "exact"
    label_smoothing: float = 0.0
    upsample: Upsample | None = None
    align_corners: bool = False
    backend: Backend = "auto"
    inplace: bool = False
    grad_in_forward: bool = True
    return_components: bool = False
    process_group: Group | None = None
    spatial_group: Group | None = None

    if TYPE_CHECKING:

        def __init__(
            self,
            hierarchy: HierarchyLike,
            *,
            return_components: bool = ...,
            **options: Unpack[OptionArguments],
        ) -> None: ...

    def __post_init__(self) -> None:
        # This runs in each call of the function, so options that need no conversion are checked inline.
        put = object.__setattr__
        if not isinstance(self.hierarchy, Hierarchy):
            put(self, "hierarchy", Hierarchy.of(self.hierarchy))
        if type(self.alpha) is not float or not -math.inf < self.alpha < math.inf:
            put(self, "alpha", as_finite(self.alpha, "alpha"))
        if type(self.lambdas) is not float or not 0 <= self.lambdas < math.inf:
            put(self, "lambdas", _as_lambdas(self.lambdas, self.hierarchy.num_levels))
        if self.ignore_index is not None:
            put(self, "ignore_index", as_label(self.ignore_index, "ignore_index"))
        check_choice(self.reduction, "reduction", REDUCTIONS)
        check_choice(self.factor_normalization, "factor_normalization", FACTOR_NORMALIZATIONS)
        check_choice(self.factor_scope, "factor_scope", FACTOR_SCOPES)
        check_choice(self.gradient, "gradient", GRADIENTS)
        if type(self.label_smoothing) is not float or not 0 <= self.label_smoothing <= 1:
            put(self, "label_smoothing", _as_fraction(self.label_smoothing, "label_smoothing"))
        if self.upsample is not None:
            check_choice(self.upsample, "upsample", UPSAMPLES)
        if self.backend != "auto":
            check_choice(self.backend, "backend", ("auto", *backends.names()))
        if type(self.align_corners) is not bool:
            put(self, "align_corners", as_bool(self.align_corners, "align_corners"))
        if type(self.inplace) is not bool:
            put(self, "inplace", as_bool(self.inplace, "inplace"))
        if type(self.grad_in_forward) is not bool:
            put(self, "grad_in_forward", as_bool(self.grad_in_forward, "grad_in_forward"))
        if type(self.return_components) is not bool:
            put(self, "return_components", as_bool(self.return_components, "return_components"))
        if self.align_corners and self.upsample is None:
            raise ValueError("align_corners is True, expected False: upsample is None")
        if self.inplace and self.upsample is not None:
            raise ValueError(
                f"inplace is True, expected False: with upsample={self.upsample!r} a gradient depends on "
                "neighbouring logits"
            )
        if self.process_group is not None or self.spatial_group is not None:
            _ = self.split
        if self.spatial_group is not None and self.upsample is not None:
            raise ValueError(
                f"spatial_group is given, expected None: with upsample={self.upsample!r} a pixel depends on "
                "logits of other processes; interpolate the logits before, or split the images"
            )

    def __deepcopy__(self, memo: object) -> Options:
        """The same object, since it is immutable. A process group cannot be copied."""
        return self

    @property
    def split(self) -> Split:
        """How the input is split over processes."""
        return split_of(self.process_group, self.spatial_group)

    @property
    def factor_lambdas(self) -> tuple[float, ...]:
        """``lambdas`` as one number for each of the g - 1 factors."""
        values = self.lambdas
        return values if isinstance(values, tuple) else (values,) * (self.hierarchy.num_levels - 1)

    @property
    def void_label(self) -> int:
        """``ignore_index``, or its default for ``hierarchy``. Raises a ValueError if there is none."""
        if self.ignore_index is not None:
            return self.ignore_index
        return resolve_ignore_index(None, self.hierarchy.num_classes, self.hierarchy.ignore_index)

    @property
    def corners(self) -> bool | None:
        """The argument ``align_corners`` of the operators: None if the logits are not upsampled."""
        return None if self.upsample is None else self.align_corners

    @property
    def combine_arguments(self) -> tuple[tuple[float, ...], float, str, str, str]:
        """The options that combine and combine_backward take."""
        return (
            self.factor_lambdas,
            self.alpha,
            self.reduction,
            self.factor_normalization,
            self.factor_scope,
        )

    def changed(self) -> dict[str, object]:
        """The options that differ from their defaults."""
        values = vars(self)
        return {f.name: values[f.name] for f in fields(self)[1:] if values[f.name] != f.default}


def _as_fraction(value: object, argument: str) -> float:
    number = as_float(value, argument)
    if not 0 <= number <= 1:
        raise ValueError(f"{argument} is {value!r}, expected a number from 0 to 1")
    return number


def _as_lambdas(value: object, levels: int) -> float | tuple[float, ...]:
    if isinstance(value, Iterable) and not isinstance(value, str | bytes) and not is_scalar(value):
        numbers = tuple(as_float(number, f"lambdas[{t}]") for t, number in enumerate(value))
        if len(numbers) != levels - 1:
            raise ValueError(
                f"lambdas has {len(numbers)} values, expected one, or {levels - 1} for {levels} levels"
            )
        result: float | tuple[float, ...] = numbers
    else:
        result = as_float(value, "lambdas")
        numbers = (result,)
    for number in numbers:
        if not 0 <= number < math.inf:
            raise ValueError(f"lambdas is {value!r}, expected finite, non-negative numbers")
    return result
