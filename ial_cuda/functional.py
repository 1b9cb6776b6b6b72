"""The loss as a function: checks its arguments, chooses a backend and calls its operators."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, SupportsFloat, SupportsIndex, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import backends, distributed, reference
from .arguments import as_label
from .calls import (
    FLAT,
    as_image,
    check_shapes,
    is_debugging,
    is_transformed,
    of_classes,
    pixel_arguments,
    prepare,
    raise_of_labels,
    with_checked_labels,
)
from .distributed import Group, Split
from .dtensor import Shards
from .hierarchy import HierarchyLike
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
from .pixel_losses import compute_pixel_nll
from .statistics import level_sums
from .validation import (
    ClassWeights,
    Divisor,
    check_inplace,
    check_logits,
    check_one_image,
    is_dtensor,
    mean_divisor,
)
from .warn import warn


class Components(NamedTuple):
    """The parts of the loss, detached from the graph, for logging.

    There are N images and g levels, the least important level first, and t < g - 1. With
    ``factor_scope="batch"`` the images share their factors: f and F are (1, g-1).

    Attributes:
        f: (N, g-1) f_t of Eq. 3.
        F: (N, g-1) importance factors f_t + alpha.
        S: (N, g) weighted cross-entropy of each level, w'l of Eqs. 1 and 2.
        count: (N, g) number of valid pixels of each level, int64.

    Examples:
        >>> import ial_cuda, torch
        >>> logits, target = torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
        >>> _, parts = ial_cuda.importance_aware_loss(logits, target, [[1, 2], [0]], return_components=True)
        >>> parts.count
        tensor([[ 0, 16]])
    """

    f: Tensor
    F: Tensor
    S: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count


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
    process_group: Group | None = None,
    spatial_group: Group | None = None,
) -> Tensor | tuple[Tensor, Components]:
    """The Importance-Aware Loss of Chen, Gong and Yang (IJCAI 2017), with its gradient for ``logits``.

    S_k is the sum of the weighted cross-entropy over the pixels of level k. f_t is the sum of
    1/2 (M_t + lambda_t) (pi - M_t)^2 / Z_t over the pixels of level t and above. There pi is the predicted
    probability of the pixel's own class, and M_t is 0 at level t and 1 above. The loss of an image is

        IAL = S_0 + (f_0 + alpha) (S_1 + (f_1 + alpha) (S_2 + ...))                             (Eqs. 1 to 8)

    With one level it equals `torch.nn.functional.cross_entropy` with ``weight`` and ``ignore_index``.

    Args:
        logits: (N, C, *spatial) of any spatial rank, float64, float32, float16 or bfloat16. All strides are
            read without a copy. Contiguous and channels_last tensors are the fastest. Half precision is
            computed in float32. Logits (M, C) are M images of one pixel each: see ``factor_scope``. A DTensor
            may be sharded by images and by spatial dimensions. ``target`` and ``pixel_weight`` are then
            DTensors, too, and the loss is one: a replica, or sharded by images with ``reduction="none"``.
        target: (N, *spatial) class indices, int64, int32 or uint8, on the device of ``logits``.
        hierarchy: the levels of the C classes, the least important level first. It takes everything that
            `Hierarchy.of` takes: the name of a preset, nested lists, or a number of classes for one level.
        weight: (C,) class weights w of Eq. 2: a tensor of a floating dtype, a list or a NumPy array. None
            means ones. `median_frequency_weights` computes them.
        pixel_weight: (N, *spatial) tensor of a floating dtype that multiplies the weight of each pixel. None
            means ones. Like ``weight`` it applies to S_k and to the divisor of the mean, not to f_t.
        divisor: replaces the summed weight of the valid pixels as the divisor of ``reduction="mean"``: a
            non-negative number or a 0-d tensor, such as the number of pixels of all accumulated batches. The
            loss is 0 if it is 0. It is a constant. A tensor is read without a synchronisation.
        alpha: added to every f_t. All numbers may be Python or NumPy numbers or 0-d tensors.
        lambdas: lambda_t of Eq. 3, at least 0: one number for all factors, or one for each of the g - 1.
        ignore_index: the label of void pixels. They are left out of the loss and have gradient 0. It may be
            a class, which is then left out. None means the hierarchy's own ``ignore_index``, else 255. It is
            an error if 255 is a class.
        reduction: "mean": the summed loss of the images divided by the summed weight of the valid pixels,
            or 0 if that weight is 0. "sum": the summed loss. "none": one loss for each image.
        factor_normalization: "mean": Z_t is the number of pixels in the sum of f_t. "sum": Z_t = 1, as in
            Eq. 3, so f_t grows with the image.
        factor_scope: "image": f_t of each image. "batch": one f_t over all pixels of the batch. For logits
            (M, C) of the M pixels of one image use "batch", or the shape (1, C, M).
        gradient: "exact": the derivative. "paper": Eqs. 9 to 19, which leave out the derivative of pi with
            respect to the logits of the other classes (Eq. 15).
        label_smoothing: from 0 to 1, as in `torch.nn.functional.cross_entropy`. In S_k, -log pi is mixed with
            its mean over all classes. f_t does not change.
        upsample: None, or "bilinear" for coarse ``logits`` (N, C, h, w) with ``target`` and ``pixel_weight``
            (N, H, W) of any size. The loss is that of `torch.nn.functional.interpolate(logits, (H, W),
            mode="bilinear")`. The kernels interpolate each pixel when they read it, so full-resolution logits
            are never stored. The gradient is summed at coarse size in a fixed order. A coarse logit with
            interpolation weight 0 has no effect, while `interpolate` turns an infinite one into NaN.
        align_corners: the pixel positions of ``upsample``, as in `torch.nn.functional.interpolate`.
        backend: "auto" (the best one for the device of ``logits``), "cuda", "triton", "cpu" or "reference".
            ``python -m ial_cuda info`` lists the available ones.
        inplace: allows the backward pass to overwrite ``logits`` with the gradient. This saves a tensor of
            their size. A later backward pass that needs the old logits raises. The logits are not overwritten
            by "reference", under torch.compile and torch.func, and with ``create_graph=True``.
        grad_in_forward: allows the forward pass to compute the gradient with the loss if this saves a pass
            over the logits, as it does with one level. The gradient is then in memory until the backward
            pass; with several losses in a step, all their gradients are. It is computed for an incoming
            gradient of 1, and again in the backward pass if that is another number. The modules remember
            the number. False leaves the gradient to the backward pass.
        return_components: whether to return ``(loss, Components)``.
        process_group: None, or the `torch.distributed.ProcessGroup`, or one dimension of a `DeviceMesh`, over
            which the images are split, as in data-parallel training. "mean" and "sum" are then over the
            images of all ranks, and so are the factors with ``factor_scope="batch"``. Every rank gets the
            same loss; with "none" it gets the losses of its own images. The gradient is that of the sum of
            the losses of all ranks. DDP and FSDP divide by the number of ranks, which gives the gradient of
            the loss. Ranks may have different numbers of images, or none. Other options must be the same on
            all ranks. With IAL_CUDA_DEBUG=1 in the environment this is checked, which synchronises. Call
            `torch.distributed.init_process_group` first: until then `torch.distributed.group.WORLD` is None.
        spatial_group: None, or the group or mesh dimension over which the pixels of each image are split, in
            any way. All its ranks pass the same N images. Not with ``upsample``.

    Returns:
        The loss, (), or (N,) with ``reduction="none"``. It is float64 for float64 logits, else float32.
            With ``return_components=True``, the tuple ``(loss, Components)``.

    Raises:
        ValueError: a shape, a device or an option is not one of the above. On the CPU, also a label outside
            [0, C) that is not ``ignore_index``. On CUDA a pixel with such a label is left out and makes the
            loss NaN. With IAL_CUDA_DEBUG=1 in the environment it raises on CUDA too, which synchronises. This
            also holds under torch.compile.
        TypeError: an argument has a wrong type or dtype.
        RuntimeError: ``backend`` is missing. The message gives the reason and the remedy.
        NotImplementedError: in the backward pass, a gradient of the gradient is requested. Only "reference"
            has one, and not under torch.compile.

    Examples:
        >>> import ial_cuda, torch
        >>> logits = torch.randn(2, 19, 64, 128, requires_grad=True)
        >>> target = torch.randint(19, (2, 64, 128))
        >>> loss = ial_cuda.importance_aware_loss(logits, target, "cityscapes")
        >>> loss.backward()
        >>> logits.grad.shape
        torch.Size([2, 19, 64, 128])
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
        spatial_group=spatial_group,
    )
    return compute_loss(logits, target, weight, pixel_weight, divisor, options)


