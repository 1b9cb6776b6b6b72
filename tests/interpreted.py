"""Backend "triton" without a GPU: Triton's interpreter runs the kernels in NumPy, on CPU tensors.

Import this before Triton, which reads the variable when a kernel is decorated.
"""

from __future__ import annotations

import inspect
import os
from dataclasses import replace

import numpy as np
import torch
from torch.torch_version import TorchVersion

from ial_cuda import backends

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and backends.get("triton").missing is None

#: Why the interpreter cannot run here. Triton 3.6 converts an array of one element to an int.
problem = None
if INTERPRETED:
    import triton

    if TorchVersion(triton.__version__) < (3, 7) and TorchVersion(np.__version__) >= (2, 4):
        problem = f"Triton 3.6's interpreter needs numpy < 2.4, not {np.__version__}"


def register() -> None:
    """Registers "triton" as a backend for CPU tensors, run by the interpreter."""
    if INTERPRETED:
        backends.register(replace(backends.get("triton"), devices=("cpu",)))
        _patch_once()
        _round_fma_once()


def _patch_once() -> None:
    """Makes the interpreter faster.

    Each call of a helper searches triton.language for functions to replace, which takes half of the time. The
    launch of the kernel has already replaced them all, so checking one of them is enough.
    """
    from triton import language
    from triton.runtime import interpreter

    replace, samples = interpreter._patch_builtin, {}

    def replace_once(package, *rest):
        if package not in samples:
            names = (name for name, member in inspect.getmembers(package) if language.core.is_builtin(member))
            samples[package] = next(names, None)
        sample = samples[package]
        if sample is not None and language.core.is_builtin(getattr(package, sample)):
            replace(package, *rest)

    interpreter._patch_builtin = replace_once


def _round_fma_once() -> None:
    """Replaces the interpreter's fma, which has two steps. A fused multiply-add rounds once at the end."""
    from triton.runtime import interpreter

    def create_fma(self, x, y, z):
        wide = np.float64 if z.data.dtype == np.float32 else np.longdouble
        with np.errstate(over="ignore", invalid="ignore"):
            result = (x.data.astype(wide) * y.data + z.data).astype(z.data.dtype)
        return interpreter.TensorHandle(result, z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma
