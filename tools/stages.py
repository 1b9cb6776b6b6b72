"""Runs commands as stages, each with a time limit. The results so far are written after each stage."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Seconds for an interrupted stage to print its failures. Then it is killed.
GRACE = 10
#: Seconds between two writes of the results while a stage runs.
WRITE_EVERY = 20
#: The tools of the CUDA toolkit, which is not always on PATH.
TOOL_PATH = os.pathsep.join(
    [
        os.environ.get("PATH", ""),
        f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin",
        "/usr/local/cuda/bin",
    ]
)
#: Compiled kernels stay from one call to the next, also without a home folder.
CACHES = {
    "TRITON_CACHE_DIR": str(ROOT / "build" / "triton"),
    "TORCHINDUCTOR_CACHE_DIR": str(ROOT / "build" / "inductor"),
}
#: How much of the log of a stage goes to log.txt, to the summary and to the screen.
LOG_CHARACTERS, TAIL_CHARACTERS, SHOWN_LINES = 1 << 20, 48 << 10, 30
#: The files that stages write to the output folder.
PRODUCTS = ("*.json", "*.png")
#: The line of pytest for a test that passed, with and without pytest-xdist.
PASSED = re.compile(r"(\[gw\d+\] \[ *\d+%\]|\S+::.*) (PASSED|SKIPPED)\b")
#: The line of pytest-xdist for a test that ended. It ends with the line printed when the test began.
REPORTED = re.compile(r"\[gw\d+\] \[ *\d+%\] [A-Z]+ (.*)")
#: The last lines of pytest and of compute-sanitizer. Warnings of a worker may follow them.
TOTALS = (r"^=+ (.* in [\d.]+s\b.*?) =+$", r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$")


@dataclass(frozen=True)
class Stage:
    """A command, and the seconds after which it is interrupted."""

    name: str
    command: Sequence[str]
    seconds: float
    env: Mapping[str, str] = field(default_factory=dict)
    modules: Sequence[str] = ()  # that it needs, or it is skipped
    programs: Sequence[str] = ()
    skip: str | None = None  # the reason to skip it

    def why_skipped(self) -> str | None:
        missing = [name for name in self.modules if importlib.util.find_spec(name) is None]
        missing += [name for name in self.programs if shutil.which(name, path=TOOL_PATH) is None]
        return f"no {', '.join(missing)} here" if missing else self.skip


@dataclass(frozen=True)
class Outcome:
    name: str
    result: str  # ok, failed, timed out, cut off, skipped or running
    why: str = ""
    seconds: float = 0.0
    tail: str = ""  # of its log, where it is not ok


class Running:
    """The process of a stage, in its own process group: a signal to the group also reaches its children."""

    def __init__(self, stage: Stage, log: Path, seconds: float) -> None:
        self.stage, self.log, self.seconds = stage, log, seconds
        self.start = time.monotonic()
        self.interrupted: float | None = None
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                stage.command,
                cwd=ROOT,
                env={
                    **CACHES,
                    **os.environ,
                    "PATH": TOOL_PATH,
                    "PYTHONUNBUFFERED": "1",
                    "COLUMNS": "160",
                    **stage.env,
                },
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def signal(self, number: int) -> bool:
        """Sends a signal to the group. Returns False if the group has no process left."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return False
        return True

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()

    def interrupt(self) -> None:
        self.interrupted = time.monotonic()
        self.signal(signal.SIGINT)

    def outcome(self, result: str = "timed out") -> Outcome | None:
        """None while the stage runs. An interrupted stage runs until its whole group has ended.

        Args:
            result: the result of a stage that was interrupted.
        """
        code = self.process.poll()
        now = time.monotonic()
        if self.interrupted is None and code is None:
            if now - self.start >= self.seconds:
                self.interrupt()
            return None
        left = self.interrupted is not None and self.signal(0)
        if left and now - self.interrupted < GRACE:
            return None
        taken = round(now - self.start, 1)
        self.kill()
        log = self.log.read_text(errors="replace")
        total = sum_up(log)
        if self.interrupted is not None:
            after = self.interrupted - self.start
            why = f"after {after:.0f} s{', killed' if left else ''}: {total}"
            return Outcome(self.stage.name, result, why, taken, tail(log))
        if code:
            why = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
            return Outcome(self.stage.name, "failed", f"{why}: {total}", taken, tail(log))
        # A stage whose tests were all skipped is not ok.
        result = "skipped" if "skipped" in total and "passed" not in total else "ok"
        return Outcome(self.stage.name, result, total, taken)


