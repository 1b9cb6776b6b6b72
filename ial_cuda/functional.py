"""The loss as a function: checks its arguments, chooses a backend and calls its operators."""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from typing import Literal, NamedTuple, SupportsFloat, SupportsIndex, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import backends, reference
from .arguments import as_label
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
from .validation import (
    ClassWeights,
    Divisor,
    check_inplace,
    check_inputs,
    check_logits,
    check_one_image,
    checked_target,
    class_weight,
    mean_divisor,
    validate_target,
)
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
    divisor: Divisor | None = ...,
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
    divisor: Divisor | None = ...,
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
    divisor: Divisor | None = ...,
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
    divisor: Divisor | None = None,
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
            computed in float32. Logits (M, C) are M images of one pixel each: see ``factor_scope``.
        target: (N, *spatial) class indices, int64, int32 or uint8, on the device of ``logits``.
        hierarchy: the levels of the C classes, least important first: anything that `Hierarchy.of` takes,
            such as the name of a preset, nested lists, or a number of classes for one level.
        weight: (C,) class weights w of Eq. 2, a tensor of a floating dtype, a list or a NumPy array; ones if
            None. `median_frequency_weights` computes them.
        pixel_weight: (N, *spatial), multiplies the weight of each pixel; ones if None. Like ``weight`` it
            enters S_k and the divisor of the mean, not f_t.
        divisor: what ``reduction="mean"`` divides by instead of the weight of the valid pixels: a number from
            0 or a 0-d tensor, such as the pixels of all accumulated batches. Where it is 0 the loss is 0. It
            is a constant, and nothing waits for a tensor's value.
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
        label_smoothing: from 0 to 1, as in `torch.nn.functional.cross_entropy`: -log pi in S_k becomes a mean
            over the classes with this share. f_t stays that of the target's probability.
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
        grad_in_forward: lets the forward pass compute the gradient with the loss where that saves a pass over
            the logits, which it does with one level. The gradient is then in memory until the backward pass:
            with several losses in a step, the gradients of all at once. It is that of an incoming gradient of
            1, and computed again for another; the modules learn which one comes in. False leaves it to the
            backward pass.
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
        label_smoothing=label_smoothing,
        upsample=upsample,
        align_corners=align_corners,
        backend=backend,
        inplace=inplace,
        grad_in_forward=grad_in_forward,
        return_components=return_components,
        process_group=process_group,
    )
    return compute_loss(logits, target, weight, pixel_weight, divisor, options)


# torch.fx.symbolic_trace leaves this call as it is: what it checks is not known of a proxy.
torch.fx.wrap("compute_loss")


def compute_loss(
    logits: Tensor,
    target: Tensor,
    weight: ClassWeights | None,
    pixel_weight: Tensor | None,
    divisor: Divisor | None,
    options: Options,
    expected: ExpectedGradient | None = None,
    name: str = "logits",
) -> Tensor | tuple[Tensor, Components]:
    """`importance_aware_loss` with validated options. ``name``: what the caller calls ``logits``."""
    levels = options.hierarchy.class_levels
    class_weights = _weights_beside(logits, weight, len(levels), name)
    coarse = options.upsample is not None
    check_inputs(logits, target, class_weights, pixel_weight, len(levels), upsample=coarse, name=name)
    total = None if divisor is None else mean_divisor(divisor, options.reduction, logits.device, name)
    transformed = _is_transformed()
    inplace = options.inplace and not transformed
    if inplace:
        check_inplace(logits, target, class_weights, pixel_weight, name=name)
    if logits.dim() == 2:
        _warn_of_rows(logits, options)
    backend = backends.choose(options.backend, logits.device)
    if (os.environ.get("IAL_CUDA_DEBUG") == "1") if logits.is_cuda else backend.library is None:
        target = checked_target(target, len(levels), options.void_label)

    if backend.library is None:
        loss, f, S, count = reference.importance_aware_loss(
            logits, target, options, weight=class_weights, pixel_weight=pixel_weight, divisor=total
        )
    else:
        given, rows = target, logits.dim() == 2 and _is_one_image(options)
        if rows:
            logits, target, pixel_weight = _as_image(logits, target, pixel_weight)
        in_training = logits.requires_grad and torch.is_grad_enabled()
        # loss_and_grad has one loss, and writes the gradient to memory of its own.
        in_forward = (
            in_training
            and options.grad_in_forward
            and options.reduction != "none"
            and not (inplace or transformed)
        )
        state = expected.on(logits.device) if in_forward and expected is not None else None
        tensors = (logits, target, class_weights, pixel_weight)
        try:
            loss, f, stats = _call_operators(backend, tensors, total, options, inplace, in_forward, state)
        except ValueError:
            if rows:
                _raise_of_labels(given, len(levels), options)
            raise
        if options.return_components:
            S, count = stats[..., 0].to(loss.dtype), stats[..., 3].to(torch.int64)
            f = f.to(loss.dtype)
    if not options.return_components:
        return loss
    f = f.detach()
    return loss, Components(f, f + options.alpha, S.detach(), count)


