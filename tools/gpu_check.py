"""Tests and benchmarks on a GPU, in two calls of under nine minutes each.

`check` builds the extension for this GPU, tests it and runs compute-sanitizer. `bench` runs the benchmarks.
Stages run in order of value, each within a bound. A stage that fails stops no other.

It uses the Python that runs it and installs nothing. A stage that lacks a program is skipped. Without a GPU
it is a dry run: the same stages on the CPU, where tests/simt runs the CUDA kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from tools.stages import ROOT, TOOL_PATH, Check, Stage

#: Seconds for all stages together. Of them, for the first import of torch, which reads gigabytes.
TOTAL, PROBE_SECONDS = 530, 240
#: Processors of this process, where the system can tell.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
#: For the tests of CUDA and for those of Triton, which run beside the four sanitizers. Each has a context on
#: the GPU, of half a gigabyte.
WORKERS = max(2, min(8, (CORES - 4) // 2))
#: More lost contexts than one fault leads to. The bound of the stage ends the rest.
MOST_RESTARTS = 200
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
BENCHMARKS = ("loss", "upsample", "step", "sweep")
#: The stages of each call. `bench` has the smoke tests too: they name what is broken before it is timed.
STAGES = {
    "check": ("build", "info", "smoke", "cuda", "triton", *SANITIZERS),
    "bench": ("build", "info", "smoke", *BENCHMARKS),
}
PRODUCTS = {
    "check": ("machine.json",),
    "bench": (
        "machine.json",
        *(f"{name}.{kind}" for name in BENCHMARKS for kind in ("json", "csv", "png") if name != "step"),
        "step.json",
    ),
}
#: What both calls need, and the oldest version of it.
REQUIRED = {
    "torch": "2.11",
    "numpy": "1",
    "pytest": "8",
    "pytest-xdist": "3.2",
    "hypothesis": "6",
    "setuptools": "77",
    "ninja": "1",
}
#: Seconds after which a test counts as hung: its stack is printed, and a worker of pytest-xdist is replaced.
HANGS = 150

PROBE = """
import json, torch
there = torch.cuda.is_available()
capability = "%d.%d" % torch.cuda.get_device_capability() if there else None
print(json.dumps([capability, torch.__version__, torch.version.cuda]))
"""
INFO = """
import sys
from pathlib import Path
from benchmarks import common
from tools import gpu_check
from ial_cuda import backends
print(backends.describe())
machine = {{name: value for name, value in common.describe_machine().items() if value is not None}}
common.write_json(Path({file!r}), gpu_check.versions() | machine)
sys.exit(backends.get({device!r}).missing)
"""


class Found(NamedTuple):
    """What torch says of itself and of the GPU."""

    capability: str | None  # of the GPU
    torch: str
    torch_cuda: str | None

    @property
    def device(self) -> str:
        return "cuda" if self.capability else "cpu"


def probe() -> Found:
    """Asks torch in another process, so that this one holds nothing of the GPU."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, timeout=PROBE_SECONDS
        )
    except subprocess.SubprocessError as error:
        raise SystemExit(f"torch does not work in {sys.executable}: {error}\n{error.stderr or ''}") from None
    found = Found(*json.loads(done.stdout.splitlines()[-1]))
    gpu = None if found.capability else first_match(r"^GPU 0:.*", "nvidia-smi", "-L")
    if gpu and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise SystemExit(
            f"torch {found.torch} in {sys.executable} does not see {gpu}:\n{done.stderr}"
            "For a dry run on the CPU: --dry-run"
        )
    return found


def missing() -> list[str]:
    """What this Python lacks, each with the remedy."""
    lacks = []
    for package, oldest in REQUIRED.items():
        version = installed(package)
        if version is None or numbers(version) < numbers(oldest):
            has = f"has {package} {version}" if version else f"has no {package}"
            remedy = f"{sys.executable} -m pip install '{package}>={oldest}'"
            lacks.append(f"{sys.executable} {has}, expected {oldest} or newer: {remedy}")
    return lacks


def numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Of the software that the extension and the tests depend on."""
    packages = ("triton", "numpy", "setuptools", "ninja", "pytest", "pytest-xdist")
    found = {package: installed(package) for package in packages}
    found["gcc"] = first_match(r".+", "c++", "--version")
    found["nvcc"] = first_match(r"(?<=release )[\d.]+", "nvcc", "--version")
    return {name: version for name, version in found.items() if version}


def first_match(pattern: str, *command: str) -> str | None:
    """Of what a program prints, where there is such a program."""
    try:
        done = subprocess.run(
            command, env=os.environ | {"PATH": TOOL_PATH}, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(pattern, done.stdout + done.stderr)
    return found and found[0]


# ---- the stages of both calls ---------------------------------------------------------------------------


def is_built(found: Found, package: Path = ROOT / "ial_cuda") -> bool:
    """Whether the extension there is for this Python, torch and GPU, newer than its sources, and whole."""
    extension = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    build = read_json(package / "_build.json")
    if not extension.exists() or (build.get("torch"), build.get("torch_cuda")) != found[1:]:
        return False
    archs = {arch.removesuffix("+PTX") for arch in build["arch_list"]}
    sources = [ROOT / "setup.py", *(ROOT / "csrc").rglob("*.*")]
    return (
        (found.capability is None or found.capability in archs)
        and extension.stat().st_mtime > max(file.stat().st_mtime for file in sources)
        and loads(found)
    )


def loads(found: Found) -> bool:
    """Whether the extension imports and has the kernels. A build that was cut off leaves half a file."""
    code = f"import sys; from ial_cuda import backends; sys.exit(backends.get({found.device!r}).missing)"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def read_json(file: Path) -> dict[str, Any]:
    """What a file holds, {} if it is not there or not whole."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def build(found: Found) -> Stage:
    """For this GPU alone."""
    return Stage(
        "build",
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        150,
        env={
            "IAL_CUDA_FORCE_CPU": "0" if found.capability else "1",
            "IAL_CUDA_PURE_PYTHON": "0",
            "MAX_JOBS": str(CORES),
            "TORCH_CUDA_ARCH_LIST": found.capability or "",
        },
        skip="the extension is newer than its sources" if is_built(found) else None,
    )


def info(found: Found, output: Path) -> Stage:
    code = INFO.format(device=found.device, file=str(output / "machine.json"))
    return Stage("info", [sys.executable, "-c", code], 60)


def tests(name: str, arguments: Sequence[str], seconds: float, *, workers: int = 0, **more: Any) -> Stage:
    """With -v the log names the test that hangs. Many tests run side by side: each has one thread."""
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "--durations=10"]
    command += ["-p", "no:cacheprovider", "-o", f"faulthandler_timeout={HANGS}"]
    if workers:
        command += ["-n", str(workers), "--dist", "worksteal", "--max-worker-restart", str(MOST_RESTARTS)]
        if numbers(metadata.version("pytest")) >= [9]:
            command += ["-o", "faulthandler_exit_on_timeout=true"]
    env = {"OMP_NUM_THREADS": "1", **more.pop("env", {})}
    return Stage(name, [*command, *arguments], seconds, env=env, **more)


# ---- is it right? ---------------------------------------------------------------------------------------


def sanitized(tool: str, selection: Sequence[str], *, dry: bool = False) -> Stage:
    """The tests of tiles and grids, under a tool of compute-sanitizer.

    torch makes calls to CUDA that fail, which is no error of ours. Its allocator would hide from the tool
    where a tensor ends, and the tests' NaN in fresh memory what is read before it is written.
    """
    plain = tests(
        tool,
        ["tests/test_launches.py", *selection],
        300,
        env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "IAL_UNPOISONED": "1"},
    )
    if dry:
        return plain if tool == SANITIZERS[0] else replace(plain, skip="without a tool it is memcheck's")
    prefix = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no"]
    if tool == "memcheck" and first_match("--destroy-on-device-error", "compute-sanitizer", "--help"):
        prefix += ["--destroy-on-device-error", "kernel"]  # the context lives, and the tests after it run
    return replace(plain, command=[*prefix, *plain.command], programs=["compute-sanitizer"])


#: The CUDA kernels in both ways to launch them.
GPU = "--backends=cuda_two_launches,cuda_one_launch"


def smoke(found: Found) -> Stage:
    """A few tests of every kernel."""
    file, few = "tests/test_oracle.py", "number_of_classes and 19"
    if found.capability:
        which = [file, f"{GPU},triton", "-k", few]
        return tests("smoke", which, 120, workers=WORKERS)
    return tests("smoke", [file, "--backends=simt", "-k", f"{few} and float32"], 240)  # compiles them first


def check_plan(found: Found) -> list[list[Stage]]:
    """What takes minutes runs side by side, so that a slow stage takes no time from the others."""
    if not found.capability:
        few = ["--backends=simt", "-k", "19 and float32 and every_tile"]
        interpreted = ["tests/test_triton.py", "--backends=triton", "-k", "registers_for"]
        return [
            [tests("cuda", ["tests/test_launches.py", *few], 300, workers=2)],
            [tests("triton", interpreted, 300), *(sanitized(tool, few, dry=True) for tool in SANITIZERS)],
        ]
    small = "(every_tile or has_room or images_than_fit or one_launch) and not 1000"
    return [
        [
            tests("cuda", [GPU], 400, workers=WORKERS),
            tests("triton", ["--backends=triton"], 400, workers=WORKERS),
            *(sanitized(tool, [GPU, "-k", small]) for tool in SANITIZERS),
        ]
    ]


