"""What came out of the benchmark of the loss: its rows, the goals, and both as tables, pictures and files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from .common import write_csv, write_json

PEERS, FLOOR = ("reference", "F.cross_entropy"), "copy floor"
COPY, SUM = "copy_ (1 read, 1 write)", "sum (1 read)"
UINT8, ONE_LEVEL = ", uint8 labels", ", one level"


@dataclass(frozen=True)
class Case:
    """An input on a device."""

    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    labels: ClassVar[torch.dtype] = torch.int64  # of rows whose names have no other

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')} on {self.device}"


@dataclass(frozen=True)
class Row:
    """A line of the table, of the CSV and of the picture."""

    name: str
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    forward_ms: float | None = None  # medians of the two parts of a step
    backward_ms: float | None = None
    graph_ms: float | None = None  # median as a CUDA graph
    ratio: float | None = None  # to ours
    gb_per_s: float | None = None  # 2 reads, 1 write of the logits, 2 of the labels; parts: their own
    copy_percent: float | None = None  # of the speed of the copy
    copy_ratio: float | None = None  # to the time of the copy, 1 read and 1 write of the logits
    extra_mib: float | None = None  # held at once, beside logits, target and, with fine logits, gradient
    process_mib: float | None = None  # the same by the growth of the process
    refused: str | None = None  # what is wrong with the result, which therefore has no time
    skipped: str | None = None  # why there is no result
    no_graph: str | None = None  # why there is no graph

    @property
    def ours(self) -> bool:
        return self.name.startswith("ial_cuda")


@dataclass(frozen=True)
class Report:
    """What came out of a case: all providers, ours first, the floor last; and where the time of ours goes."""

    case: Case
    labels: str
    providers: list[Row]
    parts: list[Row]
    gpu_before: dict[str, str] = field(default_factory=dict)  # its clocks, before and after the times
    gpu_after: dict[str, str] = field(default_factory=dict)

    @property
    def ratios(self) -> dict[str, float]:
        """How many times longer the peers take than ours, and ours than the copy floor."""
        ours, floor = self.providers[0], self.providers[-1]
        if ours.median_ms is None:
            return {}
        peers = [row for row in self.providers if row.name.startswith(PEERS) and row.median_ms is not None]
        ratios = {f"{row.name} / {ours.name}": row.ratio for row in peers}
        return ratios | {f"{ours.name} / {FLOOR}": round(ours.median_ms / floor.median_ms, 3)}

    def as_json(self) -> dict[str, Any]:
        return {
            "input": str(self.case),
            "labels": self.labels,
            "gpu_before": self.gpu_before,
            "gpu_after": self.gpu_after,
            "ratios": self.ratios,
            "goals": [goal.as_json() for goal in goals(self)],
            "providers": [asdict(row) for row in self.providers],
            "parts": [asdict(row) for row in self.parts],
        }


@dataclass(frozen=True)
class Goal:
    """A figure to reach; ``measured`` is None where there is none."""

    what: str
    bound: float
    at_least: bool  # or at most
    measured: float | None
    as_graph: float | None = None  # the same by the time as a graph

    @property
    def reached(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"reached": self.reached}


TWO_LAUNCHES, ONE_LAUNCH = "ial_cuda cuda_two_launches", "ial_cuda cuda_one_launch"
#: The rows that the goals are about.
OURS = [name + labels for name in (TWO_LAUNCHES, ONE_LAUNCH) for labels in ("", UINT8)]
#: What a step needs beside its traffic, in µs on a GPU of the H100's class: three small launches of 2 to 4 µs
#: and their gaps, which a peer has as well.
SMALL_LAUNCHES_US = 12
#: One launch on an H100: the share of the logits that it keeps for their second use, 3 of a thread's tiles
#: (2 in shared memory, 1 in registers); and what it needs beside its traffic, 6 µs for the barrier of each
#: wave of images, and 2 for the weights' launch where there are several waves.
ONE_LAUNCH = {
    "1x19x1024x2048 bfloat16 on cuda": (3 / 8, 6),
    "1x19x1024x2048 float32 on cuda": (3 / 16, 6),
    "8x11x720x960 bfloat16 on cuda": (3 / 7, 2 * 6 + 2),
    "8x11x720x960 float32 on cuda": (3 / 11, 3 * 6 + 2),
}


#: From this size on; smaller inputs cost what they cost without pixels.
GOAL_PIXELS = 256**2
#: On the CPU: how many times longer a peer must take than ours, and ours at the most than the copy floor.
CPU_PEER_BOUNDS = {"reference": 8, "reference, compiled": 6, "F.cross_entropy": 5}
CPU_FLOOR_BOUND = 4


def goals(report: Report) -> list[Goal]:
    """What our steps are to reach from `GOAL_PIXELS` on."""
    batch, _, *size = report.case.shape
    if batch * math.prod(size) < GOAL_PIXELS:
        return []
    return {"cpu": cpu_goals, "cuda": cuda_goals}[report.case.device](report)


def cpu_goals(report: Report) -> list[Goal]:
    """Of float32 logits, with all threads, the labels of all int64."""
    rows = {row.name: row for row in report.providers}
    ours = report.providers[0]
    found = [
        Goal(f"{name} / {ours.name}", bound, True, rows.get(name, Row(name)).ratio)
        for name, bound in CPU_PEER_BOUNDS.items()
    ]
    over_floor = quotient(ours.median_ms, report.providers[-1].median_ms)
    return [*found, Goal(f"{ours.name} / {FLOOR}", CPU_FLOOR_BOUND, False, over_floor)]


def cuda_goals(report: Report) -> list[Goal]:
    """What the traffic takes at the measured speed of the copy, and launches and barriers besides.

    The copy reads the logits once and writes once. In times of that:
    - two launches: 2 reads and 1 write of the logits, 2 reads of the labels, 1.5 + labels / logits;
    - one launch: the same without the second read of what it keeps. What L2 keeps is not counted for anyone;
    - peers: none needs less than 2 reads, 1 write and 3 reads of int64 labels, 1.5 + 1.5 labels / logits.
      That is Inductor's code for F.cross_entropy (as generated for sm_90): a kernel reads the logits for each
      pixel's maximum and sum, one the labels for the loss; in the backward pass one reads the labels for each
      pixel's factor, one reads both for the gradient and writes it. The 8 float32 a pixel that they write and
      read are taken to stay in L2. Peers that take rows of classes copy the logits besides.
    """
    case = report.case
    rows = {row.name: row for row in (*report.providers, *report.parts)}
    copy_ms = rows[COPY].median_ms
    pixel_bytes = case.shape[1] * case.dtype.itemsize
    peer_ms = (1.5 + 1.5 * torch.int64.itemsize / pixel_bytes) * copy_ms + SMALL_LAUNCHES_US / 1e3
    found = []
    for ours in (rows[name] for name in OURS if name in rows):
        labels = torch.uint8 if ours.name.endswith(UINT8) else case.labels
        traffic_ms = (1.5 + labels.itemsize / pixel_bytes) * copy_ms
        if ours.name.startswith(TWO_LAUNCHES):
            least_ms = traffic_ms + SMALL_LAUNCHES_US / 1e3
            bound = round(100 * traffic_ms / least_ms, 1)
            moved = ours.copy_percent and ours.copy_percent * ours.median_ms
            graph = quotient(moved, ours.graph_ms)
            found.append(Goal(f"{ours.name}: % of the copy's speed", bound, True, ours.copy_percent, graph))
        else:
            kept, beside_us = ONE_LAUNCH.get(str(case), (0, SMALL_LAUNCHES_US))
            least_ms = traffic_ms - kept / 2 * copy_ms + beside_us / 1e3
            bound = round(least_ms / copy_ms, 2)
            graph = quotient(ours.graph_ms, copy_ms)
            found.append(Goal(f"{ours.name}: times the copy's time", bound, False, ours.copy_ratio, graph))
        found.append(peer_goal(ours, report.providers, round(least_ms / peer_ms, 2)))
        found.append(Goal(f"{ours.name}: extra MiB", 1, False, ours.extra_mib))
    return found


def peer_goal(ours: Row, rows: Sequence[Row], bound: float) -> Goal:
    """Ours over the fastest of the others. The reference is our own loss, and no peer."""
    peers = [row for row in rows if not row.ours and "reference" not in row.name and row.name != FLOOR]
    timed = [row for row in peers if row.median_ms is not None]
    best = min(timed, key=lambda row: row.median_ms, default=Row("none measured"))
    graph_ms = min((row.graph_ms for row in timed if row.graph_ms is not None), default=None)
    measured, graph = quotient(ours.median_ms, best.median_ms), quotient(ours.graph_ms, graph_ms)
    return Goal(f"{ours.name} / best peer, {best.name}", bound, False, measured, graph)


def quotient(a: float | None, b: float | None) -> float | None:
    return round(a / b, 3) if a is not None and b else None


#: A column of a table: heading, value, digits.
Column = tuple[str, str, int]
RATIO, EXTRA, GRAPH = ("/ ours", "ratio", 2), ("extra MiB", "extra_mib", 1), ("graph ms", "graph_ms", 3)
#: The columns of every table of the loss, and those that a GPU has besides.
COLUMNS = (RATIO, ("GB/s", "gb_per_s", 1), EXTRA)
GPU_COLUMNS = (GRAPH, ("% of copy", "copy_percent", 1), ("/ copy", "copy_ratio", 2))


def plain_table(title: str, columns: Sequence[str]) -> Table:
    """Names at the left, and columns of figures."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def make_table(title: str, rows: Sequence[Row], device: str, columns: Sequence[Column]) -> Table:
    table = plain_table(title, ["median ms", "10–90 %", *(heading for heading, _, _ in columns)])
    digits = 3 if device == "cuda" else 2
    for row in rows:
        if row.refused or row.skipped:
            table.add_row(row.name, "wrong" if row.refused else "skipped")
            continue
        table.add_row(
            row.name,
            number(row.median_ms, digits),
            f"{row.p10_ms:.{digits}f}–{row.p90_ms:.{digits}f}",
            *(number(getattr(row, name), places) for _, name, places in columns),
        )
    return table


