"""Times loss and gradient at full size: cross-entropy and IAL, by every provider of this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ial_cuda import Hierarchy

from .harness.benchmark import Part, Settings, measure_case
from .harness.cli import devices, make_parser, run
from .harness.inputs import CROSS_ENTROPY, IAL, IGNORE_INDEX, Case, Inputs
from .harness.libraries import make_libraries
from .harness.plots import draw_speed_ups
from .harness.providers import (
    DTYPES,
    kernels,
    loss_and_gradient,
    make_ours,
    make_peers,
    options_of,
    our_cross_entropy,
    our_loss,
)
from .harness.report import Report

SHAPES = {"cpu": [(1, 19, 512, 1024)], "cuda": [(1, 19, 1024, 2048), (8, 11, 720, 960)]}


def make_cases(device: str, shapes: Sequence[tuple[int, ...]] | None, *, quick: bool) -> list[Case]:
    """The most important case first: both losses at full size, then cross-entropy in other forms."""
    whole = [
        Case(loss, device, dtype, shape)
        for shape in shapes or SHAPES[device]
        for dtype in DTYPES[device]
        for loss in (CROSS_ENTROPY, IAL)
    ]
    if quick or shapes:
        return whole[:2] if quick else whole
    case = partial(Case, CROSS_ENTROPY, device, DTYPES[device][0])
    return [
        *whole,
        case(SHAPES[device][0], label_smoothing=0.1),
        case((1, 19, 64, 64)),
        case((1, 19, 256, 256)),
        case((1, 2, 512, 512)),
        case((1, 19, 256, 256), layout=torch.channels_last, rows=True),
    ]


def measure(case: Case, settings: Settings) -> Report:
    torch.compiler.reset()  # torch compiles a function for eight sizes only
    inputs = Inputs(case)
    providers = [*make_ours(case, variants=True), *make_peers(case, compiled=settings.compile)]
    plain = case.loss == CROSS_ENTROPY and not (case.rows or case.label_smoothing)
    if plain and case.shape in SHAPES[case.device]:
        providers += make_libraries(case)
    parts = operator_parts(case, inputs) if plain or case.loss == IAL else {}
    return measure_case(case, providers, inputs, settings, parts=parts)


def operator_parts(case: Case, inputs: Inputs) -> dict[str, Part]:
    """The operators of a step by our best backend, and a step on one pixel: the cost without any work."""
    backend = kernels(case.device)[0]
    ops, source = backend.operators(), inputs.source
    target, weight = inputs.targets[case.labels], inputs.weight
    options = options_of(case.shape[1])
    if case.loss == CROSS_ENTROPY:
        options = options_of(case.shape[1], hierarchy=Hierarchy.flat(case.shape[1]))
    levels = options.hierarchy.class_levels
    pixels = (target, weight, None, levels, IGNORE_INDEX, options.gradient, options.label_smoothing)
    combine = (None, *options.combine_arguments)
    one = torch.ones((), device=weight.device)
    read, write = source.nbytes + target.nbytes, source.nbytes

    def loss_and_grad(one_launch: bool = False) -> Part:
        arguments = (*pixels, *combine, None, None, one_launch)
        return Part(lambda logits: ops.loss_and_grad(logits.detach(), *arguments), read + write)

    pixel = source[:, :, :1, :1].contiguous().requires_grad_()
    loss = {CROSS_ENTROPY: our_cross_entropy, IAL: our_loss}[case.loss](backend.name)
    step = loss_and_gradient(loss, target[:, :1, :1].contiguous(), weight)
    on_pixel = {"step on one pixel": Part(lambda _: step(pixel))}
    if case.loss == CROSS_ENTROPY:
        return {"loss_and_grad, one pass": loss_and_grad()} | on_pixel
    stats = ops.reduce(source, *pixels, False)
    grad_stats = ops.combine_backward(stats, one, *combine)
    parts = {
        "reduce": Part(lambda logits: ops.reduce(logits.detach(), *pixels, False), read),
        "combine": Part(lambda _: ops.combine(stats, *combine, torch.float32)),
        "combine_backward": Part(lambda _: ops.combine_backward(stats, one, *combine)),
        "reduce_backward": Part(
            lambda logits: ops.reduce_backward(logits.detach(), grad_stats, *pixels), read + write
        ),
        "reduce_backward_, in place": Part(
            lambda logits: ops.reduce_backward_(logits.detach(), grad_stats, *pixels), read + write
        ),
    }
    if backend.name == "cuda":
        parts["loss_and_grad, one launch"] = loss_and_grad(one_launch=True)
    return parts | on_pixel


def draw(reports: Sequence[Report], machine: Mapping[str, Any], folder: Path) -> list[Path]:
    return draw_speed_ups(reports[:2], machine, folder / "loss.png")


def shape(text: str) -> tuple[int, ...]:
    sizes = tuple(map(int, text.split("x")))
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not NxCxHxW")
    return sizes


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser("loss", __doc__)
    parser.add_argument("--shape", type=shape, nargs="+", metavar="NxCxHxW", help="of the logits")
    arguments = parser.parse_args(argv)
    cases = [
        case
        for device in devices(arguments.device)
        for case in make_cases(device, arguments.shape, quick=arguments.quick)
    ]
    return run("loss", arguments, cases, measure, draw)


if __name__ == "__main__":
    sys.exit(main())
