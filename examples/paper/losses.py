"""Cross-entropy and IAL with one signature."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ial_cuda import Hierarchy, ImportanceAwareLoss

from .networks import NETWORKS
from .recipe import Recipe

ALPHA, LAMBDA = 1.0, 0.5  # as in the paper

#: Takes logits (N, C, h, w) and labels (N, H, W), uint8. Returns the loss and, for IAL, f (N, g-1).
Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


def make_loss(
    recipe: Recipe,
    hierarchy: Hierarchy,
    weight: Tensor | None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Loss:
    """The loss of a recipe. ``backend`` is for IAL."""
    coarse = NETWORKS[recipe.network].coarse
    if recipe.loss == "ial":
        criterion = ImportanceAwareLoss(
            hierarchy,
            weight,
            alpha=ALPHA,
            lambdas=LAMBDA,
            reduction=reduction,
            gradient=recipe.gradient,
            factor_normalization=recipe.factors,
            upsample="bilinear" if coarse else None,
            backend=backend,
            return_components=True,
        )

        def importance_aware(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            loss, components = criterion(logits, labels)
            return loss, components.f

        return importance_aware

    def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        logits = logits.float()
        if coarse:
            logits = F.interpolate(logits, labels.shape[1:], mode="bilinear")
        options = {"ignore_index": hierarchy.ignore_index, "reduction": reduction}
        return F.cross_entropy(logits, labels.long(), weight, **options), None

    return cross_entropy


def total_weight(labels: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """The summed weight of the valid pixels, (): the divisor of the mean."""
    valid = labels[labels != ignore_index].long()
    return valid.new_tensor(valid.numel()).float() if weight is None else weight[valid].sum()
