"""CamVid and Cityscapes on disk, their augmentation, and the order of the images.

The images of a step and their augmentation depend on the seed, the epoch and the image alone, never on the
state of a random generator. So training resumes exactly, at any step and with any number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ial_cuda import CAMVID, CITYSCAPES, Hierarchy
from ial_cuda.label_images import CITYSCAPES_IDS

#: Mean and standard deviation of red, green and blue in ImageNet.
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Pair(NamedTuple):
    """The files of an image and of its label map."""

    image: Path
    labels: Path


@dataclass(frozen=True)
class Source:
    """A split of a data set.

    Attributes:
        pairs: its files, sorted.
        hierarchy: the levels of its classes, with the label of void.
        label_of: (256,) uint8, the label for each value in the files.
    """

    pairs: Sequence[Pair]
    hierarchy: Hierarchy
    label_of: np.ndarray

    def image(self, index: int) -> Image.Image:
        with Image.open(self.pairs[index].image) as image:
            return image.convert("RGB")

    def labels(self, index: int) -> Image.Image:
        with Image.open(self.pairs[index].labels) as image:
            return Image.fromarray(self.label_of[np.asarray(image)])

    def label_maps(self) -> Iterator[np.ndarray]:
        """All label maps (H, W), uint8, at full size."""
        return (np.asarray(self.labels(index)) for index in range(len(self.pairs)))


def camvid(root: Path, split: str) -> Source:
    """CamVid as in SegNet's tutorial: ``root``/train and ``root``/trainannot with the same file names.

    Raises:
        FileNotFoundError: a folder is missing or empty, or an image has no label map.
    """
    folder, annotated = root / split, root / f"{split}annot"
    images = sorted(file for file in folder.glob("*") if file.suffix in (".png", ".jpg"))
    pairs = [Pair(file, annotated / f"{file.stem}.png") for file in images]
    check(pairs, folder)
    return Source(pairs, CAMVID, np.arange(256, dtype=np.uint8))


def cityscapes(root: Path, split: str) -> Source:
    """Cityscapes: ``root``/leftImg8bit/``split``/CITY/X_leftImg8bit.png, gtFine/…/X_gtFine_labelIds.png.

    Raises:
        FileNotFoundError: as `camvid`.
    """
    folder, annotated = root / "leftImg8bit" / split, root / "gtFine" / split
    pairs = [
        Pair(file, annotated / file.parent.name / file.name.replace("_leftImg8bit", "_gtFine_labelIds"))
        for file in sorted(folder.glob("*/*_leftImg8bit.png"))
    ]
    check(pairs, folder)
    label_of = np.full(256, CITYSCAPES.ignore_index, dtype=np.uint8)
    label_of[list(CITYSCAPES_IDS)] = np.arange(len(CITYSCAPES_IDS))
    return Source(pairs, CITYSCAPES, label_of)


def check(pairs: Sequence[Pair], folder: Path) -> None:
    if not pairs:
        raise FileNotFoundError(f"{folder} has no images")
    for pair in pairs:
        if not pair.labels.is_file():
            raise FileNotFoundError(f"{pair.image} has no label map {pair.labels}")


class DataSet(NamedTuple):
    open: Callable[[Path, str], Source]  # the root folder and the split
    hierarchy: Hierarchy
    size: tuple[int, int]  # (H, W) of the images


DATA_SETS = {
    "camvid": DataSet(camvid, CAMVID, (360, 480)),
    "cityscapes": DataSet(cityscapes, CITYSCAPES, (1024, 2048)),
}


class TrainingSet(Dataset):
    """Augmented images and label maps, by (epoch, index): (h, w, 3) and (h, w), both uint8.

    The augmentation takes a window at a random place, resizes it to the output size (images bilinearly,
    labels to the nearest) and mirrors it with probability 1/2. The window is ``zoom`` times smaller than the
    output at ``scale``, with ``zoom`` uniform in [1, max_zoom]. Without a crop and with max_zoom 1 it is the
    whole image.

    Args:
        source: the split to read.
        seed: the seed of the augmentation.
        scale: the factor by which images are scaled down.
        crop: the output size (h, w) in pixels of the scaled image; None for the whole image.
        max_zoom: at least 1.

    Raises:
        ValueError: the crop is larger than the shrunk image.
    """

    def __init__(
        self, source: Source, seed: int, scale: float, crop: tuple[int, int] | None, max_zoom: float
    ) -> None:
        self.source, self.seed, self.max_zoom = source, seed, max_zoom
        full = np.array(source.image(0).size)  # (W, H), the order of Pillow
        self.size = scaled(full, scale) if crop is None else np.array(crop[::-1])
        #: (w, h) of the window without zoom, in pixels of the file
        self.window = full if crop is None else self.size / scale
        if (self.window > full).any():
            raise ValueError(f"crop is {crop}, larger than the images at scale {scale}: {full[::-1] * scale}")

    def __len__(self) -> int:
        return len(self.source.pairs)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        # index + 1: NumPy ignores trailing zeros of a seed, and (seed, epoch) is the seed of the order.
        random = np.random.default_rng((self.seed, epoch, index + 1))
        image = self.source.image(index)
        window = self.window / random.uniform(1, self.max_zoom)
        corner = random.uniform(0, 1, 2) * (image.size - window)
        box = (*corner, *np.minimum(corner + window, image.size))
        size = tuple(self.size)
        pair = (
            np.asarray(image.resize(size, Image.Resampling.BILINEAR, box)),
            np.asarray(self.source.labels(index).resize(size, Image.Resampling.NEAREST, box)),
        )
        if random.random() < 0.5:
            pair = tuple(pixels[:, ::-1] for pixels in pair)
        return tuple(torch.from_numpy(pixels.copy()) for pixels in pair)


class EvaluationSet(Dataset):
    """Images at ``scale`` (h, w, 3) and label maps at full size (H, W), both uint8, by index."""

    def __init__(self, source: Source, scale: float) -> None:
        self.source, self.scale = source, scale

    def __len__(self) -> int:
        return len(self.source.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.source.image(index)
        image = image.resize(tuple(scaled(image.size, self.scale)), Image.Resampling.BILINEAR)
        return tuple(torch.from_numpy(np.array(pixels)) for pixels in (image, self.source.labels(index)))


def scaled(size: Sequence[int], scale: float) -> np.ndarray:
    return np.rint(np.asarray(size) * scale).astype(int)


class Batches(Sampler[list[tuple[int, int]]]):
    """The keys of `TrainingSet` for the steps ``start`` to ``stop`` - 1. Each epoch has its own order.

    Args:
        images: the number of images. An epoch leaves out the last ones that do not fill a batch.
        batch: the number of images per step, over all processes.
        seed: the seed of the order.
        start, stop: steps, counted over the whole training.
        rank, world: this process gets every world-th image of a batch, starting at rank.
    """

    def __init__(
        self, images: int, batch: int, seed: int, start: int, stop: int, rank: int = 0, world: int = 1
    ) -> None:
        self.images, self.batch, self.seed, self.steps = images, batch, seed, range(start, stop)
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            epoch, place = divmod(step, self.images // self.batch)
            order = np.random.default_rng((self.seed, epoch)).permutation(self.images)
            batch = order[place * self.batch :][: self.batch]
            yield [(epoch, int(index)) for index in batch[self.rank :: self.world]]


def as_input(images: Tensor, device: torch.device) -> Tensor:
    """Images (N, H, W, 3), uint8, as input of a network: (N, 3, H, W), float32, normalized."""
    images = images.to(device, non_blocking=True).permute(0, 3, 1, 2) / 255
    mean, deviation = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (images - mean) / deviation
