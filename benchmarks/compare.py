"""How providers of a loss are compared: each is judged before it is timed, and all are timed side by side."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from ial_cuda import _ops

from .common import (
    CAPTURE,
    Inputs,
    Result,
    Step,
    Times,
    describe_gpu_state,
    time_interleaved,
    why_refused,
)
from .report import UINT8, Row, quotient

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of logits, target and class weights

DTYPES = {"cpu": [torch.float32], "cuda": [torch.bfloat16, torch.float32]}
LABELS = {"cpu": [torch.int64], "cuda": [torch.int64, torch.uint8]}


@dataclass(frozen=True)
class Provider:
    """Who computes a loss: ``loss``, and the same in eager PyTorch, by which it is judged."""

    name: str
    loss: Loss
    eager: Loss
    labels: torch.dtype = torch.int64
    compiled: bool = False
    captured: bool = True  # whether to time it as a graph, too, where the device has such


def kernels(device: str) -> list[str]:
    """The backends with kernels of our own that can be used on the device, best first."""
    return [name for name in _ops.kernels(device) if _ops.unavailable[name] is None]


def make_ours(
    backends: Sequence[str], device: str, make_loss: Callable[[str], Loss], eager: Loss
) -> list[Provider]:
    """Ours by each backend, with each type of labels that is of interest on the device."""
    return [
        Provider(f"ial_cuda {name}{UINT8 if labels == torch.uint8 else ''}", make_loss(name), eager, labels)
        for name in backends
        for labels in LABELS[device]
    ]


def make_peers(name: str, eager: Loss, *, compiled: bool, captured: bool = True) -> list[Provider]:
    """A loss in plain PyTorch as it is and, if asked for, under torch.compile."""
    peers = [Provider(name, eager, eager, captured=captured)]
    if compiled:
        loss = torch.compile(eager, dynamic=False)
        peers.append(Provider(f"{name}, compiled", loss, eager, compiled=True, captured=captured))
    return peers


def loss_and_gradient(loss: Loss, logits: Tensor, target: Tensor, weight: Tensor) -> Result:
    """What a training step asks of a loss. The gradient is added to no ``.grad``, whoever computes it."""
    value = loss(logits, target, weight)
    (gradient,) = torch.autograd.grad(value, logits)
    return Result(value.detach(), gradient)


def judge(eager: Loss, inputs: Inputs) -> tuple[Result, Result]:
    """Eager PyTorch in the precision of the loss it returns, and the truth: eager in float64."""
    target, weight = inputs.targets[torch.int64], inputs.weight

    def in_precision(dtype: torch.dtype) -> Result:
        return loss_and_gradient(eager, inputs.source.to(dtype).detach().requires_grad_(), target, weight)

    return in_precision(eager(inputs.source, target, weight).dtype), in_precision(torch.float64)


def first_line(error: Exception) -> str:
    """What happened, without the files, which would name somebody's folders."""
    return re.sub(r"\S*/\S*", "…", (str(error) or repr(error)).splitlines()[0])


def examine(provider: Provider, inputs: Inputs, standard: Result, truth: Result) -> Row:
    """The provider's row before it is timed, with a reason where it will not be. Warms up the compiler."""
    try:
        result = provider_step(provider, inputs)(inputs.logits())
    except Exception as error:
        if provider.compiled:
            return Row(provider.name, skipped=f"torch.compile fails: {first_line(error)}")
        return Row(provider.name, refused=f"raises {type(error).__name__}: {first_line(error)}")
    # Compiled code adds pixels one by one in float32: its sums err like a random walk, and are not wrong.
    ulps = math.sqrt(inputs.targets[torch.int64].numel()) if provider.compiled else 4
    return Row(provider.name, refused=why_refused(result, standard, truth, ulps=ulps))


def examine_all(providers: Sequence[Provider], inputs: Inputs, on_each: Callable[[], None]) -> dict[str, Row]:
    judges = {eager: judge(eager, inputs) for eager in {provider.eager for provider in providers}}
    rows = {}
    for provider in providers:
        rows[provider.name] = examine(provider, inputs, *judges[provider.eager])
        on_each()
    return rows


def provider_step(provider: Provider, inputs: Inputs) -> Step:
    target = inputs.targets[provider.labels]
    return lambda logits: loss_and_gradient(provider.loss, logits, target, inputs.weight)


def capture(steps: Mapping[str, Step], inputs: Inputs, device: str) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps as graphs, those that compute the same, and why there is none of the others."""
    graphs, reasons = {}, {}
    for name, step in steps.items():
        try:
            graph = CAPTURE[device](step, inputs.written)
        except RuntimeError as error:
            # What is left of a capture that failed makes the next ones fail as well.
            return graphs, reasons | dict.fromkeys(steps.keys() - graphs.keys(), first_line(error))
        expected = Result(*(tensor.clone() for tensor in step(inputs.logits())))  # may lie in the logits
        exact = Result(*(tensor.double() for tensor in expected))
        wrong = why_refused(Result(*graph(inputs.logits())), expected, exact)
        if wrong:
            reasons[name] = f"its {wrong}"
        else:
            graphs[name] = graph
    return graphs, reasons


@dataclass(frozen=True)
class Timing:
    """What the clock says of the steps that were timed side by side."""

    times: dict[str, Times]  # those of graphs under the step's name and ", graph"
    ours: str  # which the ratios are to
    no_graph: dict[str, str]  # why there is none, by step
    gpu_before: dict[str, str] = field(default_factory=dict)
    gpu_after: dict[str, str] = field(default_factory=dict)

    def fill(self, row: Row, **more: float | None) -> Row:
        """The row with its times, and more."""
        taken, ours, graph = (self.times.get(name) for name in (row.name, self.ours, f"{row.name}, graph"))
        return replace(
            row,
            **asdict(taken),
            graph_ms=graph and graph.median_ms,
            ratio=quotient(taken.median_ms, ours and ours.median_ms),
            no_graph=self.no_graph.get(row.name),
            **more,
        )


def time_all(
    right: Sequence[Provider],
    others: Mapping[str, Step],
    ours: str,
    inputs: Inputs,
    device: str,
    rounds: int,
    advance: Callable[[], None],
) -> Timing:
    """Times providers, as graphs too where the device has such, beside other steps."""
    steps = {provider.name: provider_step(provider, inputs) for provider in right}
    graphs: dict[str, Step] = {}
    reasons: dict[str, str] = {}
    if device in CAPTURE:
        captured = {provider.name: steps[provider.name] for provider in right if provider.captured}
        graphs, reasons = capture(captured, inputs, device)
    every = steps | dict(others) | {f"{name}, graph": graph for name, graph in graphs.items()}
    gpu_before = describe_gpu_state() if device == "cuda" else {}
    times = time_interleaved(every, inputs.logits, device, rounds, advance)
    gpu_after = describe_gpu_state() if device == "cuda" else {}
    return Timing(times, ours, reasons, gpu_before, gpu_after)
