"""Compares two result files, or two commits: today's benchmark runs with the package of each in alternation.

Commits run in pairs. A row is faster or slower only where the ratios of all pairs lie on one side of 1. The
control is what our kernels have no part in: the memory floor, or without one the geometric mean of the other
providers. Its own ratio shows how the machine drifted, so each ratio is also given divided by the control's.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any, NamedTuple

from rich.console import Console

from .harness.checkouts import CommandFailed, Program, build_extension, find_commit, run_pairs
from .harness.cli import LATEST, at_least_2
from .harness.machine import write_json
from .harness.report import FLOOR
from .harness.tables import make_console, number, print_table

PROGRAMS = ("loss", "upsample", "step", "sweep")
FLOORS = (FLOOR, "copy floor")  # older results have the second
#: The times that a row may have, and what they add to its name.
MEASURES = {"median_ms": "", "forward_ms": ", forward", "backward_ms": ", backward", "graph_ms": ", graph"}
Result = Mapping[str, Any]  # what a benchmark writes


@dataclass(frozen=True)
class Key:
    """What identifies a row in both results."""

    input: str
    name: str


class Timed(NamedTuple):
    ms: float
    mib: float | None
    is_peer: bool


@dataclass(frozen=True)
class Comparison:
    """A row that all results have. Times are medians over the pairs."""

    input: str
    name: str
    old_ms: float
    new_ms: float
    old_mib: float | None
    new_mib: float | None
    ratios: list[float]  # new / old of each pair
    ratio: float  # their median
    corrected_ratio: float | None  # median of the ratios divided by the control's
    verdict: str | None  # None with a single pair, which has no range


@dataclass(frozen=True)
class Comparisons:
    rows: list[Comparison]
    controls: dict[str, str | None]  # by input
    only_old: list[Key]
    only_new: list[Key]


def times_of(result: Result) -> dict[Key, Timed]:
    times: dict[Key, Timed] = {}
    for case in result["cases"]:
        providers, parts = case["providers"], case.get("parts", [])
        for index, row in enumerate([*providers, *parts]):
            is_peer = index < len(providers) and not row["name"].startswith("ial_cuda")
            for measure, suffix in MEASURES.items():
                if row.get(measure) is None:
                    continue
                key = Key(case["input"], row["name"] + suffix)
                if key in times:
                    raise ValueError(f"{key.input!r} has {key.name!r} twice, expected once")
                mib = None if suffix else row.get("extra_mib")
                times[key] = Timed(row[measure], mib, is_peer and not suffix)
    return times


def compare(pairs: Sequence[Sequence[Result]]) -> Comparisons:
    """Compares the rows of the old and the new result of each pair."""
    timed = [(times_of(old), times_of(new)) for old, new in pairs]
    every = [times for pair in timed for times in pair]
    common = [key for key in every[0] if all(key in times for times in every)]

    def ratios_of(key: Key) -> list[float]:
        return [new[key].ms / old[key].ms for old, new in timed]

    controls: dict[str, str | None] = {}
    drifts: dict[str, list[float]] = {}
    for given in dict.fromkeys(key.input for key in common):
        peers = [key for key in common if key.input == given and every[0][key].is_peer]
        control = [key for key in peers if key.name in FLOORS] or peers
        single = control[0].name if control else None
        controls[given] = f"geometric mean of {len(control)}" if len(control) > 1 else single
        drifts[given] = [geometric_mean(of_pair) for of_pair in zip(*map(ratios_of, control), strict=True)]
    rows = []
    for key in common:
        old, new = [times[key] for times, _ in timed], [times[key] for _, times in timed]
        ratios, drift = ratios_of(key), drifts[key.input]
        corrected = [ratio / by for ratio, by in zip(ratios, drift, strict=True)] if drift else None
        verdict = "faster" if max(ratios) < 1 else "slower" if min(ratios) > 1 else "same"
        rows.append(
            Comparison(
                **asdict(key),
                old_ms=median(row.ms for row in old),
                new_ms=median(row.ms for row in new),
                old_mib=old[0].mib,
                new_mib=new[0].mib,
                ratios=ratios,
                ratio=median(ratios),
                corrected_ratio=corrected and median(corrected),
                verdict=verdict if len(pairs) > 1 else None,
            )
        )
    only_old, only_new = (
        list(dict.fromkeys(key for times in results for key in times if key not in common))
        for results in zip(*timed, strict=True)
    )
    return Comparisons(rows, controls, only_old, only_new)


def differences(old: Result, new: Result) -> list[str]:
    """What differs in the circumstances of two results."""
    before, after = ({"rounds": result.get("rounds")} | result["machine"] for result in (old, new))
    names = [name for name in before | after if before.get(name) != after.get(name)]
    return [f"{name}: {before.get(name)} → {after.get(name)}" for name in names]


def show(found: Comparisons, console: Console) -> None:
    for given, control in found.controls.items():
        rows = [row for row in found.rows if row.input == given]
        headings = ["", "new / old", "/ control", "old ms", "new ms"]
        if rows[0].verdict:
            headings[3:3] = ["verdict", f"range of {len(rows[0].ratios)}"]
        print_table(console, f"{given}; control: {control or 'none'}", headings, list(map(cells, rows)))
        for line in memory_changes(rows):
            console.out(line, highlight=False)
    for side, keys in (("old", found.only_old), ("new", found.only_new)):
        for given in dict.fromkeys(key.input for key in keys):
            names = "; ".join(key.name for key in keys if key.input == given)
            console.out(f"Only in the {side} result: {given}: {names}", highlight=False)


def cells(row: Comparison) -> list[str]:
    ratio, corrected, old, new = (
        number(value, 3) for value in (row.ratio, row.corrected_ratio, row.old_ms, row.new_ms)
    )
    spread = [row.verdict, f"{min(row.ratios):.3f}–{max(row.ratios):.3f}"] if row.verdict else []
    return [row.name, ratio, corrected, *spread, old, new]


def memory_changes(rows: Sequence[Comparison]) -> list[str]:
    known = [row for row in rows if row.old_mib is not None and row.new_mib is not None]
    changed = [row for row in known if abs(row.new_mib - row.old_mib) >= 0.05]
    lines = [f"{row.name}: {row.old_mib:.1f} → {row.new_mib:.1f} MiB extra" for row in changed]
    return lines or [f"Extra memory: unchanged in all {len(known)} rows that have it"]


def read(file: str) -> Result:
    result = json.loads(Path(file).read_text())
    for key in ("machine", "cases"):
        if key not in result:
            raise ValueError(f"{file} has no {key!r}, expected a result of {', '.join(PROGRAMS)}")
    return result


def compare_files(old: str, new: str, console: Console) -> dict[str, Any]:
    results = read(old), read(new)
    circumstances = differences(*results)
    for difference in circumstances:
        console.out(f"Differs: {difference}", highlight=False)
    found = compare([results])
    show(found, console)
    return {"old": old, "new": new, "differences": circumstances} | asdict(found)


def compare_commits(
    refs: Sequence[str], program: Program, pairs: int, build: Callable[[Path], None], console: Console
) -> dict[str, Any]:
    """Compares two commits. After a failure: with the pairs that are complete."""
    commits = [find_commit(ref) for ref in refs]
    results = []
    try:
        for pair in run_pairs(commits, program, pairs, build, console.out):
            results.append(pair)
    except CommandFailed as error:
        console.out(str(error), highlight=False)
    sides = [{"ref": ref, "commit": commit} for ref, commit in zip(refs, commits, strict=True)]
    written = {"old": sides[0], "new": sides[1], "program": program.name, "arguments": program.arguments}
    written |= {"pairs_wanted": pairs, "pairs": len(results)}
    if len(results) < pairs:
        console.out(f"{len(results)} of {pairs} pairs have results", highlight=False)
    if not results:
        return written
    found = compare(results)
    show(found, console)
    # The commit in the machine's description is that of the benchmark.
    return written | {"machine": results[0][0]["machine"]} | asdict(found)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    end = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        usage="%(prog)s OLD NEW [--program NAME] [--repeats N] [--output DIR] [-- ARGUMENT ...]",
        description=__doc__,
    )
    for name in ("OLD", "NEW"):
        parser.add_argument(name.lower(), metavar=name, help="a result file, *.json, or a commit")
    parser.add_argument(
        "--program", default="loss", choices=PROGRAMS, help="the benchmark that commits run, default loss"
    )
    parser.add_argument(
        "--repeats",
        type=at_least_2,
        default=6,
        metavar="N",
        help="pairs of runs of two commits, default 6: without a difference 1 row in 32 gets a verdict",
    )
    parser.add_argument(
        "--output", type=Path, default=LATEST, metavar="DIR", help="default: benchmarks/results/latest"
    )
    arguments = parser.parse_args(argv[:end])
    arguments.rest = list(argv[end + 1 :])
    arguments.files = arguments.old.endswith(".json")
    if arguments.files != arguments.new.endswith(".json"):
        given = f"{arguments.old} and {arguments.new}"
        parser.error(f"OLD and NEW are {given}, expected two files *.json or two commits")
    if arguments.files and arguments.rest:
        parser.error(f"arguments after -- are {' '.join(arguments.rest)}, expected none with two files")
    return arguments


def main(argv: Sequence[str] | None = None, build: Callable[[Path], None] = build_extension) -> int:
    arguments = parse(sys.argv[1:] if argv is None else argv)
    console = make_console()
    refs = arguments.old, arguments.new
    try:
        if arguments.files:
            written = compare_files(*refs, console)
        else:
            program = Program(arguments.program, arguments.rest)
            written = compare_commits(refs, program, arguments.repeats, build, console)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output / "compare.json", written)
    return int("pairs" in written and written["pairs"] < arguments.repeats)


if __name__ == "__main__":
    # sys.exit unwinds, so that worktrees are removed after SIGTERM too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
