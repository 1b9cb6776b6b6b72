"""Time and memory of a training step with each loss, and the share of the loss in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from benchmarks.harness.measure import Step
from ial_cuda import Hierarchy

from ..shares import measure_shares, show_shares
from .losses import Loss, make_loss
from .networks import NETWORKS
from .processes import Processes
from .recipe import Recipe
from .training import Training

OURS = "IAL, ial_cuda"
REGION = 16  # side of the squares of one label


def make_batch(batch: int, size: Sequence[int], hierarchy: Hierarchy) -> tuple[Tensor, Tensor]:
    """Images (N, h, w, 3) of noise, and label maps (N, h, w) of square regions, some of them void; uint8."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch, *size, 3), generator=generator, dtype=torch.uint8)
    regions = (batch, *(-(-side // REGION) for side in size))
    labels = torch.randint(hierarchy.num_classes + 1, regions, generator=generator)
    labels[labels == hierarchy.num_classes] = hierarchy.ignore_index
    labels = labels.repeat_interleave(REGION, 1).repeat_interleave(REGION, 2)[:, : size[0], : size[1]]
    return images, labels.to(torch.uint8).contiguous()


def make_losses(recipe: Recipe, hierarchy: Hierarchy, weight: Tensor) -> dict[str, Loss]:
    """IAL of a recipe with two backends, and PyTorch's cross-entropy, by name."""
    coarse = NETWORKS[recipe.network].coarse

    def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, None]:
        logits = logits.float()
        if coarse:
            logits = F.interpolate(logits, labels.shape[1:], mode="bilinear")
        return F.cross_entropy(logits, labels.long(), weight, ignore_index=hierarchy.ignore_index), None

    return {
        OURS: make_loss(recipe, hierarchy, weight),
        "IAL, reference": make_loss(recipe, hierarchy, weight, backend="reference"),
        "F.cross_entropy": cross_entropy,
    }


def profile(
    recipe: Recipe, size: Sequence[int], hierarchy: Hierarchy, device: str, rounds: int, console: Console
) -> dict[str, Any]:
    """Measures a training step with each loss, and each loss with its gradient alone. Shows them; as JSON."""
    images, labels = (tensor.to(device) for tensor in make_batch(recipe.batch, size, hierarchy))
    weight = torch.linspace(0.5, 2, hierarchy.num_classes, device=device)
    training = Training(recipe, hierarchy, weight, 10**6, Processes(False, device))
    training.take_step(images, labels)  # allocates the state of the optimizer
    logits = training.logits(images).detach().requires_grad_()
    training.optimizer.zero_grad()  # gradients that the next step frees would lower its peak
    steps: dict[str, tuple[Step, Step]] = {}
    for name, criterion in make_losses(recipe, hierarchy, weight).items():

        def step(images: Tensor, criterion: Loss = criterion) -> None:
            training.loss = criterion
            training.take_step(images, labels)
            training.optimizer.zero_grad()

        def alone(_: Tensor, criterion: Loss = criterion) -> object:
            return torch.autograd.grad(criterion(logits, labels)[0], logits)

        steps[name] = step, alone
    title = f"{recipe.network}, width {recipe.width}, {recipe.batch} images {size[0]}x{size[1]} on {device}"
    rows = measure_shares(steps, OURS, images, device, rounds)
    result = {"recipe": recipe.as_json(), "size": list(size), "device": device}
    return result | show_shares(title, rows, console)
