"""README's figures are those of the results; and the checker that tells so finds what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import figures, quoted

ROOT = Path(__file__).resolve().parents[2]
RESULTS = {
    "machine": {"torch": "2.14.1+cu130"},
    "rounds": 30,
    "cases": [
        {
            "input": f"1x{classes}x64x128 float32 on cpu",
            "providers": [
                {"name": "ial_cuda cpu", "median_ms": 2.0, "ratio": 1.0, "extra_mib": 0.25},
                {
                    "name": "reference, compiled",
                    "median_ms": 3.149 * classes,
                    "ratio": 1.57,
                    "extra_mib": None,
                },
            ],
            "parts": [{"name": "gradient", "median_ms": 1.25}],
        }
        for classes in (2, 19)
    ],
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "results/cpu").mkdir(parents=True)
    (tmp_path / "results/cpu/a.json").write_text(json.dumps(RESULTS))
    return tmp_path


def problems(text: str, folder: Path, *, strict: bool = True) -> list[str]:
    return quoted.problems(figures.as_prose(text), folder, strict=strict)


def test_the_documents(capsys):
    failed = figures.main(["--check"])
    assert not failed, capsys.readouterr().out


def test_a_changed_digit_is_found():
    """All but a few of README's, one by one: by chance another figure may have the same digits."""
    text = (ROOT / "README.md").read_text()
    found = []
    for paragraph in quoted.paragraphs(text):
        if not quoted.CITED.search(paragraph) and "<!-- figures" not in paragraph:
            continue
        start = text.index(paragraph)
        prose = quoted.NO_PROSE.sub(lambda match: " " * len(match[0]), paragraph)
        for figure in quoted.FIGURE.finditer(prose):
            for index in (start + i for i in range(*figure.span()) if prose[i].isdigit()):
                spoilt = text[:index] + str((int(text[index]) + 1) % 10) + text[index + 1 :]
                found.append(figures.render(spoilt, ROOT) != spoilt or problems(spoilt, ROOT) != [])
    assert len(found) > 100
    assert found.count(False) < len(found) / 20


def test_what_is_excepted_is_there():
    texts = " ".join(" ".join((ROOT / name).read_text().split()) for name in figures.DOCUMENTS)
    assert [phrase for phrase in quoted.NOT_RESULTS if phrase not in texts] == []


def test_folders_tell_who_had_help():
    """From the C library, which kept everybody's memory, or from huge pages for torch's own tensors."""
    for file in (ROOT / "benchmarks/results").glob("cpu-*/*.json"):
        machine, folder = json.loads(file.read_text())["machine"], file.parent.name
        assert bool(machine.get("malloc")) == folder.endswith("memory-kept-for-all"), file
        assert machine["torch_asks_for_huge_pages"] == folder.endswith("huge-pages-for-all"), file


TABLE = """Before.

<!-- figures
a = results/cpu/a.json
input: 1x{classes}x64x{width} float32 on cpu
| classes, width | ours | reference |
| {classes}, {width} | {a[ial_cuda cpu].median_ms:.1f} | {a[reference, compiled].median_ms:.1f} |
-->
<!-- /figures -->

After.
"""


def test_a_table_with_a_row_for_each_input(folder):
    rendered = figures.render(TABLE, folder)
    table = [
        "| classes, width | ours | reference |",
        "|---|---|---|",
        "| 2, 128 | 2.0 | 6.3 |",
        "| 19, 128 | 2.0 | 59.8 |",
    ]
    assert rendered == TABLE.replace("-->\n<!-- /", "-->\n" + "\n".join(table) + "\n<!-- /")
    assert figures.render(rendered.replace("59.8", "58.8"), folder) == rendered
    assert problems(rendered, folder) == []


def test_a_table_with_a_row_for_each_provider(folder):
    row = "| {name} | {a.ratio:.2f} | {a.extra_mib:.1f} | {a[gradient].median_ms:.2f} |"
    recipe = (
        f"a = results/cpu/a.json\ninput: 1x19x64x128 float32 on cpu\n| | / ours | MiB | gradient |\n{row}\n"
    )
    assert figures.make_table(recipe, folder).splitlines()[2:] == [
        "| ial_cuda cpu | 1.00 | 0.2 | 1.25 |",
        "| reference, compiled | 1.57 |  | 1.25 |",
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1x{classes}", "7x{classes}", "input is '7x{classes}x64x{width} float32 on cpu', expected one that"),
        (
            "a[ial_cuda cpu]",
            "a[ours]",
            "1x2x64x128 float32 on cpu has no 'ours', expected one of ial_cuda cpu,",
        ),
        (
            "].median_ms",
            "].mean_ms",
            "the row 'ial_cuda cpu' has no 'mean_ms', expected one of name, median_ms",
        ),
        ("a = ", "a: ", "a table's comment is ['a: results/cpu/a.json', "),
        ("<!-- /figures -->", "", "has no end"),
    ],
)
def test_bad_tables(folder, old, new, message):
    with pytest.raises(ValueError) as error:
        figures.render(TABLE.replace(old, new), folder)
    assert message in str(error.value)


CITED = "From `results/cpu/a.json`: "


@pytest.mark.parametrize(
    "text",
    [
        CITED + "2.0 ms, 59.83 ms or 0.06 s; 2000 µs.",
        CITED + "1.57 times, 29.92 times by the medians, 0.25 MiB, 256 KiB.",
        CITED + "1×19×64×128, 19×64×128, torch 2.14.1, 30 rounds, float32, AVX-512, `7 ms`.",
        "<!-- results: results/cpu/a.json -->\n6.3 ms.\n\n| a |\n|---|\n| 59.8 |",
        "From `results/cpu/`: 6.3 ms.",
        "Predicted are 7 ms. The goal is 8 times. Not yet measured: 9 MiB.",
        "Up to 1024 classes, 1×3×4×5, half.",
        "```\n7 ms\n```",
        "To `results/latest/`.",
    ],
)
def test_right_prose(folder, text):
    assert problems(text, folder) == []


@pytest.mark.parametrize(
    ("text", "figure"),
    [
        (CITED + "2.1 ms", "2.1 ms"),
        (CITED + "1.57 ms", "1.57 ms"),
        (CITED + "1.25 times", "1.25 times"),
        (CITED + "0.3 MiB", "0.3 MiB"),
        (CITED + "3 and 58", "58"),
        (CITED + "1×18×64×128", "1×18×64×128"),
        (CITED + "torch 2.14.2", "2.14.2"),
        (CITED + "25 rounds", "25 rounds"),
        (CITED + "as follows\n\n| a |\n|---|\n| 59.9 |", "59.9"),
        ("Predicted are 7 ms. It takes 2 ms.", "2 ms"),
        ("It is 10× as fast.", "10×"),
        ("From `results/cpu/b.json`: 2.0 ms", "results/cpu/b.json"),
        (TABLE.replace("classes, width", "59.9 ms"), "59.9 ms"),
    ],
)
def test_wrong_prose(folder, text, figure):
    (found,) = problems(text, folder)
    assert repr(figure) in found


def test_only_strict_documents_need_citations(folder):
    assert problems("It takes 2 ms.", folder, strict=False) == []
