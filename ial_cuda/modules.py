"""The losses as nn.Modules. Their options are attributes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Generic, NoReturn, SupportsFloat, SupportsIndex, TypeVar, overload

from torch import Tensor, nn
from typing_extensions import Self

from . import functional
from .arguments import as_label
from .functional import FLAT, Components, ExpectedGradient
from .hierarchy import Hierarchy, HierarchyLike
from .options import (
    Backend,
    FactorNormalization,
    FactorScope,
    Gradient,
    Lambdas,
    Options,
    Reduction,
    Upsample,
)
from .validation import ClassWeights, Divisor, class_weight

Held = TypeVar("Held")
Given = TypeVar("Given")


class _Option(Generic[Held, Given]):
    """An attribute of the module that is read from its options, and validated with them when it is set."""

    def __init__(self, doc: str, field: str | None = None) -> None:
        self.__doc__ = doc
        self.field = field

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, module: None, owner: type) -> _Option[Held, Given]: ...
    @overload
    def __get__(self, module: Loss, owner: type) -> Held: ...
    def __get__(self, module: Loss | None, owner: type) -> _Option[Held, Given] | Held:
        if module is None:
            return self
        held: Held = getattr(module.options, self.field or self.name)
        return held

    def __set__(self, module: Loss, value: Given) -> None:
        changed: dict[str, Any] = {self.name: value}
        options = replace(module.options, **changed)
        module._fitting(module.weight, options)
        module.options = options


class Loss(nn.Module):
    """What the modules share: validated options, and class weights that casts leave as they are."""

    options: Options
    weight: Tensor | None

    def __init__(self, weight: ClassWeights | None, options: Options) -> None:
        super().__init__()
        self.options = options
        self.expected = ExpectedGradient()
        self.register_buffer("weight", self._fitting(weight, options))

    ignore_index = _Option[int, "SupportsIndex | None"]("The label of void pixels.", field="void_label")
    reduction = _Option[Reduction, Reduction]("mean, sum or none.")
    label_smoothing = _Option[float, SupportsFloat]("The share of a mean over all classes.")
    upsample = _Option["Upsample | None", "Upsample | None"]("None or bilinear.")
    align_corners = _Option[bool, bool]("How upsample places the pixels.")
    backend = _Option[Backend, Backend]("What computes the loss.")
    inplace = _Option[bool, bool]("Whether the gradient may overwrite the logits.")
    grad_in_forward = _Option[bool, bool]("Whether the forward pass may compute the gradient.")

    def _fitting(self, weight: object, options: Options) -> Tensor | None:
        """The class weights as a tensor, which the options must fit, and fit each other."""
        _ = options.void_label
        return class_weight(weight, options.hierarchy.num_classes)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            value = self._fitting(value, self.options)
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the weights with the module and leaves their dtype: float16 would round them, or overflow."""
        weight = self.weight
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if weight is not None and self.weight is not None and self.weight.dtype != weight.dtype:
            self.weight = weight.to(self.weight.device)
        return self

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(
            f"torch.jit.script of {type(self).__name__} is not supported: use torch.compile, torch.export or "
            "torch.jit.trace"
        )

    def _shown(self) -> list[str]:
        shown = [] if self.weight is None else [f"weight={tuple(self.weight.shape)}"]
        return shown + [f"{name}={value!r}" for name, value in self.options.changed().items()]

    def extra_repr(self) -> str:
        return ", ".join(self._shown())


