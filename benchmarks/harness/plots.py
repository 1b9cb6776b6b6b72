"""Pictures of results: colours by provider, lines with labels at their ends, bars, heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .machine import describe_hardware
from .providers import COMPILED, IN_PLACE
from .report import FLOOR, Report, Row

#: Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, VERMILION, ORANGE, GREEN, PURPLE, SKY, BLACK = (
    "#0072B2",
    "#D55E00",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#000000",
)
GREY = "#7F7F7F"
#: By the beginning of a provider's name, without "F.interpolate + "; the first that fits.
COLOURS = {
    f"F.cross_entropy{COMPILED}": ORANGE,
    "F.cross_entropy": VERMILION,
    f"reference{COMPILED}": ORANGE,
    "reference": VERMILION,
    "ial_cuda triton": SKY,
    "ial_cuda cuda_one_launch": PURPLE,
    "ial_cuda": BLUE,
    "Liger": GREEN,
    "smp": GREEN,
    "kornia": PURPLE,
    "MONAI": SKY,
    FLOOR: BLACK,
}
LINE_GAP = 0.062  # between two labels, in heights of the axes


def short(name: str) -> str:
    """A provider's name without what comes before every peer's loss."""
    return name.removeprefix("F.interpolate + ")


def colour(name: str) -> str:
    return next((value for key, value in COLOURS.items() if short(name).startswith(key)), GREY)


def make_figure(width: float, height: float, rows: int, columns: int, **options: Any) -> tuple[Figure, Any]:
    """A figure and its axes, (rows, columns)."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, title: str, machine: Mapping[str, Any], device: str, note: str, file: Path) -> Path:
    """Adds the title and a caption with the machine, and writes the file."""
    figure.suptitle(title, fontsize="x-large", fontweight="bold")
    caption = "\n".join(filter(None, [note, describe_hardware(machine, device)]))
    figure.supxlabel(caption, fontsize="small", color="#444444")
    figure.savefig(file, dpi=110)
    return file


@dataclass(frozen=True)
class Line:
    """A provider's figure at each of ascending x."""

    name: str
    x: Sequence[float]
    y: Sequence[float]

    @property
    def exponent(self) -> float | None:
        """p in y ~ x^p by least squares of the logarithms; None of a single point, or where y is not positive."""
        if len(self.x) < 2 or min(self.y) <= 0:
            return None
        slope, _ = np.polyfit(np.log(self.x), np.log(self.y), 1)
        return round(float(slope), 3)


def draw_lines(axes: Axes, lines: Sequence[Line], ticks: Mapping[float, str], unit: str) -> None:
    """A logarithmic line for each provider. Its name and last figure stand at its end.

    Args:
        ticks: the names of the x.
        unit: of the figures in the labels.
    """
    for line in lines:
        ours = line.name.startswith("ial_cuda")
        axes.loglog(
            line.x,
            line.y,
            marker="o",
            markersize=4,
            color=colour(line.name),
            linewidth=3 if ours else 1.8,
            linestyle=":" if line.name == FLOOR else "--" if line.name.endswith(COMPILED) else "-",
            zorder=3 if ours else 2,
        )
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
    axes.set_axisbelow(True)
    axes.grid(alpha=0.25)
    label_ends(axes, lines, unit)


def label_ends(axes: Axes, lines: Sequence[Line], unit: str) -> None:
    """Labels beside the right edge, at the height of the lines' ends, but moved apart where they would overlap."""
    low, high = np.log(axes.get_ylim())
    left, right = np.log(axes.get_xlim())
    ends = sorted(((np.log(line.y[-1]) - low) / (high - low), line) for line in lines) if lines else []
    heights = spread([end for end, _ in ends], LINE_GAP)
    for (end, line), height in zip(ends, heights, strict=True):
        start = (np.log(line.x[-1]) - left) / (right - left)
        axes.annotate(
            f"{short(line.name)}  {short_number(line.y[-1])} {unit}",
            xy=(start, end),
            xytext=(1.04, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            color=colour(line.name),
            fontweight="bold" if line.name.startswith("ial_cuda") else "normal",
            arrowprops={"arrowstyle": "-", "color": colour(line.name), "linewidth": 0.6, "alpha": 0.6},
            annotation_clip=False,
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights, moved as little as needed so that neighbours are ``gap`` apart (pool adjacent violators)."""
    groups: list[list[float]] = []  # sum of the positions of a group's first label, members
    for place, height in enumerate(heights):
        groups.append([height - place * gap, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, count = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += count
    bases = [total / count for total, count in groups for _ in range(int(count))]
    return [base + place * gap for place, base in enumerate(bases)]


def short_number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw_bars(axes: Axes, names: Sequence[str], values: Sequence[float], texts: Sequence[str]) -> None:
    """Horizontal bars, each with its text behind it."""
    colours = [colour(name) for name in names]
    bars = axes.barh([short(name) for name in names], values, color=colours, height=0.7)
    axes.bar_label(bars, texts, padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.35)
    axes.tick_params(axis="y", length=0)


def draw_heat_map(
    axes: Axes,
    values: Sequence[Sequence[float | None]],
    columns: Sequence[str],
    rows: Sequence[str],
    most: float,
) -> None:
    """Speed-ups as numbers on a logarithmic scale of blues from 1 to ``most``."""
    known = [[1.0 if value is None else max(value, 1.0) for value in row] for row in values]
    axes.imshow(known, cmap="Blues", norm="log", vmin=1, vmax=most, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            dark = value is not None and value > most**0.6
            text = "–" if value is None else f"{value:.1f}×"
            axes.text(x, y, text, ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)


def lines_of(
    reports: Sequence[Report], x: Mapping[str, float], figure: str, peers: int | None = None
) -> list[Line]:
    """A line for each provider that has the figure: our best backends and the fastest peers.

    Args:
        reports: of one loss, device and dtype, ascending in x.
        x: of each report, by the name of its case.
        figure: a field of `Row`.
        peers: how many, the fastest at the largest x that they were measured at; None for all.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for report in reports:
        for row in report.providers:
            value = getattr(row, figure)
            if value is not None and not row.name.endswith(IN_PLACE):
                points.setdefault(row.name, []).append((x[str(report.case)], value))
    chosen = [name for name in points if name.startswith("ial_cuda") and "," not in name]
    others = [row.name for row in fastest(reports) if row.name in points]
    chosen += others[:peers]
    return [Line(name, *map(list, zip(*points[name], strict=True))) for name in chosen]


def fastest(reports: Sequence[Report]) -> list[Row]:
    """The peers, by their time at the most pixels at which they were measured, over ours there."""
    found: dict[str, Row] = {}
    for report in reports:
        peers = [row for row in report.providers if row.ratio and not row.ours and row.name != FLOOR]
        found |= {row.name: row for row in peers}
    return sorted(found.values(), key=lambda row: row.ratio or 0)
