"""All that a machine with a GPU can tell, in under nine minutes: the extension built for it, the benchmark,
the tests, compute-sanitizer. Stages run in order of value, each within a bound; a failed one stops no other.

It takes the Python it is run by, with torch and pytest, and installs nothing; a stage that lacks something is
skipped. Without a GPU it is a dry run: the same stages on the CPU, where tests/simt runs the CUDA kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Seconds for all stages together.
TOTAL = 530
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
#: The tools of the CUDA toolkit, which is not always on PATH.
TOOL_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
#: A log keeps its beginning and its end.
LOG_BYTES, TAIL_LINES = 1 << 20, 30
#: With -v the log of a run that is ended tells what failed and where it was.
PYTEST = (sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider")
BENCHMARKS = ("loss", "upsample", "step", "sweep")
PRODUCTS = (
    *(f"{name}.{kind}" for name in BENCHMARKS for kind in ("json", "csv", "png") if name != "step"),
    "step.json",
    "summary.json",
    "log.txt",
)

PROBE = """
import torch
print("%d.%d" % torch.cuda.get_device_capability() if torch.cuda.is_available() else "")
"""
# What is there for a device, into a file.
INFO = """
import json, sys
from pathlib import Path
from benchmarks.common import describe_machine
from ial_cuda import _ops
device = {device!r}
print(_ops.describe())
backends = [name for name in _ops.kernels(device) if _ops.unavailable[name] is None]
Path({file!r}).write_text(json.dumps(dict(machine=describe_machine(), backends=backends)))
sys.exit(_ops.unavailable[device])
"""


@dataclass(frozen=True)
class Stage:
    """A command, and the seconds after which it is killed."""

    name: str
    command: Sequence[str]
    seconds: float
    env: Mapping[str, str] = field(default_factory=dict)
    modules: Sequence[str] = ()  # what it needs
    programs: Sequence[str] = ()
    skip: str | None = None  # why it has nothing to do

    def why_not(self) -> str | None:
        missing = [name for name in self.modules if importlib.util.find_spec(name) is None]
        missing += [name for name in self.programs if shutil.which(name, path=TOOL_PATH) is None]
        return f"no {', '.join(missing)} here" if missing else self.skip


@dataclass(frozen=True)
class Outcome:
    name: str
    result: str  # ok, failed, timed out or skipped
    why: str = ""
    seconds: float = 0.0
    tail: str = ""  # the end of its log, where it is not ok


class Running:
    """A stage's process, in a group of its own so that its children end with it."""

    def __init__(self, stage: Stage, log: Path, seconds: float) -> None:
        self.stage, self.log, self.seconds = stage, log, seconds
        self.start = time.monotonic()
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                stage.command,
                cwd=ROOT,
                env={**os.environ, "PATH": TOOL_PATH, "PYTHONUNBUFFERED": "1", **stage.env},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def taken(self) -> float:
        return time.monotonic() - self.start

    def kill(self) -> None:
        """The group, of which something may be left when the process itself has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def outcome(self) -> Outcome | None:
        """None while it runs within its bound."""
        code = self.process.poll()
        if code is None and self.taken < self.seconds:
            return None
        taken = round(self.taken, 1)
        self.kill()
        if code is None:
            return Outcome(self.stage.name, "timed out", f"after {self.seconds:.0f} s", taken, tail(self.log))
        if code:
            why = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
            return Outcome(self.stage.name, "failed", why, taken, tail(self.log))
        why = last_line(self.log)
        # Tests that were all skipped have shown nothing.
        result = "skipped" if "skipped" in why and "passed" not in why else "ok"
        return Outcome(self.stage.name, result, why, taken)


def tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    return "\n".join(line[:300] for line in lines)


def last_line(log: Path) -> str:
    """What a program that went well says last, as pytest and compute-sanitizer do to sum up."""
    lines = [line.strip("= ") for line in log.read_text(errors="replace").splitlines()]
    return next((line[:80] for line in reversed(lines) if line), "")


def run_together(stages: Sequence[Stage], folder: Path, deadline: float) -> list[Outcome]:
    """Runs the stages side by side, each for as long as its bound and the deadline allow."""
    outcomes: dict[str, Outcome] = {}
    running: list[Running] = []
    try:
        for stage in stages:
            left = deadline - time.monotonic()
            why = stage.why_not() or (None if left >= 1 else "no time left")
            if why:
                outcomes[stage.name] = Outcome(stage.name, "skipped", why)
                continue
            print(f"{stage.name} ...", flush=True)
            try:
                running.append(Running(stage, folder / f"{stage.name}.log", min(stage.seconds, left)))
            except OSError as error:
                outcomes[stage.name] = Outcome(stage.name, "failed", str(error))
        while running:
            time.sleep(0.05)
            for one in list(running):
                outcome = one.outcome()
                if outcome:
                    running.remove(one)
                    outcomes[outcome.name] = outcome
                    print(f"{outcome.name}: {outcome.result}, {outcome.seconds:.0f} s", flush=True)
    finally:
        for one in running:
            one.kill()
    return [outcomes[stage.name] for stage in stages]


class Check:
    """What has come out so far; each step is written to the output at once."""

    def __init__(self, output: Path, dry_run: bool, start: float, total: float = TOTAL) -> None:
        self.output, self.dry_run = output, dry_run
        self.start, self.deadline = start, start + total
        self.machine: dict[str, Any] = {}
        self.outcomes: list[Outcome] = []
        output.mkdir(parents=True, exist_ok=True)
        for name in PRODUCTS:
            (output / name).unlink(missing_ok=True)

    def run(self, stages: Sequence[Stage]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            new = run_together(stages, Path(folder), self.deadline)
            with (self.output / "log.txt").open("ab") as log:
                for outcome in new:
                    log.write(f"\n===== {outcome.name}: {outcome.result} {outcome.why}\n".encode())
                    if outcome.result != "skipped":
                        log.write(shortened(Path(folder, f"{outcome.name}.log").read_bytes()))
        self.outcomes += new
        text = json.dumps(self.summary(), indent=2)
        (self.output / "summary.json").write_text(text + "\n")

    @property
    def failed(self) -> bool:
        return any(outcome.result in ("failed", "timed out") for outcome in self.outcomes)

    def summary(self) -> dict[str, Any]:
        files = [self.output / f"{name}.json" for name in BENCHMARKS]
        cases = [case for file in files if file.exists() for case in json.loads(file.read_text())["cases"]]
        return {
            "dry_run": self.dry_run,
            "failed": self.failed,
            "seconds": round(time.monotonic() - self.start, 1),
            "machine": self.machine,
            "stages": [asdict(outcome) for outcome in self.outcomes],
            "cases": [
                {name: case[name] for name in ("input", "labels", "gpu_before", "gpu_after", "goals")}
                for case in cases
            ],
        }

    def show(self) -> None:
        """For the end of the output: what failed, the stages, the figures, the files."""
        summary = self.summary()
        for outcome in self.outcomes:
            if outcome.tail:
                print(f"\n----- {outcome.name} {outcome.result}, {outcome.why}:\n{outcome.tail}")
        print()
        if self.dry_run:
            print("DRY RUN on the CPU: no CUDA device was used, and no figure is a GPU's.")
        known = ("gpu", "driver_version", "cuda", "nvcc", "torch", "triton", "python", "commit")
        print(", ".join(f"{name} {self.machine[name]}" for name in known if name in self.machine))
        print(f"\n{'stage':<22} {'result':<10} {'s':>5}")
        for outcome in self.outcomes:
            print(f"{outcome.name:<22} {outcome.result:<10} {outcome.seconds:>5.0f}  {outcome.why}")
        for case in summary["cases"]:
            print(f"\n{case['input']}, {case['labels']} labels")
            for name in ("gpu_before", "gpu_after"):
                state = ", ".join(f"{field} {value}" for field, value in case[name].items())
                print(f"  {name}: {state}" if state else f"  {name}: not a GPU")
            for goal in case["goals"]:
                print(f"  {describe_goal(goal)}")
        print(f"\nin {summary['seconds']:.0f} s; {self.output}:")
        print(*sorted(file.name for file in self.output.iterdir()))


def shortened(log: bytes) -> bytes:
    half = LOG_BYTES // 2
    return log if len(log) <= LOG_BYTES else log[:half] + b"\n[...]\n" + log[-half:]


def describe_goal(goal: Mapping[str, Any]) -> str:
    reached = {None: "not measured", True: "yes", False: "NO"}[goal["reached"]]
    figures = [f"{goal[name]:.2f}" if goal[name] is not None else "-" for name in ("measured", "as_graph")]
    bound = f"{'>=' if goal['at_least'] else '<='} {goal['bound']:g}"
    return f"{reached:<12} {goal['what']:<58} {bound:<8} {figures[0]:>8}  (as a graph {figures[1]})"


def up_to_date() -> bool:
    """Whether the extension in the checkout is newer than its sources."""
    built = [file.stat().st_mtime for file in (ROOT / "ial_cuda").glob("_C*.so")]
    sources = [ROOT / "setup.py", *(ROOT / "csrc").iterdir()]
    return bool(built) and max(built) > max(file.stat().st_mtime for file in sources)


def build(capability: str | None) -> Stage:
    """For the GPU that is there alone. Forced, since an extension without CUDA may be lying there."""
    force = ["--force"] if capability else []
    return Stage(
        "build",
        [sys.executable, "setup.py", "build_ext", "--inplace", *force],
        240,
        env={
            "IAL_CUDA_FORCE_CPU": "0" if capability else "1",
            "IAL_CUDA_REQUIRE_EXT": "1",
            "MAX_JOBS": str(os.cpu_count()),
            "TORCH_CUDA_ARCH_LIST": capability or "",
        },
        modules=["torch", "setuptools"],
        skip="the extension is newer than its sources" if not capability and up_to_date() else None,
    )


def info(device: str, file: Path) -> Stage:
    code = INFO.format(device=device, file=str(file))
    return Stage("info", [sys.executable, "-c", code], 60, modules=["torch", "PIL"])


def tests(name: str, arguments: Sequence[str], seconds: float, **more: Any) -> Stage:
    modules = ["torch", "numpy", "pytest", "hypothesis"]
    return Stage(name, [*PYTEST, *arguments], seconds, modules=modules, **more)


def sanitized(tool: str | None, chosen: str) -> Stage:
    """The tests of tiles and grids, under a tool of compute-sanitizer.

    torch makes calls to CUDA that fail, which is no error of ours. Its allocator would hide from the tool
    where a tensor ends, and the tests' NaN in fresh memory what is read before it is written.
    """
    small = "(every_tile or has_room or images_than_fit or one_launch) and not 1000"
    plain = tests(
        f"sanitizer {tool or 'none'}",
        ["tests/test_launches.py", "-k", f"({chosen}) and {small}"],
        140,
        env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "IAL_UNPOISONED": "1"},
    )
    if tool is None:
        return plain
    prefix = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no"]
    return replace(plain, command=[*prefix, *plain.command], programs=["compute-sanitizer"])


def plan(backends: Sequence[str], output: Path) -> list[list[Stage]]:
    """What a GPU is asked. Stages of a group run side by side; a benchmark wants the machine for itself."""
    chosen = " or ".join(backends)
    workers = ["-n", str(max(2, (os.cpu_count() or 2) // 2))] if importlib.util.find_spec("xdist") else []
    return [
        [tests("smoke", ["tests/test_oracle.py", "-k", f"({chosen}) and number_of_classes and 19"], 60)],
        [benchmark("loss", ["--device", "cuda", "--rounds", "100"], 170, output)],
        [benchmark("upsample", ["--device", "cuda", "--rounds", "100"], 130, output)],
        [benchmark("step", ["--device", "cuda", "--rounds", "50"], 60, output)],
        [
            tests("tests of the GPU", ["tests/test_cuda.py"], 140),
            tests("tests of its backends", [*workers, "-k", f"({chosen}) and not test_cuda"], 140),
            *(sanitized(tool, chosen) for tool in SANITIZERS),
        ],
        # what it has not begun after a minute and a half it leaves, and says so
        [
            benchmark(
                "sweep",
                ["--device", "cuda", "--rounds", "30", "--seconds", "1", "--minutes", "1.5"],
                130,
                output,
            )
        ],
        [tests("other tests", [*workers, "-k", f"not ({chosen})"], 180)],
    ]


def dry_plan(output: Path) -> list[list[Stage]]:
    """The same stages with what a CPU can do in seconds."""
    few = "simt and 19 and float32"
    shapes = ["1x19x32x64", "2x11x24x40"]
    briefly = ["--device", "cpu", "--rounds", "2", "--no-compile"]
    return [
        [tests("smoke", ["tests/test_oracle.py", "-k", f"{few} and number_of_classes"], 60)],
        [benchmark("loss", [*briefly, "--shape", *shapes], 170, output)],
        [benchmark("upsample", [*briefly, "--size", "64x128"], 130, output)],
        [benchmark("step", briefly, 60, output)],
        [
            tests("tests of the GPU", ["tests/test_cuda.py"], 140),
            tests("tests of its backends", ["tests/test_launches.py", "-k", f"{few} and every_tile"], 140),
            sanitized(None, few),
        ],
        [benchmark("sweep", [*briefly, "--largest", "64"], 130, output)],
        [tests("other tests", ["tests/test_hierarchy.py"], 180)],
    ]


def benchmark(name: str, arguments: Sequence[str], seconds: float, output: Path) -> Stage:
    return Stage(
        f"benchmark of {name}",
        [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--output", str(output)],
        seconds,
        env={"COLUMNS": "160"},
        modules=["torch", "matplotlib", "rich", "PIL"],
    )


def find_gpu() -> str | None:
    """The compute capability of the GPU, found in another process: this one is to hold nothing of it."""
    command = [sys.executable, "-c", PROBE]
    try:
        probe = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except subprocess.SubprocessError as error:
        raise SystemExit(f"torch does not work in {sys.executable}: {error}\n{error.stderr or ''}") from None
    return probe.stdout.strip() or None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    latest = Path(__file__).parent / "results" / "latest"
    parser.add_argument(
        "--output", type=Path, default=latest, metavar="DIR", help="default: benchmarks/results/latest"
    )
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, though there is a GPU")
    arguments = parser.parse_args(argv)
    output = arguments.output.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no stage outlives this

    start = time.monotonic()
    capability = None if arguments.dry_run else find_gpu()
    check = Check(output, capability is None, start)
    check.run([build(capability)])
    with tempfile.TemporaryDirectory() as folder:
        facts = Path(folder, "facts.json")
        check.run([info("cuda" if capability else "cpu", facts)])
        known = json.loads(facts.read_text()) if facts.exists() else {"machine": {}, "backends": []}
    check.machine = known["machine"]
    groups = plan(known["backends"] or ["cuda"], output) if capability else dry_plan(output)
    for group in groups:
        check.run(group)
    check.show()
    return int(check.failed)


if __name__ == "__main__":
    sys.exit(main())
