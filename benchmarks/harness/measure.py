"""Clocks and memory: how long a step takes, and how much memory it holds at its peak."""

from __future__ import annotations

import ctypes
import functools
import json
import math
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

#: A measured function of the logits. Its result is freed after the clock stops.
Step = Callable[[Tensor], object]


class TwoPartStep(NamedTuple):
    """A step whose two parts are also timed apart. The result of ``forward`` is passed to ``backward``."""

    forward: Callable[[Tensor], Any]
    backward: Callable[[Any, Tensor], object]

    def __call__(self, logits: Tensor) -> object:
        return self.backward(self.forward(logits), logits)


class Result(NamedTuple):
    """What a step of a loss returns."""

    loss: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Times:
    """Median, 10 % and 90 % quantiles of a step's times in ms, and the medians of its two parts."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    forward_ms: float | None = None
    backward_ms: float | None = None


WARM_UP_ROUNDS, MIN_ROUNDS = 2, 3
#: Larger than the L2 cache of any GPU. Reading it `FLUSHES` times takes the GPU about a millisecond.
FLUSH_BYTES, FLUSHES = 512 << 20, 8


def time_interleaved(
    steps: Mapping[str, Step],
    make_logits: Callable[[], Tensor],
    device: str,
    rounds: int,
    on_round: Callable[[], None],
    seconds: float = math.inf,
) -> dict[str, Times]:
    """Times every step once a round, in a new order each round, so that a disturbance affects all of them.

    Args:
        steps: by name.
        make_logits: called before each step, outside the time.
        device: "cpu" or "cuda": whose clock is used.
        rounds: at least 2, after warm-up rounds that are not counted.
        on_round: called after each round, warm-up included.
        seconds: no round begins after this time, from `MIN_ROUNDS` on. One warm-up round is enough if it
            takes a third of ``seconds``. A first round that takes all of ``seconds`` counts.
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
    while done < rounds and (done < MIN_ROUNDS or elapsed <= seconds):
        elapsed = run_round()
        done += 1
    return {
        name: _summarize(taken[warm_ups:], two_parts=isinstance(steps[name], TwoPartStep))
        for name, taken in times.items()
    }


def _summarize(times: Sequence[tuple[float, float]], *, two_parts: bool) -> Times:
    total = [whole for whole, _ in times]
    deciles = statistics.quantiles(total, n=10, method="inclusive")
    figures = [statistics.median(total), deciles[0], deciles[-1]]
    if two_parts:
        figures.append(statistics.median(forward for _, forward in times))
        figures.append(statistics.median(whole - forward for whole, forward in times))
    return Times(*(round(figure, 4) for figure in figures))


def _parts(step: Step) -> TwoPartStep:
    return step if isinstance(step, TwoPartStep) else TwoPartStep(step, lambda result, _: result)


def _time_cpu(step: Step, logits: Tensor) -> tuple[float, float]:
    """The time of the step and of its first part, in ms."""
    forward, backward = _parts(step)
    start = time.perf_counter()
    value = forward(logits)
    middle = time.perf_counter()
    result = backward(value, logits)
    del value
    end = time.perf_counter()
    del result  # freed outside the time
    return (end - start) * 1e3, (middle - start) * 1e3


def _time_cuda(step: Step, logits: Tensor) -> tuple[float, float]:
    """The same by CUDA events, with a cold L2 cache.

    The logits are evicted by reads. Writes would leave dirty lines, whose write-back would be charged to the
    step. The reads also take longer than Python needs to queue a step, so the GPU never waits for Python.
    """
    forward, backward = _parts(step)
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    other = _flush_memory(logits.device)
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
def _flush_memory(device: torch.device) -> Tensor:
    return torch.ones(FLUSH_BYTES // 4, device=device)


class _Output(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.new_empty(0).set_(leaf.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def output_of(leaf: Tensor) -> Tensor:
    """The memory of ``leaf`` as the output of a layer, which may be overwritten. A view of a leaf may not."""
    output: Tensor = _Output.apply(leaf)
    return output


def _capture_cuda(step: Step, leaf: Tensor) -> Step:
    """The step as a CUDA graph on the current values of ``leaf``.

    The step must have run before: nothing may be compiled or loaded during a capture.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Inside the capture: autograd would wait for the uncaptured stream of an earlier output.
        result = step(output_of(leaf))

    def replay(_: Tensor) -> object:
        graph.replay()
        return result

    return replay


#: How a step becomes a graph, for the devices that have graphs.
CAPTURE: dict[str, Callable[[Step, Tensor], Step]] = {"cuda": _capture_cuda}


def peak_bytes(step: Step, logits: Tensor) -> int:
    """The peak of the memory that the step allocates, results included.

    On the CPU the profiler reports each allocation of a tensor. That is exact, unlike the size of the
    process, which depends on what the C library keeps.
    """
    if logits.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(logits)
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no messages of the profiler on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(logits)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def peak_process_bytes(step: Step, logits: Tensor) -> int | None:
    """The growth of the process's resident memory in the step, as a check of `peak_bytes` on the CPU.

    It includes memory that is no tensor, in whole pages. None on a GPU and where Linux does not report it.
    """
    clear = Path("/proc/self/clear_refs")
    if logits.is_cuda or not clear.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # else memory that the C library keeps would be used first
    clear.write_text("5")  # resets the peak, VmHWM
    before = _resident("VmRSS")
    step(logits)
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)[1])


def free_bytes(device: torch.device) -> float:
    """The memory that can still be allocated on the device; infinite where the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    file = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", file.read_text(), re.M) if file.exists() else None
    return 1024 * int(found[1]) if found else math.inf
