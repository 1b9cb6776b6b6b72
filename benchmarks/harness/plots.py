"""Pictures of results: colours by provider, lines with labels at their ends, bars, heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .inputs import CROSS_ENTROPY, Case, name_of
from .machine import describe_hardware
from .providers import COMPILED, INTERPOLATE
from .report import COPY, FLOOR, Report, Row

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
#: By the beginning of a provider's name, without `INTERPOLATE`; the first that fits.
COLOURS = {
    "F.": VERMILION,
    "reference": VERMILION,
    "ial_cuda triton": SKY,
    "ial_cuda cuda_one_launch": PURPLE,
    "ial_cuda": BLUE,
    "Liger": GREEN,
    "smp": GREEN,
    "kornia": PURPLE,
    "MONAI": SKY,
    "mmsegmentation": GREEN,
    FLOOR: BLACK,
    "copy_": BLACK,
}
LINE_GAP = 0.062  # between two labels, in heights of the axes
LEAST_MIB = 0.01  # a logarithmic axis has no 0
MOST_PEERS = 3  # in a picture of lines


def short(name: str) -> str:
    """A provider's name without what comes before every peer's loss."""
    return name.removeprefix(INTERPOLATE)


def colour(name: str) -> str:
    if name.endswith(COMPILED) and not name.startswith("ial_cuda"):
        return ORANGE
    return next((value for key, value in COLOURS.items() if short(name).startswith(key)), GREY)


def make_figure(width: float, height: float, rows: int, columns: int) -> tuple[Figure, Any]:
    """A figure and its axes, (rows, columns)."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
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
            [max(value, LEAST_MIB) for value in line.y],
            marker="o",
            markersize=4,
            color=colour(line.name),
            linewidth=3 if ours else 1.8,
            linestyle=":" if colour(line.name) == BLACK else "--" if line.name.endswith(COMPILED) else "-",
            zorder=3 if ours else 2,
        )
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
    axes.set_axisbelow(True)
    axes.grid(alpha=0.25)
    label_ends(axes, lines, unit)


def label_ends(axes: Axes, lines: Sequence[Line], unit: str) -> None:
    """Labels at the right edge, at the height of the lines' ends, moved apart where they would overlap."""
    low, high = np.log(axes.get_ylim())
    left, right = np.log(axes.get_xlim())
    heights = [(np.log(max(line.y[-1], LEAST_MIB)) - low) / (high - low) for line in lines]
    ends = sorted(zip(heights, lines, strict=True), key=lambda end: end[0])
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
    """Ascending heights, moved as little as needed to be ``gap`` apart (pool adjacent violators)."""
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


