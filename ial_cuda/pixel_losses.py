"""The loss of each pixel, -log pi, and the losses that are functions of it: focal, OHEM, poly.

pi is the predicted probability of a pixel's own class. `pixel_nll` computes the map of -log pi in fused
kernels. The losses above it are plain PyTorch on this map, which has a value for each pixel and not for each
class. Their memory and time are therefore small beside those of the logits.
"""

from __future__ import annotations

import math
from typing import Any, SupportsFloat, SupportsIndex

import torch
from torch import Tensor

from . import reference
from .arguments import as_finite, as_float, as_int, as_label
from .calls import (
    FLAT,
    as_image,
    check_plain,
    check_shapes,
    class_values,
    is_transformed,
    of_classes,
    prepare,
    raise_of_labels,
    with_checked_labels,
)
from .dtensor import Shards
from .options import Backend, Options, Reduction, Upsample
from .validation import ClassWeights, check_logits, is_dtensor, is_void


def pixel_nll(
    logits: Tensor,
    target: Tensor,
    weight: ClassWeights | None = None,
    *,
    ignore_index: SupportsIndex = -100,
    label_smoothing: SupportsFloat = 0.0,
    upsample: Upsample | None = None,
    align_corners: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """The negative log-likelihood w_y (-log pi) of each pixel, 0 for void pixels.

    It equals `torch.nn.functional.cross_entropy` with ``reduction="none"``. The forward pass reads the logits
    once and writes the map. The backward pass reads them again and writes their gradient. No other tensor of
    their size is stored. With ``upsample="bilinear"`` the map has the size of ``target``, but the logits and
    their gradient stay coarse.

    Args:
        logits: (N, C, *spatial), float64, float32, float16 or bfloat16, with any strides. A DTensor may be
            sharded by images and by spatial dimensions. ``target`` and the result are then DTensors, too.
        target: (N, *spatial) class indices, int64, int32 or uint8, on the device of ``logits``.
        weight: (C,) class weights w: a tensor, a list or a NumPy array. None means ones.
        ignore_index: the label of void pixels. Their value and their gradient are 0, whatever their logits
            are. It may be a class. The default is that of `torch.nn.functional.cross_entropy`. Most
            segmentation data sets use 255.
        label_smoothing: from 0 to 1, the share of the mean of -log p over all classes with their weights.
        upsample: None, or "bilinear" for coarse ``logits`` (N, C, h, w) with ``target`` (N, H, W), as in
            `importance_aware_loss`. The gradient is summed in a fixed order.
        align_corners: as in `importance_aware_loss`.
        backend: as in `importance_aware_loss`.

    Returns:
        (N, *spatial), contiguous, float64 for float64 logits, else float32.

    Raises:
        ValueError: as in `importance_aware_loss`. A label that is no class raises on the CPU. On CUDA its
            pixel is NaN and has gradient 0.
        TypeError: an argument has a wrong type or dtype.
        RuntimeError: ``backend`` is missing. The message gives the reason and the remedy.
        NotImplementedError: in the backward pass, a gradient of the gradient is requested. Only "reference"
            has one.

    Examples:
        >>> import ial_cuda, torch
        >>> logits = torch.randn(2, 19, 32, 64, requires_grad=True)  # at a quarter of the labels' size
        >>> labels = torch.randint(19, (2, 128, 256))
        >>> nll = ial_cuda.pixel_nll(logits, labels, ignore_index=255, upsample="bilinear")
        >>> nll.shape
        torch.Size([2, 128, 256])
        >>> certainty = torch.rand(2, 128, 256)
        >>> (certainty * nll).mean().backward()  # any weight of each pixel
    """
    options = Options(
        FLAT,
        ignore_index=as_label(ignore_index, "ignore_index"),
        label_smoothing=label_smoothing,
        upsample=upsample,
        align_corners=align_corners,
        backend=backend,
    )
    return compute_pixel_nll(logits, target, weight, None, options)


# torch.fx.symbolic_trace keeps this call as one node: a proxy has nothing that the function could check.
for _function in ("compute_pixel_nll", "compute_focal_loss", "compute_ohem_cross_entropy", "compute_poly1"):
    torch.fx.wrap(_function)


def compute_pixel_nll(
    logits: Tensor,
    target: Tensor,
    weight: ClassWeights | None,
    pixel_weight: Tensor | None,
    options: Options,
    name: str = "logits",
) -> Tensor:
    """`pixel_nll` times ``pixel_weight``, with validated options. Their hierarchy is replaced."""
    check_logits(logits, name)
    if logits.dim() < 2 or logits.shape[1] == 0:
        raise ValueError(f"{name} has shape {tuple(logits.shape)}, expected (N, C, *spatial) with C above 0")
    options = of_classes(options, logits.shape[1])
    if is_dtensor(logits):
        return _of_shards(logits, target, weight, pixel_weight, options, name)
    backend, weights = prepare(logits, target, weight, pixel_weight, options, name)
    target = with_checked_labels(logits, target, backend, options)
    if backend.library is None:
        nll = reference.pixel_nll(logits, target, options, weight=weights)
    else:
        given, rows = target, logits.dim() == 2
        if rows:  # the pixels of one image are faster than images of one pixel
            logits, target, _ = as_image(logits, target, None)
        try:
            nll = backend.operators().pixel_nll(
                logits, target, weights, options.void_label, options.label_smoothing, options.corners
            )
        except ValueError:
            if rows:
                raise_of_labels(given, options.hierarchy.num_classes, options)
            raise
        if rows:
            nll, target = nll.squeeze(0), given
    if pixel_weight is None:
        return nll
    return nll * pixel_weight.to(nll.dtype).masked_fill(is_void(target, options.void_label), 0)


def _of_shards(
    logits: Any,
    target: Tensor,
    weight: ClassWeights | None,
    pixel_weight: Tensor | None,
    options: Options,
    name: str,
) -> Tensor:
    """`compute_pixel_nll` of DTensor logits: each process computes its pixels."""
    check_shapes(logits, target, weight, pixel_weight, options, name)
    shards = Shards(logits, upsample=options.upsample is not None, name=name)
    nll = compute_pixel_nll(*shards.inputs(target, weight, pixel_weight), options, name)
    return shards.whole(nll, shards.pixels, tuple(target.shape))


# ---- losses of the map ----------------------------------------------------------------------------------


def focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: SupportsFloat = 2.0,
    alpha: ClassWeights | None = None,
    ignore_index: SupportsIndex = -100,
    reduction: Reduction = "mean",
    upsample: Upsample | None = None,
    align_corners: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """The focal loss alpha_y (1 - pi)^gamma (-log pi) of a softmax over the classes.

    Lin, Goyal, Girshick, He and Dollar, "Focal Loss for Dense Object Detection", ICCV 2017, Eqs. 4 and 5.
    With ``gamma=0`` it is cross-entropy. Their classes are independent sigmoids. Two classes with logits
    (0, x) and ``alpha=(1 - a, a)`` give their loss of the sigmoid of x.

    Args:
        logits: as in `pixel_nll`.
        target: as in `pixel_nll`.
        gamma: the focusing parameter, at least 0.
        alpha: (C,) class weights: a tensor, a list or a NumPy array. None means ones.
        ignore_index: as in `pixel_nll`.
        reduction: "mean": the summed loss divided by the number of valid pixels, 0 if there are none. "sum":
            the summed loss. "none": the loss of each pixel, 0 for void pixels.
        upsample: as in `pixel_nll`.
        align_corners: as in `pixel_nll`.
        backend: as in `pixel_nll`.

    Returns:
        The loss, (), or the shape of ``target`` with ``reduction="none"``. It is float64 for float64 logits,
            else float32.

    Raises:
        ValueError: as in `pixel_nll`. ``gamma`` is negative or not finite.
        TypeError: as in `pixel_nll`.
        RuntimeError: as in `pixel_nll`.
        NotImplementedError: as in `pixel_nll`.

    Examples:
        >>> import ial_cuda, torch
        >>> logits = torch.randn(1, 3, 16, 16, requires_grad=True)
        >>> labels = torch.randint(3, (1, 16, 16))
        >>> ial_cuda.focal_loss(logits, labels, gamma=2, ignore_index=255).backward()
    """
    exponent = as_finite(gamma, "gamma")
    if exponent < 0:
        raise ValueError(f"gamma is {gamma!r}, expected a number that is at least 0")
    options = _options(ignore_index, reduction, upsample, align_corners, backend)
    return compute_focal_loss(logits, target, exponent, alpha, options)


def compute_focal_loss(
    logits: Tensor, target: Tensor, gamma: float, alpha: ClassWeights | None, options: Options
) -> Tensor:
    """`focal_loss` with validated options."""
    check_plain(logits)
    by_class = _class_values(alpha, "alpha", logits)
    nll = compute_pixel_nll(logits, target, None, None, options)
    losses: Tensor = (_focal if is_transformed() else _Focal.apply)(nll, gamma)
    if by_class is not None:
        losses = losses * _of_labels(by_class, target, options.void_label, losses.dtype)
    return _reduced(losses, options.reduction, ~is_void(target, options.void_label))


def _focal(nll: Tensor, gamma: float) -> Tensor:
    """q^gamma n of a map n = -log pi, with q = 1 - pi. 1 + eps keeps q above 0 and its powers finite."""
    # expm1 can take 15 times as long on the CPU. Where it is better, with pi near 1, the loss is tiny.
    return (1 + torch.finfo(nll.dtype).eps - torch.exp(-nll)) ** gamma * nll


class _Focal(torch.autograd.Function):
    """`_focal` and its derivative, with fewer maps: one is saved, and the operations are in place.

    On the CPU the memory of a new map takes longer than its arithmetic. torch.compile and torch.func get
    `_focal` itself.
    """

    @staticmethod
    def forward(ctx: Any, nll: Tensor, gamma: float) -> Tensor:
        ctx.save_for_backward(nll)
        ctx.gamma = gamma
        q = nll.neg().exp_().neg_().add_(1 + torch.finfo(nll.dtype).eps)
        return q.pow_(gamma).mul_(nll)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (nll,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # the result gets a history of its own
            (result,) = torch.autograd.grad(_focal(nll, ctx.gamma), nll, grad, create_graph=True)
            return result, None
        pi = nll.neg().exp_()
        q = 1 + torch.finfo(nll.dtype).eps - pi
        slope = pi.mul_(nll).mul_(ctx.gamma).add_(q)  # l' = q^(gamma - 1) (q + gamma pi n)
        return q.pow_(ctx.gamma - 1).mul_(slope).mul_(grad), None


def ohem_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: ClassWeights | None = None,
    *,
    thresh: SupportsFloat | None = 0.7,
    min_kept: SupportsIndex | float = 100_000,
    ignore_index: SupportsIndex = -100,
    reduction: Reduction = "mean",
    upsample: Upsample | None = None,
    align_corners: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Cross-entropy of the hard pixels (online hard example mining, OHEM).

    Shrivastava, Gupta and Girshick, CVPR 2016, introduced OHEM. The pixels are chosen as by mmsegmentation's
    ``OHEMPixelSampler``. Sort the valid pixels of the batch by pi. With k pixels to keep, a pixel is hard if
    its pi is below ``thresh``, or below that of pixel k, counted from 0. If there is no pixel k, the last one
    takes its place.

    Args:
        logits: as in `pixel_nll`.
        target: as in `pixel_nll`.
        weight: (C,) class weights, at least 0: a tensor, a list or a NumPy array. None means ones.
        thresh: all pixels with pi below this probability are hard, above 0 and at most 1. None: the k pixels
            with the largest weighted loss are hard. Pixels that are equal to the k-th share its place, so the
            result does not depend on their order.
        min_kept: the number of pixels to keep. An int is the number for each image: the batch keeps
            min_kept * N. A float above 0 and at most 1 is a fraction of the valid pixels, rounded down. It
            reads their number, which synchronises with a GPU, and excludes vmap and fullgraph compilation.
            Logits (M, C) are M images of one pixel: use a fraction there.
        ignore_index: as in `pixel_nll`.
        reduction: "mean": the summed loss divided by the summed weight of the hard pixels, 0 if that is 0.
            "sum": the summed loss. "none": the loss of each pixel, 0 for those that are not hard.
        upsample: as in `pixel_nll`.
        align_corners: as in `pixel_nll`.
        backend: as in `pixel_nll`.

    Returns:
        The loss, (), or the shape of ``target`` with ``reduction="none"``. It is float64 for float64 logits,
            else float32.

    Raises:
        ValueError: as in `pixel_nll`. ``thresh`` or ``min_kept`` is not one of the above.
        TypeError: as in `pixel_nll`.
        RuntimeError: as in `pixel_nll`.
        NotImplementedError: as in `pixel_nll`.

    Examples:
        >>> import ial_cuda, torch
        >>> logits = torch.randn(1, 3, 16, 16, requires_grad=True)
        >>> labels = torch.randint(3, (1, 16, 16))
        >>> ial_cuda.ohem_cross_entropy(logits, labels, min_kept=100).backward()
        >>> hardest = ial_cuda.ohem_cross_entropy(logits, labels, thresh=None, min_kept=0.25)
    """
    if thresh is not None:
        thresh = as_float(thresh, "thresh")
        if not 0 < thresh <= 1:
            raise ValueError(f"thresh is {thresh!r}, expected None or a number above 0 and at most 1")
    number: int | float
    try:
        number = as_int(min_kept, "min_kept")
    except TypeError:
        number = as_float(min_kept, "min_kept")
    if not (0 < number <= 1 if isinstance(number, float) else number >= 0):
        raise ValueError(
            f"min_kept is {min_kept!r}, expected an integer from 0 on, or a float above 0 and at most 1"
        )
    options = _options(ignore_index, reduction, upsample, align_corners, backend)
    return compute_ohem_cross_entropy(logits, target, weight, thresh, number, options)


def compute_ohem_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: ClassWeights | None,
    thresh: float | None,
    min_kept: int | float,
    options: Options,
) -> Tensor:
    """`ohem_cross_entropy` with validated options."""
    check_plain(logits)
    void_label = options.void_label
    by_class = _class_values(weight, "weight", logits)
    nll = losses = compute_pixel_nll(logits, target, None, None, options)
    weights = None
    if by_class is not None:
        weights = _of_labels(by_class, target, void_label, nll.dtype)
        losses = nll * weights
    with torch.no_grad():
        if isinstance(min_kept, float):
            keep = int(min_kept * int(_count(~is_void(target, void_label))))
        else:
            keep = min_kept * target.shape[0]
        if thresh is None:
            hard = _hardest(losses, target, void_label, keep)
        else:
            hard = _below(nll, target, void_label, thresh, keep)
    return _reduced(losses * hard, options.reduction, hard if weights is None else weights * hard)


# In the helpers, void pixels have loss 0, like the easiest pixels. No mask of them is kept beside the maps of
# `_kth_largest`.


def _below(nll: Tensor, target: Tensor, void_label: int, thresh: float, keep: int) -> Tensor:
    """1 if a pixel's pi is below ``thresh``, or below that of the ``keep``-th pixel from the hardest, else 0.

    That pixel is counted from 0. If there are fewer valid pixels, it is the easiest one.
    """
    if nll.numel() == 0:
        return torch.zeros_like(nll)
    limit = nll.masked_fill(is_void(target, void_label), torch.inf).amin()
    if keep < nll.numel():
        limit = limit.maximum(_kth_largest(nll, keep + 1))
    return (nll > limit.clamp(max=-math.log(thresh))).to(nll.dtype)


def _hardest(losses: Tensor, target: Tensor, void_label: int, keep: int) -> Tensor:
    """1 for the ``keep`` largest losses of valid pixels, else 0. Pixels equal to the last share its place."""
    keep = min(keep, losses.numel())
    if keep == 0:
        return torch.zeros_like(losses)
    last = _kth_largest(losses, keep)
    larger, equal = losses > last, (losses == last) & ~is_void(target, void_label)
    share = (keep - _count(larger)).to(losses.dtype) / _count(equal).clamp(min=1)
    return torch.where(equal, share.clamp(max=1), larger.to(losses.dtype))


def _kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of non-negative numbers."""
    values = values.flatten()
    if values.is_cuda:  # kthvalue uses a single block there
        return values.topk(k, sorted=False).values.amin()
    if values.device.type == "cpu" and not is_transformed():  # it needs numbers of values
        values, k = _with_the_same_digit(values, k)
    return values.kthvalue(values.numel() - k + 1).values


def _with_the_same_digit(values: Tensor, k: int) -> tuple[Tensor, int]:
    """The values whose upper 16 bits are those of the k-th largest, and its place among them.

    The bits of non-negative floats are ordered as the floats are. A histogram of the upper ones finds the few
    candidates in a fifth of the time of kthvalue, and without its map of indices.
    """
    bits = 8 * values.itemsize
    digits = values.view(torch.int64 if bits == 64 else torch.int32) >> (bits - 16)
    digits &= 0x7FFF  # -0.0 and NaN may have a sign
    from_top = digits.bincount(minlength=1 << 15).flip(0).cumsum(0)
    place = int((from_top < k).count_nonzero())
    above = int(from_top[place - 1]) if place > 0 else 0
    return values[digits == (1 << 15) - 1 - place], k - above


def poly1_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: ClassWeights | None = None,
    *,
    epsilon: SupportsFloat = 1.0,
    ignore_index: SupportsIndex = -100,
    reduction: Reduction = "mean",
    upsample: Upsample | None = None,
    align_corners: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """The Poly-1 loss w_y (-log pi + epsilon (1 - pi)).

    Leng, Tan, Liu, Cubuk, Shi, Cheng and Anguelov, "PolyLoss", ICLR 2022, Eq. 5. With ``epsilon=0`` it is
    cross-entropy.

    Args:
        logits: as in `pixel_nll`.
        target: as in `pixel_nll`.
        weight: (C,) class weights: a tensor, a list or a NumPy array. None means ones.
        epsilon: the factor of the first polynomial term.
        ignore_index: as in `pixel_nll`.
        reduction: "mean": the summed loss divided by the summed weight of the valid pixels, 0 if that is 0.
            "sum": the summed loss. "none": the loss of each pixel, 0 for void pixels.
        upsample: as in `pixel_nll`.
        align_corners: as in `pixel_nll`.
        backend: as in `pixel_nll`.

    Returns:
        The loss, (), or the shape of ``target`` with ``reduction="none"``. It is float64 for float64 logits,
            else float32.

    Raises:
        ValueError: as in `pixel_nll`. ``epsilon`` is not finite.
        TypeError: as in `pixel_nll`.
        RuntimeError: as in `pixel_nll`.
        NotImplementedError: as in `pixel_nll`.

    Examples:
        >>> import ial_cuda, torch
        >>> logits = torch.randn(1, 3, 16, 16, requires_grad=True)
        >>> labels = torch.randint(3, (1, 16, 16))
        >>> ial_cuda.poly1_cross_entropy(logits, labels, epsilon=1).backward()
    """
    factor = as_finite(epsilon, "epsilon")
    options = _options(ignore_index, reduction, upsample, align_corners, backend)
    return compute_poly1(logits, target, weight, factor, options)


def compute_poly1(
    logits: Tensor, target: Tensor, weight: ClassWeights | None, epsilon: float, options: Options
) -> Tensor:
    """`poly1_cross_entropy` with validated options."""
    check_plain(logits)
    by_class = _class_values(weight, "weight", logits)
    nll = compute_pixel_nll(logits, target, None, None, options)
    losses = nll + epsilon * (1 - torch.exp(-nll))
    counted = ~is_void(target, options.void_label)
    if by_class is not None:
        counted = _of_labels(by_class, target, options.void_label, nll.dtype)
        losses = losses * counted
    return _reduced(losses, options.reduction, counted)


# ---- options, class weights and reductions --------------------------------------------------------------


def _options(
    ignore_index: SupportsIndex,
    reduction: Reduction,
    upsample: Upsample | None,
    align_corners: bool,
    backend: Backend,
) -> Options:
    return Options(
        FLAT,
        ignore_index=as_label(ignore_index, "ignore_index"),
        reduction=reduction,
        upsample=upsample,
        align_corners=align_corners,
        backend=backend,
    )


def _class_values(values: ClassWeights | None, name: str, logits: Tensor) -> Tensor | None:
    """A value for each class, (C,), on the logits' device."""
    check_logits(logits)
    checked = class_values(values, logits.shape[1] if logits.dim() > 1 else None, logits, "logits", name)
    if checked is not None and checked.device != logits.device:
        raise ValueError(f"{name} is on {checked.device}, expected {logits.device} like logits")
    return checked


def _of_labels(by_class: Tensor, target: Tensor, void_label: int, dtype: torch.dtype) -> Tensor:
    """The value of each pixel's class, 0 for labels that are void or no class."""
    classes, labels = len(by_class), target.long()
    is_class = (labels >= 0) & (labels < classes) & (labels != void_label)
    table = torch.cat([by_class.to(dtype), by_class.new_zeros(1, dtype=dtype)])
    return table[labels.where(is_class, classes)]


def _reduced(losses: Tensor, reduction: Reduction, counted: Tensor) -> Tensor:
    """``counted``: what each pixel adds to the divisor of the mean, a number or whether it counts."""
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    total = (_count(counted) if counted.dtype == torch.bool else counted.sum()).to(losses.dtype)
    return losses.sum() * torch.where(total != 0, 1 / total, 0)


def _count(mask: Tensor) -> Tensor:
    """The number of true elements. `sum` copies the mask to int64, but has a batching rule in torch 2.11."""
    return mask.sum() if is_transformed() else mask.count_nonzero()
