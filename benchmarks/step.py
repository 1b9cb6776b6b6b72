"""Times a training step: a small network, a loss, the backward pass, the optimizer; eager and compiled.

Loss and parameters after a step must be those of eager PyTorch before the step is timed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from .harness.benchmark import Settings
from .harness.cli import devices, make_parser, run
from .harness.inputs import Case, Inputs
from .harness.measure import WARM_UP_ROUNDS, Step, peak_bytes, time_interleaved
from .harness.providers import (
    COMPILED,
    Loss,
    compile_anew,
    cross_entropy,
    kernels,
    our_cross_entropy,
    our_loss,
    reference_loss,
)
from .harness.report import Report, Row, first_line, mib, quotient

CLASSES = 19
SIZES = {"cpu": (256, 512), "cuda": (1024, 2048)}


class Training:
    """A network of two convolutions in training with a loss; always from the same seed."""

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
    """Each loss, and the same in plain PyTorch, whose steps it must take."""
    best = kernels(device)[0].name
    return {
        "ial_cuda cross-entropy": (our_cross_entropy(best), cross_entropy),
        "F.cross_entropy": (cross_entropy, cross_entropy),
        "ial_cuda IAL": (our_loss(best), reference_loss),
        "reference IAL": (reference_loss, reference_loss),
    }


def why_different(got: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """Why a step is not the expected one, in one line; None if it is.

    Each sums 10^5 to 10^6 pixels in float32, compiled code one by one: errors grow as √pixels eps.
    """
    for name, one, other in zip(("loss", "parameters"), got, expected, strict=True):
        error = ((one - other).norm() / other.norm()).item()
        if not error <= 1e3 * torch.finfo(torch.float32).eps:
            return f"{name} differ by {error:.1e} from eager PyTorch's"
    return None


def measure(case: Case, settings: Settings) -> Report:
    """A row for each loss, eager and compiled. Ratios are to cross-entropy of ours, eager."""
    inputs = Inputs(case)
    _, _, height, width = case.shape
    images = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(case.device)
    variants = (False, True) if settings.compile else (False,)
    count = len(losses(case.device)) * len(variants)
    advance = settings.begin(case, count + WARM_UP_ROUNDS + settings.rounds)
    rows: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    for name, (loss, eager) in losses(case.device).items():
        expected = Training(eager, inputs, compiled=False)
        first = expected.step(images), expected.state()
        for compiled in variants:
            label = f"{name}{COMPILED * compiled}"
            training = Training(loss, inputs, compiled=compiled)
            try:
                done = training.step(images), training.state()
            except Exception as error:
                rows[label] = Row(label, failed=f"{type(error).__name__}: {first_line(error)}")
            else:
                rows[label] = Row(label, failed=why_different(done, first))
                if not rows[label].failed:
                    steps[label] = training.step
            advance()
    times = time_interleaved(steps, lambda: images, case.device, settings.rounds, advance, settings.seconds)
    ours = times.get(next(iter(rows)))
    for label, step in steps.items():
        ratio = quotient(times[label].median_ms, ours and ours.median_ms)
        extra = mib(peak_bytes(step, images))
        rows[label] = replace(rows[label], **asdict(times[label]), ratio=ratio, extra_mib=extra)
    return Report(case, inputs.origin, list(rows.values()))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser("step", __doc__).parse_args(argv)
    cases = [
        Case("training step", device, torch.float32, (1, CLASSES, *SIZES[device]))
        for device in devices(arguments.device)
    ]
    return run("step", arguments, cases, measure)


if __name__ == "__main__":
    sys.exit(main())
