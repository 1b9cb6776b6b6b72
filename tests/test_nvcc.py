"""The machine code of the CUDA kernels, where nvcc has compiled them; no GPU is needed to read it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ial_cuda import _ops

if _ops.unavailable["cuda"] is not None:
    pytest.skip(f"no CUDA kernels: {_ops.unavailable['cuda']}", allow_module_level=True)

DTYPES = {"d": 2, "f": 4, "6__half": 8, "13__nv_bfloat16": 8}  # as g++ mangles them: pixels of a tile


def cuobjdump(*arguments: str) -> str:
    """What the CUDA toolkit's disassembler, or the one that Triton brings, says about the extension."""
    path = shutil.which("cuobjdump")
    if path is None:
        triton = pytest.importorskip("triton", reason="cuobjdump is neither on PATH nor in Triton")
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if not path.exists():
            pytest.skip("cuobjdump is neither on PATH nor in Triton")
    command = [path, *arguments, _ops._C.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def tiles(kernel: str) -> Iterator[str]:
    """The beginnings of the mangled names of a kernel's instances."""
    for dtype, vector in DTYPES.items():
        wide = [(vector, count) for count in range(4, 25, 4)]
        for pixels, classes in {(1, 8), (1, 32), (vector // 2, 32), *wide}:
            yield f"_ZN3ial3gpu{kernel}INS0_4TileI{dtype}Li{pixels}ELi{classes}EE"


@pytest.mark.parametrize("operator", ["reduce", "gradient", "gradient_", "combine", "table"])
def test_operators_have_a_cuda_kernel(operator):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ial_cuda::{operator}", "CUDA")


def test_no_spills():
    """ptxas spills to the stack: with no frame, every dtype and class count of a tile is in registers."""
    report = cuobjdump("-res-usage")
    images = report.split("Fatbin elf code:")[1:]
    assert images
    for image in images:
        arch = re.search(r"arch = (\w+)", image).group(1)
        usage = dict(re.findall(r"Function (\S+):\s*(REG:.*)", image))
        for kernel in ("13reduce_kernel", "15gradient_kernel"):
            for tile in tiles(kernel):
                (line,) = [line for name, line in usage.items() if name.startswith(tile)]
                assert " STACK:0 " in line and " LOCAL:0 " in line, f"{arch}: {tile}: {line}"
        others = [line for name, line in usage.items() if "Tile" not in name]
        assert len(others) >= 5 and all(" STACK:0 " in line for line in others)


@pytest.mark.parametrize("dtype", ["f", "13__nv_bfloat16"])
def test_gradient_reads_and_writes_sixteen_bytes(dtype):
    (name,) = {
        name
        for name in re.findall(r"Function (\S+):", cuobjdump("-res-usage"))
        if name.startswith(f"_ZN3ial3gpu15gradient_kernelINS0_4TileI{dtype}Li{DTYPES[dtype]}ELi20EE")
    }
    code = cuobjdump("-sass", "-fun", name)
    # the logits are read twice: a second time, class by class, where more of them take turns
    for load_or_store, least in (("LDG", 20), ("STG", 20)):
        wide = re.findall(rf"\b{load_or_store}\.\S*\b128\b", code)
        assert len(wide) >= least, load_or_store
    assert not re.findall(r"\bSTG\.(?!\S*128)", code), "a store that is narrower"
