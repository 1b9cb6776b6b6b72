"""The scan for cliffs on tiny images: what it measures, writes, draws and lists."""

import json

import pytest
import torch

cliffs = pytest.importorskip("benchmarks.cliffs", reason="needs ial_cuda[bench], and python -m pytest")


def test_results_and_picture(tmp_path, monkeypatch, capsys):
    tiny = torch.zeros(1, 4, 8).long()
    monkeypatch.setattr(cliffs, "image", lambda classes, **_: (torch.randn(1, classes, 4, 8), tiny))
    file, before = tmp_path / "cliffs.json", tmp_path / "cliffs-before.json"
    arguments = ["--rounds", "2", "--output", str(tmp_path)]
    threads = torch.get_num_threads()
    try:
        assert cliffs.main(arguments) == 0
        result, alone = json.loads(file.read_text()), (tmp_path / "cliffs.png").read_bytes()
        monkeypatch.setattr(cliffs.Program, "run", lambda self, tree: result)
        assert cliffs.main([*arguments, "--before", "old"]) == 0
        assert json.loads(before.read_text()) == result
        assert (tmp_path / "cliffs.png").read_bytes() != alone
        cliffs.main(arguments)
        assert not before.exists()
    finally:
        torch.set_num_threads(threads)
    assert len(result["scans"]) == len(set(cliffs.PANELS) - {";"})
    assert list(result["scans"]["type of labels"]) == ["int64", "int32", "uint8"]
    times = [time for scan in result["scans"].values() for steps in scan.values() for time in steps.values()]
    assert len(times) > 400 and min(times) > 0
    assert "\n  " in capsys.readouterr().out


def test_neighbours_apart_are_listed():
    flat = dict.fromkeys(cliffs.STEPS, 1.0)
    high = flat | {"1 level, step": 1.31}
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
