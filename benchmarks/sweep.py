"""Times the loss, value and gradient, as what it is given changes: pixels, classes, images, types of logits
and of labels, layout, threads. Every provider is checked in every case before it is timed."""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch
from rich.progress import Progress

from .command import add_task, devices, make_parser, run
from .common import WARM_UP_ROUNDS, free_bytes, peak_bytes
from .compare import Judges, examine_all, judge_all, right, time_all
from .floor import copy_parts, floor, step_bytes, with_speed
from .inputs import Inputs, Tiled, label_dtypes
from .providers import (
    DTYPES,
    Provider,
    cross_entropy,
    kernels,
    make_peers,
    our_cross_entropy,
    our_loss,
    reference_loss,
)
from .questions import Case, Question
from .report import FLOOR, ONE_LEVEL, PEERS, Report, Row
from .sweep_report import conclude, show, write

#: Of square images.
SIDES = [64, 128, 256, 512, 1024, 2048, 4096, 8192]
GRID_SIDES, GRID_CLASSES = [256, 512, 1024, 2048], [2, 11, 19, 59, 150]
CLASSES = [*GRID_CLASSES, 1000]
BATCHES = [1, 2, 4, 8, 16]
#: Of the images where it is not the side that changes.
SIDE, BATCH_SIDE = 512, 256
ALL_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
#: Larger images repeat a tile of this side; of many classes a smaller one, for its truth is in float64.
TILE_SIDE, TILE_LOGITS = 512, 64 << 20
#: Cases with more logits take most of the time.
LARGE = 100_000_000
#: After which time no round of a case is begun, if there were a few.
SECONDS = 4.0


def questions(device: str, threads: int) -> list[Question]:
    """What is asked, the most telling first; many cases belong to more than one."""
    dtype = DTYPES[device][0]

    def case(classes: int = 19, side: int | None = None, batch: int = 1, **more: object) -> Case:
        side = side or SIDE
        return Case(device, **{"dtype": dtype, "shape": (batch, classes, side, side), **more})

    asked = [
        Question("pixels", [case(side=side) for side in SIDES]),
        Question(
            "pixels and classes", [case(classes, side) for classes in GRID_CLASSES for side in GRID_SIDES]
        ),
        Question("classes", [case(classes) for classes in CLASSES]),
        Question("images", [case(side=BATCH_SIDE, batch=batch) for batch in BATCHES]),
        Question("type of logits", [case(dtype=each) for each in ALL_DTYPES]),
        Question("layout", [case(layout=layout) for layout in LAYOUTS]),
        Question("type of labels", [case(labels=labels) for labels in label_dtypes(19)]),
    ]
    if device == "cpu":
        powers = [2**power for power in range(threads.bit_length()) if 2**power < threads]
        counts = [*powers, None]
        asked.append(Question("threads", [case(threads=count) for count in counts]))
    return asked


def make_tile(case: Case) -> Inputs:
    """Of the case's size or, where that is larger, a tile's. All sides are powers of two."""
    batch, classes, side, _ = case.shape
    most = TILE_SIDE
    while batch * classes * most**2 > TILE_LOGITS:
        most //= 2
    side = min(side, most)
    return Inputs((batch, classes, side, side), case.dtype, case.device, layout=case.layout)


class Kind:
    """What cases that differ in their pixels only have in common: providers, compiled once, and the truth."""

    def __init__(self, case: Case, *, compile_peers: bool) -> None:
        torch.compiler.reset()  # one function is compiled for eight kinds of arguments only
        self.case, self.compile_peers = case, compile_peers
        self.tiles: dict[tuple[int, ...], tuple[Inputs, Judges]] = {}

    @staticmethod
    def key(case: Case) -> tuple[object, ...]:
        batch, classes, *_ = case.shape
        return case.device, case.dtype, case.labels, case.layout, classes, batch > 1

    @cached_property
    def providers(self) -> list[Provider]:
        """Ours, the best first, then the peers; the labels of F.cross_entropy are always int64."""
        labels, compiled = self.case.labels, self.compile_peers
        best, *others = kernels(self.case.device)
        ours = [
            Provider(f"ial_cuda {name}", our_loss(name), reference_loss, labels) for name in (best, *others)
        ]
        in_place, one_level = our_loss(best, inplace=True), our_cross_entropy(best)
        ours.append(Provider(f"ial_cuda {best}, in place", in_place, reference_loss, labels))
        ours.append(Provider(f"ial_cuda {best}{ONE_LEVEL}", one_level, cross_entropy, labels))
        peers = []
        for name, eager in zip(PEERS, (reference_loss, cross_entropy), strict=True):
            takes = labels if eager is reference_loss else torch.int64
            peers += make_peers(
                name, eager, compiled=compiled, captured=eager is cross_entropy, dynamic=True, labels=takes
            )
        return ours + peers

    def inputs(self, case: Case) -> tuple[Inputs, Judges]:
        """The case's inputs, and what they are judged by."""
        tile = make_tile(case)
        size = tuple(tile.source.shape)
        if size not in self.tiles:
            self.tiles = {size: (tile, judge_all(self.providers, tile))}
        tile, judges = self.tiles[size]
        times = case.shape[-1] // size[-1]
        return (Tiled(tile, times, case.layout) if times > 1 else tile), judges


