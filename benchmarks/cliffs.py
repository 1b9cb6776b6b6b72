"""Finds cliffs of the CPU kernels: one thread's time per logit over what should hardly change it.

Lists neighbours that differ by more than 1.3 times. `--before` measures another checkout's package too.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import Tensor

from ial_cuda import importance_aware_loss

from .harness.checkouts import Program
from .harness.cli import make_plain_parser
from .harness.machine import describe_machine, write_json
from .harness.plots import BLUE, ORANGE, SKY, VERMILION, save

CLIFF = 1.3
PIXELS = 1 << 16
RUNS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 1024, PIXELS)
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
NAMES = ("1 level, forward", "1 level, step", "4 levels, forward", "4 levels, step")
STEPS = dict(zip(NAMES, (SKY, BLUE, ORANGE, VERMILION), strict=True))  # colours
PANELS = "AAAAAAAA;BBBCCCCC;DDDDDDDD;EEEEFFGG"  # a letter for each scan


class Case(NamedTuple):
    scan: str
    x: int | str
    logits: Tensor
    target: Tensor


def image(classes: int, *, kinds: int = PIXELS, run: int = 8, width: int = 256) -> tuple[Tensor, Tensor]:
    """Logits of an image, and labels of ``kinds`` classes at random that change every ``run`` pixels."""
    height = PIXELS // width
    labels = torch.randint(min(kinds, classes), (PIXELS // run + 1,)).repeat_interleave(run)
    return torch.randn(1, classes, height, width), labels[: height * width].view(1, height, width)


def cases() -> Iterator[Case]:
    for classes in range(1, 41):
        yield Case("classes", classes, *image(classes, run=1))
    for kinds in range(1, 20):
        yield Case("different labels, in random order, of 19 classes", kinds, *image(19, kinds=kinds, run=1))
    for run in RUNS:
        yield Case("pixels between changes of the label", run, *image(19, run=run))
    for width in WIDTHS:
        logits, target = image(19, width=width)
        yield Case("pixels per row, rows not contiguous", width, LAYOUTS["cropped"](logits), target)
    logits, target = image(19)
    for layout, change in LAYOUTS.items():
        yield Case("layout", layout, change(logits), target.flatten() if "rows" in layout else target)
    for dtype in ("float32", "float64", "float16", "bfloat16"):
        yield Case("type of logits", dtype, logits.to(getattr(torch, dtype)), target)
    for dtype in ("int64", "int32", "uint8"):
        yield Case("type of labels", dtype, logits, target.to(getattr(torch, dtype)))


def nanoseconds(case: Case, rounds: int) -> dict[str, float]:
    """Per logit, of each step: the minimum by the thread's clock, since disturbances only add to it."""
    classes = case.logits.shape[1]
    hierarchies = [list(range(classes))], [list(range(k, classes, 4)) for k in range(min(4, classes))]
    times: dict[str, list[int]] = {name: [] for name in STEPS}
    for _ in range(rounds + 2):
        for name, (hierarchy, step) in zip(STEPS, itertools.product(hierarchies, (False, True)), strict=True):
            leaf = case.logits.detach().requires_grad_(step)
            start = time.thread_time_ns()
            loss = importance_aware_loss(leaf, case.target, hierarchy, factor_scope="batch")
            if step:
                loss.backward()
            times[name].append(time.thread_time_ns() - start)
    return {name: round(min(taken) / case.logits.numel(), 4) for name, taken in times.items()}


def cliffs(scan: dict[str, dict[str, float]]) -> Iterator[str]:
    for (x, one), (y, other) in itertools.pairwise(scan.items()):
        for name in STEPS:
            ratio = max(one[name] / other[name], other[name] / one[name])
            if ratio > CLIFF:
                yield f"{x} to {y}: {name}: {one[name]:.2f} and {other[name]:.2f} ns, {ratio:.2f} times"


def draw(folder: Path) -> None:
    """Draws cliffs.json and, hollow and dashed, cliffs-before.json. Lines join numbers only."""
    now, before = folder / "cliffs.json", folder / "cliffs-before.json"
    results = {file: json.loads(file.read_text()) for file in (before, now) if file.exists()}
    figure = Figure(figsize=(13, 14), layout="constrained")
    panels = figure.subplot_mosaic(PANELS)
    series = list(itertools.product(results.items(), enumerate(STEPS.items())))
    for axes, (scan, points) in zip(panels.values(), results[now]["scans"].items(), strict=True):
        numeric = scan != "layout" and not scan.startswith("type")
        for (file, result), (index, (name, colour)) in series:
            x = [place + (0 if numeric else 0.15 * (index - 1.5)) for place in range(len(points))]
            y = [result["scans"][scan][point][name] for point in points]
            label, line, fill = (name, "-", colour) if file == now else (f"{name}, before", "--", "white")
            look = {"marker": "o", "markersize": 4, "markerfacecolor": fill}
            axes.plot(x, y, linestyle=line if numeric else "none", color=colour, label=label, **look)
        axes.set_xticks(range(len(points)), [x.replace(" ", "\n", 1) for x in points], fontsize="small")
        axes.set(xlabel=scan, ylabel="ns per logit", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels["A"].legend(ncols=2, frameon=False)
    save(figure, "Time per logit on one thread", results[now]["machine"], "cpu", "", folder / "cliffs.png")


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_plain_parser("cliffs", __doc__)
    parser.add_argument("--before", type=Path, metavar="DIR", help="a checkout with its extension built")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    before = arguments.output / "cliffs-before.json"
    before.unlink(missing_ok=True)
    if arguments.before:
        program = Program("cliffs", ["--rounds", str(arguments.rounds)])
        write_json(before, program.run(arguments.before.resolve()))
    scans: dict[str, dict[str, dict[str, float]]] = {}
    for case in cases():
        scans.setdefault(case.scan, {})[str(case.x)] = nanoseconds(case, arguments.rounds)
    write_json(arguments.output / "cliffs.json", {"machine": describe_machine(), "scans": scans})
    draw(arguments.output)
    for scan, points in scans.items():
        print(scan, *cliffs(points), sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