def make_goal_table(goals: Sequence[Goal]) -> Table:
    table = plain_table("Goals", ["goal", "measured", "as a graph", "reached"])
    for goal in goals:
        table.add_row(
            goal.what,
            f"{'≥' if goal.at_least else '≤'} {goal.bound}",
            number(goal.measured, 2),
            number(goal.as_graph, 2),
            {None: "not measured", True: "yes", False: "no"}[goal.reached],
        )
    return table


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def show(report: Report, console: Console) -> None:
    case = report.case
    columns = COLUMNS + GPU_COLUMNS if case.device == "cuda" else COLUMNS
    title = f"Loss and gradient, {case}, {report.labels} labels"
    console.print(make_table(title, report.providers, case.device, columns))
    show_reasons(report.providers, console)
    console.print(make_table("Where the time goes", report.parts, case.device, columns))
    for name, ratio in report.ratios.items():
        console.print(f"{name:<50} {ratio:8.2f}", highlight=False)
    if goals(report):
        console.print(make_goal_table(goals(report)))


def show_reasons(rows: Sequence[Row], console: Console) -> None:
    """Why a row lacks what others have."""
    for row in rows:
        if row.refused:
            console.print(f"{row.name} is wrong: {row.refused}", style="red", soft_wrap=True)
        if row.skipped:
            console.print(f"{row.name}: {row.skipped}", soft_wrap=True)
        if row.no_graph:
            console.print(f"{row.name}: no graph: {row.no_graph}", soft_wrap=True)


