"""The loss as a function: checks its arguments, chooses a backend and calls its operators."""

from __future__ import annotations

import os
from typing import Any, Literal, NamedTuple, SupportsFloat, SupportsIndex, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import backends, reference
from .hierarchy import Hierarchy, HierarchyLike
from .options import (
    Backend,
    FactorNormalization,
    FactorScope,
    Gradient,
    Lambdas,
    OptionArguments,
    Options,
    Reduction,
    Upsample,
)
from .validation import ClassWeights, check_inplace, check_inputs, check_logits, checked_target, class_weight
from .warn import warn


class Components(NamedTuple):
    """The parts of the loss, detached, for logging. g levels, least important first; t < g - 1.

    With ``factor_scope="batch"`` the factors are those of the whole batch, (1, g-1).
    """

    f: Tensor  #: (N, g-1) f_t of Eq. 3
    F: Tensor  #: (N, g-1) importance factors f_t + alpha
    S: Tensor  #: (N, g) weighted cross-entropy of each level, w'l of Eqs. 1 and 2
    count: Tensor  # type: ignore[assignment]  #: (N, g) valid pixels of each level; not the tuple's method


@overload
def importance_aware_loss(
    logits: Tensor,
    target: Tensor,
    hierarchy: HierarchyLike,
    *,
    weight: ClassWeights | None = ...,
    pixel_weight: Tensor | None = ...,
    return_components: Literal[False] = ...,
    **options: Unpack[OptionArguments],
) -> Tensor: ...
@overload
def importance_aware_loss(
    logits: Tensor,
    target: Tensor,
    hierarchy: HierarchyLike,
    *,
    weight: ClassWeights | None = ...,
    pixel_weight: Tensor | None = ...,
    return_components: Literal[True],
    **options: Unpack[OptionArguments],
) -> tuple[Tensor, Components]: ...
@overload
def importance_aware_loss(
    logits: Tensor,
    target: Tensor,
    hierarchy: HierarchyLike,
    *,
    weight: ClassWeights | None = ...,
    pixel_weight: Tensor | None = ...,
    return_components: bool,
    **options: Unpack[OptionArguments],
) -> Tensor | tuple[Tensor, Components]: ...
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

    S_k is the sum of the weighted cross-entropy over the pixels of level k. f_t is the sum of
    1/2 (M_t + lambda_t) (pi - M_t)^2 / Z_t over the pixels of level t and above, where pi is the probability
    of a pixel's own class and M_t is 0 at level t and 1 above. The loss of an image is

        IAL = S_0 + (f_0 + alpha) (S_1 + (f_1 + alpha) (S_2 + ...))                             (Eqs. 1 to 8).

    A hierarchy of one level gives `torch.nn.functional.cross_entropy` with ``weight`` and ``ignore_index``.

    Args:
        logits: (N, C, *spatial) of any spatial rank, float64, float32, float16 or bfloat16. Any strides
            are read without a copy; contiguous and channels_last tensors are the fastest. Half precision is
            computed in float32. Logits (M, C) are M images of one pixel each, and slower than (1, C, M): see
            ``factor_scope``.
        target: (N, *spatial) class indices, int64, int32 or uint8, on the device of ``logits``.
        hierarchy: the levels of the C classes, least important first: anything that `Hierarchy.of` takes,
            such as the name of a preset, nested lists, or a number of classes for one level.
        weight: (C,) class weights w of Eq. 2, a tensor of a floating dtype, a list or a NumPy array; ones if
            None. `median_frequency_weights` computes them.
        pixel_weight: (N, *spatial), multiplies the weight of each pixel; ones if None. Like ``weight`` it
            enters S_k and the divisor of the mean, not f_t.
        alpha: added to every f_t. Numbers may be Python's, NumPy's or 0-d tensors.
        lambdas: lambda_t of Eq. 3, one for all or one for each of the g - 1 factors, not negative.
        ignore_index: pixels with this label take no part, and their gradient is 0. It may be a class, which
            then takes no part. None means the hierarchy's own ``ignore_index``, else 255; it is an error
            where 255 is a class.
        reduction: "mean": the sum of the images' losses, divided by the summed weight of the valid pixels (0
            where that is 0); "sum"; "none": one loss for each image.
        factor_normalization: "mean": Z_t is the number of pixels that f_t compares; "sum": Z_t = 1, Eq. 3
            literally, which grows with the image.
        factor_scope: "image": f_t of each image; "batch": one f_t over all pixels of the batch. For logits
            (M, C) of the M pixels of one image use "batch", or the shape (1, C, M).
        gradient: "exact": the derivative; "paper": Eqs. 9 to 19 literally, which leave out the derivative of
            pi by the logits of other classes (Eq. 15).
        upsample: None, or "bilinear" for coarse ``logits`` (N, C, h, w) with ``target`` and ``pixel_weight``
            (N, H, W) of any size. The loss is that of `torch.nn.functional.interpolate(logits, (H, W),
            mode="bilinear")`, but the kernels interpolate each pixel when they read it, so that no logits of
            full size are stored. The gradient is summed at coarse size in a fixed order. A coarse logit of
            weight 0 takes no part; `interpolate` turns an infinite one into NaN.
        align_corners: how ``upsample`` places the pixels, as in `interpolate`.
        backend: "auto" (the best for the device of ``logits``), "cuda", "triton", "cpu" or "reference".
            ``python -m ial_cuda info`` lists which there are.
        inplace: lets the backward pass write the gradient over ``logits``, which saves a tensor of their
            size. A later backward pass that needs the old logits raises. "reference", torch.compile,
            torch.func and backward passes with ``create_graph`` leave the logits as they are.
        return_components: return ``(loss, Components)``.
        process_group: None; sums over processes are not in this version.

    Returns:
        The loss, () or with ``reduction="none"`` (N,); float64 for float64 logits, else float32.

    Raises:
        ValueError: a shape, a device or an option is not one of the above; on the CPU, a label outside [0, C)
            that is not ``ignore_index``. On CUDA such a pixel takes no part and makes the loss NaN; with
            IAL_CUDA_DEBUG=1 in the environment it is the same error, and the call synchronises. So it does
            under torch.compile.
        TypeError: an argument of a wrong type or dtype.
        RuntimeError: ``backend`` is missing; the message has the reason and the remedy.
        NotImplementedError: ``process_group`` is given. In the backward pass: a gradient of the gradient is
            needed, which only "reference" has, and not under torch.compile.
    """
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
    return compute_loss(logits, target, weight, pixel_weight, options)


# torch.fx.symbolic_trace leaves this call as it is: what it checks is not known of a proxy.
torch.fx.wrap("compute_loss")


def compute_loss(
    logits: Tensor,
    target: Tensor,
    weight: ClassWeights | None,
    pixel_weight: Tensor | None,
    options: Options,
) -> Tensor | tuple[Tensor, Components]:
    """`importance_aware_loss` with validated options."""
    levels = options.hierarchy.class_levels
    class_weights = class_weight(weight, len(levels))
    if class_weights is not None and class_weights is not weight:  # lists and arrays are on no device
        class_weights = class_weights.to(logits.device)
    coarse = options.upsample is not None
    check_inputs(logits, target, class_weights, pixel_weight, len(levels), upsample=coarse)
    # torch.compile plans memory itself, and the transforms of torch.func have their own levels to write into.
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    inplace = options.inplace and not transformed
    if inplace:
        check_inplace(logits, target, class_weights, pixel_weight)
    if logits.dim() == 2:
        _warn_of_rows(logits, options)
    backend = backends.choose(options.backend, logits.device)
    if (os.environ.get("IAL_CUDA_DEBUG") == "1") if logits.is_cuda else backend.library is None:
        target = checked_target(target, len(levels), options.void_label)

    if backend.library is None:
        loss, f, S, count = reference.importance_aware_loss(
            logits, target, options, weight=class_weights, pixel_weight=pixel_weight
        )
    else:
        operators = backend.operators()
        pixels = (logits, target, class_weights, pixel_weight, levels, options.void_label, options.gradient)
        # One launch computes the gradient of one value with the loss, for a backward pass to come, and leaves
        # the logits as they are.
        if (
            backend.one_launch is not False
            and logits.requires_grad
            and torch.is_grad_enabled()
            and not (inplace or coarse or transformed)
            and options.reduction != "none"
            and (
                backend.one_launch
                or _is_faster_in_one_launch(operators, logits, target, pixel_weight, options)
            )
        ):
            loss, f, stats, *_ = operators.loss_and_grad(*pixels, *options.combine_arguments)
        else:
            stats = operators.reduce(*pixels, inplace, options.corners)
            dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
            loss, f = operators.combine(stats, *options.combine_arguments, dtype)
        if options.return_components:
            S, count = stats[..., 0].to(loss.dtype), stats[..., 3].to(torch.int64)
            f = f.to(loss.dtype)
    if not options.return_components:
        return loss
    f = f.detach()
    return loss, Components(f, f + options.alpha, S.detach(), count)


def _is_faster_in_one_launch(
    operators: Any, logits: Tensor, target: Tensor, pixel_weight: Tensor | None, options: Options
) -> bool:
    """Whether one launch can compute loss and gradient, and is likely to be faster. Its gradient is that for
    an incoming gradient of 1 and is recomputed for any other: a loss of float16 logits is usually scaled."""
    if logits.dtype == torch.float16:
        return False
    levels = options.hierarchy.num_levels
    return bool(operators.fits_on_chip(logits, target, pixel_weight, levels, options.factor_scope))


def _warn_of_rows(logits: Tensor, options: Options) -> None:
    if torch.compiler.is_compiling() or logits.shape[0] < 2:
        return
    if options.hierarchy.num_levels > 1 and options.factor_scope == "image":
        warn(
            f"logits has shape {tuple(logits.shape)}: each row is an image of one pixel, with factors of its "
            'own; for rows that are pixels of one image pass factor_scope="batch", or logits (1, C, M) and '
            "target (1, M)"
        )


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
    """Cross-entropy of coarse logits at the size of the target, without storing logits of that size:

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
