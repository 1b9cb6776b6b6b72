"""What the losses are given: label maps, logits of a network that mostly knows them, class weights."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ial_cuda import CAMVID, CITYSCAPES, Hierarchy, median_frequency_weights

from .common import Result, output_of

IGNORE_INDEX = 255
#: The hierarchies of the paper, by their number of classes.
HIERARCHIES = {hierarchy.num_classes: hierarchy for hierarchy in (CITYSCAPES, CAMVID)}
#: How many tiles of a result are compared with the truth at the most, and how many logits, but for two tiles.
CHECKED, CHECKED_LOGITS = 16, 96 << 20
#: The classes of CamVid's label maps, without void, as train ids of Cityscapes.
CAMVID_AS_CITYSCAPES = [10, 2, 5, 0, 1, 8, 7, 4, 13, 11, 18]


def hierarchy_of(classes: int) -> Hierarchy:
    """The paper's, where it has one for so many classes; else an even split, into 4 levels at most."""
    levels = min(4, classes)
    bounds = [classes * level // levels for level in range(levels + 1)]
    even = [range(*bounds[level : level + 2]) for level in range(levels)]
    return HIERARCHIES.get(classes) or Hierarchy(even)


class Inputs:
    """Logits of a network that mostly knows, their label maps, and class weights counted from these.

    The logits are written anew before each measured call: a gradient computed in place destroys them, and in
    training too they come from the layer before, with their end still in the caches.

    Args:
        shape: (N, C, h, w) of the logits.
        dtype: of logits and weights.
        device: of all tensors.
        ratio: how many times larger the label maps are in each direction.
        layout: the memory format of the logits.

    Attributes:
        origin: of the labels, "CamVid" or "synthetic".
        targets: the label maps (N, H, W) = (N, ratio h, ratio w), by dtype: int64, int32 and uint8, the last
            where all classes fit.
        written: the leaf that `logits` is a view of.
        tile: the inputs that these consist of; by its truth they are judged.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: str,
        ratio: int = 1,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        batch, classes, height, width = shape
        labels, self.origin = _label_maps(batch, classes, ratio * height, ratio * width)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # classes that are in no image
            weight = median_frequency_weights(labels, classes, batched=True, ignore_index=IGNORE_INDEX)
        labels = labels.to(device)
        self.targets = {labels_as: labels.to(labels_as) for labels_as in label_dtypes(classes)}
        self.weight = weight.to(device, dtype)
        middle = slice(ratio // 2, None, ratio)
        source = _trained_like(labels[:, middle, middle], classes)
        self.source = source.to(dtype).contiguous(memory_format=layout)
        self.written = torch.empty_like(self.source).requires_grad_()
        self.tile = self

    def logits(self) -> Tensor:
        """The logits, fresh, as the output of a layer: not a leaf, so that they may be overwritten."""
        with torch.no_grad():
            self.write()
        return output_of(self.written)

    def write(self) -> None:
        self.written.copy_(self.source)

    def pieces(self, result: Result) -> Iterator[Result]:
        """What a result is for each tile, as if there were no other."""
        yield result


class Tiled(Inputs):
    """Inputs that repeat a square tile ``times`` x ``times``, a power of two.

    The mean loss of the whole is that of the tile, and so is the gradient but for the number of tiles: so the
    truth of the tile tells that of inputs of any size.
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
        """Where each tile is in tensors (..., H, W)."""
        starts = range(0, self.times * self.side, self.side)
        for top in starts:
            for left in starts:
                yield ..., slice(top, top + self.side), slice(left, left + self.side)

    def pieces(self, result: Result) -> Iterator[Result]:
        """Of some tiles, the first and the last among them: of hundreds it would take minutes."""
        places = list(self.places())
        checked = max(2, min(CHECKED, CHECKED_LOGITS // self.source.numel()))
        chosen = {round(at * (len(places) - 1) / (checked - 1)) for at in range(checked)}
        for place in [places[at] for at in sorted(chosen)]:
            yield Result(result.loss, self.times**2 * result.gradient[place])  # exact, of normal numbers


def label_dtypes(classes: int) -> list[torch.dtype]:
    return [torch.int64, torch.int32, *([torch.uint8] if classes <= IGNORE_INDEX else [])]


def _label_maps(batch: int, classes: int, height: int, width: int) -> tuple[Tensor, str]:
    """Label maps (N, H, W) int64, and where they come from.

    CamVid's have its 11 classes; where there are others, 19 of them are Cityscapes', more are left out evenly
    between, and of fewer each stands for several.
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
    """Noise, and a margin for one class of each pixel, the right one in nine of ten."""
    device = labels.device
    generator = torch.Generator(device).manual_seed(0)
    shape = (labels.shape[0], num_classes, *labels.shape[1:])
    logits = torch.randn(shape, generator=generator, device=device)
    wrong = (torch.rand(labels.shape, generator=generator, device=device) < 0.1) | (labels == IGNORE_INDEX)
    guess = torch.randint(num_classes, labels.shape, generator=generator, device=device).where(wrong, labels)
    return logits.scatter_add_(1, guess.unsqueeze(1), torch.full_like(logits[:, :1], 6.0))