def print_line(text: str) -> None:
    """Prints; the stages continue if the terminal is gone."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def sum_up(log: str) -> str:
    """The numbers of tests that passed and failed, else the last line of the log."""
    totals = [found[-1] for pattern in TOTALS if (found := re.findall(pattern, log, re.M))]
    lines = (line.strip() for line in reversed(log.splitlines()))
    return "; ".join(totals) or next((line[:80] for line in lines if line), "")


def tail(log: str) -> str:
    """The log without the tests that passed: the failures, and the tests that did not end."""
    lines = log.splitlines()
    reported = {found[1] for line in lines if (found := REPORTED.match(line))}
    return shortened(
        "\n".join(line[:300] for line in lines if line not in reported and not PASSED.match(line)),
        TAIL_CHARACTERS,
    )


def shortened(text: str, most: int) -> str:
    """The text; of a long one, the beginning and the end."""
    return text if len(text) <= most else f"{text[: most // 2]}\n[...]\n{text[-most // 2 :]}"


class Check:
    """Runs stages. Writes the results so far whenever a stage ends.

    Args:
        output: the folder for `summary.json`, `log.txt`, `logs/` (the whole log of each stage) and an archive
            of all of them and of the files that the stages write there (`PRODUCTS`).
        name: the name of the archive.
        total: seconds for all stages together, from now on.
    """

    def __init__(self, output: Path, name: str, *, total: float) -> None:
        self.output, self.name = output, name
        self.start = time.monotonic()
        self.deadline = self.start + total
        self.outcomes: dict[str, Outcome] = {}
        self.written = self.start
        self.logs = output / "logs"
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True)
        for file in ("summary.json", "log.txt", f"{name}.tar.gz"):
            (output / file).unlink(missing_ok=True)
        self.old = self.times()

    def times(self) -> dict[str, int]:
        """When each file that matches `PRODUCTS` was written."""
        files = {file for pattern in PRODUCTS for file in self.output.glob(pattern)}
        return {file.name: file.stat().st_mtime_ns for file in files if file.name != "summary.json"}

    def products(self) -> list[str]:
        """The files that the stages have written so far. Older files stay, but do not count."""
        return sorted(name for name, time_ns in self.times().items() if self.old.get(name) != time_ns)

    def run(self, stages: Sequence[Stage]) -> None:
        """Runs stages side by side, within their limits and the deadline."""
        running: list[Running] = []
        self.outcomes |= {stage.name: Outcome(stage.name, "running") for stage in stages}
        try:
            for stage in stages:
                left = self.deadline - GRACE - time.monotonic()
                why = stage.why_skipped() or (None if left >= 1 else "no time left")
                if why:
                    self.record(Outcome(stage.name, "skipped", why))
                    continue
                print_line(f"{stage.name} ...")
                try:
                    running.append(Running(stage, self.log_of(stage.name), min(stage.seconds, left)))
                except OSError as error:
                    self.record(Outcome(stage.name, "failed", str(error)))
            self.wait(running, "timed out")
        except BaseException:  # such as SystemExit by a signal
            for one in running:
                one.interrupt()
            self.wait(running, "cut off")
            raise
        finally:
            for one in running:
                one.kill()

    def wait(self, running: list[Running], interrupted: str) -> None:
        """Waits until all have ended. `interrupted`: the result of a stage that was interrupted."""
        while running:
            time.sleep(0.05)
            for one in list(running):
                outcome = one.outcome(interrupted)
                if outcome:
                    running.remove(one)
                    self.record(outcome)
                    print_line(f"{outcome.name}: {outcome.result}, {outcome.seconds:.0f} s")
            if time.monotonic() - self.written > WRITE_EVERY:
                self.write()

    def log_of(self, stage: str) -> Path:
        return self.logs / f"{stage}.txt"

    def record(self, outcome: Outcome) -> None:
        self.outcomes[outcome.name] = outcome
        log = self.log_of(outcome.name)
        with (self.output / "log.txt").open("a") as stream:
            stream.write(f"\n===== {outcome.name}: {outcome.result} {outcome.why}\n")
            if log.exists():
                stream.write(shortened(log.read_text(errors="replace"), LOG_CHARACTERS))
        self.write()

    def write(self) -> None:
        """Replaces the summary and the archive in one step each: they are complete at any time."""
        self.written = time.monotonic()
        new = self.output / "summary.new"
        new.write_text(json.dumps(self.summary(), indent=2) + "\n")
        new.replace(self.output / "summary.json")
        new = self.output / "archive.new"
        with tarfile.open(new, "w:gz") as archive:
            logs = sorted(f"logs/{log.name}" for log in self.logs.iterdir())
            for name in ("summary.json", "log.txt", *logs, *self.products()):
                with contextlib.suppress(FileNotFoundError):
                    content = (
                        self.output / name
                    ).read_bytes()  # all at once: a stage may be writing the file
                    member = tarfile.TarInfo(f"{self.name}/{name}")
                    member.size, member.mtime = len(content), time.time()
                    archive.addfile(member, io.BytesIO(content))
        new.replace(self.output / f"{self.name}.tar.gz")

    @property
    def failed(self) -> bool:
        failures = ("failed", "timed out", "cut off")
        return any(outcome.result in failures for outcome in self.outcomes.values())

    def summary(self) -> dict[str, Any]:
        return {
            "failed": self.failed,
            "seconds": round(time.monotonic() - self.start, 1),
            "stages": [asdict(outcome) for outcome in self.outcomes.values()],
        }

    def show(self) -> None:
        """Prints the failures, then a table of the stages."""
        for outcome in self.outcomes.values():
            if outcome.tail:
                print(f"\n----- {outcome.name} {outcome.result}, {outcome.why}:")
                print(*outcome.tail.splitlines()[-SHOWN_LINES:], sep="\n")
        print(f"\n{'stage':<11} {'result':<10} {'s':>5}")
        for outcome in self.outcomes.values():
            print(f"{outcome.name:<11} {outcome.result:<10} {outcome.seconds:>5.0f}  {outcome.why}")
