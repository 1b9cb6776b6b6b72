"""What came of the trainings: the paper's tables with ours beside them, over seeds, and pictures."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from ial_cuda import CAMVID, CITYSCAPES, Hierarchy

from .data import SOURCES, Source
from .training import LOG, PREDICTIONS

NAMES = {"enet": "ENet", "segnet": "SegNet", "fcn8s": "FCN"}
HIERARCHIES = {"camvid": CAMVID, "cityscapes": CITYSCAPES}
#: What trainings that are compared may differ in.
COMPARED = ("loss", "weights", "gradient", "factors", "seed")

#: Tables 1 and 2 of the paper, class by class in the order of `CAMVID`'s levels; last the mean.
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
    """A training that came to its end."""

    folder: Path
    recipe: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, Any]

    @property
    def title(self) -> str:
        """What of it is compared."""
        recipe = self.recipe
        weights = {"median": "", "none": ", no weights"}[recipe["weights"]]
        if recipe["loss"] == "cross-entropy":
            return f"cross-entropy{weights}"
        gradient = "" if recipe["gradient"] == "exact" else f", {recipe['gradient']} gradient"
        factors = "" if recipe["factors"] == "mean" else f", {recipe['factors']} of factors"
        return f"IAL{gradient}{factors}{weights}"


#: By network and title; all seeds.
Runs = dict[str, dict[str, list[Run]]]


def load(folder: Path) -> tuple[str, Runs]:
    """The data set's name and the runs below a folder, those that have not ended left out.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they differ in more than what is compared.
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
        raise FileNotFoundError(f"{folder} has no {LOG} of a training that came to its end")
    ordered = {
        name: dict(sorted(runs[name].items(), key=lambda item: item[0].lower()))
        for name in NAMES
        if name in runs
    }
    return next(iter(settings.values()))["data"], ordered


def spread(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Mean and standard deviation (0 of one value); None where there is no value."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return statistics.mean(known), statistics.stdev(known) if len(known) > 1 else 0.0


@dataclass(frozen=True)
class Summary:
    """A table: a heading for each column but the first, and rows of a name and a cell for each heading."""

    title: str
    headings: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]

    def as_rich(self) -> Table:
        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column(no_wrap=True)
        for heading in self.headings:
            table.add_column(heading, justify="right")
        for name, cells in self.rows:
            table.add_row(name, *cells)
        return table

    def as_markdown(self) -> str:
        lines = [
            f"{self.title}\n",
            f"| | {' | '.join(self.headings)} |",
            "|---" * (len(self.headings) + 1) + "|",
            *(f"| {name} | {' | '.join(cells)} |" for name, cells in self.rows),
        ]
        return "\n".join(lines) + "\n"


def summarize(data: str, runs: Runs) -> Iterator[Summary]:
    """Tables 1 and 2: the lower half of the levels, the upper half with the means; of IoU, of accuracy."""
    hierarchy = HIERARCHIES[data]
    order = [c for level in hierarchy.levels for c in level]
    place = {c: i for i, c in enumerate(order)}
    half = hierarchy.num_levels // 2
    parts = (range(half), range(half, hierarchy.num_levels))
    top = len(hierarchy.levels[-1])
    for measure, name in (("iou", "IoU"), ("accuracy", "class accuracy")):
        for number, part in enumerate(parts, 1):
            classes = [c for level in part for c in hierarchy.levels[level]]
            headings = [hierarchy.names[c] for c in classes]
            last = number == len(parts)
            if last:
                headings += [f"mean of Group {hierarchy.num_levels}", "mean"]
            rows = []
            for network, by_title in runs.items():
                for title, figures in (PAPER[network] if data == "camvid" else {}).items():
                    cells = [figures[place[c]] for c in classes]
                    if last:
                        cells += [statistics.mean(figures[-top - 1 : -1]), figures[-1]]
                    rows.append((f"{NAMES[network]}, {title}", [f"{cell:.1f}" for cell in cells]))
                for title, group in by_title.items():
                    cells = [cell(group, measure, [c]) for c in classes]
                    if last:
                        cells += [cell(group, measure, hierarchy.levels[-1]), cell(group, measure, order)]
                    rows.append((f"{NAMES[network]}, {title} ({seeds(group)})", cells))
            yield Summary(
                f"Table {number}, ours: {name} in %, mean ± standard deviation over seeds", headings, rows
            )


def cell(group: Sequence[Run], measure: str, classes: Sequence[int]) -> str:
    """The mean over classes, mean and deviation over seeds."""
    means = []
    for run in group:
        values = [run.evaluation[measure][c] for c in classes if run.evaluation[measure][c] is not None]
        means.append(statistics.mean(values) if values else None)
    found = spread(means)
    return (
        "" if found is None else f"{found[0]:.1f} ± {found[1]:.1f}" if len(group) > 1 else f"{found[0]:.1f}"
    )


def seeds(group: Sequence[Run]) -> str:
    return f"{len(group)} seed{'s' if len(group) > 1 else ''}"


