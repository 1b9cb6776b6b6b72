"""Times losses over several processes beside losses of each process alone, with an image for each process.

    torchrun --nproc-per-node 2 -m benchmarks.processes

All processes take the same steps in the same order, and meet before each. The times are those of rank 0. A
loss over processes is timed if it and its gradient equal those of one process for all images.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ial_cuda import CITYSCAPES, cross_entropy, importance_aware_loss

from .harness.cli import make_plain_parser
from .harness.inputs import CROSS_ENTROPY, IAL, IGNORE_INDEX, Case, Inputs
from .harness.machine import describe_machine
from .harness.measure import Step, TwoPartStep, time_interleaved
from .harness.report import Report, Row, quotient, show, write
from .harness.tables import make_console

SIZES = [(512, 1024), (64, 64)]

#: Takes logits, target and options; returns the loss.
Loss = Callable[..., Tensor]
LOSSES: dict[str, Loss] = {
    CROSS_ENTROPY: partial(cross_entropy, ignore_index=IGNORE_INDEX),
    IAL: partial(importance_aware_loss, hierarchy=CITYSCAPES),
}


def options_over_processes(loss: str) -> dict[str, dict[str, Any]]:
    """The options of our loss, by name."""
    images, pixels = ({name: dist.group.WORLD} for name in ("process_group", "spatial_group"))
    pooled = (
        {'process_group, factor_scope="batch"': images | {"factor_scope": "batch"}} if loss == IAL else {}
    )
    return {"process_group": images, **pooled, "spatial_group": pixels}


class Part:
    """This process's part of logits and target, after a split of dimension ``dim`` of the logits."""

    def __init__(self, inputs: Inputs, dim: int) -> None:
        self.dim, self.source = dim, self.of(inputs.source, dim).contiguous()
        self.target = self.of(inputs.targets[torch.int64], max(dim - 1, 0)).contiguous()
        self.leaf = self.source.clone().requires_grad_()

    @staticmethod
    def of(tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(dist.get_world_size(), dim)[dist.get_rank()]

    def make_step(self, loss: Loss, **options: Any) -> Step:
        return TwoPartStep(
            lambda _: loss(self.leaf, target=self.target, **options),
            lambda value, _: torch.autograd.grad(value, self.leaf),
        )

    def why_wrong(self, inputs: Inputs, loss: Loss, **options: Any) -> str | None:
        """Why loss and gradient are not those of one process; None if they are."""
        step, scope = self.make_step(loss, **options), {k: options[k] for k in options if k == "factor_scope"}
        found = step.forward(self.leaf)
        (gradient,) = step.backward(found, self.leaf)
        whole = inputs.source.clone().requires_grad_()
        expected = loss(whole, target=inputs.targets[torch.int64], **scope)
        (whole_gradient,) = torch.autograd.grad(expected, whole)
        # Each process returns the loss, and the gradient is that of their sum.
        expected_gradient = dist.get_world_size() * self.of(whole_gradient, self.dim)
        for name, one, other in (("loss", found, expected), ("gradient", gradient, expected_gradient)):
            error = ((one - other).norm() / other.norm()).item()
            if not error <= 1e-5:  # float32 sums in another order
                return f"the {name} differs by {error:.1e} from that of one process"
        return None


def measure(case: Case, rounds: int) -> Report:
    """Ratios are to our loss of each process alone."""
    inputs = Inputs(case)
    images, pixels = Part(inputs, 0), Part(inputs, 2)
    ours = LOSSES[case.loss]
    steps = {"ial_cuda, each process alone": images.make_step(ours)}
    failed: dict[str, str | None] = {}
    for name, options in options_over_processes(case.loss).items():
        part = pixels if "spatial_group" in options else images
        label = f"ial_cuda, {name}"
        failed[label] = part.why_wrong(inputs, ours, **options)
        steps[label] = part.make_step(ours, **options)
    if case.loss == CROSS_ENTROPY:
        two = images.make_step(ours, grad_in_forward=False)
        steps["ial_cuda, each process alone, two passes"] = two
        torchs = partial(torch.nn.functional.cross_entropy, ignore_index=IGNORE_INDEX)
        steps["F.cross_entropy, each process alone"] = images.make_step(torchs)
    numbers = torch.zeros(5, dtype=torch.float64, device=case.device)
    steps["two all-reduces of five numbers"] = TwoPartStep(
        lambda _: dist.all_reduce(numbers), lambda *_: dist.all_reduce(numbers)
    )

    def begin() -> Tensor:
        """The logits are written again, as by the layer before."""
        for part in (images, pixels):
            part.leaf.detach().copy_(part.source)
        dist.barrier()
        return images.leaf

    times = time_interleaved(steps, begin, case.device, rounds, lambda: None)
    first = next(iter(times.values())).median_ms
    rows = [
        Row(name, failed=failed[name])
        if failed.get(name)
        else Row(name, **asdict(found), ratio=quotient(found.median_ms, first))
        for name, found in times.items()
    ]
    return Report(case, inputs.origin, rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_plain_parser("processes", __doc__)
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="instead of the usual sizes")
    arguments = parser.parse_args(argv)
    if "LOCAL_RANK" not in os.environ:
        print(
            "LOCAL_RANK is not set: start torchrun --nproc-per-node 2 -m benchmarks.processes",
            file=sys.stderr,
        )
        return 1
    device, backend = (
        ("cuda", "nccl")
        if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
        else ("cpu", "gloo")
    )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.set_num_threads(arguments.threads)
    dist.init_process_group(backend)
    reports: list[Report] = []
    for height, width in [arguments.size] if arguments.size else SIZES:
        for loss in LOSSES:
            case = Case(loss, device, torch.float32, (dist.get_world_size(), 19, height, width))
            reports.append(measure(case, arguments.rounds))
            if dist.get_rank() == 0:
                arguments.output.mkdir(parents=True, exist_ok=True)
                show(reports[-1], make_console())
                write(
                    reports,
                    describe_machine() | {"processes": dist.get_world_size()},
                    arguments.rounds,
                    arguments.output / "processes.json",
                )
    dist.destroy_process_group()
    return int(any(row.failed for report in reports for row in report.providers))


if __name__ == "__main__":
    sys.exit(main())
