"""Keeps the figures of documents true: tables are rendered from results, prose is looked up there.

A table stands between two comments. The first says how it is made, with paths from the document's folder:

    <!-- figures
    run = benchmarks/results/cpu-amd-epyc/loss.json
    input: 1x19x{height}x{width} float32 on cpu
    | size | ours, ms | reference / ours |
    | {height}×{width} | {run[ial_cuda cpu].median_ms:.2f} | {run[reference].ratio:.2f} |
    -->
    <!-- /figures -->

`NAME = FILE` names a result. `input:` chooses cases of the first one, in its order; {word} stands for any
letters, digits and hyphens. Then come the heading and the rows, made by str.format once for each case, with
{run[PROVIDER].FIELD}, or once for each provider, with {name} and {run.FIELD}. What is null stays empty.
"""

from __future__ import annotations

import argparse
import json
import re
import string
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import quoted

ROOT = Path(__file__).resolve().parents[1]
#: The documents, and whether a figure must not stand there without a result.
DOCUMENTS = {"README.md": True, "benchmarks/README.md": False}
BLOCK = re.compile(
    r"(?P<start><!-- figures\n(?P<recipe>.*?)-->\n)(?P<table>.*?)(?P<end><!-- /figures -->)", re.S
)
FILE = re.compile(r"^(\w+) = (.+)$", re.M)


class Row:
    """A row of a result; its fields are attributes, as str.format wants them."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def __getattr__(self, field: str) -> Any:
        return _get(self._fields, field, f"the row {self._fields['name']!r}")


class Case:
    """A case of a result: its rows by name, and as attributes the fields of the row whose turn it is."""

    def __init__(self, case: dict[str, Any], name: str | None) -> None:
        self._rows = {row["name"]: Row(row) for row in case["providers"] + case.get("parts", [])}
        self._input, self._name = case["input"], name

    def __getitem__(self, name: str) -> Row:
        return _get(self._rows, name, self._input)

    def __getattr__(self, field: str) -> Any:
        return getattr(self[self._name], field)


def _get(found: dict[str, Any], key: str, where: str) -> Any:
    if key not in found:
        raise ValueError(f"{where} has no {key!r}, expected one of {', '.join(map(str, found))}")
    return found[key]


class _Formatter(string.Formatter):
    def format_field(self, value: Any, spec: str) -> str:
        return "" if value is None else super().format_field(value, spec)


def make_table(recipe: str, folder: Path) -> str:
    """The table, with paths from the folder."""
    lines = recipe.splitlines()
    inputs = [line.removeprefix("input: ") for line in lines if line.startswith("input: ")]
    files = dict(FILE.findall(recipe))
    heading, *templates = [line for line in lines if line.startswith("|")] or [""]
    if not (files and inputs and templates) or len(lines) != len(files) + len(inputs) + 1 + len(templates):
        raise ValueError(
            f"a table's comment is {lines}, expected NAME = FILE, input: PATTERN, | heading |, | row |"
        )
    results = {
        name: {case["input"]: case for case in json.loads((folder / file).read_text())["cases"]}
        for name, file in files.items()
    }
    first = next(iter(results.values()))
    table = [heading, "|" + "---|" * (heading.count("|") - 1)]
    for given, captured in _choose(inputs, first):
        cases = {name: _get(cases, given, files[name]) for name, cases in results.items()}
        names = [row["name"] for row in first[given]["providers"]]
        for template in templates:
            for name in names if "{name}" in template else [None]:
                views = {key: Case(case, name) for key, case in cases.items()}
                table.append(_Formatter().format(template, name=name, **captured, **views))
    return "\n".join(table) + "\n"


def _choose(patterns: Sequence[str], inputs: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The inputs that match, and what the words of the pattern stand for."""
    for pattern in patterns:
        expression = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[\\w-]+?)", re.escape(pattern))
        matches = [match for match in (re.fullmatch(expression, given) for given in inputs) if match]
        if not matches:
            raise ValueError(f"input is {pattern!r}, expected one that matches any of {'; '.join(inputs)}")
        yield from ((match.string, match.groupdict()) for match in matches)


def render(text: str, folder: Path) -> str:
    """The document with its tables as the results have them."""
    if text.count("<!-- figures\n") != len(BLOCK.findall(text)):
        raise ValueError("a comment `<!-- figures` has no end, expected `-->` and later `<!-- /figures -->`")
    return BLOCK.sub(lambda block: block["start"] + make_table(block["recipe"], folder) + block["end"], text)


def as_prose(text: str) -> str:
    """The document with its tables as what is written in them by hand, citing their files."""

    def by_hand(block: re.Match[str]) -> str:
        files = [file for _, file in FILE.findall(block["recipe"])]
        lines = [line for line in block["recipe"].splitlines() if line.startswith("|")]
        return f"<!-- results: {' '.join(files)} -->\n" + re.sub(r"\{.*?\}", "", "\n".join(lines))

    return BLOCK.sub(by_hand, text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.figures",
        description="Renders the tables of the documents, and tells which figures are wrong.",
    )
    parser.add_argument(
        "--check", action="store_true", help="tell which tables are wrong, too, and write nothing"
    )
    check = parser.parse_args(argv).check
    wrong = []
    for name, strict in DOCUMENTS.items():
        file = ROOT / name
        text = file.read_text()
        rendered = render(text, file.parent)
        if check:
            missing = [line for line in rendered.splitlines() if line not in text.splitlines()]
            wrong += [f"{name}: a table lacks the row {line}" for line in missing]
            wrong += [f"{name}: a table has other rows"] if rendered != text and not missing else []
        elif rendered != text:
            file.write_text(rendered)
            print(f"{name}: tables rendered")
        wrong += [
            f"{name}: {problem}" for problem in quoted.problems(as_prose(text), file.parent, strict=strict)
        ]
    for line in wrong:
        print(line)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
