"""The results of trainings, beside those of the paper: tables and pictures, over seeds."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from rich.console import Console

from benchmarks.harness import plots
from benchmarks.harness.tables import print_table
from ial_cuda import Hierarchy

from .data import DATA_SETS, Source
from .training import LOG, PREDICTIONS

NAMES = {"enet": "ENet", "segnet": "SegNet", "fcn8s": "FCN"}
#: The settings in which compared trainings may differ.
COMPARED = ("loss", "weights", "gradient", "factors", "seed")
MEASURES = {"iou": "IoU", "accuracy": "class accuracy"}
COLOURS = (plots.ORANGE, plots.VERMILION, plots.BLUE, plots.SKY, plots.GREEN, plots.PURPLE)

#: Tables 1 and 2 of the paper: the classes in the order of the levels of `CAMVID`, then the mean.
PAPER = {
    "enet": {
        "paper": [95.1, 74.7, 35.4, 77.8, 51.7, 95.1, 86.7, 51.0, 82.4, 67.2, 34.1, 68.3],
        "paper, IAL": [88.2, 68.5, 56.8, 80.8, 42.2, 95.3, 90.9, 43.7, 79.1, 72.3, 50.9, 69.9],
    },
    "segnet": {
        "paper": [92.4, 88.8, 27.5, 87.3, 49.3, 97.2, 84.4, 20.5, 82.1, 57.1, 30.7, 65.2],
        "paper, IAL": [85.7, 81.4, 44.1, 90.7, 40.2, 97.4, 88.5, 17.6, 80.8, 61.4, 45.8, 66.7],
    },
    "fcn8s": {
        "paper": [93.5, 93.7, 33.1, 91.2, 53.3, 98.1, 89.5, 25.1, 84.5, 64.6, 38.6, 69.6],
        "paper, IAL": [86.7, 85.9, 53.1, 94.8, 43.5, 96.3, 91.8, 21.5, 82.2, 69.5, 57.6, 71.2],
    },
}


@dataclass(frozen=True)
class Run:
    """A finished training."""

    folder: Path
    recipe: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The settings that are compared."""
        loss = {"cross-entropy": "cross-entropy", "ial": "IAL"}[self.recipe["loss"]]
        weights = {"median": "weights", "none": "no weights"}[self.recipe["weights"]]
        gradient = {"paper": ", paper's gradient"}.get(self.recipe["gradient"], "")
        factors = {"sum": ", sum of factors"}.get(self.recipe["factors"], "")
        return f"{loss}, {weights}{gradient}{factors}"


#: By network and title: the runs of all seeds.
Runs = dict[str, dict[str, list[Run]]]


def load(folder: Path) -> tuple[str, Runs]:
    """The name of the data set, and the finished runs in a folder.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they differ in more than the settings that are compared.
    """
    runs: Runs = defaultdict(lambda: defaultdict(list))
    settings: dict[str, Mapping[str, Any]] = {}
    for file in sorted(folder.glob(f"**/{LOG}")):
        log = json.loads(file.read_text())
        recipe, evaluations = log["recipe"], log["evaluations"]
        if not evaluations or evaluations[-1]["step"] != log["steps"]:
            continue
        setting = {name: value for name, value in recipe.items() if name not in COMPARED}
        first = settings.setdefault(recipe["network"], setting)
        other = [name for name in setting if setting[name] != first[name]]
        if other or recipe["data"] != next(iter(settings.values()))["data"]:
            raise ValueError(f"{file} differs from the runs before it in {other or 'data'}: report it apart")
        run = Run(file.parent, recipe, log["rows"], evaluations[-1])
        runs[recipe["network"]][run.title].append(run)
    if not runs:
        raise FileNotFoundError(f"{folder} has no {LOG} of a finished training")
    ordered = {name: dict(sorted(runs[name].items(), key=order)) for name in NAMES if name in runs}
    return next(iter(settings.values()))["data"], ordered


def order(item: tuple[str, list[Run]]) -> tuple[bool, bool, str]:
    """Cross-entropy before IAL, without weights before with weights."""
    recipe = item[1][0].recipe
    return recipe["loss"] == "ial", recipe["weights"] == "median", item[0]