class ImportanceAwareLoss(Loss):
    """`importance_aware_loss` with its options fixed, as a drop-in for `torch.nn.CrossEntropyLoss`.

    Every argument is an attribute afterwards, which can be read and set; what is set is validated, too.

    Args:
        hierarchy: the levels of the C classes, least important first, or anything that `Hierarchy.of` takes.
        weight: (C,) class weights, a tensor, a list or a NumPy array. They are a buffer, so ``.to(device)``
            moves them, but casts such as ``.half()`` leave their dtype: float32 for a list.
        alpha: added to every f_t.
        lambdas: lambda_t of Eq. 3, one for all or one for each of the g - 1 factors.
        ignore_index: the label of void pixels; None means the hierarchy's own, else 255.
        reduction: "mean", "sum" or "none".
        factor_normalization: "mean" or "sum".
        factor_scope: "image" or "batch".
        gradient: "exact" or "paper".
        label_smoothing: from 0 to 1, the share of a mean over all classes in S_k.
        upsample: None or "bilinear".
        align_corners: how ``upsample`` places the pixels.
        backend: "auto", "cuda", "triton", "cpu" or "reference".
        inplace: lets the backward pass write the gradient over the logits.
        grad_in_forward: lets the forward pass compute the gradient.
        return_components: return ``(loss, Components)``.
        process_group: None; sums over processes are not in this version.

    `importance_aware_loss` explains them.

    Shape:
        ``criterion(logits, target, pixel_weight=None, *, divisor=None)``: logits (N, C, *spatial), target and
        pixel_weight (N, *spatial), divisor a number or (). Returns what the function returns.

    Raises:
        TypeError, ValueError, NotImplementedError: an unknown or a bad option, at construction or when it is
            set.

    >>> criterion = ImportanceAwareLoss("camvid", weight=w)
    >>> criterion(model(images), labels).backward()
    """

    hierarchy = _Option[Hierarchy, HierarchyLike]("The levels of the classes.")
    alpha = _Option[float, SupportsFloat]("Added to every f_t.")
    lambdas = _Option["float | tuple[float, ...]", Lambdas]("lambda_t of Eq. 3.")
    factor_normalization = _Option[FactorNormalization, FactorNormalization]("mean or sum.")
    factor_scope = _Option[FactorScope, FactorScope]("image or batch.")
    gradient = _Option[Gradient, Gradient]("exact or paper.")
    return_components = _Option[bool, bool]("Whether the components are returned, too.")
    process_group = _Option[None, None]("None.")

    def __init__(
        self,
        hierarchy: HierarchyLike,
        weight: ClassWeights | None = None,
        *,
        alpha: SupportsFloat = 1.0,
        lambdas: Lambdas = 0.5,
        ignore_index: SupportsIndex | None = None,
        reduction: Reduction = "mean",
        factor_normalization: FactorNormalization = "mean",
        factor_scope: FactorScope = "image",
        gradient: Gradient = "exact",
        label_smoothing: SupportsFloat = 0.0,
        upsample: Upsample | None = None,
        align_corners: bool = False,
        backend: Backend = "auto",
        inplace: bool = False,
        grad_in_forward: bool = True,
        return_components: bool = False,
        process_group: None = None,
    ) -> None:
        options = Options(
            hierarchy,
            alpha=alpha,
            lambdas=lambdas,
            ignore_index=ignore_index,
            reduction=reduction,
            factor_normalization=factor_normalization,
            factor_scope=factor_scope,
            gradient=gradient,
            label_smoothing=label_smoothing,
            upsample=upsample,
            align_corners=align_corners,
            backend=backend,
            inplace=inplace,
            grad_in_forward=grad_in_forward,
            return_components=return_components,
            process_group=process_group,
        )
        super().__init__(weight, options)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        pixel_weight: Tensor | None = None,
        *,
        divisor: Divisor | None = None,
    ) -> Tensor | tuple[Tensor, Components]:
        # By its name in functional.py, which is the one that torch.fx.wrap replaces there.
        return functional.compute_loss(
            logits, target, self.weight, pixel_weight, divisor, self.options, self.expected
        )

    def _shown(self) -> list[str]:
        return [
            f"{self.hierarchy.num_classes} classes",
            f"{self.hierarchy.num_levels} levels",
            *super()._shown(),
        ]


class CrossEntropyLoss(Loss):
    """`cross_entropy` with its options fixed, a drop-in for `torch.nn.CrossEntropyLoss` of class indices.

    Every argument is an attribute afterwards, which can be read and set; what is set is validated, too.

    Args:
        weight: (C,) class weights, a tensor, a list or a NumPy array. They are a buffer, so ``.to(device)``
            moves them, but casts such as ``.half()`` leave their dtype: float32 for a list.
        ignore_index: the label of void pixels.
        reduction: "mean", "sum" or "none".
        label_smoothing: from 0 to 1, the share of a mean over all classes.
        upsample: None or "bilinear".
        align_corners: how ``upsample`` places the pixels.
        backend: "auto", "cuda", "triton", "cpu" or "reference".
        inplace: lets the backward pass write the gradient over the logits.
        grad_in_forward: lets the forward pass compute the gradient.

    `cross_entropy` explains them.

    Shape:
        ``criterion(input, target, pixel_weight=None, *, divisor=None)``: as for `cross_entropy`.

    Raises:
        TypeError, ValueError: an unknown or a bad option, at construction or when it is set.

    >>> criterion = CrossEntropyLoss(weight, ignore_index=255, upsample="bilinear")
    >>> criterion(model(images), labels).backward()
    """

    def __init__(
        self,
        weight: ClassWeights | None = None,
        ignore_index: SupportsIndex = -100,
        reduction: Reduction = "mean",
        label_smoothing: SupportsFloat = 0.0,
        *,
        upsample: Upsample | None = None,
        align_corners: bool = False,
        backend: Backend = "auto",
        inplace: bool = False,
        grad_in_forward: bool = True,
    ) -> None:
        options = Options(
            FLAT,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            upsample=upsample,
            align_corners=align_corners,
            backend=backend,
            inplace=inplace,
            grad_in_forward=grad_in_forward,
        )
        super().__init__(weight, options)

    def _fitting(self, weight: object, options: Options) -> Tensor | None:
        as_label(options.ignore_index, "ignore_index")  # None means nothing here
        return class_weight(weight, None)  # the logits say how many classes there are

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        pixel_weight: Tensor | None = None,
        *,
        divisor: Divisor | None = None,
    ) -> Tensor:
        return functional.compute_cross_entropy(
            input, target, self.weight, pixel_weight, divisor, self.options, self.expected
        )
