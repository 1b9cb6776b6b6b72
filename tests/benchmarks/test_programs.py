"""The programs on tiny inputs: files agree with what is printed, and a wrong result is not timed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ial_cuda import backends

loss = pytest.importorskip("benchmarks.loss", reason="needs ial_cuda[bench]")
import benchmarks.__main__ as everything  # noqa: E402
from benchmarks import pixel_losses, processes, step, sweep, upsample  # noqa: E402
from benchmarks.harness import measure, providers, report  # noqa: E402
from benchmarks.harness.inputs import FOCAL, IAL, SIGMOID_FOCAL, THRESHOLD, TOP_K, Case, Inputs  # noqa: E402

pytestmark = pytest.mark.skipif(
    backends.get("cpu").missing is not None, reason=f"cpu: {backends.get('cpu').missing}"
)

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--device", "cpu", "--rounds", "2", "--no-compile", "--threads", str(torch.get_num_threads())]
SHAPE = ["--shape", "1x19x32x64"]


def cases_of(folder: Path, program: str) -> list[dict]:
    return json.loads((folder / f"{program}.json").read_text())["cases"]


def test_a_tiny_run_of_loss(tmp_path):
    command = [sys.executable, "-m", "benchmarks.loss", *TINY, *SHAPE, "--output", tmp_path]
    ran = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"COLUMNS": "40"}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    entropy, ial = cases_of(tmp_path, "loss")
    assert entropy["input"] == "cross-entropy, 1x19x32x64 float32 on cpu"
    assert ial["input"] == "IAL, 1x19x32x64 float32 on cpu"
    assert [row["name"] for row in ial["providers"]] == [
        "ial_cuda cpu",
        "ial_cuda cpu, in place",
        "reference",
        "memory floor",
    ]
    gradient = 19 * 32 * 64 * 4
    for case, (reads, labels) in ((entropy, (1, 1)), (ial, (2, 2))):
        copy = next(row for row in case["parts"] if row["name"] == report.COPY)
        for row in case["providers"] + case["parts"]:
            assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"], row
        for row in case["providers"][:-1]:
            assert 0 < row["forward_ms"] < row["median_ms"]
            moved = (reads + 1) * gradient + labels * 32 * 64 * 8
            assert row["gb_per_s"] == round(moved / 1e6 / row["median_ms"], 2)
            assert row["copy_percent"] == round(100 * row["gb_per_s"] / copy["gb_per_s"], 1)
            assert row["ratio"] == round(row["median_ms"] / case["providers"][0]["median_ms"], 3)
            line = next(line for line in ran.stdout.splitlines() if f" {row['median_ms']:.2f} " in line)
            assert "…" not in line
    extra = {row["name"]: row["extra_mib"] for row in ial["providers"]}
    assert extra["ial_cuda cpu, in place"] == pytest.approx(-gradient / 2**20, abs=0.01)
    assert extra["reference"] > gradient / 2**20
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_wrong_gradient_is_not_timed(tmp_path, monkeypatch, capsys):
    right = providers.our_loss

    def wrong(backend, **options):
        def of(logits, *rest):
            value = right(backend, **options)(logits, *rest)
            return value if backend == "reference" else value + (logits - logits.detach()).sum()

        return of

    monkeypatch.setattr(providers, "our_loss", wrong)
    assert loss.main([*TINY, *SHAPE, "--only", "IAL", "--output", str(tmp_path)]) == 1
    (case,) = cases_of(tmp_path, "loss")
    ours = case["providers"][0]
    assert ours["failed"].startswith("gradient is wrong by 1, ") and ours["median_ms"] is None
    assert [row["name"] for row in case["parts"]] == [report.COPY, report.SUM]
    assert "ial_cuda cpu: failed: gradient is wrong by 1" in capsys.readouterr().out


def test_graphs_of_a_gpu(tmp_path, monkeypatch):
    """Graphs are a GPU's. Here the replay is the step itself, or for one shape a wrong result."""

    def capture(step, leaf):
        logits = measure.output_of(leaf)
        if leaf.shape[1] == 11:
            return lambda _: measure.Result(torch.zeros(()), torch.zeros_like(leaf))
        return lambda _: step(logits)

    monkeypatch.setitem(measure.CAPTURE, "cpu", capture)
    shapes = ["--shape", "1x19x32x64", "1x11x32x64", "--only", "cross-entropy"]
    assert loss.main([*TINY, *shapes, "--output", str(tmp_path)]) == 0
    right, wrong = (case["providers"][0] for case in cases_of(tmp_path, "loss"))
    assert right["graph_ms"] > 0 and right["no_graph"] is None
    assert wrong["graph_ms"] is None and wrong["no_graph"].startswith("its loss is wrong by")


