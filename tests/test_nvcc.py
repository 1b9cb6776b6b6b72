"""The machine code that nvcc generates for the CUDA kernels. No GPU is needed."""

from __future__ import annotations

import functools
import math
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

#: Mangled, with the number of pixels of a tile for many classes. With up to 24 classes a tile has four.
DTYPES = {"f": 2, "6__half": 4, "13__nv_bfloat16": 4}


def instance(kernel: str, template: str, dtype: str, *numbers: int, smooth: bool = False) -> str:
    """The start of the mangled name of a kernel instance, template<dtype, *numbers, smooth>."""
    name = f"{kernel}_kernel"
    parameters = "".join(f"Li{number}E" for number in numbers) + f"Lb{smooth:d}E"
    return f"_ZN3ial3gpu{len(name)}{name}INS0_{len(template)}{template}I{dtype}{parameters}EE"


def cuobjdump(*arguments: str) -> str:
    """The output of cuobjdump, from the CUDA toolkit or from Triton, for the extension."""
    path = shutil.which("cuobjdump")
    if path is None:
        triton = pytest.importorskip("triton", reason="cuobjdump is neither on PATH nor in Triton")
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if not path.exists():
            pytest.skip("cuobjdump is neither on PATH nor in Triton")
    command = [path, *arguments, extension.module.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def tiles(kernel: str) -> Iterator[str]:
    """All instances of a kernel that works on tiles."""
    for dtype, vector in DTYPES.items():
        for classes in (11, 19, 24):
            yield instance(kernel, "Tile", dtype, 4, classes)
        for smooth in (False, True):
            yield instance(kernel, "Tile", dtype, vector, 32, smooth=smooth)
    if kernel != "cooperative":
        for dtype in ("d", *DTYPES):
            for smooth in (False, True):
                yield instance(kernel, "Tile", dtype, 1, 32, smooth=smooth)


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
        "pixel_nll",
        "pixel_nll_backward",
    ],
)
def test_operators_have_a_cuda_kernel(operator):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ial_cuda::{operator}", "CUDA")


@functools.cache
def resources() -> dict[str, dict[str, str]]:
    """The line of ptxas for each kernel, by architecture."""
    found: dict[str, dict[str, str]] = {}
    for image in cuobjdump("-res-usage").split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = (\w+)", image).group(1)
        found.setdefault(arch, {}).update(re.findall(r"Function (\S+):\s*(REG:.*)", image))
    assert found
    return found


def only(usage: dict[str, str], beginning: str) -> tuple[str, str]:
    (found,) = [(name, line) for name, line in usage.items() if name.startswith(beginning)]
    return found


def test_no_spills():
    """ptxas spills to the stack. Without a frame, tiles of every dtype and class count are in registers."""
    for arch, usage in resources().items():
        for kernel in ("reduce", "reduce_backward", "pixel_nll", "one_pass", "cooperative"):
            for tile in tiles(kernel):
                _, line = only(usage, tile)
                assert " STACK:0 " in line and " LOCAL:0 " in line, f"{arch}: {tile}: {line}"
        others = [line for name, line in usage.items() if "4Tile" not in name]
        assert len(others) >= 5 and all(" STACK:0 " in line for line in others)


