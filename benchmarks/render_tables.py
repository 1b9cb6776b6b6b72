"""Renders the tables of the documents from result files, and checks that they are up to date.

A table stands between two comments. The first one is its recipe, with paths from the document's folder:

    <!-- table
    run = ../benchmarks/results/cpu-amd-epyc-avx512/loss.json
    input: {loss}, {shape} float32 on cpu
    | loss, shape | ours, ms | F.cross_entropy / ours |
    | {loss}, {shape} | {run[ial_cuda cpu].median_ms:.2f} | {run[F.cross_entropy].ratio:.2f} |
    -->
    <!-- /table -->

`NAME = FILE` names a result. `input:` selects cases of the first result, in its order; {word} captures
letters, digits, dots and hyphens. The heading follows, then templates of rows for str.format, which can use
the captured words. A template with {name} is rendered for each provider of a case, with {run.FIELD}; others
once for a case, with {run[PROVIDER].FIELD}. Null becomes an empty cell, a provider without a value no row.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import string
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
START = "<!-- table\n"
BLOCK = re.compile(rf"({START}(?P<recipe>.*?)-->\n).*?(<!-- /table -->)", re.S)
FILE = re.compile(r"(\w+) = (.+)")


class Lookup(dict[str, Any]):
    """Items that str.format also finds as attributes."""

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{key!r} is missing, expected one of {', '.join(self)}")

    __getattr__ = dict.__getitem__


class _Formatter(string.Formatter):
    """Renders null as nothing, and remembers the values of results."""

    def __init__(self) -> None:
        self.values: list[Any] = []

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        value, key = super().get_field(field_name, args, kwargs)
        if isinstance(kwargs[key], Lookup):
            self.values.append(value)
        return value, key

    def format_field(self, value: Any, format_spec: str) -> str:
        return "" if value is None else super().format_field(value, format_spec)


def make_table(recipe: str, folder: Path) -> str:
    lines = recipe.splitlines()
    files = dict(match.groups() for match in map(FILE.fullmatch, lines) if match)
    patterns = [line.removeprefix("input: ") for line in lines if line.startswith("input: ")]
    heading, *templates = [line for line in lines if line.startswith("|")] or [""]
    known = len(files) + len(patterns) + 1 + len(templates)
    if not (files and patterns and templates) or len(lines) != known:
        expected = "NAME = FILE, input: PATTERN, | heading |, | row |"
        raise ValueError(f"the recipe of a table is {lines}, expected {expected}")
    results = [json.loads((folder / file).read_text())["cases"] for file in files.values()]
    results = [Lookup({case["input"]: case for case in cases}) for cases in results]
    table = [heading, "|" + "---|" * (heading.count("|") - 1)]
    for given, captured in _select(patterns, list(results[0])):
        cases = {name: _rows(result[given]) for name, result in zip(files, results, strict=True)}
        providers = [row["name"] for row in results[0][given]["providers"]]
        for template in templates:
            for name in providers if "{name}" in template else [None]:
                views = {key: Lookup(rows | rows[name]) if name else rows for key, rows in cases.items()}
                formatter = _Formatter()
                line = formatter.format(template, **{"name": name} | captured | views)
                if name is None or any(value is not None for value in formatter.values):
                    table.append(line)
    return "\n".join(table) + "\n"


def _rows(case: dict[str, Any]) -> Lookup:
    return Lookup({row["name"]: Lookup(row) for row in [*case["providers"], *case.get("parts", [])]})


def _select(patterns: Sequence[str], inputs: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """The inputs that match, with the captured words."""
    for pattern in patterns:
        expression = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[\\w.-]+?)", re.escape(pattern))
        matches = [match for match in (re.fullmatch(expression, given) for given in inputs) if match]
        if not matches:
            raise ValueError(f"input is {pattern!r}, expected a pattern of any of {'; '.join(inputs)}")
        yield from ((match.string, match.groupdict()) for match in matches)


def render(text: str, folder: Path) -> str:
    """The document in the folder with its tables rendered."""
    if text.count(START) != len(BLOCK.findall(text)):
        raise ValueError("a comment `<!-- table` has no end, expected `-->` and then `<!-- /table -->`")
    return BLOCK.sub(lambda block: block[1] + make_table(block["recipe"], folder) + block[3], text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.render_tables", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true", help="write nothing; print rows that are wrong")
    check = parser.parse_args(argv).check
    outdated = False
    for file in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]:
        text = file.read_text()
        rendered = render(text, file.parent)
        if rendered == text:
            continue
        outdated = True
        names = str(file.relative_to(ROOT)), "from the results"
        for line in difflib.unified_diff(text.splitlines(), rendered.splitlines(), *names, n=0, lineterm=""):
            print(line)
        if not check:
            file.write_text(rendered)
    return int(check and outdated)


if __name__ == "__main__":
    sys.exit(main())
