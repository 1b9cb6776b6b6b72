"""Measures a case: providers are checked, the right ones are timed side by side, then their memory."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import NamedTuple

import torch
from rich.progress import Progress

from .inputs import CROSS_ENTROPY, Case, Inputs
from .machine import describe_gpu_state
from .measure import (
    CAPTURE,
    WARM_UP_ROUNDS,
    Step,
    Times,
    peak_bytes,
    peak_process_bytes,
    time_interleaved,
)
from .providers import Loss, Provider
from .report import COPY, FLOOR, SUM, Report, Row, mib, quotient
from .validation import Baseline, capture, check, make_baselines


class Settings:
    """How a case is measured, and the progress that is shown meanwhile."""

    def __init__(self, arguments: argparse.Namespace, progress: Progress) -> None:
        self.rounds: int = arguments.rounds
        self.seconds: float = arguments.seconds
        self.compile: bool = arguments.compile
        self._progress = progress

    def begin(self, case: Case, steps: int) -> Callable[[], None]:
        """Shows a line of progress. Returns a function that is called after each step."""
        task = self._progress.add_task(str(case), total=steps)

        def advance() -> None:
            self._progress.advance(task)
            self._progress.refresh()  # only here: a thread that draws would disturb the times

        return advance


class Part(NamedTuple):
    """A piece of a step, and the bytes that it must move."""

    step: Step
    moved: int = 0


def measure_case(
    case: Case,
    providers: Sequence[Provider],
    inputs: Inputs,
    settings: Settings,
    *,
    parts: Mapping[str, Part] | None = None,
    baselines: Mapping[Loss, Baseline] | None = None,
) -> Report:
    """The report of a case. The first provider is ours: all ratios are to its time.

    Args:
        parts: pieces of our step that are timed beside it.
        baselines: of the providers on ``inputs.tile``, where the caller has them already.
    """
    advance = settings.begin(case, len(providers) + WARM_UP_ROUNDS + settings.rounds)
    copies = copy_parts(case, inputs)
    rows = {}
    with threads(case.threads):
        baselines = baselines or make_baselines(providers, inputs)
        for provider in providers:
            rows[provider.name] = check(provider, inputs, baselines)
            advance()
        timed = [p for p in providers if not (rows[p.name].failed or rows[p.name].skipped)]
        others = {FLOOR: floor(case, copies)} if copies else {}
        others |= (parts or {}) if providers[0] in timed else {}
        others |= copies
        steps = {provider.name: provider.step(inputs) for provider in timed}
        graphs, no_graph = {}, {}
        if case.device in CAPTURE:
            captured = {provider.name: steps[provider.name] for provider in timed if provider.captured}
            graphs, no_graph = capture(captured, inputs, case.device)
        every = steps | {name: part.step for name, part in others.items()}
        every |= {f"{name}, graph": graph for name, graph in graphs.items()}
        gpu_before = describe_gpu_state() if case.device == "cuda" else {}
        times = time_interleaved(
            every, inputs.logits, case.device, settings.rounds, advance, settings.seconds
        )
        gpu_after = describe_gpu_state() if case.device == "cuda" else {}
    timing = Timing(times, providers[0].name, no_graph)
    for provider in timed:
        moved = least_bytes(case, inputs, provider) if copies else 0
        row = timing.fill(rows[provider.name], moved)
        rows[provider.name] = replace(row, **memory(case, provider, inputs))
    filled = {name: timing.fill(Row(name), part.moved) for name, part in others.items()}
    if copies:
        rows[FLOOR] = filled.pop(FLOOR)
        copy = filled[COPY]
        rows, filled = ({k: with_percent(row, copy) for k, row in of.items()} for of in (rows, filled))
    return Report(case, inputs.origin, list(rows.values()), list(filled.values()), gpu_before, gpu_after)


def with_percent(row: Row, copy: Row) -> Row:
    """The row with its speed over that of the copy, if it has a speed."""
    return replace(row, copy_percent=row.gb_per_s and round(100 * row.gb_per_s / copy.gb_per_s, 1))


@dataclass(frozen=True)
class Timing:
    """The times of the steps that were timed side by side."""

    times: dict[str, Times]  # those of graphs under the name of the step and ", graph"
    ours: str  # the step that ratios are to
    no_graph: dict[str, str] = field(default_factory=dict)

    def fill(self, row: Row, moved: int = 0) -> Row:
        """The row with its times and, from the bytes that it must move, its speed."""
        taken, ours, graph = (self.times.get(name) for name in (row.name, self.ours, f"{row.name}, graph"))
        speed = moved / 1e6 / taken.median_ms if moved else None
        row = replace(
            row,
            **asdict(taken),
            graph_ms=graph and graph.median_ms,
            ratio=quotient(taken.median_ms, ours and ours.median_ms),
            no_graph=self.no_graph.get(row.name),
        )
        return row if speed is None else replace(row, gb_per_s=round(speed, 2))


def memory(case: Case, provider: Provider, inputs: Inputs) -> dict[str, float | None]:
    """The peak memory of a step in MiB, without the gradient at full size, which every provider returns."""
    step = provider.step(inputs)
    peak = peak_bytes(step, inputs.logits())
    beside_gradient = peak - inputs.written.nbytes
    process = peak_process_bytes(step, inputs.logits()) if case.scale > 1 else None
    return {
        "extra_mib": mib(beside_gradient if case.scale == 1 else peak),
        "extra_maps": round(beside_gradient / (4 * case.pixels), 2),
        "process_mib": mib(process),
    }


# ---- the roofline: memory alone ----------------------------------------------------------------------------


def copy_parts(case: Case, inputs: Inputs) -> dict[str, Part]:
    """A copy of the logits to existing memory, and a read. None for coarse logits, which are small."""
    if case.scale > 1:
        return {}
    warm = torch.empty_like(inputs.written)
    size = inputs.written.nbytes
    return {
        COPY: Part(lambda logits: warm.copy_(logits.detach()), 2 * size),
        SUM: Part(lambda logits: logits.detach().sum(), size),
    }


def floor(case: Case, copies: Mapping[str, Part]) -> Part:
    """What the loss must move of the logits: a copy and, except for cross-entropy, one more read."""
    needed = [copies[COPY]] if case.loss == CROSS_ENTROPY else list(copies.values())
    return Part(lambda logits: [part.step(logits) for part in needed], sum(part.moved for part in needed))


def least_bytes(case: Case, inputs: Inputs, provider: Provider) -> int:
    """Cross-entropy: 1 read and 1 write of the logits, 1 read of the labels. Others: 1 more read of both."""
    reads = 1 if case.loss == CROSS_ENTROPY else 2
    return (reads + 1) * inputs.written.nbytes + reads * inputs.targets[provider.labels].nbytes


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Sets the number of torch's threads; None leaves it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
