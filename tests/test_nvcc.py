"""The machine code of the CUDA kernels, where nvcc has compiled them; no GPU is needed to read it."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ial_cuda import backends, extension

if backends.get("cuda").missing is not None:
    pytest.skip(f"no CUDA kernels: {backends.get('cuda').missing}", allow_module_level=True)

pytestmark = pytest.mark.backends("cuda_two_launches", "cuda_one_launch")

DTYPES = {"f": 4, "6__half": 8, "13__nv_bfloat16": 8}  # as g++ mangles them: pixels of a tile
KERNELS = {"reduce": "13reduce_kernel", "gradient": "15gradient_kernel", "fused": "12fused_kernel"}


def cuobjdump(*arguments: str) -> str:
    """What the CUDA toolkit's disassembler, or the one that Triton brings, says about the extension."""
    path = shutil.which("cuobjdump")
    if path is None:
        triton = pytest.importorskip("triton", reason="cuobjdump is neither on PATH nor in Triton")
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if not path.exists():
            pytest.skip("cuobjdump is neither on PATH nor in Triton")
    command = [path, *arguments, extension.module.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def tiles(kernel: str) -> Iterator[str]:
    """The beginnings of the mangled names of a kernel's instances."""

    def name(dtype: str, pixels: int, classes: int) -> str:
        return f"_ZN3ial3gpu{KERNELS[kernel]}INS0_4TileI{dtype}Li{pixels}ELi{classes}EE"

    for dtype, vector in DTYPES.items():
        for classes in (11, 19, 24):
            yield name(dtype, vector, classes)
        yield name(dtype, vector // 2, 32)
    if kernel != "fused":
        for dtype in ("d", *DTYPES):
            yield name(dtype, 1, 32)


@pytest.mark.parametrize(
    "operator",
    [
        "reduce",
        "reduce_backward",
        "reduce_backward_",
        "combine",
        "combine_backward",
        "loss_and_grad",
        "rescale_",
        "fits_on_chip",
    ],
)
def test_operators_have_a_cuda_kernel(operator):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ial_cuda::{operator}", "CUDA")


@functools.cache
def resources() -> dict[str, dict[str, str]]:
    """For each architecture, ptxas' line on each kernel."""
    found: dict[str, dict[str, str]] = {}
    for image in cuobjdump("-res-usage").split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = (\w+)", image).group(1)
        found.setdefault(arch, {}).update(re.findall(r"Function (\S+):\s*(REG:.*)", image))
    assert found
    return found


def only(usage: dict[str, str], tile: str) -> tuple[str, str]:
    (found,) = [(name, line) for name, line in usage.items() if name.startswith(tile)]
    return found


def test_no_spills():
    """ptxas spills to the stack: with no frame, every dtype and class count of a tile is in registers."""
    for arch, usage in resources().items():
        for kernel in KERNELS:
            for tile in tiles(kernel):
                _, line = only(usage, tile)
                assert " STACK:0 " in line and " LOCAL:0 " in line, f"{arch}: {tile}: {line}"
        others = [line for name, line in usage.items() if "4Tile" not in name]
        assert len(others) >= 5 and all(" STACK:0 " in line for line in others)


@pytest.mark.parametrize("kernel", ["reduce", "gradient"])
def test_three_blocks_on_a_multiprocessor(kernel):
    """What the predictions of benchmarks/README.md count on, for the 19 classes of Cityscapes."""
    for arch, usage in resources().items():
        for dtype, vector in DTYPES.items():
            _, line = only(usage, f"_ZN3ial3gpu{KERNELS[kernel]}INS0_4TileI{dtype}Li{vector}ELi19EE")
            registers = int(re.search(r"REG:(\d+)", line).group(1))
            assert 3 * 128 * registers <= 65536, f"{arch}: {line}"


@pytest.mark.parametrize("kernel", ["23reduce_upsampled_kernel", "25gradient_upsampled_kernel"])
@pytest.mark.parametrize(
    ("dtype", "side"), [("d", 2), *((dtype, side) for dtype in DTYPES for side in (2, 4))], ids=str
)
def test_upsampling_keeps_its_pixels_in_registers(kernel, dtype, side):
    """Of 16 warps on a multiprocessor."""
    for arch, usage in resources().items():
        _, line = only(usage, f"_ZN3ial3gpu{kernel}INS0_5ChunkI{dtype}Li{side}EE")
        assert " STACK:0 " in line and " LOCAL:0 " in line, f"{arch}: {line}"
        assert 16 * 32 * int(re.search(r"REG:(\d+)", line).group(1)) <= 65536, f"{arch}: {line}"


def machine_code(kernel: str, dtype: str) -> str:
    usage = next(iter(resources().values()))
    name, _ = only(usage, f"_ZN3ial3gpu{KERNELS[kernel]}INS0_4TileI{dtype}Li{DTYPES[dtype]}ELi19EE")
    return cuobjdump("-sass", "-fun", name)


@pytest.mark.parametrize("kernel", ["gradient", "fused"])
@pytest.mark.parametrize("dtype", ["f", "13__nv_bfloat16"])
def test_sixteen_bytes_a_load_and_a_store(kernel, dtype):
    code = machine_code(kernel, dtype)
    architectures = code.count("Function :")
    loads = re.findall(r"\bLDG?\.\S*\b128\b", code)
    stores = re.findall(r"\bSTG\.\S*\b128\b", code)
    assert len(loads) >= 19 * architectures and len(stores) >= 19 * architectures
    if kernel == "gradient":  # the other writes sums too
        assert len(stores) == len(re.findall(r"\bSTG\.", code)), "a store that is narrower"


@pytest.mark.parametrize("dtype", ["d", *DTYPES])
def test_a_pixel_is_stored_to_shared_memory_too(dtype):
    """Where its channels lie side by side: STG, a store to global memory, must not be the only one."""
    usage = next(iter(resources().values()))
    name, _ = only(usage, f"_ZN3ial3gpu{KERNELS['gradient']}INS0_4TileI{dtype}Li1ELi32EE")
    code = cuobjdump("-sass", "-fun", name)
    assert len(re.findall(r"\bST\.", code)) >= 32 * code.count("Function :")


@pytest.mark.parametrize("kernel", ["23reduce_upsampled_kernel", "25gradient_upsampled_kernel"])
@pytest.mark.parametrize(("dtype", "side"), [(dtype, side) for dtype in DTYPES for side in (2, 4)], ids=str)
def test_octaves_are_rounded_before_they_are_used(kernel, dtype, side):
    """log2(e) x, merged with an addition in one place and not in another, is no longer one number."""
    usage = next(iter(resources().values()))
    name, _ = only(usage, f"_ZN3ial3gpu{kernel}INS0_5ChunkI{dtype}Li{side}EE")
    uses = re.findall(r"\b(F\w+)[^;]*\b1\.4426950", cuobjdump("-sass", "-fun", name))
    assert len(uses) >= 4 and set(uses) == {"FMUL"}


def test_sums_of_other_blocks_are_read_past_l1():
    """L1 may hold what was there before the grid's barrier."""
    assert "LDG.E.64.STRONG.GPU" in machine_code("fused", "13__nv_bfloat16")
