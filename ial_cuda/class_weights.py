"""Class weights by median frequency balancing (Eq. 2)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from .arguments import as_bool
from .distributed import Group, as_group, gather, require_alike
from .hierarchy import Hierarchy, HierarchyLike, resolve_ignore_index

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LabelMap: TypeAlias = torch.Tensor | np.ndarray[Any, Any]


class LabelError(ValueError):
    """A label is neither a class nor void. ``map_index`` is the index of its label map, from 0."""

    def __init__(self, message: str, map_index: int) -> None:
        super().__init__(message)
        self.map_index = map_index


def median_frequency_weights(
    label_maps: LabelMap | Iterable[LabelMap],
    hierarchy: HierarchyLike,
    *,
    batched: bool | None = None,
    ignore_index: int | None = None,
    count_void: bool = True,
    process_group: Group | None = None,
) -> torch.Tensor:
    """Computes class weights by median frequency balancing, Eq. 2 of Chen, Gong and Yang (IJCAI 2017).

        w_c = median_freq / freq_c,    freq_c = pixels of class c / all pixels of the images that contain c

    median_freq is the median of freq over the classes that occur. Pixels are counted as integers and divided
    in float64. Each image is counted on its own, so the result does not depend on how images are batched.

    Args:
        label_maps: label maps of any integer dtype or bool, tensors or NumPy arrays. They are read once, one
            at a time, so a generator over a data set works. A single tensor or array is one map.
        hierarchy: the number of classes C, or anything else that `Hierarchy.of` takes. Only its classes and
            its void label are used.
        batched: what the first dimension of a map means. True: images, (N, *spatial). False: each map is one
            image (*spatial), such as a volume (D, H, W). None: each map is one image (H, W).
        ignore_index: the label of void pixels. None means the hierarchy's own, else 255.
        count_void: whether "all pixels of the images" includes void pixels. With them, the 367 training
            label maps of CamVid give Column/Pole 4.7865 and Bicyclist 8.8587; without them 4.7889 and 8.8193.
        process_group: None, or the `torch.distributed.ProcessGroup`, or one dimension of a `DeviceMesh`, over
            which the data set is split. Each rank passes its own label maps, in any number or none. All ranks
            get the same weights: those of one process with all label maps, bit for bit. Only the counts are
            sent, in one gather, after a rank has read its maps. So a rank waits for the slowest one, up to
            the timeout of the group. With NCCL, call `torch.cuda.set_device` first.

    Returns:
        Weights (C,), float32, on the CPU. A class in no image gets 1.0, and a UserWarning names it.

    Raises:
        TypeError: a label map is neither a tensor nor an array, or its dtype is not an integer dtype. Or
            another argument has a wrong type.
        ValueError: a label is outside [0, C) and is not ``ignore_index``; the shape of a label map does not
            fit ``batched``; no pixel has a class; ``hierarchy`` or ``ignore_index`` is not valid. With
            ``process_group`` also: the number of classes, ``ignore_index`` or ``count_void`` is not the same
            on all ranks; another rank failed.
        Exception: whatever the iterator of ``label_maps`` raises. With ``process_group``, a rank that fails
            raises its own error, and all others a ValueError with the number of that rank and its message.

    Examples:
        >>> import ial_cuda, torch
        >>> labels = torch.tensor([[0, 0, 0, 1], [0, 0, 2, 255]])
        >>> ial_cuda.median_frequency_weights(labels, 3)
        tensor([0.2000, 1.0000, 1.0000])
    """
    read = partial(_read, label_maps, hierarchy, batched, ignore_index, count_void)
    counts = read() if process_group is None else _sum(as_group(process_group, "process_group"), read)

    pixels = np.array(counts.pixels, dtype=np.int64)
    pixels_where_present = np.array(counts.pixels_where_present, dtype=np.int64)
    present = pixels > 0
    if not present.any():
        raise ValueError(
            f"label_maps has no pixel of any class in {counts.images} images, "
            f"expected at least one label that is not ignore_index={counts.ignore_index}"
        )
    if not present.all():
        absent = np.flatnonzero(~present).tolist()
        some = f"{absent[:20]} and {len(absent) - 20} more" if len(absent) > 20 else f"{absent}"
        warnings.warn(f"no image contains the classes {some}; their weight is 1", UserWarning, stacklevel=2)
    frequency = pixels[present] / pixels_where_present[present]
    weights = np.ones(counts.num_classes, dtype=np.float64)
    weights[present] = np.median(frequency) / frequency
    return torch.from_numpy(weights).float()


@dataclass(frozen=True)
class _Counts:
    """Everything that the weights depend on, and the settings that it was counted with.

    Attributes:
        pixels: the number of pixels of each class.
        pixels_where_present: for each class, the number of all pixels of the images that contain it.
    """

    num_classes: int
    ignore_index: int
    count_void: bool
    images: int
    pixels: list[int]
    pixels_where_present: list[int]

    @property
    def settings(self) -> dict[str, object]:
        """What must be the same on all ranks, by its name in errors."""
        return {
            "the number of classes": self.num_classes,
            "ignore_index": self.ignore_index,
            "count_void": self.count_void,
        }


def _read(
    label_maps: LabelMap | Iterable[LabelMap],
    hierarchy: HierarchyLike,
    batched: bool | None,
    ignore_index: int | None,
    count_void: bool,
) -> _Counts:
    """Checks the arguments and counts the pixels of this process's label maps."""
    hierarchy = Hierarchy.of(hierarchy)
    num_classes = hierarchy.num_classes
    ignore_index = resolve_ignore_index(ignore_index, num_classes, hierarchy.ignore_index)
    batched = None if batched is None else as_bool(batched, "batched")
    count_void = as_bool(count_void, "count_void")
    if isinstance(label_maps, torch.Tensor | np.ndarray):
        label_maps = [label_maps]
    try:
        iter(label_maps)
    except TypeError:
        raise TypeError(f"label_maps is a {type(label_maps).__name__}, expected label maps or one") from None

    images = 0
    pixels = np.zeros(num_classes, dtype=np.int64)
    pixels_where_present = np.zeros(num_classes, dtype=np.int64)
    for map_index, label_map in enumerate(label_maps):
        labels = _as_array(label_map, f"label_maps[{map_index}]", batched)
        for image in labels if batched else [labels]:
            counts, valid = _count(image, num_classes, ignore_index)
            if counts.sum() != valid:
                raise _label_error(labels, map_index, num_classes, ignore_index)
            images += 1
            pixels += counts
            pixels_where_present[counts > 0] += image.size if count_void else valid
    return _Counts(
        num_classes, ignore_index, count_void, images, pixels.tolist(), pixels_where_present.tolist()
    )


