"""The harness: the rule of correctness, clocks, tables of any width, result files, labels in pictures."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs ial_cuda[bench]")
pytest.importorskip("rich", reason="needs ial_cuda[bench]")
from rich.console import Console

from benchmarks.harness import inputs, measure, plots, report, tables, validation
from benchmarks.harness.inputs import CROSS_ENTROPY, IAL, Case, Inputs, Tiled
from benchmarks.harness.measure import Result, TwoPartStep
from benchmarks.harness.report import Report, Row
from benchmarks.harness.validation import Baseline


def result(loss: float, *gradient: float, dtype: torch.dtype = torch.float32) -> Result:
    return Result(torch.tensor(loss, dtype=dtype), torch.tensor(gradient, dtype=dtype))


TRUTH = result(2.0, 1.0, -1.0, dtype=torch.float64)
EAGER = Baseline(result(2.0, 1.0, -1.0), TRUTH)
EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("got", "reason"),
    [
        (result(2.0, 1.0, -1.0), None),
        (result(2.0, 1.0 + 4 * EPS, -1.0), None),
        (result(2.0, 1.0 + 6 * EPS, -1.0), "gradient is wrong by 7.2e-07, 1.5 times the tolerance"),
        (result(2.1, 1.0, -1.0), "loss is wrong by 0.1, "),
        (result(math.nan, 1.0, -1.0), "loss is NaN"),
        (result(2.0, math.nan, -1.0), "gradient has NaN"),
        (result(2.0, 1.0), "gradient has shape (1,), expected (2,)"),
        (result(2.0, 1.0, -1.0, dtype=torch.bfloat16), None),
    ],
)
def test_the_rule_of_correctness(got, reason):
    found = validation.why_wrong(got, EAGER)
    assert found is None if reason is None else found.startswith(reason)


def test_an_error_of_eager_pytorch_is_allowed_to_others():
    inexact = Baseline(result(2.0, 1.1, -1.0), TRUTH)
    assert validation.why_wrong(result(2.0, 0.91, -1.0), inexact) is None
    assert validation.why_wrong(result(2.0, 0.89, -1.0), inexact) is not None


def test_rounds_are_interleaved_and_warm_up_does_not_count(monkeypatch):
    calls: list[str] = []
    clock = iter(range(10**6))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock) / 1e3)
    steps = {
        "one": lambda _: calls.append("one"),
        "two": TwoPartStep(lambda _: calls.append("forward"), lambda *_: calls.append("backward")),
    }
    rounds = []
    times = measure.time_interleaved(steps, lambda: None, "cpu", 4, lambda: rounds.append(len(calls)))
    assert rounds == [3, 6, 9, 12, 15, 18]  # each round has every step once
    assert times["one"].median_ms == times["two"].median_ms == 2  # two ticks of the clock
    assert times["two"].forward_ms == times["two"].backward_ms == 1 and times["one"].forward_ms is None


def test_no_round_begins_after_the_time_is_up(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(measure.time, "monotonic", lambda: float(next(clock)))
    rounds = []
    measure.time_interleaved({"a": lambda _: 0}, lambda: None, "cpu", 50, lambda: rounds.append(0), seconds=5)
    assert len(rounds) == 6  # one or two warm-up rounds, then until the time is up


def test_peak_memory_is_that_of_the_tensors():
    def step(logits):
        first = logits + 1
        second = first * 2
        del first
        return second + 1

    logits = torch.zeros(1 << 18)
    peak = measure.peak_bytes(step, logits)
    assert 0 <= peak - 2 * logits.nbytes < 100  # the constants are tensors of a few bytes, too


def printed(width: int, headings: list[str], rows: list[list[str]]) -> str:
    stream = io.StringIO()
    tables.print_table(Console(file=stream, width=width, force_terminal=False), "Title", headings, rows)
    return stream.getvalue()


HEADINGS = ["", "ms", "× ours", "extra MiB"]
ROWS = [["ial_cuda cpu", "3.14", "1.00", "0.0"], ["F.cross_entropy, compiled", "123456.78", "14.46"]]


@pytest.mark.parametrize("width", range(1, 120))
def test_a_table_never_cuts_a_cell(width):
    text = printed(width, HEADINGS, ROWS)
    assert "…" not in text
    for name, ms, *_ in ROWS:
        assert name in text and ms in text
    table = [line for line in text.splitlines() if "3.14" in line]
    assert len(table) == 1 and ("1.00" in text) == ("14.46" in text)


def test_a_table_names_the_columns_it_leaves_out():
    assert "left out" not in printed(100, HEADINGS, ROWS)
    assert "Columns left out in this width: extra MiB" in printed(55, HEADINGS, ROWS)
    assert "  ms 3.14" in printed(20, HEADINGS, ROWS)


def test_output_that_is_no_terminal_has_full_width(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert tables.make_console().width == tables.FULL_WIDTH


CASE = Case(CROSS_ENTROPY, "cpu", torch.float32, (1, 19, 16, 32))


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (CASE, "cross-entropy, 1x19x16x32 float32 on cpu"),
        (Case(IAL, "cpu", torch.bfloat16, (2, 3, 4, 5), 4), "IAL, 2x3x4x5 to 16x20 bfloat16 on cpu"),
        (
            Case(CROSS_ENTROPY, "cpu", torch.float32, (1, 2, 4, 4), labels=torch.uint8, threads=1),
            "cross-entropy, 1x2x4x4 float32 on cpu, uint8 labels, 1 thread",
        ),
        (
            Case(CROSS_ENTROPY, "cpu", torch.float32, (1, 2, 4, 4), layout=torch.channels_last),
            "cross-entropy, 1x2x4x4 float32 on cpu, channels_last",
        ),
    ],
)
def test_a_case_has_a_name_and_survives_json(case, name):
    assert str(case) == name
    assert Case.from_json(json.loads(json.dumps(case.as_json()))) == case


def test_a_result_file_reads_back(tmp_path):
    rows = [Row("ial_cuda cpu", 2.0, ratio=1.0), Row("F.cross_entropy", failed="loss is NaN")]
    reports = [Report(CASE, "synthetic", rows, [Row("copy_", 1.0)])]
    report.write(reports, {"cpu": "x"}, 7, tmp_path / "loss.json")
    assert report.read(tmp_path / "loss.json") == (reports, {"cpu": "x"})
    assert json.loads((tmp_path / "loss.json").read_text())["rounds"] == 7


def test_a_failed_peer_has_one_short_line():
    stream = io.StringIO()
    rows = [Row("ial_cuda cpu", 2.0, 1.0, 3.0, ratio=1.0), Row("MONAI FocalLoss", failed="loss is NaN")]
    report.show(Report(CASE, "synthetic", rows), Console(file=stream, width=200))
    assert "MONAI FocalLoss: failed: loss is NaN\n" in stream.getvalue()


def test_a_tile_tells_the_truth_of_larger_inputs():
    tile = Inputs(Case(CROSS_ENTROPY, "cpu", torch.float64, (1, 3, 8, 8)))
    whole = Tiled(tile, 4)

    def of(given: Inputs) -> Result:
        logits = given.logits()
        loss = torch.nn.functional.cross_entropy(
            logits, given.targets[torch.int64], given.weight, ignore_index=255
        )
        return Result(loss.detach(), torch.autograd.grad(loss, logits)[0])

    pieces = list(whole.pieces(of(whole)))
    assert len(pieces) == 16
    for piece in pieces:
        torch.testing.assert_close(piece, of(tile))


def test_labels_of_lines_keep_their_distance():
    heights = plots.spread([0.1, 0.11, 0.12, 0.9], 0.05)
    assert heights == pytest.approx([0.06, 0.11, 0.16, 0.9])


def test_hierarchies_of_any_number_of_classes():
    for classes in (1, 2, 3, 11, 19, 150):
        assert inputs.hierarchy_of(classes).num_classes == classes
