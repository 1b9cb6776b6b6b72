"""The losses of other libraries, each with the same loss in plain PyTorch, against which it is checked."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import CROSS_ENTROPY, FOCAL, IGNORE_INDEX, SIGMOID_FOCAL, Case
from .providers import Loss, Provider, cross_entropy, interpolated, interpolation
from .report import first_line

#: γ of the focal losses: the default of Lin et al. (2017) and of the libraries.
GAMMA = 2.0


def unweighted_cross_entropy(logits: Tensor, target: Tensor, _: Tensor) -> Tensor:
    """The sum over valid pixels, divided by all pixels, void included."""
    total = F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / target.numel()


def focal(logits: Tensor, target: Tensor, _: Tensor) -> Tensor:
    """The mean of -(1 − π)^γ log π over the valid pixels."""
    valid = target != IGNORE_INDEX
    own = target.where(valid, 0).unsqueeze(1)
    log_pi = F.log_softmax(logits, dim=1).gather(1, own).squeeze(1)
    terms = -((1 - log_pi.exp()) ** GAMMA) * log_pi
    return terms.where(valid, 0).sum() / valid.sum()


def one_against_all_focal(logits: Tensor, target: Tensor, _: Tensor) -> Tensor:
    """The mean over classes and valid pixels of the binary focal loss of each class against the rest."""
    valid = target != IGNORE_INDEX
    own = F.one_hot(target.where(valid, 0), logits.shape[1]).movedim(-1, 1)
    nll = F.binary_cross_entropy_with_logits(logits, own.to(logits.dtype), reduction="none")
    pi = torch.where(own.bool(), logits.sigmoid(), 1 - logits.sigmoid())
    terms = (1 - pi) ** GAMMA * nll
    return terms.where(valid.unsqueeze(1), 0).sum() / (valid.sum() * logits.shape[1])


def rows_of(logits: Tensor) -> Tensor:
    """Logits (N, C, H, W) as rows (N·H·W, C): a copy of contiguous logits."""
    return logits.movedim(1, -1).reshape(-1, logits.shape[1]).contiguous()


def weights_of_pixels(target: Tensor, weight: Tensor) -> Tensor:
    """The class weight of each pixel in float32; 0 for void pixels."""
    table = weight.new_zeros(max(len(weight), IGNORE_INDEX + 1), dtype=torch.float32)
    table[: len(weight)] = weight
    table[IGNORE_INDEX] = 0
    return table[target]


def _flag_gems(package: Any) -> Loss:
    """PyTorch averages here: the library's own mean is computed by a single block. The library also reads the
    logit of an ignored label, out of bounds. So void pixels get an existing class, and weight 0."""

    def loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        weights = weights_of_pixels(target, weight)
        valid = target.clamp(max=logits.shape[1] - 1)
        return (package.cross_entropy_loss(logits, valid, reduction="none") * weights).sum() / weights.sum()

    return loss


def _quack(package: Any) -> Loss:
    """PyTorch averages here: the library's own mean reads the weight of an ignored label, out of bounds."""

    def loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        classes, itemsize = logits.shape[1], logits.dtype.itemsize
        if math.gcd(classes * itemsize, 16) < 4:
            raise ValueError(f"cp.async copies 4, 8 or 16 bytes, a row has {classes * itemsize}")
        total = package.cross_entropy(
            rows_of(logits),
            target.flatten(),
            weight=weight.float(),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )
        return total / weights_of_pixels(target, weight).sum()

    return loss


def _liger(package: Any) -> Loss:
    def loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        criterion = package.LigerCrossEntropyLoss(weight=weight.float(), ignore_index=IGNORE_INDEX)
        return criterion(rows_of(logits), target.flatten())

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


def _smp_softmax_focal(package: Any) -> Loss:
    """F.nll_loss ignores -100 there. The library's own mean divides by all pixels, void included."""

    def loss(logits: Tensor, target: Tensor, _: Tensor) -> Tensor:
        valid = target != IGNORE_INDEX
        total = package.softmax_focal_loss_with_logits(logits, target.where(valid, -100), GAMMA, "sum")
        return total / valid.sum()

    return loss


def _kornia_focal(package: Any) -> Loss:
    """The library's own mean divides by all logits."""
    options = dict(alpha=None, gamma=GAMMA, reduction="sum", ignore_index=IGNORE_INDEX)

    def loss(logits: Tensor, target: Tensor, _: Tensor) -> Tensor:
        return package.focal_loss(logits, target, **options) / (target != IGNORE_INDEX).sum()

    return loss


def _torchvision_focal(package: Any) -> Loss:
    def loss(logits: Tensor, target: Tensor, _: Tensor) -> Tensor:
        valid = (target != IGNORE_INDEX).unsqueeze(1)
        own = torch.zeros_like(logits).scatter_(1, target.unsqueeze(1).where(valid, 0), 1)
        terms = package.sigmoid_focal_loss(logits, own, alpha=-1, gamma=GAMMA)
        return (terms * valid).sum() / (valid.sum() * logits.shape[1])

    return loss


class Library(NamedTuple):
    """A loss of a library."""

    name: str
    module: str
    make: Callable[[Any], Loss]  # of the module
    eager: Loss
    devices: tuple[str, ...] = ("cpu", "cuda")
    objective: str = CROSS_ENTROPY


SMP = "segmentation_models_pytorch.losses"
#: Some losses have no class weights.
LIBRARIES = (
    Library("FlagGems cross-entropy", "flag_gems", _flag_gems, cross_entropy, ("cuda",)),
    Library("quack cross-entropy", "quack.cross_entropy", _quack, cross_entropy, ("cuda",)),
    Library("Liger cross-entropy", "liger_kernel.transformers", _liger, cross_entropy, ("cuda",)),
    Library("smp SoftCrossEntropyLoss", SMP, _smp_cross_entropy, unweighted_cross_entropy),
    Library("kornia focal_loss", "kornia.losses", _kornia_focal, focal, objective=FOCAL),
    Library("MONAI FocalLoss", "monai.losses", _monai_focal, focal, objective=FOCAL),
    Library("smp softmax focal", f"{SMP}._functional", _smp_softmax_focal, focal, objective=FOCAL),
    Library("smp FocalLoss", SMP, _smp_focal, one_against_all_focal, objective=SIGMOID_FOCAL),
    Library(
        "torchvision sigmoid_focal_loss",
        "torchvision.ops",
        _torchvision_focal,
        one_against_all_focal,
        objective=SIGMOID_FOCAL,
    ),
)


def make_libraries(case: Case) -> list[Provider]:
    """Each library's loss, with a reason where it cannot be used here."""
    providers = []
    for name, module, make, eager, on, objective in LIBRARIES:
        if objective != case.loss:
            continue
        package = module.partition(".")[0]
        missing, loss = None, eager
        if case.device not in on:
            missing = f"runs on {', '.join(on)} only"
        else:
            try:
                if importlib.util.find_spec(package) is None:
                    missing = f"{package} is not installed"
                else:
                    loss = make(importlib.import_module(module))
            except Exception as error:  # whatever a package does when it is imported
                missing = f"{package} cannot be used: {type(error).__name__}: {first_line(error)}"
        whole = (interpolated(case, given) for given in (loss, eager))
        providers.append(Provider(interpolation(case) + name, *whole, missing=missing, captured=False))
    return providers
