"""The losses that are compared, with one signature."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ial_cuda import Hierarchy, ImportanceAwareLoss

from .networks import NETWORKS
from .recipe import Recipe

ALPHA, LAMBDA = 1.0, 0.5  # the paper's

#: Of logits (N, C, h, w) and labels (N, H, W), uint8: the loss, and with IAL the factors f_t (N, g-1).
Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


def make_loss(
    recipe: Recipe,
    hierarchy: Hierarchy,
    ignore_index: int,
    weight: Tensor | None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Loss:
    """The recipe's loss; ``backend`` is IAL's."""
    coarse = NETWORKS[recipe.network].coarse
    if recipe.loss == "ial":
        criterion = ImportanceAwareLoss(
            hierarchy,
            weight,
            alpha=ALPHA,
            lambdas=LAMBDA,
            ignore_index=ignore_index,
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
        loss = F.cross_entropy(logits, labels.long(), weight, ignore_index=ignore_index, reduction=reduction)
        return loss, None

    return cross_entropy


def total_weight(labels: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """The summed weight of the valid pixels, (): what the mean of every loss is divided by."""
    valid = labels[labels != ignore_index].long()
    return valid.new_tensor(valid.numel()).float() if weight is None else weight[valid].sum()
