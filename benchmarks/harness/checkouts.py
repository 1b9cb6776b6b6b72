"""Runs today's benchmarks with the package of another checkout, and those of two commits in alternation."""

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

ROOT = Path(__file__).resolve().parents[2]
TAIL_LINES = 15
# An installed ial_cuda, an editable one above all, could come before that of the working folder.
LAUNCH = """
import runpy, sys
from pathlib import Path
import ial_cuda
expected, found = Path("ial_cuda").resolve(), Path(ial_cuda.__file__).resolve().parent
if found != expected:
    sys.exit(f"ial_cuda is imported from {found}, expected {expected}")
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


class CommandFailed(RuntimeError):
    """The message has the last lines of the command's output."""


def _run(failure: str, command: Sequence[str | Path], folder: Path, **environment: str) -> str:
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
        output, _ = process.communicate()
    except BaseException:  # interrupted: a compiler that keeps running would write to a removed folder
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    if process.returncode:
        tail = "\n".join(output.splitlines()[-TAIL_LINES:])
        raise CommandFailed(f"{failure} (exit code {process.returncode}):\n{tail}")
    return output


def find_commit(ref: str) -> str:
    try:
        return _run("", ["git", "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}"], ROOT).strip()
    except CommandFailed:
        raise ValueError(f"{ref!r} is no commit of this repository, expected one, or a file *.json") from None


def build_extension(tree: Path) -> None:
    """In place, for the GPU where there is one."""
    only_cpu = {} if torch.cuda.is_available() else {"IAL_CUDA_FORCE_CPU": "1"}
    # The setup.py of an older commit goes on without the extension unless it is required.
    required = {"IAL_CUDA_PURE_PYTHON": "0", "IAL_CUDA_REQUIRE_EXT": "1"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    _run("the extension does not build", command, tree, **required, **only_cpu)


@contextlib.contextmanager
def checkout(commit: str, build: Callable[[Path], None]) -> Iterator[Path]:
    """A worktree of the commit with its extension built. Removed at the end, also after an interruption."""
    with tempfile.TemporaryDirectory(prefix="ial_cuda-") as folder:
        tree = Path(folder).resolve() / "tree"
        _run(f"{commit} cannot be checked out", ["git", "worktree", "add", "--detach", tree, commit], ROOT)
        try:
            build(tree)
            yield tree
        finally:
            _run(f"{tree} cannot be removed", ["git", "worktree", "remove", "--force", tree], ROOT)


@dataclass(frozen=True)
class Program:
    """One of today's benchmarks."""

    name: str
    arguments: Sequence[str]

    def run(self, tree: Path) -> dict[str, Any]:
        """The benchmark's result with the package of a checkout."""
        with tempfile.TemporaryDirectory(prefix="ial_cuda-") as name:
            folder = Path(name)
            for package, root in (("ial_cuda", tree), ("benchmarks", ROOT)):
                (folder / package).symlink_to(root / package)
            file = folder / "output" / f"{self.name}.json"
            module, failure = f"benchmarks.{self.name}", f"python -m benchmarks.{self.name} fails"
            command = [sys.executable, "-c", LAUNCH, module, *self.arguments, "--output", file.parent]
            try:
                _run(failure, command, folder)
            except CommandFailed:
                if file.exists() and (failed := failures(json.loads(file.read_text()))):
                    raise CommandFailed("\n".join([f"{failure}:", *failed])) from None
                raise
            return json.loads(file.read_text())


def failures(result: dict[str, Any]) -> list[str]:
    """Our own rows that fail, which make a benchmark fail."""
    return [
        f"{case['input']}: {row['name']}: {row['failed']}"
        for case in result.get("cases", ())
        for row in case["providers"]
        if row["name"].startswith("ial_cuda") and row["failed"]
    ]


def run_pairs(
    commits: tuple[str, str],
    program: Program,
    pairs: int,
    build: Callable[[Path], None],
    on_step: Callable[[str], None],
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The results of both commits, pair by pair, in the order ABBA."""
    with contextlib.ExitStack() as stack:
        trees = {}
        for commit in dict.fromkeys(commits):
            on_step(f"building {commit[:10]}")
            trees[commit] = stack.enter_context(checkout(commit, build))
        for pair in range(pairs):
            results = {}
            for side in ("old", "new") if pair % 2 == 0 else ("new", "old"):
                commit = commits[side == "new"]
                on_step(f"pair {pair + 1} of {pairs}: {side}, {commit[:10]}")
                results[side] = program.run(trees[commit])
            yield results["old"], results["new"]
