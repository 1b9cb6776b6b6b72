"""Times a training step as a whole, eager and under torch.compile: a small network, a loss, the backward
pass, the optimizer. Before that, loss and parameters after one are compared with those of eager PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from .command import add_task, devices, make_parser, run
from .common import WARM_UP_ROUNDS, Step, peak_bytes, time_interleaved, write_json
from .compare import first_line
from .inputs import Inputs
from .providers import (
    Loss,
    compile_anew,
    cross_entropy,
    kernels,
    our_cross_entropy,
    our_loss,
    reference_loss,
)
from .report import EXTRA, ONE_LEVEL, RATIO, Row, make_table, quotient, show_reasons

CLASSES = 19
OURS, COMPILED = "ial_cuda", ", compiled"
SIZES = {"cpu": (256, 512), "cuda": (1024, 2048)}


class Training:
    """A network of two convolutions in training with a loss; each time the same one."""

    def __init__(self, loss: Loss, inputs: Inputs, *, compiled: bool) -> None:
        torch.manual_seed(0)
        device = inputs.weight.device
        layers = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, CLASSES, 3, padding=1)
        self.network = nn.Sequential(*layers).to(device)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.1)
        target, weight = inputs.targets[torch.int64], inputs.weight

        def loss_of(images: Tensor) -> Tensor:
            return loss(self.network(images), target, weight)

        self.loss_of: Callable[[Tensor], Tensor] = (
            compile_anew(loss_of, fullgraph=True) if compiled else loss_of
        )

    def step(self, images: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss_of(images)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def state(self) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.network.parameters()])


def losses(device: str) -> dict[str, tuple[Loss, Loss]]:
    """Each, and the one in plain PyTorch whose steps it must take."""
    best = kernels(device)[0]
    return {
        OURS: (our_loss(best), reference_loss),
        OURS + ONE_LEVEL: (our_cross_entropy(best), cross_entropy),
        "reference": (reference_loss, reference_loss),
        "F.cross_entropy": (cross_entropy, cross_entropy),
    }


def why_another(got: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """Why a step is not the expected one: loss or parameters differ by more than sums in another order do.

    Each adds up 10^5 to 10^6 pixels in float32, compiled code one by one: √pixels eps, as a random walk errs.
    """
    for name, one, other in zip(("loss", "parameters"), got, expected, strict=True):
        error = ((one - other).norm() / other.norm()).item()
        if not error <= 1e3 * torch.finfo(torch.float32).eps:
            return f"{name} differ by {error:.1e} from eager PyTorch's"
    return None


@dataclass(frozen=True)
class Report:
    """What came out of a device."""

    case: str
    labels: str
    device: str
    providers: list[Row]

    def as_json(self) -> dict[str, Any]:
        return {
            "input": self.case,
            "labels": self.labels,
            "gpu_before": {},
            "gpu_after": {},
            "goals": [],
            "providers": [asdict(row) for row in self.providers],
        }


def measure(device: str, *, rounds: int, seconds: float, compile_peers: bool, progress: Progress) -> Report:
    """A row for each loss, eager and compiled."""
    size = SIZES[device]
    case = f"training step, 1x{CLASSES}x{size[0]}x{size[1]} float32 on {device}"
    inputs = Inputs((1, CLASSES, *size), torch.float32, device)
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    variants = (False, True) if compile_peers else (False,)
    advance = add_task(progress, case, len(losses(device)) * len(variants) + WARM_UP_ROUNDS + rounds)
    rows, steps = {}, dict[str, Step]()
    for name, (loss, eager) in losses(device).items():
        expected = Training(eager, inputs, compiled=False)
        first = expected.step(images), expected.state()
        for compiled in variants:
            label = f"{name}{COMPILED * compiled}"
            training = Training(loss, inputs, compiled=compiled)
            try:
                done = training.step(images), training.state()
            except Exception as error:
                rows[label] = Row(label, skipped=first_line(error))
            else:
                rows[label] = Row(label, refused=why_another(done, first))
                if not rows[label].refused:
                    steps[label] = training.step
            advance()
    times = time_interleaved(steps, lambda: images, device, rounds, advance, seconds)
    for label, step in steps.items():
        ours = times.get(OURS + COMPILED * label.endswith(COMPILED))  # with compiled ones ours, compiled
        rows[label] = Row(
            label,
            **asdict(times[label]),
            ratio=quotient(times[label].median_ms, ours and ours.median_ms),
            extra_mib=round(peak_bytes(step, images) / 2**20, 2),
        )
    return Report(case, inputs.origin, device, list(rows.values()))


def show(report: Report, console: Console) -> None:
    title = f"{report.case}, {report.labels} labels"
    console.print(make_table(title, report.providers, report.device, (RATIO, EXTRA)))
    show_reasons(report.providers, console)


def write(reports: Sequence[Report], machine: Mapping[str, Any], rounds: int, output: Path) -> None:
    cases = [report.as_json() for report in reports]
    write_json(output / "step.json", {"machine": machine, "rounds": rounds, "cases": cases})


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser("step", __doc__).parse_args(argv)
    return run(arguments, devices(arguments.device), measure, show, write)


if __name__ == "__main__":
    sys.exit(main())