def lines_of(reports: Sequence[Report], figure: str) -> list[Line]:
    """A figure against pixels: a line for each of our backends and for the fastest peers.

    Args:
        reports: of one loss, device and dtype, ascending in their pixels.
        figure: a field of `Row`.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for report in reports:
        for row in report.providers:
            value = getattr(row, figure)
            if value is not None:
                points.setdefault(row.name, []).append((float(report.case.pixels), value))
    chosen = [name for name in points if name.startswith("ial_cuda") and "," not in name]
    lines = [name for name, found in points.items() if len(found) > 1 or len(reports) == 1]
    others = [row.name for row in fastest(reports) if row.name in lines]
    chosen += others[:MOST_PEERS]
    return [Line(name, *map(list, zip(*points[name], strict=True))) for name in chosen]


def fastest(reports: Sequence[Report]) -> list[Row]:
    """The peers, by their time at the most pixels at which they were measured, over ours there."""
    found: dict[str, Row] = {}
    for report in reports:
        found |= {row.name: row for row in report.peers if row.ratio}
    return sorted(found.values(), key=lambda row: row.ratio or 0)


# ---- the pictures ------------------------------------------------------------------------------------------


def draw_speed_ups(reports: Sequence[Report], machine: Mapping[str, Any], file: Path) -> list[Path]:
    """A panel for each report: how many times longer each peer takes than ours."""
    if not reports:
        return []
    figure, axes = make_figure(7 * len(reports), 4.2, 1, len(reports))
    for panel, report in zip(axes[0], reports, strict=True):
        ours = report.providers[0]
        rows = [row for row in (ours, *fastest([report])) if row.median_ms is not None]
        texts = [f"{row.ratio:.1f}×  ({short_number(row.median_ms)} ms)" for row in rows]
        draw_bars(panel, [row.name for row in rows], [row.ratio for row in rows], texts)
        panel.set(title=str(report.case), xlabel="time / time of ial_cuda")
    note = "Loss and gradient, medians of interleaved rounds."
    title = "Time of the loss and its gradient"
    return [save(figure, title, machine, reports[0].case.device, note, file)]


def draw_resolution(
    reports: Sequence[Report], machine: Mapping[str, Any], title: str, file: Path
) -> list[Path]:
    """Time and memory against resolution: a column for each loss, ours and the three fastest peers."""
    if not reports:
        return []
    device, dtype = reports[0].case.device, reports[0].case.dtype
    reports = sorted(
        (r for r in reports if (r.case.device, r.case.dtype) == (device, dtype)), key=lambda r: r.case.pixels
    )
    losses = list(dict.fromkeys(report.case.loss for report in reports))
    figure, axes = make_figure(8.5 * len(losses), 8, 2, len(losses))
    for column, loss in enumerate(losses):
        found = [report for report in reports if report.case.loss == loss]
        for panel, (figure_name, label, unit) in zip(
            axes[:, column], [("median_ms", "time", "ms"), ("extra_mib", "extra memory", "MiB")], strict=True
        ):
            draw_lines(panel, lines_of(found, figure_name), ticks_of(found), unit)
            panel.set(title=loss, xlabel="size of the labels, pixels", ylabel=f"{label} ({unit})")
    first = reports[0].case
    note = f"{first.shape[0]} image, {first.shape[1]} classes, {name_of(dtype)}; medians; lower is better"
    note += f"; logits at 1/{first.scale} of the labels' size" * (first.scale > 1)
    held = "logits, labels and gradient" if first.scale == 1 else "logits and labels"
    note += f"\nextra memory: the peak beside {held}; less than {LEAST_MIB} is drawn as {LEAST_MIB}"
    return [save(figure, title, machine, device, note, file)]


def ticks_of(reports: Sequence[Report]) -> dict[float, str]:
    """The size of the labels of each report, by its pixels."""
    return {
        float(case.pixels): f"{case.scale * case.shape[2]}×{case.scale * case.shape[3]}"
        for case in (r.case for r in reports)
    }


def draw_roofline(reports: Sequence[Report], machine: Mapping[str, Any], file: Path) -> list[Path]:
    """The bytes that the loss must move, over the time, beside the speed of a copy: a panel for each loss."""
    if not reports:
        return []
    reports = sorted(reports, key=lambda report: report.case.pixels)
    losses = list(dict.fromkeys(report.case.loss for report in reports))
    figure, axes = make_figure(8.5 * len(losses), 5, 1, len(losses))
    for panel, loss in zip(axes[0], losses, strict=True):
        found = [report for report in reports if report.case.loss == loss]
        ticks = ticks_of(found)
        roof = [row.gb_per_s for report in found for row in report.parts if row.name == COPY]
        lines = [Line("copy_ (the roof)", list(ticks), roof), *lines_of(found, "gb_per_s")]
        draw_lines(panel, lines, ticks, "GB/s")
        panel.set(title=loss, xlabel="size of the image, pixels", ylabel="effective bandwidth (GB/s)")
    note = "Bytes that the loss must move at least, over the median time. Higher is better."
    return [
        save(figure, "Roofline of the loss and its gradient", machine, reports[0].case.device, note, file)
    ]


def draw_speed_up_map(
    reports: Sequence[Report], sides: Sequence[int], machine: Mapping[str, Any], file: Path
) -> list[Path]:
    """Classes against the sides of images: the time of each peer over ours; a panel for each peer."""
    losses = list(dict.fromkeys(report.case.loss for report in reports))
    peers = {
        loss: sorted({row.name for r in reports if r.case.loss == loss for row in fastest([r])})
        for loss in losses
    }
    count = max(map(len, peers.values()))
    figure, axes = make_figure(6.5 * count, 4.2 * len(losses), len(losses), count)
    for panels, loss in zip(axes, losses, strict=True):
        found = {report.case.shape[1:3]: report for report in reports if report.case.loss == loss}
        classes = sorted({c for c, side in found if side in sides and (c, sides[0]) in found})
        for panel, peer in zip(panels, peers[loss], strict=True):
            values = [[ratio_of(found.get((c, side)), peer) for side in sides] for c in classes]
            draw_heat_map(panel, values, [f"{side}²" for side in sides], [str(c) for c in classes], 20)
            panel.set(title=f"{loss}: {peer}", xlabel="size of the image, pixels", ylabel="classes")
    note = "Time of the peer over the time of ial_cuda, loss and gradient."
    return [save(figure, "Speed-up of ial_cuda", machine, reports[0].case.device, note, file)]


def ratio_of(report: Report | None, name: str) -> float | None:
    return next((row.ratio for row in report.providers if row.name == name), None) if report else None


#: The axes of the sweep beside pixels and classes: title, and the field of a case that changes.
AXES = {
    "dtype of the logits": "dtype",
    "layout": "layout",
    "dtype of the labels": "labels",
    "images of 256²": "shape",
    "threads": "threads",
}


def tick_of(case: Case, field: str) -> str:
    """A case's name on the axis of a field."""
    value = getattr(case, field)
    if field == "shape":
        return str(value[0])
    return str(value or "all") if field == "threads" else name_of(value).removesuffix("_format")


