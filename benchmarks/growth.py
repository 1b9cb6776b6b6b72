"""How a cost grows with what it is for: exponents, and the lines that show them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes


@dataclass(frozen=True)
class Line:
    """A provider's cost at each of ascending x; its exponent is of those from ``since`` on."""

    name: str
    x: Sequence[float]
    cost: Sequence[float]
    ours: bool = True
    since: float = 0

    @property
    def exponent(self) -> float | None:
        """p in cost ~ x^p, by least squares of the logarithms; None for a single point, or without cost."""
        points = [(x, cost) for x, cost in zip(self.x, self.cost, strict=True) if x >= self.since]
        if len(points) < 2 or min(cost for _, cost in points) <= 0:
            return None
        slope, _ = np.polyfit(*np.log(points).T, 1)
        return round(float(slope), 3)


def draw_lines(
    axes: Axes, lines: Sequence[Line], ticks: Mapping[float, str], of: str | None, *, figures: bool = False
) -> None:
    """A line for each provider, ours in colour, compiled ones dashed.

    Args:
        ticks: what the points of the x axis are called.
        of: what the exponents in the legend are of; None for none.
        figures: whether they stand at the points, above the highest line and below the others.
    """
    highest = max(lines, key=lambda line: line.cost[-1])
    colours = itertools.cycle(("tab:green", "tab:olive", "tab:cyan", "tab:blue"))
    greys = itertools.cycle(("tab:grey", "tab:grey", "black", "black"))
    for line, marker in zip(lines, itertools.cycle("osD^v<>"), strict=False):
        exponent = line.exponent if of else None
        axes.loglog(
            line.x,
            line.cost,
            marker=marker,
            color=next(colours if line.ours else greys),
            linestyle="--" if line.name.endswith("compiled") else "-",
            label=line.name if exponent is None else f"{line.name}, ~ {of}$^{{{exponent:.2f}}}$",
        )
        for x, cost in zip(line.x, line.cost, strict=True) if figures else ():
            text = f"{cost:,.0f}" if cost >= 100 else f"{cost:.3g}"
            offset = (0, 6 if line is highest else -15)
            axes.annotate(text, (x, cost), offset, textcoords="offset points", ha="center")
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
    axes.margins(x=0.1, y=0.25)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", fontsize="small")