def draw_iou(data: str, runs: Runs, file: Path) -> None:
    """IoU of each class, a bar for each loss, the standard deviation over seeds as whisker."""
    hierarchy = HIERARCHIES[data]
    order = [c for level in hierarchy.levels for c in level]
    figure = Figure(figsize=(12, 4 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), 1, squeeze=False)[:, 0]
    for axes, (network, by_title) in zip(panels, runs.items(), strict=True):
        step = 0.8 / len(by_title)
        for i, (title, group) in enumerate(by_title.items()):
            found = [spread([run.evaluation["iou"][c] for run in group]) or (0, 0) for c in order]
            means, deviations = zip(*found, strict=True)
            at = np.arange(len(order)) + (i - (len(by_title) - 1) / 2) * step
            axes.bar(at, means, step, yerr=deviations, capsize=2, label=f"{title} ({seeds(group)})")
        axes.set_xticks(range(len(order)), [hierarchy.names[c] for c in order], rotation=20)
        for level in np.cumsum([len(level) for level in hierarchy.levels])[:-1]:
            axes.axvline(level - 0.5, color="grey", linestyle=":")
        axes.set(title=f"{NAMES[network]}: least important classes left, Group by Group", ylabel="IoU, %")
        axes.legend()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


def draw_factors(runs: Runs, file: Path) -> None:
    """f_t over the epochs: the mean over seeds, and from the least to the greatest of them."""
    with_factors = [
        (network, title, group)
        for network, by_title in runs.items()
        for title, group in by_title.items()
        if group[0].recipe["loss"] == "ial"
    ]
    if not with_factors:
        return
    figure = Figure(figsize=(5 * len(with_factors), 4), layout="constrained")
    for axes, (network, title, group) in zip(
        figure.subplots(1, len(with_factors), squeeze=False)[0], with_factors, strict=True
    ):
        length = min(len(run.rows) for run in group)
        epochs = [row["epoch"] for row in group[0].rows[:length]]
        curves = np.array([[row["f"] for row in run.rows[:length]] for run in group])  # seed, row, t
        for t in range(curves.shape[2]):
            (line,) = axes.plot(epochs, curves[:, :, t].mean(0), label=f"f_{t + 1}")
            axes.fill_between(
                epochs, curves[:, :, t].min(0), curves[:, :, t].max(0), color=line.get_color(), alpha=0.2
            )
        axes.set(title=f"{NAMES[network]}, {title} ({seeds(group)})", xlabel="epoch")
        axes.legend()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


def draw_predictions(source: Source, network: str, by_title: Mapping[str, Sequence[Run]], file: Path) -> None:
    """A row for each kept image: the photograph, its labels, and what each loss' first seed makes of it."""
    indices = {pair.image.stem: index for index, pair in enumerate(source.pairs)}
    folders = {title: group[0].folder / PREDICTIONS for title, group in by_title.items()}
    stems = sorted(file.stem for file in next(iter(folders.values())).glob("*.png"))
    headings = ["image", "labels", *by_title]
    figure = Figure(figsize=(3.2 * len(headings), 2.5 * len(stems)), layout="constrained")
    panels = figure.subplots(len(stems), len(headings), squeeze=False)
    for row, stem in zip(panels, stems, strict=True):
        labels = np.asarray(source.labels(indices[stem]))
        found = [np.asarray(Image.open(folder / f"{stem}.png")) for folder in folders.values()]
        row[0].imshow(source.image(indices[stem]))
        for axes, classes in zip(row[1:], [labels, *found], strict=True):
            axes.imshow(coloured(classes, source.hierarchy, labels == source.ignore_index))
    for axes, heading in zip(panels[0], headings, strict=True):
        axes.set_title(heading)
    for axes in panels.flat:
        axes.set_axis_off()
    figure.suptitle(NAMES[network])
    figure.savefig(file, dpi=120)


def coloured(classes: np.ndarray, hierarchy: Hierarchy, void: np.ndarray) -> np.ndarray:
    """A colour for each class, and black for void."""
    colours = colormaps["tab20"](np.arange(hierarchy.num_classes))[:, :3]
    picture = colours[np.where(void, 0, classes)]
    picture[void] = 0
    return picture


def report(folder: Path, root: Path | None, console: Console) -> None:
    """Prints tables and writes them and the pictures to ``folder``, of the runs below it.

    Args:
        root: the data set's folder, for the pictures of predictions; None: none.

    Raises:
        What `load` raises.
    """
    data, runs = load(folder)
    tables = list(summarize(data, runs))
    for table in tables:
        console.print(table.as_rich())
    (folder / "tables.md").write_text("\n".join(table.as_markdown() for table in tables))
    draw_iou(data, runs, folder / "iou.png")
    draw_factors(runs, folder / "factors.png")
    if root is not None:
        for network, by_title in runs.items():
            source = SOURCES[data](root, next(iter(by_title.values()))[0].evaluation["split"])
            draw_predictions(source, network, by_title, folder / f"predictions-{network}.png")
    console.print(f"Tables and pictures: {folder}", soft_wrap=True)
