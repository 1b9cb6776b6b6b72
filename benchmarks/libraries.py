"""The losses of other libraries that a user might pick, each beside the same in plain PyTorch."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import IGNORE_INDEX
from .providers import Loss, Provider, cross_entropy

#: Of the focal losses, as Lin et al. (2017) and the libraries have it by default.
GAMMA = 2.0


def unweighted_cross_entropy(logits: Tensor, target: Tensor, _: Tensor) -> Tensor:
    """Divided by all pixels, void included."""
    total = F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / target.numel()


def focal(divisor: Callable[[Tensor, Tensor], Tensor | int]) -> Loss:
    """-Σ (1 − π)^γ log π over the valid pixels, divided by what ``divisor(logits, valid)`` says."""

    def loss(logits: Tensor, target: Tensor, _: Tensor) -> Tensor:
        valid = target != IGNORE_INDEX
        own = target.where(valid, 0).unsqueeze(1)
        log_pi = F.log_softmax(logits, dim=1).gather(1, own).squeeze(1)
        terms = -((1 - log_pi.exp()) ** GAMMA) * log_pi
        return terms.where(valid, 0).sum() / divisor(logits, valid)

    return loss


def one_against_all_focal(logits: Tensor, target: Tensor, _: Tensor) -> Tensor:
    """The mean over classes and valid pixels of the binary focal loss of each class against the rest."""
    valid = target != IGNORE_INDEX
    own = F.one_hot(target.where(valid, 0), logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    nll = F.binary_cross_entropy_with_logits(logits, own, reduction="none")
    terms = (1 - torch.exp(-nll)) ** GAMMA * nll
    return terms.where(valid.unsqueeze(1), 0).sum() / (valid.sum() * logits.shape[1])


def _liger(package: Any) -> Loss:
    def loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        rows = logits.movedim(1, -1).reshape(-1, logits.shape[1])  # a copy, of contiguous logits
        criterion = package.LigerCrossEntropyLoss(weight=weight.float(), ignore_index=IGNORE_INDEX)
        return criterion(rows, target.flatten())

    return loss


def _smp_cross_entropy(package: Any) -> Loss:
    criterion = package.SoftCrossEntropyLoss(smooth_factor=0.0, ignore_index=IGNORE_INDEX)
    return lambda logits, target, _: criterion(logits, target)


def _smp_focal(package: Any) -> Loss:
    criterion = package.FocalLoss("multiclass", gamma=GAMMA, ignore_index=IGNORE_INDEX)
    return lambda logits, target, _: criterion(logits, target)


def _monai_focal(package: Any) -> Loss:
    criterion = package.FocalLoss(to_onehot_y=True, use_softmax=True, gamma=GAMMA, ignore_index=IGNORE_INDEX)
    return lambda logits, target, _: criterion(logits, target.unsqueeze(1))


def _kornia_focal(package: Any) -> Loss:
    options = dict(alpha=None, gamma=GAMMA, reduction="mean", ignore_index=IGNORE_INDEX)
    return lambda logits, target, _: package.focal_loss(logits, target, **options)


class Library(NamedTuple):
    """A loss of a library."""

    name: str
    module: str
    make: Callable[[Any], Loss]  # of the module
    eager: Loss
    devices: tuple[str, ...] = ("cpu", "cuda")


#: The focal losses do more than cross-entropy, and none of those that know no class weights does less for it.
LIBRARIES = (
    Library("Liger cross-entropy", "liger_kernel.transformers", _liger, cross_entropy, ("cuda",)),
    Library(
        "smp SoftCrossEntropyLoss",
        "segmentation_models_pytorch.losses",
        _smp_cross_entropy,
        unweighted_cross_entropy,
    ),
    Library("smp FocalLoss", "segmentation_models_pytorch.losses", _smp_focal, one_against_all_focal),
    Library("MONAI FocalLoss", "monai.losses", _monai_focal, focal(lambda _, valid: valid.sum())),
    Library("kornia focal_loss", "kornia.losses", _kornia_focal, focal(lambda logits, _: logits.numel())),
)


def make_libraries(
    device: str, prefix: str = "", after: Callable[[Loss], Loss] = lambda loss: loss
) -> list[Provider]:
    """Each library's loss, with a reason where it cannot be used here.

    Args:
        prefix: of the names.
        after: what is done to each loss, so that something comes before it.
    """
    providers = []
    for name, module, make, eager, on in LIBRARIES:
        package = module.partition(".")[0]
        missing, loss = None, eager
        if device not in on:
            missing = f"runs on {', '.join(on)} only"
        elif importlib.util.find_spec(package) is None:
            missing = f"{package} is not installed"
        else:
            loss = make(importlib.import_module(module))
        providers.append(Provider(prefix + name, after(loss), after(eager), missing=missing, captured=False))
    return providers
