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
from cases import DTYPES, HIERARCHY, check, make_logits, make_target, poisoned, run
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
SIMT = ["simt", "simt_fused"]


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


@pytest.mark.parametrize("backend", SIMT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [1, 8, 9, 11, 12, 19, 20, 24, 25, 32, 33, 59, 171, 1000])
@pytest.mark.parametrize("layout", ["contiguous", "cropped", "channels_last"])
def test_every_tile(backend, dtype, classes, layout):
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
    check(backend, logits, target, hierarchy, ignore_index=-1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "shape", [(1, 19, 64, 256), (3, 5, 64, 256), (5, 5, 64, 256), (7, 3, 64, 64), (4, 5, 63, 61)], ids=str
)
def test_one_launch(dtype, scope, reduction, shape):
    """Images in shared memory, in registers, read again, and all of them; one wave, and several; and what has
    no kernel of its own: odd rows, more images pooled than there are multiprocessors, float64."""
    hierarchy = Hierarchy([list(range(k, shape[1], 3)) for k in range(3)])
    target = make_target((shape[0], *shape[2:]), shape[1])
    generator = torch.Generator().manual_seed(1)
    options = {
        "weight": torch.rand(shape[1], generator=generator) + 0.5,
        "pixel_weight": torch.rand(target.shape, generator=generator),
        "factor_scope": scope,
        "reduction": reduction,
    }
    check("simt_fused", make_logits(shape, dtype), target, hierarchy, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("incoming", [1.0, -0.3, 65536.0])
def test_every_backward_pass_of_one_launch(dtype, incoming):
    """The first takes the gradient that is there, the second has to compute one."""
    leaf, target = make_logits((2, 5, 16, 32), dtype).requires_grad_(), make_target((2, 16, 32), 5)
    grads = {}
    for backend in SIMT:
        loss = importance_aware_loss(leaf, target, HIERARCHY, backend=backend)
        grads[backend] = [
            torch.autograd.grad(loss, leaf, torch.tensor(incoming).to(loss), retain_graph=True)[0]
            for _ in range(3)
        ]
    for grad in grads["simt_fused"]:
        # sums of other blocks, then rounded to the dtype of the logits
        torch.testing.assert_close(
            grad, grads["simt"][0], rtol=2 * torch.finfo(dtype).eps, atol=1e-6 * float(grad.abs().max())
        )
    assert torch.equal(*grads["simt_fused"][1:])


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


@pytest.mark.parametrize("backend", SIMT)
@pytest.mark.parametrize("label", [5, 200, -1, 2**31, -(2**40)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_bad_label_is_left_out_and_makes_the_loss_nan(backend, label, reduction):
    logits, target = make_logits((2, 5, 6, 32), torch.float32), make_target((2, 6, 32), 5)
    without = target.clone()
    target[1, 4, 7], without[1, 4, 7] = label, 255
    loss, grad, (*_, count) = run(backend, logits, target, reduction=reduction)
    expected, expected_grad, (*_, expected_count) = run(backend, logits, without, reduction=reduction)
    assert torch.equal(count, expected_count)
    if reduction == "mean":
        assert loss.isnan()
    else:
        assert loss.isnan().tolist() == [False, True] and loss[0] == expected[0]
        assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("backend", SIMT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [5, 40])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_ignored_pixels_have_gradient_zero(backend, dtype, classes, value):
    hierarchy = Hierarchy.flat(classes)
    logits, target = make_logits((1, classes, 4, 32), dtype), make_target((1, 4, 32), classes, ignored=0)
    logits[0, :, 1, 3:9] = value
    target[0, 1, 3:9] = 255
    loss, grad, _ = run(backend, logits, target, hierarchy)
    assert loss.isfinite() and grad.isfinite().all()
    assert (grad[0, :, 1, 3:9] == 0).all()


@pytest.mark.parametrize("backend", SIMT)
@pytest.mark.parametrize("shape", [(0, 5, 4, 4), (2, 5, 0, 4)], ids=str)
def test_empty(backend, shape):
    loss, grad, _ = run(backend, make_logits(shape), make_target((shape[0], *shape[2:]), 5))
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
    selected = "every_tile or every_layout or every_target or room or images_than_fit or one_launch"
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
