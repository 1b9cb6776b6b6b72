"""Looks up the figures that prose quotes in the results that it cites.

A paragraph, with the table that follows it, cites files or folders of results by a path in backticks or by
`<!-- results: PATH … -->`, from the document's folder. Each number there must be one of the results, rounded
as it is in the text: a time if "ms" follows, a ratio if "times" does, any that stands there if nothing does.
Ratios that are not stored are taken between the rows of a case. Where nothing is cited, a strict document may
have no number with a unit, unless its sentence says that it is predicted, a goal or not yet measured.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: What stands in citing paragraphs and is in no result, and why.
NOT_RESULTS = {
    "10 to 13": "predicted",
    "75 to 95": "predicted",
    "goal of 10": "a goal",
    "first step by 5 of them": "a bound",
}
#: By unit: the kind of number, and how many of the unit one of the stored makes.
UNITS = {
    "ns": ("ms", 1e6),
    "µs": ("ms", 1e3),
    "ms": ("ms", 1),
    "s": ("ms", 1e-3),
    "seconds": ("ms", 1e-3),
    "KiB": ("mib", 1024),
    "MiB": ("mib", 1),
    "GiB": ("mib", 1 / 1024),
    "KB": ("mib", 2**20 / 1e3),
    "MB": ("mib", 2**20 / 1e6),
    "GB": ("mib", 2**20 / 1e9),
    "GB/s": ("gb_per_s", 1),
    "TB/s": ("gb_per_s", 1e-3),
    "%": ("percent", 1),
    "×": ("ratio", 1),
    "x": ("ratio", 1),
    "times": ("ratio", 1),
    "rounds": ("rounds", 1),
}
#: What of two rows of a case may be divided.
DIVISIBLE = ("median_ms", "forward_ms", "backward_ms", "extra_mib")

#: A shape, 1×19×512×1024, or a number and its unit; not in words such as float32 and AVX-512.
FIGURE = re.compile(
    r"(?<![\w.])(?<![A-Za-z]-)(?:(?P<shape>\d+(?:[×x]\d+)+)|(?P<number>[-−]?\d+(?:\.\d+)*(?:e-?\d+)?)"
    rf"(?:\s?(?P<unit>{'|'.join(sorted(UNITS, key=len, reverse=True))}))?)(?!\w)"
)
#: The kind of number that stands under a key.
KIND = re.compile(r"(?:^|_)(ms|mib|gb_per_s|percent|ratio|rounds)s?$")
CITED = re.compile(r"`((?:[\w.-]+/)*results/(?!latest)[\w./-]+(?:/|\.json))`")
CITED_BY_COMMENT = re.compile(r"^<!-- results: (.*?) -->", re.M)
CODE = re.compile(r"^```.*?^```$", re.M | re.S)
NO_PROSE = re.compile(r"`[^`]*`|<!--.*?-->|\]\([^)]*\)", re.S)
UNMEASURED = re.compile(r"predicted|not yet measured|\bgoals?\b", re.I)


def problems(text: str, folder: Path, *, strict: bool) -> list[str]:
    """What is wrong with the figures of a document in the folder.

    Args:
        strict: whether a figure must not stand where no result is cited.
    """
    found = []
    for paragraph in paragraphs(text):
        paths = CITED.findall(paragraph) + " ".join(CITED_BY_COMMENT.findall(paragraph)).split()
        missing = [path for path in paths if not (folder / path).exists()]
        found += [f"{path!r} is cited, which is not there" for path in missing]
        prose = " ".join(NO_PROSE.sub(" ", paragraph).split())
        for phrase in NOT_RESULTS:
            prose = prose.replace(phrase, " ")
        numbers = Numbers(folder / path for path in paths if path not in missing)
        for figure in FIGURE.finditer(prose):
            where = f"{figure[0]!r} in “…{prose[max(0, figure.start() - 40) : figure.end() + 10]}…”"
            if paths:
                if not missing and not numbers.have(**figure.groupdict()):
                    found.append(f"{where} is not in {', '.join(paths)}")
            elif strict and figure["unit"] and not UNMEASURED.search(sentence(prose, figure.start())):
                found.append(f"{where} cites no result")
    return found


def paragraphs(text: str) -> list[str]:
    """What empty lines part, without code; a table belongs to what is before it."""
    parts: list[str] = []
    for part in re.split(r"\n\s*\n", CODE.sub("", text)):
        if part.startswith("|") and parts:
            parts[-1] += "\n" + part
        else:
            parts.append(part)
    return parts


def sentence(prose: str, position: int) -> str:
    """The sentence that the position is in."""
    return prose[prose.rfind(". ", 0, position) + 1 :].split(". ")[0]


class Numbers:
    """The numbers of results: by kind, those in texts as they are written there, and shapes."""

    def __init__(self, paths: Iterator[Path]) -> None:
        self.by_kind: dict[str, set[float]] = {}
        self.written: set[str] = set()
        self.shapes: set[str] = set()
        for path in paths:
            for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
                self._add(json.loads(file.read_text()))

    def _add(self, value: Any, kind: str = "other") -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                named = KIND.search(key)
                self._add(inner, named[1] if named else "ratio" if key == "measured" else kind)
        elif isinstance(value, list):
            if all(isinstance(inner, int) for inner in value):
                self.shapes.add("x".join(map(str, value)))
            self.by_kind.setdefault("ratio", set()).update(quotients(value))
            for inner in value:
                self._add(inner, kind)
        elif isinstance(value, str):
            for figure in FIGURE.finditer(value.replace("+", " ")):  # versions end so: 2.14.1+cu130
                self.shapes.add(figure["shape"] or "")
                self.written.add(figure["number"] or "")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            self.by_kind.setdefault(kind, set()).add(value)

    def have(self, shape: str | None, number: str | None, unit: str | None) -> bool:
        """Whether one of them is this shape, or ends with it, or this number to its last digit."""
        if shape is not None:
            return any(f"x{known}".endswith("x" + shape.replace("×", "x")) for known in self.shapes)
        number = number.replace("−", "-")
        if unit is None and number in self.written:
            return True
        if number.count(".") > 1:  # a version
            return False
        kind, scale = UNITS[unit] if unit else (None, 1)
        mantissa, _, exponent = number.partition("e")
        form = f".{len(mantissa.partition('.')[2])}{'e' if exponent else 'f'}"
        return any(
            float(format(scale * value, form)) == float(number)
            for name, values in self.by_kind.items()
            if kind in (None, name)
            for value in values
        )


def quotients(rows: list[Any]) -> Iterator[float]:
    """How many times one row's figure is another's."""
    for field in DIVISIBLE:
        values = [row.get(field) for row in rows if isinstance(row, dict)]
        values = [value for value in values if isinstance(value, float) and value]
        yield from (above / below for above, below in itertools.permutations(values, 2))