def describe_hardware(machine: Mapping[str, Any]) -> str:
    """For a picture's title."""
    hardware = f"{machine['cpu']} ({machine['threads']} threads)"
    if "gpu" in machine:
        hardware += f" and {machine['gpu']}"
    return f"{hardware}, torch {machine['torch']}"


def draw(reports: Sequence[Report], machine: Mapping[str, Any], file: Path) -> None:
    """A row of panels a case: the providers, and where the time of ours goes."""
    heights = [max(3.6, 0.36 * max(len(report.providers), len(report.parts))) for report in reports]
    figure = Figure(figsize=(13, sum(heights)), layout="constrained")
    figure.suptitle(f"Loss and gradient on {describe_hardware(machine)}")
    panels = figure.subplots(len(reports), 2, squeeze=False, width_ratios=(3, 2), height_ratios=heights)
    for report, (left, right) in zip(reports, panels, strict=True):
        peers = [row.name for row in report.providers if not row.ours]
        draw_bars(left, str(report.case), report.providers, grey=peers)
        draw_bars(right, "Where the time goes", report.parts, grey=(COPY, SUM))
    figure.savefig(file, dpi=120)


def draw_bars(axes: Axes, title: str, rows: Sequence[Row], grey: Sequence[str]) -> None:
    """Medians as bars, the 10 % to 90 % quantiles as whiskers."""
    rows = [row for row in rows if row.median_ms is not None]
    medians = [row.median_ms for row in rows]
    whiskers = [[row.median_ms - row.p10_ms for row in rows], [row.p90_ms - row.median_ms for row in rows]]
    colours = ["tab:grey" if row.name in grey else "tab:green" for row in rows]
    bars = axes.barh(
        [row.name for row in rows], medians, xerr=whiskers, color=colours, ecolor="black", capsize=2
    )
    axes.bar_label(bars, [f" {row.median_ms:.3g} ms, {number(row.ratio, 2)}×" for row in rows], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(title=title, xlabel="median ms; whiskers: 10 % and 90 %; ×: to ours")


def write(reports: Sequence[Report], machine: Mapping[str, Any], rounds: int, output: Path) -> Path:
    """The files of all reports; returns the picture's."""
    summary = {"machine": machine, "rounds": rounds, "cases": [report.as_json() for report in reports]}
    write_json(output / "loss.json", summary)
    write_csv(
        output / "loss.csv",
        [
            {"input": str(report.case), "section": section} | asdict(row)
            for report in reports
            for section, rows in (("providers", report.providers), ("parts", report.parts))
            for row in rows
        ],
    )
    picture = output / "loss.png"
    draw(reports, machine, picture)
    return picture
