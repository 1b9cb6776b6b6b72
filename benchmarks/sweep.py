"""Times loss and gradient against resolution, classes, batch, dtypes, layout and threads."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .harness.benchmark import Settings, measure_case
from .harness.cli import devices, make_parser, run
from .harness.inputs import CROSS_ENTROPY, IAL, Case, Inputs, Tiled, label_dtypes
from .harness.measure import free_bytes
from .harness.plots import draw_inputs, draw_resolution, draw_roofline, draw_speed_up_map
from .harness.providers import DTYPES, Loss, Provider, make_ours, make_peers
from .harness.report import Report, mib, show_line
from .harness.validation import Baseline, make_baselines

SIDES = [64, 128, 256, 512, 1024, 2048, 4096, 8192]
QUICK_SIDES = [128, 256, 512, 1024]
MAP_SIDES, MAP_CLASSES = [256, 512, 1024, 2048], [2, 11, 19, 59, 150]
CLASSES, BATCHES = [*MAP_CLASSES, 1000], [1, 2, 4, 8, 16]
#: The side of the images where another axis changes.
SIDE, BATCH_SIDE = 512, 256
ALL_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
#: Larger images repeat a tile of this side, or a smaller one with many classes: its truth is in float64.
TILE_SIDE, TILE_LOGITS = 512, 64 << 20
#: Cases with more logits come last: they take most of the time.
LARGE = 100_000_000
SECONDS = 3.0


def make_cases(device: str, loss: str, threads: int, *, quick: bool) -> Iterator[Case]:
    """The cases of every axis, the most important axis first. A case may belong to several axes."""
    dtype = DTYPES[device][0]

    def case(classes: int = 19, side: int = SIDE, batch: int = 1, **more: Any) -> Case:
        return Case(
            **{"loss": loss, "device": device, "dtype": dtype} | more, shape=(batch, classes, side, side)
        )

    yield from (case(side=side) for side in (QUICK_SIDES if quick else SIDES))
    if quick:
        return
    yield from (case(classes, side) for classes in MAP_CLASSES for side in MAP_SIDES)
    yield from (case(classes) for classes in CLASSES)
    yield from (case(side=BATCH_SIDE, batch=batch) for batch in BATCHES)
    yield from (case(dtype=each) for each in ALL_DTYPES)
    yield case(layout=torch.channels_last)
    yield from (case(labels=labels) for labels in label_dtypes(19))
    if device == "cpu":
        yield from (case(threads=2**power) for power in range(threads.bit_length()) if 2**power < threads)


def order(cases: Sequence[Case]) -> list[Case]:
    """Each case once. Those that share their kind follow each other, and large ones come last."""
    kinds = {Kind.key(case): place for place, case in reversed(list(enumerate(cases)))}
    return sorted(
        dict.fromkeys(cases), key=lambda case: (max(math.prod(case.shape), LARGE), kinds[Kind.key(case)])
    )


def tile_of(case: Case) -> Case:
    """The case or, where that is larger, the same of a tile. All sides are powers of two."""
    batch, classes, side, _ = case.shape
    most = TILE_SIDE
    while batch * classes * most**2 > TILE_LOGITS:
        most //= 2
    side = min(side, most)
    return replace(case, shape=(batch, classes, side, side))


class Kind:
    """Cases that differ in their pixels only. They share providers, compiled once, and the truth."""

    def __init__(self, case: Case, *, compiled: bool) -> None:
        torch.compiler.reset()  # torch compiles a function for eight kinds of arguments only
        self.case, self.compiled = case, compiled
        self.tiles: dict[tuple[int, ...], tuple[Inputs, Mapping[Loss, Baseline]]] = {}

    @staticmethod
    def key(case: Case) -> tuple[object, ...]:
        batch, classes, *_ = case.shape
        return case.device, case.loss, case.dtype, case.labels, case.layout, classes, batch > 1

    @cached_property
    def providers(self) -> list[Provider]:
        ours = make_ours(self.case, variants=False)
        return [*ours, *make_peers(self.case, compiled=self.compiled, dynamic=True)]

    def inputs(self, case: Case) -> tuple[Inputs, Mapping[Loss, Baseline]]:
        """The case's inputs and their baselines."""
        shape = tile_of(case).shape
        if shape not in self.tiles:
            tile = Inputs(tile_of(case))
            self.tiles = {shape: (tile, make_baselines(self.providers, tile))}
        tile, baselines = self.tiles[shape]
        times = case.shape[-1] // shape[-1]
        return (Tiled(tile, times, case.layout) if times > 1 else tile), baselines


class Sweep:
    """Measures case after case. Keeps what the next case can use."""

    def __init__(self) -> None:
        self.kind: Kind | None = None
        self.held: dict[tuple[str, str, int], float] = {}  # peak over logits, by loss, provider and classes

    def measure(self, case: Case, settings: Settings) -> Report:
        if self.kind is None or Kind.key(case) != Kind.key(self.kind.case):
            self.kind = Kind(case, compiled=settings.compile)
        inputs, baselines = self.kind.inputs(case)
        providers = [self.unless_too_large(provider, case, inputs) for provider in self.kind.providers]
        report = measure_case(case, providers, inputs, settings, baselines=baselines)
        for row in report.providers:
            if row.extra_mib is not None:
                self.held[case.loss, row.name, case.shape[1]] = 1 + row.extra_mib / mib(case.logits_bytes)
        return report

    def unless_too_large(self, provider: Provider, case: Case, inputs: Inputs) -> Provider:
        """Skips a provider whose extrapolated peak exceeds free memory: the system might kill the process."""
        held = self.held.get((case.loss, provider.name, case.shape[1]), 0)
        needs, free = held * inputs.written.nbytes, free_bytes(inputs.written.device)
        if needs < free:
            return provider
        return replace(provider, missing=f"needs {needs / 2**30:.1f} GiB, {free / 2**30:.1f} are free")


def draw(reports: Sequence[Report], machine: Mapping[str, Any], folder: Path) -> list[Path]:
    device = reports[0].case.device
    ours = [report for report in reports if report.case.device == device]
    sides = [report for report in ours if is_plain(report.case) and report.case.shape[:2] == (1, 19)]
    by_classes = [report for report in ours if is_plain(report.case) and report.case.shape[0] == 1]
    pictures = draw_resolution(
        sides, machine, "Loss and gradient at full size", folder / "sweep-resolution.png"
    )
    pictures += draw_roofline(sides, machine, folder / "roofline.png")
    if any(report.case.shape[1] != 19 for report in by_classes):
        pictures += draw_speed_up_map(by_classes, MAP_SIDES, machine, folder / "sweep-classes.png")
        pictures += draw_inputs(ours, machine, folder / "sweep-inputs.png")
    return pictures


def is_plain(case: Case) -> bool:
    """Whether nothing but the shape differs from the first case."""
    return str(case) == str(Case(case.loss, case.device, DTYPES[case.device][0], case.shape))


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser("sweep", __doc__, SECONDS)
    parser.add_argument("--largest", type=int, default=SIDES[-1], metavar="SIDE", help="of the images")
    arguments = parser.parse_args(argv)
    cases = [
        case
        for device in devices(arguments.device)
        for loss in (CROSS_ENTROPY, IAL)
        for case in make_cases(device, loss, arguments.threads, quick=arguments.quick)
        if max(case.shape[2:]) <= arguments.largest
    ]
    return run("sweep", arguments, order(cases), Sweep().measure, draw, show_line)


if __name__ == "__main__":
    sys.exit(main())
