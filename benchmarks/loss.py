"""Times loss and gradient on real-sized input: every backend that this machine has beside the reference and
plain cross-entropy, both eager and compiled, and beside a copy of the same bytes."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from ial_cuda import CITYSCAPES, _ops, importance_aware_loss, reference

from .common import (
    IGNORE_INDEX,
    WARM_UP_ROUNDS,
    Inputs,
    Result,
    Step,
    describe_machine,
    peak_bytes,
    time_interleaved,
    why_refused,
    write_csv,
    write_json,
)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of logits, target and class weights

LAMBDAS, ALPHA = (0.5,) * (CITYSCAPES.num_levels - 1), 1.0
PEERS, FLOOR = ("reference", "F.cross_entropy"), "copy floor"
NOT_OURS = (*PEERS, "copy", "sum")  # how their rows begin


@dataclass(frozen=True)
class Case:
    """An input on a device."""

    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')} on {self.device}"


@dataclass(frozen=True)
class Provider:
    """Who computes a loss: ``loss``, and the same in eager PyTorch, by which it is judged."""

    name: str
    loss: Loss
    eager: Loss
    compiled: bool = False


@dataclass(frozen=True)
class Row:
    """A line of the table, of the CSV and of the picture."""

    name: str
    median_ms: float | None = None
    p10_ms: float | None = None
    p90_ms: float | None = None
    ratio: float | None = None  # to ours
    gb_per_s: float | None = None  # 2 reads and 1 write of the logits, 2 reads of the labels
    extra_mib: float | None = None  # held at once, beside logits, target and gradient
    refused: str | None = None  # what is wrong with the result, which therefore has no time
    skipped: str | None = None  # why there is no result


@dataclass(frozen=True)
class Report:
    """What came out of a case: all providers, ours first, the floor last; and where the time of ours goes."""

    case: Case
    labels: str
    providers: list[Row]
    parts: list[Row]

    @property
    def ratios(self) -> dict[str, float]:
        """How many times longer the peers take than ours, and ours than the copy floor."""
        ours, floor = self.providers[0], self.providers[-1]
        if ours.median_ms is None:
            return {}
        peers = [row for row in self.providers if row.name.startswith(PEERS) and row.median_ms is not None]
        ratios = {f"{row.name} / {ours.name}": row.ratio for row in peers}
        return ratios | {f"{ours.name} / {FLOOR}": round(ours.median_ms / floor.median_ms, 3)}

    def as_json(self) -> dict[str, Any]:
        return {
            "input": str(self.case),
            "labels": self.labels,
            "ratios": self.ratios,
            "providers": [asdict(row) for row in self.providers],
            "parts": [asdict(row) for row in self.parts],
        }


def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, weight.to(logits.dtype), ignore_index=IGNORE_INDEX)


def reference_loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    return reference.importance_aware_loss(
        logits, target, CITYSCAPES, weight=weight, lambdas=LAMBDAS, alpha=ALPHA, ignore_index=IGNORE_INDEX
    )[0]


def fused_loss(backend: str, *, inplace: bool = False) -> Loss:
    def loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return importance_aware_loss(
            logits,
            target,
            CITYSCAPES,
            weight=weight,
            lambdas=LAMBDAS,
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
    providers = [Provider(f"ial_cuda {name}", fused_loss(name), reference_loss) for name in backends]
    in_place = fused_loss(backends[0], inplace=True)
    providers.append(Provider(f"ial_cuda {backends[0]}, in place", in_place, reference_loss))
    for name, eager in zip(PEERS, (reference_loss, cross_entropy), strict=True):
        providers.append(Provider(name, eager, eager))
        if compile_peers:
            compiled = torch.compile(eager, dynamic=False)
            providers.append(Provider(f"{name}, compiled", compiled, eager, compiled=True))
    return providers


def loss_and_gradient(loss: Loss, logits: Tensor, target: Tensor, weight: Tensor) -> Result:
    """What a training step asks of a loss. The gradient is added to no ``.grad``, whoever computes it."""
    value = loss(logits, target, weight)
    (gradient,) = torch.autograd.grad(value, logits)
    return Result(value.detach(), gradient)


def on_cpu(result: Result) -> Result:
    return Result(*(tensor.cpu() for tensor in result))


def judge(eager: Loss, inputs: Inputs) -> tuple[Result, Result]:
    """Eager PyTorch in the precision of the loss it returns, and the truth: eager in float64, on the CPU."""
    target, weight = inputs.target, inputs.weight
    logits = inputs.source.to(eager(inputs.source, target, weight).dtype)
    standard = loss_and_gradient(eager, logits.detach().requires_grad_(), target, weight)
    exact = inputs.source.cpu().double().requires_grad_()
    return on_cpu(standard), loss_and_gradient(eager, exact, target.cpu(), weight.cpu())


def examine(provider: Provider, inputs: Inputs, standard: Result, truth: Result) -> Row:
    """The provider's row before it is timed, with a reason where it will not be. Warms up the compiler."""
    try:
        result = loss_and_gradient(provider.loss, inputs.logits(), inputs.target, inputs.weight)
    except RuntimeError as error:
        if not provider.compiled:
            raise
        reason = re.sub(r"\S*/\S*", "…", str(error).splitlines()[0])  # the files name nobody's folders
        return Row(provider.name, skipped=f"torch.compile fails: {reason}")
    # Compiled code adds pixels one by one in float32: its sums err like a random walk, and are not wrong.
    ulps = math.sqrt(inputs.target.numel()) if provider.compiled else 4
    return Row(provider.name, refused=why_refused(on_cpu(result), standard, truth, ulps=ulps))


