"""The loss as a function and as a module: arguments checked, a backend chosen, its result returned."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import (
    Any,
    Generic,
    Literal,
    NamedTuple,
    NoReturn,
    SupportsFloat,
    SupportsIndex,
    TypeAlias,
    TypeVar,
    overload,
)

import torch
from torch import Tensor, nn

from . import _ops, reference
from .hierarchy import Hierarchy, HierarchyLike
from .options import (
    Backend,
    FactorNormalization,
    FactorScope,
    Gradient,
    Options,
    Reduction,
    Upsample,
    unchecked,
)
from .validation import ClassWeights, check_inplace, check_inputs, check_logits, checked_target, class_weight

Lambdas: TypeAlias = SupportsFloat | Iterable[SupportsFloat]


class Components(NamedTuple):
    """What the loss is made of, detached, for logging. g levels, least important first; t < g - 1.

    With ``factor_scope="batch"`` the factors are those of the whole batch, (1, g-1).
    """

    f: Tensor  #: (N, g-1) f_t of Eq. 3
    F: Tensor  #: (N, g-1) importance factors f_t + alpha
    S: Tensor  #: (N, g) weighted cross-entropy of each level, w'l of Eqs. 1 and 2
    count: Tensor  # type: ignore[assignment]  #: (N, g) valid pixels of each level; not the tuple's method


# fmt: off
@overload
def importance_aware_loss(
    logits: Tensor, target: Tensor, hierarchy: HierarchyLike, *, weight: ClassWeights | None = ...,
    pixel_weight: Tensor | None = ..., alpha: SupportsFloat = ..., lambdas: Lambdas = ...,
    ignore_index: SupportsIndex | None = ..., reduction: Reduction = ...,
    factor_normalization: FactorNormalization = ..., factor_scope: FactorScope = ...,
    gradient: Gradient = ..., upsample: Upsample | None = ..., align_corners: bool = ...,
    backend: Backend = ..., inplace: bool = ...,
    return_components: Literal[False] = ..., process_group: None = ...,
) -> Tensor: ...
@overload
def importance_aware_loss(
    logits: Tensor, target: Tensor, hierarchy: HierarchyLike, *, weight: ClassWeights | None = ...,
    pixel_weight: Tensor | None = ..., alpha: SupportsFloat = ..., lambdas: Lambdas = ...,
    ignore_index: SupportsIndex | None = ..., reduction: Reduction = ...,
    factor_normalization: FactorNormalization = ..., factor_scope: FactorScope = ...,
    gradient: Gradient = ..., upsample: Upsample | None = ..., align_corners: bool = ...,
    backend: Backend = ..., inplace: bool = ...,
    return_components: Literal[True], process_group: None = ...,
) -> tuple[Tensor, Components]: ...
@overload
def importance_aware_loss(
    logits: Tensor, target: Tensor, hierarchy: HierarchyLike, *, weight: ClassWeights | None = ...,
    pixel_weight: Tensor | None = ..., alpha: SupportsFloat = ..., lambdas: Lambdas = ...,
    ignore_index: SupportsIndex | None = ..., reduction: Reduction = ...,
    factor_normalization: FactorNormalization = ..., factor_scope: FactorScope = ...,
    gradient: Gradient = ..., upsample: Upsample | None = ..., align_corners: bool = ...,
    backend: Backend = ..., inplace: bool = ...,
    return_components: bool, process_group: None = ...,
) -> Tensor | tuple[Tensor, Components]: ...
# fmt: on
def importance_aware_loss(
    logits: Tensor,
    target: Tensor,
    hierarchy: HierarchyLike,
    *,
    weight: ClassWeights | None = None,
    pixel_weight: Tensor | None = None,
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
) -> Tensor | tuple[Tensor, Components]:
    """Importance-Aware Loss of Chen, Gong and Yang (IJCAI 2017), differentiable by ``logits``.

    With the sums S_k of the weighted cross-entropy over level k, and f_t = 1/2 sum (M_t + lambda_t)
    (pi - M_t)^2 / Z_t over the pixels of level t and above (pi the probability of a pixel's own class, M_t 0
    at level t and 1 above it), the loss of an image is

        IAL = S_0 + (f_0 + alpha) (S_1 + (f_1 + alpha) (S_2 + ...))                             (Eqs. 1 to 8).

    A hierarchy of one level gives `torch.nn.functional.cross_entropy` with ``weight`` and ``ignore_index``.

    Args:
        logits: (N, C, *spatial) of any spatial rank, float64, float32, float16 or bfloat16. Contiguous and
            channels_last tensors are read as they lie; so is every other stride, more slowly. Half precision
            is computed in float32.
            Logits (M, C) are M images of one pixel each, slower than (1, C, M): see ``factor_scope``.
        target: (N, *spatial) class indices, int64, int32 or uint8, on the device of ``logits``.
        hierarchy: the levels of the C classes, least important first. Anything that `Hierarchy.of` takes:
            the name of a preset, nested lists, a number of classes for one level.
        weight: (C,) class weights w of Eq. 2, a tensor of a floating dtype, a list or a NumPy array; ones if
            None. `median_frequency_weights` counts them.
        pixel_weight: (N, *spatial), multiplies the weight of each pixel; ones if None. Like ``weight`` it is
            in S_k and in the divisor of the mean, not in f_t.
        alpha: added to every f_t. Numbers may be Python's, NumPy's or 0-d tensors.
        lambdas: lambda_t of Eq. 3, one for all or one for each of the g - 1 factors, not negative.
        ignore_index: pixels with this label are left out of everything, and their gradient is 0. It may be a
            class: then that class is left out. None means the hierarchy's own ``ignore_index``, else 255, and
            is an error where 255 is a class.
        reduction: "mean": the images' losses, added, over the summed weight of the valid pixels (0 where
            that is 0); "sum"; "none": one loss for each image.
        factor_normalization: "mean": Z_t is the number of pixels that f_t compares; "sum": Z_t = 1, Eq. 3 to
            the letter, which grows with the image.
        factor_scope: "image": f_t of each image; "batch": one f_t over all pixels of the batch. Logits (M, C)
            of the M pixels of one image want "batch", or the shape (1, C, M).
        gradient: "exact": the derivative; "paper": Eqs. 9 to 19 to the letter, where the derivative of pi by
            the logits of other classes is left out (Eq. 15).
        upsample: None, or "bilinear": ``logits`` (N, C, h, w) are coarse, ``target`` and ``pixel_weight``
            (N, H, W), and the loss is that of `torch.nn.functional.interpolate(logits, (H, W),
            mode="bilinear")`, whose result is never written to memory: each pixel's logits are interpolated
            when it is their turn, and the gradient is added up at coarse size, in a fixed order. Any ratio. A
            coarse logit whose weight is 0 is left out; `interpolate` makes NaN of it where it is infinite.
        align_corners: how ``upsample`` places the pixels, as in `interpolate`.
        backend: "auto" (the best for the device of ``logits``), "cuda", "fused", "triton", "cpu" or
            "reference". ``python -m ial_cuda info`` tells which there are. "cuda" reads the logits once for
            the loss and once more in the backward pass. "fused" computes the gradient with the loss, in one
            launch that keeps the logits on the chip; backward has nothing left to do where the gradient of
            the loss is 1, and else computes it as "cuda" does. "auto" takes "fused" where a backward pass
            will come, an image fits on the chip, and the logits are not float16, whose losses are scaled.
            Without a backward pass, with ``upsample``, ``inplace`` or ``reduction="none"`` and under
            torch.compile, "fused" is "cuda".
        inplace: lets the backward pass write the gradient over ``logits``, which saves a tensor of their
            size. Then they are gone, and a backward pass that still needs them raises. "reference",
            torch.compile, torch.func and backward passes with ``create_graph`` leave them.
        return_components: return ``(loss, Components)``.
        process_group: None; sums over processes are not in this version.

    Returns:
        The loss, () or with ``reduction="none"`` (N,); float64 for float64 logits, else float32.

    Raises:
        ValueError: a shape, a device or an option is not one of the above; on the CPU, a label outside [0, C)
            that is not ``ignore_index``. On CUDA such a pixel is left out and the loss is NaN, unless the
            environment has IAL_CUDA_DEBUG=1: then it is the same error, at the price of a synchronisation.
            Under torch.compile too.
        TypeError: an argument of a wrong type or dtype.
        RuntimeError: the backend asked for is not there; the message says why, and the remedy.
        NotImplementedError: ``process_group``; or, later, when the gradient of the gradient
            is asked for ("reference" has it, but not within torch.compile, which knows none).
    """
    options = unchecked(
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
    ).validated()
    return _loss(logits, target, weight, pixel_weight, options)


def _loss(
    logits: Tensor,
    target: Tensor,
    weight: ClassWeights | None,
    pixel_weight: Tensor | None,
    options: Options,
) -> Tensor | tuple[Tensor, Components]:
    hierarchy = options.hierarchy
    levels = hierarchy.class_levels
    class_weights = class_weight(weight, len(levels))
    if class_weights is not None and class_weights is not weight:  # lists and arrays are on no device
        class_weights = class_weights.to(logits.device)
    coarse = options.upsample is not None
    check_inputs(logits, target, class_weights, pixel_weight, len(levels), upsample=coarse)
    # torch.compile plans memory itself, and torch.func's transforms have levels of their own to write into.
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    inplace = options.inplace and not transformed
    if inplace:
        check_inplace(logits, target, class_weights, pixel_weight)
    if logits.dim() == 2:
        _warn_of_rows(logits, options)
    lambdas, ignore_index = options.factor_lambdas, options.void_label
    corners = options.align_corners if coarse else None
    backend = _choose_backend(options.backend, logits.device)
    # The gradient is computed with the loss where a backward pass wants it for one value, and leaves the
    # logits as they are.
    at_once = (
        logits.requires_grad
        and torch.is_grad_enabled()
        and not inplace
        and corners is None
        and options.reduction != "none"
        and not transformed
    )
    if options.backend == "auto" and at_once and _fuses(backend, logits, target, pixel_weight, options):
        backend = _ops.one_launch[backend]
    if (os.environ.get("IAL_CUDA_DEBUG") == "1") if logits.is_cuda else (backend == "reference"):
        target = checked_target(target, len(levels), ignore_index)

    if backend == "reference":
        loss, f, S, count = reference.importance_aware_loss(
            logits,
            target,
            hierarchy,
            weight=class_weights,
            pixel_weight=pixel_weight,
            alpha=options.alpha,
            lambdas=lambdas,
            ignore_index=ignore_index,
            reduction=options.reduction,
            factor_normalization=options.factor_normalization,
            factor_scope=options.factor_scope,
            gradient=options.gradient,
            align_corners=corners,
        )
    else:
        operators = _ops.operators(backend)
        pixels = (logits, target, class_weights, pixel_weight, levels, ignore_index, options.gradient)
        combining = (
            lambdas,
            options.alpha,
            options.reduction,
            options.factor_normalization,
            options.factor_scope,
        )
        if at_once and backend in _ops.one_launch.values():
            loss, f, stats, *_ = operators.loss_and_grad(*pixels, *combining)
        else:
            stats = operators.reduce(*pixels, inplace, corners)
            dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
            loss, f = operators.combine(stats, *combining, dtype)
        if options.return_components:
            S, count = stats[..., 0].to(loss.dtype), stats[..., 3].to(torch.int64)
            f = f.to(loss.dtype)
    if not options.return_components:
        return loss
    f = f.detach()
    return loss, Components(f, f + options.alpha, S.detach(), count)


def upsampled_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: ClassWeights | None = None,
    *,
    ignore_index: SupportsIndex | None = None,
    reduction: Reduction = "mean",
    align_corners: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Cross-entropy of coarse logits at the size of the target, without logits of that size:

        F.cross_entropy(F.interpolate(logits, target.shape[1:], mode="bilinear"), target, weight, ...)

    Args:
        logits: (N, C, h, w), float64, float32, float16 or bfloat16.
        target: (N, H, W) class indices, int64, int32 or uint8, of any size.
        weight: (C,) class weights, a tensor, a list or a NumPy array; ones if None.
        ignore_index: pixels with this label are left out; None means 255, and is an error where that is a
            class.
        reduction: "mean": over the weight of the valid pixels, 0 where there are none; "sum"; "none": one
            sum for each image.
        align_corners: how the pixels are placed, as in `torch.nn.functional.interpolate`.
        backend: as in `importance_aware_loss`, which this is for a hierarchy of one level.

    Returns:
        The loss, () or with ``reduction="none"`` (N,); float64 for float64 logits, else float32.

    Raises:
        What `importance_aware_loss` raises.

    >>> loss = upsampled_cross_entropy(head(features), labels)  # logits at a quarter of the labels' size
    """
    check_logits(logits)
    if logits.dim() < 2:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (N, C, h, w)")
    return importance_aware_loss(
        logits,
        target,
        Hierarchy.flat(logits.shape[1]),
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,
        upsample="bilinear",
        align_corners=align_corners,
        backend=backend,
    )


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
        options = module.options._replace(**changed).validated()
        _fitting(module.weight, options)
        module.options = options


