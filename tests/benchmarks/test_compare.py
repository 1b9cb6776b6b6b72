"""Two results, and two commits, side by side: ratios, verdicts, what only one has, what is left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from ial_cuda import backends

compare = pytest.importorskip("benchmarks.compare", reason="needs ial_cuda[bench], and python -m pytest")
from benchmarks.harness import checkouts  # noqa: E402  (needs the same)

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
OURS, FLOOR = "ial_cuda cpu", "memory floor"
needs_git = pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("git") is None, reason="not a clone, or no git"
)


def result(ms: dict[str, float | None], **part_ms: float) -> dict:
    def rows(times: dict) -> list[dict]:
        return [{"name": name, "median_ms": time, "extra_mib": time} for name, time in times.items()]

    case = {"input": "1x19x8x8", "providers": rows(ms), "parts": rows(part_ms)}
    return {"machine": {}, "rounds": 2, "cases": [case]}


def compared(*pairs: tuple[dict, dict]) -> tuple[dict[str, compare.Comparison], str | None]:
    found = compare.compare(pairs)
    return {row.name: row for row in found.rows}, found.controls["1x19x8x8"]


def test_the_floor_is_the_control():
    rows, control = compared(
        (result({OURS: 4.0, "a": 10.0, FLOOR: 2.0}), result({OURS: 6.0, "a": 10.0, FLOOR: 3.0}))
    )
    ours = rows[OURS]
    assert control == FLOOR
    assert (ours.old_ms, ours.new_ms, ours.ratio, ours.corrected_ratio) == (4.0, 6.0, 1.5, 1.0)
    assert ours.verdict is None  # of one pair


def test_without_a_floor_all_peers_are_the_control():
    """Neither our other providers nor parts nor forward passes count."""
    old = result({OURS: 1.0, "ial_cuda triton": 1.0, "a": 1.0, "b": 1.0}, reduce=1.0)
    new = result({OURS: 2.0, "ial_cuda triton": 9.0, "a": 2.0, "b": 8.0}, reduce=100.0)
    for report, forward in ((old, 1.0), (new, 50.0)):
        report["cases"][0]["providers"][2]["forward_ms"] = forward
    rows, control = compared((old, new))
    assert control == "geometric mean of 2"
    assert rows[OURS].corrected_ratio == pytest.approx(0.5)
    assert rows["reduce"].corrected_ratio == pytest.approx(25)
    assert (rows["a, forward"].ratio, rows["a, forward"].old_mib) == (50, None)
    rows, control = compared((result({OURS: 1.0}), result({OURS: 2.0})))
    assert (control, rows[OURS].ratio, rows[OURS].corrected_ratio) == (None, 2, None)


@pytest.mark.parametrize(
    ("times", "verdict"),
    [
        ([(2.0, 1.9), (4.0, 3.0)], "faster"),
        ([(2.0, 2.1), (4.0, 5.0)], "slower"),
        ([(2.0, 1.0), (2.0, 2.2), (2.0, 1.0)], "same"),
        ([(2.0, 2.0), (2.0, 3.0)], "same"),
    ],
)
def test_verdicts(times, verdict):
    rows, _ = compared(*((result({OURS: old}), result({OURS: new})) for old, new in times))
    assert rows[OURS].verdict == verdict
    assert rows[OURS].ratios == [new / old for old, new in times]


def test_rows_of_one_result_and_memory():
    old, new = result({OURS: 3.0, "a": 1.0, "b": 1.0}), result({OURS: 3.04, "b": None, "c": 1.0})
    found = compare.compare([(old, new)])
    assert [row.name for row in found.rows] == [OURS]
    assert [key.name for key in found.only_old] == ["a", "b"]
    assert [key.name for key in found.only_new] == ["c"]
    assert compare.memory_changes(found.rows) == ["Extra memory: unchanged in all 1 rows that have it"]
    old["cases"][0]["providers"][0]["extra_mib"] = 38.25
    rows = compare.compare([(old, new)]).rows
    assert compare.memory_changes(rows) == ["ial_cuda cpu: 38.2 → 3.0 MiB extra"]
    twice = result({OURS: 1.0}, **{OURS: 1.0})
    with pytest.raises(ValueError, match="'1x19x8x8' has 'ial_cuda cpu' twice"):
        compare.compare([(twice, twice)])


def test_two_files(tmp_path, capsys):
    old, new = result({OURS: 2.0, "copy floor": 1.0}), result({OURS: 1.0, "copy floor": 1.0, "c": 1.0})
    old["machine"], new["machine"] = {"torch": "2.11"}, {"torch": "2.14", "malloc": {}}
    for row in old["cases"][0]["providers"]:
        row["refused"] = None  # what old results have
    files = [str(tmp_path / name) for name in ("old.json", "new.json")]
    for file, report in zip(files, (old, new), strict=True):
        Path(file).write_text(json.dumps(report))
    assert compare.main([*files, "--output", str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out/compare.json").read_text())
    assert written["differences"] == ["torch: 2.11 → 2.14", "malloc: None → {}"]
    assert written["rows"][0]["ratio"] == 0.5
    printed = capsys.readouterr().out
    for text in ("Differs: torch: 2.11 → 2.14", "control: copy floor", "0.500", "new result: 1x19x8x8: c"):
        assert text in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.json", "HEAD"], "OLD and NEW are a.json and HEAD, expected two files *.json or two commits"),
        (["a.json", "b.json", "--", "--rounds", "2"], "arguments after -- are --rounds 2, expected none"),
        (["HEAD", "HEAD", "--repeats", "1"], "1 is less than 2"),
        (["HEAD", "HEAD", "--program", "cliffs"], "invalid choice: 'cliffs' (choose from"),
        (["none.json", "none.json"], "No such file or directory: 'none.json'"),
        ([str(RESULTS / "cpu-amd-epyc-avx512-cliffs/cliffs.json")] * 2, "cliffs.json has no 'cases'"),
        pytest.param(["HEAD", "no-such"], "'no-such' is no commit of this repository", marks=needs_git),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    try:
        code = compare.main(arguments)
    except SystemExit as error:  # of argparse
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err


def assert_removed(trees: list[Path]) -> None:
    command = ["git", "worktree", "list"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert trees and not [tree for tree in trees if tree.parent.exists() or str(tree) in listed]


@needs_git
@pytest.mark.skipif(backends.get("cpu").missing is not None, reason="no CPU kernels")
def test_two_commits(tmp_path, capsys):
    """HEAD against itself, with the extension under test instead of a build."""
    trees = []

    def lend_extension(tree: Path) -> None:
        trees.append(tree)
        for file in (*ROOT.glob("ial_cuda/_C*"), ROOT / "ial_cuda/_build.json"):
            shutil.copy(file, tree / "ial_cuda")

    tiny = ["--device", "cpu", "--only", "1x19x64x64", "--rounds", "2", "--no-compile", "--threads", "1"]
    arguments = ["HEAD", "HEAD", "--repeats", "2", "--output", str(tmp_path), "--", *tiny]
    assert compare.main(arguments, build=lend_extension) == 0, capsys.readouterr().out
    assert_removed(trees)
    written = json.loads((tmp_path / "compare.json").read_text())
    assert written["old"] == {"ref": "HEAD", "commit": checkouts.find_commit("HEAD")}
    assert (written["pairs_wanted"], written["pairs"]) == (2, 2)
    assert all(len(row["ratios"]) == 2 and row["verdict"] for row in written["rows"])
    assert OURS in [row["name"] for row in written["rows"]]


@needs_git
@pytest.mark.parametrize("error", [checkouts.CommandFailed("no such operator"), KeyboardInterrupt()])
def test_order_failure_and_interruption(error, tmp_path, monkeypatch, capsys):
    """A machine that is slower each time, and then fails. Complete pairs are kept, worktrees are not."""
    trees, order = [], []
    try:
        commits = {checkouts.find_commit(ref): side for ref, side in (("HEAD", "A"), ("HEAD~1", "B"))}
    except ValueError:
        pytest.skip("a clone of one commit")

    def build(tree):
        head = subprocess.run(["git", "-C", tree, "rev-parse", "HEAD"], capture_output=True, text=True)
        (tree / "side").write_text(commits[head.stdout.strip()])
        trees.append(tree)

    def run(self, tree):
        order.append((tree / "side").read_text())
        if len(order) > 5:
            raise error
        return result({OURS: float(len(order))})

    monkeypatch.setattr(checkouts.Program, "run", run)
    arguments = ["HEAD", "HEAD~1", "--repeats", "4", "--output", str(tmp_path)]
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            compare.main(arguments, build=build)
    else:
        assert compare.main(arguments, build=build) == 1
        printed = capsys.readouterr().out
        assert "no such operator" in printed and "2 of 4 pairs have results" in printed
        written = json.loads((tmp_path / "compare.json").read_text())
        assert written["rows"][0]["ratios"] == pytest.approx([2 / 1, 3 / 4])
    assert "".join(order) == "ABBAAB"
    assert_removed(trees)


def test_failures_of_a_run(tmp_path):
    """Another package is not measured. A wrong result of ours is named, not the end of the output."""
    package = tmp_path / "ial_cuda/__init__.py"
    package.parent.mkdir()
    package.write_text("__file__ = '/elsewhere/ial_cuda/__init__.py'")
    with pytest.raises(checkouts.CommandFailed, match=r"imported from /elsewhere/ial_cuda, expected"):
        checkouts.Program("loss", []).run(tmp_path)
    rows = [{"name": name, "failed": "is wrong"} for name in ("peer", OURS)]
    written = json.dumps({"cases": [{"input": "1x19", "providers": rows}]})
    package.write_text(
        "import pathlib, sys\noutput = pathlib.Path(sys.argv[-1])\noutput.mkdir()\n"
        f"(output / 'loss.json').write_text({written!r})\nsys.exit(1)"
    )
    with pytest.raises(checkouts.CommandFailed) as error:
        checkouts.Program("loss", []).run(tmp_path)
    assert str(error.value) == "python -m benchmarks.loss fails:\n1x19: ial_cuda cpu: is wrong"
