"""Compares two results, or two commits: today's benchmark with the package of one and of the other, in turns.

A machine has bad hours: beside each ratio stands the same over the yardstick's, the copy floor's or, where
there is none, the geometric mean of all that is not ours. Commits are run in pairs, and a row is faster or
slower only where the ratios of all pairs lie on one side of 1.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .checkouts import CommandFailed, Program, build_extension, find_commit, run_pairs
from .command import at_least_2
from .common import write_json
from .paired import Comparison, Comparisons, compare, differences
from .report import number

STYLES = {"faster": "green", "slower": "red"}


def show(found: Comparisons, console: Console) -> None:
    for given in dict.fromkeys(row.input for row in found.rows):
        rows = [row for row in found.rows if row.input == given]
        console.print(make_table(given, found.yardsticks[given], rows))
        for line in compare_memory(rows):
            console.print(line, highlight=False, soft_wrap=True)
    for name, keys in (("OLD", found.only_old), ("NEW", found.only_new)):
        for given in dict.fromkeys(key.input for key in keys):
            names = "; ".join(key.name for key in keys if key.input == given)
            console.print(f"timed only in {name}: {given}: {names}", highlight=False, soft_wrap=True)


def make_table(given: str, yardstick: str | None, rows: Sequence[Comparison]) -> Table:
    several = len(rows[0].ratios) > 1
    title = f"{given}; yardstick: {yardstick or 'none'}"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(min_width=14)  # in 80 columns it is the names that wrap
    paired = ("range", "verdict") if several else ()
    for heading in ("old ms", "new ms", "new /\nold", *paired, "/ yard-\nstick"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        spread = (f"{min(row.ratios):.3f}–{max(row.ratios):.3f}", row.verdict) if several else ()
        table.add_row(
            row.name,
            number(row.old_ms, 3),
            number(row.new_ms, 3),
            number(row.ratio, 3),
            *spread,
            number(row.adjusted_ratio, 3),
            style=STYLES.get(row.verdict),
        )
    return table


def compare_memory(rows: Sequence[Comparison]) -> list[str]:
    """Of the rows that have it in both, those that hold more or less than before."""
    both = [row for row in rows if row.old_mib is not None and row.new_mib is not None]
    changed = [row for row in both if abs(row.new_mib - row.old_mib) >= 0.05]
    lines = [f"{row.name}: {row.old_mib:.1f} MiB → {row.new_mib:.1f} MiB extra" for row in changed]
    return lines or [f"extra MiB: the same in all {len(both)} rows that tell it"]


def read(file: str) -> dict[str, Any]:
    """A result."""
    result = json.loads(Path(file).read_text())
    for key in ("machine", "cases"):
        if key not in result:
            raise ValueError(f"{file} has no {key!r}, expected the file of a benchmark that goes over cases")
    return result


def compare_files(old: str, new: str, console: Console) -> dict[str, Any]:
    """Compares two files; what is to be written."""
    results = read(old), read(new)
    told = differences(*results)
    for difference in told:
        console.print(f"differs: {difference}", style="yellow", highlight=False, soft_wrap=True)
    found = compare([results])
    show(found, console)
    return {"old": old, "new": new, "differences": told} | found.as_json()


def compare_commits(
    refs: Sequence[str], program: Program, pairs: int, build: Callable[[Path], None], console: Console
) -> dict[str, Any]:
    """Compares two commits, as far as their runs succeed; what is to be written."""
    old, new = map(find_commit, refs)

    def tell(step: str) -> None:
        console.print(step, highlight=False)

    results = []
    try:
        for pair in run_pairs(old, new, program, pairs, build=build, on_step=tell):
            results.append(pair)
    except CommandFailed as error:
        console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
    written = {
        "old": dict(zip(("ref", "commit"), (refs[0], old), strict=True)),
        "new": dict(zip(("ref", "commit"), (refs[1], new), strict=True)),
        "program": program.name,
        "arguments": list(program.arguments),
        "pairs_wanted": pairs,
        "pairs": len(results),
    }
    if not results:
        return written
    found = compare(results)
    show(found, console)
    machine = results[0][0]["machine"]  # whose commit is that of the benchmark
    return written | {"machine": machine} | found.as_json()


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and what the program gets."""
    own, rest = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.versus",
        usage="%(prog)s OLD NEW [--program NAME] [--repeats N] [--output DIR] [-- ARGUMENT ...]",
        description=__doc__,
    )
    for name in ("OLD", "NEW"):
        parser.add_argument(name.lower(), metavar=name, help="a result, *.json, or a commit")
    parser.add_argument(
        "--program",
        default="loss",
        metavar="NAME",
        help="of two commits: which of the benchmarks, default loss",
    )
    parser.add_argument(
        "--repeats",
        type=at_least_2,
        default=6,
        metavar="N",
        help="of two commits: how many pairs, default 6, by which one row in 32 differs by mere chance",
    )
    latest = Path(__file__).parent / "results" / "latest"
    parser.add_argument(
        "--output", type=Path, default=latest, metavar="DIR", help="default: benchmarks/results/latest"
    )
    arguments = parser.parse_args(own)
    arguments.files = arguments.old.endswith(".json")
    if arguments.files != arguments.new.endswith(".json"):
        parser.error(
            f"OLD and NEW are {arguments.old} and {arguments.new}, expected two files *.json or two commits"
        )
    if arguments.files and rest:
        parser.error(
            f"arguments after -- are {' '.join(rest)}, expected none for two files, where nothing is run"
        )
    if (
        not Path(__file__).with_name(f"{arguments.program}.py").exists()
    ):  # to be told before anything is built
        parser.error(
            f"--program is {arguments.program}, expected a program of benchmarks/, such as loss or upsample"
        )
    return arguments, rest


def main(argv: Sequence[str] | None = None, build: Callable[[Path], None] = build_extension) -> int:
    arguments, rest = parse(sys.argv[1:] if argv is None else argv)
    console = Console()
    complete = True
    try:
        if arguments.files:
            written = compare_files(arguments.old, arguments.new, console)
        else:
            refs, program = (arguments.old, arguments.new), Program(arguments.program, rest)
            written = compare_commits(refs, program, arguments.repeats, build, console)
            complete = written["pairs"] == arguments.repeats
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if not complete:
        console.print(f"{written['pairs']} of {arguments.repeats} pairs have results", style="red")
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output / "versus.json", written)
    return int(not complete)


if __name__ == "__main__":
    # Ended by SIGTERM, too, it leaves no checkouts behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