def spread(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Mean and standard deviation (0 for one value); None if there is no value."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return statistics.mean(known), statistics.stdev(known) if len(known) > 1 else 0.0


class Table(NamedTuple):
    title: str
    headings: list[str]
    rows: list[list[str]]

    def as_markdown(self) -> str:
        divider = "|---" * len(self.headings) + "|"
        lines = [f"| {' | '.join(row)} |" for row in [self.headings, *self.rows]]
        return "\n".join([f"{self.title}\n", lines[0], divider, *lines[1:]]) + "\n"


def tabulate(data: str, runs: Runs) -> Iterator[Table]:
    """A table of each measure: the means, then the classes, the most important ones first."""
    hierarchy = DATA_SETS[data].hierarchy
    classes = [c for level in hierarchy.levels for c in level]
    groups = [classes, hierarchy.levels[-1], *([c] for c in reversed(classes))]
    names = [hierarchy.names[c] for c in reversed(classes)]
    headings = ["", "mean", f"mean of Group {hierarchy.num_levels}", *names]
    for measure, name in MEASURES.items():
        rows = []
        for network, by_title in runs.items():
            for title, figures in (PAPER[network] if data == "camvid" else {}).items():
                top = len(hierarchy.levels[-1])
                cells = [figures[-1], statistics.mean(figures[-top - 1 : -1]), *figures[-2::-1]]
                rows.append([f"{NAMES[network]}, {title}", *(f"{cell:.1f}" for cell in cells)])
            for title, group in by_title.items():
                cells = [format_cell(group, measure, of) for of in groups]
                rows.append([f"{NAMES[network]}, {title}", *cells])
        title = f"{name} in %, mean ± standard deviation over {count_seeds(runs)}"
        yield Table(title, headings, rows)


def format_cell(group: Sequence[Run], measure: str, classes: Sequence[int]) -> str:
    """The mean over classes: its mean and deviation over seeds."""
    means = []
    for run in group:
        values = [run.evaluation[measure][c] for c in classes if run.evaluation[measure][c] is not None]
        means.append(statistics.mean(values) if values else None)
    found = spread(means)
    if found is None:
        return ""
    return f"{found[0]:.1f} ± {found[1]:.1f}" if len(group) > 1 else f"{found[0]:.1f}"


def count_seeds(runs: Runs) -> str:
    counts = sorted({len(group) for by_title in runs.values() for group in by_title.values()})
    return f"{' to '.join(map(str, {counts[0]: 0, counts[-1]: 0}))} seed{'s' * (counts[-1] > 1)}"


def describe(run: Run) -> str:
    """The settings that runs share, for a caption."""
    recipe = run.recipe
    scale, epochs, batch = (recipe[name] for name in ("scale", "epochs", "batch"))
    return f"{recipe['data']}, images scaled by {scale:g}, {epochs} epochs, batches of {batch}"


def draw_iou(data: str, runs: Runs, file: Path) -> None:
    """IoU of each class: a bar for each loss, with the standard deviation over seeds."""
    hierarchy = DATA_SETS[data].hierarchy
    classes = [c for level in hierarchy.levels for c in level]
    figure, panels = plots.make_figure(12, 4.6 * len(runs), len(runs), 1)
    for axes, (network, by_title) in zip(panels[:, 0], runs.items(), strict=True):
        width = 0.84 / len(by_title)
        for i, (title, group) in enumerate(by_title.items()):
            found = [spread([run.evaluation["iou"][c] for run in group]) or (0, 0) for c in classes]
            means, deviations = zip(*found, strict=True)
            places = np.arange(len(classes)) + (i - (len(by_title) - 1) / 2) * width
            errors = {"capsize": 2, "error_kw": {"linewidth": 1}}
            axes.bar(places, means, width, yerr=deviations, color=COLOURS[i % 6], label=title, **errors)
        axes.set_xticks(range(len(classes)), [hierarchy.names[c] for c in classes], rotation=20)
        axes.set_xlim(-0.6, len(classes) - 0.4)
        axes.set_ylim(0, 100)
        start = 0
        for number, level in enumerate(hierarchy.levels, 1):
            middle = start + (len(level) - 1) / 2
            axes.text(middle, 99, f"Group {number}", ha="center", va="top", color=plots.GREY)
            start += len(level)
            if number < hierarchy.num_levels:
                axes.axvline(start - 0.5, color=plots.GREY, linestyle=":", linewidth=1)
        axes.set_title(f"{NAMES[network]}: mean ± standard deviation over {count_seeds(runs)}")
        axes.set_ylabel("IoU, %")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    title = "IoU of each class, the least important classes left"
    figure.suptitle(f"{title}\n({describe(first_run(runs))})", fontweight="bold")
    figure.savefig(file, dpi=110)


def first_run(runs: Runs) -> Run:
    return next(iter(next(iter(runs.values())).values()))[0]


def draw_factors(runs: Runs, file: Path) -> None:
    """f_t over the epochs: the mean over seeds, and the range from the smallest to the largest seed."""
    of_ial = [
        (f"{NAMES[network]}, {title}", group)
        for network, by_title in runs.items()
        for title, group in by_title.items()
        if group[0].recipe["loss"] == "ial"
    ]
    if not of_ial:
        return
    columns = min(2, len(of_ial))
    rows = -(-len(of_ial) // columns)
    figure, panels = plots.make_figure(5.5 * columns, 3.4 * rows, rows, columns)
    for axes in panels.flat[len(of_ial) :]:
        axes.set_axis_off()
    for axes, (title, group) in zip(panels.flat, of_ial, strict=False):
        length = min(len(run.rows) for run in group)
        epochs = [row["epoch"] for row in group[0].rows[:length]]
        curves = np.array([[row["f"] for row in run.rows[:length]] for run in group])  # seed, row, t
        colours = (plots.BLUE, plots.VERMILION, plots.GREEN)
        for t in range(curves.shape[2]):
            axes.plot(epochs, curves[:, :, t].mean(0), color=colours[t % 3])
            low, high = curves[:, :, t].min(0), curves[:, :, t].max(0)
            axes.fill_between(epochs, low, high, color=colours[t % 3], alpha=0.2)
        axes.set_ylim(bottom=0)
        ends = curves[:, -1].mean(0) / axes.get_ylim()[1]
        rank = np.argsort(ends)
        for t, height in zip(rank, plots.spread(ends[rank], 0.07), strict=True):
            place = {"transform": axes.transAxes, "va": "center", "color": colours[t % 3]}
            axes.text(1.02, height, f"$f_{t + 1}$", **place)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("epoch")
        axes.set_ylabel("factor, mean over images")
    figure.suptitle("Factors of IAL during training: mean and range over seeds", fontweight="bold")
    figure.supxlabel(describe(first_run(runs)), fontsize="small", color="#444444")
    figure.savefig(file, dpi=110)


def draw_predictions(source: Source, network: str, by_title: Mapping[str, Sequence[Run]], file: Path) -> None:
    """A row for each kept image: the image, its labels, and the prediction of the first seed of each loss."""
    hierarchy = source.hierarchy
    indices = {pair.image.stem: index for index, pair in enumerate(source.pairs)}
    folders = {title: group[0].folder / PREDICTIONS for title, group in by_title.items()}
    stems = sorted(file.stem for file in next(iter(folders.values())).glob("*.png"))
    if not stems:  # a log was kept without its predictions
        return
    headings = ["image", "labels", *(title.replace(", ", "\n") for title in by_title)]
    figure = Figure(figsize=(3.2 * len(headings), 2.5 * len(stems) + 1), layout="constrained")
    panels = figure.subplots(len(stems), len(headings), squeeze=False)
    for row, stem in zip(panels, stems, strict=True):
        labels = np.asarray(source.labels(indices[stem]))
        found = [np.asarray(Image.open(folder / f"{stem}.png")) for folder in folders.values()]
        row[0].imshow(source.image(indices[stem]))
        for axes, classes in zip(row[1:], [labels, *found], strict=True):
            axes.imshow(colour_classes(classes, hierarchy, labels == hierarchy.ignore_index))
    for axes, heading in zip(panels[0], headings, strict=True):
        axes.set_title(heading)
    for axes in panels.flat:
        axes.set_axis_off()
    patches = [Patch(color=colormaps["tab20"](c), label=name) for c, name in enumerate(hierarchy.names)]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(f"{NAMES[network]}: predictions (void is black)", fontweight="bold")
    figure.savefig(file, dpi=110)


def colour_classes(classes: np.ndarray, hierarchy: Hierarchy, void: np.ndarray) -> np.ndarray:
    """A colour for each class, and black for void."""
    colours = colormaps["tab20"](np.arange(hierarchy.num_classes))[:, :3]
    picture = colours[np.where(void, 0, classes)]
    picture[void] = 0
    return picture


def report(folder: Path, root: Path | None, console: Console) -> None:
    """Prints the tables of the runs in ``folder``, and writes them and the pictures there.

    Args:
        root: the folder of the data set, for the picture of predictions; None: no such picture.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    data, runs = load(folder)
    tables = list(tabulate(data, runs))
    for table in tables:
        print_table(console, *table)
    (folder / "tables.md").write_text("\n".join(table.as_markdown() for table in tables))
    draw_iou(data, runs, folder / "iou.png")
    draw_factors(runs, folder / "factors.png")
    if root is not None:
        for network, by_title in runs.items():
            source = DATA_SETS[data].open(root, next(iter(by_title.values()))[0].evaluation["split"])
            draw_predictions(source, network, by_title, folder / f"predictions-{network}.png")
    console.print(f"Tables and pictures: {folder}", soft_wrap=True)
