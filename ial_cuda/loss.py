"""The loss as a function and as a module: arguments checked, a backend chosen, its result returned."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _ops, reference
from .hierarchy import Hierarchy, as_int

_LOGITS_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_TARGET_DTYPES = (torch.int64, torch.int32, torch.uint8)
_CHOICES = {
    "reduction": ("mean", "sum", "none"),
    "factor_normalization": ("mean", "sum"),
    "factor_scope": ("image", "batch"),
    "gradient": ("exact", "paper"),
    "upsample": (None, "bilinear"),
}


class Components(NamedTuple):
    """What the loss is made of, detached, for logging. g levels, least important first; t < g - 1.

    With ``factor_scope="batch"`` the factors are those of the whole batch, (1, g-1).
    """

    f: Tensor  #: (N, g-1) f_t of Eq. 3
    F: Tensor  #: (N, g-1) importance factors f_t + alpha
    S: Tensor  #: (N, g) weighted cross-entropy of each level, w'l of Eqs. 1 and 2
    count: Tensor  #: (N, g) valid pixels of each level


def importance_aware_loss(
    logits: Tensor,
    target: Tensor,
    hierarchy: Hierarchy,
    *,
    weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
    alpha: float = 1.0,
    lambdas: float | Sequence[float] = 0.5,
    ignore_index: int = 255,
    reduction: str = "mean",
    factor_normalization: str = "mean",
    factor_scope: str = "image",
    gradient: str = "exact",
    upsample: str | None = None,
    align_corners: bool = False,
    backend: str = "auto",
    inplace: bool = False,
    return_components: bool = False,
    process_group: Any = None,
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
        target: (N, *spatial) class indices, int64, int32 or uint8, on the device of ``logits``.
        hierarchy: the levels of the C classes, least important first.
        weight: (C,) class weights w of Eq. 2, a floating dtype; ones if None. `median_frequency_weights`
            counts them.
        pixel_weight: (N, *spatial), multiplies the weight of each pixel; ones if None. Like ``weight`` it is
            in S_k and in the divisor of the mean, not in f_t.
        alpha: added to every f_t.
        lambdas: lambda_t of Eq. 3, one for all or one for each of the g - 1 factors, not negative.
        ignore_index: pixels with this label are left out of everything, and their gradient is 0. It may be a
            class: then that class is left out.
        reduction: "mean": the images' losses, added, over the summed weight of the valid pixels (0 where
            that is 0); "sum"; "none": one loss for each image.
        factor_normalization: "mean": Z_t is the number of pixels that f_t compares; "sum": Z_t = 1, Eq. 3 to
            the letter, which grows with the image.
        factor_scope: "image": f_t of each image; "batch": one f_t over all pixels of the batch.
        gradient: "exact": the derivative; "paper": Eqs. 9 to 19 to the letter, where the derivative of pi by
            the logits of other classes is left out (Eq. 15).
        upsample: None, or "bilinear": ``logits`` (N, C, h, w) are coarse, ``target`` and ``pixel_weight``
            (N, H, W), and the loss is that of `torch.nn.functional.interpolate(logits, (H, W),
            mode="bilinear")`, whose result is never written to memory: each pixel's logits are interpolated
            when it is their turn, and the gradient is added up at coarse size, in a fixed order. Any ratio.
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
            size. Then they are gone, and a backward pass that still needs them raises. "reference" and
            torch.compile, which plans memory itself, leave them.
        return_components: return ``(loss, Components)``.
        process_group: None; sums over processes are not in this version.

    Returns:
        The loss, () or with ``reduction="none"`` (N,); float64 for float64 logits, else float32.

    Raises:
        ValueError: a shape, a device or an option is not one of the above; on the CPU, a label outside [0, C)
            that is not ``ignore_index``. On CUDA such a pixel is left out and the loss is NaN, unless the
            environment has IAL_CUDA_DEBUG=1: then it is the same error, at the price of a synchronisation.
        TypeError: an argument of a wrong type or dtype.
        RuntimeError: the backend asked for is not there; the message says why, and the mend.
        NotImplementedError: ``process_group``; or, later, when the gradient of the gradient
            is asked for ("reference" has it).
    """
    _check_options(
        reduction=reduction,
        factor_normalization=factor_normalization,
        factor_scope=factor_scope,
        gradient=gradient,
        upsample=upsample,
        backend=backend,
    )
    _check_upsample(upsample, align_corners, inplace)
    corners = align_corners if upsample else None
    if process_group is not None:
        raise NotImplementedError("process_group is not None: sums over processes are not in this version")
    _check_tensors(logits, target, hierarchy, weight, pixel_weight, upsample)
    if inplace and logits.requires_grad and logits.is_leaf:
        raise ValueError("inplace is True, expected False: logits is a leaf that requires a gradient")
    lambdas = _per_factor(lambdas, hierarchy)
    if not -math.inf < alpha < math.inf:
        raise ValueError(f"alpha is {alpha!r}, expected a finite number")
    ignore_index = as_int(ignore_index, "ignore_index")
    auto = backend == "auto"
    backend = _choose_backend(backend, logits.device)
    # The gradient is computed with the loss where a backward pass wants it for one value, and leaves the
    # logits as they are. torch.compile would copy it.
    at_once = (
        logits.requires_grad
        and torch.is_grad_enabled()
        and not inplace
        and upsample is None
        and reduction != "none"
        and not torch.compiler.is_compiling()
    )
    if auto and at_once and _fuses(backend, logits, target, pixel_weight, hierarchy, factor_scope):
        backend = _ops.one_launch[backend]
    check_labels = os.environ.get("IAL_CUDA_DEBUG") == "1" if logits.is_cuda else backend == "reference"
    if check_labels and not torch.compiler.is_compiling():
        validate_target(target, hierarchy.num_classes, ignore_index)

    if backend == "reference":
        loss, f, S, count = reference.importance_aware_loss(
            logits,
            target,
            hierarchy,
            weight=weight,
            pixel_weight=pixel_weight,
            alpha=alpha,
            lambdas=lambdas,
            ignore_index=ignore_index,
            reduction=reduction,
            factor_normalization=factor_normalization,
            factor_scope=factor_scope,
            gradient=gradient,
            align_corners=corners,
        )
    else:
        operators = _ops.operators(backend)
        pixels = (logits, target, weight, pixel_weight, hierarchy.class_levels, ignore_index, gradient)
        combining = (lambdas, alpha, reduction, factor_normalization, factor_scope)
        if at_once and backend in _ops.one_launch.values():
            loss, f, stats, *_ = operators.fused(*pixels, *combining)
        else:
            inplace = inplace and not torch.compiler.is_compiling()
            stats = operators.reduce(*pixels, inplace, corners)
            dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
            loss, f = operators.combine(stats, *combining, dtype)
        if return_components:
            S, count = stats[..., 0].to(loss.dtype), stats[..., 3].to(torch.int64)
            f = f.to(loss.dtype)
    if not return_components:
        return loss
    f = f.detach()
    return loss, Components(f, f + alpha, S.detach(), count)