def test_coarse_logits(tmp_path):
    assert upsample.main([*TINY, "--size", "64x128", "32x64", "--output", str(tmp_path)]) == 0
    inputs = [case["input"] for case in cases_of(tmp_path, "upsample")]
    assert inputs == [
        "cross-entropy, 1x19x16x32 to 64x128 float32 on cpu",
        "IAL, 1x19x16x32 to 64x128 float32 on cpu",
        "cross-entropy, 1x19x8x16 to 32x64 float32 on cpu",
    ]
    for case in cases_of(tmp_path, "upsample"):
        ours, peer = (
            next(row for row in case["providers"] if row["name"].startswith(name))
            for name in ("ial_cuda", "F.interpolate")
        )
        assert ours["extra_mib"] < peer["extra_mib"] and ours["failed"] is None
    assert (tmp_path / "upsample.png").exists()


def test_losses_of_pixels(tmp_path):
    only = ["--only", "float32", "--size", "64x128", "--output", str(tmp_path)]
    assert pixel_losses.main([*TINY, *only]) == 0
    cases = {case["input"]: case["providers"] for case in cases_of(tmp_path, "pixel_losses")}
    sizes = ("1x19x64x128", "1x19x16x32 to 64x128")
    names = [f"{loss}, {size} float32 on cpu" for size in sizes for loss in (FOCAL, TOP_K, THRESHOLD)]
    assert list(cases) == [*names, f"{SIGMOID_FOCAL}, {sizes[0]} float32 on cpu"]
    for name, (ours, plain, *others) in cases.items():
        assert not [row for row in (ours, plain, *others) if row["failed"]], name
        assert ours["name"] == "ial_cuda cpu"
        # The histogram of OHEM has a fixed size, large beside maps of 64x128.
        assert ours["extra_maps"] < plain["extra_maps"] / (5 if name.startswith(FOCAL) else 2)
    row = cases[f"{TOP_K}, 1x19x64x128 float32 on cpu"][1]
    assert row["extra_maps"] * 4 * 64 * 128 == pytest.approx(row["extra_mib"] * 2**20, rel=0.01)
    assert (tmp_path / "pixel_losses.png").exists()


@pytest.mark.parametrize("loss", [TOP_K, THRESHOLD])
def test_peers_of_ohem_keep_the_hardest_pixels(loss):
    case = Case(loss, "cpu", torch.float64, (1, 19, 16, 32), 4)
    inputs = Inputs(case)
    target = inputs.targets[torch.int64]
    logits = providers.interpolated(case, lambda logits, *_: logits)(inputs.source, target, inputs.weight)
    keep, thresh = pixel_losses.pixels_to_keep(case, inputs), pixel_losses.THRESHOLDS[loss]
    nll = torch.nn.functional.cross_entropy(logits, target, ignore_index=255, reduction="none")
    losses = nll[target != 255].sort(descending=True).values
    gaps = losses[:-1] - losses[1:]
    assert 0.15 < keep / len(losses) < 0.26
    assert gaps[keep - 1] == gaps[int(0.15 * len(losses)) : int(0.25 * len(losses)) - 1].max()
    below = 0 if thresh is None else int((losses > -math.log(thresh)).sum())
    for kept in (10, keep, len(losses) - 10):  # from the threshold alone to the number alone
        for peer in (pixel_losses.ohem, pixel_losses.ohem_by_sampler):
            found = peer(kept, thresh, logits, target, inputs.weight)
            torch.testing.assert_close(found, losses[: max(kept, below)].mean())


def test_a_training_step(tmp_path, monkeypatch):
    monkeypatch.setitem(step.SIZES, "cpu", (16, 32))
    assert step.main([*TINY, "--output", str(tmp_path)]) == 0
    (case,) = cases_of(tmp_path, "step")
    assert [row["name"] for row in case["providers"]] == list(step.losses("cpu"))
    assert all(row["median_ms"] > 0 and not row["failed"] for row in case["providers"])
    assert step.why_different([torch.ones(1)], [torch.full((1,), 1.01)]) is not None


