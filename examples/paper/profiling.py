"""The share of the loss in a training step, and the step's peak memory: before, and with our kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.common import Step
from ial_cuda import Hierarchy

from ..shares import measure_shares, report_shares
from .losses import Loss, make_loss
from .processes import Processes
from .recipe import Recipe
from .training import Training

OURS = "IAL, ial_cuda"
#: The loss, and by which backend.
CONTENDERS = {
    OURS: ("ial", "auto"),
    "IAL, reference": ("ial", "reference"),
    "F.cross_entropy": ("cross-entropy", "auto"),
}


def make_batch(
    batch: int, size: Sequence[int], hierarchy: Hierarchy, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Noise for images (N, h, w, 3), and label maps (N, h, w) of square regions, void among them; uint8."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch, *size, 3), generator=generator, dtype=torch.uint8)
    regions = (batch, -(-size[0] // 16), -(-size[1] // 16))
    labels = torch.randint(hierarchy.num_classes + 1, regions, generator=generator)
    labels[labels == hierarchy.num_classes] = ignore_index
    labels = labels.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, : size[0], : size[1]]
    return images, labels.to(torch.uint8).contiguous()


def profile(
    recipe: Recipe,
    size: Sequence[int],
    hierarchy: Hierarchy,
    ignore_index: int,
    processes: Processes,
    rounds: int,
    console: Console,
) -> Mapping[str, Any]:
    """A training step with each loss, and each loss with its gradient alone: shown, and as JSON."""
    device = processes.device
    images, labels = make_batch(recipe.batch, size, hierarchy, ignore_index)
    images, labels = images.to(device), labels.to(device)
    weight = torch.linspace(0.5, 2, hierarchy.num_classes, device=device)
    training = Training(recipe, hierarchy, ignore_index, weight, 10**6, processes)
    training.take_step(images, labels)  # the optimizer's state is there from now on
    logits = training.logits(images).detach().requires_grad_()
    training.optimizer.zero_grad()  # what the next step frees does not count
    steps: dict[str, tuple[Step, Step]] = {}
    for name, (loss, backend) in CONTENDERS.items():
        recipe_of_it = replace(recipe, loss=loss)
        criterion = make_loss(recipe_of_it, hierarchy, ignore_index, weight, backend=backend)

        def step(images: Tensor, criterion: Loss = criterion) -> None:
            training.loss = criterion
            training.take_step(images, labels)
            training.optimizer.zero_grad()  # as before: each step makes its gradients

        def alone(_: Tensor, criterion: Loss = criterion) -> object:
            return torch.autograd.grad(criterion(logits, labels)[0], logits)

        steps[name] = step, alone
    title = f"{recipe.network}, width {recipe.width}, {recipe.batch} images {size[0]}x{size[1]} on {device}"
    rows = measure_shares(steps, OURS, images, device.type, rounds)
    return {
        "recipe": recipe.as_json(),
        "size": list(size),
        "device": device.type,
        **report_shares(title, rows, device.type, console),
    }
