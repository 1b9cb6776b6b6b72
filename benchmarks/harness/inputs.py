"""The inputs of a case: label maps, logits of a network that mostly predicts them, class weights."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ial_cuda import CAMVID, CITYSCAPES, Hierarchy, median_frequency_weights

from .measure import Result, output_of

CROSS_ENTROPY, IAL = "cross-entropy", "IAL"
#: Losses that are functions of each pixel's -log π.
FOCAL, TOP_K, THRESHOLD = "focal loss", "OHEM by top-k", "OHEM by threshold"
#: Another objective: a sigmoid for each class against the rest.
SIGMOID_FOCAL = "focal loss of sigmoids"
IGNORE_INDEX = 255
#: The paper's hierarchies, by their number of classes.
HIERARCHIES = {hierarchy.num_classes: hierarchy for hierarchy in (CITYSCAPES, CAMVID)}
#: Cityscapes' train ids of CamVid's classes, without void.
CAMVID_AS_CITYSCAPES = [10, 2, 5, 0, 1, 8, 7, 4, 13, 11, 18]
#: The most tiles of a result that are compared with the truth, and the most logits in them beyond two tiles.
CHECKED_TILES, CHECKED_LOGITS = 16, 96 << 20


@dataclass(frozen=True)
class Case:
    """A loss, and the logits and labels that it is computed from."""

    loss: str  # such as CROSS_ENTROPY
    device: str
    dtype: torch.dtype  # of the logits
    shape: tuple[int, int, int, int]  # of the logits, (N, C, h, w)
    scale: int = 1  # label height and width over those of the logits
    labels: torch.dtype = torch.int64
    layout: torch.memory_format = torch.contiguous_format
    rows: bool = False  # whether the loss gets logits (N h w, C) and labels (N h w,)
    label_smoothing: float = 0.0
    threads: int | None = None  # None: all

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        if self.scale > 1:
            size += f" to {self.scale * self.shape[2]}x{self.scale * self.shape[3]}"
        extras = [
            f"{name_of(self.labels)} labels" * (self.labels != torch.int64),
            name_of(self.layout) * (self.layout != torch.contiguous_format and not self.rows),
            "rows" * self.rows,
            f"label smoothing {self.label_smoothing}" * (self.label_smoothing > 0),
            f"{self.threads} thread{'s' * (self.threads != 1)}" if self.threads else "",
        ]
        return ", ".join(
            [f"{self.loss}, {size} {name_of(self.dtype)} on {self.device}", *filter(None, extras)]
        )

    def as_json(self) -> dict[str, Any]:
        return {name: name_of(value) if name in _TORCH else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Case:
        given = {name: getattr(torch, value) if name in _TORCH else value for name, value in fields.items()}
        return cls(**given | {"shape": tuple(fields["shape"])})

    @property
    def pixels(self) -> int:
        """Of the labels."""
        batch, _, height, width = self.shape
        return batch * height * width * self.scale**2

    @property
    def logits_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


#: The fields of a case that are objects of torch.
_TORCH = ("dtype", "labels", "layout")


def name_of(value: torch.dtype | torch.memory_format) -> str:
    return str(value).removeprefix("torch.")


def hierarchy_of(classes: int) -> Hierarchy:
    """The paper's hierarchy of that many classes, else an even split into at most 4 levels."""
    levels = min(4, classes)
    bounds = [classes * level // levels for level in range(levels + 1)]
    even = [range(*bounds[level : level + 2]) for level in range(levels)]
    return HIERARCHIES.get(classes) or Hierarchy(even)


class Inputs:
    """The tensors of a case.

    The logits are written again before each measured call. In training they also come from the layer before,
    with their end still in the caches, and a gradient computed in place overwrites them.

    Attributes:
        origin: of the labels, "CamVid" or "synthetic".
        targets: label maps (N, H, W) by dtype: int64, int32 and, where all classes fit, uint8.
        weight: class weights (C,).
        source: the values of the logits.
        written: the leaf whose memory `logits` returns.
        tile: the inputs whose float64 results are the truth.
    """

    def __init__(self, case: Case) -> None:
        batch, classes, height, width = case.shape
        labels, self.origin = _label_maps(batch, classes, case.scale * height, case.scale * width)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes that are in no image
            weight = median_frequency_weights(labels, classes, batched=True, ignore_index=IGNORE_INDEX)
        labels = labels.to(case.device)
        self.targets = {dtype: labels.to(dtype) for dtype in label_dtypes(classes)}
        self.weight = weight.to(case.device, case.dtype)
        middle = slice(case.scale // 2, None, case.scale)
        source = _trained_like(labels[:, middle, middle], classes)
        self.source = source.to(case.dtype).contiguous(memory_format=case.layout)
        self.written = torch.empty_like(self.source).requires_grad_()
        self.tile = self

    def logits(self) -> Tensor:
        """New logits, as the output of a layer: no leaf, so that they may be overwritten."""
        with torch.no_grad():
            self.write()
        return output_of(self.written)

    def write(self) -> None:
        self.written.copy_(self.source)

    def pieces(self, result: Result) -> Iterator[Result]:
        """The result of each tile, as if there were no other."""
        yield result


class Tiled(Inputs):
    """Inputs that repeat a square tile ``times`` x ``times``, a power of two.

    The mean loss is that of the tile, and ``times``² times the gradient is that of the tile. So the truth of
    the tile is enough for inputs of any size.
    """

    def __init__(
        self, tile: Inputs, times: int, layout: torch.memory_format = torch.contiguous_format
    ) -> None:
        batch, classes, side, _ = tile.source.shape
        shape = (batch, classes, times * side, times * side)
        self.tile, self.times, self.side = tile, times, side
        self.origin, self.weight, self.source = tile.origin, tile.weight, tile.source
        self.targets = {dtype: labels.repeat(1, times, times) for dtype, labels in tile.targets.items()}
        self.written = tile.source.new_empty(shape).contiguous(memory_format=layout).requires_grad_()

    def write(self) -> None:
        for place in self.places():
            self.written[place].copy_(self.source)

    def places(self) -> Iterator[tuple[slice | type(Ellipsis), ...]]:
        """The index of each tile in tensors (..., H, W)."""
        starts = range(0, self.times * self.side, self.side)
        for top in starts:
            for left in starts:
                yield ..., slice(top, top + self.side), slice(left, left + self.side)

    def pieces(self, result: Result) -> Iterator[Result]:
        """Some tiles, the first and the last among them. Hundreds of tiles would take minutes."""
        places = list(self.places())
        checked = max(2, min(CHECKED_TILES, CHECKED_LOGITS // self.source.numel()))
        chosen = {round(at * (len(places) - 1) / (checked - 1)) for at in range(checked)}
        for place in [places[at] for at in sorted(chosen)]:
            yield Result(result.loss, self.times**2 * result.gradient[place])  # exact for normal numbers


def label_dtypes(classes: int) -> list[torch.dtype]:
    return [torch.int64, torch.int32, *([torch.uint8] if classes <= IGNORE_INDEX else [])]


def _label_maps(batch: int, classes: int, height: int, width: int) -> tuple[Tensor, str]:
    """Label maps (N, H, W) int64, and their origin.

    CamVid has 11 classes. For 19 classes its labels become Cityscapes' train ids. For other numbers its
    classes are spread evenly over the larger number, or several share one of the smaller number.
    """
    root = os.environ.get("IAL_CAMVID")
    files = sorted(Path(root, "testannot").glob("*.png"))[:batch] if root else []
    if files:
        size = (width, height)
        maps = [np.asarray(Image.open(file).resize(size, Image.Resampling.NEAREST)) for file in files]
        own = np.arange(CAMVID.num_classes)
        spread = own * classes // len(own) if classes > len(own) else own % classes
        classes_of = CAMVID_AS_CITYSCAPES if classes == CITYSCAPES.num_classes else spread
        table = np.append(classes_of, IGNORE_INDEX)
        return torch.from_numpy(table[np.resize(maps, (batch, height, width))]), "CamVid"
    generator = torch.Generator().manual_seed(0)
    regions = (batch, -(-height // 32), -(-width // 32))
    labels = torch.randint(classes, regions, generator=generator)
    labels[torch.rand(regions, generator=generator) < 0.08] = IGNORE_INDEX
    labels = labels.repeat_interleave(32, 1).repeat_interleave(32, 2)
    return labels[:, :height, :width].contiguous(), "synthetic"


def _trained_like(labels: Tensor, num_classes: int) -> Tensor:
    """Noise plus a margin for one class of each pixel: the right class for nine pixels of ten."""
    device = labels.device
    generator = torch.Generator(device).manual_seed(0)
    shape = (labels.shape[0], num_classes, *labels.shape[1:])
    logits = torch.randn(shape, generator=generator, device=device)
    wrong = (torch.rand(labels.shape, generator=generator, device=device) < 0.1) | (labels == IGNORE_INDEX)
    guess = torch.randint(num_classes, labels.shape, generator=generator, device=device).where(wrong, labels)
    return logits.scatter_add_(1, guess.unsqueeze(1), torch.full_like(logits[:, :1], 6.0))
