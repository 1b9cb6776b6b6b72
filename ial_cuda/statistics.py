"""The sums of each image and level, from which losses of a hierarchy are computed."""

from __future__ import annotations

from typing import NamedTuple, SupportsFloat, SupportsIndex

import torch
from torch import Tensor

from . import backends, reference
from .calls import pixel_arguments, prepare, with_checked_labels
from .hierarchy import HierarchyLike
from .options import Backend, Gradient, Options, Upsample
from .validation import ClassWeights


class LevelStatistics(NamedTuple):
    """Five sums over the pixels of each image and level, (N, g), float64, the least important level first.

    pi is the predicted probability of a pixel's own class. The first three are differentiable.

    Attributes:
        nll: the weighted cross-entropy of the level, w'l of Eqs. 1 and 2, S_k.
        pi_squared: the sum of pi^2.
        one_minus_pi_squared: the sum of (1 - pi)^2.
        count: the number of valid pixels.
        weight: the sum of their weights, class weight times pixel weight.
    """

    nll: Tensor
    pi_squared: Tensor
    one_minus_pi_squared: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    weight: Tensor


def level_statistics(
    logits: Tensor,
    target: Tensor,
    hierarchy: HierarchyLike,
    *,
    weight: ClassWeights | None = None,
    pixel_weight: Tensor | None = None,
    ignore_index: SupportsIndex | None = None,
    gradient: Gradient = "exact",
    label_smoothing: SupportsFloat = 0.0,
    upsample: Upsample | None = None,
    align_corners: bool = False,
    backend: Backend = "auto",
) -> LevelStatistics:
    """The sums that `importance_aware_loss` is computed from, for other losses of a hierarchy.

    The forward pass reads the logits once. The backward pass of any function of the sums reads them again and
    writes their gradient. A hierarchy with a level for each class gives the sums of each class.

    Args:
        logits: as in `importance_aware_loss`.
        target: as in `importance_aware_loss`.
        hierarchy: as in `importance_aware_loss`.
        weight: as in `importance_aware_loss`.
        pixel_weight: as in `importance_aware_loss`.
        ignore_index: as in `importance_aware_loss`.
        gradient: as in `importance_aware_loss`: the derivative of pi.
        label_smoothing: as in `importance_aware_loss`. It changes ``nll`` only.
        upsample: as in `importance_aware_loss`.
        align_corners: as in `importance_aware_loss`.
        backend: as in `importance_aware_loss`.

    Returns:
        The sums, each (N, g) float64.

    Raises:
        ValueError: as in `importance_aware_loss`. On CUDA, a label that is no class makes ``nll`` of the
            image's level 0 NaN.
        TypeError: an argument has a wrong type or dtype.
        RuntimeError: ``backend`` is missing. The message gives the reason and the remedy.
        NotImplementedError: in the backward pass, a gradient of the gradient is requested. Only "reference"
            has one.

    Examples:
        >>> import ial_cuda, torch
        >>> logits = torch.randn(2, 3, 8, 8, requires_grad=True)
        >>> labels = torch.randint(3, (2, 8, 8))
        >>> of_levels = ial_cuda.level_statistics(logits, labels, [[0, 2], [1]])
        >>> mean = of_levels.nll / of_levels.count.clamp(min=1)
        >>> mean.amax(dim=1).sum().backward()  # the worst level of each image
    """
    options = Options(
        hierarchy,
        ignore_index=ignore_index,
        gradient=gradient,
        label_smoothing=label_smoothing,
        upsample=upsample,
        align_corners=align_corners,
        backend=backend,
    )
    stats = compute_level_statistics(logits, target, weight, pixel_weight, options).unbind(-1)
    return LevelStatistics(*(stats[i] for i in range(5)))  # a proxy of torch.fx cannot be unpacked


# torch.fx.symbolic_trace keeps this call as one node: a proxy has nothing that the function could check.
torch.fx.wrap("compute_level_statistics")


def compute_level_statistics(
    logits: Tensor,
    target: Tensor,
    weight: ClassWeights | None,
    pixel_weight: Tensor | None,
    options: Options,
) -> Tensor:
    """`level_statistics` with validated options, (N, g, 5)."""
    backend, weights = prepare(logits, target, weight, pixel_weight, options, "logits")
    target = with_checked_labels(logits, target, backend, options)
    return level_sums(backend, (logits, target, weights, pixel_weight), options)


def level_sums(
    backend: backends.Backend,
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    options: Options,
    inplace: bool = False,
) -> Tensor:
    """The five sums, (N, g, 5), of logits, target, class weights and pixel weights."""
    if backend.library is None:
        logits, target, weight, pixel_weight = tensors
        return reference.level_statistics(logits, target, options, weight=weight, pixel_weight=pixel_weight)
    stats: Tensor = backend.operators().reduce(*pixel_arguments(tensors, options), inplace, options.corners)
    return stats