def upsampled_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = 255,
    reduction: str = "mean",
    align_corners: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of coarse logits at the size of the target, without logits of that size:

        F.cross_entropy(F.interpolate(logits, target.shape[1:], mode="bilinear"), target, weight, ...)

    Args:
        logits: (N, C, h, w), float64, float32, float16 or bfloat16.
        target: (N, H, W) class indices, int64, int32 or uint8, of any size.
        weight: (C,) class weights; ones if None.
        ignore_index: pixels with this label are left out.
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
    _check_tensor("logits", logits, _LOGITS_DTYPES)
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


class ImportanceAwareLoss(nn.Module):
    """`importance_aware_loss` with its options fixed, as a drop-in for `torch.nn.CrossEntropyLoss`.

    Args:
        hierarchy: the levels of the C classes, least important first.
        weight: (C,) class weights; kept as a buffer, so ``.to(device)`` moves them.
        **options: the keyword arguments of `importance_aware_loss`, except ``pixel_weight``.

    Shape:
        ``criterion(logits, target, pixel_weight=None)``: logits (N, C, *spatial), target and pixel_weight
        (N, *spatial). Returns what the function returns.

    Raises:
        TypeError, ValueError: an unknown or a bad option, at construction.

    >>> criterion = ImportanceAwareLoss(CAMVID, weight=w, ignore_index=11)
    >>> criterion(model(images), labels).backward()
    """

    weight: Tensor | None

    def __init__(
        self,
        hierarchy: Hierarchy,
        weight: Tensor | None = None,
        *,
        alpha: float = 1.0,
        lambdas: float | Sequence[float] = 0.5,
        ignore_index: int = 255,
        reduction: str = "mean",
        factor_normalization: str = "mean",
        factor_scope: str = "image",
        gradient: str = "exact",
        upsample: str | None = None,
        align_corners: bool = False,
        backend: str = "auto",
        inplace: bool = False,
        return_components: bool = False,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        _check_hierarchy(hierarchy)
        _check_class_weight(weight, hierarchy.num_classes)
        _check_options(
            reduction=reduction,
            factor_normalization=factor_normalization,
            factor_scope=factor_scope,
            gradient=gradient,
            upsample=upsample,
            backend=backend,
        )
        _check_upsample(upsample, align_corners, inplace)
        ignore_index = as_int(ignore_index, "ignore_index")
        if 0 <= ignore_index < hierarchy.num_classes:
            warnings.warn(
                f"ignore_index is {ignore_index}, a class of the hierarchy: its pixels are left out",
                stacklevel=2,
            )
        self.hierarchy = hierarchy
        self.register_buffer("weight", weight)
        self.options = {
            "alpha": alpha,
            "lambdas": _per_factor(lambdas, hierarchy),
            "ignore_index": ignore_index,
            "reduction": reduction,
            "factor_normalization": factor_normalization,
            "factor_scope": factor_scope,
            "gradient": gradient,
            "upsample": upsample,
            "align_corners": align_corners,
            "backend": backend,
            "inplace": inplace,
            "return_components": return_components,
            "process_group": process_group,
        }

    def forward(
        self, logits: Tensor, target: Tensor, pixel_weight: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Components]:
        return importance_aware_loss(
            logits, target, self.hierarchy, weight=self.weight, pixel_weight=pixel_weight, **self.options
        )

    def extra_repr(self) -> str:
        shown = ", ".join(
            f"{name}={value!r}" for name, value in self.options.items() if value not in (None, False)
        )
        return f"{self.hierarchy.num_classes} classes, {self.hierarchy.num_levels} levels, {shown}"


def validate_target(target: Tensor, num_classes: int, ignore_index: int = 255) -> None:
    """Checks every label of ``target``, on whatever device it is; on CUDA this synchronises.

    Args:
        target: integer class indices of any shape.
        num_classes: C.
        ignore_index: the one label outside [0, C) that is allowed.

    Raises:
        ValueError: a label outside [0, C) that is not ``ignore_index``: its value, position, and how many.
    """
    bad = ((target < 0) | (target >= num_classes)) & (target != ignore_index)
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"target has label {target[first].item()} at {first}, the first of {int(bad.sum())} bad pixels, "
            f"expected labels 0 to {num_classes - 1} or ignore_index={ignore_index}"
        )


