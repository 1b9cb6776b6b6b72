"""The providers of a loss: ours by each backend, PyTorch eager and compiled, and other libraries."""

from __future__ import annotations

import warnings
from collections.abc import Callable
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

from .inputs import CROSS_ENTROPY, IAL, IGNORE_INDEX, Case, Inputs, hierarchy_of
from .measure import Result, TwoPartStep

LAMBDA, ALPHA = 0.5, 1.0
INTERPOLATE = "F.interpolate + "
IN_PLACE, TWO_PASSES, COMPILED, UINT8 = ", in place", ", two passes", ", compiled", ", uint8 labels"
#: The dtypes that matter most in training.
DTYPES = {"cpu": [torch.float32], "cuda": [torch.bfloat16, torch.float32]}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of logits, target and class weights


@dataclass(frozen=True)
class Provider:
    """A loss by someone, and the same loss in plain PyTorch, against which it is checked."""

    name: str
    loss: Loss
    eager: Loss
    labels: torch.dtype = torch.int64
    compiled: bool = False
    captured: bool = True  # whether it is also timed as a CUDA graph
    missing: str | None = None  # why it cannot be used here

    def step(self, inputs: Inputs) -> TwoPartStep:
        """Loss and gradient of given logits."""
        return loss_and_gradient(self.loss, inputs.targets[self.labels], inputs.weight)


def loss_and_gradient(loss: Loss, target: Tensor, weight: Tensor) -> TwoPartStep:
    """What a training step needs of a loss. No provider adds the gradient to a ``.grad``."""

    def backward(value: Tensor, logits: Tensor) -> Result:
        (gradient,) = torch.autograd.grad(value, logits)
        return Result(value.detach(), gradient)

    return TwoPartStep(lambda logits: loss(logits, target, weight), backward)


# ---- ours --------------------------------------------------------------------------------------------------


def our_cross_entropy(backend: str, **options: Any) -> Loss:
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


def kernels(device: str) -> list[backends.Backend]:
    """The backends with kernels of our own that can be used on the device, best first."""
    ours = takewhile(lambda backend: backend.library is not None, backends.suitable(device))
    return [backend for backend in ours if backend.missing is None]


def ways_to_launch(backend: backends.Backend) -> list[str]:
    """The backend's name and, on CUDA, a name for several levels in one cooperative launch."""
    if backend.name != "cuda":
        return [backend.name]
    one_launch = replace(backend, name=f"{backend.name}_one_launch", one_launch=True)
    backends.register(one_launch)
    return [backend.name, one_launch.name]


def make_ours(case: Case, *, variants: bool) -> list[Provider]:
    """Ours, the best backend first. Checked against the reference, which computes in float32 at least.

    Args:
        variants: whether to add the gradient in place and, for cross-entropy, in two passes.
    """
    make = {CROSS_ENTROPY: our_cross_entropy, IAL: our_loss}[case.loss]
    options: dict[str, Any] = {"label_smoothing": case.label_smoothing}
    if case.scale > 1:
        options["upsample"] = "bilinear"
    several_ways = case.loss == IAL and case.scale == 1
    names = [n for b in kernels(case.device) for n in (ways_to_launch(b) if several_ways else [b.name])]

    def provider(suffix: str, backend: str, labels: torch.dtype = case.labels, **more: Any) -> Provider:
        loss = of_case(case, make(backend, **options, **more))
        eager = of_case(case, make("reference", **options))
        return Provider(f"ial_cuda {backend}{suffix}", loss, eager, labels)

    ours = [provider("", name) for name in names]
    if case.device == "cuda" and case.labels == torch.int64 and case.shape[1] <= IGNORE_INDEX:
        ours += [provider(UINT8, name, torch.uint8) for name in names]
    if variants and case.scale == 1 and not case.rows:
        ours.append(provider(IN_PLACE, names[0], inplace=True))
    if variants and case.loss == CROSS_ENTROPY:
        ours.append(provider(TWO_PASSES, names[0], grad_in_forward=False))
    return ours


# ---- peers -------------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(logits, target, weight.to(logits.dtype), ignore_index=IGNORE_INDEX, **options)


def options_of(num_classes: int, **options: Any) -> Options:
    """The options of every benchmark, and others."""
    given = {"hierarchy": hierarchy_of(num_classes), "lambdas": LAMBDA, "alpha": ALPHA} | options
    return Options(ignore_index=IGNORE_INDEX, **given)


def reference_loss(logits: Tensor, target: Tensor, weight: Tensor, **options: Any) -> Tensor:
    given = options_of(logits.shape[1], **options)
    return reference.importance_aware_loss(logits, target, given, weight=weight)[0]


def interpolated(case: Case, loss: Loss) -> Loss:
    """The loss of logits that are first interpolated to the labels' size, where the case's are coarse."""
    if case.scale == 1:
        return loss

    def of_coarse(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        fine = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=False)
        return loss(fine, target, weight)

    return of_coarse


def of_case(case: Case, loss: Loss) -> Loss:
    """The loss of rows (N h w, C), a view of channels_last logits, where the case asks for it."""
    if not case.rows:
        return loss

    def of_rows(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return loss(logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1]), target.flatten(), weight)

    return of_rows


def make_peers(case: Case, *, compiled: bool, dynamic: bool = False) -> list[Provider]:
    """The case's loss in plain PyTorch, as it is and, if ``compiled``, under torch.compile."""
    if case.loss == CROSS_ENTROPY:
        smoothing = {"label_smoothing": case.label_smoothing} if case.label_smoothing else {}
        eager = interpolated(case, of_case(case, partial(cross_entropy, **smoothing)))
        peer = Provider("F.cross_entropy", eager, eager)  # it takes int64 labels only
    else:
        eager = partial(reference_loss, **({"upsample": "bilinear"} if case.scale > 1 else {}))
        # It copies its levels from the host.
        peer = Provider("reference", eager, eager, case.labels, captured=False)
    peer = replace(peer, name=interpolation(case) + peer.name)
    return [peer, *([compiled_form(peer, dynamic=dynamic)] if compiled else [])]


def interpolation(case: Case) -> str:
    """What comes before the names of peers in the case."""
    return INTERPOLATE if case.scale > 1 else ""


def compiled_form(provider: Provider, *, dynamic: bool = False) -> Provider:
    """The provider under torch.compile."""
    loss = compile_anew(provider.loss, dynamic=dynamic)
    return replace(provider, name=provider.name + COMPILED, loss=loss, compiled=True)


def compile_anew(function: Callable[..., Any], *, dynamic: bool = False, fullgraph: bool = False) -> Any:
    """`torch.compile` without its caches on disk.

    Those caches do not tell instruction sets apart (seen in torch 2.14). A process that was limited to an
    older set, as in some tests, leaves code there that is ten times slower.
    """
    torch.compiler.config.force_disable_caches = True
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
    return torch.compile(function, dynamic=dynamic, fullgraph=fullgraph)
