"""Kernels that call helpers of the Triton kernels. Triton looks up names in the module of a kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from ial_cuda.triton.kernels import num_tiles


@triton.jit
def tiles_kernel(tiles_ptr, P, SIZE: tl.constexpr):
    tl.store(tiles_ptr, num_tiles(P, SIZE))
