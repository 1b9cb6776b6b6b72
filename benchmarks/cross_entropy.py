"""Times cross-entropy, value and gradient: ours beside PyTorch's, eager and compiled, and beside the IAL of
four levels. Images, label smoothing, coarse logits, and rows of pixels."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from .command import add_task, devices, make_parser, run
from .common import WARM_UP_ROUNDS, peak_bytes, write_json
from .compare import examine_all, judge_all, right, time_all
from .inputs import Inputs
from .providers import (
    DTYPES,
    Loss,
    Provider,
    cross_entropy,
    interpolated,
    kernels,
    make_peers,
    our_cross_entropy,
    our_loss,
    reference_loss,
)
from .report import EXTRA, GRAPH, RATIO, Goal, Row, make_goal_table, make_table, show_reasons

PEER = "F.cross_entropy"
COMPILED, FOUR_LEVELS, TWO_PASSES = f"{PEER}, compiled", ", four levels", ", two passes"


def as_rows(loss: Loss) -> Loss:
    """The loss of rows (N·H·W, C), a view of channels_last logits."""

    def of_rows(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return loss(logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1]), target.flatten(), weight)

    return of_rows


@dataclass(frozen=True)
class Form:
    """What is done with the logits, by us and by PyTorch."""

    peer: Loss = cross_entropy
    options: dict[str, Any] = field(default_factory=dict)  # of ours
    around: Callable[[Loss], Loss] = lambda loss: loss  # every loss
    layout: torch.memory_format = torch.contiguous_format
    ratio: int = 1  # of the labels' sides to the logits'
    four_levels: bool = True  # which rows have not: each is an image


SMOOTHED = {"label_smoothing": 0.1}
FORMS = {
    "images": Form(),
    "smoothed": Form(partial(cross_entropy, **SMOOTHED), SMOOTHED),
    "coarse": Form(interpolated(cross_entropy), {"upsample": "bilinear"}, ratio=4),
    "rows": Form(around=as_rows, layout=torch.channels_last, four_levels=False),
}
#: What is measured, and on the CPU the least ratios of others' times to ours.
CASES: list[tuple[str, tuple[int, ...], dict[str, float]]] = [
    ("images", (1, 19, 512, 1024), {FOUR_LEVELS: 1.43, PEER: 14, COMPILED: 5.5}),
    ("smoothed", (1, 19, 512, 1024), {}),
    ("coarse", (1, 19, 128, 256), {PEER: 11}),
    ("coarse", (1, 19, 256, 512), {PEER: 14, COMPILED: 8.4}),
    ("images", (1, 19, 64, 64), {PEER: 1.33}),
    ("images", (1, 19, 256, 256), {PEER: 2.8}),
    ("images", (1, 2, 512, 512), {PEER: 2.5}),
    ("rows", (1, 19, 256, 256), {PEER: 3}),
]


@dataclass(frozen=True)
class Case:
    """An input on a device."""

    device: str
    dtype: torch.dtype
    form: str
    shape: tuple[int, ...]
    bounds: Mapping[str, float]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.form}, {'x'.join(map(str, self.shape))} {dtype} on {self.device}"


@dataclass(frozen=True)
class Report:
    """What came out of a case, ours first."""

    case: Case
    labels: str
    providers: list[Row]
    gpu_before: dict[str, str]
    gpu_after: dict[str, str]

    @property
    def goals(self) -> list[Goal]:
        ours = self.providers[0]
        ratios = {row.name.removeprefix(ours.name): row.ratio for row in self.providers}
        return [
            Goal(f"{name.lstrip(', ')} / ours", bound, True, ratios.get(name))
            for name, bound in self.case.bounds.items()
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "input": str(self.case),
            "labels": self.labels,
            "gpu_before": self.gpu_before,
            "gpu_after": self.gpu_after,
            "goals": [goal.as_json() for goal in self.goals],
            "providers": [asdict(row) for row in self.providers],
        }


def make_providers(case: Case, *, compile_peers: bool) -> list[Provider]:
    """Ours, the best first, then PyTorch's, by which ours is judged."""
    form = FORMS[case.form]
    best, *others = kernels(case.device)
    peer = form.around(form.peer)
    ours = {f"ial_cuda {name}": our_cross_entropy(name, **form.options) for name in (best, *others)}
    ours[f"ial_cuda {best}{TWO_PASSES}"] = our_cross_entropy(best, grad_in_forward=False, **form.options)
    providers = [Provider(name, form.around(loss), peer) for name, loss in ours.items()]
    if form.four_levels:
        eager = partial(reference_loss, **form.options)
        providers.append(Provider(f"ial_cuda {best}{FOUR_LEVELS}", our_loss(best, **form.options), eager))
    return providers + make_peers(PEER, peer, compiled=compile_peers)


def measure(case: Case, *, rounds: int, seconds: float, compile_peers: bool, progress: Progress) -> Report:
    """Checks all providers, times those that are right, and then measures their memory."""
    torch.compiler.reset()  # one function is compiled for eight sizes only
    form = FORMS[case.form]
    inputs = Inputs(case.shape, case.dtype, case.device, form.ratio, form.layout)
    providers = make_providers(case, compile_peers=compile_peers)
    advance = add_task(progress, f"{case}", len(providers) + WARM_UP_ROUNDS + rounds)
    rows = examine_all(providers, inputs, judge_all(providers, inputs), advance)
    timed = right(providers, rows)
    timing = time_all(timed, {}, providers[0].name, inputs, case.device, rounds, advance, seconds)
    for provider in timed:
        extra = peak_bytes(provider.step(inputs), inputs.logits()) - inputs.written.nbytes
        rows[provider.name] = timing.fill(rows[provider.name], extra_mib=round(extra / 2**20, 2))
    return Report(case, inputs.origin, list(rows.values()), timing.gpu_before, timing.gpu_after)


def show(report: Report, console: Console) -> None:
    columns = (RATIO, EXTRA, GRAPH) if report.case.device == "cuda" else (RATIO, EXTRA)
    title = f"Cross-entropy and gradient, {report.case}, {report.labels} labels"
    console.print(make_table(title, report.providers, report.case.device, columns))
    show_reasons(report.providers, console)
    if report.goals:
        console.print(make_goal_table(report.goals))


def write(reports: Sequence[Report], machine: Mapping[str, Any], rounds: int, output: Path) -> None:
    cases = [report.as_json() for report in reports]
    write_json(output / "cross_entropy.json", {"machine": machine, "rounds": rounds, "cases": cases})


def make_cases(device: str | None) -> list[Case]:
    return [
        Case(name, DTYPES[name][0], form, shape, bounds if name == "cpu" else {})
        for name in devices(device)
        for form, shape, bounds in CASES
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser("cross_entropy", __doc__)
    parser.add_argument("--only", default="", metavar="REGEX", help="the cases in whose names this is found")
    arguments = parser.parse_args(argv)
    cases = [case for case in make_cases(arguments.device) if re.search(arguments.only, str(case))]
    return run(arguments, cases, measure, show, write)


if __name__ == "__main__":
    sys.exit(main())
