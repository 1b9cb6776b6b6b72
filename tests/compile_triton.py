"""Compiles the Triton kernels that the operators launch. No GPU is needed.

python -m tests.compile_triton prints registers, spills and wide accesses as JSON, by "target: kernel: case",
and what torch.compile takes the kernel to write. It is a separate process because kernels in the interpreter
cannot be compiled.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from torch._higher_order_ops.triton_kernel_wrap import get_mutated_tensors, kernel_side_table
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import mangle_type

from ial_cuda.triton import launch, operators

NVIDIA = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32)}
AMD = {"gfx942": GPUTarget("hip", "gfx942", 64)}
FLAT = (64, 64)
triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: NVIDIA["sm_90"]))
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


def record() -> list[Launch]:
    """A list that receives the launches from now on."""
    seen: list[Launch] = []
    launch.launch_kernel = lambda kernel, like, grid, *arguments, **constants: seen.append(
        (kernel, arguments, constants)
    )
    return seen


def pixels_of(logits: torch.Tensor, ratio: int | None) -> tuple[tuple[int, ...], bool | None]:
    """The shape of the target, and align_corners."""
    spatial = logits.shape[2:] if ratio is None else tuple(ratio * size for size in logits.shape[2:])
    return (logits.shape[0], *spatial), None if ratio is None else False


def launches(
    logits: torch.Tensor,
    ratio: int | None = None,
    *,
    levels: int = 4,
    smoothing: float = 0.0,
    pixel_weights: bool = True,
) -> list[Launch]:
    """The launches of a step of the loss, with class weights. With a ratio, logits are coarse."""
    classes = logits.shape[1]
    pixels, align_corners = pixels_of(logits, ratio)
    target = logits.new_empty(pixels, dtype=torch.uint8)
    weights = [logits.new_empty(size, dtype=torch.float32) for size in (classes, pixels)]
    if not pixel_weights:
        weights[1] = None
    rest = (target, *weights, [c % levels for c in range(classes)], 255, "exact", smoothing)
    options = (None, [0.5, 0.25, 0.5][: levels - 1], 1.0, "mean", "mean", "image")
    seen = record()
    expected = logits.new_empty(2, dtype=torch.float64)
    loss, _, stats, grad_stats, grad, computed_for = operators.loss_and_grad(
        logits, *rest, *options, align_corners, expected
    )
    if grad.numel() > 0:
        incoming = (loss, computed_for, logits, grad_stats)
        operators.rescale_(grad, *incoming, *rest, align_corners, expected)
    else:
        grad_stats = operators.combine_backward(stats, loss, *options)
        operators.reduce_backward(logits, grad_stats, *rest, align_corners)
    return seen


def nll_launches(
    logits: torch.Tensor,
    labels: torch.dtype,
    ratio: int | None = None,
    *,
    smoothing: float = 0.0,
    class_weights: bool = True,
) -> list[Launch]:
    """The launches of pixel_nll and its backward. With a ratio, logits are coarse."""
    pixels, align_corners = pixels_of(logits, ratio)
    weight = logits.new_empty(logits.shape[1], dtype=torch.float32) if class_weights else None
    rest = (logits.new_empty(pixels, dtype=labels), weight, 255, smoothing, align_corners)
    seen = record()
    operators.pixel_nll_backward(logits, operators.pixel_nll(logits, *rest), *rest)
    return seen


def sources(launched: Launch, target: GPUTarget) -> Iterator[tuple[str, ASTSource, dict[str, int]]]:
    """The kernel of a launch in each of its configurations, specialised for the arguments like in Triton."""
    kernel, arguments, constants = launched
    configs = [triton.Config({})]
    if isinstance(kernel, Autotuner):
        kernel, configs = kernel.fn, kernel.configs
    for config in configs:
        values = constants | config.kwargs
        signature, fixed, attributes = {}, {}, {}
        for i, name in enumerate(kernel.arg_names):
            value = arguments[i] if i < len(arguments) else values[name]
            if i >= len(arguments) or value is None or (isinstance(value, int) and value == 1):
                signature[name], fixed[(i,)] = "constexpr", value
                continue
            signature[name] = mangle_type(value)
            if isinstance(value, torch.Tensor) or value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        options = {"num_warps": config.num_warps}
        if config.maxnreg:
            options = {"num_warps": config.kwargs["THREADS"] // target.warp_size}
            if target.backend == "cuda":
                options["maxnreg"] = config.maxnreg
        yield (
            " ".join([kernel.__name__, *map(str, config.kwargs.values())]),
            ASTSource(kernel, signature, fixed, attributes),
            options,
        )


def written(launched: Launch) -> list[str]:
    """The tensors that torch.compile takes a launch to write."""
    kernel, arguments, constants = launched
    given = dict(zip(kernel.arg_names, arguments, strict=False))
    tables = kernel_side_table.add_kernel(kernel), kernel_side_table.add_constant_args(constants)
    return sorted(get_mutated_tensors(*tables, given, {}))


def examine(source: ASTSource, target: GPUTarget, options: dict[str, int]) -> dict[str, Any]:
    compiled = triton.compile(source, target=target, options=options)
    if target.backend == "hip":
        spills = re.findall(r"_spill_count:\s+(\d+)", compiled.asm["amdgcn"])
        return {"spills": sum(map(int, spills))}
    ptx = compiled.asm["ptx"]
    arch = re.search(r"\.target (\w+)", ptx)[1]
    command = [get_ptxas(target.arch).path, "-v", f"--gpu-name={arch}", "-o", os.devnull, "-"]
    report = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    return {
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spills": sum(map(int, spilled.groups())),
        "wide loads": len(re.findall(r"\bld\.global\.\S*v4\.[bf]32|\bld\.global\.\S*v2\.[bf]64", ptx)),
        "wide stores": len(re.findall(r"\bst\.global\.\S*v4\.[bf]32|\bst\.global\.\S*v2\.[bf]64", ptx)),
        "stores": len(re.findall(r"\bst\.global\.", ptx)),
    }


def cases() -> Iterator[tuple[str, list[Launch], dict[str, GPUTarget]]]:
    bfloat16, hopper = torch.bfloat16, {"sm_90": NVIDIA["sm_90"]}
    for dtype in (bfloat16, torch.float32):
        logits = torch.empty((2, 19, *FLAT), dtype=dtype)
        yield f"{dtype} C=19", launches(logits), NVIDIA | AMD
        yield f"{dtype} C=19 smooth", launches(logits, smoothing=0.1), hopper
        yield f"{dtype} C=19 class weights", launches(logits, pixel_weights=False), hopper
        yield f"{dtype} C=19 one level", launches(logits, levels=1), NVIDIA | AMD
        yield f"{dtype} C=19 one level smooth", launches(logits, levels=1, smoothing=0.1), hopper
    for dtype in (bfloat16, torch.float32, torch.float16, torch.float64):
        yield f"{dtype} C=32", launches(torch.empty((2, 32, *FLAT), dtype=dtype)), NVIDIA
    cityscapes = torch.empty((2, 19, *FLAT), dtype=bfloat16)
    yield "channels_last", launches(cityscapes.to(memory_format=torch.channels_last)), hopper
    yield "odd", launches(torch.empty((2, 32, 63, 63), dtype=bfloat16)), hopper
    yield "C=150", launches(torch.empty((2, 150, *FLAT), dtype=bfloat16)), hopper
    cropped = torch.empty((2, 19, 7, 6, 5, 80), dtype=bfloat16)[:, :, 1:5, 1:5, 1:5, 8:72]
    yield "four dimensions", launches(cropped), hopper
    yield "huge", launches(torch.empty((2, 19, 46400, 46400), dtype=bfloat16, device="meta")), hopper
    coarse = torch.empty((2, 19, *FLAT), dtype=bfloat16)
    yield "upsampled 4", launches(coarse, 4), NVIDIA | AMD
    yield "upsampled 8", launches(coarse, 8), hopper
    yield "upsampled 4 smooth", launches(coarse, 4, smoothing=0.1), hopper
    yield "upsampled 4 one level", launches(coarse, 4, levels=1), NVIDIA | AMD
    yield "upsampled 4 one level smooth", launches(coarse, 4, levels=1, smoothing=0.1), hopper
    for dtype in (torch.float32, torch.float64):
        yield f"{dtype} upsampled 4", launches(coarse.to(dtype), 4), hopper
    for dtype, labels in (
        (bfloat16, torch.uint8),
        (torch.float32, torch.int32),
        (torch.float16, torch.int64),
        (torch.float64, torch.uint8),
    ):
        logits = cityscapes.to(dtype)
        for ratio, name in ((None, f"{dtype} pixel_nll"), (4, f"{dtype} upsampled 4 pixel_nll")):
            targets = NVIDIA | AMD if dtype == bfloat16 else hopper
            yield name, nll_launches(logits, labels, ratio), targets
            yield f"{name} smooth", nll_launches(logits, labels, ratio, smoothing=0.1), hopper
    yield "pixel_nll", nll_launches(cityscapes, torch.uint8, class_weights=False), hopper
    yield "upsampled 4 pixel_nll", nll_launches(coarse, torch.uint8, 4, class_weights=False), hopper


def jobs() -> Iterator[tuple[str, list[str], tuple[ASTSource, GPUTarget, dict[str, int]]]]:
    """The kernels to compile, and what they write.

    Those whose registers do not depend on the case are compiled once.
    """
    small = set()
    for case, seen, targets in cases():
        for launched in seen:
            writes = written(launched)
            for target, gpu in targets.items():
                for name, source, options in sources(launched, gpu):
                    if re.search("reduce|one_pass|pixel_nll", name):
                        tuned = name.endswith((" 64", " 256"))
                        if tuned and (target, case) != ("sm_90", "torch.bfloat16 C=32"):
                            continue
                    elif (target, name) in small:
                        continue
                    small.add((target, name))
                    yield f"{target}: {name}: {case}", writes, (source, gpu, options)


def main() -> None:
    names, writes, todo = zip(*jobs(), strict=True)
    with ThreadPoolExecutor(2) as pool:  # ptxas runs outside of Python's lock
        codes = pool.map(lambda job: examine(*job), todo)
    results = zip(names, writes, codes, strict=True)
    print(json.dumps({name: {"written": write, **code} for name, write, code in results}, indent=1))


if __name__ == "__main__":
    main()
