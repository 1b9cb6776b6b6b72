"""The scan for cliffs on two tiny cases: what it measures, writes and lists."""

import json

import pytest
import torch

cliffs = pytest.importorskip("benchmarks.cliffs", reason="needs ial_cuda[bench], and python -m pytest")


def test_results_and_picture(tmp_path, monkeypatch, capsys):
    tiny = [cliffs.Case("classes", n, torch.randn(1, n, 2, 8), torch.zeros(1, 2, 8).long()) for n in (1, 4)]
    monkeypatch.setattr(cliffs, "cases", lambda: tiny)
    threads = torch.get_num_threads()
    try:
        assert cliffs.main(["--rounds", "2", "--output", str(tmp_path)]) == 0
        before = json.loads((tmp_path / "cliffs.json").read_text())
        monkeypatch.setattr(cliffs.Program, "run", lambda self, tree: before)
        assert cliffs.main(["--rounds", "2", "--output", str(tmp_path), "--before", "old"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert json.loads((tmp_path / "cliffs-before.json").read_text()) == before
    assert (tmp_path / "cliffs.png").stat().st_size > 10_000
    assert list(before["scans"]["classes"]) == ["1", "4"]
    assert all(value > 0 for steps in before["scans"]["classes"].values() for value in steps.values())
    assert "classes" in capsys.readouterr().out


def test_neighbours_apart_are_listed():
    flat = dict.fromkeys(cliffs.STEPS, 1.0)
    high = flat | {cliffs.STEPS[1]: 1.31}
    assert list(cliffs.cliffs({"3": flat, "4": high, "5": high})) == [
        "3 to 4: 1 level, step: 1.00 and 1.31 ns, 1.31 times"
    ]


def test_every_layout_has_the_same_logits():
    logits, target = cliffs.image(5)
    for name, change in cliffs.LAYOUTS.items():
        changed = change(logits)
        if "rows" in name:
            changed = changed.view(1, *target.shape[1:], 5).movedim(-1, 1)
        assert torch.equal(changed, logits), name
