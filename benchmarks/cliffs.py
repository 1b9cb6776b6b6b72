"""Cliffs of the CPU kernels: the time per logit on one thread, over what should not change it by much.

Neighbours more than 1.3 times apart are listed. ``--before`` draws another checkout's package beside, whose
extension is built: python -m benchmarks.cliffs --before ../old --output benchmarks/results/NAME
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from ial_cuda import importance_aware_loss

from .checkouts import Program
from .command import make_plain_parser
from .common import describe_machine, write_json
from .report import describe_hardware

CLIFF = 1.3
PIXELS = 1 << 16
WIDTHS = (*range(1, 9), 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 80, 96, 127, 128, 129, 191, 192, 193)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "rows (M, C)": lambda x: x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]),
    "transposed": lambda x: x.mT.contiguous().mT,
    "cropped": lambda x: F.pad(x, (0, 3))[..., :-3],
    "odd offset": lambda x: F.pad(x, (1, 0))[..., 1:],
    "step 2": lambda x: x.repeat_interleave(2, 3)[..., ::2],
}
STEPS = ("1 level, forward", "1 level, step", "4 levels, forward", "4 levels, step")


class Case(NamedTuple):
    scan: str
    x: int | str
    logits: Tensor
    target: Tensor


def image(classes: int, *, kinds: int = 1 << 30, run: int = 1, width: int = 256) -> tuple[Tensor, Tensor]:
    """Logits of one image, and labels of ``kinds`` classes at random that change every ``run`` pixels."""
    shape = (1, PIXELS // width, width)
    labels = torch.randint(min(kinds, classes), (PIXELS // run + 1,)).repeat_interleave(run)
    count = shape[1] * width
    return torch.randn(1, classes, *shape[1:]), labels[:count].view(shape)


def cases() -> Iterator[Case]:
    for classes in range(1, 41):
        yield Case("classes", classes, *image(classes))
    for kinds in range(1, 20):
        yield Case("classes at random in a block, of 19", kinds, *image(19, kinds=kinds))
    for run in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 1024, PIXELS):
        yield Case("pixels between changes of the label", run, *image(19, run=run))
    for width in WIDTHS:
        logits, target = image(19, run=8, width=width)
        yield Case("width of rows that are not contiguous", width, LAYOUTS["cropped"](logits), target)
    for layout, change in LAYOUTS.items():
        logits, target = image(19, run=8)
        yield Case("layout", layout, change(logits), target.flatten() if "rows" in layout else target)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        logits, target = image(19, run=8)
        yield Case("type of logits", str(dtype)[6:], logits.to(dtype), target)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        logits, target = image(19, run=8)
        yield Case("type of labels", str(dtype)[6:], logits, target.to(dtype))


def nanoseconds(case: Case, rounds: int) -> dict[str, float]:
    """Per logit, of each step, by the clock of the thread; the least of the rounds: others only add to it."""
    classes = case.logits.shape[1]
    groups = [list(range(classes))], [list(range(k, classes, 4)) for k in range(min(4, classes))]
    found: dict[str, list[int]] = {name: [] for name in STEPS}
    for _ in range(rounds + 2):
        for name, (hierarchy, step) in zip(STEPS, itertools.product(groups, (False, True)), strict=True):
            leaf = case.logits.detach().requires_grad_(step)
            start = time.thread_time_ns()
            loss = importance_aware_loss(leaf, case.target, hierarchy, factor_scope="batch")
            if step:
                loss.backward()
            found[name].append(time.thread_time_ns() - start)
    return {name: round(min(times) / case.logits.numel(), 4) for name, times in found.items()}


def cliffs(scan: dict[str, dict[str, float]]) -> Iterator[str]:
    for (x, one), (y, other) in itertools.pairwise(scan.items()):
        for name in STEPS:
            ratio = max(one[name] / other[name], other[name] / one[name])
            if ratio > CLIFF:
                yield f"{x} to {y}: {name}: {one[name]:.2f} and {other[name]:.2f} ns, {ratio:.2f} times"


def draw(result: dict[str, Any], before: dict[str, Any] | None, file: Path) -> None:
    figure = Figure(figsize=(19, 20), layout="constrained")
    figure.suptitle(f"Time per logit, one thread; dashed: before\n{describe_hardware(result['machine'])}")
    for axes, (scan, points) in zip(figure.subplots(4, 2).flat, result["scans"].items(), strict=False):
        for package, line in ((before, "--"), (result, "-")):
            found = package["scans"][scan] if package else {}
            for index, name in enumerate(STEPS if found else ()):
                values = [found[x][name] for x in points]
                label = name if package is result else None
                axes.plot(list(points), values, line, marker=".", color=f"C{index}", label=label)
        axes.set(xlabel=scan, ylabel="ns a logit", ylim=(0, None))
        axes.tick_params(axis="x", labelsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    figure.axes[-1].set_axis_off()
    figure.savefig(file, dpi=80)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_plain_parser("cliffs", __doc__)
    parser.add_argument("--before", type=Path, metavar="DIR", help="a checkout with its extension built")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    before = None
    if arguments.before:
        rounds = ["--rounds", str(arguments.rounds)]
        before = Program("cliffs", rounds).run(arguments.before.resolve())
    scans: dict[str, dict[str, dict[str, float]]] = {}
    for case in cases():
        scans.setdefault(case.scan, {})[str(case.x)] = nanoseconds(case, arguments.rounds)
    result = {"machine": describe_machine(), "scans": scans}
    write_json(arguments.output / "cliffs.json", result)
    if before:
        write_json(arguments.output / "cliffs-before.json", before)
    draw(result, before, arguments.output / "cliffs.png")
    for scan, points in scans.items():
        print(scan, *cliffs(points), sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
