"""Two results, and two commits, side by side: what is paired, what is told apart, what is left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from ial_cuda import backends

versus = pytest.importorskip("benchmarks.versus", reason="needs ial_cuda[bench], and python -m pytest")
from benchmarks import checkouts, paired  # noqa: E402  (which need the same)

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
OURS, FLOOR = "ial_cuda cpu", "copy floor"


def result(ms: dict[str, float | None], *, parts: dict[str, float] | None = None, **machine) -> dict:
    def rows(times: dict) -> list[dict]:
        return [{"name": name, "median_ms": time, "extra_mib": time} for name, time in times.items()]

    case = {"input": "1x19x8x8", "providers": rows(ms), "parts": rows(parts or {})}
    return {"machine": machine, "rounds": 2, "cases": [case]}


def by_name(found: paired.Comparisons) -> dict[str, paired.Comparison]:
    return {row.name: row for row in found.rows}


def test_the_floor_is_the_yardstick():
    old = result({OURS: 4.0, "reference": 10.0, FLOOR: 2.0})
    new = result({OURS: 6.0, "reference": 10.0, FLOOR: 3.0})
    found = paired.compare([(old, new)])
    assert found.yardsticks == {"1x19x8x8": FLOOR}
    ours = by_name(found)[OURS]
    assert (ours.old_ms, ours.new_ms, ours.ratio, ours.adjusted_ratio) == (4.0, 6.0, 1.5, 1.0)
    assert (ours.old_mib, ours.new_mib) == (4.0, 6.0)
    assert ours.verdict is None  # of one pair


def test_without_a_floor_all_that_is_not_ours_is_the_yardstick():
    old = result({OURS: 1.0, "ial_cuda triton": 1.0, "a": 1.0, "b": 1.0}, parts={"gradient": 1.0})
    new = result({OURS: 2.0, "ial_cuda triton": 9.0, "a": 2.0, "b": 8.0}, parts={"gradient": 100.0})
    found = paired.compare([(old, new)])
    assert found.yardsticks == {"1x19x8x8": "geometric mean of 2"}
    assert by_name(found)[OURS].adjusted_ratio == pytest.approx(0.5)
    assert by_name(found)["gradient"].adjusted_ratio == pytest.approx(25)


def test_without_others_there_is_no_yardstick():
    found = paired.compare([(result({OURS: 1.0}), result({OURS: 2.0}))])
    assert found.yardsticks == {"1x19x8x8": None}
    assert by_name(found)[OURS].ratio == 2 and by_name(found)[OURS].adjusted_ratio is None


def test_what_only_one_has_is_listed():
    old, new = result({OURS: 1.0, "a": 1.0, "b": 1.0}), result({OURS: 1.0, "b": None, "c": 1.0})
    found = paired.compare([(old, new)])
    assert list(by_name(found)) == [OURS]
    assert [key.name for key in found.only_old] == ["a", "b"]
    assert [key.name for key in found.only_new] == ["c"]


def test_memory_that_changed_is_told():
    old, new = result({OURS: 3.0, "a": 1.0, "b": 2.0}), result({OURS: 3.04, "a": 1.0, "b": 2.0})
    assert versus.compare_memory(paired.compare([(old, new)]).rows) == [
        "extra MiB: the same in all 3 rows that tell it"
    ]
    old["cases"][0]["providers"][1]["extra_mib"] = 38.25
    new["cases"][0]["providers"][2]["extra_mib"] = None
    assert versus.compare_memory(paired.compare([(old, new)]).rows) == ["a: 38.2 MiB → 1.0 MiB extra"]


def test_forward_and_backward_passes_are_rows():
    old, new = result({OURS: 3.0, "reference": 1.0}), result({OURS: 3.0, "reference": 2.0})
    for index, forward in enumerate((1.0, 1.0)):
        old["cases"][0]["providers"][index] |= {"forward_ms": forward}
    for index, forward in enumerate((2.0, 9.0)):
        new["cases"][0]["providers"][index] |= {"forward_ms": forward}
    old["cases"][0]["providers"][0] |= {"backward_ms": 2.0}
    found = paired.compare([(old, new)])
    assert found.yardsticks == {"1x19x8x8": "reference"}
    forward = by_name(found)[f"{OURS}, forward"]
    assert (forward.ratio, forward.adjusted_ratio, forward.old_mib) == (2, 1, None)
    assert found.only_old == [("1x19x8x8", f"{OURS}, backward")]


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
    found = paired.compare([(result({OURS: old}), result({OURS: new})) for old, new in times])
    assert by_name(found)[OURS].verdict == verdict


def test_ratios_are_those_of_pairs():
    """A machine that is half as fast in the second pair changes nothing."""
    times = [(1.0, 0.9), (2.0, 1.8), (2.0, 1.6)]
    found = paired.compare([(result({OURS: old}), result({OURS: new})) for old, new in times])
    ours = by_name(found)[OURS]
    assert ours.ratios == pytest.approx([0.9, 0.9, 0.8]) and ours.ratio == pytest.approx(0.9)
    assert (ours.old_ms, ours.new_ms) == (2.0, 1.6)


def test_a_row_that_stands_twice():
    twice = result({OURS: 1.0}, parts={OURS: 1.0})
    with pytest.raises(ValueError, match=r"'ial_cuda cpu' of '1x19x8x8' stands there twice"):
        paired.compare([(twice, twice)])


def test_two_committed_results(tmp_path, capsys):
    folders = ("cpu-amd-epyc-avx512", "cpu-amd-epyc-avx512-memory-kept-for-all")
    files = [str(RESULTS / folder / "loss.json") for folder in folders]
    assert versus.main([*files, "--output", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "versus.json").read_text())
    old, new = ({row["name"]: row for row in versus.read(file)["cases"][0]["providers"]} for file in files)
    rows = {row["name"]: row for row in written["rows"]}
    timed = {name for name in old if old[name]["median_ms"] is not None}
    assert old.keys() == new.keys() and timed <= rows.keys()
    for name in timed:
        ratio = new[name]["median_ms"] / old[name]["median_ms"]
        scale = new[FLOOR]["median_ms"] / old[FLOOR]["median_ms"]
        assert rows[name]["ratio"] == pytest.approx(ratio)
        assert rows[name]["adjusted_ratio"] == pytest.approx(ratio / scale)
    (told,) = (difference for difference in written["differences"] if "malloc" in difference)
    assert told.startswith("malloc: {} → {'MALLOC_")
    printed = capsys.readouterr().out
    assert f"differs: {told}" in printed
    assert "yardstick: copy floor" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.json", "HEAD"], "OLD and NEW are a.json and HEAD, expected two files *.json or two commits"),
        (["a.json", "b.json", "--", "--rounds", "2"], "arguments after -- are --rounds 2, expected none"),
        (["HEAD", "HEAD", "--repeats", "1"], "1 is less than 2"),
        (["HEAD", "HEAD", "--program", "lose"], "--program is lose, expected a program of benchmarks/"),
        ([str(RESULTS / "cpu-amd-epyc-avx2/segformer.json")] * 2, "segformer.json has no 'cases', expected"),
        (["none.json", "none.json"], "No such file or directory: 'none.json'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    try:
        code = versus.main(arguments)
    except SystemExit as error:  # of argparse
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err


needs_git = pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("git") is None, reason="not a clone, or no git"
)
needs_cpu = pytest.mark.skipif(
    backends.get("cpu").missing is not None, reason=f"cpu: {backends.get('cpu').missing}"
)


def assert_gone(trees: list[Path]) -> None:
    command = ["git", "worktree", "list"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for tree in trees:
        assert not tree.parent.exists()
        assert str(tree) not in listed


def lend_extension(tree: Path) -> None:
    """In place of a build: the extension of the package under test."""
    for file in (*ROOT.glob("ial_cuda/_C*"), ROOT / "ial_cuda/_build.json"):
        shutil.copy(file, tree / "ial_cuda")


@needs_git
@needs_cpu
def test_two_commits(tmp_path, monkeypatch, capsys):
    """HEAD against itself, in turns; that each run has the package of a checkout, the run itself asserts."""
    trees = []
    monkeypatch.chdir(tmp_path)
    run = checkouts.Program.run

    def remember(self, tree):
        trees.append(tree)
        return run(self, tree)

    monkeypatch.setattr(checkouts.Program, "run", remember)
    arguments = ["HEAD", "HEAD", "--repeats", "2", "--output", str(tmp_path)]
    tiny = ["--device", "cpu", "--shape", "1x19x16x32", "--rounds", "2", "--no-compile", "--threads", "1"]
    assert versus.main([*arguments, "--", *tiny], build=lend_extension) == 0, capsys.readouterr().out
    assert len(trees) == 4
    assert_gone(trees)

    written = json.loads((tmp_path / "versus.json").read_text())
    assert written["old"] == written["new"] == {"ref": "HEAD", "commit": checkouts.find_commit("HEAD")}
    assert written["pairs"] == written["pairs_wanted"] == 2
    rows = {row["name"]: row for row in written["rows"]}
    assert {OURS, "reference", FLOOR, "gradient"} <= set(rows)
    assert all(len(row["ratios"]) == 2 and row["verdict"] for row in rows.values())
    assert rows[FLOOR]["adjusted"] == pytest.approx([1, 1])


def fake_run(self, tree):
    """The results of a machine that is slower each time, and then fails."""
    fake_run.order.append((tree / "side").read_text())
    if len(fake_run.order) > 5:
        raise checkouts.CommandFailed("python -m benchmarks.loss fails (exit code 1):\nno such operator")
    return result({OURS: float(len(fake_run.order))})


@needs_git
def test_order_and_failure(tmp_path, monkeypatch, capsys):
    fake_run.order = []
    monkeypatch.setattr(checkouts.Program, "run", fake_run)
    refs, trees = ("HEAD", "HEAD~1"), []
    try:
        commits = {checkouts.find_commit(ref): side for ref, side in zip(refs, "AB", strict=True)}
    except ValueError:
        pytest.skip("a clone of one commit")

    def build(tree):
        command = ["git", "-C", tree, "rev-parse", "HEAD"]
        head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        (tree / "side").write_text(commits[head])
        trees.append(tree)

    assert versus.main([*refs, "--repeats", "4", "--output", str(tmp_path)], build=build) == 1
    assert "".join(fake_run.order) == "ABBAAB"
    assert_gone(trees)
    printed = capsys.readouterr().out
    assert "no such operator" in printed and "2 of 4 pairs have results" in printed
    written = json.loads((tmp_path / "versus.json").read_text())
    assert (written["pairs_wanted"], written["pairs"]) == (4, 2)
    assert written["rows"][0]["ratios"] == pytest.approx([2 / 1, 3 / 4])


@needs_git
def test_a_build_that_fails(tmp_path, capsys):
    trees = []

    def build(tree):
        trees.append(tree)
        (tree / "setup.py").write_text("raise SystemExit('no compiler')")
        checkouts.build_extension(tree)

    assert versus.main(["HEAD", "HEAD", "--output", str(tmp_path)], build=build) == 1
    printed = capsys.readouterr().out
    assert "the extension does not build (exit code 1):\nno compiler" in printed
    assert "0 of 6 pairs have results" in printed
    assert_gone(trees)


@needs_git
def test_no_such_commit(capsys):
    assert versus.main(["HEAD", "no-such-commit"]) == 2
    assert "'no-such-commit' is no commit of this repository" in capsys.readouterr().err


def test_another_package_is_not_measured(tmp_path):
    """The run tells that it has not the package that it should have."""
    (tmp_path / "ial_cuda").mkdir()
    (tmp_path / "ial_cuda/__init__.py").write_text("import sys; __file__ = '/elsewhere/ial_cuda/__init__.py'")
    with pytest.raises(
        checkouts.CommandFailed, match=r"ial_cuda is imported from /elsewhere/ial_cuda, expected"
    ):
        checkouts.Program("loss", []).run(tmp_path)


def test_what_is_wrong_is_told(tmp_path):
    """A program that wrote what is wrong with its results: that, not the end of what it printed."""
    (tmp_path / "ial_cuda").mkdir()
    refused = {"cases": [{"input": "1x19", "providers": [{"name": OURS, "refused": "raises TypeError"}]}]}
    (tmp_path / "ial_cuda/__init__.py").write_text(f"""
import json, sys
from pathlib import Path
output = Path(sys.argv[-1])
output.mkdir()
(output / "loss.json").write_text({json.dumps(refused)!r})
sys.exit(1)
""")
    with pytest.raises(checkouts.CommandFailed) as error:
        checkouts.Program("loss", []).run(tmp_path)
    assert str(error.value) == f"python -m benchmarks.loss fails:\n1x19: {OURS} raises TypeError"
