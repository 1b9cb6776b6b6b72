"""Times loss and gradient on real-sized input: every backend that this machine has beside the reference and
plain cross-entropy, both eager and compiled, and beside a copy of the same bytes."""

from __future__ import annotations

import argparse
import math
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from ial_cuda import Hierarchy, _ops, importance_aware_loss, reference

from .common import (
    CAPTURE,
    HIERARCHIES,
    IGNORE_INDEX,
    WARM_UP_ROUNDS,
    Inputs,
    Result,
    Step,
    describe_gpu_state,
    describe_machine,
    peak_bytes,
    time_interleaved,
    why_refused,
)
from .report import COPY, FLOOR, PEERS, UINT8, Case, Report, Row, show, write

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of logits, target and class weights

LAMBDA, ALPHA = 0.5, 1.0
#: What is measured by default, the most telling first.
SHAPES = {"cpu": [(1, 19, 512, 1024)], "cuda": [(1, 19, 1024, 2048), (8, 11, 720, 960)]}
DTYPES = {"cpu": [torch.float32], "cuda": [torch.bfloat16, torch.float32]}
LABELS = {"cpu": [torch.int64], "cuda": [torch.int64, torch.uint8]}


@dataclass(frozen=True)
class Provider:
    """Who computes a loss: ``loss``, and the same in eager PyTorch, by which it is judged."""

    name: str
    loss: Loss
    eager: Loss
    labels: torch.dtype = torch.int64
    compiled: bool = False
    captured: bool = True  # whether to time it as a graph, too, where the device has such


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


def reference_loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    hierarchy = hierarchy_of(logits)
    lambdas = lambdas_of(hierarchy)
    return reference.importance_aware_loss(
        logits, target, hierarchy, weight=weight, lambdas=lambdas, alpha=ALPHA, ignore_index=IGNORE_INDEX
    )[0]


def our_loss(backend: str, *, inplace: bool = False) -> Loss:
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
            inplace=inplace,
        )

    return loss


def kernels(device: str) -> list[str]:
    """The backends with kernels of our own that can be used on the device, best first."""
    return [name for name in _ops.kernels(device) if _ops.unavailable[name] is None]


def make_providers(device: str, *, compile_peers: bool) -> list[Provider]:
    """Ours, the best first, then the peers."""
    backends = kernels(device)
    providers = [
        Provider(
            f"ial_cuda {name}{UINT8 if labels == torch.uint8 else ''}", our_loss(name), reference_loss, labels
        )
        for name in backends
        for labels in LABELS[device]
    ]
    in_place = our_loss(backends[0], inplace=True)
    providers.append(Provider(f"ial_cuda {backends[0]}, in place", in_place, reference_loss))
    for name, eager in zip(PEERS, (reference_loss, cross_entropy), strict=True):
        captured = eager is not reference_loss  # which copies its levels from the host
        providers.append(Provider(name, eager, eager, captured=captured))
        if compile_peers:
            compiled = torch.compile(eager, dynamic=False)
            providers.append(Provider(f"{name}, compiled", compiled, eager, compiled=True, captured=captured))
    return providers


def loss_and_gradient(loss: Loss, logits: Tensor, target: Tensor, weight: Tensor) -> Result:
    """What a training step asks of a loss. The gradient is added to no ``.grad``, whoever computes it."""
    value = loss(logits, target, weight)
    (gradient,) = torch.autograd.grad(value, logits)
    return Result(value.detach(), gradient)


def judge(eager: Loss, inputs: Inputs) -> tuple[Result, Result]:
    """Eager PyTorch in the precision of the loss it returns, and the truth: eager in float64."""
    target, weight = inputs.targets[torch.int64], inputs.weight

    def in_precision(dtype: torch.dtype) -> Result:
        return loss_and_gradient(eager, inputs.source.to(dtype).detach().requires_grad_(), target, weight)

    return in_precision(eager(inputs.source, target, weight).dtype), in_precision(torch.float64)


def first_line(error: Exception) -> str:
    """What happened, without the files, which would name somebody's folders."""
    return re.sub(r"\S*/\S*", "…", (str(error) or repr(error)).splitlines()[0])


def examine(provider: Provider, inputs: Inputs, standard: Result, truth: Result) -> Row:
    """The provider's row before it is timed, with a reason where it will not be. Warms up the compiler."""
    try:
        result = provider_step(provider, inputs)(inputs.logits())
    except Exception as error:
        if provider.compiled:
            return Row(provider.name, skipped=f"torch.compile fails: {first_line(error)}")
        return Row(provider.name, refused=f"raises {type(error).__name__}: {first_line(error)}")
    # Compiled code adds pixels one by one in float32: its sums err like a random walk, and are not wrong.
    ulps = math.sqrt(inputs.targets[torch.int64].numel()) if provider.compiled else 4
    return Row(provider.name, refused=why_refused(result, standard, truth, ulps=ulps))


def examine_all(providers: Sequence[Provider], inputs: Inputs, on_each: Callable[[], None]) -> dict[str, Row]:
    judges = {eager: judge(eager, inputs) for eager in {provider.eager for provider in providers}}
    rows = {}
    for provider in providers:
        rows[provider.name] = examine(provider, inputs, *judges[provider.eager])
        on_each()
    return rows


def provider_step(provider: Provider, inputs: Inputs) -> Step:
    target = inputs.targets[provider.labels]
    return lambda logits: loss_and_gradient(provider.loss, logits, target, inputs.weight)


