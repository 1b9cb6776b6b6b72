"""Tests and benchmarks on a GPU, in two calls of under nine minutes each.

`check` builds the extension for this GPU, runs the tests and compute-sanitizer. `bench` runs the benchmarks.
Stages run in order of value, each with a time limit. After a failure the other stages still run.

It uses the Python that runs it and installs nothing. A stage whose program is missing is skipped. Without a
GPU it is a dry run: the same stages on the CPU, where tests/simt emulates the CUDA kernels.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from tools.stages import ROOT, TOOL_PATH, Check, Stage

#: Seconds for all stages together. Of these, for the first import of torch, which reads gigabytes.
TOTAL, PROBE_SECONDS = 530, 240
#: The CPUs of this process, where the system knows them.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
#: Workers for the tests of CUDA, and for those of Triton, which wait for its compiler. They run beside the
#: four sanitizers, and each has a CUDA context of half a gigabyte.
WORKERS, TRITON_WORKERS = max(2, min(8, (CORES - 4) // 2)), max(2, min(12, CORES - 6))
#: More lost contexts than one fault causes. The time limit of the stage ends the rest.
MOST_RESTARTS = 200
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
BENCHMARKS = ("loss", "upsample", "pixel_losses", "step", "sweep")
#: The stages of each call. `bench` begins with the smoke tests too, before anything is timed.
STAGES = {
    "check": ("build", "info", "smoke", "cuda", "triton", *SANITIZERS),
    "bench": ("build", "info", "smoke", *BENCHMARKS),
}
#: The packages that both calls need, and their oldest versions.
REQUIRED = {
    "torch": "2.11",
    "numpy": "1",
    "pytest": "8",
    "pytest-xdist": "3.2",
    "hypothesis": "6",
    "setuptools": "77",
    "ninja": "1",
}
#: Seconds after which a test hangs: its stack is printed, and pytest-xdist replaces the worker.
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
from benchmarks.harness.machine import describe_machine, write_json
from ial_cuda import backends
from tools.gpu_check import versions
print(backends.describe())
machine = {{name: value for name, value in describe_machine().items() if value is not None}}
write_json(Path({file!r}), versions() | machine)
sys.exit(backends.get({device!r}).missing)
"""


class Found(NamedTuple):
    """The versions of torch, and the GPU that it sees."""

    capability: str | None  # of the GPU
    torch: str
    torch_cuda: str | None

    @property
    def device(self) -> str:
        return "cuda" if self.capability else "cpu"


def probe() -> Found:
    """Asks torch in another process, so that this one uses no GPU memory."""
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
    """The packages that are missing or too old, each with the remedy."""
    lines = []
    for package, oldest in REQUIRED.items():
        version = installed(package)
        if version is None or numbers(version) < numbers(oldest):
            has = f"has {package} {version}" if version else f"has no {package}"
            remedy = f"{sys.executable} -m pip install '{package}>={oldest}'"
            lines.append(f"{sys.executable} {has}, expected {oldest} or newer: {remedy}")
    return lines


def numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """The versions of the software that the extension and the tests depend on."""
    packages = ("triton", "numpy", "setuptools", "ninja", "pytest", "pytest-xdist")
    found = {package: installed(package) for package in packages}
    found["gcc"] = first_match(r".+", "c++", "--version")
    found["nvcc"] = first_match(r"(?<=release )[\d.]+", "nvcc", "--version")
    return {name: version for name, version in found.items() if version}


