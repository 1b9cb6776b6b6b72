"""What came out of the benchmark of upsampling: the goals, how costs grow with the size, the picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console

from .common import write_csv, write_json
from .growth import Line, draw_lines
from .report import (
    EXTRA,
    GRAPH,
    RATIO,
    SMALL_LAUNCHES_US,
    TWO_LAUNCHES,
    Goal,
    Row,
    describe_hardware,
    make_goal_table,
    make_table,
    peer_goal,
    quotient,
    show_reasons,
)
from .report import Case as CaseOfLoss

CROSS_ENTROPY, IAL = "cross-entropy", "IAL"
#: What upsamples first, by the loss.
PEERS = {CROSS_ENTROPY: "F.interpolate + F.cross_entropy", IAL: "F.interpolate + reference"}
#: The size of the labels that the goals are for.
GOAL_SIZES = {"cpu": (512, 1024), "cuda": (1024, 2048)}
#: On the CPU, how many times longer the peers must take there.
CPU_PEER_BOUNDS = {"": 10, ", compiled": 6}
#: On a GPU of the H100's class instructions are the limit, not memory, so the copy gives no bound: 60 µs
#: where each clock issues, 75 where four in five do, and the small launches.
GOAL_US = 75 + SMALL_LAUNCHES_US
#: There, ours over the best peer. None needs less than to write something of the fine logits' size, to read
#: it in the backward pass, and to read int64 labels three times, as Inductor's code for F.interpolate and
#: F.cross_entropy does: 210 MB in bfloat16, 369 in float32, at 3.0 TB/s 70 and 123 µs, and small launches.
#: The four float32 atomics for each fine logit, which add up its gradient, are not counted.
PEER_BOUNDS = {
    torch.bfloat16: round(GOAL_US / (70 + SMALL_LAUNCHES_US), 2),
    torch.float32: round(GOAL_US / (123 + SMALL_LAUNCHES_US), 2),
}


@dataclass(frozen=True)
class Case(CaseOfLoss):
    """A loss of coarse logits on a device."""

    loss: str
    size: tuple[int, int]  # of the labels

    def __str__(self) -> str:
        coarse, (height, width) = "x".join(map(str, self.shape)), self.size
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.loss}, {coarse} to {height}x{width} {dtype} on {self.device}"

    @property
    def logits_mib(self) -> float:
        return math.prod(self.shape) * self.dtype.itemsize / 2**20


@dataclass(frozen=True)
class Report:
    """What came out of a case: all providers, ours first."""

    case: Case
    labels: str
    providers: list[Row]
    gpu_before: dict[str, str] = field(default_factory=dict)  # its clocks, before and after the times
    gpu_after: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "input": str(self.case),
            "labels": self.labels,
            "gpu_before": self.gpu_before,
            "gpu_after": self.gpu_after,
            "logits_mib": self.case.logits_mib,
            "goals": [goal.as_json() for goal in goals(self)],
            "providers": [asdict(row) for row in self.providers],
        }


def goals(report: Report) -> list[Goal]:
    """The goals of ours at the size that they are for."""
    case = report.case
    if case.size != GOAL_SIZES[case.device]:
        return []
    make = {"cpu": cpu_goals, "cuda": cuda_goals}[case.device]
    return [goal for row in report.providers if row.ours for goal in make(report, row)]


def cpu_goals(report: Report, ours: Row) -> list[Goal]:
    rows = {row.name: row for row in report.providers}
    found = []
    for compiled, bound in CPU_PEER_BOUNDS.items():
        name = PEERS[report.case.loss] + compiled
        measured = quotient(rows.get(name, Row(name)).median_ms, ours.median_ms)
        found.append(Goal(f"{name} / {ours.name}", bound, True, measured))
    return [*found, memory_goal(report, ours)]


def cuda_goals(report: Report, ours: Row) -> list[Goal]:
    """Of the CUDA kernels. The IAL has no peer but the reference."""
    if not ours.name.startswith(TWO_LAUNCHES):
        return []
    step, graph = (time and 1e3 * time for time in (ours.median_ms, ours.graph_ms))
    found = [Goal(f"{ours.name}: µs", GOAL_US, False, step, graph)]
    if report.case.loss == CROSS_ENTROPY:
        found.append(peer_goal(ours, report.providers, PEER_BOUNDS[report.case.dtype]))
    return [*found, memory_goal(report, ours)]


def memory_goal(report: Report, ours: Row) -> Goal:
    times_logits = quotient(ours.extra_mib, report.case.logits_mib)
    return Goal(f"{ours.name}: extra memory / logits", 2, False, times_logits)


#: What grows, and how the picture calls it.
COSTS = {"median_ms": "median ms", "extra_mib": "MiB held beside logits and labels"}


@dataclass(frozen=True)
class Curve:
    """How a provider's costs go with the size of the labels."""

    device: str
    dtype: str
    name: str
    sizes: list[tuple[int, int]]  # ascending
    median_ms: list[float]
    extra_mib: list[float]

    @property
    def pixels(self) -> list[int]:
        return [height * width for height, width in self.sizes]

    def line(self, cost: str) -> Line:
        return Line(self.name, self.pixels, getattr(self, cost), self.name.startswith("ial_cuda"))

    def exponent(self, cost: str) -> float | None:
        """p in cost ~ pixels^p."""
        return self.line(cost).exponent

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"exponents": {cost: self.exponent(cost) for cost in COSTS}}


