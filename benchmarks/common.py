"""What the benchmarks share: the rule of correctness, clocks, memory, and what a machine is."""

from __future__ import annotations

import csv
import ctypes
import functools
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import ial_cuda
from ial_cuda import extension

#: What is measured: a function of the logits. What it returns is freed outside the measured part.
Step = Callable[[Tensor], object]


class InTwo(NamedTuple):
    """A step of two parts, which are timed apart as well; what the first gives goes to the second."""

    forward: Callable[[Tensor], Any]
    backward: Callable[[Any, Tensor], object]

    def __call__(self, logits: Tensor) -> object:
        return self.backward(self.forward(logits), logits)


WARM_UP_ROUNDS, LEAST_ROUNDS = 2, 3
#: More than the L2 cache of any GPU, read so often that it takes the GPU about a millisecond.
FLUSH_BYTES, FLUSHES = 512 << 20, 8


class Result(NamedTuple):
    """What a provider computes."""

    loss: Tensor
    gradient: Tensor


def why_refused(result: Result, eager: Result, truth: Result, *, ulps: float = 4) -> str | None:
    """Why the speed of a result must not be told; None where the result is right.

    Loss and gradient may be no further from the float64 truth than those of eager PyTorch, plus some ulp of
    eager's arithmetic at the tensor's largest value (each gradient is a difference) and, where the result is
    of a lower precision than eager's, the rounding of each element, coarser below the normal numbers.
    """
    for name, got, standard, expected in zip(Result._fields, result, eager, truth, strict=True):
        if got.shape != expected.shape:
            return f"{name} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
        allowed = (standard.double() - expected).abs().max()
        allowed = allowed + ulps * torch.finfo(standard.dtype).eps * expected.abs().max()
        if got.dtype != standard.dtype:
            info = torch.finfo(got.dtype)
            allowed = allowed + info.eps * expected.abs().clamp(min=info.tiny)
        error = (got.double() - expected).abs()
        if not (error <= allowed).all():  # NaN is not
            return (
                f"{name} errs by up to {error.max():.3g}, {(error / allowed).max():.3g} times what is allowed"
            )
    return None


@dataclass(frozen=True)
class Times:
    """Median and the 10 % and 90 % quantiles of a step's times, in ms; of its parts, the medians."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    forward_ms: float | None = None
    backward_ms: float | None = None


def time_interleaved(
    steps: Mapping[str, Step],
    make_logits: Callable[[], Tensor],
    device: str,
    rounds: int,
    on_round: Callable[[], None],
    seconds: float = math.inf,
) -> dict[str, Times]:
    """Times every step once a round, in a new order each round, so that a disturbance meets them all.

    Args:
        steps: what is timed, by name.
        make_logits: called before each step, outside the time.
        device: whose clock counts.
        rounds: at least 2, after some that do not count.
        on_round: called after each round, those for warming up included.
        seconds: after which no round is begun, if there were `LEAST_ROUNDS`. A round that takes a third of
            them warms up enough, and one that takes all of them needs no other before it, and counts.
    """
    stopwatch = {"cpu": _time_cpu, "cuda": _time_cuda}[device]
    shuffle = random.Random(0).shuffle
    order = list(steps)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in order}
    start = time.monotonic()

    def run_round() -> float:
        shuffle(order)
        for name in order:
            times[name].append(stopwatch(steps[name], make_logits()))
        on_round()
        return time.monotonic() - start

    warm_ups = done = 0
    while warm_ups < WARM_UP_ROUNDS and not done:
        elapsed = run_round()
        if elapsed > seconds:
            done = 1
        else:
            warm_ups += 1
        if elapsed > seconds / 3:
            break
    while done < rounds and (done < LEAST_ROUNDS or elapsed <= seconds):
        elapsed = run_round()
        done += 1
    return {
        name: _summary(taken[warm_ups:], in_two=isinstance(steps[name], InTwo))
        for name, taken in times.items()
    }


def _parts(step: Step) -> InTwo:
    return step if isinstance(step, InTwo) else InTwo(step, lambda result, _: result)


def _time_cpu(step: Step, logits: Tensor) -> tuple[float, float]:
    """The time of the step, and of its first part."""
    forward, backward = _parts(step)
    start = time.perf_counter()
    value = forward(logits)
    middle = time.perf_counter()
    result = backward(value, logits)
    del value
    end = time.perf_counter()
    del result  # not before
    return (end - start) * 1e3, (middle - start) * 1e3


def _time_cuda(step: Step, logits: Tensor) -> tuple[float, float]:
    """The same on the GPU's clock, from a cold L2 cache.

    What evicts the logits is read, not written: the lines that a write leaves behind are dirty, and to write
    them back would be charged to the step. It takes the GPU longer than Python takes to queue a step of a few
    launches, so that Python runs ahead, as it does in training.
    """
    forward, backward = _parts(step)
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    other = _other_memory(logits.device)
    for _ in range(FLUSHES):
        other.sum()
    start.record()
    value = forward(logits)
    middle.record()
    result = backward(value, logits)
    del value
    end.record()
    end.synchronize()
    del result
    return start.elapsed_time(end), start.elapsed_time(middle)


@functools.cache
def _other_memory(device: torch.device) -> Tensor:
    return torch.ones(FLUSH_BYTES // 4, device=device)


class _Output(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.new_empty(0).set_(leaf.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def output_of(leaf: Tensor) -> Tensor:
    """The memory of ``leaf`` as the output of a layer. A view of a leaf must not be overwritten."""
    output: Tensor = _Output.apply(leaf)
    return output


def _capture_cuda(step: Step, leaf: Tensor) -> Step:
    """The step on the values that ``leaf`` then has as a CUDA graph: its launches, and nothing of Python.

    The step must have run before, since in a capture nothing may be compiled or loaded.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Made here: autograd would wait for the stream where an older output was made, which is not captured.
        result = step(output_of(leaf))

    def replay(_: Tensor) -> object:
        graph.replay()
        return result

    return replay


