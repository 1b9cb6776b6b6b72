"""What a type checker says of documented usage."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_mypy_takes_documented_usage_and_finds_mistakes(tmp_path):
    """The strict options are those of pyproject.toml. An unused `type: ignore` is an error, too."""
    pytest.importorskip("mypy", reason="mypy is not installed")
    cache = os.environ.get("MYPY_CACHE_DIR", str(tmp_path))
    usage = Path(__file__).with_name("typed_usage.py")
    result = subprocess.run(
        [sys.executable, "-m", "mypy", f"--cache-dir={cache}", str(usage)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
