"""Times loss and gradient of coarse logits: ours interpolates inside the kernel, others beforehand."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .harness.benchmark import Settings, measure_case
from .harness.cli import devices, make_parser, run
from .harness.inputs import CROSS_ENTROPY, IAL, Case, Inputs
from .harness.libraries import make_libraries
from .harness.plots import draw_resolution
from .harness.providers import DTYPES, make_ours, make_peers
from .harness.report import Report

CLASSES, SCALE = 19, 4
#: Of the labels, the most important first: both losses and the libraries are measured there.
SIZES = {"cpu": [(512, 1024), (256, 512), (1024, 2048), (2048, 4096)], "cuda": [(1024, 2048), (512, 1024)]}


def make_cases(device: str, sizes: Sequence[tuple[int, int]] | None, *, quick: bool) -> list[Case]:
    sizes = sizes or SIZES[device][: 3 if quick else None]
    return [
        Case(loss, device, dtype, (1, CLASSES, height // SCALE, width // SCALE), SCALE)
        for place, (height, width) in enumerate(sizes)
        for dtype in DTYPES[device][: 1 if quick else None]
        for loss in ([CROSS_ENTROPY, IAL] if place == 0 and not quick else [CROSS_ENTROPY])
    ]


def measure(case: Case, settings: Settings, *, with_libraries: Sequence[tuple[int, ...]]) -> Report:
    torch.compiler.reset()  # torch compiles a function for eight sizes only
    providers = [*make_ours(case, variants=True), *make_peers(case, compiled=settings.compile)]
    if case.loss == CROSS_ENTROPY and case.shape in with_libraries:
        providers += make_libraries(case)
    return measure_case(case, providers, Inputs(case), settings)


def draw(reports: Sequence[Report], machine: Mapping[str, Any], folder: Path) -> list[Path]:
    title = "Cross-entropy of coarse logits and its gradient"
    chosen = [report for report in reports if report.case.loss == CROSS_ENTROPY]
    return draw_resolution(chosen, machine, title, folder / "upsample.png")


def size(text: str) -> tuple[int, int]:
    lengths = tuple(map(int, text.split("x")))
    if len(lengths) != 2 or min(lengths) < 1 or any(length % SCALE for length in lengths):
        raise argparse.ArgumentTypeError(f"{text!r} is not HxW in multiples of {SCALE}")
    return lengths


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser("upsample", __doc__)
    parser.add_argument("--size", type=size, nargs="+", metavar="HxW", help="of the labels")
    arguments = parser.parse_args(argv)
    cases = [
        case
        for device in devices(arguments.device)
        for case in make_cases(device, arguments.size, quick=arguments.quick)
    ]
    main_shapes = [case.shape for case in cases[:1]]
    return run("upsample", arguments, cases, partial(measure, with_libraries=main_shapes), draw)


if __name__ == "__main__":
    sys.exit(main())
