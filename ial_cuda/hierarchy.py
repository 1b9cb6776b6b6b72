"""Classes grouped into levels of importance (Chen, Gong and Yang, IJCAI 2017: Fig. 1 and section 5)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, SupportsIndex, TypeAlias, cast

import torch

from .arguments import as_int, as_label

#: Far more classes than a data set has. Without a limit, a wrong number could fill the memory with a list.
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

    Level k is Group k+1 of Chen, Gong and Yang (IJCAI 2017). The classes of a level are stored sorted, so
    equal partitions compare equal and have the same hash. A hierarchy is immutable.

    Args:
        levels: g >= 1 levels, each with at least one class index, as a nested sequence of integers. It is
            stored as a tuple of tuples. Every class 0 ... C-1 is in exactly one level.
        names: optional class names, C strings in index order.
        ignore_index: optional, the label of void pixels in the data set. It is the default ``ignore_index``
            of the functions and modules that are given this hierarchy.

    Raises:
        TypeError: ``levels`` is not a nested sequence of integers, ``names`` is not a sequence of strings, or
            ``ignore_index`` is not an integer.
        ValueError: there is no level, an empty level, a negative class, a class in two places or a missing
            class. Or the number of names is not C, or ``ignore_index`` is a class or outside int64.

    Examples:
        >>> from ial_cuda import Hierarchy
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
        # class_levels is not a field: `dataclasses.asdict` returns the arguments of the constructor.
        put = object.__setattr__  # the class is frozen, and torch 2.11 can compile this form only
        put(self, "levels", tuple(sorted_levels))
        put(self, "names", names)
        put(self, "ignore_index", ignore_index)
        put(self, "_class_levels", tuple(level_of[c] for c in range(num_classes)))

    @classmethod
    def flat(cls, num_classes: SupportsIndex) -> Hierarchy:
        """A hierarchy with all classes in one level. The loss is then weighted cross-entropy.

        Args:
            num_classes: C, from 1 to 2**20.

        Raises:
            TypeError: ``num_classes`` is not an integer.
            ValueError: ``num_classes`` is out of range.
        """
        return cls([range(_as_num_classes(num_classes, "num_classes"))])

    @classmethod
    def of(cls, value: HierarchyLike, argument: str = "hierarchy") -> Hierarchy:
        """Converts a value, such as one of a configuration file, to a hierarchy.

        Args:
            value: a `Hierarchy`; the name of a preset, "camvid" or "cityscapes"; a number of classes C, for
                one level; a nested sequence of class indices; or a mapping like the result of `to_dict`.
            argument: the name of ``value`` in errors.

        Raises:
            TypeError: ``value`` has none of these types, or an item has a wrong type.
            ValueError: ``value`` is no preset, or the constructor rejects the levels.

        Examples:
            >>> from ial_cuda import Hierarchy
            >>> Hierarchy.of("camvid").num_levels
            4
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            if value not in PRESETS:
                raise ValueError(f"{argument} is {value!r}, expected one of {', '.join(map(repr, PRESETS))}")
            return PRESETS[value]
        # torch.compile's symbolic int has no attributes.
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
        """The inverse of `to_dict`.

        Args:
            data: a mapping with the key ``levels`` and, optionally, ``names`` and ``ignore_index``.

        Raises:
            TypeError: ``data`` is not a mapping, has no ``levels`` or has an unknown key. Or a value has a
                wrong type.
            ValueError: the constructor rejects a value.
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
        """For `torch.fx`: a node that creates this hierarchy in a graph."""
        return tracer.create_node(
            "call_function", type(self), (self.levels, self.names, self.ignore_index), {}
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # Unpickling calls the constructor, so levels and class_levels of a file always agree.
        return type(self), (self.levels, self.names, self.ignore_index)

    @property
    def class_levels(self) -> tuple[int, ...]:
        """The level of each class, C ints."""
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


#: What `Hierarchy.of` takes.
HierarchyLike: TypeAlias = (
    Hierarchy | str | SupportsIndex | Iterable[Iterable[SupportsIndex]] | Mapping[str, Any]
)


def resolve_ignore_index(
    ignore_index: object, num_classes: int, void_label: int | None = None, argument: str = "ignore_index"
) -> int:
    """The label of void pixels: ``ignore_index``, else the data set's ``void_label``, else 255.

    All functions and modules with a hierarchy use this rule. An explicit ``ignore_index`` may be a class, a
    default may not.

    Raises:
        TypeError: ``ignore_index`` is not an integer.
        ValueError: ``ignore_index`` is outside int64, or it is None and 255 is a class.
    """
    if ignore_index is not None:
        return as_label(ignore_index, argument)
    if void_label is not None:
        return void_label
    if num_classes > 255:
        raise ValueError(
            f"{argument} is None, which means 255, but 255 is one of the {num_classes} classes: expected the "
            "label of void pixels, or -100 if there are none"
        )
    return 255


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
"""CamVid: 11 classes in the order of the SegNet and ENet label maps, 4 levels as in Fig. 1, void label 11."""

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
"""Cityscapes: 19 classes in train-id order, 4 levels as in the text of section 5, void label 255.

The text puts pole, traffic light and traffic sign into Group 4. Table 3 lists them in Groups 1 to 3.
"""

#: Presets by name, for `Hierarchy.of` and the command line.
PRESETS = {"camvid": CAMVID, "cityscapes": CITYSCAPES}

# torch.load reads checkpoints with a hierarchy with its default weights_only=True.
torch.serialization.add_safe_globals([Hierarchy])