# torch.fx.symbolic_trace keeps this call as one node: a proxy has nothing that the function could check.
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
    """`importance_aware_loss` with validated options. ``name``: of the logits in errors."""
    if is_dtensor(logits):
        return _of_shards(logits, target, weight, pixel_weight, divisor, options, expected, name)
    tensors = (logits, target, weight, pixel_weight, divisor)
    return _of_processes(*tensors, options, options.split, expected, name)


def _of_shards(
    logits: Any,
    target: Tensor,
    weight: ClassWeights | None,
    pixel_weight: Tensor | None,
    divisor: Divisor | None,
    options: Options,
    expected: ExpectedGradient | None,
    name: str,
) -> Tensor | tuple[Tensor, Components]:
    """`compute_loss` of DTensor logits."""
    if options.split:
        raise ValueError(
            f"process_group or spatial_group is given, expected None: {name} is a DTensor, whose placements "
            "describe the split"
        )
    check_shapes(logits, target, weight, pixel_weight, options, name)
    shards = Shards(logits, upsample=options.upsample is not None, name=name)
    inputs = shards.inputs(target, weight, pixel_weight)
    divisor = shards.local(divisor, shards.replicas, "divisor")
    result = _of_processes(*inputs, divisor, options, shards.split, expected, name)
    loss, components = result if isinstance(result, tuple) else (result, None)
    images = (logits.shape[0],)
    if options.reduction == "none":
        loss = shards.whole(loss, shards.images, images)
    else:
        loss = shards.whole(loss, shards.replicas, ())
    if components is None:
        return loss
    batch = options.factor_scope == "batch"
    return loss, Components(
        *(
            shards.whole(part, shards.replicas, tuple(part.shape))
            if batch and part_name in ("f", "F")
            else shards.whole(part, shards.images, images + part.shape[1:])
            for part_name, part in components._asdict().items()
        )
    )


