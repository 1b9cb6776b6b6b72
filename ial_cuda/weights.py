"""Class weights by median frequency balancing, Eq. 2, and the label images that they are counted from."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .hierarchy import as_int


class LabelError(ValueError):
    """A label is neither a class nor void; ``map_index`` says in which of the label maps, counted from 0."""

    def __init__(self, message: str, map_index: int) -> None:
        super().__init__(message)
        self.map_index = map_index


def median_frequency_weights(
    label_maps: Iterable[torch.Tensor | np.ndarray[Any, Any]],
    num_classes: int,
    *,
    ignore_index: int = 255,
    count_void: bool = True,
) -> torch.Tensor:
    """Weights that balance frequent and rare classes, Eq. 2:

        w_c = median_freq / freq_c,    freq_c = pixels of class c / all pixels of the images that contain c,

    where median_freq is the median of freq over the classes that occur. Pixels are counted as exact integers
    and divided in float64; every image is counted by itself, so how images are batched changes nothing.

    Args:
        label_maps: label maps of any integer dtype, tensors or NumPy arrays, each one image (H, W) or a batch
            of images (N, H, W); read once and one at a time, so a generator over a whole data set will do.
        num_classes: C.
        ignore_index: the label of void pixels, which are no class.
        count_void: whether void pixels count among "all pixels of the images". With them, the 367 training
            label maps of CamVid give Column/Pole 4.7865 and Bicyclist 8.8587; without them 4.7889 and 8.8193.

    Returns:
        Weights (C,), float32, on the CPU. A class in no image gets 1.0, and a UserWarning names it.

    Raises:
        TypeError: a label map is neither a tensor nor an array, or its dtype is not an integer one.
        LabelError: a label lies outside [0, C) and is not ``ignore_index`` (a ValueError).
        ValueError: a label map is neither (H, W) nor (N, H, W), ``num_classes`` < 1, or no pixel has a class.
    """
    num_classes = as_int(num_classes, "num_classes")
    ignore_index = as_int(ignore_index, "ignore_index")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}, expected at least 1")

    images = 0
    pixels = np.zeros(num_classes, dtype=np.int64)
    pixels_where_present = np.zeros(num_classes, dtype=np.int64)
    for map_index, label_map in enumerate(label_maps):
        for image in _checked_batch(label_map, map_index, num_classes, ignore_index):
            valid = image[image != ignore_index]
            counts = np.bincount(valid.astype(np.intp), minlength=num_classes)
            images += 1
            pixels += counts
            pixels_where_present[counts > 0] += image.size if count_void else valid.size

    present = pixels > 0
    if not present.any():
        raise ValueError(
            f"label_maps has no pixel of any class in {images} images, "
            f"expected at least one label that is not ignore_index={ignore_index}"
        )
    if not present.all():
        absent = np.flatnonzero(~present).tolist()
        warnings.warn(f"no image contains the classes {absent}; their weight is 1", UserWarning, stacklevel=2)
    frequency = pixels[present] / pixels_where_present[present]
    weights = np.ones(num_classes, dtype=np.float64)
    weights[present] = np.median(frequency) / frequency
    return torch.from_numpy(weights).float()


def _checked_batch(
    label_map: object, map_index: int, num_classes: int, ignore_index: int
) -> np.ndarray[Any, Any]:
    """``label_map`` as an array (N, H, W) that holds nothing but classes and ``ignore_index``."""
    argument = f"label_maps[{map_index}]"
    if not isinstance(label_map, torch.Tensor | np.ndarray):
        raise TypeError(
            f"{argument} is a {type(label_map).__name__}, expected a torch.Tensor or numpy.ndarray"
        )
    if not _is_integer(label_map.dtype):
        raise TypeError(f"{argument} has dtype {label_map.dtype}, expected an integer dtype")
    if label_map.ndim not in (2, 3):
        raise ValueError(f"{argument} has shape {tuple(label_map.shape)}, expected (H, W) or (N, H, W)")

    labels = label_map.cpu().numpy() if isinstance(label_map, torch.Tensor) else label_map
    outside = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if outside.any():
        first = tuple(int(i) for i in np.unravel_index(outside.argmax(), outside.shape))
        raise LabelError(
            f"{argument} has label {labels[first]} at {first}, the first of {outside.sum()} bad pixels, "
            f"expected labels 0 to {num_classes - 1} or ignore_index={ignore_index}",
            map_index,
        )
    return labels if labels.ndim == 3 else labels[np.newaxis]


def _is_integer(dtype: torch.dtype | np.dtype[Any]) -> bool:
    if isinstance(dtype, torch.dtype):
        return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    return dtype.kind in "iu"


class LabelFolder:
    """The label images of a folder: its ``*.png``, sorted by name, read one at a time as it is iterated.

    Yields (H, W) uint8 arrays. Images are 8-bit with a single channel (grey), or with a palette whose indices
    are the labels. Needs Pillow.

    Attributes:
        files: the images' paths, in the order of iteration.

    Raises:
        NotADirectoryError: ``folder`` is no folder.
        FileNotFoundError: ``folder`` has no ``*.png``.
        ValueError: while iterating, an image of another kind, such as RGB; the file is named.
        OSError: while iterating, a file that cannot be read; the file is named.
        ImportError: while iterating, Pillow is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        if not Path(folder).is_dir():
            raise NotADirectoryError(f"folder is {os.fspath(folder)!r}, expected a folder of label images")
        self.files = sorted(Path(folder).glob("*.png"))
        if not self.files:
            raise FileNotFoundError(f"folder {os.fspath(folder)!r} has no *.png, expected label images in it")

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[np.ndarray[Any, Any]]:
        try:
            from PIL import Image
        except ImportError as error:
            raise ImportError("reading label images needs Pillow: pip install 'ial_cuda[cli]'") from error
        for file in self.files:
            try:
                with Image.open(file) as image:
                    mode, labels = image.mode, np.asarray(image)
            except (OSError, SyntaxError, ValueError) as error:  # Pillow has all three for a broken PNG
                raise OSError(f"{file} cannot be read as an image: {error}") from error
            if mode not in ("L", "P"):
                raise ValueError(
                    f"{file} has mode {mode}, expected 8-bit labels, a single channel (L) or a palette (P)"
                )
            yield labels
