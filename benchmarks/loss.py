"""Times loss and gradient on real-sized input: every backend that this machine has beside the reference and
plain cross-entropy, both eager and compiled, and beside a copy of the same bytes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from ial_cuda import Hierarchy, _ops, importance_aware_loss, reference

from .command import add_task, devices, make_parser, run
from .common import HIERARCHIES, IGNORE_INDEX, WARM_UP_ROUNDS, Inputs, Step, peak_bytes
from .compare import (
    DTYPES,
    Loss,
    Provider,
    examine_all,
    kernels,
    loss_and_gradient,
    make_ours,
    make_peers,
    provider_step,
    time_all,
)
from .report import COPY, FLOOR, PEERS, Case, Report, Row, show, write

LAMBDA, ALPHA = 0.5, 1.0
#: What is measured by default, the most telling first.
SHAPES = {"cpu": [(1, 19, 512, 1024)], "cuda": [(1, 19, 1024, 2048), (8, 11, 720, 960)]}


class Part(NamedTuple):
    """A piece of a step, and the bytes that it has to move."""

    step: Step
    moved: int = 0


def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, weight.to(logits.dtype), ignore_index=IGNORE_INDEX)


def hierarchy_of(logits: Tensor) -> Hierarchy:
    return HIERARCHIES[logits.shape[1]]


def lambdas_of(hierarchy: Hierarchy) -> tuple[float, ...]:
    return (LAMBDA,) * (hierarchy.num_levels - 1)


def reference_loss(
    logits: Tensor, target: Tensor, weight: Tensor, align_corners: bool | None = None
) -> Tensor:
    hierarchy = hierarchy_of(logits)
    return reference.importance_aware_loss(
        logits,
        target,
        hierarchy,
        weight=weight,
        lambdas=lambdas_of(hierarchy),
        alpha=ALPHA,
        ignore_index=IGNORE_INDEX,
        align_corners=align_corners,
    )[0]


def our_loss(backend: str, **options: Any) -> Loss:
    def loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return importance_aware_loss(
            logits,
            target,
            hierarchy_of(logits),
            weight=weight,
            lambdas=LAMBDA,
            alpha=ALPHA,
            ignore_index=IGNORE_INDEX,
            backend=backend,
            **options,
        )

    return loss


def make_providers(device: str, *, compile_peers: bool) -> list[Provider]:
    """Ours, the best first, then the peers."""
    backends = kernels(device)
    providers = make_ours(backends, device, our_loss, reference_loss)
    in_place = our_loss(backends[0], inplace=True)
    providers.append(Provider(f"ial_cuda {backends[0]}, in place", in_place, reference_loss))
    for name, eager in zip(PEERS, (reference_loss, cross_entropy), strict=True):
        captured = eager is not reference_loss  # which copies its levels from the host
        providers += make_peers(name, eager, compiled=compile_peers, captured=captured)
    return providers


def copy_parts(inputs: Inputs) -> dict[str, Part]:
    """What the floor is made of: the logits copied to memory that is there already, and read once more."""
    warm = torch.empty_like(inputs.source)
    size = inputs.source.nbytes
    return {
        COPY: Part(lambda logits: warm.copy_(logits.detach()), 2 * size),
        "sum (1 read)": Part(lambda logits: logits.detach().sum(), size),
    }


def operator_parts(ops: Any, inputs: Inputs, *, one_launch: bool) -> dict[str, Part]:
    """The operators that a step calls, one by one; and, where it is there, the one that does it all."""
    target, weight = inputs.targets[torch.int64], inputs.weight
    hierarchy = hierarchy_of(inputs.source)
    options = (lambdas_of(hierarchy), ALPHA, "mean", "mean", "image")
    pixels = (target, weight, None, hierarchy.class_levels, IGNORE_INDEX, "exact")
    one = torch.ones((), device=weight.device)
    stats = ops.reduce(inputs.source, *pixels, False)
    table = ops.table(stats, one, *options)
    write = inputs.source.nbytes
    read = write + target.nbytes
    parts = {
        "reduce (forward)": Part(lambda logits: ops.reduce(logits.detach(), *pixels, False), read),
        "gradient": Part(lambda logits: ops.gradient(logits.detach(), table, *pixels), read + write),
        "gradient, in place": Part(
            lambda logits: ops.gradient_(logits.detach(), table, *pixels), read + write
        ),
        "combine": Part(lambda _: ops.combine(stats, *options, torch.float32)),
        "table": Part(lambda _: ops.table(stats, one, *options)),
    }
    if one_launch:
        parts["fused"] = Part(lambda logits: ops.fused(logits.detach(), *pixels, *options), read + write)
    return parts


def our_parts(backends: Sequence[str], inputs: Inputs) -> dict[str, Part]:
    """The operators of each library, and a step of the best backend with hardly any pixels."""
    libraries = {_ops.libraries[backend]: _ops.operators(backend) for backend in backends}
    in_one = {_ops.libraries[backend] for backend in backends if backend in _ops.one_launch.values()}
    parts = {}
    for library, ops in sorted(libraries.items()):
        prefix = f"{library} " if len(libraries) > 1 else ""
        operators = operator_parts(ops, inputs, one_launch=library in in_one)
        parts |= {prefix + name: part for name, part in operators.items()}

    pixel = inputs.source[:, :, :1, :1].contiguous().requires_grad_()
    pixel_target = inputs.targets[torch.int64][:, :1, :1].contiguous()
    loss = our_loss(backends[0])
    return parts | {
        "step on one pixel": Part(lambda _: loss_and_gradient(loss, pixel, pixel_target, inputs.weight))
    }


def measure(case: Case, *, rounds: int, compile_peers: bool, progress: Progress) -> Report:
    """Checks all providers, times those that are right, and then measures their memory."""
    inputs = Inputs(case.shape, case.dtype, case.device)
    providers = make_providers(case.device, compile_peers=compile_peers)
    advance = add_task(progress, f"{case}", len(providers) + WARM_UP_ROUNDS + rounds)
    rows = examine_all(providers, inputs, advance)
    right = [p for p in providers if not (rows[p.name].refused or rows[p.name].skipped)]
    copies = copy_parts(inputs)
    floor = {FLOOR: lambda logits: [part.step(logits) for part in copies.values()]}
    parts = our_parts(kernels(case.device), inputs) | copies if providers[0] in right else copies
    others = floor | {name: part.step for name, part in parts.items()}
    timing = time_all(right, others, providers[0].name, inputs, case.device, rounds, advance)
    copy_ms = timing.times[COPY].median_ms
    copy_speed = copies[COPY].moved / 1e6 / copy_ms

    def timed(row: Row, moved: int, **more: float) -> Row:
        row = timing.fill(row)
        speed = moved / 1e6 / row.median_ms
        return replace(
            row,
            gb_per_s=round(speed, 2) if moved else None,
            copy_percent=round(100 * speed / copy_speed, 1) if moved else None,
            copy_ratio=round(row.median_ms / copy_ms, 3),
            **more,
        )

    size = inputs.source.nbytes
    for provider in right:
        extra = (peak_bytes(provider_step(provider, inputs), inputs.logits()) - size) / 2**20
        moved = 3 * size + 2 * inputs.targets[provider.labels].nbytes
        rows[provider.name] = timed(rows[provider.name], moved, extra_mib=round(extra, 2))
    rows[FLOOR] = timed(Row(FLOOR), 3 * size)
    timed_parts = [timed(Row(name), part.moved) for name, part in parts.items()]
    gpu = (timing.gpu_before, timing.gpu_after)
    return Report(case, inputs.labels, list(rows.values()), timed_parts, *gpu)


def shape(text: str) -> tuple[int, ...]:
    sizes = tuple(map(int, text.split("x")))
    if len(sizes) != 4 or min(sizes) < 1 or sizes[1] not in HIERARCHIES:
        expected = " or ".join(f"Nx{classes}xHxW" for classes in HIERARCHIES)
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
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
