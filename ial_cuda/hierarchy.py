"""Classes grouped into levels of importance (Chen, Gong and Yang, IJCAI 2017: Fig. 1 and section 5)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, SupportsIndex, TypeAlias, cast

import torch

from .arguments import as_int, as_label

#: Far more than a segmentation has. A mistaken number must not fill the memory with a list of classes.
_MAX_FLAT = 2**20


def _as_num_classes(value: object, argument: str) -> int:
    num_classes = as_int(value, argument)
    if not 1 <= num_classes <= _MAX_FLAT:
        raise ValueError(f"{argument} is {num_classes}, expected 1 to {_MAX_FLAT} classes")
    return num_classes


def _items(value: object, argument: str, expected: str) -> tuple[object, ...]:
    if not isinstance(value, str | bytes):
        try:
            return tuple(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise TypeError(f"{argument} is {value!r} ({type(value).__name__}), expected {expected}")


@dataclass(frozen=True, init=False)
class Hierarchy:
    """A partition of the classes 0 ... C-1 into g levels, the least important level first.

    Level k is the paper's Group k+1. A level is a set, so its classes are kept sorted: hierarchies that mean
    the same compare and hash equal, however they were written down.

    Args:
        levels: g >= 1 levels, each with C_k >= 1 class indices; any nested sequence of integers is taken and
            stored as a tuple of tuples. Every class 0 ... C-1 is in exactly one level.
        names: optional class names, C strings in index order.
        ignore_index: optional, the label of void pixels in this data set. It is the default of every
            ``ignore_index`` that comes with this hierarchy.

    Attributes:
        class_levels: tuple of C ints, the level of each class.

    Raises:
        TypeError: ``levels`` is not a nested sequence of integers, ``names`` not a sequence of strings, or
            ``ignore_index`` not an integer.
        ValueError: no level, an empty level, a negative class, a class in two places, a class missing, a
            number of names other than C, or an ``ignore_index`` that is a class or outside int64.

    >>> Hierarchy([[0, 2], [1]], names=["sky", "person", "road"]).class_levels
    (0, 1, 0)
    """

    levels: tuple[tuple[int, ...], ...]
    names: tuple[str, ...] | None = None
    ignore_index: int | None = None

    def __init__(
        self,
        levels: Iterable[Iterable[SupportsIndex]],
        names: Iterable[str] | None = None,
        ignore_index: SupportsIndex | None = None,
    ) -> None:
        level_of: dict[int, int] = {}
        sorted_levels = []
        for k, level in enumerate(_items(levels, "levels", "a sequence of levels")):
            classes = _items(level, f"levels[{k}]", "a sequence of class indices")
            if not classes:
                raise ValueError(f"levels[{k}] is empty, expected at least one class in every level")
            sorted_levels.append(tuple(sorted(as_int(c, f"levels[{k}][{i}]") for i, c in enumerate(classes))))
            for c in sorted_levels[-1]:
                if c < 0:
                    raise ValueError(f"levels[{k}] holds class {c}, expected class indices from 0")
                if c in level_of:
                    raise ValueError(
                        f"levels holds class {c} twice, in levels[{level_of[c]}] and levels[{k}], "
                        "expected every class in exactly one level"
                    )
                level_of[c] = k
        if not sorted_levels:
            raise ValueError("levels is empty, expected at least one level")
        num_classes = len(level_of)
        if max(level_of) >= num_classes:
            gap = next(c for c in range(num_classes) if c not in level_of)
            raise ValueError(
                f"levels goes up to class {max(level_of)} but has no class {gap}, "
                "expected every class in exactly one level"
            )
        if names is not None:
            names = cast("tuple[str, ...]", _items(names, "names", "a sequence of strings"))
            for c, name in enumerate(names):
                if not isinstance(name, str):
                    raise TypeError(f"names[{c}] is {name!r} ({type(name).__name__}), expected a string")
            if len(names) != num_classes:
                raise ValueError(
                    f"names has length {len(names)}, expected {num_classes}, one for each class in levels"
                )
        if ignore_index is not None:
            ignore_index = as_label(ignore_index, "ignore_index")
            if 0 <= ignore_index < num_classes:
                raise ValueError(
                    f"ignore_index is {ignore_index}, a class in levels, expected a label outside "
                    f"0 to {num_classes - 1}"
                )
        # Frozen, and class_levels is no field: `dataclasses.asdict` gives what the constructor takes.
        put = object.__setattr__  # torch 2.11 compiles no other way
        put(self, "levels", tuple(sorted_levels))
        put(self, "names", names)
        put(self, "ignore_index", ignore_index)
        put(self, "_class_levels", tuple(level_of[c] for c in range(num_classes)))

    @classmethod
    def flat(cls, num_classes: SupportsIndex) -> Hierarchy:
        """All classes in one level: nothing is compared, and the loss is plain weighted cross-entropy.

        Raises:
            TypeError, ValueError: ``num_classes`` is not an integer from 1 to 2**20.
        """
        return cls([range(_as_num_classes(num_classes, "num_classes"))])

    @classmethod
    def of(cls, value: HierarchyLike, argument: str = "hierarchy") -> Hierarchy:
        """The hierarchy that a configuration file means.

        Args:
            value: a `Hierarchy`; the name of a preset, "camvid" or "cityscapes"; C, for `Hierarchy.flat`; a
                nested sequence of class indices; or a mapping as `to_dict` returns it.
            argument: what errors call ``value``.

        Raises:
            TypeError, ValueError: ``value`` is none of these, or what the constructor raises.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            if value not in PRESETS:
                raise ValueError(f"{argument} is {value!r}, expected one of {', '.join(map(repr, PRESETS))}")
            return PRESETS[value]
        # An int of a compiler knows of no attributes.
        if isinstance(value, int) or (isinstance(value, SupportsIndex) and not getattr(value, "ndim", 0)):
            return cls([range(_as_num_classes(value, argument))])
        if not isinstance(value, Iterable):
            raise TypeError(
                f"{argument} is {value!r} ({type(value).__name__}), expected an ial_cuda.Hierarchy, the name "
                "of a preset, a number of classes, or a nested sequence of class indices"
            )
        try:
            return cls.from_dict(value) if isinstance(value, Mapping) else cls(value)
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{argument}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """``levels``, ``names`` and ``ignore_index`` as lists, strings, ints and None, for JSON or YAML."""
        return {
            "levels": [list(level) for level in self.levels],
            "names": None if self.names is None else list(self.names),
            "ignore_index": self.ignore_index,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Hierarchy:
        """The hierarchy of `to_dict`; ``names`` and ``ignore_index`` may be missing.

        Raises:
            TypeError: ``data`` is not a mapping, lacks ``levels`` or has another key.
            TypeError, ValueError: what the constructor raises.
        """
        if not isinstance(data, Mapping):
            raise TypeError(
                f"data is {data!r} ({type(data).__name__}), expected a mapping such as to_dict returns"
            )
        if "levels" not in data or not set(data) <= {"levels", "names", "ignore_index"}:
            raise TypeError(
                f"data has the keys {list(data)}, expected levels and, optionally, names and ignore_index"
            )
        return cls(**data)

    def __fx_create_arg__(self, tracer: torch.fx.Tracer) -> torch.fx.Node:
        """For `torch.fx`: the node of a graph that makes this hierarchy."""
        return tracer.create_node(
            "call_function", type(self), (self.levels, self.names, self.ignore_index), {}
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Unpickled by the constructor, so that a file cannot hold levels and class_levels that disagree.
        return type(self), (self.levels, self.names, self.ignore_index)

    @property
    def class_levels(self) -> tuple[int, ...]:
        """The level of each class."""
        return vars(self)["_class_levels"]  # type: ignore[no-any-return]

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return len(self.class_levels)

    @property
    def num_levels(self) -> int:
        """g, the number of levels."""
        return len(self.levels)

    def __str__(self) -> str:
        lines = [f"Hierarchy: {self.num_classes} classes, {self.num_levels} levels, least important first"]
        for k, level in enumerate(self.levels):
            classes = (f"{c} {self.names[c]}" if self.names else str(c) for c in level)
            lines.append(f"  level {k}: {', '.join(classes)}")
        return "\n".join(lines)


#: Whatever `Hierarchy.of` makes a hierarchy of.
HierarchyLike: TypeAlias = (
    Hierarchy | str | SupportsIndex | Iterable[Iterable[SupportsIndex]] | Mapping[str, Any]
)


def resolve_ignore_index(
    ignore_index: object, num_classes: int, void_label: int | None = None, argument: str = "ignore_index"
) -> int:
    """The label of void pixels: ``ignore_index``, else the data set's ``void_label``, else 255.

    This is the one rule of every entry point. An explicit ``ignore_index`` may be a class; a default may not.

    Raises:
        TypeError: ``ignore_index`` is not an integer.
        ValueError: it is outside int64; or it is None and 255 is one of the classes.
    """
    if ignore_index is not None:
        return as_label(ignore_index, argument)
    if void_label is not None:
        return void_label
    if num_classes > 255:
        raise ValueError(
            f"{argument} is None, which means 255, a class of {num_classes}: expected the label of void "
            "pixels, or -100 where no pixel is void"
        )
    return 255


#: CamVid, 11 classes in the order of the SegNet and ENet label maps, grouped as in Fig. 1.
CAMVID = Hierarchy(
    levels=((0,), (1, 2, 5, 7), (3, 4, 6), (8, 9, 10)),
    names=(
        "Sky",
        "Building",
        "Column/Pole",
        "Road",
        "Sidewalk",
        "Tree",
        "Sign/Symbol",
        "Fence",
        "Car",
        "Pedestrian",
        "Bicyclist",
    ),
    ignore_index=11,
)

#: Cityscapes, 19 classes in train-id order, grouped as in the text of section 5. Table 3 lists pole, traffic
#: light and traffic sign among Groups 1 to 3; the text puts them into Group 4, as here.
CITYSCAPES = Hierarchy(
    levels=((10,), (2, 3, 4, 8, 9), (0, 1, 16), (5, 6, 7, 11, 12, 13, 14, 15, 17, 18)),
    names=(
        "road",
        "sidewalk",
        "building",
        "wall",
        "fence",
        "pole",
        "traffic light",
        "traffic sign",
        "vegetation",
        "terrain",
        "sky",
        "person",
        "rider",
        "car",
        "truck",
        "bus",
        "train",
        "motorcycle",
        "bicycle",
    ),
    ignore_index=255,
)

#: Presets by name, for `Hierarchy.of` and the command line.
PRESETS = {"camvid": CAMVID, "cityscapes": CITYSCAPES}

# A checkpoint that holds a hierarchy loads with torch.load's default, weights_only=True.
torch.serialization.add_safe_globals([Hierarchy])