def capture(steps: Mapping[str, Step], inputs: Inputs, device: str) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps as graphs, those that compute the same, and why there is none of the others."""
    graphs, reasons = {}, {}
    for name, step in steps.items():
        try:
            graph = CAPTURE[device](step, inputs.written)
        except RuntimeError as error:
            # What is left of a capture that failed makes the next ones fail as well.
            return graphs, reasons | dict.fromkeys(steps.keys() - graphs.keys(), first_line(error))
        expected = Result(*(tensor.clone() for tensor in step(inputs.logits())))  # may lie in the logits
        exact = Result(*(tensor.double() for tensor in expected))
        wrong = why_refused(Result(*graph(inputs.logits())), expected, exact)
        if wrong:
            reasons[name] = f"its {wrong}"
        else:
            graphs[name] = graph
    return graphs, reasons


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
    task = progress.add_task(f"{case}", total=len(providers) + WARM_UP_ROUNDS + rounds)

    def advance() -> None:
        progress.advance(task)
        progress.refresh()  # here only: a thread that draws would disturb the times

    rows = examine_all(providers, inputs, advance)
    right = [p for p in providers if not (rows[p.name].refused or rows[p.name].skipped)]
    steps = {provider.name: provider_step(provider, inputs) for provider in right}
    graphs: dict[str, Step] = {}
    if case.device in CAPTURE:
        captured = {provider.name: steps[provider.name] for provider in right if provider.captured}
        graphs, reasons = capture(captured, inputs, case.device)
        rows |= {name: replace(rows[name], no_graph=reason) for name, reason in reasons.items()}
    copies = copy_parts(inputs)
    floor = {FLOOR: lambda logits: [part.step(logits) for part in copies.values()]}
    ours_is_right = providers[0] in right
    parts = our_parts(kernels(case.device), inputs) | copies if ours_is_right else copies
    gpu_before = describe_gpu_state() if case.device == "cuda" else {}
    times = time_interleaved(
        steps
        | floor
        | {name: part.step for name, part in parts.items()}
        | {f"{name}, graph": graph for name, graph in graphs.items()},
        inputs.logits,
        case.device,
        rounds,
        advance,
    )
    gpu_after = describe_gpu_state() if case.device == "cuda" else {}
    copy_ms = times[COPY].median_ms
    copy_speed = copies[COPY].moved / 1e6 / copy_ms

    def timed(row: Row, moved: int, **more: float) -> Row:
        taken = times[row.name]
        ours = times[providers[0].name].median_ms if ours_is_right else None
        speed = moved / 1e6 / taken.median_ms
        graph = times.get(f"{row.name}, graph")
        return replace(
            row,
            **asdict(taken),
            graph_ms=graph and graph.median_ms,
            ratio=round(taken.median_ms / ours, 3) if ours else None,
            gb_per_s=round(speed, 2) if moved else None,
            copy_percent=round(100 * speed / copy_speed, 1) if moved else None,
            copy_ratio=round(taken.median_ms / copy_ms, 3),
            **more,
        )

    size = inputs.source.nbytes
    for provider in right:
        extra = (peak_bytes(steps[provider.name], inputs.logits()) - size) / 2**20
        moved = 3 * size + 2 * inputs.targets[provider.labels].nbytes
        rows[provider.name] = timed(rows[provider.name], moved, extra_mib=round(extra, 2))
    rows[FLOOR] = timed(Row(FLOOR), 3 * size)
    timed_parts = [timed(Row(name), part.moved) for name, part in parts.items()]
    return Report(case, inputs.labels, list(rows.values()), timed_parts, gpu_before, gpu_after)


def shape(text: str) -> tuple[int, ...]:
    sizes = tuple(map(int, text.split("x")))
    if len(sizes) != 4 or min(sizes) < 1 or sizes[1] not in HIERARCHIES:
        expected = " or ".join(f"Nx{classes}xHxW" for classes in HIERARCHIES)
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
    return sizes


def rounds(text: str) -> int:
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text} is less than 2, of which no quantiles can be taken")
    return int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=__doc__)
    latest = Path(__file__).parent / "results" / "latest"
    parser.add_argument(
        "--output", type=Path, default=latest, metavar="DIR", help="default: benchmarks/results/latest"
    )
    parser.add_argument(
        "--device", choices=SHAPES, help="default: each that ial_cuda has kernels for on this machine"
    )
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
    parser.add_argument("--rounds", type=rounds, default=30, metavar="R", help="at least 2, default 30")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), metavar="N", help="default: all cores"
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    return parser.parse_args(argv)


def make_cases(device: str | None, shapes: Sequence[tuple[int, ...]] | None) -> list[Case]:
    """The cases of the device, or of each that is there and has kernels."""
    devices = [device] if device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [
        Case(device, dtype, sizes)
        for device in devices
        if kernels(device)
        for dtype in DTYPES[device]
        for sizes in shapes or SHAPES[device]
    ]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    cases = make_cases(arguments.device, arguments.shape)
    if not cases:
        device = arguments.device or "cpu"
        for backend in _ops.kernels(device):
            print(f"ial_cuda has no kernels here: {backend}: {_ops.unavailable[backend]}", file=sys.stderr)
        return 1
    machine = describe_machine()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    reports: list[Report] = []
    failed = False
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        for case in cases:
            try:
                report = measure(
                    case, rounds=arguments.rounds, compile_peers=arguments.compile, progress=progress
                )
            except Exception as error:  # too little memory, say: the other cases may do
                console.print(f"{case} fails: {first_line(error)}", style="red", soft_wrap=True)
                traceback.print_exc()
                failed = True
                continue
            reports.append(report)
            show(report, console)
            write(reports, machine, arguments.rounds, output)  # who is interrupted later keeps this
    if reports:
        console.print(f"Picture: {output / 'loss.png'}", soft_wrap=True)
    return int(failed or any(row.refused for report in reports for row in report.providers))


if __name__ == "__main__":
    sys.exit(main())
