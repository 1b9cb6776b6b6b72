"""The loss as an nn.Module. Its options are attributes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Generic, NoReturn, SupportsFloat, SupportsIndex, TypeVar, overload

from torch import Tensor, nn

from . import functional
from .functional import Components
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
from .validation import ClassWeights, class_weight

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
    def __get__(self, module: ImportanceAwareLoss, owner: type) -> Held: ...
    def __get__(self, module: ImportanceAwareLoss | None, owner: type) -> _Option[Held, Given] | Held:
        if module is None:
            return self
        held: Held = getattr(module.options, self.field or self.name)
        return held

    def __set__(self, module: ImportanceAwareLoss, value: Given) -> None:
        changed: dict[str, Any] = {self.name: value}
        options = replace(module.options, **changed)
        _fitting(module.weight, options)
        module.options = options


def _fitting(weight: object, options: Options) -> Tensor | None:
    """The class weights of a module, which its options must fit, and fit each other."""
    _ = options.void_label
    return class_weight(weight, options.hierarchy.num_classes)


class ImportanceAwareLoss(nn.Module):
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
        upsample: None or "bilinear".
        align_corners: how ``upsample`` places the pixels.
        backend: "auto", "cuda", "triton", "cpu" or "reference".
        inplace: lets the backward pass write the gradient over the logits.
        return_components: return ``(loss, Components)``.
        process_group: None; sums over processes are not in this version.

    `importance_aware_loss` explains them.

    Shape:
        ``criterion(logits, target, pixel_weight=None)``: logits (N, C, *spatial), target and pixel_weight
        (N, *spatial). Returns what the function returns.

    Raises:
        TypeError, ValueError, NotImplementedError: an unknown or a bad option, at construction or when it is
            set.

    >>> criterion = ImportanceAwareLoss("camvid", weight=w)
    >>> criterion(model(images), labels).backward()
    """

    options: Options
    weight: Tensor | None

    hierarchy = _Option[Hierarchy, HierarchyLike]("The levels of the classes.")
    alpha = _Option[float, SupportsFloat]("Added to every f_t.")
    lambdas = _Option["float | tuple[float, ...]", Lambdas]("lambda_t of Eq. 3.")
    ignore_index = _Option[int, "SupportsIndex | None"]("The label of void pixels.", field="void_label")
    reduction = _Option[Reduction, Reduction]("mean, sum or none.")
    factor_normalization = _Option[FactorNormalization, FactorNormalization]("mean or sum.")
    factor_scope = _Option[FactorScope, FactorScope]("image or batch.")
    gradient = _Option[Gradient, Gradient]("exact or paper.")
    upsample = _Option["Upsample | None", "Upsample | None"]("None or bilinear.")
    align_corners = _Option[bool, bool]("How upsample places the pixels.")
    backend = _Option[Backend, Backend]("What computes the loss.")
    inplace = _Option[bool, bool]("Whether the gradient may overwrite the logits.")
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
        upsample: Upsample | None = None,
        align_corners: bool = False,
        backend: Backend = "auto",
        inplace: bool = False,
        return_components: bool = False,
        process_group: None = None,
    ) -> None:
        super().__init__()
        options = Options(
            hierarchy,
            alpha=alpha,
            lambdas=lambdas,
            ignore_index=ignore_index,
            reduction=reduction,
            factor_normalization=factor_normalization,
            factor_scope=factor_scope,
            gradient=gradient,
            upsample=upsample,
            align_corners=align_corners,
            backend=backend,
            inplace=inplace,
            return_components=return_components,
            process_group=process_group,
        )
        self.options = options
        self.register_buffer("weight", _fitting(weight, options))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            value = _fitting(value, self.options)
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ImportanceAwareLoss:
        """Moves the weights with the module and leaves their dtype: float16 would round them, or overflow."""
        weight = self.weight
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if weight is not None and self.weight is not None and self.weight.dtype != weight.dtype:
            self.weight = weight.to(self.weight.device)
        return self

    def forward(
        self, logits: Tensor, target: Tensor, pixel_weight: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Components]:
        # By its name in functional.py, which is the one that torch.fx.wrap replaces there.
        return functional.compute_loss(logits, target, self.weight, pixel_weight, self.options)

    def __prepare_scriptable__(self) -> NoReturn:
        raise NotImplementedError(
            "torch.jit.script of ImportanceAwareLoss is not supported: use torch.compile, torch.export or "
            "torch.jit.trace"
        )

    def extra_repr(self) -> str:
        shown = [f"{self.hierarchy.num_classes} classes", f"{self.hierarchy.num_levels} levels"]
        if self.weight is not None:
            shown.append(f"weight={tuple(self.weight.shape)}")
        shown += [f"{name}={value!r}" for name, value in self.options.changed().items()]
        return ", ".join(shown)
