"""What came out of the sweep, as tables and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .common import write_csv, write_json
from .questions import Question, exponents, peers_of, ratio_grid, rows_of
from .report import Report, Row, goals, number, plain_table, show_reasons
from .sweep_picture import draw

PICTURE = "sweep.png"


def show(report: Report, console: Console) -> None:
    """A line: the tables come when all is measured."""
    ours = report.providers[0]
    if ours.median_ms is not None:
        peers = ", ".join(f"{name.split(' / ')[0]} {ratio:.2f}" for name, ratio in report.ratios.items())
        console.print(f"{report.case}: {ours.median_ms:.3f} ms; {peers}", highlight=False, soft_wrap=True)
    show_reasons(report.providers, console)


def make_question_table(question: Question, answers: Mapping[str, Report]) -> Table:
    """Median ms of each provider, and how many times ours that is."""
    case = question.cases[0]
    table = plain_table(f"Median ms (/ ours) against {question.what}, as of {case}", list(answers))
    for name, rows in rows_of(answers).items():
        cells = [rows.get(value) for value in answers]
        table.add_row(name, *(cell_of(row) for row in cells))
    return table


def cell_of(row: Row | None) -> str:
    if row is None:
        return ""
    digits = 3 if row.median_ms < 1 else 1
    return f"{row.median_ms:.{digits}f} ({number(row.ratio, 2)})"


def make_ratio_table(name: str, answers: Mapping[str, Report]) -> Table:
    """The times of one provider as multiples of ours: a row for each number of classes."""
    sides, counts, ratios = ratio_grid(name, answers)
    table = plain_table(f"{name} / ours", [f"{side}²" for side in sides])
    for count, row in zip(counts, ratios, strict=True):
        table.add_row(f"{count} classes", *(number(ratio, 2) for ratio in row))
    return table


def write(
    reports: Sequence[Report],
    machine: Mapping[str, Any],
    rounds: int,
    output: Path,
    questions: Sequence[Question],
) -> Path:
    """The files of all reports; returns the picture's."""
    summary = {
        "machine": machine,
        "rounds": rounds,
        "cases": [report.as_json() for report in reports],
        "questions": [
            {
                "what": question.what,
                "device": question.device,
                "inputs": [str(case) for case in question.cases],
            }
            for question in questions
        ],
        "exponents": list(exponents(reports, questions)),
    }
    write_json(output / "sweep.json", summary)
    rows = [
        {"input": str(report.case)} | asdict(row)
        for report in reports
        for row in (*report.providers, *report.parts)
    ]
    write_csv(output / "sweep.csv", rows)
    return output / PICTURE


def conclude(
    reports: Sequence[Report],
    machine: Mapping[str, Any],
    output: Path,
    console: Console,
    questions: Sequence[Question],
) -> None:
    """A table for each question, what grows how, which goals are missed, and the picture."""
    for question in questions:
        answers = question.answers(reports)
        if question.what == "pixels and classes":
            for peer in peers_of(answers):
                console.print(make_ratio_table(peer, answers))
        elif answers:
            console.print(make_question_table(question, answers))
    for growth in exponents(reports, questions):
        console.print("{device}: {cost} of {name} ~ pixels^{exponent:.2f}".format(**growth), highlight=False)
    found = [(report.case, goal) for report in reports for goal in goals(report)]
    missed = [(case, goal) for case, goal in found if goal.reached is False]
    console.print(f"{len(found) - len(missed)} of {len(found)} goals reached; missed:" if missed else "")
    for case, goal in missed:
        bound = f"{'≥' if goal.at_least else '≤'} {goal.bound}"
        console.print(
            f"{case}: {goal.what} is {goal.measured:.2f}, goal {bound}", highlight=False, soft_wrap=True
        )
    draw(reports, questions, machine, output / PICTURE)
