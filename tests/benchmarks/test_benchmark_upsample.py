"""The benchmark of coarse logits on tiny inputs: what it writes, what it refuses, how it fits growth."""

from __future__ import annotations

import csv
import json

import pytest
import torch

import ial_cuda
from ial_cuda import backends

program = pytest.importorskip("benchmarks.upsample", reason="needs ial_cuda[bench], and python -m pytest")
from benchmarks import common, upsample_report  # noqa: E402  (which need the same)

pytestmark = pytest.mark.skipif(
    backends.get("cpu").missing is not None, reason=f"cpu: {backends.get('cpu').missing}"
)

TINY = ["--device", "cpu", "--size", "64x128", "128x256", "--rounds", "2", "--no-compile"]
TINY += ["--threads", str(torch.get_num_threads())]
OURS, TWO_STEPS = "ial_cuda cpu", "F.interpolate + F.cross_entropy"


def read(folder):
    return json.loads((folder / "upsample.json").read_text())


def test_a_tiny_run(tmp_path, capsys):
    assert program.main([*TINY, "--output", str(tmp_path)]) == 0
    summary = read(tmp_path)
    assert [case["input"] for case in summary["cases"]] == [
        "cross-entropy, 1x19x16x32 to 64x128 float32 on cpu",
        "IAL, 1x19x16x32 to 64x128 float32 on cpu",
        "cross-entropy, 1x19x32x64 to 128x256 float32 on cpu",
    ]
    for case in summary["cases"]:
        ours, two_steps = case["providers"]
        assert ours["name"] == OURS and two_steps["name"].startswith("F.interpolate + ")
        assert ours["ratio"] == 1 and two_steps["median_ms"] > 0
        # the gradient, sums and a table; and beside it the fine logits, more than once
        assert case["logits_mib"] <= ours["extra_mib"] < 2 * case["logits_mib"]
        assert two_steps["extra_mib"] > 2 * 16 * case["logits_mib"]
        assert case["goals"] == [], "which are for one size"
    curves = {curve["name"]: curve for curve in summary["curves"]}
    assert set(curves) == {OURS, TWO_STEPS}
    assert curves[TWO_STEPS]["sizes"] == [[64, 128], [128, 256]]
    assert curves[TWO_STEPS]["exponents"]["extra_mib"] == pytest.approx(1, abs=0.05)
    assert f"{TWO_STEPS}, float32 on cpu: median_ms ~ pixels^" in capsys.readouterr().out
    with (tmp_path / "upsample.csv").open() as stream:
        assert [row["name"] for row in csv.DictReader(stream)][:2] == [OURS, TWO_STEPS]
    assert (tmp_path / "upsample.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_gradient_has_no_speed(tmp_path, monkeypatch):
    def forgets_corners(*given, backend, **options):
        corners = backend != "reference"  # which judges
        return right(*given, backend="reference", align_corners=corners, **options)

    right = ial_cuda.cross_entropy
    monkeypatch.setattr(ial_cuda, "cross_entropy", forgets_corners)
    assert program.main([*TINY, "--output", str(tmp_path)]) == 1
    ours, two_steps = read(tmp_path)["cases"][0]["providers"]
    assert "errs by up to" in ours["refused"] and ours["median_ms"] is ours["extra_mib"] is None
    assert two_steps["median_ms"] > 0 and two_steps["ratio"] is None


def test_the_memory_of_the_process():
    """A tensor of 40 MB that lives within the step: the second time, too, when there is a place for it."""
    for _ in range(2):
        grown = common.peak_process_bytes(lambda x: torch.ones(10_000_000).sum() + x, torch.ones(()))
        if grown is None:
            pytest.skip("no /proc/self/clear_refs")
        assert 39e6 < grown < 44e6  # each core counts its last pages late; threads that start add some


def report_of(loss, device, dtype, size, rows) -> upsample_report.Report:
    shape = (1, 19, size[0] // 4, size[1] // 4)
    return upsample_report.Report(upsample_report.Case(device, dtype, shape, loss, size), "synthetic", rows)


def row(name, median, graph=None, extra=1.0):
    return upsample_report.Row(name, median_ms=median, graph_ms=graph, extra_mib=extra)


def test_growth_is_fitted():
    reports = [
        report_of(
            "cross-entropy",
            "cpu",
            torch.float32,
            (k * 256, k * 512),
            [row(OURS, 0.5 * k**2.2, extra=3 * k**2)],
        )
        for k in (2, 1, 4)
    ]
    (curve,) = upsample_report.curves(reports)
    assert curve.sizes == [(256, 512), (512, 1024), (1024, 2048)]
    assert (curve.exponent("median_ms"), curve.exponent("extra_mib")) == (1.1, 1)
    (single,) = upsample_report.curves(reports[:1])
    assert single.exponent("median_ms") is None


def test_goals():
    peer = upsample_report.PEERS["cross-entropy"]
    rows = [
        row("ial_cuda cuda_two_launches", 0.08, 0.07, 4.0),
        row("ial_cuda triton", 0.09),
        row(peer, 0.6, 0.55),
        row(f"{peer}, compiled", 0.07),
    ]
    case = ("cuda", torch.bfloat16, (1024, 2048))
    found = upsample_report.goals(report_of("cross-entropy", *case, rows))
    assert [(goal.what, goal.bound, goal.measured, goal.as_graph, goal.reached) for goal in found] == [
        ("ial_cuda cuda_two_launches: µs", 87, 80, pytest.approx(70), True),
        (
            f"ial_cuda cuda_two_launches / best peer, {peer}, compiled",
            1.06,
            pytest.approx(0.08 / 0.07, abs=1e-3),
            pytest.approx(0.07 / 0.55, abs=1e-3),
            False,
        ),
        (
            "ial_cuda cuda_two_launches: extra memory / logits",
            2,
            pytest.approx(4 / (19 * 256 * 512 * 2 / 2**20), abs=1e-3),
            None,
            True,
        ),
    ]
    alone = upsample_report.goals(report_of("IAL", *case, rows))
    assert [goal.bound for goal in alone] == [87, 2], "the reference is no peer"
    rows = [rows[0], rows[2], upsample_report.Row(rows[3].name, skipped="no compiler")]
    on_cpu = upsample_report.goals(report_of("cross-entropy", "cpu", torch.float32, (512, 1024), rows))
    assert [(goal.bound, goal.reached) for goal in on_cpu] == [(10, False), (6, None), (2, True)]


@pytest.mark.parametrize("dtype", upsample_report.PEER_BOUNDS, ids=str)
def test_the_arithmetic_of_goals(dtype):
    """In bytes and µs: something of the fine logits' size written and read, labels read three times."""
    pixels = 1024 * 2048
    peer_us = 1e6 * (2 * 19 * pixels * dtype.itemsize + 3 * 8 * pixels) / 3.0e12 + 12
    bound = upsample_report.PEER_BOUNDS[dtype]
    assert bound == pytest.approx(87 / peer_us, abs=0.0051)  # it has two digits after the point


@pytest.mark.parametrize("text", ["64", "64x126", "0x64", "4x8x8"])
def test_bad_sizes(text, capsys):
    with pytest.raises(SystemExit):
        program.main(["--size", text])
    assert "is not HxW in multiples of 4" in capsys.readouterr().err
