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
from cases import HIERARCHY, make_logits, make_target, poisoned, run
from torch.profiler import ProfilerActivity, profile

from ial_cuda import Hierarchy, _ops, importance_aware_loss

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc").glob("*.cuh"))
BARRIERS = [
    f"{source.name}:{number}"
    for source in SOURCES
    for number, line in enumerate(source.read_text().splitlines(), 1)
    if line.strip() in ("__syncthreads();", "__syncwarp();", "grid_barrier();")
]


@pytest.fixture(scope="module", autouse=True)
def _simt():
    simt.load()


def results():
    """Everything that the kernels write, where blocks have several rounds, images several blocks and batches
    several waves."""
    weight = torch.tensor([0.3, 1.0, 2.5, 0.7, 1.9])
    out = []
    for backend, shape, scope in (
        ("simt", (2, 5, 40, 64), "image"),
        ("simt", (2, 5, 40, 64), "batch"),
        ("simt_fused", (3, 5, 16, 1024), "image"),
        ("simt_fused", (3, 5, 16, 256), "batch"),
    ):
        logits, target = make_logits(shape, torch.float32), make_target((shape[0], *shape[2:]), 5)
        if backend == "simt" and scope == "batch":
            logits = logits.to(memory_format=torch.channels_last)
        loss, grad, components = run(backend, logits, target, weight=weight, factor_scope=scope)
        out += [loss, grad, *components]
    # several tiles, and in float64 no room for the gradient of five classes at a time
    logits, target = make_logits((2, 5, 9, 13)), make_target((2, 36, 52), 5)
    loss, grad, components = run("simt", logits, target, weight=weight.double(), upsample="bilinear")
    out += [loss, grad, *components]
    return torch.cat([value.double().flatten() for value in out])


def test_the_barriers_are_found():
    text = "".join(source.read_text() for source in SOURCES)
    calls = text.count("__sync") + text.count("grid_barrier();")
    assert len(BARRIERS) == calls > 14


@pytest.fixture(scope="module")
def undisturbed():
    return results()


@pytest.mark.parametrize("barrier", BARRIERS)
def test_a_missing_barrier_shows(barrier, undisturbed):
    """A block's threads start in ascending or in descending order: one of the two must be wrong."""
    wrong = []
    for descending in (False, True):
        torch.ops.ial_simt.disturb(barrier, descending)
        wrong.append(not torch.equal(results(), undisturbed))
    torch.ops.ial_simt.disturb("", False)
    assert any(wrong)
    assert torch.equal(results(), undisturbed)


def test_one_launch_leaves_its_gradient_to_autograd():
    """Nothing is copied on the way to a leaf's .grad, which would take as long as the launch."""
    leaf, target = make_logits((2, 5, 16, 32)).requires_grad_(), make_target((2, 16, 32), 5)
    with poisoned(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        importance_aware_loss(leaf, target, HIERARCHY, backend="simt_fused").backward()
    names = {event.name for event in profiler.events()}
    assert "ial_simt::fused" in names and "ial_simt::rescale_" in names
    assert not names & {"aten::clone", "aten::copy_", "ial_simt::gradient", "ial_simt::reduce"}


@pytest.mark.parametrize(
    ("change", "fused"),
    [
        ({}, True),
        ({"dtype": torch.float16}, False),
        ({"dtype": torch.bfloat16}, True),
        ({"reduction": "none"}, False),
        ({"reduction": "sum"}, True),
        ({"inplace": True}, False),
        ({"requires_grad": False}, False),
        ({"no_grad": True}, False),
        ({"dtype": torch.float64}, False),
        ({"shape": (1, 5, 15, 33)}, False),
        ({"shape": (1, 33, 16, 32)}, False),
        ({"shape": (1, 9, 16, 32), "levels": 8}, True),
        ({"shape": (1, 9, 16, 32), "levels": 9}, False),
        ({"shape": (1, 19, 64, 80)}, True),
        ({"shape": (1, 19, 64, 88)}, False),
        ({"shape": (3, 19, 64, 80)}, True),
        ({"shape": (3, 19, 64, 80), "factor_scope": "batch"}, False),
        ({"channels_last": True}, False),
        ({"strided_target": True}, False),
    ],
    ids=str,
)
def test_auto_takes_one_launch_where_it_wins(change, fused, monkeypatch):
    """A device with 3 x 128 KiB of shared memory and 16 KiB of L2."""
    monkeypatch.setitem(_ops.preference, "cpu", ("simt",))
    change = dict(change)
    shape, dtype = change.pop("shape", (2, 5, 16, 32)), change.pop("dtype", torch.float32)
    levels = change.pop("levels", 3)
    hierarchy = Hierarchy([list(range(k, shape[1], levels)) for k in range(levels)])
    logits = make_logits(shape, dtype).requires_grad_(change.pop("requires_grad", True)) * 1
    if change.pop("channels_last", False):
        logits = logits.to(memory_format=torch.channels_last)
    target = make_target((shape[0], *shape[2:]), shape[1])
    if change.pop("strided_target", False):
        target = target.transpose(1, 2).contiguous().transpose(1, 2)
    enabled = not change.pop("no_grad", False)
    with torch.set_grad_enabled(enabled), profile(activities=[ProfilerActivity.CPU]) as profiler:
        importance_aware_loss(logits, target, hierarchy, **change)
    names = {event.name for event in profiler.events()}
    assert ("ial_simt::fused" in names) == fused
    assert ("ial_simt::reduce" in names) == (not fused)


def test_under_sanitizers(tmp_path):
    """Every kernel once more where an access out of bounds, or undefined behaviour, ends the process."""
    if simt.SANITIZED:
        pytest.skip("this is that process")
    libraries = [simt.sanitizer_library(name) for name in ("asan", "ubsan")]
    selected = "every_tile or every_layout or every_target or room or images_than_fit or one_launch"
    # one of the two backends: they upsample with the same kernels
    selected += " or (not simt_fused and (interpolate_then_loss or upsample and every_number or bad_labels))"
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
            "tests/test_upsample.py",
            "-k",
            f"simt and ({selected})",
        ],
        cwd=ROOT,
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
