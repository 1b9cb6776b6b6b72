"""The results of a case: its rows, as a table and as JSON."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from .inputs import Case
from .machine import write_json
from .tables import number, print_table

FLOOR, COPY, SUM = "memory floor", "copy_ (1 read, 1 write)", "sum (1 read)"


@dataclass(frozen=True)
class Row:
    """The figures of a provider, or of a part of ours. None: not measured."""

    name: str
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    forward_ms: float | None = None  # medians of the two parts of a step
    backward_ms: float | None = None
    graph_ms: float | None = None  # median of the step as a CUDA graph
    ratio: float | None = None  # median over that of the first row
    gb_per_s: float | None = None  # the bytes that the loss must move at least, over the median
    copy_percent: float | None = None  # gb_per_s over that of copy_ in the same run
    extra_mib: float | None = None  # peak memory beside logits and labels; full size: beside the gradient too
    extra_maps: float | None = None  # peak memory beside the gradient too, in maps of 4 bytes a pixel
    process_mib: float | None = None  # extra_mib by the growth of the process
    failed: str | None = None  # why the result is wrong or there is none; such a row is not timed
    skipped: str | None = None  # why it was not tried
    no_graph: str | None = None  # why there is no graph

    @property
    def ours(self) -> bool:
        return self.name.startswith("ial_cuda")


@dataclass(frozen=True)
class Report:
    """The results of a case: the providers, ours first, and the parts of ours."""

    case: Case
    labels: str  # their origin
    providers: list[Row]
    parts: list[Row] = field(default_factory=list)
    gpu_before: dict[str, str] = field(default_factory=dict)  # clocks before and after the times
    gpu_after: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "input": str(self.case),
            "logits_mib": mib(self.case.logits_bytes),
            **asdict(self),
            "case": self.case.as_json(),
        }

    @property
    def peers(self) -> list[Row]:
        """The providers that are not ours, without the floor."""
        return [row for row in self.providers if not row.ours and row.name != FLOOR]


#: The columns of a table, in order of importance: heading, field, digits.
COLUMNS = (
    ("ms", "median_ms", 2),
    ("× ours", "ratio", 2),
    ("extra MiB", "extra_mib", 1),
    ("graph ms", "graph_ms", 3),
    ("10–90 %", "p90_ms", 2),
    ("GB/s", "gb_per_s", 1),
    ("% of copy", "copy_percent", 0),
    ("process MiB", "process_mib", 1),
    ("extra maps", "extra_maps", 1),
)


def show(report: Report, console: Console) -> None:
    """Prints the tables of a report, and why providers have no time."""
    title = f"{report.case}, {report.labels} labels: loss and gradient"
    show_rows(title, report.providers, report.case.device, console)
    show_reasons(report, console)
    if report.parts:
        show_rows("Parts of a step of ours", report.parts, report.case.device, console)


def show_reasons(report: Report, console: Console) -> None:
    """Prints in a line each why providers have no time."""
    for row in report.providers:
        style = "red" if row.failed and row.ours else ""
        if row.failed:
            console.print(f"{row.name}: failed: {row.failed}", style=style, markup=False, soft_wrap=True)
        if row.no_graph:
            console.print(f"{row.name}: no graph: {row.no_graph}", markup=False, soft_wrap=True)
    skipped = [f"{row.name} ({row.skipped})" for row in report.providers if row.skipped]
    if skipped:
        console.print(f"Skipped: {'; '.join(skipped)}", markup=False, soft_wrap=True)


def show_line(report: Report, console: Console) -> None:
    """Prints a report in one line: the time of ours, and the peers' times as multiples of it."""
    ours = report.providers[0]
    if ours.median_ms is not None:
        peers = [f"{row.name} {row.ratio:.1f}×" for row in report.peers if row.ratio]
        line = f"{report.case}: {ours.name} {ours.median_ms:.3g} ms; {'; '.join(peers)}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    show_reasons(report, console)


def show_rows(title: str, rows: Sequence[Row], device: str, console: Console) -> None:
    """A table of all columns that some row has. Rows that were skipped are left out."""
    rows = [row for row in rows if not row.skipped]
    columns = [column for column in COLUMNS if any(getattr(row, column[1]) is not None for row in rows)]
    fine = 1 if device == "cuda" else 0  # GPU times are shorter by an order of magnitude

    def cell(row: Row, field: str, digits: int) -> str:
        if field == "p90_ms":
            return "–".join(number(bound, digits + fine) for bound in (row.p10_ms, row.p90_ms))
        return number(getattr(row, field), digits + fine * (field == "median_ms"))

    cells = [
        [row.name, "failed"] if row.failed else [row.name, *(cell(row, *column[1:]) for column in columns)]
        for row in rows
    ]
    print_table(console, title, ["", *(heading for heading, _, _ in columns)], cells)


def quotient(a: float | None, b: float | None) -> float | None:
    return round(a / b, 3) if a is not None and b else None


def mib(size: int | None) -> float | None:
    return None if size is None else round(size / 2**20, 2)


def first_line(error: Exception) -> str:
    """The first line of an error's message, short and without paths."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip() or repr(error)
    return textwrap.shorten(re.sub(r"\S*/\S*", "…", lines.splitlines()[0]), 160, placeholder=" …")


def write(reports: Sequence[Report], machine: Mapping[str, Any], rounds: int, file: Path) -> None:
    """Writes a result file."""
    cases = [report.as_json() for report in reports]
    write_json(file, {"machine": machine, "rounds": rounds, "cases": cases})


def read(file: Path) -> tuple[list[Report], dict[str, Any]]:
    """The reports of a result file, and its machine."""
    result = json.loads(file.read_text())
    reports = [
        Report(
            Case.from_json(case["case"]),
            case["labels"],
            *([Row(**row) for row in case[rows]] for rows in ("providers", "parts")),
            case["gpu_before"],
            case["gpu_after"],
        )
        for case in result["cases"]
    ]
    return reports, result["machine"]
