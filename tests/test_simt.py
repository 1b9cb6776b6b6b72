"""The CUDA kernels on the CPU: with a barrier removed, under sanitizers, and with contracted products."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import simt
import torch
from cases import HIERARCHY, check, make_logits, make_target, poisoned, run
from torch.profiler import ProfilerActivity, profile

from ial_cuda import Hierarchy, importance_aware_loss

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cuh"))
FLAT = Hierarchy.flat(5)
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
    """All outputs of the kernels, with several iterations per block, blocks per image and waves per batch."""
    weight = torch.tensor([0.3, 1.0, 2.5, 0.7, 1.9])
    out = []
    for backend, shape, scope in (
        ("simt", (2, 5, 40, 64), "image"),
        ("simt", (2, 5, 40, 64), "batch"),
        ("simt_one_launch", (3, 5, 16, 1024), "image"),
        ("simt_one_launch", (3, 5, 16, 256), "batch"),
    ):
        logits, target = make_logits(shape, torch.float32), make_target((shape[0], *shape[2:]), 5)
        if backend == "simt" and scope == "batch":
            logits = logits.to(memory_format=torch.channels_last)
        loss, grad, components = run(backend, logits, target, weight=weight, factor_scope=scope)
        out += [loss, grad, *components]
    # several rectangles of cells, and in float64 several passes for the gradient of five classes
    logits, target = make_logits((2, 5, 9, 13)), make_target((2, 36, 52), 5)
    for hierarchy in (HIERARCHY, FLAT):
        options = {"weight": weight.double(), "upsample": "bilinear"}
        loss, grad, components = run("simt", logits, target, hierarchy, **options)
        out += [loss, grad, *components]
    for layout in (torch.contiguous_format, torch.channels_last):
        logits = make_logits((2, 5, 40, 64), torch.float32).to(memory_format=layout)
        loss, grad, components = run("simt", logits, make_target((2, 40, 64), 5), FLAT, weight=weight)
        out += [loss, grad, *components]
    for corners, shape in ((None, (2, 5, 40, 64)), (False, (2, 5, 9, 13))):
        logits, target = make_logits(shape, torch.float32), make_target((2, 40, 64), 5)
        with poisoned():
            out.append(torch.ops.ial_simt.pixel_nll(logits, target, weight, 255, 0.0, corners))
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
    """The threads of a block run in ascending or descending order. One of them must give wrong results."""
    wrong = []
    for descending in (False, True):
        torch.ops.ial_simt.disturb(barrier, descending)
        wrong.append(not torch.equal(results(), undisturbed))
    torch.ops.ial_simt.disturb("", False)
    assert any(wrong)
    assert torch.equal(results(), undisturbed)


@pytest.mark.parametrize(
    ("backend", "hierarchy"), [("simt_one_launch", HIERARCHY), ("simt", FLAT)], ids=["one launch", "one pass"]
)
def test_a_computed_gradient_is_left_to_autograd(backend, hierarchy):
    """The gradient becomes a leaf's .grad without a copy, which would take as long as the launch."""
    leaf = make_logits((2, 5, 16, 32), torch.float32).requires_grad_()
    target = make_target((2, 16, 32), 5)
    with poisoned(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        importance_aware_loss(leaf, target, hierarchy, backend=backend).backward()
    names = {event.name for event in profiler.events()}
    assert "ial_simt::loss_and_grad" in names and "ial_simt::rescale_" in names
    assert not names & {"aten::clone", "aten::copy_", "ial_simt::reduce_backward", "ial_simt::reduce"}


def computes_gradient(logits, target, levels, *, scope="image", expected=None, one_launch=True, **options):
    """Whether loss_and_grad computes the gradient of several levels, as it does in one launch."""
    class_levels = [c % levels for c in range(logits.shape[1])]
    pixels = (target, None, None, class_levels, 255, "exact", options.get("label_smoothing", 0.0))
    combine = (None, [0.1] * (levels - 1), 1.0, options.get("reduction", "mean"), "mean", scope)
    results = torch.ops.ial_simt.loss_and_grad(logits, *pixels, *combine, None, expected, one_launch)
    return results[4].shape == logits.shape


@pytest.mark.parametrize(
    ("change", "possible"),
    [
        ({}, True),
        ({"one_launch": False}, False),
        ({"label_smoothing": 0.1}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.bfloat16, "expected": torch.ones(2, dtype=torch.float64)}, True),
        ({"reduction": "sum"}, True),
        ({"dtype": torch.float64}, False),
        ({"shape": (1, 5, 15, 33)}, False),
        ({"shape": (1, 33, 16, 32)}, False),
        ({"shape": (1, 9, 16, 32), "levels": 8}, True),
        ({"shape": (1, 9, 16, 32), "levels": 9}, False),
        ({"shape": (1, 19, 64, 88)}, True),
        ({"shape": (3, 19, 64, 80), "scope": "batch"}, True),
        ({"shape": (4, 5, 16, 32), "scope": "batch"}, False),
        ({"channels_last": True}, False),
        ({"strided_target": True}, False),
    ],
    ids=str,
)
def test_one_launch_where_it_is_possible(change, possible):
    """A device with three multiprocessors: pooled images run at the same time, each on one at least."""
    change = dict(change)
    shape, dtype = change.pop("shape", (2, 5, 16, 32)), change.pop("dtype", torch.float32)
    logits, target = make_logits(shape, dtype), make_target((shape[0], *shape[2:]), shape[1])
    if change.pop("channels_last", False):
        logits = logits.to(memory_format=torch.channels_last)
    if change.pop("strided_target", False):
        target = target.transpose(1, 2).contiguous().transpose(1, 2)
    assert computes_gradient(logits, target, change.pop("levels", 3), **change) == possible


