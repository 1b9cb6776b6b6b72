"""The sweep in one picture."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .growth import Line, draw_lines
from .questions import (
    EXPONENT_SIDE,
    Case,
    Question,
    classes,
    images,
    lines_of,
    peers_of,
    pixels,
    ratio_grid,
    rows_of,
)
from .report import FLOOR, ONE_LEVEL, Report, describe_hardware, number

#: Questions whose cases have no order.
GROUPS = ("type of logits", "layout", "type of labels", "threads")


def draw(
    reports: Sequence[Report], questions: Sequence[Question], machine: Mapping[str, Any], file: Path
) -> None:
    """For each device: the growth of costs, the other questions, and ratios by size and classes."""
    by_device = [list(group) for _, group in itertools.groupby(questions, lambda question: question.device)]
    figure = Figure(figsize=(19, 27 * len(by_device)), layout="constrained")
    figure.suptitle(f"Loss and gradient on {describe_hardware(machine)}")
    for part, asked in zip(figure.subfigures(len(by_device), squeeze=False)[:, 0], by_device, strict=True):
        answers = {question.what: question.answers(reports) for question in asked}
        draw_device([axes for row in part.subplots(5, 3) for axes in row], answers)
    figure.savefig(file, dpi=90)


def draw_device(panels: Sequence[Axes], answers: Mapping[str, Mapping[str, Report]]) -> None:
    """A panel for each question and peer, less what was not measured."""
    size, grid = answers["pixels"], answers["pixels and classes"]
    time = partial(draw_growth, cost="median_ms", label="median ms")
    memory = partial(draw_growth, cost="extra_mib", label="MiB held beside logits, labels, gradient")
    drawings = [
        (size, partial(time, x=pixels, xlabel="size of the image")),
        (size, partial(memory, x=pixels, xlabel="size of the image")),
        (size, draw_roofline),
        (answers["classes"], partial(time, x=classes, xlabel="classes")),
        (answers["images"], partial(time, x=images, xlabel="images")),
        (size, draw_parts),
        *((answers[what], partial(draw_groups, what=what)) for what in GROUPS if what in answers),
        *((grid, partial(draw_ratios, name=name)) for name in peers_of(grid) if name != FLOOR),
    ]
    for axes, (found, drawing) in itertools.zip_longest(
        panels, drawings[: len(panels)], fillvalue=({}, None)
    ):
        if found:
            drawing(axes, found)
        else:
            axes.set_axis_off()


def draw_growth(
    axes: Axes, answers: Mapping[str, Report], x: Callable[[Case], float], cost: str, label: str, xlabel: str
) -> None:
    lines = [
        Line(line.name, line.x, [max(value, 1e-3) for value in line.cost], line.ours, line.since)
        for line in lines_of(answers, x, cost)
    ]
    ticks = {x(report.case): value for value, report in answers.items()}
    draw_lines(axes, lines, ticks, x.__name__)
    axes.set(xlabel=xlabel, ylabel=label)


def draw_roofline(axes: Axes, answers: Mapping[str, Report]) -> None:
    """The speed at which each provider gets through the bytes that it would have to move at the least."""
    ticks = {pixels(report.case): value for value, report in answers.items()}
    draw_lines(axes, lines_of(answers, pixels, "copy_percent"), ticks, None)
    axes.axhline(100, color="tab:red", linewidth=1)
    axes.set(xlabel="size of the image", ylabel="% of the copy's speed, by the least bytes")


def draw_parts(axes: Axes, answers: Mapping[str, Report]) -> None:
    """Forward and backward of the image that most questions are about."""
    rows = [
        row
        for row in answers.get(f"{EXPONENT_SIDE}²", next(iter(answers.values()))).providers
        if row.forward_ms
    ]
    names = [row.name for row in rows]
    forward = [row.forward_ms for row in rows]
    axes.barh(names, forward, color="tab:blue", label="forward")
    axes.barh(names, [row.backward_ms for row in rows], left=forward, color="tab:orange", label="backward")
    axes.invert_yaxis()
    axes.set(xlabel="median ms", title=f"{EXPONENT_SIDE}²: forward and backward")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def draw_groups(axes: Axes, answers: Mapping[str, Report], what: str) -> None:
    """A group of bars for each value, a bar for each provider."""
    rows = {name: row for name, row in rows_of(answers).items() if not name.endswith(ONE_LEVEL)}
    width = 0.8 / max(1, len(rows))
    for place, (name, found) in enumerate(rows.items()):
        at = [index + place * width - 0.4 for index, value in enumerate(answers) if value in found]
        axes.bar(at, [row.median_ms for row in found.values()], width, align="edge", label=name)
    axes.set_xticks(range(len(answers)), list(answers))
    axes.set(xlabel=what, ylabel="median ms", yscale="log")
    axes.margins(y=0.3)
    axes.legend(frameon=False, fontsize="small", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def draw_ratios(axes: Axes, answers: Mapping[str, Report], name: str) -> None:
    sides, counts, ratios = ratio_grid(name, answers)
    known = [[1.0 if ratio is None else ratio for ratio in row] for row in ratios]
    axes.imshow(known, cmap="Greens", norm="log", vmin=1, vmax=20, aspect="auto")
    for y, row in enumerate(ratios):
        for x, ratio in enumerate(row):
            axes.text(x, y, number(ratio, 1), ha="center", va="center")
    axes.set_xticks(range(len(sides)), [f"{side}²" for side in sides])
    axes.set_yticks(range(len(counts)), counts)
    axes.set(title=f"{name} / ours", xlabel="size of the image", ylabel="classes")
