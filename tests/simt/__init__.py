"""Backends "simt" and "simt_fused": the CUDA kernels and their launches, compiled for the CPU by g++."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from ial_cuda import _ops

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SANITIZED = bool(os.environ.get("IAL_SIMT_SANITIZE"))


@functools.cache
def load() -> None:
    """Compiles the library where its sources have changed, and loads it."""
    if sys.platform != "linux" or shutil.which(cpp_extension.get_cxx_compiler()) is None:
        pytest.skip("simt: no C++ compiler")
    ninja = pytest.importorskip("ninja")
    os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ["PATH"]])
    name = "ial_simt_sanitized" if SANITIZED else "ial_simt"
    build = ROOT / "build" / f"{name}-torch-{torch.__version__}"
    build.mkdir(parents=True, exist_ok=True)
    flags = ["-O1", "-g0", "-fvisibility=hidden", "-DIAL_LIBRARY=ial_simt", "-Wno-unknown-pragmas"]
    sanitizers = []
    if SANITIZED:  # what address finds anyway takes undefined long to compile
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
        sanitizers += ["-fno-sanitize=null,object-size,vptr"]
    cpp_extension.load(
        name=name,
        sources=[str(ROOT / "csrc" / "ial_ops.cpp"), str(HERE / "simt.cpp")],
        extra_include_paths=[str(ROOT / "csrc"), str(HERE)],
        extra_cflags=flags + sanitizers,
        extra_ldflags=sanitizers,
        build_directory=str(build),
        is_python_module=False,
        with_cuda=False,
    )


def sanitizer_library(name: str) -> str:
    """The runtime of a sanitizer, which must be loaded before Python; skips where the compiler has none."""
    command = [cpp_extension.get_cxx_compiler(), f"-print-file-name=lib{name}.so"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(path):
        pytest.skip(f"simt: the compiler has no lib{name}.so")
    return os.path.realpath(path)


def register() -> None:
    """Makes them backends of the loss, for tensors on the CPU; `load` must come before their first use."""
    for name in ("simt", "simt_fused"):
        _ops.unavailable[name] = None
        _ops.libraries[name] = "ial_simt"
        _ops.preference["cpu"] += (name,)
    _ops.one_launch["simt"] = "simt_fused"
