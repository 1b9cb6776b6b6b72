"""The losses as nn.Modules. Their options are attributes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Generic, NoReturn, SupportsFloat, SupportsIndex, TypeVar, overload

from torch import Tensor, nn
from typing_extensions import Self

from . import functional
from .arguments import as_label
from .calls import FLAT
from .distributed import Group
from .functional import Components, ExpectedGradient
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
    """A module attribute that reads one of the options. Setting it validates all options."""

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
    """The base class of both losses: validated options, and class weights that keep their dtype in casts."""

    options: Options
    weight: Tensor | None

    def __init__(self, weight: ClassWeights | None, options: Options) -> None:
        super().__init__()
        self.options = options
        self.expected = ExpectedGradient()
        self.register_buffer("weight", self._fitting(weight, options))

    ignore_index = _Option[int, "SupportsIndex | None"]("The label of void pixels.", field="void_label")
    reduction = _Option[Reduction, Reduction]("mean, sum or none.")
    label_smoothing = _Option[float, SupportsFloat]("Label smoothing, 0 to 1.")
    upsample = _Option["Upsample | None", "Upsample | None"]("None, or bilinear for coarse logits.")
    align_corners = _Option[bool, bool]("The pixel positions of upsample.")
    backend = _Option[Backend, Backend]("The name of the backend.")
    inplace = _Option[bool, bool]("Whether the gradient may overwrite the logits.")
    grad_in_forward = _Option[bool, bool]("Whether the forward pass may compute the gradient.")
    process_group = _Option["Group | None", "Group | None"]("The group over which images are split.")
    spatial_group = _Option["Group | None", "Group | None"]("The group over which pixels are split.")

    def _fitting(self, weight: object, options: Options) -> Tensor | None:
        """The class weights as a tensor. Raises if weights and options do not fit each other."""
        _ = options.void_label
        return class_weight(weight, options.hierarchy.num_classes)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            value = self._fitting(value, self.options)
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the weights with the module but keeps their dtype: float16 would round or overflow them."""
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
    """`importance_aware_loss` as a module, with the options as attributes.

    It is used like `torch.nn.CrossEntropyLoss`. Setting an attribute validates it. `importance_aware_loss`
    documents the options in full.

    Args:
        hierarchy: the levels of the C classes, the least important level first, or anything else that
            `Hierarchy.of` takes.
        weight: (C,) class weights: a tensor of a floating dtype, a list or a NumPy array. None means ones.
            They are a buffer: ``.to(device)`` moves them, but casts such as ``.half()`` keep their dtype. A
            list becomes float32.
        alpha: added to every f_t.
        lambdas: lambda_t of Eq. 3: one number for all factors, or one for each of the g - 1.
        ignore_index: the label of void pixels. None means the hierarchy's own, else 255.
        reduction: "mean", "sum" or "none".
        factor_normalization: "mean" or "sum".
        factor_scope: "image" or "batch".
        gradient: "exact" or "paper".
        label_smoothing: from 0 to 1, the share of the mean over all classes in S_k.
        upsample: None, or "bilinear" for coarse logits (N, C, h, w) with targets (N, H, W).
        align_corners: the pixel positions of ``upsample``, as in `torch.nn.functional.interpolate`.
        backend: "auto", "cuda", "triton", "cpu" or "reference".
        inplace: allows the backward pass to overwrite the logits with the gradient.
        grad_in_forward: allows the forward pass to compute the gradient with the loss.
        return_components: whether to return ``(loss, Components)``.
        process_group: None, or the process group or mesh dimension over which the images are split.
        spatial_group: None, or the group or mesh dimension over which the pixels of each image are split.

    Raises:
        TypeError: an option has a wrong type, at construction or when it is set.
        ValueError: an option has a value that is not allowed, at construction or when it is set.

    Examples:
        >>> import ial_cuda, torch
        >>> criterion = ial_cuda.ImportanceAwareLoss("camvid", alpha=1.0)
        >>> logits = torch.randn(2, 11, 36, 48, requires_grad=True)
        >>> labels = torch.randint(12, (2, 36, 48))  # 11 is void
        >>> criterion(logits, labels).backward()
    """

    hierarchy = _Option[Hierarchy, HierarchyLike]("The levels of the classes.")
    alpha = _Option[float, SupportsFloat]("Added to every f_t.")
    lambdas = _Option["float | tuple[float, ...]", Lambdas]("lambda_t of Eq. 3.")
    factor_normalization = _Option[FactorNormalization, FactorNormalization]("mean or sum.")
    factor_scope = _Option[FactorScope, FactorScope]("image or batch.")
    gradient = _Option[Gradient, Gradient]("exact or paper.")
    return_components = _Option[bool, bool]("Whether the components are returned too.")

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
        process_group: Group | None = None,
        spatial_group: Group | None = None,
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
            spatial_group=spatial_group,
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
        """Computes the loss, as `importance_aware_loss` does.

        Args:
            logits: (N, C, *spatial), or (N, C, h, w) with ``upsample``.
            target: (N, *spatial) class indices.
            pixel_weight: (N, *spatial), multiplies the weight of each pixel. None means ones.
            divisor: replaces the summed weight of the valid pixels as the divisor of the mean: a number or a
                0-d tensor.

        Returns:
            The loss, (), or (N,) with ``reduction="none"``. With ``return_components``, the tuple
                ``(loss, Components)``.

        Raises:
            TypeError: a tensor has a wrong type or dtype.
            ValueError: a shape, a device or a label is wrong.
            RuntimeError: the backend is missing.
        """
        # Called through its module, where torch.fx.wrap replaces the name.
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
    """`cross_entropy` as a module: a drop-in for `torch.nn.CrossEntropyLoss` with class indices.

    The options are attributes. Setting one validates it. `cross_entropy` documents them in full.

    Args:
        weight: (C,) class weights: a tensor of a floating dtype, a list or a NumPy array. None means ones.
            They are a buffer: ``.to(device)`` moves them, but casts such as ``.half()`` keep their dtype. A
            list becomes float32.
        ignore_index: the label of void pixels.
        reduction: "mean", "sum" or "none".
        label_smoothing: from 0 to 1, the share of the mean over all classes.
        upsample: None, or "bilinear" for coarse logits (N, C, h, w) with targets (N, H, W).
        align_corners: the pixel positions of ``upsample``, as in `torch.nn.functional.interpolate`.
        backend: "auto", "cuda", "triton", "cpu" or "reference".
        inplace: allows the backward pass to overwrite the logits with the gradient.
        grad_in_forward: allows the forward pass to compute the gradient with the loss.
        process_group: None, or the process group or mesh dimension over which the images are split.
        spatial_group: None, or the group or mesh dimension over which the pixels of each image are split.

    Raises:
        TypeError: an option has a wrong type, at construction or when it is set.
        ValueError: an option has a value that is not allowed, at construction or when it is set.

    Examples:
        >>> import ial_cuda, torch
        >>> criterion = ial_cuda.CrossEntropyLoss(ignore_index=255, upsample="bilinear")
        >>> logits = torch.randn(2, 19, 16, 32, requires_grad=True)
        >>> labels = torch.randint(19, (2, 64, 128))
        >>> criterion(logits, labels).backward()
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
        process_group: Group | None = None,
        spatial_group: Group | None = None,
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
            process_group=process_group,
            spatial_group=spatial_group,
        )
        super().__init__(weight, options)

    def _fitting(self, weight: object, options: Options) -> Tensor | None:
        as_label(options.ignore_index, "ignore_index")  # None is an error: no hierarchy gives a default
        return class_weight(weight, None)  # of any C: the logits define it

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        pixel_weight: Tensor | None = None,
        *,
        divisor: Divisor | None = None,
    ) -> Tensor:
        """Computes the loss, as `cross_entropy` does.

        Args:
            input: logits (N, C, *spatial), (C, *spatial) or (C,), or (N, C, h, w) with ``upsample``.
            target: class indices (N, *spatial), (*spatial) or ().
            pixel_weight: a tensor in the shape of ``target`` that multiplies the weight of each pixel. None
                means ones.
            divisor: replaces the summed weight of the valid pixels as the divisor of the mean: a number or a
                0-d tensor.

        Returns:
            The loss, (), or the shape of ``target`` with ``reduction="none"``.

        Raises:
            TypeError: a tensor has a wrong type or dtype.
            ValueError: a shape, a device or a label is wrong.
            RuntimeError: the backend is missing.
        """
        return functional.compute_cross_entropy(
            input, target, self.weight, pixel_weight, divisor, self.options, self.expected
        )
