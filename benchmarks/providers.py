"""Who computes a loss: ours by each backend, and PyTorch, eager and compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ial_cuda
from ial_cuda import backends, importance_aware_loss, reference
from ial_cuda.options import Options

from .common import InTwo, Result
from .inputs import IGNORE_INDEX, Inputs, hierarchy_of
from .report import UINT8

LAMBDA, ALPHA = 0.5, 1.0

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of logits, target and class weights

DTYPES = {"cpu": [torch.float32], "cuda": [torch.bfloat16, torch.float32]}
LABELS = {"cpu": [torch.int64], "cuda": [torch.int64, torch.uint8]}


@dataclass(frozen=True)
class Provider:
    """Who computes a loss: ``loss``, and the same in plain PyTorch, by which it is judged."""

    name: str
    loss: Loss
    eager: Loss
    labels: torch.dtype = torch.int64
    compiled: bool = False
    captured: bool = True  # whether to time it as a graph, too, where the device has such
    missing: str | None = None  # why it cannot be used here

    def step(self, inputs: Inputs) -> InTwo:
        """Loss and gradient, of logits that are given."""
        target = inputs.targets[self.labels]
        return loss_and_gradient(self.loss, target, inputs.weight)


def loss_and_gradient(loss: Loss, target: Tensor, weight: Tensor) -> InTwo:
    """What a training step asks of a loss. The gradient is added to no ``.grad``, whoever computes it."""

    def backward(value: Tensor, logits: Tensor) -> Result:
        (gradient,) = torch.autograd.grad(value, logits)
        return Result(value.detach(), gradient)

    return InTwo(lambda logits: loss(logits, target, weight), backward)


def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits, target, weight.to(logits.dtype), ignore_index=IGNORE_INDEX, **options)


def interpolated(loss: Loss) -> Loss:
    """The loss of logits upsampled first."""

    def of_coarse(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        fine = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=False)
        return loss(fine, target, weight)

    return of_coarse


def options_of(num_classes: int, **options: Any) -> Options:
    """Those of every benchmark, and others."""
    hierarchy = hierarchy_of(num_classes)
    return Options(hierarchy, lambdas=LAMBDA, alpha=ALPHA, ignore_index=IGNORE_INDEX, **options)


def reference_loss(logits: Tensor, target: Tensor, weight: Tensor, **options: Any) -> Tensor:
    given = options_of(logits.shape[1], **options)
    return reference.importance_aware_loss(logits, target, given, weight=weight)[0]


def our_cross_entropy(backend: str, **options: Any) -> Loss:
    """`ial_cuda.cross_entropy`: one level of importance."""
    return partial(ial_cuda.cross_entropy, ignore_index=IGNORE_INDEX, backend=backend, **options)


def our_loss(backend: str, **options: Any) -> Loss:
    def loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return importance_aware_loss(
            logits,
            target,
            hierarchy_of(logits.shape[1]),
            weight=weight,
            lambdas=LAMBDA,
            alpha=ALPHA,
            ignore_index=IGNORE_INDEX,
            backend=backend,
            **options,
        )

    return loss


def kernels(device: str) -> list[str]:
    """The backends with kernels of our own that can be used on the device, best first."""
    ours = takewhile(lambda backend: backend.library is not None, backends.suitable(device))
    return [name for backend in ours if backend.missing is None for name in _ways(backend)]


def _ways(backend: backends.Backend) -> list[str]:
    """A backend by its name, or, where it chooses how to launch, the names of both ways."""
    if backend.one_launch is not None:
        return [backend.name]
    ways = {f"{backend.name}_two_launches": False, f"{backend.name}_one_launch": True}
    for name, one_launch in ways.items():
        backends.register(replace(backend, name=name, one_launch=one_launch))
    return list(ways)


def make_ours(
    backends: Sequence[str], device: str, make_loss: Callable[[str], Loss], eager: Loss
) -> list[Provider]:
    """Ours by each backend, with each type of labels that is of interest on the device."""
    return [
        Provider(f"ial_cuda {name}{UINT8 if labels == torch.uint8 else ''}", make_loss(name), eager, labels)
        for name in backends
        for labels in LABELS[device]
    ]


def compile_anew(function: Callable[..., Any], *, dynamic: bool = False, fullgraph: bool = False) -> Any:
    """`torch.compile`, to code that this process makes.

    The caches that torch keeps on disk do not tell instruction sets apart (seen in 2.14): what a process made
    that was held to a narrower one, as some tests are, would be found there, and be ten times slower.
    """
    torch.compiler.config.force_disable_caches = True
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")  # as was asked for
    return torch.compile(function, dynamic=dynamic, fullgraph=fullgraph)


def make_peers(
    name: str,
    eager: Loss,
    *,
    compiled: bool,
    captured: bool = True,
    dynamic: bool = False,
    labels: torch.dtype = torch.int64,
) -> list[Provider]:
    """A loss in plain PyTorch as it is and, if asked for, under torch.compile."""
    peers = [Provider(name, eager, eager, labels, captured=captured)]
    if compiled:
        loss = compile_anew(eager, dynamic=dynamic)
        peers.append(Provider(f"{name}, compiled", loss, eager, labels, compiled=True, captured=captured))
    return peers
