"""What the benchmarks' programs share: their options, and the run over all cases."""

from __future__ import annotations

import argparse
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ial_cuda import backends

from .common import LEAST_ROUNDS, describe_machine
from .compare import first_line
from .providers import DTYPES, kernels
from .report import Row


class Report(Protocol):
    """What came out of a case."""

    @property
    def providers(self) -> list[Row]: ...


C, R = TypeVar("C"), TypeVar("R", bound=Report)


def make_plain_parser(program: str, description: str | None, rounds: int = 30) -> argparse.ArgumentParser:
    """The options that every program has."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{program}", description=description)
    latest = Path(__file__).parent / "results" / "latest"
    parser.add_argument(
        "--output", type=Path, default=latest, metavar="DIR", help="default: benchmarks/results/latest"
    )
    parser.add_argument(
        "--rounds", type=at_least_2, default=rounds, metavar="R", help=f"at least 2, default {rounds}"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), metavar="N", help="default: all cores"
    )
    return parser


def at_least_2(text: str) -> int:
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text} is less than 2, of which no quantiles can be taken")
    return int(text)


def make_parser(program: str, description: str | None, seconds: float = math.inf) -> argparse.ArgumentParser:
    """The options of a program that goes over cases."""
    parser = make_plain_parser(program, description)
    parser.add_argument(
        "--device", choices=DTYPES, help="default: each that ial_cuda has kernels for on this machine"
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, metavar="M", help="after which no case is begun"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=seconds,
        metavar="S",
        help=f"for the rounds of a case, which get fewer, but {LEAST_ROUNDS} at least; default {seconds}",
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    return parser


def devices(asked: str | None) -> list[str]:
    """The device that was asked for, or each that is there; those that have kernels."""
    names = [asked] if asked else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [name for name in names if kernels(name)]


def add_task(progress: Progress, description: str, total: int) -> Callable[[], None]:
    """A line of the progress, and what is to be called after each of its steps."""
    task = progress.add_task(description, total=total)

    def advance() -> None:
        progress.advance(task)
        progress.refresh()  # here only: a thread that draws would disturb the times

    return advance


def run(
    arguments: argparse.Namespace,
    cases: Sequence[C],
    measure: Callable[..., R],
    show: Callable[[R, Console], None],
    write: Callable[[Sequence[R], Mapping[str, Any], int, Path], Path | None],
    conclude: Callable[[Sequence[R], Mapping[str, Any], Path, Console], None] = lambda *_: None,
) -> int:
    """Measures the cases one by one, and tells and writes what came out of each; the program's exit code.

    Args:
        measure: of a case, with ``rounds``, ``seconds``, ``compile_peers`` and ``progress``.
        write: all reports so far, to the folder; returns the picture's file, if there is one.
        conclude: tells what takes all reports to tell, and draws it, to the folder.
    """
    if not cases:
        for backend in backends.suitable(arguments.device or "cpu"):
            if backend.missing is not None:
                print(f"ial_cuda has no kernels here: {backend.name}: {backend.missing}", file=sys.stderr)
        return 1
    torch.set_num_threads(arguments.threads)
    machine = describe_machine()
    arguments.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    reports: list[R] = []
    late: list[C] = []
    failed = False
    picture = None
    deadline = time.monotonic() + 60 * arguments.minutes
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        for case in cases:
            if time.monotonic() > deadline:
                late.append(case)
                continue
            try:
                report = measure(
                    case,
                    rounds=arguments.rounds,
                    seconds=arguments.seconds,
                    compile_peers=arguments.compile,
                    progress=progress,
                )
            except Exception as error:  # too little memory, say: the other cases may do
                console.print(f"{case} fails: {first_line(error)}", style="red", soft_wrap=True)
                traceback.print_exc()
                failed = True
                continue
            reports.append(report)
            show(report, console)
            # who is interrupted later keeps this
            picture = write(reports, machine, arguments.rounds, arguments.output)
            for task in progress.task_ids:
                progress.remove_task(task)  # its table stands there
    if reports:
        conclude(reports, machine, arguments.output, console)
    if late:
        console.print(f"Out of time for {'; '.join(map(str, late))}", soft_wrap=True)
    if picture:
        console.print(f"Picture: {picture}", soft_wrap=True)
    return int(failed or any(row.refused and row.ours for report in reports for row in report.providers))