def _call_operators(
    backend: backends.Backend,
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    divisor: Tensor | None,
    options: Options,
    inplace: bool,
    in_forward: bool,
    expected: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, f_t (N or 1, g-1) and the sums (N, g, 5). ``in_forward``: whether the gradient may be
    computed now."""
    operators, logits = backend.operators(), tensors[0]
    pixels = (
        *tensors,
        *(options.hierarchy.class_levels, options.void_label, options.gradient, options.label_smoothing),
    )
    if in_forward:
        loss, f, stats, *_ = operators.loss_and_grad(
            *pixels, divisor, *options.combine_arguments, options.corners, expected, backend.one_launch
        )
    else:
        stats = operators.reduce(*pixels, inplace, options.corners)
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        loss, f = operators.combine(stats, divisor, *options.combine_arguments, dtype)
    return loss, f, stats


def _weights_beside(logits: Tensor, weight: ClassWeights | None, classes: int, name: str) -> Tensor | None:
    weights = class_weight(weight, classes)
    if weights is None or weights is weight:  # a tensor on another device is an error of check_inputs
        return weights
    check_logits(logits, name)
    return weights.to(logits.device)


def _is_transformed() -> bool:
    """Whether the operators are traced or transformed. torch.compile plans memory itself, the transforms of
    torch.func have their own levels to write into, and a trace must not hold a gradient."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _is_one_image(options: Options) -> bool:
    """Whether the rows of logits (M, C) may be the pixels of one image, which is faster than M images: their
    factors are the same or there are none, and no result has a value for each image."""
    shared = options.hierarchy.num_levels == 1 or options.factor_scope == "batch"
    return shared and options.reduction != "none" and not options.return_components


def _as_image(
    logits: Tensor, target: Tensor, pixel_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows (M, C) as the pixels of an image (1, C, M), a view."""
    weights = None if pixel_weight is None else pixel_weight.unsqueeze(0)
    return logits.t().unsqueeze(0), target.unsqueeze(0), weights


def _raise_of_labels(target: Tensor, classes: int, options: Options) -> None:
    """Raises for bad labels on the CPU, with their positions in the target as it was given."""
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        validate_target(target, classes, options.void_label)


class ExpectedGradient:
    """The incoming gradient that a module's loss is likely to get, kept on the device of the logits.

    A loss is scaled by the same number at every step, by a GradScaler or a weight of its own. The gradient
    that the forward pass computes is for the number that came in last twice in a row, 1 at first.
    """

    def __init__(self) -> None:
        self.states: dict[torch.device, Tensor] = {}  #: (2,) float64: the expected one, and the last one

    def on(self, device: torch.device) -> Tensor:
        if device not in self.states:
            self.states[device] = torch.ones(2, dtype=torch.float64, device=device)
        return self.states[device]

    def __reduce__(self) -> tuple[type[ExpectedGradient], tuple[()]]:
        """Copies and pickles learn anew: their device may be another one, or not be there."""
        return ExpectedGradient, ()

    def __fx_create_arg__(self, tracer: torch.fx.Tracer) -> torch.fx.Node:
        """One of its own at each call of a traced graph."""
        return tracer.create_node("call_function", ExpectedGradient, (), {})


def _warn_of_rows(logits: Tensor, options: Options) -> None:
    if torch.compiler.is_compiling() or logits.shape[0] < 2:
        return
    if options.hierarchy.num_levels > 1 and options.factor_scope == "image":
        warn(
            f"logits has shape {tuple(logits.shape)}: each row is an image of one pixel, with factors of its "
            'own; for rows that are pixels of one image pass factor_scope="batch", or logits (1, C, M) and '
            "target (1, M)"
        )


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: ClassWeights | None = None,
    ignore_index: SupportsIndex = -100,
    reduction: Reduction = "mean",
    label_smoothing: SupportsFloat = 0.0,
    *,
    pixel_weight: Tensor | None = None,
    divisor: Divisor | None = None,
    upsample: Upsample | None = None,
    align_corners: bool = False,
    backend: Backend = "auto",
    inplace: bool = False,
    grad_in_forward: bool = True,
) -> Tensor:
    """`torch.nn.functional.cross_entropy` for class indices, of logits at full size or coarse ones.

    The loss and the gradient are computed in one pass over the logits. With ``upsample`` they are those of

        F.cross_entropy(F.interpolate(input, target.shape[1:], mode="bilinear"), target, ...)

    without logits of that size in memory.

    Args:
        input: logits (N, C, *spatial), or of one image (C,), or (C, *spatial) with two spatial dimensions or
            more; float64, float32, float16 or bfloat16. Where a shape has both meanings, the first dimension
            is N.
        target: class indices (N, *spatial), (N,), (*spatial) or (), int64, int32 or uint8.
        weight: (C,) class weights, a tensor, a list or a NumPy array; ones if None.
        ignore_index: pixels with this label take no part. It may be a class. The void label of most
            segmentation data, 255, is not the default.
        reduction: "mean": over the weight of the valid pixels; "sum"; "none": the loss of each pixel, 0 where
            it is ignored. "none" is computed in plain PyTorch, at full size.
        label_smoothing: from 0 to 1, the share of a mean over all classes, with their weights.
        pixel_weight: the shape of ``target``, multiplies the weight of each pixel; ones if None.
        divisor: what "mean" divides by instead of the weight of the valid pixels: a number from 0 or a 0-d
            tensor. Where it is 0 the loss is 0.
        upsample: None, or "bilinear" for coarse ``input`` (N, C, h, w) with ``target`` (N, H, W).
        align_corners, backend, inplace, grad_in_forward: as in `importance_aware_loss`. The last two have no
            effect with ``reduction="none"``.

    Returns:
        The loss, () or with ``reduction="none"`` the shape of ``target``; float64 for float64 logits, else
        float32.

    Raises:
        What `importance_aware_loss` raises. Unlike `F.cross_entropy`, a mean without a valid pixel is 0, not
        NaN, and a label that is no class is a ValueError on the CPU and a NaN on CUDA.

    >>> loss = cross_entropy(logits, labels, weight, ignore_index=255)
    >>> loss = cross_entropy(head(features), labels, upsample="bilinear")
    """
    options = Options(
        FLAT,
        ignore_index=as_label(ignore_index, "ignore_index"),
        reduction=reduction,
        label_smoothing=label_smoothing,
        upsample=upsample,
        align_corners=align_corners,
        backend=backend,
        inplace=inplace,
        grad_in_forward=grad_in_forward,
    )
    return compute_cross_entropy(input, target, weight, pixel_weight, divisor, options)


#: The hierarchy of options that wait for the number of classes.
FLAT = Hierarchy.flat(1)

torch.fx.wrap("compute_cross_entropy")


def compute_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: ClassWeights | None,
    pixel_weight: Tensor | None,
    divisor: Divisor | None,
    options: Options,
    expected: ExpectedGradient | None = None,
) -> Tensor:
    """`cross_entropy` with validated options, whose hierarchy is replaced by one of the logits' classes."""
    check_logits(input, "input")
    if input.dim() == 0:
        raise ValueError("input has shape (), expected (N, C, *spatial), (C, *spatial) or (C,)")
    if _is_unbatched(input, target, options):
        return _of_one_image(input, target, weight, pixel_weight, divisor, options, expected)
    of_classes = _of_classes if torch.compiler.is_compiling() else _cached_of_classes
    options = of_classes(options, input.shape[1])
    if options.reduction == "none":
        return _pixel_losses(input, target, weight, pixel_weight, divisor, options)
    loss = compute_loss(input, target, weight, pixel_weight, divisor, options, expected, "input")
    assert isinstance(loss, Tensor)
    return loss


def _is_unbatched(input: Tensor, target: object, options: Options) -> bool:
    """Whether the logits are those of one image, without the dimension N. Two dimensions are (N, C)."""
    if input.dim() <= 2 or not isinstance(target, Tensor):
        return input.dim() == 1
    if options.upsample is not None:
        return input.dim() == 3 and target.dim() == 2
    # In this order: the other one makes torch.export guard that N is not C.
    return target.shape != input.shape[:1] + input.shape[2:] and target.shape == input.shape[1:]


def _of_one_image(
    input: Tensor,
    target: Tensor,
    weight: ClassWeights | None,
    pixel_weight: Tensor | None,
    divisor: Divisor | None,
    options: Options,
    expected: ExpectedGradient | None,
) -> Tensor:
    """`compute_cross_entropy` of logits (C,) or (C, *spatial)."""
    check_one_image(input, target, pixel_weight, upsample=options.upsample is not None)
    if pixel_weight is not None:
        pixel_weight = pixel_weight.unsqueeze(0)
    try:
        loss = compute_cross_entropy(
            input.unsqueeze(0), target.unsqueeze(0), weight, pixel_weight, divisor, options, expected
        )
    except ValueError:
        _raise_of_labels(target, input.shape[0], options)
        raise
    return loss.squeeze(0) if options.reduction == "none" else loss


def _of_classes(options: Options, classes: int) -> Options:
    return replace(options, hierarchy=Hierarchy.flat(classes))


_cached_of_classes = functools.lru_cache(_of_classes)  # which Dynamo warns of


def _pixel_losses(
    input: Tensor,
    target: Tensor,
    weight: ClassWeights | None,
    pixel_weight: Tensor | None,
    divisor: Divisor | None,
    options: Options,
) -> Tensor:
    """The loss of each pixel, (N, *spatial), in plain PyTorch on every backend."""
    classes = options.hierarchy.num_classes
    class_weights = _weights_beside(input, weight, classes, "input")
    coarse = options.upsample is not None
    check_inputs(input, target, class_weights, pixel_weight, classes, upsample=coarse, name="input")
    if divisor is not None:
        mean_divisor(divisor, options.reduction, input.device, "input")
    backends.choose(options.backend, input.device)
    if not input.is_cuda or os.environ.get("IAL_CUDA_DEBUG") == "1":
        target = checked_target(target, classes, options.void_label)
    rows = input.dim() == 2
    if rows:
        input, target, pixel_weight = _as_image(input, target, pixel_weight)
    losses = reference.cross_entropy(input, target, options, weight=class_weights, pixel_weight=pixel_weight)
    return losses.squeeze(0) if rows else losses
