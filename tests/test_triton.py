"""Tests of the Triton backend alone: machine code compiled without a GPU, and torch.compile."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import KERNELS, check, check_upsampled, device_of, make_logits, make_target

from ial_cuda import Hierarchy, backends, importance_aware_loss

ROOT = Path(__file__).resolve().parents[1]
FLAT = Hierarchy.flat(2)
#: For a test that runs the kernels: skipped where neither a GPU nor the interpreter can run them.
RUNS = pytest.mark.parametrize("backend", [b for b in KERNELS if b.values[0] == "triton"])

if backends.get("triton").missing is not None:
    pytest.skip(f"triton: {backends.get('triton').missing}", allow_module_level=True)


def python(*arguments: str, **env: str) -> str:
    """The output of a Python process in which kernels are compiled, not interpreted."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0"} | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, int]]:
    return json.loads(python("-m", "tests.compile_triton"))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_every_kernel_compiles_without_spills(compiled, target):
    mine = {name: code for name, code in compiled.items() if name.startswith(target)}
    kernels = {name.split(": ")[1].split()[0] for name in mine}
    assert kernels == {
        "reduce_kernel",
        "sum_kernel",
        "combine_kernel",
        "combine_backward_kernel",
        "reduce_backward_kernel",
        "upsampled_reduce_kernel",
        "upsampled_reduce_backward_kernel",
    }
    if target == "gfx942":  # compiled only: the tile sizes are not chosen for AMD's registers
        return
    spilled = {name: code["spills"] for name, code in mine.items() if code["spills"]}
    assert spilled == {}


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_reads_and_writes_sixteen_bytes(compiled, target, dtype):
    """19 classes: four in the loop and the remaining three, twice in reduce_backward."""
    code = compiled[f"{target}: reduce_kernel 128: {dtype} C=19"]
    assert code["wide loads"] >= 4 + 3
    code = compiled[f"{target}: reduce_backward_kernel 128: {dtype} C=19"]
    assert code["wide loads"] >= 2 * (4 + 3)
    assert code["wide stores"] == code["stores"] == 4 + 3


def kernels_of(upsampled: bool) -> list[str]:
    """The kernels of a step, in order."""
    prefix = "upsampled_" * upsampled
    small = ["sum_kernel", "combine_kernel", "combine_backward_kernel"]
    return [f"{prefix}reduce_kernel", *small, f"{prefix}reduce_backward_kernel"]


# torch.compile traces with tensors without memory, which run no kernel.
TRACE = """
import dataclasses
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode
from ial_cuda import CITYSCAPES, backends, importance_aware_loss

backends.register(dataclasses.replace(backends.get("triton"), devices=("cpu",)))

def compiler(graph, inputs):
    for node in graph.graph.nodes:
        if "triton_kernel_wrapper" in str(node.target):
            kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            print(getattr(kernel, "fn", kernel).__name__)
            ints = [value for value in node.kwargs["kwargs"].values() if isinstance(value, int)]
            assert all(-(2**31) <= value < 2**31 for value in ints), ints
        assert "ial_triton" not in str(node.target)
    return graph

def step(logits, target):
    options = dict(lambdas=(0.1, 0.2, 0.3), ignore_index=-(2**40), backend="triton") | {options}
    return importance_aware_loss(2 * logits, target, CITYSCAPES, **options)

with FakeTensorMode():
    logits = torch.empty(2, 19, *{size}, requires_grad=True)
    target = torch.empty(2, 32, 64, dtype=torch.uint8)
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    torch.compile(step, fullgraph=True, dynamic={dynamic}, backend=backend)(logits, target).backward()
"""


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("upsampled", [False, True], ids=["", "upsampled"])
def test_torch_compile_sees_the_kernels(dynamic, upsampled):
    trace = TRACE.replace("{dynamic}", str(dynamic))
    trace = trace.replace("{options}", str({"upsample": "bilinear"} if upsampled else {"inplace": True}))
    names = python("-c", trace.replace("{size}", str((8, 16) if upsampled else (32, 64)))).split()
    assert names == kernels_of(upsampled)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, dict[str, Any]]:
    cache = str(tmp_path_factory.mktemp("inductor"))
    return json.loads(
        python("-m", "tests.inductor_triton", TORCHINDUCTOR_CACHE_DIR=cache, CUDA_VISIBLE_DEVICES="")
    )


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("upsampled", [False, True], ids=["", "upsampled"])
@pytest.mark.parametrize("size", ["small", "huge"])
def test_inductor_launches_the_kernels_with_int32(written, size, upsampled, dynamic):
    """Sizes, strides and the ignored index may be huge. The small cases are compiled, too."""
    launched = written[" ".join([size, *["upsampled"] * upsampled, *["dynamic"] * dynamic])]
    assert list(launched) == kernels_of(upsampled)
    for name, launch in launched.items():
        types = {type for type in launch["types"].values() if not type.startswith("*")}
        assert types <= {"i32", "constexpr"}, f"{name}: {launch['types']}"
        numbers = [int(number) for number in re.findall(r"-?\d+", launch["values"])]
        assert all(abs(number) <= 2**31 for number in numbers), f"{name}: {launch['values']}"