def first_match(pattern: str, *command: str) -> str | None:
    """The first match in the output of a program; None if there is no such program."""
    try:
        done = subprocess.run(
            command, env=os.environ | {"PATH": TOOL_PATH}, capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(pattern, done.stdout + done.stderr)
    return found and found[0]


# ---- stages of both calls --------------------------------------------------------------------------------


def is_built(found: Found, package: Path = ROOT / "ial_cuda") -> bool:
    """Whether the extension fits this Python, torch and GPU, is newer than its sources, and complete."""
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
    """Whether the extension loads and has the kernels. An interrupted build leaves an incomplete file."""
    code = f"import sys; from ial_cuda import backends; sys.exit(backends.get({found.device!r}).missing)"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def read_json(file: Path) -> dict[str, Any]:
    """The content of a file; {} if it is missing or incomplete."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def build(found: Found) -> Stage:
    """Builds the extension for this GPU alone."""
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
    """With -v the log names a test that hangs. Many tests run side by side, so each has one thread.

    Records of torch's loggers would fill the report of a failure.
    """
    command = [sys.executable, "-m", "pytest", "-v", "-rfE", "--tb=short", "--durations=10"]
    command += ["-p", "no:cacheprovider", "-p", "no:logging", "-o", f"faulthandler_timeout={HANGS}"]
    if workers:
        command += ["-n", str(workers), "--dist", "worksteal", "--max-worker-restart", str(MOST_RESTARTS)]
        if numbers(metadata.version("pytest")) >= [9]:
            command += ["-o", "faulthandler_exit_on_timeout=true"]
    env = {"OMP_NUM_THREADS": "1", **more.pop("env", {})}
    return Stage(name, [*command, *arguments], seconds, env=env, **more)


# ---- check: correctness ---------------------------------------------------------------------------------


def sanitized(tool: str, selection: Sequence[str], *, dry: bool = False) -> Stage:
    """The tests of tiles and grids under a tool of compute-sanitizer.

    Calls of torch to the CUDA API may fail without harm and are not reported. torch's caching allocator is
    off: it would hide reads past the end of a tensor. The tests do not fill new memory with NaN: that would
    hide reads of uninitialized memory.
    """
    plain = tests(
        tool,
        ["tests/test_launches.py", *selection],
        300,
        env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "IAL_UNPOISONED": "1"},
    )
    if dry:
        return plain if tool == SANITIZERS[0] else replace(plain, skip="the same as memcheck without a tool")
    prefix = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no"]
    if tool == "memcheck" and first_match("--destroy-on-device-error", "compute-sanitizer", "--help"):
        prefix += ["--destroy-on-device-error", "kernel"]  # the context survives, and later tests run
    return replace(plain, command=[*prefix, *plain.command], programs=["compute-sanitizer"])


#: The CUDA kernels with each way to launch them.
GPU = "--backends=cuda_two_launches,cuda_one_launch"


def smoke(found: Found) -> Stage:
    """A few tests of every kernel."""
    file, few = "tests/test_oracle.py", "number_of_classes and 19"
    if found.capability:
        which = [file, f"{GPU},triton", "-k", few]
        return tests("smoke", which, 120, workers=WORKERS)
    return tests(
        "smoke", [file, "--backends=simt", "-k", f"{few} and float32"], 240
    )  # includes the compilation


def check_plan(found: Found) -> list[list[Stage]]:
    """Stages that take minutes run side by side, so that a slow one takes no time from the others."""
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
            tests("triton", ["--backends=triton"], 400, workers=TRITON_WORKERS),
            *(sanitized(tool, [GPU, "-k", small]) for tool in SANITIZERS),
        ]
    ]


# ---- bench: speed ------------------------------------------------------------------------------


def benchmark(name: str, arguments: Sequence[str], seconds: float, output: Path) -> Stage:
    return Stage(
        name,
        [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--output", str(output)],
        seconds,
        modules=["matplotlib", "rich", "PIL"],
    )


def bench_plan(found: Found, output: Path) -> list[list[Stage]]:
    """One after another: each needs the machine for itself."""
    if found.capability:
        arguments = {
            # After these minutes no case begins, so that the programs draw their pictures in time.
            "loss": ["--rounds", "100", "--seconds", "5", "--minutes", "1.6"],
            "upsample": ["--rounds", "100", "--seconds", "5", "--minutes", "1.2"],
            "pixel_losses": ["--rounds", "50", "--seconds", "3", "--minutes", "0.8"],
            "step": ["--rounds", "50"],
            "sweep": ["--rounds", "30", "--seconds", "1", "--minutes", "1.2"],
        }
        common = ["--device", "cuda"]
    else:
        arguments = {
            "loss": ["--shape", "1x19x32x64", "2x11x24x40"],
            "upsample": ["--size", "64x128"],
            "pixel_losses": ["--size", "64x128"],
            "step": [],
            "sweep": ["--largest", "64"],
        }
        common = ["--device", "cpu", "--rounds", "2", "--no-compile"]
    seconds = {"loss": 150, "upsample": 110, "pixel_losses": 70, "step": 60, "sweep": 110}
    return [[benchmark(name, [*common, *arguments[name]], seconds[name], output)] for name in BENCHMARKS]


def plan(what: str, found: Found, output: Path) -> list[list[Stage]]:
    """The stages of a call. Those of a group run side by side."""
    rest = check_plan(found) if what == "check" else bench_plan(found, output)
    return [[build(found)], [info(found, output)], [smoke(found)], *rest]


# ---- results --------------------------------------------------------------------------------------------


class Report(Check):
    """The summary of `Check` with the machine, and the figures of each case of the benchmarks."""

    dry_run = True

    def summary(self) -> dict[str, Any]:
        products = self.products()
        machine, *results = (
            read_json(self.output / f"{name}.json") if f"{name}.json" in products else {}
            for name in ("machine", *BENCHMARKS)
        )
        return {
            "dry_run": self.dry_run,
            **super().summary(),
            "machine": machine,
            "cases": [summarize(case) for result in results for case in result.get("cases", [])],
        }

    def show(self) -> None:
        super().show()
        summary = self.summary()
        for case in summary["cases"]:
            print(f"\n{case['input']}, {case['labels']} labels")
            for name in ("gpu_before", "gpu_after"):
                if case[name]:
                    print(f"  {name}: {', '.join(f'{field} {value}' for field, value in case[name].items())}")
            print(*(f"  {line}" for line in describe(case)), sep="\n")
        print()
        if summary["dry_run"]:
            print("DRY RUN on the CPU: no GPU was used, and no figure is of a GPU.")
        print(*(f"{name} {value}" for name, value in summary["machine"].items() if value), sep=", ")
        print(f"in {summary['seconds']:.0f} s; all results: {self.output / self.name}.tar.gz")


#: The figures of our rows: field, and its text.
FIGURES = {
    "median_ms": "{:.3f} ms",
    "graph_ms": "graph {:.3f} ms",
    "copy_percent": "{:.0f} % of the copy's speed",
    "extra_mib": "extra {:.1f} MiB",
}
FLOOR = "memory floor"  # a row for the memory traffic alone, which is no peer


def summarize(case: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of our backends, the fastest peer, and the failures of a case."""
    rows = case.get("providers", [])
    ours = [row for row in rows if row["name"].startswith("ial_cuda")]
    peers = [row for row in rows if row.get("median_ms") and row not in ours and row["name"] != FLOOR]
    fastest = min(peers, key=lambda row: row["median_ms"], default=None)
    return {
        **{name: case.get(name) for name in ("input", "labels", "gpu_before", "gpu_after")},
        "ours": [{name: row.get(name) for name in ("name", *FIGURES)} for row in ours],
        "fastest_peer": fastest and {name: fastest.get(name) for name in ("name", "median_ms", "ratio")},
        "failed": {row["name"]: row["failed"] for row in rows if row.get("failed")},
    }


def describe(case: Mapping[str, Any]) -> Iterator[str]:
    """Lines with the figures of a case. All ratios are to the first of ours."""
    for row in case["ours"]:
        figures = [text.format(row[name]) for name, text in FIGURES.items() if row[name] is not None]
        yield f"{row['name']}: {', '.join(figures) or 'not timed'}"
    if peer := case["fastest_peer"]:
        ratio = "" if peer["ratio"] is None else f", {peer['ratio']:.2f} times {case['ours'][0]['name']}"
        yield f"fastest peer: {peer['name']}: {peer['median_ms']:.3f} ms{ratio}"
    for name, reason in case["failed"].items():
        yield f"FAILED: {name}: {reason}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__)
    parser.add_argument("what", nargs="?", choices=STAGES, default="check", help="default: check")
    latest = ROOT / "benchmarks" / "results" / "latest"
    parser.add_argument(
        "--output", type=Path, default=latest, metavar="DIR", help="default: benchmarks/results/latest"
    )
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="only these; default: all")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, even if there is a GPU")
    arguments = parser.parse_args(argv)
    known = STAGES[arguments.what]
    chosen = arguments.stages or known
    for name in chosen:
        if name not in known:
            parser.error(f"--stages has {name!r}, expected some of {', '.join(known)}")
    if lines := missing():
        raise SystemExit("\n".join(lines))
    # Background jobs of a shell ignore SIGINT, and the stages would inherit that.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))

    output = arguments.output.resolve()
    report = Report(output, f"gpu-{arguments.what}", total=TOTAL)
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
