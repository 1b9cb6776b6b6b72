"""Generates Inductor's code for the Triton operators. No GPU is needed.

python -m tests.inductor_triton prints the types and values of each launch's arguments as JSON, by case.
Tensors are fake, the GPU's properties are constants below, and the code is not run.
"""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import torch._inductor.scheduler
import triton
from torch._dynamo import device_interface
from torch._inductor.codecache import PyCodeCache
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import triton_helpers
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from ial_cuda import CITYSCAPES, backends

H100 = SimpleNamespace(
    name="NVIDIA H100",
    major=9,
    minor=0,
    warp_size=32,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=227 << 10,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
)
for module in (torch.cuda, device_interface.CudaInterface):
    module.get_device_properties = lambda *_: H100
for name in ("current_device", "_exchange_device", "_maybe_exchange_device"):
    setattr(
        torch.cuda, name, lambda *_: 0
    )  # a function for each name: Dynamo has a handler for each function
device_interface.caching_worker_device_properties["cuda"] = [H100]
torch._inductor.scheduler.has_triton = lambda: True
triton_helpers.set_driver_to_gpu = lambda: None
triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32)))


class Written(Exception):
    """Raised when Inductor has generated its code. The argument is the code."""


def stop(graph: GraphLowering) -> None:
    raise Written(graph.codegen()[0].value)


GraphLowering.compile_to_module = stop


def write(
    size: tuple[int, int], *, ratio: int | None, ignore_index: int, smoothing: float, dynamic: bool
) -> str:
    """Inductor's code for the operators of a step and of pixel_nll. With a ratio the logits are coarse."""
    operators = backends.get("triton").operators()
    align_corners = None if ratio is None else False
    options = (None, (0.5, 0.5, 0.5), 1.0, "mean", "mean", "image")

    def step(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rest = (target, None, None, CITYSCAPES.class_levels, ignore_index, "exact", smoothing)
        stats = operators.reduce(logits, *rest, False, align_corners)
        loss, _ = operators.combine(stats, *options, torch.float32)
        grad_stats = operators.combine_backward(stats, loss, *options)
        grad = operators.reduce_backward(logits, grad_stats, *rest, align_corners)
        nll_rest = (target, None, ignore_index, smoothing, align_corners)
        # Of the gradient, since Inductor reorders independent calls.
        nll = operators.pixel_nll(grad, *nll_rest)
        return loss, operators.pixel_nll_backward(grad, nll, *nll_rest)

    torch._dynamo.reset()
    with (
        FakeTensorMode(),
        torch.no_grad(),
        torch._inductor.config.patch(compile_threads=1, force_disable_caches=True),
    ):
        logits = torch.empty(2, 19, *size, device="cuda")
        labels = tuple((ratio or 1) * length for length in size)
        target = torch.empty(2, *labels, dtype=torch.uint8, device="cuda")
        try:
            torch.compile(step, fullgraph=True, dynamic=dynamic)(logits, target)
        except torch._dynamo.exc.TorchDynamoException as error:
            if isinstance(error.inner_exception, Written):
                return error.inner_exception.args[0]
            raise
    raise AssertionError("Inductor has written nothing")


def kernels(code: str) -> dict[str, str]:
    """The source of each of this package's kernels in the code."""
    return dict(
        re.findall(r"^(\w+_kernel_\d+) = async_compile.triton\('\w+', '''(.*?)^'''", code, re.M | re.S)
    )


def plain(name: str) -> str:
    """The name without Inductor's number."""
    return re.sub(r"_\d+$", "", name)


def arguments(code: str) -> list[dict[str, Any]]:
    """The kernels that the code launches in order, the types in their signatures, and the values passed."""
    sources, launched = kernels(code), []
    for name, values in re.findall(r"(\w+_kernel_\d+)\.run\((.*), stream=", code):
        types = ast.literal_eval(re.search(r"'signature': (\{.*?\})", sources[name])[1])
        launched.append({"kernel": plain(name), "types": types, "values": values})
    return launched


def compile_kernels(code: str) -> None:
    """Compiles to machine code. Inductor copies the kernels' sources and must not omit what they use."""
    for name, source in kernels(code).items():
        getattr(PyCodeCache.load(source), plain(name)).precompile(warm_cache_only=True)


def main() -> None:
    results = {}
    for huge, ratio, dynamic in itertools.product((False, True), (None, 2), (False, True)):
        size = (32, 64) if not huge else (46400, 46400) if ratio is None else (12000, 12000)
        case = ["huge" if huge else "small", *["upsampled"] * (ratio is not None), *["dynamic"] * dynamic]
        ignore_index = -(2**40) if huge else 255
        # A float among the constants, 0 or not.
        smoothing = 0.0 if ratio is None else 0.1
        code = write(size, ratio=ratio, ignore_index=ignore_index, smoothing=smoothing, dynamic=dynamic)
        results[" ".join(case)] = arguments(code)
        if not huge and not dynamic:
            compile_kernels(code)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
