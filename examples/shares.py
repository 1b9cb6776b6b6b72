"""The share of a loss in a training step: steps, and their losses with the gradient alone, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from torch import Tensor

from benchmarks.common import Step, peak_bytes, time_interleaved
from benchmarks.report import EXTRA, RATIO, Row, make_table, quotient

IN_STEP, ALONE = "step", "alone"


def measure_shares(
    steps: Mapping[str, tuple[Step, Step]], ours: str, images: Tensor, device: str, rounds: int
) -> list[Row]:
    """Time and peak memory of each step, and of its loss alone.

    Args:
        steps: by loss, a training step and the loss alone, of ``images``.
        ours: the loss that the ratios are to.
    """
    every = {
        f"{part}, {name}": step
        for name, both in steps.items()
        for part, step in zip((IN_STEP, ALONE), both, strict=True)
    }
    memory = {name: peak_bytes(step, images) for name, step in every.items()}
    times = time_interleaved(every, lambda: images, device, rounds, lambda: None)
    return [
        Row(
            name,
            **asdict(times[name]),
            ratio=quotient(times[name].median_ms, times[f"{name.split(',')[0]}, {ours}"].median_ms),
            extra_mib=round(memory[name] / 2**20, 2),
        )
        for name in sorted(every, reverse=True)
    ]


def report_shares(title: str, rows: Sequence[Row], device: str, console: Console) -> dict[str, Any]:
    """Shows the rows and each loss' share of its step; both as JSON."""
    console.print(make_table(title, rows, device, (RATIO, EXTRA)))
    medians = {row.name: row.median_ms for row in rows}
    losses = [name.removeprefix(f"{ALONE}, ") for name in medians if name.startswith(ALONE)]
    shares = {
        name: round(100 * medians[f"{ALONE}, {name}"] / medians[f"{IN_STEP}, {name}"], 2) for name in losses
    }
    for name, share in shares.items():
        console.print(f"{name}: {share} % of its step", highlight=False)
    return {"share_percent": shares, "rows": [asdict(row) for row in rows]}
