"""A real client: a SegFormer of the transformers library, trained with its built-in loss, which upsamples the
logits first, and with ours. First whether losses and gradients are the same, then a step's time and memory.

The network is MiT-B0, the library's default, randomly initialised; nothing is downloaded.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from ial_cuda import upsampled_cross_entropy

from .command import make_plain_parser
from .common import IGNORE_INDEX, Step, describe_machine, peak_bytes, time_interleaved, write_json
from .report import EXTRA, RATIO, Row, make_table, quotient

CLASSES, SIZE, STEPS = 19, (512, 1024), 3
NetworkLoss = Callable[[SegformerForSemanticSegmentation, Tensor, Tensor], Tensor]  # of images and labels


def built_in(network: SegformerForSemanticSegmentation, images: Tensor, labels: Tensor) -> Tensor:
    return network(images, labels=labels).loss


def ours(network: SegformerForSemanticSegmentation, images: Tensor, labels: Tensor) -> Tensor:
    return upsampled_cross_entropy(network(images).logits, labels)


def built_in_alone(logits: Tensor, labels: Tensor) -> Tensor:
    """What the library does to its logits where it is given labels."""
    fine = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(fine, labels, ignore_index=IGNORE_INDEX)


BUILT_IN, OURS = "built-in loss", "ial_cuda"
#: Each within or after the network's call, and alone, of its logits.
LOSSES = {BUILT_IN: (built_in, built_in_alone), OURS: (ours, upsampled_cross_entropy)}


class Training:
    """A network in training with a loss; from the same seed the same one."""

    def __init__(self, config: SegformerConfig, loss: NetworkLoss, dtype: torch.dtype) -> None:
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


def make_batch(seed: int, size: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Noise for an image and for its labels, of which one in twenty is void."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(1, 3, *size, generator=generator, dtype=dtype)
    labels = torch.randint(CLASSES + 1, (1, *size), generator=generator)
    return images, labels.where(labels < CLASSES, IGNORE_INDEX)


def train_together(
    trainings: Sequence[Training], size: tuple[int, int], dtype: torch.dtype
) -> list[Difference]:
    """Trains both, the one with the built-in loss first, on the same images, with the same dropout."""
    eps = torch.finfo(dtype).eps
    differences = []
    for step in range(STEPS):
        batch = make_batch(step, size, dtype)
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


def measure(trainings: Mapping[str, Training], size: tuple[int, int], rounds: int) -> list[Row]:
    """A training step with each loss, and each loss with its gradient alone: time and peak memory."""
    images, labels = make_batch(0, size, torch.float32)
    logits = trainings[OURS].network(images).logits.detach().requires_grad_()
    steps: dict[str, Step] = {}
    for name, (_, alone) in LOSSES.items():
        training = trainings[name]
        training.optimizer.zero_grad()  # what the first step frees does not count
        steps[f"step, {name}"] = lambda images, training=training: training.step(images, labels)
        steps[f"alone, {name}"] = lambda _, loss=alone: torch.autograd.grad(loss(logits, labels), logits)
    memory = {name: peak_bytes(step, images) for name, step in steps.items()}
    times = time_interleaved(steps, lambda: images, "cpu", rounds, lambda: None)
    return [
        Row(
            name,
            **asdict(times[name]),
            ratio=quotient(times[name].median_ms, times[f"{name.split(',')[0]}, {OURS}"].median_ms),
            extra_mib=round(memory[name] / 2**20, 2),
        )
        for name in sorted(steps, reverse=True)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_plain_parser("segformer", __doc__, rounds=10).parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console = Console()
    config = SegformerConfig(num_labels=CLASSES)
    trainings = {name: Training(config, loss, torch.float32) for name, (loss, _) in LOSSES.items()}
    differences = train_together(list(trainings.values()), SIZE, torch.float32)
    for step, difference in enumerate(differences):
        console.print(
            f"step {step}: loss {difference.built_in:.6f}; with ours it differs by {difference.loss:.1e} "
            f"(at most {difference.loss_tolerance:.1e}), the gradient by {difference.gradient:.1e} "
            f"(at most {difference.gradient_tolerance:.1e})",
            highlight=False,
            soft_wrap=True,
        )
    if not all(difference.is_rounding for difference in differences):
        console.print("not the same, and not timed", style="red")
        return 1
    rows = measure(trainings, SIZE, arguments.rounds)
    console.print(make_table(f"{SIZE[0]}x{SIZE[1]} image, MiT-B0, cpu", rows, "cpu", (RATIO, EXTRA)))
    by_name = {row.name: row for row in rows}
    shares = {
        name: round(100 * by_name[f"alone, {name}"].median_ms / by_name[f"step, {name}"].median_ms, 1)
        for name in LOSSES
    }
    for name, share in shares.items():
        console.print(f"{name}: {share} % of its step", highlight=False)
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json(
        arguments.output / "segformer.json",
        {
            "machine": describe_machine() | {"transformers": metadata.version("transformers")},
            "rounds": arguments.rounds,
            "differences": [difference._asdict() for difference in differences],
            "share_percent": shares,
            "rows": [asdict(row) for row in rows],
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
