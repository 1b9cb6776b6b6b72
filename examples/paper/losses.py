"""Cross-entropy and IAL with one signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from ial_cuda import CrossEntropyLoss, Hierarchy, ImportanceAwareLoss

from .networks import NETWORKS
from .recipe import Recipe

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ALPHA, LAMBDA = 1.0, 0.5  # as in the paper

#: Takes logits (N, C, h, w) and labels (N, H, W), uint8. Returns the loss and, for IAL, f (N, g-1).
Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


def make_loss(
    recipe: Recipe,
    hierarchy: Hierarchy,
    weight: Tensor | None,
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Loss:
    """The loss of a recipe: the mean over the images of all processes of ``group``, f of this process's."""
    options = {
        "upsample": "bilinear" if NETWORKS[recipe.network].coarse else None,
        "backend": backend,
        "process_group": group,
    }
    if recipe.loss == "ial":
        criterion = ImportanceAwareLoss(
            hierarchy,
            weight,
            alpha=ALPHA,
            lambdas=LAMBDA,
            gradient=recipe.gradient,
            factor_normalization=recipe.factors,
            return_components=True,
            **options,
        )

        def importance_aware(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            loss, components = criterion(logits, labels)
            return loss, components.f

        return importance_aware

    cross_entropy = CrossEntropyLoss(weight, hierarchy.ignore_index, **options)
    return lambda logits, labels: (cross_entropy(logits, labels), None)
