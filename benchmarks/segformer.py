"""A real client: a SegFormer of the transformers library, trained with its built-in loss, which upsamples the
logits first, and with ours. First whether losses and gradients are the same, then a step's time and memory.

The network is MiT-B0, the library's default, randomly initialised; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from ial_cuda import upsampled_cross_entropy

from .command import rounds
from .common import IGNORE_INDEX, describe_machine, peak_bytes, time_interleaved, write_json
from .report import Row, make_table, quotient

CLASSES, SIZE, STEPS = 19, (512, 1024), 3
#: By how much losses and gradients may differ, relative to their norms. A loss is rounded to some eps and so
#: is its gradient, 1.2e-7 and 2.2e-16; each layer and each step of training passes that on, and adds to it.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-13}

LossOfNetwork = Callable[[SegformerForSemanticSegmentation, Tensor, Tensor], Tensor]


def built_in_loss(network: SegformerForSemanticSegmentation, images: Tensor, labels: Tensor) -> Tensor:
    return network(images, labels=labels).loss


def our_loss(network: SegformerForSemanticSegmentation, images: Tensor, labels: Tensor) -> Tensor:
    return upsampled_cross_entropy(network(images).logits, labels)


LOSSES = {"built-in loss": built_in_loss, "ial_cuda": our_loss}


class Training:
    """A network in training with a loss; from the same seed the same one."""

    def __init__(self, config: SegformerConfig, loss: LossOfNetwork, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.network = SegformerForSemanticSegmentation(config).to(dtype).train()
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01)
        self.loss = loss

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss; its gradient is left in the parameters until the next step."""
        self.optimizer.zero_grad()
        loss = self.loss(self.network, images, labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def gradient(self) -> Tensor:
        return torch.cat([parameter.grad.flatten() for parameter in self.network.parameters()])


class Difference(NamedTuple):
    """Of a step with our loss to one with the built-in loss, relative to that."""

    built_in: float  # the loss itself
    loss: float
    gradient: float


def make_batch(seed: int, size: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Noise for an image and for its labels, of which one in twenty is void."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(1, 3, *size, generator=generator, dtype=dtype)
    labels = torch.randint(CLASSES + 1, (1, *size), generator=generator)
    return images, labels.where(labels < CLASSES, IGNORE_INDEX)


def compare(trainings: Sequence[Training], size: tuple[int, int], dtype: torch.dtype) -> list[Difference]:
    """Trains both, the one with the built-in loss first, on the same images, with the same dropout."""
    differences = []
    for step in range(STEPS):
        batch = make_batch(step, size, dtype)
        losses, gradients = [], []
        for training in trainings:
            torch.manual_seed(step)
            losses.append(training.step(*batch))
            gradients.append(training.gradient())
        differences.append(
            Difference(losses[0].item(), *(relative(*results) for results in (losses, gradients)))
        )
    return differences


def relative(expected: Tensor, got: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()
