"""Times the loss of coarse logits at the labels' size, value and gradient, which ours upsamples on the way
and PyTorch beforehand, eager and compiled; and tells how time and memory grow with the size."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from rich.progress import Progress

from ial_cuda import backends

from .command import add_task, devices, make_parser, run
from .common import WARM_UP_ROUNDS, peak_bytes, peak_process_bytes
from .compare import examine_all, judge_all, right, time_all
from .inputs import Inputs
from .libraries import make_libraries
from .providers import (
    DTYPES,
    Loss,
    Provider,
    cross_entropy,
    interpolated,
    kernels,
    make_ours,
    make_peers,
    our_cross_entropy,
    our_loss,
    reference_loss,
)
from .upsample_report import CROSS_ENTROPY, IAL, PEERS, Case, Report, conclude, show, write

CLASSES, RATIO = 19, 4
#: Of the labels, the most telling first: there both losses are measured, at the others cross-entropy alone.
SIZES = {"cpu": [(512, 1024), (256, 512), (1024, 2048), (2048, 4096)], "cuda": [(1024, 2048)]}


@dataclass(frozen=True)
class Form:
    """A loss: ours by a backend, and upsampling first in plain PyTorch."""

    ours: Callable[[str], Loss]
    two_steps: Loss
    captured: bool = True  # two_steps, as a graph


#: The two steps of the IAL copy its levels from the host, which no graph can.
FORMS = {
    CROSS_ENTROPY: Form(partial(our_cross_entropy, upsample="bilinear"), interpolated(cross_entropy)),
    IAL: Form(
        partial(our_loss, upsample="bilinear"), partial(reference_loss, upsample="bilinear"), captured=False
    ),
}


def make_providers(case: Case, *, compile_peers: bool) -> list[Provider]:
    """Ours, the best first, then the two steps. Ours are judged by the reference, in float32 at least."""
    form = FORMS[case.loss]
    names = [name for name in kernels(case.device) if not backends.get(name).one_launch]
    providers = make_ours(names, case.device, form.ours, form.ours("reference"))
    providers += make_peers(PEERS[case.loss], form.two_steps, compiled=compile_peers, captured=form.captured)
    if case.loss == CROSS_ENTROPY and case.size == SIZES[case.device][0]:
        providers += make_libraries(case.device, "F.interpolate + ", interpolated)
    return providers


def measure(case: Case, *, rounds: int, seconds: float, compile_peers: bool, progress: Progress) -> Report:
    """Checks all providers, times those that are right, and then measures their memory."""
    torch.compiler.reset()  # one function is compiled for eight sizes only
    inputs = Inputs(case.shape, case.dtype, case.device, RATIO)
    providers = make_providers(case, compile_peers=compile_peers)
    advance = add_task(progress, f"{case}", len(providers) + WARM_UP_ROUNDS + rounds)
    rows = examine_all(providers, inputs, judge_all(providers, inputs), advance)
    timed = right(providers, rows)
    timing = time_all(timed, {}, providers[0].name, inputs, case.device, rounds, advance, seconds)
    for provider in timed:
        step = provider.step(inputs)
        extra, process = (peak(step, inputs.logits()) for peak in (peak_bytes, peak_process_bytes))
        rows[provider.name] = timing.fill(rows[provider.name], extra_mib=mib(extra), process_mib=mib(process))
    return Report(case, inputs.origin, list(rows.values()), timing.gpu_before, timing.gpu_after)


def mib(size: int | None) -> float | None:
    return None if size is None else round(size / 2**20, 2)


def size(text: str) -> tuple[int, int]:
    lengths = tuple(map(int, text.split("x")))
    if len(lengths) != 2 or min(lengths) < 1 or any(length % RATIO for length in lengths):
        raise argparse.ArgumentTypeError(f"{text!r} is not HxW in multiples of {RATIO}")
    return lengths


def make_cases(device: str | None, sizes: Sequence[tuple[int, int]] | None) -> list[Case]:
    """The cases of the device, or of each that is there and has kernels."""
    return [
        Case(device, dtype, (1, CLASSES, height // RATIO, width // RATIO), loss, (height, width))
        for device in devices(device)
        for place, (height, width) in enumerate(sizes or SIZES[device])
        for dtype in DTYPES[device]
        for loss in (FORMS if place == 0 else [CROSS_ENTROPY])
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser("upsample", __doc__)
    parser.add_argument("--size", type=size, nargs="+", metavar="HxW", help="of the labels")
    arguments = parser.parse_args(argv)
    return run(arguments, make_cases(arguments.device, arguments.size), measure, show, write, conclude)


if __name__ == "__main__":
    sys.exit(main())