def curves(reports: Sequence[Report]) -> list[Curve]:
    """Of cross-entropy, which is measured at every size."""
    points: dict[tuple[str, str, str], list[tuple[tuple[int, int], float, float]]] = {}
    for report in sorted(reports, key=lambda report: math.prod(report.case.size)):
        case = report.case
        for row in report.providers:
            if case.loss == CROSS_ENTROPY and row.median_ms is not None:
                kind = (case.device, str(case.dtype).removeprefix("torch."), row.name)
                points.setdefault(kind, []).append((case.size, row.median_ms, row.extra_mib))
    return [Curve(*kind, *map(list, zip(*found, strict=True))) for kind, found in points.items()]


#: The memory of the process tells what the profiler of tensors would miss; a GPU's allocator misses nothing.
COLUMNS = {"cpu": (RATIO, EXTRA, ("process MiB", "process_mib", 1)), "cuda": (RATIO, GRAPH, EXTRA)}


def show(report: Report, console: Console) -> None:
    case = report.case
    title = f"{case}, {report.labels} labels; logits of {case.logits_mib:.2f} MiB"
    console.print(make_table(title, report.providers, case.device, COLUMNS[case.device]))
    show_reasons(report.providers, console)
    if goals(report):
        console.print(make_goal_table(goals(report)))


def conclude(reports: Sequence[Report], _: Mapping[str, Any], __: Path, console: Console) -> None:
    """Tells how costs grow."""
    for curve in curves(reports):
        if len(curve.sizes) > 1:
            growth = ", ".join(f"{cost} ~ pixels^{curve.exponent(cost):.2f}" for cost in COSTS)
            console.print(f"{curve.name}, {curve.dtype} on {curve.device}: {growth}", highlight=False)


def draw(reports: Sequence[Report], machine: Mapping[str, Any], file: Path) -> None:
    """A row of panels for each type of logits on a device: the costs against the labels' size."""
    kinds: dict[tuple[str, str], list[Curve]] = {}
    for curve in curves(reports):
        kinds.setdefault((curve.device, curve.dtype), []).append(curve)
    rows = max(1, len(kinds))
    figure = Figure(figsize=(13, 5 * rows), layout="constrained")
    figure.suptitle(f"Cross-entropy of coarse logits and its gradient on {describe_hardware(machine)}")
    panels = figure.subplots(rows, len(COSTS), squeeze=False)
    for ((device, dtype), found), row in zip(kinds.items(), panels, strict=False):
        ticks = {
            pixels: f"{height}×{width}"
            for curve in found
            for (height, width), pixels in zip(curve.sizes, curve.pixels, strict=True)
        }
        for (cost, label), axes in zip(COSTS.items(), row, strict=True):
            draw_lines(axes, [curve.line(cost) for curve in found], ticks, "pixels", figures=True)
            axes.set(title=f"{dtype} on {device}", xlabel="labels' size", ylabel=label)
    figure.savefig(file, dpi=120)


def write(reports: Sequence[Report], machine: Mapping[str, Any], rounds: int, output: Path) -> Path:
    """The files of all reports; returns the picture's."""
    summary = {
        "machine": machine,
        "rounds": rounds,
        "cases": [report.as_json() for report in reports],
        "curves": [curve.as_json() for curve in curves(reports)],
    }
    write_json(output / "upsample.json", summary)
    write_csv(
        output / "upsample.csv",
        [{"input": str(report.case)} | asdict(row) for report in reports for row in report.providers],
    )
    picture = output / "upsample.png"
    draw(reports, machine, picture)
    return picture