def _fitting(weight: object, options: Options) -> Tensor | None:
    """The class weights of a module, which its options must fit, and fit each other."""
    _ = options.void_label
    return class_weight(weight, options.hierarchy.num_classes)


# torch.fx.symbolic_trace of the module leaves the call as it is: what it checks is not known of a proxy.
torch.fx.wrap("_loss")


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
        backend: "auto", "cuda", "fused", "triton", "cpu" or "reference".
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
        options = unchecked(
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
        ).validated()
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
        return _loss(logits, target, self.weight, pixel_weight, self.options)

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


def _choose_backend(backend: str, device: torch.device) -> str:
    suitable = _ops.preference.get(device.type, ("reference",))
    if device.type == "meta":  # nothing is computed, and the shapes are those of every backend
        return "reference" if backend == "reference" or _ops.unavailable["cpu"] else "cpu"
    if backend == "auto":
        best = next(name for name in suitable if _ops.unavailable[name] is None)
        if best in _SECOND_BEST:
            _warn_once(device.type, best)
        return best
    if backend not in suitable:
        expected = ", ".join(map(repr, ("auto", *suitable)))
        raise ValueError(f"backend is {backend!r}, expected one of {expected} for logits on {device}")
    if _ops.unavailable[backend] is not None:
        raise RuntimeError(f"backend is {backend!r}, which is not there: {_ops.unavailable[backend]}")
    return backend


