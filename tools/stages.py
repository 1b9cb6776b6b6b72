"""Runs commands as stages, each within a bound. Results are written again after each stage."""

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
#: Seconds that an interrupted stage has to print its failures. Then it is killed.
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
#: Compiled kernels are kept from one call to the next, and need no home folder.
CACHES = {
    "TRITON_CACHE_DIR": str(ROOT / "build" / "triton"),
    "TORCHINDUCTOR_CACHE_DIR": str(ROOT / "build" / "inductor"),
}
#: How much of a stage's log goes to log.txt, to the summary and to the screen.
LOG_CHARACTERS, TAIL_CHARACTERS, SHOWN_LINES = 1 << 20, 48 << 10, 30
#: pytest's line for a test that passed, with pytest-xdist and without.
PASSED = re.compile(r"(\[gw\d+\] \[ *\d+%\]|\S+::.*) (PASSED|SKIPPED)\b")
#: With pytest-xdist this line ends with the line that was printed when the test began.
REPORTED = re.compile(r"\[gw\d+\] \[ *\d+%\] [A-Z]+ (.*)")
#: The sums of pytest and of compute-sanitizer. Warnings of a worker that ends may come after them.
SUMS = (r"^=+ (.* in [\d.]+s\b.*?) =+$", r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)$")


@dataclass(frozen=True)
class Stage:
    """A command, and the seconds after which it is interrupted."""

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
    result: str  # ok, failed, timed out, cut off, skipped or running
    why: str = ""
    seconds: float = 0.0
    tail: str = ""  # of its log, where it is not ok


class Running:
    """A stage's process, in a group of its own: a signal to the group reaches its children too."""

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
        """Sends a signal to the group. False if no process of it is left."""
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
        """None while the stage runs. After an interrupt it runs until the whole group has ended.

        Args:
            result: of a stage that was interrupted.
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
        said = sum_up(log)
        if self.interrupted is not None:
            after = self.interrupted - self.start
            why = f"after {after:.0f} s{', killed' if left else ''}: {said}"
            return Outcome(self.stage.name, result, why, taken, tail(log))
        if code:
            why = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
            return Outcome(self.stage.name, "failed", f"{why}: {said}", taken, tail(log))
        # Tests that were all skipped have shown nothing.
        result = "skipped" if "skipped" in said and "passed" not in said else "ok"
        return Outcome(self.stage.name, result, said, taken)


def say(text: str) -> None:
    """Nobody may be listening any more, and the stages go on."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def sum_up(log: str) -> str:
    """How many tests passed and failed, else the log's last line."""
    sums = [found[-1] for pattern in SUMS if (found := re.findall(pattern, log, re.M))]
    lines = (line.strip() for line in reversed(log.splitlines()))
    return "; ".join(sums) or next((line[:80] for line in lines if line), "")


def tail(log: str) -> str:
    """The log without the tests that passed. It has all failures, and the tests that did not end."""
    lines = log.splitlines()
    reported = {found[1] for line in lines if (found := REPORTED.match(line))}
    return shortened(
        "\n".join(line[:300] for line in lines if line not in reported and not PASSED.match(line)),
        TAIL_CHARACTERS,
    )


def shortened(text: str, most: int) -> str:
    """The beginning and the end of a long text."""
    return text if len(text) <= most else f"{text[: most // 2]}\n[...]\n{text[-most // 2 :]}"


class Check:
    """Runs stages and writes the results so far whenever one ends.

    Args:
        output: the folder for `summary.json`, `log.txt`, `logs/` (the whole log of each stage), the products
            and an archive of all of them.
        name: of the archive.
        products: files that the stages write to `output`. Old ones are removed.
        total: seconds for all stages together, from now on.
    """

    def __init__(self, output: Path, name: str, products: Sequence[str] = (), *, total: float) -> None:
        self.output, self.name, self.products = output, name, products
        self.start = time.monotonic()
        self.deadline = self.start + total
        self.outcomes: dict[str, Outcome] = {}
        self.written = self.start
        self.logs = output / "logs"
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True)
        for file in ("summary.json", "log.txt", f"{name}.tar.gz", *products):
            (output / file).unlink(missing_ok=True)

    def run(self, stages: Sequence[Stage]) -> None:
        """Side by side, each for as long as its bound and the deadline allow."""
        running: list[Running] = []
        self.outcomes |= {stage.name: Outcome(stage.name, "running") for stage in stages}
        try:
            for stage in stages:
                left = self.deadline - GRACE - time.monotonic()
                why = stage.why_not() or (None if left >= 1 else "no time left")
                if why:
                    self.record(Outcome(stage.name, "skipped", why))
                    continue
                say(f"{stage.name} ...")
                try:
                    running.append(Running(stage, self.log_of(stage.name), min(stage.seconds, left)))
                except OSError as error:
                    self.record(Outcome(stage.name, "failed", str(error)))
            self.wait(running, "timed out")
        except BaseException:  # a signal ends this program
            for one in running:
                one.interrupt()
            self.wait(running, "cut off")
            raise
        finally:
            for one in running:
                one.kill()

    def wait(self, running: list[Running], interrupted: str) -> None:
        """Until all have ended. `interrupted` is the result of those that do not end by themselves."""
        while running:
            time.sleep(0.05)
            for one in list(running):
                outcome = one.outcome(interrupted)
                if outcome:
                    running.remove(one)
                    self.record(outcome)
                    say(f"{outcome.name}: {outcome.result}, {outcome.seconds:.0f} s")
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
        """Replaces summary and archive in one step each, so that they are complete at any time."""
        self.written = time.monotonic()
        new = self.output / "summary.new"
        new.write_text(json.dumps(self.summary(), indent=2) + "\n")
        new.replace(self.output / "summary.json")
        new = self.output / "archive.new"
        with tarfile.open(new, "w:gz") as archive:
            logs = sorted(f"logs/{log.name}" for log in self.logs.iterdir())
            for name in ("summary.json", "log.txt", *logs, *self.products):
                with contextlib.suppress(FileNotFoundError):
                    content = (self.output / name).read_bytes()  # at once: a stage may be writing it
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