def test_triton_is_imported_on_first_use():
    code = (
        "import sys, torch, ial_cuda; before = 'triton' in sys.modules; "
        "ial_cuda.backends.get('triton').operators(); print(before, 'triton' in sys.modules)"
    )
    assert python("-c", code).split() == ["False", "True"]


@RUNS
@pytest.mark.parametrize("scope", ["image", "batch"])
def test_more_images_than_a_program_reads_at_a_time(backend, scope):
    for reduction in ("mean", "none"):
        check(
            backend,
            make_logits((140, 5, 3), torch.float32),
            make_target((140, 3), 5),
            factor_scope=scope,
            reduction=reduction,
        )


@RUNS
@pytest.mark.parametrize("levels", [8, 9, 17])
def test_more_levels_than_a_program_has_registers_for(backend, levels):
    hierarchy = Hierarchy([[c] for c in reversed(range(levels))])
    logits, target = make_logits((2, levels, 70)), make_target((2, 70), levels, ignore_index=-1)
    check(backend, logits, target, hierarchy, ignore_index=-1, lambdas=0.1, alpha=0.5)


@RUNS
def test_several_programs_of_an_image(backend, monkeypatch):
    """As on a GPU with several multiprocessors, with more tiles than programs."""
    from ial_cuda.triton import launch

    monkeypatch.setattr(launch, "_multiprocessors", lambda logits: 1)
    check(backend, make_logits((2, 5, 80, 320), torch.float32), make_target((2, 80, 320), 5))


@RUNS
@pytest.mark.parametrize("align_corners", [False, True], ids=["centres", "corners"])
def test_cells_with_several_patches_and_several_programs(backend, monkeypatch, align_corners):
    """With patches as small as on a GPU, and four tiles or more for a program of reduce."""
    from ial_cuda.triton import upsample

    monkeypatch.setattr(upsample, "MAX_PATCH", ((4, 2), (2, 1)))
    target = make_target((1, 33, 140), 5)
    logits = make_logits((1, 5, 7, 30), torch.float32)
    check_upsampled(backend, logits, target, align_corners=align_corners)


@RUNS
def test_positions_beyond_32_bits(backend):
    """The loss alone, against positions in integers: F.interpolate is off by 0.01 in so long a line."""
    coarse, fine = 40_001, 33_000
    logits, target = make_logits((1, 2, 1, coarse)), make_target((1, 1, fine), 2)
    at = (2 * torch.arange(fine) + 1) * coarse - fine
    cell, beyond = at // (2 * fine), (at % (2 * fine)).double() / (2 * fine)
    line = logits[0, :, 0].T
    expected = importance_aware_loss(
        torch.lerp(line[cell], line[cell + 1], beyond[:, None]), target.flatten(), FLAT
    )
    loss = importance_aware_loss(
        logits.to(device_of(backend)),
        target.to(device_of(backend)),
        FLAT,
        upsample="bilinear",
        backend=backend,
    )
    # In float64 eps is 2.2e-16. A sum of 33 000 terms loses two digits.
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-13, atol=0)


@RUNS
def test_tiles_of_nearly_2_to_the_31_pixels(backend):
    from helper_kernels import tiles_kernel

    tiles = torch.empty((), dtype=torch.int32, device=device_of(backend))
    for pixels in (1, 1024, 1025, 2**31 - 1024, 2**31 - 1023, 2**31 - 1, 2**31):
        tiles_kernel[(1,)](tiles, pixels, 1024)
        assert tiles.item() == math.ceil(pixels / 1024), pixels


@RUNS
@pytest.mark.parametrize("upsampled", [False, True], ids=["", "upsampled"])
@pytest.mark.parametrize("dim", range(4))
def test_strides_beyond_32_bits(need_gpu_memory, backend, dim, upsampled):
    """4 GiB are reserved and few pages are used: the other strides are small."""
    strides = [8, 4, 2, 1]
    strides[dim] = 2**31 + 8
    device, operators = device_of(backend), backends.get(backend).operators()
    if device == "cuda":
        need_gpu_memory(5 * 2**30)
    storage = torch.empty(2**31 + 32, dtype=torch.float16, device=device)
    logits = storage.as_strided((2, 2, 2, 2), strides)
    logits.copy_(make_logits((2, 2, 2, 2), torch.float16))
    dense = logits.contiguous()
    target = make_target((2, 2, 2), 2).to(device)
    grad_stats = make_logits((2, 1, 5)).to(device)
    corners = False if upsampled else None

    rest = (target, None, None, FLAT.class_levels, 255, "exact")
    stats = operators.reduce(logits, *rest, False, corners)
    assert torch.equal(stats, operators.reduce(dense, *rest, False, corners))
    expected = operators.reduce_backward(dense, grad_stats, *rest, corners)
    assert torch.equal(operators.reduce_backward(logits, grad_stats, *rest, corners), expected)
    if not upsampled:
        operators.reduce_backward_(logits, grad_stats, *rest)
        assert torch.equal(logits, expected)
