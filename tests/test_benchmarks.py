"""The benchmark's program on a tiny input: files agree with the print, and what is wrong has no speed."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ial_cuda import _ops

program = pytest.importorskip("benchmarks.loss", reason="needs ial_cuda[bench], and python -m pytest")
Result, why_refused = program.Result, program.why_refused

pytestmark = pytest.mark.skipif(_ops.unavailable["cpu"] is not None, reason=f"cpu: {_ops.unavailable['cpu']}")

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--shape", "1x19x32x64", "--rounds", "2", "--no-compile", "--threads", str(torch.get_num_threads())]


def read(folder: Path) -> dict:
    return json.loads((folder / "loss.json").read_text())


def test_a_tiny_run(tmp_path):
    command = [sys.executable, "-m", "benchmarks.loss", *TINY, "--output", tmp_path]
    ran = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr

    summary = read(tmp_path)
    case = summary["cases"][0]
    assert case["input"] == "1x19x32x64 float32 on cpu"
    names = [row["name"] for row in case["providers"]]
    assert names == ["ial_cuda cpu", "ial_cuda cpu, in place", "reference", "F.cross_entropy", "copy floor"]
    for row in case["providers"] + case["parts"]:
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"], row
    gradient = 19 * 32 * 64 * 4 / 2**20
    extra = {row["name"]: row["extra_mib"] for row in case["providers"]}
    assert extra["ial_cuda cpu, in place"] == pytest.approx(-gradient, abs=0.01)
    assert extra["reference"] > gradient

    assert set(case["ratios"]) == {
        "reference / ial_cuda cpu",
        "F.cross_entropy / ial_cuda cpu",
        "ial_cuda cpu / copy floor",
    }
    for name, ratio in case["ratios"].items():
        line = next(line for line in ran.stdout.splitlines() if line.startswith(name))
        assert line.split()[-1] == f"{ratio:.2f}"

    with (tmp_path / "loss.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["name"] for row in rows][: len(names)] == names
    assert len(rows) == sum(len(case["providers"]) + len(case["parts"]) for case in summary["cases"])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_gradient_has_no_speed(tmp_path, monkeypatch, capsys):
    def wrong(backend, *, inplace=False):
        return lambda logits, *rest: program.reference_loss(logits, *rest) + (logits - logits.detach()).sum()

    monkeypatch.setattr(program, "fused_loss", wrong)
    assert program.main([*TINY, "--output", str(tmp_path)]) == 1
    case = read(tmp_path)["cases"][0]
    refused, others = case["providers"][:2], case["providers"][2:]
    for row in refused:
        assert row["refused"].startswith("gradient errs"), row
        assert row["median_ms"] is row["ratio"] is row["gb_per_s"] is None
    assert all(row["median_ms"] > 0 for row in others)
    assert [row["name"] for row in case["parts"]] == ["copy_ (1 read, 1 write)", "sum (1 read)"]
    assert case["ratios"] == {}
    assert "ial_cuda cpu is wrong: gradient errs" in capsys.readouterr().out


@pytest.fixture
def truth() -> Result:
    generator = torch.Generator().manual_seed(0)
    return Result(torch.tensor(2.0).double(), torch.randn(1, 19, 4, 8, generator=generator).double())


def rounded(result: Result, dtype: torch.dtype) -> Result:
    return Result(result.loss.float(), result.gradient.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_right(truth, dtype):
    assert why_refused(rounded(truth, dtype), rounded(truth, torch.float32), truth) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: Result(r.loss, r.gradient * 1.01), "gradient errs"),
        (lambda r: Result(r.loss * 1.0001, r.gradient), "loss errs"),
        (lambda r: Result(r.loss, torch.full_like(r.gradient, torch.nan)), "gradient errs"),
        (lambda r: Result(r.loss, r.gradient[:, 1:]), "gradient has shape"),
    ],
)
def test_what_is_wrong_is_refused(truth, dtype, spoil, message):
    reason = why_refused(spoil(rounded(truth, dtype)), rounded(truth, torch.float32), truth)
    assert reason.startswith(message)


def test_a_compiler_that_fails_is_a_reason_to_skip():
    def fails(*_):
        raise RuntimeError("InvalidCxxCompiler: no compiler in /a/folder\nand more")

    inputs = program.Inputs((1, 19, 4, 8), torch.float32, "cpu")
    provider = program.Provider("reference, compiled", fails, program.reference_loss, compiled=True)
    row = program.examine(provider, inputs, *program.judge(program.reference_loss, inputs))
    assert row == program.Row(
        provider.name, skipped="torch.compile fails: InvalidCxxCompiler: no compiler in …"
    )


def test_figures_of_the_readme_are_those_of_the_results():
    """Every row of README's table, against the two files that it names."""
    results = [
        json.loads((ROOT / "benchmarks" / "results" / folder / "loss.json").read_text())["cases"][0]
        for folder in ("cpu-amd-epyc", "cpu-amd-epyc-huge-pages-for-all")
    ]
    measured = [{row["name"]: row for row in result["providers"]} for result in results]
    lines = (ROOT / "README.md").read_text().splitlines()
    first = lines.index("| | ms | / ours | extra MiB | ms, huge pages for all | / ours |") + 2
    table = lines[first : lines.index("", first)]
    assert len(table) == len(measured[0])
    for line in table:
        name, *figures = (cell.strip() for cell in line.strip("|").split("|"))
        default, huge = (rows[name] for rows in measured)
        extra = "" if default["extra_mib"] is None else f"{default['extra_mib']:.1f}"
        assert figures == [
            f"{default['median_ms']:.2f}",
            f"{default['ratio']:.2f}",
            extra,
            f"{huge['median_ms']:.2f}",
            f"{huge['ratio']:.2f}",
        ]
