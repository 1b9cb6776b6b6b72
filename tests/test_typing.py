"""Type checkers on documented usage."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
USAGE, TRAINING = HERE / "typed_usage.py", HERE / "typed_training.py"


def run(*command: str | Path) -> None:
    environment = os.environ | {"MYPYPATH": str(HERE.parent)}  # this tree, not the installed one
    result = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_mypy_takes_documented_usage_and_finds_mistakes(tmp_path):
    """The strict options are those of pyproject.toml. An unused `type: ignore` is an error too."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    cache = os.environ.get("MYPY_CACHE_DIR", str(tmp_path))
    run(sys.executable, "-m", "mypy", f"--cache-dir={cache}", USAGE, TRAINING)


def test_pyright_takes_a_training_script():
    pyright = shutil.which("pyright")
    if pyright is None:
        pytest.skip("pyright is not installed")
    run(pyright, "--pythonpath", sys.executable, TRAINING)
