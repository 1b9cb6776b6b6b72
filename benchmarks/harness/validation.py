"""The rule of correctness: a result that is wrong is not timed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from .inputs import Inputs
from .measure import CAPTURE, Result, Step
from .providers import Loss, Provider, loss_and_gradient
from .report import Row, first_line


class Baseline(NamedTuple):
    """The results of a loss in plain PyTorch."""

    eager: Result
    truth: Result  # in float64


def why_wrong(result: Result, baseline: Baseline, *, ulps: float = 4) -> str | None:
    """Why a result is wrong, in one short line; None if it is right.

    The error of loss and gradient may not exceed that of eager PyTorch by more than some ulp of eager's
    dtype at the tensor's largest value, because each gradient is a difference. Where the result has a dtype
    of lower precision than eager's, the rounding of each element is added.
    """
    for name, got, eager, truth in zip(Result._fields, result, *baseline, strict=True):
        if eager.dtype == torch.float64:  # then the truth has rounding errors of the same size
            ulps = max(ulps, 64)
        if got.shape != truth.shape:
            return f"{name} has shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
        if got.isnan().any() and not truth.isnan().any():
            return f"{name} has NaN" if got.dim() else f"{name} is NaN"
        allowed = (eager.double() - truth).abs().max()
        allowed = allowed + ulps * torch.finfo(eager.dtype).eps * truth.abs().max()
        if got.dtype != eager.dtype:
            info = torch.finfo(got.dtype)
            allowed = allowed + info.eps * truth.abs().clamp(min=info.tiny)
        error = (got.double() - truth).abs()
        if not (error <= allowed).all():
            return f"{name} is wrong by {error.max():.2g}, {(error / allowed).max():.2g} times the tolerance"
    return None


def make_baseline(eager: Loss, inputs: Inputs) -> Baseline:
    """Eager PyTorch in the dtype of the loss that it returns, and in float64.

    A float16 loss may overflow, where eager PyTorch sums the pixels in float16. Then float32 takes its place.
    """
    target, weight = inputs.targets[torch.int64], inputs.weight

    def in_dtype(dtype: torch.dtype) -> Result:
        step = loss_and_gradient(eager, target, weight)
        return step(inputs.source.to(dtype).detach().requires_grad_())

    loss = eager(inputs.source, target, weight)
    return Baseline(in_dtype(loss.dtype if loss.isfinite() else torch.float32), in_dtype(torch.float64))


def make_baselines(providers: Sequence[Provider], inputs: Inputs) -> dict[Loss, Baseline]:
    """The baselines of all providers, for inputs that consist of these."""
    return {eager: make_baseline(eager, inputs) for eager in {p.eager for p in providers if not p.missing}}


def check(provider: Provider, inputs: Inputs, baselines: Mapping[Loss, Baseline]) -> Row:
    """The provider's row before it is timed, with the reason if it is not going to be. Warms up compilers.

    On a GPU the second call is checked: kernel launchers find their caches filled then and take another path.
    """
    row = Row(provider.name)
    if provider.missing:
        return replace(row, skipped=provider.missing)
    try:
        step = provider.step(inputs)
        if inputs.written.is_cuda:
            step(inputs.logits())
        result = step(inputs.logits())
    except torch.OutOfMemoryError as error:
        return replace(row, skipped=first_line(error))
    except Exception as error:
        return replace(row, failed=f"{type(error).__name__}: {first_line(error)}")
    # Compiled code may add pixels one by one in float32. Equal terms are rounded alike, so its sums err more
    # than a random walk of √pixels.
    ulps = 4 * math.sqrt(inputs.targets[torch.int64].numel()) if provider.compiled else 4
    reasons = (why_wrong(piece, baselines[provider.eager], ulps=ulps) for piece in inputs.pieces(result))
    return replace(row, failed=next(filter(None, reasons), None))


def capture(steps: Mapping[str, Step], inputs: Inputs, device: str) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps as graphs, if these compute the same; and for the others why there is no graph."""
    graphs, reasons = {}, {}
    for name, step in steps.items():
        try:
            graph = CAPTURE[device](step, inputs.written)
        except RuntimeError as error:
            # After a failed capture the next ones fail too.
            return graphs, reasons | dict.fromkeys(steps.keys() - graphs.keys(), first_line(error))
        expected = Result(
            *(tensor.clone() for tensor in step(inputs.logits()))
        )  # may share the logits' memory
        exact = Result(*(tensor.double() for tensor in expected))
        wrong = why_wrong(Result(*graph(inputs.logits())), Baseline(expected, exact))
        if wrong:
            reasons[name] = f"its {wrong}"
        else:
            graphs[name] = graph
    return graphs, reasons
