"""The documents: examples run, commands and links exist, the API reference is whole."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ial_cuda

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("examples/**/*.md")),
]
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def examples(page: Path) -> list[str]:
    """The Python blocks of a page, each at its line, for error messages."""
    text = page.read_text(encoding="utf-8")
    return ["\n" * (text.count("\n", 0, block.start()) + 1) + block[1] for block in EXAMPLE.finditer(text)]


WITH_EXAMPLES = [page for page in PAGES if examples(page)]


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=name_of)
def test_examples_run(page, tmp_path, monkeypatch):
    """The blocks of a page, in order, in one namespace."""
    if "PIL" in page.read_text(encoding="utf-8"):
        pytest.importorskip("PIL")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "example"}
    with torch.random.fork_rng():
        for block in examples(page):
            exec(compile(block, str(page), "exec"), namespace)


def commands() -> set[str]:
    text = "\n".join(page.read_text(encoding="utf-8") for page in [*PAGES, ROOT / "CHANGELOG.md"])
    return {match[0] for match in re.finditer(r"python3? -m [a-z][\w.]*(?: (?:weights|info)\b)?", text)}


OURS = ("benchmarks", "examples", "tools", "ial_cuda")


@pytest.mark.parametrize("command", sorted(c for c in commands() if c.split()[2].split(".")[0] in OURS))
def test_commands_exist(command):
    arguments = [sys.executable, *command.split()[1:], "--help"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=600)
    missing = re.search(r"^ModuleNotFoundError: No module named '(\w+)", done.stderr, re.MULTILINE)
    if missing and missing[1] not in OURS:
        pytest.skip(missing[0])  # an optional library
    assert done.returncode == 0 and "usage" in done.stdout, done.stdout + done.stderr


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        code = "\n".join(re.findall(r"`[^`]+`|^ {4}.*$|^make .*$", text, re.MULTILINE))
        for named in re.findall(r"\bmake ((?:[a-z][a-z-]*(?: |\b))+)", code):
            unknown = set(named.split()) - targets
            assert not unknown, f"{name_of(page)}: make {named}"


def test_every_public_name_is_in_the_reference():
    described = re.findall(r"^::: ial_cuda\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert sorted(described) == sorted(ial_cuda.__all__)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_to_files(page):
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    # Results are named in prose, too.
    links += [Path(ROOT, path) for path in re.findall(r"`(benchmarks/results/(?!latest)[\w./-]+)`", text)]
    missing = [str(link) for link in links if not (page.parent / link).exists()]
    assert not missing, f"{name_of(page)} links to what is missing"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180