def _check_options(**options: str | None) -> None:
    for name, value in options.items():
        choices = ("auto", *_ops.unavailable) if name == "backend" else _CHOICES[name]
        if value not in choices:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, choices))}")


def _check_upsample(upsample: str | None, align_corners: bool, inplace: bool) -> None:
    if not isinstance(align_corners, bool):
        raise TypeError(f"align_corners is {align_corners!r}, expected a bool")
    if upsample is None and align_corners:
        raise ValueError("align_corners is True, expected False: upsample is None")
    if upsample is not None and inplace:
        raise ValueError(
            f"inplace is True, expected False: with upsample={upsample!r} gradients depend on logits nearby"
        )


def _check_hierarchy(hierarchy: Hierarchy) -> None:
    if not isinstance(hierarchy, Hierarchy):
        raise TypeError(f"hierarchy is a {type(hierarchy).__name__}, expected an ial_cuda.Hierarchy")


def _check_tensor(name: str, tensor: object, dtypes: Sequence[torch.dtype]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected one of {', '.join(map(str, dtypes))}")


def _check_constant(name: str, tensor: Tensor) -> None:
    if tensor.requires_grad:
        raise ValueError(f"{name} requires a gradient, expected a constant: only logits are differentiated")


def _check_class_weight(weight: Tensor | None, num_classes: int) -> None:
    if weight is not None:
        _check_tensor("weight", weight, _LOGITS_DTYPES)
        _check_constant("weight", weight)
        if weight.shape != (num_classes,):
            raise ValueError(
                f"weight has shape {tuple(weight.shape)}, expected ({num_classes},), one per class"
            )


def _check_tensors(
    logits: Tensor,
    target: Tensor,
    hierarchy: Hierarchy,
    weight: Tensor | None,
    pixel_weight: Tensor | None,
    upsample: str | None,
) -> None:
    _check_hierarchy(hierarchy)
    num_classes = hierarchy.num_classes
    _check_tensor("logits", logits, _LOGITS_DTYPES)
    _check_tensor("target", target, _TARGET_DTYPES)
    _check_class_weight(weight, num_classes)
    if logits.dim() < 2 or logits.shape[1] != num_classes:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)}, expected (N, C, *spatial) with the C = {num_classes} "
            "classes of hierarchy"
        )
    expected = tuple(logits.shape[:1] + logits.shape[2:])
    if upsample is not None:
        if (
            logits.dim() != 4
            or target.dim() != 3
            or len(target) != len(logits)
            or 0 in target.shape[1:] + logits.shape[2:]
        ):
            raise ValueError(
                f"logits has shape {tuple(logits.shape)} and target {tuple(target.shape)}, expected "
                f"(N, C, h, w) and (N, H, W), none of h, w, H and W 0, for upsample={upsample!r}"
            )
        expected = tuple(target.shape)
    if target.shape != expected:
        raise ValueError(
            f"target has shape {tuple(target.shape)}, expected (N, *spatial) = {expected} "
            f"for logits {tuple(logits.shape)}"
        )
    if pixel_weight is not None:
        _check_tensor("pixel_weight", pixel_weight, _LOGITS_DTYPES)
        _check_constant("pixel_weight", pixel_weight)
        if pixel_weight.shape != expected:
            raise ValueError(
                f"pixel_weight has shape {tuple(pixel_weight.shape)}, expected (N, *spatial) = {expected}"
            )
    for name, tensor in (("target", target), ("weight", weight), ("pixel_weight", pixel_weight)):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"{name} is on {tensor.device}, expected {logits.device} like logits")


