"""Times loss and gradient on real-sized input: every backend that this machine has beside the reference and
plain cross-entropy, both eager and compiled, and beside a copy of the same bytes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from ial_cuda import Hierarchy, backends
from ial_cuda.options import Options

from .command import add_task, devices, make_parser, run
from .common import WARM_UP_ROUNDS, Step, peak_bytes
from .compare import examine_all, judge_all, right, time_all
from .floor import Part, copy_parts, floor, step_bytes, with_speed
from .inputs import IGNORE_INDEX, Inputs
from .libraries import make_libraries
from .providers import (
    DTYPES,
    Provider,
    cross_entropy,
    kernels,
    loss_and_gradient,
    make_ours,
    make_peers,
    options_of,
    our_cross_entropy,
    our_loss,
    reference_loss,
)
from .report import FLOOR, ONE_LEVEL, PEERS, Case, Report, Row, show, write

#: What is measured by default, the most telling first.
SHAPES = {"cpu": [(1, 19, 512, 1024)], "cuda": [(1, 19, 1024, 2048), (8, 11, 720, 960)]}


def make_providers(device: str, *, compile_peers: bool) -> list[Provider]:
    """Ours, the best first, then the peers."""
    best, *_ = names = kernels(device)
    providers = make_ours(names, device, our_loss, reference_loss)
    in_place, one_level = our_loss(best, inplace=True), our_cross_entropy(best)
    providers.append(Provider(f"ial_cuda {best}, in place", in_place, reference_loss))
    providers.append(Provider(f"ial_cuda {best}{ONE_LEVEL}", one_level, cross_entropy))
    for name, eager in zip(PEERS, (reference_loss, cross_entropy), strict=True):
        captured = eager is not reference_loss  # which copies its levels from the host
        providers += make_peers(name, eager, compiled=compile_peers, captured=captured)
    return providers + make_libraries(device)


def operator_parts(ops: Any, inputs: Inputs, *, one_launch: bool) -> dict[str, Part]:
    """The operators that a step calls, one by one; and those that do it all: with one level in one pass and,
    where it is there, with several in one launch."""
    target, weight = inputs.targets[torch.int64], inputs.weight
    several = options_of(inputs.source.shape[1])
    single = replace(several, hierarchy=Hierarchy.flat(inputs.source.shape[1]))
    pixels, options = operator_arguments(several, target, weight)
    one = torch.ones((), device=weight.device)
    stats = ops.reduce(inputs.source, *pixels, False)
    grad_stats = ops.combine_backward(stats, one, *options)

    def in_one(given: Options, one_launch: bool | None) -> Step:
        pixels, options = operator_arguments(given, target, weight)
        return lambda logits: ops.loss_and_grad(logits.detach(), *pixels, *options, None, None, one_launch)

    write = inputs.source.nbytes
    read = write + target.nbytes
    parts = {
        "reduce (forward)": Part(lambda logits: ops.reduce(logits.detach(), *pixels, False), read),
        "gradient": Part(
            lambda logits: ops.reduce_backward(logits.detach(), grad_stats, *pixels), read + write
        ),
        "gradient, in place": Part(
            lambda logits: ops.reduce_backward_(logits.detach(), grad_stats, *pixels), read + write
        ),
        "combine": Part(lambda _: ops.combine(stats, *options, torch.float32)),
        "table": Part(lambda _: ops.combine_backward(stats, one, *options)),
        "one level, one pass": Part(in_one(single, None), read + target.nbytes + write),
    }
    if one_launch:
        parts["one launch"] = Part(in_one(several, True), read + write)
    return parts


def operator_arguments(options: Options, target: Tensor, weight: Tensor) -> tuple[tuple[Any, ...], ...]:
    """Those of the operators on pixels, and of combine."""
    levels = options.hierarchy.class_levels
    pixels = (target, weight, None, levels, IGNORE_INDEX, options.gradient, options.label_smoothing)
    return pixels, (None, *options.combine_arguments)


def our_parts(names: Sequence[str], inputs: Inputs) -> dict[str, Part]:
    """The operators of each library, and a step of the best backend with hardly any pixels."""
    ours = [backends.get(name) for name in names]
    libraries = {backend.library: backend.operators() for backend in ours}
    in_one = {backend.library for backend in ours if backend.one_launch}
    parts = {}
    for library, ops in sorted(libraries.items()):
        prefix = f"{library} " if len(libraries) > 1 else ""
        operators = operator_parts(ops, inputs, one_launch=library in in_one)
        parts |= {prefix + name: part for name, part in operators.items()}

    pixel = inputs.source[:, :, :1, :1].contiguous().requires_grad_()
    pixel_target = inputs.targets[torch.int64][:, :1, :1].contiguous()
    loss = our_loss(names[0])
    step = loss_and_gradient(loss, pixel_target, inputs.weight)
    return parts | {"step on one pixel": Part(lambda _: step(pixel))}


def measure(case: Case, *, rounds: int, seconds: float, compile_peers: bool, progress: Progress) -> Report:
    """Checks all providers, times those that are right, and then measures their memory."""
    inputs = Inputs(case.shape, case.dtype, case.device)
    providers = make_providers(case.device, compile_peers=compile_peers)
    advance = add_task(progress, f"{case}", len(providers) + WARM_UP_ROUNDS + rounds)
    rows = examine_all(providers, inputs, judge_all(providers, inputs), advance)
    timed = right(providers, rows)
    copies = copy_parts(inputs)
    parts = our_parts(kernels(case.device), inputs) | copies if providers[0] in timed else copies
    both = {FLOOR: floor(inputs)} | parts
    others = {name: part.step for name, part in both.items()}
    timing = time_all(timed, others, providers[0].name, inputs, case.device, rounds, advance, seconds)
    for provider in timed:
        extra = peak_bytes(provider.step(inputs), inputs.logits()) - inputs.written.nbytes
        rows[provider.name] = with_speed(
            timing,
            rows[provider.name],
            step_bytes(inputs, provider.labels),
            inputs,
            extra_mib=round(extra / 2**20, 2),
        )
    filled = {name: with_speed(timing, Row(name), part.moved, inputs) for name, part in both.items()}
    rows[FLOOR] = filled.pop(FLOOR)
    gpu = (timing.gpu_before, timing.gpu_after)
    return Report(case, inputs.origin, list(rows.values()), list(filled.values()), *gpu)


def shape(text: str) -> tuple[int, ...]:
    sizes = tuple(map(int, text.split("x")))
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not NxCxHxW")
    return sizes


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("loss", __doc__)
    parser.add_argument(
        "--shape",
        type=shape,
        nargs="+",
        metavar="NxCxHxW",
        help="; ".join(
            f"{device}: {' '.join('x'.join(map(str, sizes)) for sizes in shapes)}"
            for device, shapes in SHAPES.items()
        ),
    )
    return parser.parse_args(argv)


def make_cases(device: str | None, shapes: Sequence[tuple[int, ...]] | None) -> list[Case]:
    """The cases of the device, or of each that is there and has kernels."""
    return [
        Case(device, dtype, sizes)
        for device in devices(device)
        for dtype in DTYPES[device]
        for sizes in shapes or SHAPES[device]
    ]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    return run(arguments, make_cases(arguments.device, arguments.shape), measure, show, write)


if __name__ == "__main__":
    sys.exit(main())