class Sweep:
    """Measures case after case, and remembers what the next one can use."""

    def __init__(self) -> None:
        self.kind: Kind | None = None
        self.held: dict[tuple[str, int], float] = {}  # by provider and classes, in times of the logits

    def measure(
        self, case: Case, *, rounds: int, seconds: float, compile_peers: bool, progress: Progress
    ) -> Report:
        """Checks all providers, times those that are right, and then measures their memory."""
        if self.kind is None or Kind.key(case) != Kind.key(self.kind.case):
            self.kind = Kind(case, compile_peers=compile_peers)
        inputs, judges = self.kind.inputs(case)
        copies = copy_parts(inputs)
        parts = {FLOOR: floor(inputs)} | copies
        providers = [self.unless_too_large(provider, inputs) for provider in self.kind.providers]
        advance = add_task(progress, f"{case}", len(providers) + WARM_UP_ROUNDS + rounds)
        with threads(case.threads):
            rows = examine_all(providers, inputs, judges, advance)
            timed = right(providers, rows)
            steps = {name: part.step for name, part in parts.items()}
            ours = providers[0].name
            timing = time_all(timed, steps, ours, inputs, case.device, rounds, advance, seconds)
        for provider in timed:
            held = peak_bytes(provider.step(inputs), inputs.logits())
            self.held[provider.name, case.shape[1]] = held / inputs.written.nbytes
            rows[provider.name] = with_speed(
                timing,
                rows[provider.name],
                step_bytes(inputs, provider.labels),
                inputs,
                extra_mib=round((held - inputs.written.nbytes) / 2**20, 2),
            )
        rows[FLOOR] = with_speed(timing, Row(FLOOR), parts[FLOOR].moved, inputs)
        filled = [with_speed(timing, Row(name), part.moved, inputs) for name, part in copies.items()]
        return Report(case, inputs.origin, list(rows.values()), filled, timing.gpu_before, timing.gpu_after)

    def unless_too_large(self, provider: Provider, inputs: Inputs) -> Provider:
        """By what it held of smaller logits: a process that asks for too much memory may be killed."""
        held = self.held.get((provider.name, inputs.source.shape[1]), 0)
        needs, free = held * inputs.written.nbytes, free_bytes(inputs.written.device)
        if needs < free:
            return provider
        return replace(provider, missing=f"needs {needs / 2**30:.1f} GiB, {free / 2**30:.1f} are free")


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """As many for torch's operators; all that there are for None."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_cases(device: str | None, number_of_threads: int) -> list[Case]:
    """Each case of all questions once, those that share their kind one after another, the large ones last."""
    cases: dict[Case, None] = {}
    for name in devices(device):
        asked = [case for question in questions(name, number_of_threads) for case in question.cases]
        kinds = {Kind.key(case): place for place, case in reversed(list(enumerate(asked)))}
        cases |= dict.fromkeys(
            sorted(asked, key=lambda case: (max(math.prod(case.shape), LARGE), kinds[Kind.key(case)]))
        )
    return list(cases)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser("sweep", __doc__, SECONDS)
    parser.add_argument("--largest", type=int, default=SIDES[-1], metavar="SIDE", help="of the images")
    parser.add_argument("--only", default="", metavar="REGEX", help="the cases in whose names this is found")
    arguments = parser.parse_args(argv)
    cases = [
        case
        for case in make_cases(arguments.device, arguments.threads)
        if max(case.shape[2:]) <= arguments.largest and re.search(arguments.only, str(case))
    ]
    asked = [
        question for name in devices(arguments.device) for question in questions(name, arguments.threads)
    ]
    return run(
        arguments,
        cases,
        Sweep().measure,
        show,
        partial(write, questions=asked),
        partial(conclude, questions=asked),
    )


if __name__ == "__main__":
    sys.exit(main())
