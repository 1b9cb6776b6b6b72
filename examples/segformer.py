"""A real client: trains a SegFormer of the transformers library with its built-in loss and with ours.

The built-in loss upsamples the logits first. The program checks that losses and gradients are the same, then
measures time and memory of a training step. The network is MiT-B0, the library's default, with random
parameters; nothing is downloaded. Numbers of classes and image sizes are those of two common data sets.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from benchmarks.harness.cli import make_plain_parser
from benchmarks.harness.inputs import IGNORE_INDEX
from benchmarks.harness.machine import describe_machine, write_json
from benchmarks.harness.measure import Step
from benchmarks.harness.report import Row
from benchmarks.harness.tables import make_console
from ial_cuda import cross_entropy

from .shares import measure_shares, show_shares

STEPS = 3  # that are compared


class Setting(NamedTuple):
    """The classes and the image size of a data set."""

    classes: int
    size: tuple[int, int]
    dtype: torch.dtype = torch.float32


SETTINGS = {"ADE20K": Setting(150, (512, 512)), "Cityscapes": Setting(19, (512, 1024))}

NetworkLoss = Callable[[SegformerForSemanticSegmentation, Tensor, Tensor], Tensor]  # of images and labels


def built_in(network: SegformerForSemanticSegmentation, images: Tensor, labels: Tensor) -> Tensor:
    return network(images, labels=labels).loss


def ours(network: SegformerForSemanticSegmentation, images: Tensor, labels: Tensor) -> Tensor:
    return ours_alone(network(images).logits, labels)


def built_in_alone(logits: Tensor, labels: Tensor) -> Tensor:
    """The computation of the library on its logits."""
    fine = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(fine, labels, ignore_index=IGNORE_INDEX)


def ours_alone(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, upsample="bilinear")


BUILT_IN, OURS = "built-in loss", "ial_cuda"
#: Each loss of a network, and alone of its logits.
LOSSES = {BUILT_IN: (built_in, built_in_alone), OURS: (ours, ours_alone)}


class Training:
    """A network in training with a loss. The initial parameters are always the same."""

    def __init__(self, loss: NetworkLoss, setting: Setting) -> None:
        torch.manual_seed(0)
        config = SegformerConfig(num_labels=setting.classes)
        self.network = SegformerForSemanticSegmentation(config).to(setting.dtype).train()
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.01)
        self.loss = loss

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Returns the loss. The gradient stays in the parameters until the next step."""
        self.optimizer.zero_grad()
        loss = self.loss(self.network, images, labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def gradient(self) -> Tensor:
        return torch.cat([parameter.grad.flatten() for parameter in self.network.parameters()])


class Difference(NamedTuple):
    """The relative difference of a step with our loss from a step with the built-in loss, and its tolerance.

    Each loss rounds in another order, by a few eps, and every layer of the backward pass adds some: a hundred
    eps. After the first step the parameters differ in their last bits too. Then a share of some eps of the
    ReLUs has its input on the other side of 0. Their gradients are like noise, so the gradient differs by the
    root of eps.
    """

    built_in: float  # the built-in loss itself
    loss: float
    gradient: float
    loss_tolerance: float
    gradient_tolerance: float

    @property
    def is_rounding(self) -> bool:
        return self.loss <= self.loss_tolerance and self.gradient <= self.gradient_tolerance


def make_batch(seed: int, setting: Setting) -> tuple[Tensor, Tensor]:
    """An image and labels of noise, some of them void."""
    classes, size, dtype = setting
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(1, 3, *size, generator=generator, dtype=dtype)
    labels = torch.randint(classes + 1, (1, *size), generator=generator)
    return images, labels.where(labels < classes, IGNORE_INDEX)


def train_together(trainings: Sequence[Training], setting: Setting) -> list[Difference]:
    """Trains both on the same images with the same dropout; first the one with the built-in loss."""
    eps = torch.finfo(setting.dtype).eps
    differences = []
    for step in range(STEPS):
        batch = make_batch(step, setting)
        losses, gradients = [], []
        for training in trainings:
            torch.manual_seed(step)
            losses.append(training.step(*batch))
            gradients.append(training.gradient())
        differences.append(
            Difference(
                losses[0].item(),
                relative(*losses),
                relative(*gradients),
                loss_tolerance=100 * eps,
                gradient_tolerance=100 * eps if step == 0 else math.sqrt(eps),
            )
        )
    return differences


def relative(expected: Tensor, got: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def measure(trainings: Mapping[str, Training], setting: Setting, rounds: int) -> list[Row]:
    """Time and peak memory of a training step with each loss, and of each loss with its gradient alone."""
    images, labels = make_batch(0, setting)
    logits = trainings[OURS].network(images).logits.detach().requires_grad_()
    steps: dict[str, tuple[Step, Step]] = {}
    for name, (_, alone) in LOSSES.items():
        training = trainings[name]
        training.optimizer.zero_grad()  # gradients that the next step frees would lower its peak
        steps[name] = (
            lambda images, training=training: training.step(images, labels),
            lambda _, loss=alone: torch.autograd.grad(loss(logits, labels), logits),
        )
    return measure_shares(steps, OURS, images, "cpu", rounds)


def report(name: str, setting: Setting, rounds: int, console: Console) -> dict[str, Any] | None:
    """The results of a setting as JSON; None if the trainings differ."""
    trainings = {loss: Training(of_network, setting) for loss, (of_network, _) in LOSSES.items()}
    differences = train_together(list(trainings.values()), setting)
    for step, difference in enumerate(differences):
        console.print(
            f"{name}, step {step}: loss {difference.built_in:.6f}; with ours it differs by "
            f"{difference.loss:.1e} (at most {difference.loss_tolerance:.1e}), the gradient by "
            f"{difference.gradient:.1e} (at most {difference.gradient_tolerance:.1e})",
            highlight=False,
            soft_wrap=True,
        )
    if not all(difference.is_rounding for difference in differences):
        console.print("The trainings differ by more than rounding: not timed", style="red")
        return None
    rows = measure(trainings, setting, rounds)
    height, width = setting.size
    title = f"{name}: MiT-B0, {setting.classes} classes, one {height}x{width} image, on the CPU"
    return {
        "name": name,
        "classes": setting.classes,
        "size": setting.size,
        "differences": [difference._asdict() for difference in differences],
        **show_shares(title, rows, console),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_plain_parser("segformer", __doc__, rounds=10)
    parser.prog = "python -m examples.segformer"
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console = make_console()
    reports = [report(*setting, arguments.rounds, console) for setting in SETTINGS.items()]
    if None in reports:
        return 1
    arguments.output.mkdir(parents=True, exist_ok=True)
    machine = describe_machine() | {"transformers": metadata.version("transformers")}
    summary = {"machine": machine, "rounds": arguments.rounds, "settings": reports}
    write_json(arguments.output / "segformer.json", summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
