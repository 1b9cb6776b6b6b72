"""The documents' tables are those of the results, and the check finds a changed digit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import render_tables

ROOT = Path(__file__).resolve().parents[2]
RESULT = {
    "cases": [
        {
            "input": f"IAL, 1x{classes}x64x128 float32 on cpu",
            "providers": [
                {"name": "ial_cuda cpu", "median_ms": 2.0, "ratio": 1.0, "extra_mib": 0.25},
                {"name": "reference", "median_ms": 3.149 * classes, "ratio": 1.57, "extra_mib": None},
                {"name": "not installed", "median_ms": None, "ratio": None, "extra_mib": None},
            ],
            "parts": [{"name": "reduce", "median_ms": 1.25}],
        }
        for classes in (2, 19)
    ],
}
TABLE = """Before.

<!-- table
run = results/a.json
input: {loss}, {shape} float32 on cpu
| loss, shape | ours | reference |
| {loss}, {shape} | {run[ial_cuda cpu].median_ms:.1f} | {run[reference].median_ms:.1f} |
-->
<!-- /table -->

After.
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/a.json").write_text(json.dumps(RESULT))
    monkeypatch.setattr(render_tables, "ROOT", tmp_path)
    return tmp_path


def rendered_rows(recipe: str, folder: Path) -> list[str]:
    return render_tables.make_table(recipe, folder).splitlines()[2:]


def test_the_documents(capsys):
    failed = render_tables.main(["--check"])
    assert not failed, capsys.readouterr().out
    assert render_tables.START in (ROOT / "README.md").read_text()


def test_a_row_for_each_case(folder):
    table = (
        "| loss, shape | ours | reference |\n|---|---|---|\n"
        "| IAL, 1x2x64x128 | 2.0 | 6.3 |\n| IAL, 1x19x64x128 | 2.0 | 59.8 |\n"
    )
    assert render_tables.render(TABLE, folder) == TABLE.replace("<!-- /", table + "<!-- /")


def test_a_row_for_each_provider_that_has_values(folder):
    recipe = (
        "a = results/a.json\nb = results/a.json\ninput: IAL, 1x{classes}x64x128 float32 on cpu\n| | | | |\n"
        "| {classes}: {name} | {a.ratio:.2f} | {b.extra_mib:.1f} | {a.median_ms:.1f} |\n"
    )
    assert rendered_rows(recipe, folder) == [
        "| 2: ial_cuda cpu | 1.00 | 0.2 | 2.0 |",
        "| 2: reference | 1.57 |  | 6.3 |",
        "| 19: ial_cuda cpu | 1.00 | 0.2 | 2.0 |",
        "| 19: reference | 1.57 |  | 59.8 |",
    ]


def test_several_inputs_in_their_order(folder):
    recipe = (
        "a = results/a.json\ninput: IAL, 1x19x{x} float32 on cpu\ninput: {loss}, 1x2x64x128 float32 on cpu\n"
    )
    assert rendered_rows(
        recipe + "| |\n| {a[reduce].median_ms:.2f} {a[reference].median_ms:.1f} |\n", folder
    ) == [
        "| 1.25 59.8 |",
        "| 1.25 6.3 |",
    ]


def test_check_names_wrong_rows_and_rendering_corrects_them(folder, capsys):
    (folder / "README.md").write_text("No table.\n")
    (folder / "docs/guide").mkdir(parents=True)
    page = folder / "docs/guide/page.md"
    page.write_text(TABLE.replace("results/", "../../results/"))
    assert render_tables.main([]) == 0
    right = page.read_text()
    assert "59.8" in right and render_tables.main(["--check"]) == 0
    page.write_text(right.replace("59.8", "58.8"))
    capsys.readouterr()
    assert render_tables.main(["--check"]) == 1
    printed = capsys.readouterr().out
    assert "docs/guide/page.md" in printed
    assert re.findall(r"^[-+]\| (.*) \|$", printed, re.M) == [
        "IAL, 1x19x64x128 | 2.0 | 58.8",
        "IAL, 1x19x64x128 | 2.0 | 59.8",
    ]
    assert "58.8" in page.read_text()
    render_tables.main([])
    assert page.read_text() == right


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "{loss}, {shape} f",
            "{loss} {shape} f",
            "input is '{loss} {shape} float32 on cpu', expected a pattern",
        ),
        ("run[ial_cuda cpu]", "run[ours]", "'ours' is missing, expected one of ial_cuda cpu, reference,"),
        ("].median_ms", "].mean_ms", "'mean_ms' is missing, expected one of name, median_ms"),
        ("run = ", "run: ", "the recipe of a table is ['run: results/a.json', "),
        ("<!-- /table -->", "", "has no end"),
    ],
)
def test_bad_tables(folder, old, new, message):
    with pytest.raises(ValueError) as error:
        render_tables.render(TABLE.replace(old, new), folder)
    assert message in str(error.value)
