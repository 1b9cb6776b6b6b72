"""Times a training step as a whole, eager and under torch.compile: a small network, a loss, the backward
pass, the optimizer. Before that, loss and parameters after one are compared with those of eager PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from .command import devices, make_parser
from .common import Step, Times, describe_machine, peak_bytes, time_interleaved, write_json
from .compare import first_line
from .inputs import Inputs
from .providers import Loss, compile_anew, cross_entropy, kernels, our_loss, reference_loss
from .report import EXTRA, RATIO, Row, make_table, quotient, show_reasons

CLASSES = 19
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
    ours = our_loss(kernels(device)[0])
    return {
        "ial_cuda": (ours, reference_loss),
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


def measure(device: str, rounds: int, seconds: float, *, compile_steps: bool) -> tuple[str, str, list[Row]]:
    """The input and the labels' origin in words, and a row for each loss, eager and compiled."""
    size = SIZES[device]
    inputs = Inputs((1, CLASSES, *size), torch.float32, device)
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)
    rows, steps = {}, dict[str, Step]()
    for name, (loss, eager) in losses(device).items():
        expected = Training(eager, inputs, compiled=False)
        first = expected.step(images), expected.state()
        for compiled in (False, True) if compile_steps else (False,):
            label = f"step, {name}{', compiled' if compiled else ''}"
            training = Training(loss, inputs, compiled=compiled)
            try:
                done = training.step(images), training.state()
            except Exception as error:
                rows[label] = Row(label, skipped=first_line(error))
                continue
            rows[label] = Row(label, refused=why_another(done, first))
            if not rows[label].refused:
                steps[label] = training.step
    times = time_interleaved(steps, lambda: images, device, rounds, lambda: None, seconds)
    for label, step in steps.items():
        ours = times.get("step, ial_cuda" + ", compiled" * label.endswith(", compiled"))
        extra = round(peak_bytes(step, images) / 2**20, 2)
        rows[label] = timed(label, times[label], ours, extra)
    text = f"training step, 1x{CLASSES}x{size[0]}x{size[1]} float32 on {device}"
    return text, inputs.origin, list(rows.values())


def timed(label: str, times: Times, ours: Times | None, extra_mib: float) -> Row:
    """Compiled steps as multiples of ours compiled, eager ones of ours eager."""
    ratio = quotient(times.median_ms, ours and ours.median_ms)
    return Row(label, **asdict(times), ratio=ratio, extra_mib=extra_mib)


def as_json(text: str, origin: str, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "input": text,
        "labels": origin,
        "gpu_before": {},
        "gpu_after": {},
        "goals": [],
        "providers": [asdict(row) for row in rows],
    }


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser("step", __doc__).parse_args(argv)
    torch.set_num_threads(arguments.threads)
    console, cases = Console(), []
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    for device in devices(arguments.device):
        text, origin, rows = measure(
            device, arguments.rounds, arguments.seconds, compile_steps=arguments.compile
        )
        console.print(make_table(f"{text}, {origin} labels", rows, device, (RATIO, EXTRA)))
        show_reasons(rows, console)
        cases.append(as_json(text, origin, rows))
        write_json(
            output / "step.json",
            {"machine": describe_machine(), "rounds": arguments.rounds, "cases": cases},
        )
    return int(not cases or any(row["refused"] for case in cases for row in case["providers"]))


if __name__ == "__main__":
    sys.exit(main())
