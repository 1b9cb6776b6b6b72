"""The share of a loss in a training step: the step and the loss alone, measured side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from torch import Tensor

from benchmarks.harness.measure import Step, peak_bytes, time_interleaved
from benchmarks.harness.report import Row, mib, quotient
from benchmarks.harness.tables import number, print_table

STEP, ALONE = "step", "alone"


def measure_shares(
    steps: Mapping[str, tuple[Step, Step]], ours: str, images: Tensor, device: str, rounds: int
) -> list[Row]:
    """Time and peak memory of each training step, and of each loss with its gradient alone.

    Args:
        steps: by name of the loss, both as functions of ``images``.
        ours: the loss that ratios are relative to.
    """
    every = {
        f"{part}, {name}": step
        for name, both in steps.items()
        for part, step in zip((STEP, ALONE), both, strict=True)
    }
    memory = {name: peak_bytes(step, images) for name, step in every.items()}
    times = time_interleaved(every, lambda: images, device, rounds, lambda: None)
    return [
        Row(
            name,
            **asdict(times[name]),
            ratio=quotient(times[name].median_ms, times[f"{name.split(',')[0]}, {ours}"].median_ms),
            extra_mib=mib(memory[name]),
        )
        for name in sorted(every, reverse=True)
    ]


def show_shares(title: str, rows: Sequence[Row], console: Console) -> dict[str, Any]:
    """Shows each loss's share of its step; shares and rows as JSON."""
    by_name = {row.name: row for row in rows}
    losses = [name.removeprefix(f"{ALONE}, ") for name in by_name if name.startswith(ALONE)]
    shares, cells = {}, []
    for loss in losses:
        step, alone = by_name[f"{STEP}, {loss}"], by_name[f"{ALONE}, {loss}"]
        shares[loss] = round(100 * alone.median_ms / step.median_ms, 2)
        figures = [(step.median_ms, 1), (alone.median_ms, 2), (shares[loss], 2)]
        figures += [(step.extra_mib, 1), (alone.extra_mib, 1)]
        cells.append([loss, *(number(value, digits) for value, digits in figures)])
    headings = ["", "step ms", "loss alone ms", "share %", "step MiB", "loss alone MiB"]
    print_table(console, title, headings, cells)
    return {"share_percent": shares, "rows": [asdict(row) for row in rows]}
