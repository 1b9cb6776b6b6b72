"""The command line of the programs: their options, and the loop over all cases."""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from ial_cuda import backends

from .benchmark import Settings
from .inputs import Case
from .machine import describe_machine
from .measure import MIN_ROUNDS
from .providers import DTYPES, kernels
from .report import Report, first_line, read, show, write
from .tables import make_console

LATEST = Path(__file__).parents[1] / "results" / "latest"

#: Draws the pictures of all reports to a folder; returns their files.
Draw = Callable[[Sequence[Report], Mapping[str, Any], Path], list[Path]]


def at_least_2(text: str) -> int:
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text} is less than 2: quantiles need at least two rounds")
    return int(text)


def make_plain_parser(program: str, description: str | None, rounds: int = 30) -> argparse.ArgumentParser:
    """The options of every program."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{program}", description=description)
    parser.add_argument(
        "--output", type=Path, default=LATEST, metavar="DIR", help="default: benchmarks/results/latest"
    )
    parser.add_argument(
        "--rounds", type=at_least_2, default=rounds, metavar="R", help=f"at least 2, default {rounds}"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), metavar="N", help="default: all cores"
    )
    return parser


def make_parser(program: str, description: str | None, seconds: float = math.inf) -> argparse.ArgumentParser:
    """The options of a program that goes over cases."""
    parser = make_plain_parser(program, description)
    parser.add_argument(
        "--device", choices=DTYPES, help="default: every device that has kernels of ial_cuda here"
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, metavar="M", help="no case begins after M minutes"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=seconds,
        metavar="S",
        help=f"time for the rounds of a case: no round begins after it, from {MIN_ROUNDS} rounds on; "
        f"default {seconds}",
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="the cases whose names match")
    parser.add_argument("--quick", action="store_true", help="the most important cases only")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    parser.add_argument(
        "--redraw", action="store_true", help="draw the pictures of the results in DIR again; measure nothing"
    )
    return parser


def devices(asked: str | None) -> list[str]:
    """The device that was asked for, else every device of this machine; those that have kernels."""
    names = [asked] if asked else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [name for name in names if kernels(name)]


def run(
    program: str,
    arguments: argparse.Namespace,
    cases: Sequence[Case],
    measure: Callable[[Case, Settings], Report],
    draw: Draw = lambda *_: [],
    show: Callable[[Report, Console], None] = show,
) -> int:
    """Measures the cases one by one. Shows and writes each report at once, and draws the pictures at the end.

    Returns:
        The exit code: 1 if a result of ours is wrong, a case fails, or nothing can be measured.
    """
    console = make_console()
    file = arguments.output / f"{program}.json"
    if arguments.redraw:
        for picture in draw(*read(file), arguments.output):
            console.print(f"Picture: {picture}", soft_wrap=True)
        return 0
    if not cases:
        for backend in backends.suitable(arguments.device or "cpu"):
            if backend.missing is not None:
                print(f"ial_cuda has no kernels here: {backend.name}: {backend.missing}", file=sys.stderr)
        return 1
    cases = [case for case in cases if re.search(arguments.only, str(case))]
    torch.set_num_threads(arguments.threads)
    machine = describe_machine()
    arguments.output.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    reports: list[Report] = []
    late: list[Case] = []
    failed = False
    deadline = time.monotonic() + 60 * arguments.minutes
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        settings = Settings(arguments, progress)
        for case in cases:
            if time.monotonic() > deadline:
                late.append(case)
                continue
            try:
                report = measure(case, settings)
            except Exception as error:  # such as too little memory: other cases may succeed
                console.print(f"{case} fails: {first_line(error)}", style="red", soft_wrap=True)
                traceback.print_exc()
                failed = True
                continue
            reports.append(report)
            write(reports, machine, arguments.rounds, file)
            for task in progress.task_ids:
                progress.remove_task(task)
            progress.refresh()  # else the removed line is drawn once more
            show(report, console)
    if late:
        console.print(f"Not measured for lack of time: {'; '.join(map(str, late))}", soft_wrap=True)
    if reports:
        console.print(f"Results: {file}", soft_wrap=True)
        for picture in draw(reports, machine, arguments.output):
            console.print(f"Picture: {picture}", soft_wrap=True)
    return int(failed or any(row.failed and row.ours for report in reports for row in report.providers))
