"""Classes grouped into levels of importance (Chen, Gong and Yang, IJCAI 2017: Fig. 1 and section 5)."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field


def as_int(value: object, argument: str) -> int:
    """``value`` as a Python int; a TypeError that names ``argument`` if it is a boolean or no integer."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise TypeError(f"{argument} is {value!r} ({type(value).__name__}), expected an integer")


def _items(value: object, argument: str, expected: str) -> tuple[object, ...]:
    if not isinstance(value, str | bytes):
        try:
            return tuple(value)  # type: ignore[arg-type]
        except TypeError:
            pass
    raise TypeError(f"{argument} is {value!r} ({type(value).__name__}), expected {expected}")


@dataclass(frozen=True)
class Hierarchy:
    """A partition of the classes 0 ... C-1 into g levels, the least important level first.

    Level k is the paper's Group k+1. A level is a set, so its classes are kept sorted: hierarchies that mean
    the same compare and hash equal, however they were written down.

    Args:
        levels: g >= 1 levels, each with C_k >= 1 class indices; any nested sequence of integers is taken and
            stored as a tuple of tuples. Every class 0 ... C-1 is in exactly one level.
        names: optional class names, C strings in index order.

    Attributes:
        class_levels: tuple of C ints, the level of each class.

    Raises:
        TypeError: ``levels`` is not a nested sequence of integers, or ``names`` not a sequence of strings.
        ValueError: no level, an empty level, a negative class, a class in two places, a class missing, or a
            number of names other than C.

    >>> Hierarchy([[0, 2], [1]], names=["sky", "person", "road"]).class_levels
    (0, 1, 0)
    """

    levels: tuple[tuple[int, ...], ...]
    names: tuple[str, ...] | None = None
    class_levels: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        level_of: dict[int, int] = {}
        levels = []
        for k, level in enumerate(_items(self.levels, "levels", "a sequence of levels")):
            classes = _items(level, f"levels[{k}]", "a sequence of class indices")
            if not classes:
                raise ValueError(f"levels[{k}] is empty, expected at least one class in every level")
            levels.append(tuple(sorted(as_int(c, f"levels[{k}][{i}]") for i, c in enumerate(classes))))
            for c in levels[-1]:
                if c < 0:
                    raise ValueError(f"levels[{k}] holds class {c}, expected class indices from 0")
                if c in level_of:
                    raise ValueError(
                        f"levels holds class {c} twice, in levels[{level_of[c]}] and levels[{k}], "
                        "expected every class in exactly one level"
                    )
                level_of[c] = k
        if not levels:
            raise ValueError("levels is empty, expected at least one level")
        num_classes = len(level_of)
        if max(level_of) >= num_classes:
            gap = next(c for c in range(num_classes) if c not in level_of)
            raise ValueError(
                f"levels goes up to class {max(level_of)} but has no class {gap}, "
                "expected every class in exactly one level"
            )
        object.__setattr__(self, "levels", tuple(levels))
        object.__setattr__(self, "class_levels", tuple(level_of[c] for c in range(num_classes)))

        if self.names is not None:
            names = _items(self.names, "names", "a sequence of strings")
            for c, name in enumerate(names):
                if not isinstance(name, str):
                    raise TypeError(f"names[{c}] is {name!r} ({type(name).__name__}), expected a string")
            if len(names) != num_classes:
                raise ValueError(
                    f"names has length {len(names)}, expected {num_classes}, one for each class in levels"
                )
            object.__setattr__(self, "names", names)

    @classmethod
    def flat(cls, num_classes: int) -> Hierarchy:
        """All classes in one level: nothing is compared, and the loss is plain weighted cross-entropy."""
        num_classes = as_int(num_classes, "num_classes")
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}, expected at least 1")
        return cls((tuple(range(num_classes)),))

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
)
