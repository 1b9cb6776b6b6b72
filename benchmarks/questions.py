"""What is asked of the sweep, and what its reports answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .growth import Line
from .report import Case as CaseOfLoss
from .report import Report, Row

#: Smaller inputs cost what they cost without pixels.
EXPONENT_SIDE = 512


@dataclass(frozen=True)
class Case(CaseOfLoss):
    """An input on a device; the number of threads is None for all."""

    labels: torch.dtype = torch.int64
    layout: torch.memory_format = torch.contiguous_format
    threads: int | None = None

    def __str__(self) -> str:
        text = super().__str__()
        if self.labels != torch.int64:
            text += f", {name_of(self.labels)} labels"
        if self.layout != torch.contiguous_format:
            text += f", {name_of(self.layout)}"
        return text if self.threads is None else f"{text}, {self.threads} thread{'s'[: self.threads - 1]}"


def name_of(value: torch.dtype | torch.memory_format) -> str:
    return str(value).removeprefix("torch.").removesuffix("_format")


#: What a case is called among those of a question.
VALUES: dict[str, Callable[[Case], str]] = {
    "pixels": lambda case: f"{case.shape[2]}²",
    "pixels and classes": lambda case: f"{case.shape[2]}²×{case.shape[1]}",
    "classes": lambda case: f"{case.shape[1]}",
    "images": lambda case: f"{case.shape[0]}",
    "type of logits": lambda case: name_of(case.dtype),
    "layout": lambda case: name_of(case.layout),
    "type of labels": lambda case: name_of(case.labels),
    "threads": lambda case: "all" if case.threads is None else f"{case.threads}",
}


@dataclass(frozen=True)
class Question:
    """What changes from case to case."""

    what: str  # one of VALUES
    cases: Sequence[Case]

    @property
    def device(self) -> str:
        return self.cases[0].device

    def answers(self, reports: Sequence[Report]) -> dict[str, Report]:
        """The reports of its cases, by what these are called; those that were measured."""
        found = {report.case: report for report in reports}
        return {VALUES[self.what](case): found[case] for case in self.cases if case in found}


def rows_of(answers: Mapping[str, Report]) -> dict[str, dict[str, Row]]:
    """By the provider's name and what the case is called."""
    rows: dict[str, dict[str, Row]] = {}
    for value, report in answers.items():
        for row in report.providers:
            if row.median_ms is not None:
                rows.setdefault(row.name, {})[value] = row
    return rows


def lines_of(answers: Mapping[str, Report], x: Callable[[Case], float], cost: str) -> list[Line]:
    """Of each provider of which the cost is known, those of `EXPONENT_SIDE` and more in the exponent."""
    lines = []
    for name, rows in rows_of(answers).items():
        known = {value: getattr(row, cost) for value, row in rows.items() if getattr(row, cost) is not None}
        if known:
            cases = [answers[value].case for value in known]
            since = min((x(case) for case in cases if case.shape[2] >= EXPONENT_SIDE), default=0)
            lines.append(
                Line(
                    name,
                    [x(case) for case in cases],
                    list(known.values()),
                    name.startswith("ial_cuda"),
                    since,
                )
            )
    return lines


def pixels(case: Case) -> int:
    batch, _, height, width = case.shape
    return batch * height * width


def classes(case: Case) -> int:
    return case.shape[1]


def images(case: Case) -> int:
    return case.shape[0]


def peers_of(answers: Mapping[str, Report]) -> list[str]:
    """Whoever is compared with ours, and the floor."""
    return [name for name in rows_of(answers) if not name.startswith("ial_cuda")]


def ratio_grid(
    name: str, answers: Mapping[str, Report]
) -> tuple[list[int], list[int], list[list[float | None]]]:
    """The sides, the numbers of classes, and the ratios to ours by class and side."""
    rows = rows_of(answers).get(name, {})
    cases = {value: report.case for value, report in answers.items()}
    sides = sorted({case.shape[2] for case in cases.values()})
    counts = sorted({classes(case) for case in cases.values()})
    at = {(case.shape[1], case.shape[2]): rows[value].ratio for value, case in cases.items() if value in rows}
    return sides, counts, [[at.get((count, side)) for side in sides] for count in counts]


def exponents(reports: Sequence[Report], questions: Sequence[Question]) -> Iterator[dict[str, Any]]:
    """p in cost ~ pixels^p of each provider."""
    for question in questions:
        if question.what == "pixels":
            answers = question.answers(reports)
            for cost in ("median_ms", "extra_mib"):
                for line in lines_of(answers, pixels, cost):
                    if line.exponent is not None:
                        growth = {"name": line.name, "cost": cost, "exponent": line.exponent}
                        yield {"device": question.device} | growth