#: How a step is made one submission to the device, for the types of device that have such a thing.
CAPTURE: dict[str, Callable[[Step, Tensor], Step]] = {"cuda": _capture_cuda}


def _summary(times: Sequence[tuple[float, float]], *, in_two: bool) -> Times:
    whole = [total for total, _ in times]
    deciles = statistics.quantiles(whole, n=10, method="inclusive")
    figures = [statistics.median(whole), deciles[0], deciles[-1]]
    if in_two:
        figures.append(statistics.median(forward for _, forward in times))
        figures.append(statistics.median(total - forward for total, forward in times))
    return Times(*(round(figure, 4) for figure in figures))


def peak_bytes(step: Step, logits: Tensor) -> int:
    """The most memory that the step holds at once beyond what was there before, its results included.

    On the CPU the profiler tells every tensor's allocation and release. Unlike the size of the process that
    is exact, and does not depend on what the C library keeps for itself; but only tensors are seen.
    """
    if logits.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(logits)
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's talk on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(logits)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = [
            event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"
        ]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def peak_process_bytes(step: Step, logits: Tensor) -> int | None:
    """The most that the step adds to the process's resident memory; None where Linux does not tell.

    That has all that `peak_bytes` sees on the CPU and whatever is no tensor, in pages, huge ones included.
    """
    clear = Path("/proc/self/clear_refs")
    if logits.is_cuda or not clear.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what the C library keeps for itself would be used first
    clear.write_text("5")  # VmHWM, the most ever, is what there is now
    before = _resident("VmRSS")
    step(logits)
    return _resident("VmHWM") - before


def free_bytes(device: torch.device) -> float:
    """What can still be allocated on the device, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    file = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", file.read_text(), re.M) if file.exists() else None
    return 1024 * int(found[1]) if found else math.inf


def _resident(what: str) -> int:
    return 1024 * int(re.search(rf"^{what}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)[1])


def describe_machine() -> dict[str, Any]:
    """Hardware and software that a time depends on; nothing that tells whose machine it is."""
    machine = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "huge_pages": _huge_pages(),
        "torch_asks_for_huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ial_cuda": ial_cuda.__version__,
        "compiler": extension.build.get("compiler"),
        "commit": _first_line("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
        machine["cuda"] = torch.version.cuda
        machine["nvcc"] = extension.build.get("nvcc")
        machine["archs"] = extension.build.get("arch_list")
        machine["triton"] = _version("triton")
        machine |= _nvidia_smi("driver_version")
    return machine


def describe_gpu_state() -> dict[str, str]:
    """Clocks in MHz, power in W and temperature in °C of the GPU in use, as they are now."""
    return _nvidia_smi("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def _nvidia_smi(*fields: str) -> dict[str, str]:
    """What nvidia-smi, which only reads here, says about the current device."""
    gpu = f"--id=GPU-{torch.cuda.get_device_properties().uuid}"
    answer = _first_line(
        "nvidia-smi", gpu, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"
    )
    return dict(zip(fields, answer.split(", "), strict=False)) if answer else {}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _huge_pages() -> str | None:
    """Who gets transparent huge pages on Linux: a large fresh tensor costs several times more without."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    found = re.search(r"\[(\w+)\]", setting.read_text()) if setting.exists() else None
    return found[1] if found else None


def _first_line(*command: str) -> str | None:
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(output.splitlines()), None)


def write_json(file: Path, data: Any) -> None:
    """At once, so that who is interrupted leaves the old file or the new one."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(data, indent=2) + "\n")
    new.replace(file)


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
