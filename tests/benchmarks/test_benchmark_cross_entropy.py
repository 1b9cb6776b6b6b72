"""The benchmark of cross-entropy on tiny inputs: what it measures of each form, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch

import ial_cuda
from ial_cuda import backends

program = pytest.importorskip(
    "benchmarks.cross_entropy", reason="needs ial_cuda[bench], and python -m pytest"
)

pytestmark = pytest.mark.skipif(
    backends.get("cpu").missing is not None, reason=f"cpu: {backends.get('cpu').missing}"
)

TINY = ["--device", "cpu", "--rounds", "2", "--no-compile", "--threads", str(torch.get_num_threads())]
OURS, PEER = "ial_cuda cpu", "F.cross_entropy"


@pytest.fixture
def tiny(monkeypatch):
    bounds = {program.PEER: 1e-9, program.FOUR_LEVELS: 1e9}
    cases = [(form, (1, 19, 16, 32), bounds if form == "images" else {}) for form in program.FORMS]
    monkeypatch.setattr(program, "CASES", cases)


def read(folder):
    return json.loads((folder / "cross_entropy.json").read_text())["cases"]


def test_a_tiny_run(tiny, tmp_path):
    assert program.main([*TINY, "--output", str(tmp_path)]) == 0
    cases = {case["input"].partition(",")[0]: case for case in read(tmp_path)}
    assert set(cases) == {"images", "smoothed", "coarse", "rows"}
    logits = 19 * 16 * 32 * 4 / 2**20
    for form, case in cases.items():
        rows = {row["name"]: row for row in case["providers"]}
        ours = [OURS, f"{OURS}, two passes", f"{OURS}, four levels"][: 2 if form == "rows" else 3]
        assert list(rows) == [*ours, PEER]
        assert rows[OURS]["ratio"] == 1
        for row in rows.values():
            assert row["median_ms"] > 0 and not row["refused"], row
        assert rows[PEER]["extra_mib"] > logits
    goals = {goal["what"]: goal["reached"] for goal in cases["images"]["goals"]}
    assert goals == {f"{PEER} / ours": True, "four levels / ours": False}
    rows = {row["name"]: row for row in cases["images"]["providers"]}
    measured = {goal["what"]: goal["measured"] for goal in cases["images"]["goals"]}
    assert measured["four levels / ours"] == rows[f"{OURS}, four levels"]["ratio"]


@pytest.mark.parametrize(
    ("form", "shapes"),
    [
        ("images", [(1, 19, 16, 32), (1, 16, 32)]),
        ("smoothed", [(1, 19, 16, 32), (1, 16, 32)]),
        ("coarse", [(1, 19, 16, 32), (1, 64, 128)]),
        ("rows", [(512, 19), (512,)]),
    ],
)
def test_what_the_losses_are_given(tiny, tmp_path, monkeypatch, form, shapes):
    """Rows are a view of what the network writes: to copy them would be another measurement."""
    seen = set()

    def remember(input, target, *given, **options):
        seen.add((tuple(input.shape), tuple(target.shape), options.get("label_smoothing"), input._is_view()))
        return right(input, target, *given, **options)

    right = ial_cuda.cross_entropy
    monkeypatch.setattr(ial_cuda, "cross_entropy", remember)
    (case,) = [case for case in program.make_cases("cpu") if case.form == form]
    assert program.main([*TINY, "--only", f"^{form}", "--output", str(tmp_path)]) == 0
    assert str(case) == read(tmp_path)[0]["input"]
    smoothing = 0.1 if form == "smoothed" else None
    assert seen == {(*shapes, smoothing, form == "rows")}


def test_a_wrong_gradient_has_no_speed(tiny, tmp_path, monkeypatch):
    right = ial_cuda.cross_entropy
    monkeypatch.setattr(
        ial_cuda, "cross_entropy", lambda logits, *given, **options: right(logits * 1.01, *given, **options)
    )
    assert program.main([*TINY, "--only", "images", "--output", str(tmp_path)]) == 1
    ours, *_, peer = read(tmp_path)[0]["providers"]
    assert "errs by up to" in ours["refused"] and ours["median_ms"] is None
    assert peer["median_ms"] > 0
