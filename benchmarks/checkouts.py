"""Runs a benchmark of today against the packages of two commits, in alternation."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
TAIL_LINES = 15
# Whatever ial_cuda is installed, that of the folder must be the one that is measured.
LAUNCH = """
import runpy, sys
from pathlib import Path
import ial_cuda
expected, program = Path(sys.argv.pop(1)), sys.argv.pop(1)
found = Path(ial_cuda.__file__).resolve().parent
if found != expected:
    sys.exit(f"ial_cuda is imported from {found}, expected {expected}")
runpy.run_module(program, run_name="__main__", alter_sys=True)
"""


class CommandFailed(RuntimeError):
    """A command that ended in an error, and its last lines."""


def _run(what: str, command: Sequence[str | Path], folder: Path, **environment: str) -> str:
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        printed, _ = process.communicate()
    except BaseException:  # interrupted: compilers that go on would write to a folder that is being removed
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if process.returncode:
        tail = "\n".join(printed.splitlines()[-TAIL_LINES:])
        raise CommandFailed(f"{what} (exit code {process.returncode}):\n{tail}")
    return printed


def find_commit(ref: str) -> str:
    """The commit's full name."""
    try:
        return _run("", ["git", "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}"], ROOT).strip()
    except CommandFailed:
        raise ValueError(f"{ref!r} is no commit of this repository, expected one, or a file *.json") from None


def build_extension(tree: Path) -> None:
    """Builds a checkout's extension in place, for the GPU where there is one."""
    only_cpu = {} if torch.cuda.is_available() else {"IAL_CUDA_FORCE_CPU": "1"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    # The setup.py of an older commit goes on without the extension unless it is required.
    required = {"IAL_CUDA_PURE_PYTHON": "0", "IAL_CUDA_REQUIRE_EXT": "1"}
    _run("the extension does not build", command, tree, **required, **only_cpu)


@contextlib.contextmanager
def checked_out(commit: str, build: Callable[[Path], None]) -> Iterator[Path]:
    """A built checkout, which is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="versus-") as folder:
        tree = Path(folder).resolve() / "tree"
        _run(f"{commit} cannot be checked out", ["git", "worktree", "add", "--detach", tree, commit], ROOT)
        try:
            build(tree)
            yield tree
        finally:
            _run(f"{tree} stays", ["git", "worktree", "remove", "--force", tree], ROOT)


@dataclass(frozen=True)
class Program:
    """A benchmark of today."""

    name: str
    arguments: Sequence[str]

    def run(self, tree: Path) -> dict[str, Any]:
        """Its results with the package of a checkout."""
        with tempfile.TemporaryDirectory(prefix="versus-") as folder:
            Path(folder, "ial_cuda").symlink_to(tree / "ial_cuda")
            Path(folder, "benchmarks").symlink_to(ROOT / "benchmarks")
            output = Path(folder, "output")
            file = output / f"{self.name}.json"
            command = [sys.executable, "-c", LAUNCH, tree / "ial_cuda", f"benchmarks.{self.name}"]
            what = f"python -m benchmarks.{self.name} fails"
            try:
                _run(what, [*command, *self.arguments, "--output", output], Path(folder))
            except CommandFailed as error:
                wrong = refused(json.loads(file.read_text())) if file.exists() else []
                raise CommandFailed("\n".join([f"{what}:", *wrong]) if wrong else str(error)) from None
            return json.loads(file.read_text())


def refused(result: dict[str, Any]) -> list[str]:
    """What a result has no times of, since it is wrong."""
    return [
        f"{case['input']}: {row['name']} {row['refused']}"
        for case in result["cases"]
        for row in case["providers"]
        if row["refused"]
    ]


def run_pairs(
    old: str,
    new: str,
    program: Program,
    pairs: int,
    *,
    build: Callable[[Path], None] = build_extension,
    on_step: Callable[[str], None],
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The results of old and new, in an order that is turned round from pair to pair: ABBA.

    Args:
        old: a commit's full name.
        new: the same; both may be one.
        build: makes the extension of a checkout.
        on_step: told what begins.

    Raises:
        CommandFailed: the first time that anything fails, since it will again.
    """
    with contextlib.ExitStack() as stack:
        trees = {}
        for commit in dict.fromkeys((old, new)):
            on_step(f"builds {commit[:10]}")
            trees[commit] = stack.enter_context(checked_out(commit, build))
        for pair in range(pairs):
            found = {}
            for side in ("old", "new") if pair % 2 == 0 else ("new", "old"):
                commit = {"old": old, "new": new}[side]
                on_step(f"pair {pair + 1} of {pairs}: {side}, {commit[:10]}")
                found[side] = program.run(trees[commit])
            yield found["old"], found["new"]
