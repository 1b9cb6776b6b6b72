"""How providers of a loss are compared: each is judged before it is timed, and all are timed side by side."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch

from .common import CAPTURE, Result, Step, Times, describe_gpu_state, time_interleaved, why_refused
from .inputs import Inputs
from .providers import Loss, Provider, loss_and_gradient
from .report import Row, quotient

#: What eager PyTorch computes, and the truth.
Judges = Mapping[Loss, tuple[Result, Result]]


def judge(eager: Loss, inputs: Inputs) -> tuple[Result, Result]:
    """Eager PyTorch in the precision of the loss it returns, and the truth: eager in float64.

    Where that precision is too small for the loss, as the pixels of a float16 image are for their sum, what
    eager gives is no standard, and float32 is.
    """
    target, weight = inputs.targets[torch.int64], inputs.weight

    def in_precision(dtype: torch.dtype) -> Result:
        step = loss_and_gradient(eager, target, weight)
        return step(inputs.source.to(dtype).detach().requires_grad_())

    loss = eager(inputs.source, target, weight)
    precision = loss.dtype if loss.isfinite() else torch.float32
    return in_precision(precision), in_precision(torch.float64)


def first_line(error: Exception) -> str:
    """What happened, short and without the files, which would name somebody's folders."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip() or repr(error)
    return textwrap.shorten(re.sub(r"\S*/\S*", "…", lines.splitlines()[0]), 160, placeholder=" …")


def examine(provider: Provider, inputs: Inputs, standard: Result, truth: Result) -> Row:
    """The provider's row before it is timed, with a reason where it will not be. Warms up the compiler.

    On a GPU the second call is judged: launchers of kernels find their caches then, and go another way.
    """
    row = Row(provider.name)
    try:
        step = provider.step(inputs)
        if inputs.written.is_cuda:
            step(inputs.logits())
        result = step(inputs.logits())
    except torch.OutOfMemoryError as error:
        return replace(row, skipped=first_line(error))
    except Exception as error:
        reason = f"raises {type(error).__name__}: {first_line(error)}"
        if provider.compiled:
            reason = f"torch.compile fails: {first_line(error)}"
        return replace(row, refused=reason) if row.ours else replace(row, skipped=reason)
    # Compiled code adds pixels one by one in float32, and what is alike is rounded alike: its sums err by
    # somewhat more than a random walk, and are not wrong.
    ulps = 4 * math.sqrt(inputs.targets[torch.int64].numel()) if provider.compiled else 4
    reasons = (why_refused(piece, standard, truth, ulps=ulps) for piece in inputs.pieces(result))
    return replace(row, refused=next(filter(None, reasons), None))


def judge_all(providers: Sequence[Provider], inputs: Inputs) -> Judges:
    """Of all that is needed to judge the providers on inputs that consist of these."""
    return {eager: judge(eager, inputs) for eager in {p.eager for p in providers if not p.missing}}


def examine_all(
    providers: Sequence[Provider], inputs: Inputs, judges: Judges, on_each: Callable[[], None]
) -> dict[str, Row]:
    rows = {}
    for provider in providers:
        if provider.missing:
            rows[provider.name] = Row(provider.name, skipped=provider.missing)
        else:
            rows[provider.name] = examine(provider, inputs, *judges[provider.eager])
        on_each()
    return rows


def right(providers: Sequence[Provider], rows: Mapping[str, Row]) -> list[Provider]:
    """Those whose times may be told."""
    return [p for p in providers if not (rows[p.name].refused or rows[p.name].skipped)]


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
    providers: Sequence[Provider],
    others: Mapping[str, Step],
    ours: str,
    inputs: Inputs,
    device: str,
    rounds: int,
    advance: Callable[[], None],
    seconds: float = math.inf,
) -> Timing:
    """Times providers, as graphs too where the device has such, beside other steps."""
    steps: dict[str, Step] = {provider.name: provider.step(inputs) for provider in providers}
    graphs: dict[str, Step] = {}
    reasons: dict[str, str] = {}
    if device in CAPTURE:
        captured = {provider.name: steps[provider.name] for provider in providers if provider.captured}
        graphs, reasons = capture(captured, inputs, device)
    every = steps | dict(others) | {f"{name}, graph": graph for name, graph in graphs.items()}
    gpu_before = describe_gpu_state() if device == "cuda" else {}
    times = time_interleaved(every, inputs.logits, device, rounds, advance, seconds)
    gpu_after = describe_gpu_state() if device == "cuda" else {}
    return Timing(times, ours, reasons, gpu_before, gpu_after)