def draw_inputs(reports: Sequence[Report], machine: Mapping[str, Any], file: Path) -> list[Path]:
    """Time against what a user may pass: a panel for each axis, for cross-entropy."""
    reports = [report for report in reports if report.case.loss == CROSS_ENTROPY]
    default = next((report.case for report in reports if report.case.shape == (1, 19, 512, 512)), None)
    if default is None:
        return []
    panels = {}
    for axis, field in AXES.items():
        base = replace(default, shape=(1, 19, 256, 256)) if field == "shape" else default
        own = [r for r in reports if replace(r.case, **{field: getattr(base, field)}) == base]
        own = [r for r in own if r.case.shape[1:] == base.shape[1:] and r.providers[0].median_ms]
        panels[axis] = {tick_of(report.case, field): report for report in own}
    panels = {axis: found for axis, found in panels.items() if len(found) > 1}
    if not panels:
        return []
    figure, axes = make_figure(4.6 * len(panels), 4.8, 1, len(panels))
    for panel, (axis, found) in zip(axes[0], panels.items(), strict=True):
        names = dict.fromkeys(row.name for r in found.values() for row in r.providers if row.median_ms)
        chosen = [name for name in names if "," not in name or name.endswith(COMPILED)]
        width = 0.8 / len(chosen)
        for place, provider in enumerate(chosen):
            rows = [next((row for row in r.providers if row.name == provider), None) for r in found.values()]
            at = [index + (place + 0.5) * width - 0.4 for index in range(len(rows))]
            times = [row.median_ms or 0 if row else 0 for row in rows]
            style = {"hatch": "//", "edgecolor": "white"} if provider == FLOOR else {}
            panel.bar(at, times, width, color=colour(provider), label=provider, **style)
        panel.set_xticks(range(len(found)), list(found), rotation=20)
        panel.set(xlabel=axis, ylabel="time (ms)", yscale="log")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    note = "Cross-entropy and gradient, 1×19×512×512 float32 where the axis does not say otherwise; medians"
    return [save(figure, "Time against the form of the inputs", machine, default.device, note, file)]