def _sum(group: ProcessGroup, read: Callable[[], _Counts]) -> _Counts:
    """The counts of all ranks of a group. If ``read`` fails on a rank, all ranks raise, so none waits."""
    try:
        own = read()
    except Exception as error:
        gather(f"{type(error).__name__}: {error}", group)
        raise
    of_ranks: list[_Counts] = []
    for rank, answer in enumerate(gather(own, group)):
        if isinstance(answer, str):
            raise ValueError(f"process_group: rank {rank} of the group failed: {answer}")
        of_ranks.append(answer)
    require_alike([counts.settings for counts in of_ranks], "process_group")
    return replace(
        own,
        images=sum(counts.images for counts in of_ranks),
        pixels=_add(counts.pixels for counts in of_ranks),
        pixels_where_present=_add(counts.pixels_where_present for counts in of_ranks),
    )


def _add(of_ranks: Iterable[list[int]]) -> list[int]:
    return [sum(of_class) for of_class in zip(*of_ranks, strict=True)]


def _as_array(label_map: object, argument: str, batched: bool | None) -> np.ndarray[Any, Any]:
    """``label_map`` as an array. Its dtype and shape are checked."""
    if not isinstance(label_map, torch.Tensor | np.ndarray) or isinstance(label_map, np.ma.MaskedArray):
        raise TypeError(
            f"{argument} is a {type(label_map).__name__}, expected a torch.Tensor or numpy.ndarray"
        )
    if not _is_integer(label_map.dtype):
        raise TypeError(f"{argument} has dtype {label_map.dtype}, expected an integer dtype")
    shape = tuple(label_map.shape)
    if batched is None and len(shape) != 2:
        raise ValueError(
            f"{argument} has shape {shape}, expected (H, W), or batched=True for (N, *spatial), or "
            "batched=False for (*spatial)"
        )
    if len(shape) < (2 if batched else 1):
        expected = "(N, *spatial)" if batched else "(*spatial)"
        raise ValueError(f"{argument} has shape {shape}, expected {expected} for batched={batched}")
    if isinstance(label_map, np.ndarray):
        return label_map
    if label_map.is_meta:
        raise ValueError(f"{argument} is on the meta device, expected a device that stores values")
    return label_map.cpu().numpy()


def _is_integer(dtype: torch.dtype | np.dtype[Any]) -> bool:
    if isinstance(dtype, torch.dtype):
        return not (dtype.is_floating_point or dtype.is_complex)
    return dtype.kind in "iub"


def _blocks(labels: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """The labels in C order, in blocks: nothing of the map's size is allocated."""
    return iter(np.nditer(labels, ["external_loop", "buffered", "zerosize_ok"], order="C", buffersize=2**18))


def _is_class(labels: np.ndarray[Any, Any], num_classes: int) -> np.ndarray[Any, Any]:
    return (labels >= 0) & (labels < num_classes)


def _count(
    image: np.ndarray[Any, Any], num_classes: int, ignore_index: int
) -> tuple[np.ndarray[Any, Any], int]:
    """The number of pixels of each class, and the number of pixels that are not void."""
    counts = np.zeros(num_classes, dtype=np.int64)
    valid = 0
    for block in _blocks(image):
        labels = block[block != ignore_index]
        valid += labels.size
        classes = labels[_is_class(labels, num_classes)]
        counts += np.bincount(classes.astype(np.intp), minlength=num_classes)
    return counts, valid


def _label_error(
    labels: np.ndarray[Any, Any], map_index: int, num_classes: int, ignore_index: int
) -> LabelError:
    first, bad, seen = None, 0, 0
    for block in _blocks(labels):
        outside = (block != ignore_index) & ~_is_class(block, num_classes)
        if first is None and outside.any():
            first = tuple(int(i) for i in np.unravel_index(seen + outside.argmax(), labels.shape))
        bad += int(outside.sum())
        seen += block.size
    return LabelError(
        f"label_maps[{map_index}] has label {labels[first]} at {first}, the first of {bad} bad pixels, "
        f"expected labels 0 to {num_classes - 1} or ignore_index={ignore_index}",
        map_index,
    )