@pytest.mark.parametrize("kernel", ["reduce", "reduce_backward", "pixel_nll", "one_pass"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_warps_of_a_multiprocessor(kernel, dtype):
    """For the 19 classes of Cityscapes: three blocks of float, four of half precision, five of it on sm_90.

    A thread gets registers in multiples of 8.
    """
    for arch, usage in resources().items():
        _, line = only(usage, instance(kernel, "Tile", dtype, 4, 19))
        registers = math.ceil(int(re.search(r"REG:(\d+)", line).group(1)) / 8) * 8
        half = 5 if arch == "sm_90" else 4
        assert 65536 // (128 * registers) >= (3 if dtype == "f" else half), f"{arch}: {line}"


UPSAMPLING = [
    "reduce_upsampled",
    "reduce_backward_upsampled",
    "pixel_nll_upsampled",
    "one_pass_upsampled",
]
CHUNKS = [
    *((dtype, side, False) for dtype in DTYPES for side in (2, 4)),
    *((dtype, 2, True) for dtype in DTYPES),
]


@pytest.mark.parametrize("kernel", UPSAMPLING)
@pytest.mark.parametrize(("dtype", "side", "smooth"), [("d", 2, False), *CHUNKS], ids=str)
def test_upsampling_keeps_its_pixels_in_registers(kernel, dtype, side, smooth):
    """For 16 warps on a multiprocessor."""
    for arch, usage in resources().items():
        _, line = only(usage, instance(kernel, "Chunk", dtype, side, smooth=smooth))
        assert " STACK:0 " in line and " LOCAL:0 " in line, f"{arch}: {line}"
        assert 16 * 32 * int(re.search(r"REG:(\d+)", line).group(1)) <= 65536, f"{arch}: {line}"


def machine_code(kernel: str, dtype: str) -> str:
    usage = next(iter(resources().values()))
    name, _ = only(usage, instance(kernel, "Tile", dtype, 4, 19))
    return cuobjdump("-sass", "-fun", name)


#: The bits of a vector: four pixels.
BITS = {"f": 128, "13__nv_bfloat16": 64}


@pytest.mark.parametrize("kernel", ["reduce_backward", "one_pass", "cooperative"])
@pytest.mark.parametrize(("dtype", "bits"), BITS.items())
def test_four_pixels_a_load_and_a_store(kernel, dtype, bits):
    code = machine_code(kernel, dtype)
    architectures = code.count("Function :")
    loads = re.findall(rf"\bLDG?\.\S*\b{bits}\b", code)
    stores = re.findall(rf"\bSTG\.\S*\b{bits}\b", code)
    assert len(loads) >= 19 * architectures and len(stores) >= 19 * architectures
    if kernel == "reduce_backward":  # the other kernels write sums too
        of_expected = 2 * architectures * (bits != 64)  # two doubles, each of 64 bits
        assert len(stores) + of_expected == len(re.findall(r"\bSTG\.", code)), "a narrower store"


def count(kernel: str, dtype: str, access: str, bits: int) -> int:
    """The instructions in all architectures that access so many bits, but not past L1."""
    return len(re.findall(rf"\b{access}\.{bits}(?!\.STRONG)", machine_code(kernel, dtype)))


@pytest.mark.parametrize(("dtype", "bits"), BITS.items())
def test_one_pass_reads_and_writes_once(dtype, bits):
    """As many vectors of logits as in reduce, one for each class of a tile, and as many of the gradient as in
    reduce_backward. The other wide loads are labels, sums past L1, and the divisor and `expected`."""
    doubles = 2 * machine_code("one_pass", dtype).count("Function :") if bits == 64 else 0
    assert count("one_pass", dtype, r"LDG\.E", bits) == count("reduce", dtype, r"LDG\.E", bits) + doubles > 0
    stores = count("one_pass", dtype, r"STG\.E\.EF", bits)
    assert stores == count("reduce_backward", dtype, r"STG\.E\.EF", bits) > 0


@pytest.mark.parametrize(("dtype", "bits"), BITS.items())
def test_pixel_nll_reads_and_writes_once(dtype, bits):
    """Each class of a tile is loaded once, and its four pixels are stored together, in float. The other store
    is that of a bad label."""
    code = machine_code("pixel_nll", dtype)
    architectures = code.count("Function :")
    loads = count("pixel_nll", dtype, r"LDG\.E", bits)
    assert 19 * architectures <= loads < 2 * 19 * architectures
    assert len(re.findall(r"\bSTG\.E\.EF\.128\b", code)) == architectures
    assert len(re.findall(r"\bSTG\.", code)) == 2 * architectures


@pytest.mark.parametrize("dtype", ["f", "13__nv_bfloat16"])
def test_what_is_in_shared_memory_is_addressed_as_shared(dtype):
    """There are no generic loads and stores, which determine the address space at run time."""
    code = machine_code("one_pass", dtype)
    assert re.search(r"\bLDS\.", code) and re.search(r"\bSTS\b", code)
    assert not re.search(r"\b(LD|ST)\.", code)


@pytest.mark.parametrize("kernel", ["reduce_backward", "one_pass"])
@pytest.mark.parametrize("dtype", ["d", *DTYPES])
def test_a_pixel_is_stored_to_shared_memory_too(kernel, dtype):
    """This is for adjacent channels. STG, a store to global memory, must not be the only store."""
    usage = next(iter(resources().values()))
    name, _ = only(usage, instance(kernel, "Tile", dtype, 1, 32))
    code = cuobjdump("-sass", "-fun", name)
    assert len(re.findall(r"\bST\.", code)) >= 32 * code.count("Function :")


@pytest.mark.parametrize("kernel", UPSAMPLING)
@pytest.mark.parametrize(("dtype", "side", "smooth"), CHUNKS, ids=str)
def test_octaves_are_rounded_before_they_are_used(kernel, dtype, side, smooth):
    """If log2(e) x were contracted with an addition in one place only, it would have two values."""
    usage = next(iter(resources().values()))
    name, _ = only(usage, instance(kernel, "Chunk", dtype, side, smooth=smooth))
    uses = re.findall(r"\b(F\w+)[^;]*\b1\.4426950", cuobjdump("-sass", "-fun", name))
    assert len(uses) >= 4 and set(uses) == {"FMUL"}


def test_sums_of_other_blocks_are_read_past_l1():
    """L1 may hold values from before the grid barrier."""
    assert "LDG.E.64.STRONG.GPU" in machine_code("cooperative", "13__nv_bfloat16")