def _fuses(
    backend: str, logits: Tensor, target: Tensor, pixel_weight: Tensor | None, options: Options
) -> bool:
    """Whether one launch for loss and gradient is there and likely to be faster. Its gradient is that for an
    incoming gradient of 1, and computed again for any other: a loss of float16 is usually scaled."""
    if backend not in _ops.one_launch or logits.dtype == torch.float16:
        return False
    levels = options.hierarchy.num_levels
    fuses = _ops.operators(backend).fits_on_chip
    return bool(fuses(logits, target, pixel_weight, levels, options.factor_scope))


_SECOND_BEST = {"triton": "Triton kernels", "reference": "slow reference, in plain PyTorch"}
_warned: set[str] = set()


def _warn_once(device: str, backend: str) -> None:
    if device in _warned or torch.compiler.is_compiling():
        return
    _warned.add(device)
    kernels = _ops.kernels(device)
    missing = [f"{name}: {_ops.unavailable[name]}" for name in kernels if _ops.unavailable[name]]
    reasons = "; ".join(missing) or "it has no kernels for this device"
    _warn(f"ial_cuda computes on {device} with its {_SECOND_BEST[backend]} ({reasons})")


def _warn_of_rows(logits: Tensor, options: Options) -> None:
    if torch.compiler.is_compiling() or logits.shape[0] < 2:
        return
    if options.hierarchy.num_levels > 1 and options.factor_scope == "image":
        _warn(
            f"logits has shape {tuple(logits.shape)}: each row is an image of one pixel, with factors of its "
            'own; for rows that are pixels of one image pass factor_scope="batch", or logits (1, C, M) and '
            "target (1, M)"
        )


def _warn(message: str) -> None:
    """Warns of the line that called into this package, be it through torch's modules."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", __package__):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