def _of_processes(
    logits: Tensor,
    target: Tensor,
    weight: ClassWeights | None,
    pixel_weight: Tensor | None,
    divisor: Divisor | None,
    options: Options,
    split: Split,
    expected: ExpectedGradient | None,
    name: str,
) -> Tensor | tuple[Tensor, Components]:
    """`compute_loss` of this process's part of the input."""
    backend, class_weights = prepare(logits, target, weight, pixel_weight, options, name)
    total = None if divisor is None else mean_divisor(divisor, options.reduction, logits.device, name)
    transformed = is_transformed()
    inplace = options.inplace and not (transformed or split.one_loss)  # a DTensor's shard may be a leaf's
    if inplace:
        check_inplace(logits, target, class_weights, pixel_weight, name=name)
    if logits.dim() == 2:
        _warn_of_rows(logits, options)
    in_training = logits.requires_grad and torch.is_grad_enabled()
    if split and not torch.compiler.is_compiling():
        if torch._C._get_tracing_state() is not None:
            raise NotImplementedError(
                "torch.jit.trace of a loss over processes is not supported: use torch.compile or torch.export"
            )
        if is_debugging():
            _check_ranks(split, logits.shape[0], class_weights, total, options, in_training)
    target = with_checked_labels(logits, target, backend, options)

    if backend.library is None and not split:
        loss, f, S, count = reference.importance_aware_loss(
            logits, target, options, weight=class_weights, pixel_weight=pixel_weight, divisor=total
        )
    else:
        given, rows = target, logits.dim() == 2 and _is_one_image(options)
        if rows:
            logits, target, pixel_weight = as_image(logits, target, pixel_weight)
        # loss_and_grad returns one loss for the batch and writes the gradient to new memory.
        in_forward = (
            in_training
            and options.grad_in_forward
            and options.reduction != "none"
            and not (inplace or transformed or split)
        )
        state = expected.on(logits.device) if in_forward and expected is not None else None
        tensors = (logits, target, class_weights, pixel_weight)
        try:
            loss, f, stats = _call_operators(
                backend, tensors, total, options, split, inplace, in_forward, state
            )
        except ValueError:
            if rows:
                raise_of_labels(given, options.hierarchy.num_classes, options)
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
    split: Split,
    inplace: bool,
    in_forward: bool,
    expected: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, f_t (N or 1, g-1) and the sums (N, g, 5).

    ``in_forward``: whether the gradient may be computed now.
    """
    if in_forward:
        loss, f, stats, *_ = backend.operators().loss_and_grad(
            *pixel_arguments(tensors, options),
            divisor,
            *options.combine_arguments,
            options.corners,
            expected,
            backend.one_launch,
        )
        return loss, f, stats
    stats = level_sums(backend, tensors, options, inplace)
    combine = reference.combine if backend.library is None else backend.operators().combine
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return distributed.combine(combine, stats, divisor, options.combine_arguments, dtype, split)


#: Options that may differ between processes. Those in the second line are compared by what they mean.
_OF_A_PROCESS = {
    *("backend", "inplace", "grad_in_forward", "return_components", "process_group", "spatial_group"),
    *("hierarchy", "lambdas", "ignore_index"),
}


def _check_ranks(
    split: Split,
    images: int,
    weight: Tensor | None,
    divisor: Tensor | None,
    options: Options,
    in_training: bool,
) -> None:
    """Raises on all ranks if what must be the same on all differs."""
    alike = {
        "the number of classes": options.hierarchy.num_classes,
        "class_levels": options.hierarchy.class_levels,
        "lambdas": options.factor_lambdas,
        "ignore_index": options.void_label,
        **{name: value for name, value in vars(options).items() if name not in _OF_A_PROCESS},
        "weight": None if weight is None else weight.tolist(),
        "divisor": None if divisor is None else divisor.item(),
        "whether a gradient is computed": in_training,
    }
    for group in split.pixels:
        distributed.check_alike(alike | {"the number of images": images}, group, "spatial_group")
    for group in split.images:
        distributed.check_alike(alike, group, "process_group")


def _is_one_image(options: Options) -> bool:
    """Whether rows of logits (M, C) can be computed as the pixels of one image, which is faster.

    The rows must share their factors or have none, and no result may have a value for each row.
    """
    shared = options.hierarchy.num_levels == 1 or options.factor_scope == "batch"
    return shared and options.reduction != "none" and not options.return_components


class ExpectedGradient:
    """The incoming gradient that the loss of a module will probably get, on the device of the logits.

    A loss is usually scaled by the same number in every step, by a GradScaler or by its own weight. The
    forward pass computes the gradient for the last number that came in twice in a row, initially 1.
    """

    def __init__(self) -> None:
        self.states: dict[torch.device, Tensor] = {}  #: (2,) float64: the expected number, and the last one

    def on(self, device: torch.device) -> Tensor:
        if device not in self.states:
            self.states[device] = torch.ones(2, dtype=torch.float64, device=device)
        return self.states[device]

    def __reduce__(self) -> tuple[type[ExpectedGradient], tuple[()]]:
        """Copies and pickles start from 1 again: their device may differ or may not exist."""
        return ExpectedGradient, ()

    def __fx_create_arg__(self, tracer: torch.fx.Tracer) -> torch.fx.Node:
        """A traced graph creates a new one in each call."""
        return tracer.create_node("call_function", ExpectedGradient, (), {})


def _warn_of_rows(logits: Tensor, options: Options) -> None:
    if torch.compiler.is_compiling() or logits.shape[0] < 2:
        return
    if options.hierarchy.num_levels > 1 and options.factor_scope == "image":
        warn(
            f"logits has shape {tuple(logits.shape)}: each row is an image of one pixel, with its own "
            'factors; if the rows are pixels of one image, pass factor_scope="batch", or logits (1, C, M) '
            "and target (1, M)"
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
    process_group: Group | None = None,
    spatial_group: Group | None = None,
) -> Tensor:
    """`torch.nn.functional.cross_entropy` for class indices, at full size or with coarse logits.

    The loss and its gradient are computed in one pass over the logits. With ``upsample="bilinear"`` they are
    those of

        F.cross_entropy(F.interpolate(input, target.shape[1:], mode="bilinear"), target, ...)

    but full-resolution logits are never stored. A mean without a valid pixel is 0, not NaN.

    Args:
        input: logits (N, C, *spatial), or those of one image: (C,), or (C, *spatial) with at least two
            spatial dimensions. If a shape can mean both, the first dimension is N. float64, float32, float16
            or bfloat16.
        target: class indices (N, *spatial), (N,), (*spatial) or (), int64, int32 or uint8.
        weight: (C,) class weights: a tensor, a list or a NumPy array. None means ones.
        ignore_index: the label of void pixels, which are left out. It may be a class. The default is that of
            `torch.nn.functional.cross_entropy`. Most segmentation data sets use 255.
        reduction: "mean": the summed loss divided by the summed weight of the valid pixels. "sum": the summed
            loss. "none": the loss of each pixel, which is `pixel_nll` times ``pixel_weight``.
        label_smoothing: from 0 to 1, the share of the mean over all classes with their weights.
        pixel_weight: a tensor in the shape of ``target`` that multiplies the weight of each pixel. None means
            ones.
        divisor: replaces the summed weight of the valid pixels as the divisor of "mean": a non-negative
            number or a 0-d tensor. The loss is 0 if it is 0.
        upsample: None, or "bilinear" for coarse ``input`` (N, C, h, w) with ``target`` (N, H, W).
        align_corners: as in `importance_aware_loss`.
        backend: as in `importance_aware_loss`.
        inplace: as in `importance_aware_loss`. No effect with ``reduction="none"``.
        grad_in_forward: as in `importance_aware_loss`. No effect with ``reduction="none"``.
        process_group: as in `importance_aware_loss`. No effect with ``reduction="none"``.
        spatial_group: as in `importance_aware_loss`. No effect with ``reduction="none"``.

    Returns:
        The loss, (), or the shape of ``target`` with ``reduction="none"``. It is float64 for float64 logits,
            else float32.

    Raises:
        ValueError: as in `importance_aware_loss`. A label that is no class raises on the CPU and gives NaN on
            CUDA.
        TypeError: an argument has a wrong type or dtype.
        RuntimeError: ``backend`` is missing. The message gives the reason and the remedy.
        NotImplementedError: in the backward pass, a gradient of the gradient is requested.

    Examples:
        >>> import ial_cuda, torch
        >>> logits = torch.randn(2, 19, 32, 64, requires_grad=True)  # at a quarter of the labels' size
        >>> labels = torch.randint(19, (2, 128, 256))
        >>> loss = ial_cuda.cross_entropy(logits, labels, ignore_index=255, upsample="bilinear")
        >>> loss.backward()
        >>> logits.grad.shape
        torch.Size([2, 19, 32, 64])
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
        process_group=process_group,
        spatial_group=spatial_group,
    )
    return compute_cross_entropy(input, target, weight, pixel_weight, divisor, options)


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
    """`cross_entropy` with validated options. Their hierarchy is replaced: the logits give the classes."""
    check_logits(input, "input")
    if input.dim() == 0:
        raise ValueError("input has shape (), expected (N, C, *spatial), (C, *spatial) or (C,)")
    if _is_unbatched(input, target, options):
        if options.spatial_group is not None:  # the shapes of another rank's pixels might mean a batch
            raise ValueError(
                f"input has shape {tuple(input.shape)}, expected (N, C, *spatial) with spatial_group"
            )
        return _of_one_image(input, target, weight, pixel_weight, divisor, options, expected)
    options = of_classes(options, input.shape[1])
    if options.reduction == "none":
        if divisor is not None:
            mean_divisor(divisor, options.reduction, input.device, "input")
        return compute_pixel_nll(input, target, weight, pixel_weight, options, "input")
    loss = compute_loss(input, target, weight, pixel_weight, divisor, options, expected, "input")
    assert isinstance(loss, Tensor)
    return loss


def _is_unbatched(input: Tensor, target: object, options: Options) -> bool:
    """Whether the logits are one image without the dimension N. Two dimensions always mean (N, C)."""
    if input.dim() <= 2 or not isinstance(target, Tensor):
        return input.dim() == 1
    if options.upsample is not None:
        return input.dim() == 3 and target.dim() == 2
    # In the other order torch.export would add a guard that N is not C.
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
        raise_of_labels(target, input.shape[0], options)
        raise
    return loss.squeeze(0) if options.reduction == "none" else loss
