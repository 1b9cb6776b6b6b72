"""Tests of the Triton backend only: machine code compiled without a GPU, and torch.compile."""

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
import torch.nn.functional as F
from cases import KERNELS, ONE_AND_FOUR, check, check_upsampled, device_of, make_logits, make_target

from ial_cuda import Hierarchy, backends, importance_aware_loss

ROOT = Path(__file__).resolve().parents[1]
FLAT = Hierarchy.flat(2)
#: For tests that run the kernels. Skipped if neither a GPU nor the interpreter can run them.
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
def compiled() -> dict[str, dict[str, Any]]:
    return json.loads(python("-m", "tests.compile_triton"))


def allowed_spills(name: str) -> int:
    """In bytes. With 168 registers, a multiprocessor runs three programs at a time. Some kernels for coarse
    logits need a few more registers, which would allow two. Their spills stay in the L1 cache."""
    few = "upsampled_one_pass_kernel" in name or ("upsampled" in name and "smooth" in name)
    return 80 if few else 0


#: The tensors that each kernel writes. rescale also writes expected_ptr.
_ONE_PASS = {"partial_ptr", "total_ptr", "grad_stats_ptr", "computed_for_ptr"}
WRITTEN = {
    "reduce_kernel": {"partial_ptr"},
    "sum_kernel": {"stats_ptr"},
    "combine_kernel": {"f_ptr", "loss_ptr"},
    "combine_backward_kernel": {"grad_stats_ptr"},
    "reduce_backward_kernel": {"grad_ptr"},
    "weight_kernel": {"partial_ptr"},
    "one_pass_kernel": _ONE_PASS | {"grad_ptr"},
    "upsampled_reduce_kernel": {"partial_ptr"},
    "upsampled_reduce_backward_kernel": {"halves_ptr"},
    "upsampled_one_pass_kernel": _ONE_PASS | {"halves_ptr"},
    "add_halves_kernel": {"grad_ptr"},
    "pixel_nll_kernel": {"nll_ptr"},
    "upsampled_pixel_nll_kernel": {"nll_ptr"},
}


def kernel_of(name: str) -> str:
    return name.split(": ")[1].split()[0]


@pytest.mark.parametrize("kernel", WRITTEN)
def test_torch_compile_finds_what_a_kernel_writes(compiled, kernel):
    """It would copy a tensor that it takes to be written."""
    found = {name: set(code["written"]) for name, code in compiled.items() if kernel_of(name) == kernel}
    assert found
    wrong = {
        name: written for name, written in found.items() if written - {"expected_ptr"} != WRITTEN[kernel]
    }
    assert wrong == {}
    rescales = {"expected_ptr" in written for written in found.values()}
    assert rescales == ({False, True} if "reduce_backward" in kernel else {False})


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_every_kernel_compiles_without_spills(compiled, target):
    mine = {name: code for name, code in compiled.items() if name.startswith(target)}
    assert {kernel_of(name) for name in mine} == WRITTEN.keys()
    if target == "gfx942":  # compiled only: the tile sizes are not chosen for AMD's registers
        return
    spilled = {name: code["spills"] for name, code in mine.items() if code["spills"] > allowed_spills(name)}
    assert spilled == {}


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_reads_and_writes_sixteen_bytes(compiled, target, dtype):
    """19 classes: four in the loop and the remaining three, twice if there is a gradient."""
    code = compiled[f"{target}: reduce_kernel 128: {dtype} C=19"]
    assert code["wide loads"] >= 4 + 3
    code = compiled[f"{target}: reduce_backward_kernel 128: {dtype} C=19"]
    assert code["wide loads"] >= 2 * (4 + 3)
    assert code["wide stores"] == code["stores"] == 4 + 3
    code = compiled[f"{target}: one_pass_kernel 128: {dtype} C=19 one level"]
    assert code["wide loads"] >= 2 * (4 + 3)
    assert code["wide stores"] == 4 + 3


def kernels_of(upsampled: bool) -> list[str]:
    """The kernels of a step, in order."""
    prefix = "upsampled_" * upsampled
    small = ["sum_kernel", "combine_kernel", "combine_backward_kernel"]
    return [f"{prefix}reduce_kernel", *small, f"{prefix}reduce_backward_kernel"]


def kernels_of_pixel_nll(upsampled: bool) -> list[str]:
    prefix = "upsampled_" * upsampled
    return [f"{prefix}pixel_nll_kernel", f"{prefix}reduce_backward_kernel"]


# torch.compile traces with fake tensors, which run no kernel.
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

def loss(logits, target):
    options = dict(lambdas=(0.1, 0.2, 0.3), ignore_index=-(2**40), backend="triton") | {options}
    return importance_aware_loss(2 * logits, target, CITYSCAPES, **options)