def test_more_sums_than_a_block_has_room_for():
    """A GeForce RTX 5090 has 99 KiB per block, too little for the sums of 158 pooled images."""
    hierarchy = Hierarchy([[level] for level in range(7)] + [[7, 8, 9, 10]])
    logits, target = make_logits((158, 11, 16), torch.float32), make_target((158, 16), 11)
    with simt.device(multiprocessors=170, l2_bytes=96 << 20, shared_bytes=99 << 10):
        check("simt_one_launch", logits, target, hierarchy, factor_scope="batch", lambdas=0.1)
        assert not computes_gradient(logits, target, 8, scope="batch")
        assert computes_gradient(logits[:2], target[:2], 8, scope="batch")


SPACES = ["global", "shared", "local"]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize(
    ("instruction", "expected"),
    [("__stcs", "global"), ("__ldcg", "global"), ("__cvta_generic_to_shared", "shared")],
)
def test_an_instruction_reaches_its_address_space_only(instruction, expected, space):
    error = pytest.raises(RuntimeError, match=f"simt: {instruction} on an address in {space} memory")
    with contextlib.nullcontext() if space == expected else error:
        torch.ops.ial_simt.touch(instruction, SPACES.index(space))
    check("simt", make_logits((1, 5, 7)), make_target((1, 7), 5))


def test_no_instruction_for_memory_is_hidden_from_the_emulator():
    """The emulator cannot check the address spaces of inline PTX."""
    for source in sorted((ROOT / "csrc").rglob("*.*")):
        for statement in re.findall(r"\basm\b.*?\)\s*;", source.read_text(), re.S):
            memory = re.search(r"\b(ld|st|red|atom|cp|prefetch|mbarrier)\b", statement)
            assert memory is None, f"{source.name}: {statement}"


def passed_with(build, files, selected, **environment):
    """Runs tests in a process with another build of the library. Returns how many passed."""
    if simt.BUILD != "plain":
        pytest.skip(f"this is the process of the {simt.BUILD} build")
    command = [sys.executable, "-m", "pytest", "-qs", "-x", "-p", "no:cacheprovider", "-k", selected]
    child = subprocess.run(
        [*command, *(f"tests/test_{name}.py" for name in files)],
        cwd=ROOT,
        env=os.environ | {"IAL_SIMT_BUILD": build} | environment,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, (child.stdout + child.stderr)[-5000:]
    return int(re.search(r"(\d+) passed", child.stdout).group(1))


def test_under_sanitizers():
    """All kernels again. An access out of bounds or undefined behaviour ends the process."""
    libraries = [simt.sanitizer_library(name) for name in ("asan", "ubsan")]
    selected = "every_tile or every_layout or every_target or room or images_than_fit or one_launch"
    selected += " or gradient_of_one_pass or layout_of_labels"
    # one of the two backends, since they upsample with the same kernels
    selected += (
        " or (not simt_one_launch and (interpolate_then_loss or upsample and every_number or bad_labels))"
    )
    selected += " or random_cases"
    passed = passed_with(
        "sanitized",
        ["oracle", "launches", "upsample", "attack"],
        f"simt and ({selected})",
        LD_PRELOAD=" ".join(libraries),
        ASAN_OPTIONS="detect_leaks=0",
    )
    assert passed > 100


def test_with_contracted_products():
    """All kernels again, with products and additions contracted as by nvcc."""
    if platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx2_supported():
        pytest.skip("simt: a processor without FMA")
    selected = "every_tile or dtype_and_rank or huge or itself or every_dtype or not_finite or ignored_pixels"
    selected += " or one_launch or trained or options or limit or masked or random_cases"
    selected += " or gradient_of_one_pass"
    assert (
        passed_with(
            "contracted", ["oracle", "ops", "launches", "upsample", "attack"], f"simt and ({selected})"
        )
        > 100
    )