def _per_factor(lambdas: float | Sequence[float], hierarchy: Hierarchy) -> tuple[float, ...]:
    factors = hierarchy.num_levels - 1
    values = (float(lambdas),) * factors if isinstance(lambdas, int | float) else tuple(map(float, lambdas))
    if len(values) != factors:
        raise ValueError(
            f"lambdas has {len(values)} values, expected one, or {factors} for {hierarchy.num_levels} levels"
        )
    if not all(0 <= value < math.inf for value in values):
        raise ValueError(f"lambdas is {lambdas!r}, expected finite numbers from 0")
    return values


def _choose_backend(backend: str, device: torch.device) -> str:
    suitable = _ops.preference.get(device.type, ("reference",))
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
    backend: str,
    logits: Tensor,
    target: Tensor,
    pixel_weight: Tensor | None,
    hierarchy: Hierarchy,
    factor_scope: str,
) -> bool:
    """Whether one launch for loss and gradient is there and likely to be faster. Its gradient is that for an
    incoming gradient of 1, and computed again for any other: a loss of float16 is usually scaled."""
    if backend not in _ops.one_launch or logits.dtype == torch.float16:
        return False
    return _ops.operators(backend).fuses(logits, target, pixel_weight, hierarchy.num_levels, factor_scope)


_SECOND_BEST = {"triton": "Triton kernels", "reference": "slow reference, in plain PyTorch"}
_warned: set[str] = set()


def _warn_once(device: str, backend: str) -> None:
    if device in _warned or torch.compiler.is_compiling():
        return
    _warned.add(device)
    reasons = "; ".join(
        f"{name}: {_ops.unavailable[name]}" for name in _ops.kernels(device) if _ops.unavailable[name]
    )
    warnings.warn(f"ial_cuda computes on {device} with its {_SECOND_BEST[backend]} ({reasons})", stacklevel=4)
