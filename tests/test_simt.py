"""The CUDA kernels on the CPU: what happens without a barrier, and their memory under sanitizers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import simt
import torch
from cases import make_logits, make_target, run

KERNELS = Path(__file__).resolve().parents[1] / "csrc" / "ial_kernels.cuh"
BARRIERS = [
    number
    for number, line in enumerate(KERNELS.read_text().splitlines(), 1)
    if line.strip() in ("__syncthreads();", "__syncwarp();")
]


@pytest.fixture(scope="module", autouse=True)
def _simt():
    simt.load()


def results(seed: int = 0):
    """Everything that the kernels write, where blocks have several rounds and images several blocks."""
    logits = make_logits((2, 5, 40, 64), torch.float32, seed=seed)
    target = make_target((2, 40, 64), 5, seed=seed)
    weight = torch.tensor([0.3, 1.0, 2.5, 0.7, 1.9])
    out = []
    for scope in ("image", "batch"):
        if scope == "batch":
            logits = logits.to(memory_format=torch.channels_last)
        loss, grad, components = run("simt", logits, target, weight=weight, factor_scope=scope)
        out += [loss, grad, *components]
    return torch.cat([value.double().flatten() for value in out])


def test_the_barriers_are_found():
    assert len(BARRIERS) == KERNELS.read_text().count("__sync") > 7


@pytest.mark.parametrize("line", BARRIERS)
def test_a_missing_barrier_shows(line):
    """A block's threads start in ascending or in descending order: one of the two must be wrong."""
    expected = results()
    wrong = []
    for descending in (False, True):
        torch.ops.ial_simt.disturb(line, descending)
        wrong.append(not torch.equal(results(), expected))
    torch.ops.ial_simt.disturb(0, False)
    assert any(wrong)
    assert torch.equal(results(), expected)


def test_under_sanitizers(tmp_path):
    """Every kernel once more where an access out of bounds, or undefined behaviour, ends the process."""
    if simt.SANITIZED:
        pytest.skip("this is that process")
    libraries = [simt.sanitizer_library(name) for name in ("asan", "ubsan")]
    selected = "every_tile or every_layout or every_target or room or images_than_fit"
    child = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-qs",
            "-x",
            "-p",
            "no:cacheprovider",
            "tests/test_oracle.py",
            "tests/test_launches.py",
            "-k",
            f"simt and ({selected})",
        ],
        cwd=KERNELS.parents[1],
        env=os.environ
        | {
            "IAL_SIMT_SANITIZE": "1",
            "LD_PRELOAD": " ".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0",
        },
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, (child.stdout + child.stderr)[-5000:]
    assert int(re.search(r"(\d+) passed", child.stdout).group(1)) > 100
