"""What only the CUDA kernels have: barriers, launches of every size; and their memory under sanitizers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import simt
import torch
from cases import DTYPES, check, make_logits, make_target, run

from ial_cuda import Hierarchy, importance_aware_loss

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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 4, 5, 11, 19, 21, 24, 25, 32, 33, 59, 171, 1000])
@pytest.mark.parametrize("layout", ["contiguous", "cropped", "channels_last"])
def test_every_tile(dtype, classes, layout):
    """Rows that can be cut into vectors, for every number of classes, in one piece and in a larger image."""
    hierarchy = Hierarchy([list(range(k, classes, 4)) for k in range(min(4, classes))])
    logits, target = (
        make_logits((2, classes, 4, 64), dtype),
        make_target((2, 4, 64), classes, ignore_index=-1),
    )
    if layout == "cropped":
        logits, target = logits[..., 1:4, 8:56], target[..., 1:4, 8:56]
    if layout == "channels_last":
        logits = logits.to(memory_format=torch.channels_last)
    check("simt", logits, target, hierarchy, ignore_index=-1)


@pytest.mark.parametrize(
    ("dtype", "levels"),
    [(torch.float64, 9), (torch.float64, 10), (torch.float32, 18), (torch.float32, 19), (torch.float32, 256)],
)
def test_more_levels_than_a_block_has_room_for(dtype, levels):
    hierarchy = Hierarchy([[c] for c in range(levels)])
    logits = make_logits((1, levels, 3, 128), dtype)
    check(
        "simt",
        logits,
        make_target((1, 3, 128), levels, ignore_index=-1),
        hierarchy,
        ignore_index=-1,
        lambdas=0.1,
        alpha=0.5,
    )


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_more_images_than_fit_into_shared_memory(scope):
    check("simt", make_logits((400, 5, 3), torch.float32), make_target((400, 3), 5), factor_scope=scope)


def test_limits_are_errors():
    for classes, levels, message in (
        (1025, 1, "1025 classes, expected at most 1024"),
        (300, 300, "300 levels, expected at most 256"),
    ):
        hierarchy = Hierarchy([list(range(k, classes, levels)) for k in range(levels)])
        with pytest.raises(ValueError, match=message):
            importance_aware_loss(
                make_logits((1, classes)), torch.zeros(1, dtype=torch.long), hierarchy, backend="simt"
            )


@pytest.mark.parametrize("label", [5, 200, -1, 2**31, -(2**40)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_bad_label_is_left_out_and_makes_the_loss_nan(label, reduction):
    logits, target = make_logits((2, 5, 6, 32), torch.float32), make_target((2, 6, 32), 5)
    without = target.clone()
    target[1, 4, 7], without[1, 4, 7] = label, 255
    loss, grad, (*_, count) = run("simt", logits, target, reduction=reduction)
    expected, expected_grad, (*_, expected_count) = run("simt", logits, without, reduction=reduction)
    assert torch.equal(count, expected_count)
    if reduction == "mean":
        assert loss.isnan()
    else:
        assert loss.isnan().tolist() == [False, True] and loss[0] == expected[0]
        assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [5, 40])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_ignored_pixels_have_gradient_zero(dtype, classes, value):
    hierarchy = Hierarchy.flat(classes)
    logits, target = make_logits((1, classes, 4, 32), dtype), make_target((1, 4, 32), classes, ignored=0)
    logits[0, :, 1, 3:9] = value
    target[0, 1, 3:9] = 255
    loss, grad, _ = run("simt", logits, target, hierarchy)
    assert loss.isfinite() and grad.isfinite().all()
    assert (grad[0, :, 1, 3:9] == 0).all()


@pytest.mark.parametrize("shape", [(0, 5, 4, 4), (2, 5, 0, 4)], ids=str)
def test_empty(shape):
    loss, grad, _ = run("simt", make_logits(shape), make_target((shape[0], *shape[2:]), 5))
    assert loss == 0 and grad.shape == shape


def test_the_gradient_may_overwrite_the_logits():
    for classes in (5, 40):
        logits, target = make_logits((2, classes, 6, 32)), make_target((2, 6, 32), classes)
        hierarchy = Hierarchy.flat(classes)
        expected = run("simt", logits, target, hierarchy)[1]
        leaf = logits.requires_grad_()
        copy = leaf.clone()
        importance_aware_loss(copy, target, hierarchy, inplace=True, backend="simt").backward()
        assert torch.equal(leaf.grad, expected) and torch.equal(copy.detach(), expected)


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
            "tests/test_simt.py",
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