def test_the_sweep_and_its_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "TILE_SIDE", 64)
    # With tiles this small a float16 gradient is below the normal numbers, and not exact.
    only = r"1x(19|2)x(64|128|256)x|4x19x256|1x19x512x512 (?!float16)"
    assert sweep.main([*TINY, "--only", only, "--seconds", "0.01", "--output", str(tmp_path)]) == 0
    cases = [case["input"] for case in cases_of(tmp_path, "sweep")]
    assert len(cases) == len(set(cases)) and any("channels_last" in name for name in cases)
    assert not [row for case in cases_of(tmp_path, "sweep") for row in case["providers"] if row["failed"]]
    for picture in ("sweep-resolution", "roofline", "sweep-classes", "sweep-inputs"):
        file = tmp_path / f"{picture}.png"
        assert file.exists(), picture
        file.unlink()
    assert sweep.main(["--redraw", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "roofline.png").exists()


def test_a_provider_that_needs_too_much_memory_is_skipped(monkeypatch):
    case = Case(IAL, "cpu", torch.float32, (1, 3, 8, 8))
    given = sweep.Sweep()
    given.held = {(IAL, "reference", 3): 4.0}
    monkeypatch.setattr(sweep, "free_bytes", lambda _: 3.9 * case.logits_bytes)
    inputs = sweep.Inputs(sweep.tile_of(case))
    for provider in providers.make_peers(case, compiled=False):
        assert "GiB, " in given.unless_too_large(provider, case, inputs).missing
    (ours, *_) = providers.make_ours(case, variants=False)
    assert given.unless_too_large(ours, case, inputs).missing is None


def test_cases_that_are_late_are_named(tmp_path, capsys):
    assert loss.main([*TINY, *SHAPE, "--minutes", "0", "--output", str(tmp_path)]) == 0
    assert "Not measured for lack of time: cross-entropy, 1x19x32x64" in capsys.readouterr().out


def test_all_programs_run(monkeypatch):
    commands = []
    monkeypatch.setattr(
        everything.subprocess,
        "run",
        lambda command, check: commands.append(command) or subprocess.CompletedProcess(command, 0),
    )
    assert everything.main(["--device", "cpu"]) == 0
    assert [command[2] for command in commands] == [
        "benchmarks.loss",
        "benchmarks.upsample",
        "benchmarks.pixel_losses",
        "benchmarks.sweep",
    ]
    assert everything.main(["--full"]) == 0
    assert [command[2] for command in commands[4:]] == [
        "benchmarks.loss",
        "benchmarks.upsample",
        "benchmarks.pixel_losses",
        "benchmarks.step",
        "benchmarks.sweep",
    ]


@pytest.mark.backends("cuda_two_launches", "cuda_one_launch")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_tiny_run_on_cuda(tmp_path):
    if not providers.kernels("cuda"):
        pytest.skip("no kernels for CUDA tensors")
    shapes = ["--shape", "1x19x32x64", "1x19x256x256"]
    assert loss.main([*TINY, "--device", "cuda", *shapes, "--output", str(tmp_path)]) == 0
    for case in cases_of(tmp_path, "loss"):
        ours = [row for row in case["providers"] if row["name"].startswith("ial_cuda")]
        assert len(ours) >= 3
        for row in ours:
            assert row["graph_ms"] > 0 and row["copy_percent"] > 0 and row["no_graph"] is None, row


def test_a_tiny_run_over_two_processes(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*torchrun, "benchmarks.processes", "--size", "16", "32", "--rounds", "2", "--output", tmp_path]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    entropy, ial = cases_of(tmp_path, "processes")
    assert entropy["input"] == "cross-entropy, 2x19x16x32 float32 on cpu"
    for case in (entropy, ial):
        names = [row["name"] for row in case["providers"]]
        assert {"ial_cuda, process_group", "ial_cuda, spatial_group"} < set(names)
        assert all(row["median_ms"] > 0 for row in case["providers"])


def test_the_program_for_processes_needs_torchrun(monkeypatch, capsys):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert processes.main([]) == 1
    assert "LOCAL_RANK is not set" in capsys.readouterr().err
