"""Times the focal loss and OHEM with their gradients: ours, other libraries' and those of plain PyTorch."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ial_cuda

from .harness.benchmark import Settings, measure_case
from .harness.cli import devices, make_parser, run
from .harness.inputs import FOCAL, IGNORE_INDEX, SIGMOID_FOCAL, THRESHOLD, TOP_K, Case, Inputs
from .harness.libraries import GAMMA, focal, make_libraries
from .harness.plots import draw_speed_ups
from .harness.providers import Loss, Provider, compiled_form, interpolated, interpolation, kernels
from .harness.report import Report
from .upsample import CLASSES, SCALE, SIZES, size

#: Pixels with π below it are kept, beside a number of the hardest; mmsegmentation's usual value.
THRESHOLDS = {TOP_K: None, THRESHOLD: 0.7}


def make_cases(device: str, given: tuple[int, int] | None, *, quick: bool) -> list[Case]:
    """The most important first. A quick run has two losses at full size in float32.

    The focal losses of sigmoids are another objective, shown for cost only. They are last: the C library
    keeps memory that they free, and what runs after them in the process finds it.
    """
    height, width = given or SIZES[device][0]
    cases = [
        Case(loss, device, dtype, (1, CLASSES, height // scale, width // scale), scale)
        for dtype in (torch.float32, torch.bfloat16)
        for scale in (1, SCALE)
        for loss in (FOCAL, TOP_K, THRESHOLD)
    ]
    return cases[:2] if quick else [*cases, replace(cases[0], loss=SIGMOID_FOCAL)]


def measure(case: Case, settings: Settings) -> Report:
    torch.compiler.reset()  # torch compiles a function for eight sizes only
    inputs = Inputs(case)
    if case.loss in (FOCAL, SIGMOID_FOCAL):
        ours = partial(ial_cuda.focal_loss, gamma=GAMMA)
        name, plain, others = "F.log_softmax + gather", focal, make_libraries(case)
    else:
        keep, thresh = pixels_to_keep(case, inputs), THRESHOLDS[case.loss]
        ours = partial(ial_cuda.ohem_cross_entropy, thresh=thresh, min_kept=keep)
        name, plain = "F.cross_entropy + topk", partial(ohem, keep, thresh)
        sampled = in_float32(interpolated(case, partial(ohem_by_sampler, keep, thresh)))
        name_of_sampled = f"{interpolation(case)}mmsegmentation's sampler"
        others = [Provider(name_of_sampled, sampled, sampled, captured=False)]
    plain = in_float32(interpolated(case, plain))
    peer = Provider(interpolation(case) + name, plain, plain)
    providers = [
        Provider(f"ial_cuda {backend.name}", our_loss(case, ours, backend.name), plain)
        for backend in kernels(case.device)
    ]
    if case.loss != SIGMOID_FOCAL:
        others = [peer, *([compiled_form(peer)] if settings.compile else []), *others]
    if settings.compile:
        providers.append(compiled_form(providers[0]))
    return measure_case(case, [*providers, *others], inputs, settings)


def our_loss(case: Case, function: Any, backend: str) -> Loss:
    options = {"upsample": "bilinear" if case.scale > 1 else None, "backend": backend}
    return lambda logits, target, _: function(logits, target, ignore_index=IGNORE_INDEX, **options)


def in_float32(loss: Loss) -> Loss:
    """The loss of half-precision logits in float32, as under autocast. In bfloat16 many pixels are equal."""

    def of_any(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return loss(logits.float() if logits.dtype.itemsize == 2 else logits, target, weight)

    return of_any


def pixel_cross_entropy(logits: Tensor, target: Tensor, *_: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, ignore_index=IGNORE_INDEX, reduction="none")


def pixels_to_keep(case: Case, inputs: Inputs) -> int:
    """About a fifth of the valid pixels, up to the widest gap between two losses.

    Without a gap, rounding would decide which pixels are kept, and the gradients could not be compared.
    """
    target = inputs.targets[torch.int64]
    nll = interpolated(case, pixel_cross_entropy)(inputs.source.double(), target, inputs.weight)
    largest = nll[target != IGNORE_INDEX].sort(descending=True).values
    fewest, most = int(0.15 * len(largest)), int(0.25 * len(largest))
    return fewest + 1 + int((-largest[fewest:most].diff()).argmax())


def ohem(keep: int, thresh: float | None, logits: Tensor, target: Tensor, _: Tensor) -> Tensor:
    """The mean loss of the ``keep`` pixels with the largest loss, and of those with π below ``thresh``."""
    nll = pixel_cross_entropy(logits, target)
    if thresh is None:
        return nll.flatten().topk(keep).values.mean()
    least = nll.detach().flatten().topk(keep + 1).values[-1]
    hard = nll > least.clamp(max=-math.log(thresh))
    return (nll * hard).sum() / hard.sum()


def ohem_by_sampler(keep: int, thresh: float | None, logits: Tensor, target: Tensor, _: Tensor) -> Tensor:
    """The same as mmsegmentation computes it: its sampler sorts the valid pixels."""
    valid = target != IGNORE_INDEX
    with torch.no_grad():
        if thresh is None:
            order = pixel_cross_entropy(logits, target)[valid].sort(descending=True).indices
            hard = torch.zeros_like(order, dtype=logits.dtype)
            hard[order[:keep]] = 1
        else:
            own = target.where(valid, 0).unsqueeze(1)
            pi = logits.softmax(1).gather(1, own).squeeze(1)[valid]
            least = pi.sort().values[min(keep, len(pi) - 1)]
            hard = (pi < least.clamp(min=thresh)).to(logits.dtype)
        weight = torch.zeros_like(target, dtype=logits.dtype).masked_scatter_(valid, hard)
    return (pixel_cross_entropy(logits, target) * weight).sum() / weight.sum()


def draw(reports: Sequence[Report], machine: Mapping[str, Any], folder: Path) -> list[Path]:
    return draw_speed_ups(reports[:2], machine, folder / "pixel_losses.png")


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser("pixel_losses", __doc__)
    parser.add_argument("--size", type=size, metavar="HxW", help="of the labels")
    arguments = parser.parse_args(argv)
    cases = [
        case
        for device in devices(arguments.device)
        for case in make_cases(device, arguments.size, quick=arguments.quick)
    ]
    return run("pixel_losses", arguments, cases, measure, draw)


if __name__ == "__main__":
    sys.exit(main())