# ---- how fast is it? ------------------------------------------------------------------------------------


def benchmark(name: str, arguments: Sequence[str], seconds: float, output: Path) -> Stage:
    return Stage(
        name,
        [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--output", str(output)],
        seconds,
        modules=["matplotlib", "rich", "PIL"],
    )


def bench_plan(found: Found, output: Path) -> list[list[Stage]]:
    """One after another: each wants the machine for itself."""
    if found.capability:
        arguments = {
            "loss": ["--rounds", "100"],
            "upsample": ["--rounds", "100"],
            "step": ["--rounds", "50"],
            # what it has not begun after a minute and a half it leaves, and says so
            "sweep": ["--rounds", "30", "--seconds", "1", "--minutes", "1.5"],
        }
        common = ["--device", "cuda"]
    else:
        arguments = {
            "loss": ["--shape", "1x19x32x64", "2x11x24x40"],
            "upsample": ["--size", "64x128"],
            "step": [],
            "sweep": ["--largest", "64"],
        }
        common = ["--device", "cpu", "--rounds", "2", "--no-compile"]
    seconds = {"loss": 170, "upsample": 130, "step": 60, "sweep": 130}
    return [[benchmark(name, [*common, *arguments[name]], seconds[name], output)] for name in BENCHMARKS]


def plan(what: str, found: Found, output: Path) -> list[list[Stage]]:
    """The stages of a call. Those of a group run side by side."""
    rest = check_plan(found) if what == "check" else bench_plan(found, output)
    return [[build(found)], [info(found, output)], [smoke(found)], *rest]


# ---- what comes out -------------------------------------------------------------------------------------


class Report(Check):
    """With the machine, and the cases of the benchmarks with their goals."""

    dry_run = True

    def summary(self) -> dict[str, Any]:
        files = [f"{name}.json" for name in BENCHMARKS if f"{name}.json" in self.products]
        kept = ("input", "labels", "gpu_before", "gpu_after", "goals")
        return {
            "dry_run": self.dry_run,
            **super().summary(),
            "machine": read_json(self.output / "machine.json"),
            "cases": [
                {name: case[name] for name in kept}
                for file in files
                for case in read_json(self.output / file).get("cases", [])
            ],
        }

    def show(self) -> None:
        super().show()
        summary = self.summary()
        for case in summary["cases"]:
            print(f"\n{case['input']}, {case['labels']} labels")
            for name in ("gpu_before", "gpu_after"):
                state = ", ".join(f"{field} {value}" for field, value in case[name].items())
                print(f"  {name}: {state}" if state else f"  {name}: not a GPU")
            for goal in case["goals"]:
                print(f"  {describe_goal(goal)}")
        print()
        if summary["dry_run"]:
            print("DRY RUN on the CPU: no CUDA device was used, and no figure is a GPU's.")
        print(*(f"{name} {value}" for name, value in summary["machine"].items() if value), sep=", ")
        print(f"in {summary['seconds']:.0f} s; all of it: {self.output / self.name}.tar.gz")


def describe_goal(goal: Mapping[str, Any]) -> str:
    reached = {None: "not measured", True: "yes", False: "NO"}[goal["reached"]]
    figures = [f"{goal[name]:.2f}" if goal[name] is not None else "-" for name in ("measured", "as_graph")]
    bound = f"{'>=' if goal['at_least'] else '<='} {goal['bound']:g}"
    return f"{reached:<12} {goal['what']:<58} {bound:<8} {figures[0]:>8}  (as a graph {figures[1]})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__)
    parser.add_argument("what", nargs="?", choices=STAGES, default="check", help="default: check")
    latest = ROOT / "benchmarks" / "results" / "latest"
    parser.add_argument(
        "--output", type=Path, default=latest, metavar="DIR", help="default: benchmarks/results/latest"
    )
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="only these; default: all")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, though there is a GPU")
    arguments = parser.parse_args(argv)
    known = STAGES[arguments.what]
    chosen = arguments.stages or known
    for name in chosen:
        if name not in known:
            parser.error(f"--stages has {name!r}, expected some of {', '.join(known)}")
    if lacks := missing():
        raise SystemExit("\n".join(lacks))
    # A shell starts what runs in its background with SIGINT ignored, and stages would inherit that.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))

    output = arguments.output.resolve()
    report = Report(output, f"gpu-{arguments.what}", PRODUCTS[arguments.what], total=TOTAL)
    if arguments.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    found = probe()
    report.dry_run = found.capability is None
    for group in plan(arguments.what, found, output):
        report.run([stage for stage in group if stage.name in chosen])
    report.show()
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main())
