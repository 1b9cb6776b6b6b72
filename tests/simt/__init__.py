"""Backends "simt" and "simt_one_launch": the CUDA kernels and launches, compiled for the CPU by g++."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from ial_cuda import backends

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: Which build of the library this process loads. A key of `_FLAGS`.
BUILD = os.environ.get("IAL_SIMT_BUILD", "plain")
SANITIZED = BUILD == "sanitized"
_FMA = ["-mfma"] if platform.machine() in ("x86_64", "AMD64") else []  # always on with other processors
_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
#: For each build, the flags of the compiler and those of the linker.
_FLAGS = {
    "plain": (["-O1"], []),
    # these checks of UBSan are slow to compile, and ASan finds the same errors
    "sanitized": (["-O1", *_SANITIZERS, "-fno-sanitize=null,object-size,pointer-overflow,vptr"], _SANITIZERS),
    # contracts products with additions, like nvcc; g++ does this from -O2 on
    "contracted": (["-O2", *_FMA, "-ffp-contract=fast"], []),
}


@functools.cache
def load() -> None:
    """Compiles the library if its sources have changed, and loads it."""
    if sys.platform != "linux" or shutil.which(cpp_extension.get_cxx_compiler()) is None:
        pytest.skip("simt: no C++ compiler")
    ninja = pytest.importorskip("ninja")
    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ["PATH"]])
    name = f"ial_simt_{BUILD}"
    build = ROOT / "build" / f"{name}-torch-{torch.__version__}"
    build.mkdir(parents=True, exist_ok=True)
    compiler_flags, linker_flags = _FLAGS[BUILD]
    common = ["-g0", "-fvisibility=hidden", "-DIAL_LIBRARY=ial_simt", "-Wno-unknown-pragmas"]
    cpp_extension.load(
        name=name,
        sources=[
            *(str(ROOT / "csrc" / name) for name in ("inputs.cpp", "library.cpp")),
            str(HERE / "simt.cpp"),
        ],
        extra_include_paths=[str(HERE)],
        extra_cflags=common + compiler_flags,
        extra_ldflags=linker_flags,
        build_directory=str(build),
        is_python_module=False,
        with_cuda=False,
    )


def sanitizer_library(name: str) -> str:
    """The path of a sanitizer's runtime, to be loaded before Python. Skips if the compiler has none."""
    command = [cpp_extension.get_cxx_compiler(), f"-print-file-name=lib{name}.so"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(path):
        pytest.skip(f"simt: the compiler has no lib{name}.so")
    return os.path.realpath(path)


@contextlib.contextmanager
def device(multiprocessors: int, l2_bytes: int, shared_bytes: int) -> Iterator[None]:
    """Replaces the emulated device inside the context."""
    before = torch.ops.ial_simt.set_device(multiprocessors, l2_bytes, shared_bytes)
    try:
        yield
    finally:
        torch.ops.ial_simt.set_device(*before)


def launches() -> int:
    """The number of kernels launched since the last call."""
    return torch.ops.ial_simt.launches()


def register() -> None:
    """Registers both as backends of the loss for CPU tensors. Call `load` before their first use."""
    for name, one_launch in (("simt", False), ("simt_one_launch", True)):
        backends.register(backends.Backend(name, ("cpu",), "ial_simt", one_launch=one_launch))
