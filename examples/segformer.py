"""A real client: a SegFormer of the transformers library, trained with its built-in loss, which upsamples the
logits first, and with ours. First whether losses and gradients are the same, then a step's time and memory.

The network is MiT-B0, the library's default, randomly initialised; nothing is downloaded. Classes and sizes
are those of two data sets that it is trained on.
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

from benchmarks.command import make_plain_parser
from benchmarks.common import Step, describe_machine, write_json
from benchmarks.inputs import IGNORE_INDEX
from benchmarks.report import Row
from ial_cuda import cross_entropy

from .shares import measure_shares, report_shares

STEPS = 3


class Setting(NamedTuple):
    """What a network is trained on."""

    classes: int
    size: tuple[int, int]
    dtype: torch.dtype = torch.float32


SETTINGS = {"ADE20K": Setting(150, (512, 512)), "Cityscapes": Setting(19, (512, 1024))}

NetworkLoss = Callable[[SegformerForSemanticSegmentation, Tensor, Tensor], Tensor]  # of images and labels


def built_in(network: SegformerForSemanticSegmentation, images: Tensor, labels: Tensor) -> Tensor:
    return network(images, labels=labels).loss


def ours(network: SegformerForSemanticSegmentation, images: Tensor, labels: Tensor) -> Tensor:
    return ours_alone(network(images).logits, labels)


def ours_alone(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, upsample="bilinear")


def built_in_alone(logits: Tensor, labels: Tensor) -> Tensor:
    """What the library does to its logits where it is given labels."""
    fine = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(fine, labels, ignore_index=IGNORE_INDEX)


BUILT_IN, OURS = "built-in loss", "ial_cuda"
#: Each within or after the network's call, and alone, of its logits.
LOSSES = {BUILT_IN: (built_in, built_in_alone), OURS: (ours, ours_alone)}


class Training:
    """A network in training with a loss; from the same seed the same one."""

    def __init__(self, loss: NetworkLoss, setting: Setting, **config: Any) -> None:
        torch.manual_seed(0)
        config = SegformerConfig(num_labels=setting.classes, **config)
        self.network = SegformerForSemanticSegmentation(config).to(setting.dtype).train()
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
    """Of a step with our loss to one with the built-in loss, relative to that, and what it may be.

    Each loss rounds in an order of its own, to an eps or a few, and every layer on the way back adds some: a
    hundred eps. After the first step the parameters differ as well, if only in their last bits. Then a share
    of some eps of the ReLUs has its input at the other side of 0; and since what each adds to the gradient
    is like noise, that differs by the root of it.
    """

    built_in: float  # the loss itself
    loss: float
    gradient: float
    loss_tolerance: float
    gradient_tolerance: float

    @property
    def is_rounding(self) -> bool:
        return self.loss <= self.loss_tolerance and self.gradient <= self.gradient_tolerance


def make_batch(seed: int, setting: Setting) -> tuple[Tensor, Tensor]:
    """Noise for an image and for its labels, void among them."""
    classes, size, dtype = setting
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(1, 3, *size, generator=generator, dtype=dtype)
    labels = torch.randint(classes + 1, (1, *size), generator=generator)
    return images, labels.where(labels < classes, IGNORE_INDEX)


def train_together(trainings: Sequence[Training], setting: Setting) -> list[Difference]:
    """Trains both, the one with the built-in loss first, on the same images, with the same dropout."""
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
    """A training step with each loss, and each loss with its gradient alone: time and peak memory."""
    images, labels = make_batch(0, setting)
    logits = trainings[OURS].network(images).logits.detach().requires_grad_()
    steps: dict[str, tuple[Step, Step]] = {}
    for name, (_, alone) in LOSSES.items():
        training = trainings[name]
        training.optimizer.zero_grad()  # what the first step frees does not count
        steps[name] = (
            lambda images, training=training: training.step(images, labels),
            lambda _, loss=alone: torch.autograd.grad(loss(logits, labels), logits),
        )
    return measure_shares(steps, OURS, images, "cpu", rounds)


def report(name: str, setting: Setting, rounds: int, console: Console) -> dict[str, Any] | None:
    """What is measured in a setting; None where training is not the same."""
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
        console.print("not the same, and not timed", style="red")
        return None
    rows = measure(trainings, setting, rounds)
    height, width = setting.size
    title = f"{name}: MiT-B0, {setting.classes} classes, one {height}x{width} image, on the CPU"
    return {
        "name": name,
        "classes": setting.classes,
        "size": setting.size,
        "differences": [difference._asdict() for difference in differences],
        **report_shares(title, rows, "cpu", console),
    }


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_plain_parser("segformer", __doc__, rounds=10).parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console = Console()
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