def examine_all(providers: Sequence[Provider], inputs: Inputs, on_each: Callable[[], None]) -> dict[str, Row]:
    judges = {eager: judge(eager, inputs) for eager in {provider.eager for provider in providers}}
    rows = {}
    for provider in providers:
        rows[provider.name] = examine(provider, inputs, *judges[provider.eager])
        on_each()
    return rows


def provider_steps(providers: Sequence[Provider], inputs: Inputs) -> dict[str, Step]:
    def step(loss: Loss) -> Step:
        return lambda logits: loss_and_gradient(loss, logits, inputs.target, inputs.weight)

    return {provider.name: step(provider.loss) for provider in providers}


def copy_parts(inputs: Inputs) -> dict[str, Step]:
    """What the floor is made of: the logits copied to memory that is there already, and read once more."""
    warm = torch.empty_like(inputs.source)
    return {
        "copy_ (1 read, 1 write)": lambda logits: warm.copy_(logits.detach()),
        "sum (1 read)": lambda logits: logits.detach().sum(),
    }


def cpu_parts(inputs: Inputs) -> dict[str, Step]:
    """The operators that a step of the CPU backend calls, one by one, and a step with hardly any pixels."""
    ops = torch.ops.ial_cuda
    target, weight = inputs.target, inputs.weight
    options = (LAMBDAS, ALPHA, "mean", "mean", "image")
    pixels = (target, weight, None, CITYSCAPES.class_levels, IGNORE_INDEX, "exact")
    one = torch.ones(())
    stats = ops.reduce(inputs.source, *pixels, False)
    table = ops.table(stats, one, *options)

    def small(_: Tensor) -> None:
        ops.combine(stats, *options, torch.float32)
        ops.table(stats, one, *options)

    pixel = inputs.source[:, :, :1, :1].contiguous().requires_grad_()
    pixel_target = target[:, :1, :1].contiguous()
    loss = fused_loss("cpu")
    return {
        "reduce (forward)": lambda logits: ops.reduce(logits.detach(), *pixels, False),
        "gradient": lambda logits: ops.gradient(logits.detach(), table, *pixels),
        "gradient, in place": lambda logits: ops.gradient_(logits.detach(), table, *pixels),
        "combine and table": small,
        "step on one pixel": lambda _: loss_and_gradient(loss, pixel, pixel_target, weight),
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
    steps = provider_steps(right, inputs)
    copies = copy_parts(inputs)
    floor = {FLOOR: lambda logits: [copy(logits) for copy in copies.values()]}
    ours_is_right = providers[0] in right
    parts = cpu_parts(inputs) | copies if ours_is_right and case.device == "cpu" else copies
    times = time_interleaved(steps | floor | parts, inputs.logits, case.device, rounds, advance)

    def timed(row: Row, **more: float) -> Row:
        ours = times[providers[0].name].median_ms if ours_is_right else None
        ratio = round(times[row.name].median_ms / ours, 3) if ours else None
        return replace(row, **asdict(times[row.name]), ratio=ratio, **more)

    size = inputs.source.nbytes
    for name, step in steps.items():
        speed = (3 * size + 2 * inputs.target.nbytes) / 1e6 / times[name].median_ms
        extra = (peak_bytes(step, inputs.logits()) - size) / 2**20
        rows[name] = timed(rows[name], gb_per_s=round(speed, 2), extra_mib=round(extra, 2))
    rows[FLOOR] = timed(Row(FLOOR), gb_per_s=round(3 * size / 1e6 / times[FLOOR].median_ms, 2))
    return Report(case, inputs.labels, list(rows.values()), [timed(Row(name)) for name in parts])


def make_table(title: str, rows: Sequence[Row]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column()
    for heading in ("median ms", "10–90 %", "/ ours", "GB/s", "extra MiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row.refused or row.skipped:
            table.add_row(row.name, "wrong" if row.refused else "skipped")
            continue
        table.add_row(
            row.name,
            number(row.median_ms, 2),
            f"{row.p10_ms:.2f}–{row.p90_ms:.2f}",
            number(row.ratio, 2),
            number(row.gb_per_s, 1),
            number(row.extra_mib, 1),
        )
    return table


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def show(report: Report, console: Console) -> None:
    console.print(make_table(f"Loss and gradient, {report.case}, {report.labels} labels", report.providers))
    for row in report.providers:
        if row.refused:
            console.print(f"{row.name} is wrong: {row.refused}", style="red", soft_wrap=True)
        if row.skipped:
            console.print(f"{row.name}: {row.skipped}", soft_wrap=True)
    console.print(make_table("Where the time goes", report.parts))
    for name, ratio in report.ratios.items():
        console.print(f"{name:<50} {ratio:8.2f}", highlight=False)


def draw(reports: Sequence[Report], machine: Mapping[str, Any], file: Path) -> None:
    """A row of panels a case: the providers, and where the time of ours goes."""
    figure = Figure(figsize=(13, 3.6 * len(reports)), layout="constrained")
    hardware = f"{machine['cpu']} ({machine['threads']} threads)"
    if "gpu" in machine:
        hardware += f" and {machine['gpu']}"
    figure.suptitle(f"Loss and gradient on {hardware}, torch {machine['torch']}")
    panels = figure.subplots(len(reports), 2, squeeze=False, width_ratios=(3, 2))
    for report, (left, right) in zip(reports, panels, strict=True):
        draw_bars(left, str(report.case), report.providers)
        draw_bars(right, "Where the time goes", report.parts)
    figure.savefig(file, dpi=120)


def draw_bars(axes: Axes, title: str, rows: Sequence[Row]) -> None:
    """Medians as bars, the 10 % to 90 % quantiles as whiskers; ours in colour."""
    rows = [row for row in rows if row.median_ms is not None]
    medians = [row.median_ms for row in rows]
    whiskers = [[row.median_ms - row.p10_ms for row in rows], [row.p90_ms - row.median_ms for row in rows]]
    colours = ["tab:grey" if row.name.startswith(NOT_OURS) else "tab:green" for row in rows]
    bars = axes.barh(
        [row.name for row in rows], medians, xerr=whiskers, color=colours, ecolor="black", capsize=2
    )
    axes.bar_label(bars, [f" {row.median_ms:.3g} ms, {number(row.ratio, 2)}×" for row in rows], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set(title=title, xlabel="median ms; whiskers: 10 % and 90 %; ×: to ours")


def shape(text: str) -> tuple[int, ...]:
    sizes = tuple(map(int, text.split("x")))
    if len(sizes) != 4 or min(sizes) < 1 or sizes[1] != CITYSCAPES.num_classes:
        raise argparse.ArgumentTypeError(f"{text!r} is not Nx{CITYSCAPES.num_classes}xHxW")
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
        "--shape", type=shape, metavar="NxCxHxW", help="default: 1x19x512x1024, on CUDA 1x19x1024x2048"
    )
    parser.add_argument("--rounds", type=rounds, default=30, metavar="R", help="at least 2, default 30")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), metavar="N", help="default: all cores"
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    return parser.parse_args(argv)


def make_cases(shape: tuple[int, ...] | None) -> list[Case]:
    """The CPU's case and, where there is a GPU with kernels for it, that in two precisions."""
    cases = [Case("cpu", torch.float32, shape or (1, 19, 512, 1024))]
    if torch.cuda.is_available():
        cases += [
            Case("cuda", dtype, shape or (1, 19, 1024, 2048)) for dtype in (torch.bfloat16, torch.float32)
        ]
    return [case for case in cases if kernels(case.device)]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    cases = make_cases(arguments.shape)
    if not cases:
        print(f"ial_cuda has no kernels here: {_ops.unavailable['cpu']}", file=sys.stderr)
        return 1
    machine = describe_machine()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        reports = [
            measure(case, rounds=arguments.rounds, compile_peers=arguments.compile, progress=progress)
            for case in cases
        ]
    for report in reports:
        show(report, console)
    summary = {
        "machine": machine,
        "rounds": arguments.rounds,
        "cases": [report.as_json() for report in reports],
    }
    write_json(output / "loss.json", summary)
    write_csv(
        output / "loss.csv",
        [
            {"input": str(report.case), "section": section} | asdict(row)
            for report in reports
            for section, rows in (("providers", report.providers), ("parts", report.parts))
            for row in rows
        ],
    )
    draw(reports, machine, output / "loss.png")
    console.print(f"Picture: {output / 'loss.png'}", soft_wrap=True)
    return int(any(row.refused for report in reports for row in report.providers))


if __name__ == "__main__":
    sys.exit(main())