operators = backends.get("triton").operators()

def pixel_nll(logits, target):
    align_corners = None if logits.shape[2:] == target.shape[1:] else False
    return operators.pixel_nll(2 * logits, target, None, -(2**40), 0.1, align_corners).square().sum()

with FakeTensorMode():
    logits = torch.empty(2, 19, *{size}, requires_grad=True)
    target = torch.empty(2, 32, 64, dtype=torch.uint8)
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    torch.compile({step}, fullgraph=True, dynamic={dynamic}, backend=backend)(logits, target).backward()
"""


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("upsampled", [False, True], ids=["", "upsampled"])
@pytest.mark.parametrize("step", ["loss", "pixel_nll"])
def test_torch_compile_sees_the_kernels(dynamic, upsampled, step):
    trace = TRACE.replace("{dynamic}", str(dynamic)).replace("{step}", step)
    trace = trace.replace("{options}", str({"upsample": "bilinear"} if upsampled else {"inplace": True}))
    names = python("-c", trace.replace("{size}", str((8, 16) if upsampled else (32, 64)))).split()
    assert names == (kernels_of if step == "loss" else kernels_of_pixel_nll)(upsampled)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
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
    names = [launch["kernel"] for launch in launched]
    assert names == kernels_of(upsampled) + kernels_of_pixel_nll(upsampled)
    for launch in launched:
        types = {type for type in launch["types"].values() if not type.startswith("*")}
        assert types <= {"i32", "constexpr"}, launch
        numbers = [int(number) for number in re.findall(r"-?\d+", launch["values"])]
        assert all(abs(number) <= 2**31 for number in numbers), launch


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
@ONE_AND_FOUR
def test_several_programs_of_an_image(backend, monkeypatch, hierarchy):
    """Like on a GPU with several multiprocessors, with more tiles than programs."""
    from ial_cuda.triton import launch

    monkeypatch.setattr(launch, "_programs", lambda like, tiles, images=1: min(tiles, 2))
    check(backend, make_logits((2, 5, 80, 320), torch.float32), make_target((2, 80, 320), 5), hierarchy)


@RUNS
@pytest.mark.parametrize("align_corners", [False, True], ids=["centres", "corners"])
def test_cells_with_several_patches_and_several_programs(backend, monkeypatch, align_corners):
    """Patches are as small as on a GPU. A program of reduce has at least four tiles."""
    from ial_cuda.triton import upsample

    monkeypatch.setattr(upsample, "MAX_PATCH", ((4, 2), (2, 1)))
    target = make_target((1, 33, 140), 5)
    logits = make_logits((1, 5, 7, 30), torch.float32)
    check_upsampled(backend, logits, target, align_corners=align_corners)


@RUNS
def test_positions_beyond_32_bits(backend):
    """No gradient, against integer positions: F.interpolate has an error of 0.01 in a line this long."""
    coarse, fine = 40_001, 33_000
    logits, target = make_logits((1, 2, 1, coarse)), make_target((1, 1, fine), 2)
    at = (2 * torch.arange(fine) + 1) * coarse - fine
    cell, beyond = at // (2 * fine), (at % (2 * fine)).double() / (2 * fine)
    line = logits[0, :, 0].T
    upsampled = torch.lerp(line[cell], line[cell + 1], beyond[:, None])
    expected = importance_aware_loss(upsampled, target.flatten(), FLAT)
    logits, labels = logits.to(device_of(backend)), target.to(device_of(backend))
    loss = importance_aware_loss(logits, labels, FLAT, upsample="bilinear", backend=backend)
    # In float64 eps is 2.2e-16. A sum of 33 000 terms loses two digits.
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-13, atol=0)
    nll = backends.get(backend).operators().pixel_nll(logits, labels, None, 255, 0.0, False)
    expected = F.cross_entropy(upsampled, target.flatten(), reduction="none", ignore_index=255)
    # Logits of up to 15 have an error of 1e-15 after the interpolation.
    torch.testing.assert_close(nll.cpu().flatten(), expected, rtol=1e-13, atol=1e-14)


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
    """4 GiB are reserved, but few pages are used, since the other strides are small."""
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

    rest = (target, None, None, FLAT.class_levels, 255, "exact", 0.1)
    stats = operators.reduce(logits, *rest, False, corners)
    assert torch.equal(stats, operators.reduce(dense, *rest, False, corners))
    expected = operators.reduce_backward(dense, grad_stats, *rest, corners)
    assert torch.equal(operators.reduce_backward(logits, grad_stats, *rest, corners), expected)
    options = (*rest, None, [], 1.0, "mean", "mean", "image", corners)
    expected_results = operators.loss_and_grad(dense, *options, torch.ones(2).double().to(device))
    results = operators.loss_and_grad(logits, *options, torch.ones(2).double().to(device))
    assert all(map(torch.equal, results, expected_results))
    nll_rest = (target, None, 255, 0.1, corners)
    nll = operators.pixel_nll(logits, *nll_rest)
    assert torch.equal(nll, operators.pixel_nll(dense, *nll_rest))
    expected_grad = operators.pixel_nll_backward(dense, nll, *nll_rest)
    assert torch.equal(operators.pixel_nll_backward(logits, nll, *nll_rest), expected_grad)
    if not upsampled:
        operators.reduce_backward_(logits, grad_stats, *rest)
        assert torch.equal(logits, expected)


# ---- one level ------------------------------------------------------------------------------------------

#: Full size and coarse, on several programs of a few tiles each.
SIZES = pytest.mark.parametrize(
    ("size", "pixels"),
    [((80, 320), (2, 80, 320)), ((4, 40), (2, 12, 100))],
    ids=["", "upsampled"],
)
FIVE = Hierarchy.flat(5)


def one_level(backend, size, pixels, dtype, smoothing=0.1, *, weighted=True):
    """The operators of a backend, logits, the arguments that the operators share, and align_corners."""
    device = device_of(backend)
    weight = torch.tensor([0.3, 1.0, 2.5, 0.0, 0.7], device=device) if weighted else None
    pixel_weight = torch.rand(pixels, generator=torch.Generator().manual_seed(3)).to(device)
    rest = (make_target(pixels, 5).to(device), weight, pixel_weight if weighted else None)
    logits = make_logits((2, 5, *size), dtype).to(device)
    corners = None if size == pixels[1:] else False
    return (
        backends.get(backend).operators(),
        logits,
        (*rest, FIVE.class_levels, 255, "exact", smoothing),
        corners,
    )


@pytest.fixture
def small_patches(monkeypatch):
    """Patches as small as on a GPU, so that a cell has several."""
    from ial_cuda.triton import upsample

    monkeypatch.setattr(upsample, "MAX_PATCH", ((4, 2), (2, 1)))


def double(*values, like):
    return torch.tensor(values, dtype=torch.float64, device=like.device)


@RUNS
@SIZES
@pytest.mark.parametrize(
    ("dtype", "smoothing"), [(torch.float64, 0.1), (torch.float32, 0.0), (torch.float16, 0.1)], ids=str
)
@pytest.mark.parametrize("given", ["mean", "sum", "divisor", "no weights"])
def test_one_pass_gives_the_gradient_of_two(backend, size, pixels, dtype, smoothing, given, small_patches):
    operators, logits, rest, corners = one_level(
        backend, size, pixels, dtype, smoothing, weighted=given != "no weights"
    )
    divisor = double(1234.5, like=logits)[0] if given == "divisor" else None
    options = ([], 1.0, "sum" if given == "sum" else "mean", "mean", "image")
    loss, factors, stats, grad_stats, grad, computed_for = operators.loss_and_grad(
        logits, *rest, divisor, *options, corners, double(0.4, 1, like=logits)
    )
    assert factors.shape == (2, 0) and computed_for.item() == 0.4
    expected = operators.reduce_backward(logits, grad_stats * 0.4, *rest, corners)
    assert torch.equal(grad, expected)

    sums = operators.reduce(logits, *rest, False, corners)
    assert (stats[..., 1:3] == 0).all() and torch.equal(stats[..., 3], sums[..., 3])
    # float32 sums of 10 000 pixels in another order: each has up to half an ulp, and some cancel.
    torch.testing.assert_close(stats[..., [0, 4]], sums[..., [0, 4]], rtol=1e-6, atol=0)
    # The loss and the gradient have the same divisor.
    divided = (stats[:, 0, 0].sum() * grad_stats[0, 0, 0]).to(loss.dtype)
    torch.testing.assert_close(loss, divided, rtol=2 * torch.finfo(loss.dtype).eps, atol=0)
    one = torch.ones_like(loss)
    expected = operators.combine_backward(sums, one, divisor, *options)
    torch.testing.assert_close(grad_stats, expected, rtol=1e-6, atol=0)


@RUNS
@SIZES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_rescale_computes_again_for_another_gradient_alone(backend, size, pixels, dtype, small_patches):
    operators, logits, rest, corners = one_level(backend, size, pixels, dtype)
    grad_stats = make_logits((2, 1, 5)).to(logits.device)
    computed_for = double(0.4, like=logits)[0]
    for incoming in (0.4, 1.0, float("nan")):
        grad_loss = double(incoming, like=logits)[0]
        grad = torch.full_like(logits, 7)
        operators.rescale_(grad, grad_loss, computed_for, logits, grad_stats, *rest, corners)
        expected = torch.full_like(logits, 7)
        if incoming != 0.4:
            expected = operators.reduce_backward(logits, grad_stats * grad_loss, *rest, corners)
        assert torch.equal(grad.isnan(), expected.isnan())
        assert torch.equal(grad.nan_to_num(), expected.nan_to_num())


@RUNS
@SIZES
def test_the_expected_gradient_is_the_last_two(backend, size, pixels):
    operators, logits, rest, corners = one_level(backend, size, pixels, torch.float32)
    grad_stats, grad = make_logits((2, 1, 5)).to(logits.device), torch.empty_like(logits)
    expected = double(1, 1, like=logits)
    inf, nan = float("inf"), float("nan")
    for incoming, then in (
        *[(0.5, 1), (0.25, 1), (0.5, 1), (0.5, 0.5)],
        *[(inf, 0.5), (inf, 0.5), (nan, 0.5), (nan, 0.5), (2, 0.5), (2, 2)],
    ):
        grad_loss = torch.tensor(incoming, device=logits.device)
        operators.rescale_(grad, grad_loss, expected.clone()[0], logits, grad_stats, *rest, corners, expected)
        assert expected[0].item() == then, incoming
        torch.testing.assert_close(expected[1].item(), float(incoming), rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def recorded(monkeypatch) -> list[str]:
    """The names of the kernels launched in a test."""
    from ial_cuda.triton import launch

    names, launch_kernel = [], launch.launch_kernel

    def record(kernel, *arguments, **constants):
        names.append(getattr(kernel, "fn", kernel).__name__)
        launch_kernel(kernel, *arguments, **constants)

    monkeypatch.setattr(launch, "launch_kernel", record)
    return names


@RUNS
@SIZES
@pytest.mark.parametrize("given", ["mean", "sum", "divisor"])
def test_launches_of_a_step(backend, size, pixels, given, recorded):
    upsampled = size != pixels[1:]
    logits = make_logits((2, 5, *size), torch.float32).to(device_of(backend)).requires_grad_()
    importance_aware_loss(
        logits,
        make_target(pixels, 5).to(device_of(backend)),
        FIVE,
        reduction="sum" if given == "sum" else "mean",
        divisor=10 if given == "divisor" else None,
        upsample="bilinear" if upsampled else None,
        backend=backend,
    ).backward()
    prefix = "upsampled_" * upsampled
    assert recorded == [
        *["weight_kernel"] * (given == "mean"),
        *[f"{prefix}one_pass_kernel", "sum_kernel", "combine_kernel"],
        *[f"{prefix}reduce_backward_kernel", *["add_halves_kernel"] * upsampled],  # these return at once
    ]


# ---- pixel_nll ------------------------------------------------------------------------------------------


@RUNS
@SIZES
@pytest.mark.parametrize(
    ("dtype", "smoothing"), [(torch.float64, 0.1), (torch.float32, 0.0), (torch.float16, 0.1)], ids=str
)
def test_pixel_nll_is_one_level_of_each_pixel(backend, size, pixels, dtype, smoothing, small_patches):
    operators, logits, rest, corners = one_level(backend, size, pixels, dtype, smoothing)
    target, weight, pixel_weight, *_ = rest
    nll = operators.pixel_nll(logits, target, weight, 255, smoothing, corners)
    upsampled = logits.double()
    if corners is not None:
        upsampled = F.interpolate(upsampled, pixels[1:], mode="bilinear")
    expected = F.cross_entropy(
        upsampled, target, weight.double(), reduction="none", ignore_index=255, label_smoothing=smoothing
    )
    # Logits of up to 15 with three roundings, in the interpolation and the softmax. F.interpolate rounds
    # positions of up to 40 in float64, times differences of up to 30. The largest weight is 2.5.
    rounding = 15 * 3 * torch.finfo(nll.dtype).eps + 40 * 30 * torch.finfo(torch.float64).eps
    torch.testing.assert_close(nll.double(), expected, rtol=0, atol=2.5 * rounding)

    grad = operators.pixel_nll_backward(logits, pixel_weight, target, weight, 255, smoothing, corners)
    grad_stats = double(1, 0, 0, 0, 0, like=logits).expand(2, 1, 5).contiguous()
    assert torch.equal(grad, operators.reduce_backward(logits, grad_stats, *rest, corners))


@RUNS
@SIZES
def test_launches_of_pixel_nll(backend, size, pixels, recorded):
    operators, logits, rest, corners = one_level(backend, size, pixels, torch.float32)
    operators.pixel_nll(logits.requires_grad_(), *rest[:2], 255, 0.1, corners).sum().backward()
    assert recorded == kernels_of_pixel_nll(corners is not None)
