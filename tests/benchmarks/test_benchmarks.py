"""The benchmark's program on a tiny input: files agree with the print, and what is wrong has no speed."""

from __future__ import annotations

import collections
import contextlib
import csv
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import cases  # noqa: F401  registers simt
import pytest
import simt
import torch

from ial_cuda import backends

program = pytest.importorskip("benchmarks.loss", reason="needs ial_cuda[bench], and python -m pytest")
from benchmarks import common, compare, inputs, libraries, providers, report  # noqa: E402  (which need the same)

Result, why_refused = common.Result, common.why_refused

pytestmark = pytest.mark.skipif(
    backends.get("cpu").missing is not None, reason=f"cpu: {backends.get('cpu').missing}"
)

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--device", "cpu", "--shape", "1x19x32x64", "--rounds", "2", "--no-compile"]
TINY += ["--threads", str(torch.get_num_threads())]


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
    assert names == [
        "ial_cuda cpu",
        "ial_cuda cpu, in place",
        "ial_cuda cpu, one level",
        "reference",
        "F.cross_entropy",
        *(library.name for library in libraries.LIBRARIES),
        "copy floor",
    ]
    skipped = [row["name"] for row in case["providers"] if row["skipped"]]
    assert skipped == [provider.name for provider in libraries.make_libraries("cpu") if provider.missing]
    measured = [row for row in case["providers"] if row["name"] not in skipped]
    for row in measured + case["parts"]:
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"], row
    for row in measured[:-1]:  # not the floor
        assert 0 < row["forward_ms"] < row["median_ms"] and 0 < row["backward_ms"] < row["median_ms"], row
    gradient = 19 * 32 * 64 * 4 / 2**20
    extra = {row["name"]: row["extra_mib"] for row in measured}
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
    def wrong(backend, *_, inplace=False):
        return lambda logits, *rest: program.reference_loss(logits, *rest) + (logits - logits.detach()).sum()

    monkeypatch.setattr(program, "our_loss", wrong)
    monkeypatch.setattr(program, "our_cross_entropy", wrong)
    assert program.main([*TINY, "--output", str(tmp_path)]) == 1
    case = read(tmp_path)["cases"][0]
    refused, others = case["providers"][:3], [row for row in case["providers"][3:] if not row["skipped"]]
    for row in refused:
        assert " errs by up to " in row["refused"], row
        assert row["median_ms"] is row["ratio"] is row["gb_per_s"] is None
    assert all(row["median_ms"] > 0 for row in others)
    assert [row["name"] for row in case["parts"]] == ["copy_ (1 read, 1 write)", "sum (1 read)"]
    assert case["ratios"] == {}
    assert "ial_cuda cpu is wrong: gradient errs" in capsys.readouterr().out


def test_graphs_and_labels_of_a_gpu(tmp_path, monkeypatch):
    """What only a GPU has, with a replay that is the step itself; one provider's does nothing."""

    def fake(step, leaf):
        logits = common.output_of(leaf)
        if any(step is each for each in steps["F.cross_entropy"]):
            return lambda _: Result(torch.zeros(()), torch.zeros_like(leaf))
        return lambda _: step(logits)

    steps = collections.defaultdict(list)
    make_step = providers.Provider.step

    def remember(provider, inputs):
        steps[provider.name].append(make_step(provider, inputs))
        return steps[provider.name][-1]

    monkeypatch.setattr(providers.Provider, "step", remember)
    monkeypatch.setitem(common.CAPTURE, "cpu", fake)
    monkeypatch.setitem(providers.LABELS, "cpu", [torch.int64, torch.uint8])
    shapes = ["1x19x32x64", "2x11x24x40"]
    assert program.main([*TINY, "--shape", *shapes, "--output", str(tmp_path)]) == 0
    measured = read(tmp_path)["cases"]
    assert [case["input"].split()[0] for case in measured] == shapes
    for case in measured:
        rows = {row["name"]: row for row in case["providers"] + case["parts"]}
        for name in ("ial_cuda cpu", "ial_cuda cpu, uint8 labels", "ial_cuda cpu, in place"):
            assert rows[name]["graph_ms"] > 0
        assert rows["reference"]["graph_ms"] is None and rows["reference"]["no_graph"] is None
    first = {row["name"]: row for row in measured[0]["providers"]}
    assert first["F.cross_entropy"]["graph_ms"] is None
    assert first["F.cross_entropy"]["no_graph"].startswith("its loss errs")

    labels = {name: 32 * 64 * size for name, size in (("ial_cuda cpu", 8), ("ial_cuda cpu, uint8 labels", 1))}
    logits = 19 * 32 * 64 * 4
    copy = next(row for row in measured[0]["parts"] if row["name"] == report.COPY)
    assert copy["copy_percent"] == 100 and copy["copy_ratio"] == 1
    for name, size in labels.items():
        row = first[name]
        moved = 3 * logits + 2 * size
        assert row["gb_per_s"] == round(moved / 1e6 / row["median_ms"], 2)
        percent = 100 * (moved / row["median_ms"]) / (2 * logits / copy["median_ms"])
        assert row["copy_percent"] == pytest.approx(percent, abs=0.051)  # one digit after the point


@pytest.mark.backends("cuda_two_launches", "cuda_one_launch")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_tiny_run_on_cuda(tmp_path):
    if not program.kernels("cuda"):
        pytest.skip("no kernels for CUDA tensors")
    shapes = ["1x19x32x64", "1x19x256x256"]
    assert program.main([*TINY, "--device", "cuda", "--shape", *shapes, "--output", str(tmp_path)]) == 0
    for case in read(tmp_path)["cases"]:
        ours = [row for row in case["providers"] if row["name"].startswith("ial_cuda")]
        assert len(ours) >= 3
        for row in ours:
            assert row["graph_ms"] > 0 and row["no_graph"] is None, row
        small = case["input"].startswith(shapes[0])
        assert len(case["goals"]) == (0 if small else 3 * sum(row["name"] in report.OURS for row in ours))
        assert all(goal["measured"] is not None for goal in case["goals"])


def test_the_rows_of_one_launch_and_of_two(tmp_path, monkeypatch):
    """With the CUDA kernels on the CPU in the place of those on a GPU."""
    simt.load()
    monkeypatch.setattr(program, "kernels", lambda device: ["simt", "simt_one_launch"])
    assert program.main([*TINY, "--output", str(tmp_path)]) == 0
    (case,) = read(tmp_path)["cases"]
    names = [row["name"] for row in case["providers"]]
    assert names[:4] == [
        "ial_cuda simt",
        "ial_cuda simt_one_launch",
        "ial_cuda simt, in place",
        "ial_cuda simt, one level",
    ]
    launch = next(row for row in case["parts"] if row["name"] == "one launch")
    moved = 2 * 19 * 32 * 64 * 4 + 32 * 64 * 8
    assert launch["gb_per_s"] == round(moved / 1e6 / launch["median_ms"], 2)


def test_a_case_that_fails_stops_no_other(tmp_path, monkeypatch, capsys):
    make_inputs = program.Inputs

    def inputs(shape, *rest):
        if shape[1] == 19:
            raise RuntimeError("CUDA out of memory")
        return make_inputs(shape, *rest)

    monkeypatch.setattr(program, "Inputs", inputs)
    shapes = ["1x19x32x64", "2x11x24x40"]
    assert program.main([*TINY, "--shape", *shapes, "--output", str(tmp_path)]) == 1
    assert [case["input"] for case in read(tmp_path)["cases"]] == ["2x11x24x40 float32 on cpu"]
    assert "1x19x32x64 float32 on cpu fails: CUDA out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "kind"), [("ial_cuda new", "refused"), ("somebody's", "skipped")])
def test_a_provider_that_raises(name, kind):
    """Ours is wrong, others cannot do the case."""

    def fails(*_):
        raise ValueError("no such thing")

    given = inputs.Inputs((1, 19, 4, 8), torch.float32, "cpu")
    provider = providers.Provider(name, fails, program.reference_loss)
    row = compare.examine(provider, given, *compare.judge(program.reference_loss, given))
    assert row == report.Row(name, **{kind: "raises ValueError: no such thing"})


def test_the_second_call_is_judged_on_a_gpu():
    """FlagGems' launcher, for one, fails from the second call on with a Triton that is newer than it."""

    class OnAGpu(torch.Tensor):
        is_cuda = True

    calls = []

    def fails_again(logits, *rest):
        calls.append(1)
        if len(calls) == 2:
            raise TypeError("function takes exactly 20 arguments (18 given)")
        return providers.cross_entropy(logits, *rest)

    given = inputs.Inputs((1, 19, 4, 8), torch.float32, "cpu")
    judges = compare.judge(providers.cross_entropy, given)
    provider = providers.Provider("somebody's", fails_again, providers.cross_entropy)
    assert compare.examine(provider, given, *judges) == report.Row(provider.name)
    calls.clear()
    given.written = given.written.detach().as_subclass(OnAGpu).requires_grad_()
    row = compare.examine(provider, given, *judges)
    assert row.skipped == "raises TypeError: function takes exactly 20 arguments (18 given)"


def test_libraries_that_fail_stop_nothing(tmp_path, monkeypatch):
    def cannot(*_):
        raise RuntimeError("no such case")

    broken = libraries.Library("broken", "benchmarks.no_such_module", cannot, providers.cross_entropy)
    unable = libraries.Library("unable", "benchmarks.common", lambda _: cannot, providers.cross_entropy)
    monkeypatch.setattr(libraries, "LIBRARIES", (broken, unable))
    assert program.main([*TINY, "--output", str(tmp_path)]) == 0
    rows = {row["name"]: row for row in read(tmp_path)["cases"][0]["providers"]}
    assert rows["broken"]["skipped"].startswith("benchmarks cannot be used: ModuleNotFoundError: No module")
    assert rows["unable"]["skipped"] == "raises RuntimeError: no such case"
    assert rows["ial_cuda cpu"]["median_ms"] > 0


def test_a_capture_that_fails_is_told(monkeypatch):
    def fails(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setitem(common.CAPTURE, "cpu", fails)
    given = inputs.Inputs((1, 19, 4, 8), torch.float32, "cpu")
    graphs, reasons = compare.capture({"a": None, "b": None}, given, "cpu")
    assert graphs == {}
    assert reasons == dict.fromkeys("ab", "operation not permitted when stream is capturing")


class FakeCuda:
    """Stands in for the parts of torch.cuda that the clock and the graphs use; tells the order of calls."""

    def __init__(self, monkeypatch):
        calls = self.calls = []

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                calls.append("record")

            def synchronize(self):
                calls.append("synchronize")

            def elapsed_time(self, end):
                return 0.25

        class CUDAGraph:
            def replay(self):
                calls.append("replay")

        @contextlib.contextmanager
        def graph(_):
            calls.append("begin")
            yield
            calls.append("end")

        for name, fake in (("Event", Event), ("CUDAGraph", CUDAGraph), ("graph", graph)):
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(common, "FLUSH_BYTES", 64)
        common._other_memory.cache_clear()

    def step(self, logits):
        self.calls.append("step")
        return logits * 2


def test_the_clock_of_a_gpu(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    assert common._time_cuda(cuda.step, torch.ones(3)) == (0.25, 0.25)
    assert cuda.calls == ["record", "step", "record", "record", "synchronize"]
    cuda.calls.clear()
    common._time_cuda(common.InTwo(cuda.step, lambda value, logits: cuda.step(value)), torch.ones(3))
    assert cuda.calls == ["record", "step", "record", "step", "record", "synchronize"]
    assert common._other_memory(torch.device("cpu")).nbytes == 64
    common._other_memory.cache_clear()


def test_a_graph_is_captured_once_and_replayed(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    replay = common._capture_cuda(cuda.step, torch.ones(3, requires_grad=True))
    assert torch.equal(replay(torch.zeros(3)), torch.full((3,), 2.0))
    assert cuda.calls == ["begin", "step", "end", "replay"]


def test_what_nvidia_smi_says(monkeypatch):
    asked = []

    def answer(*command):
        asked.append(command)
        return "1980, 3201, 412.53, 47"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: types.SimpleNamespace(uuid="ab-12"))
    monkeypatch.setattr(common, "_first_line", answer)
    assert common.describe_gpu_state() == {
        "clocks.sm": "1980",
        "clocks.mem": "3201",
        "power.draw": "412.53",
        "temperature.gpu": "47",
    }
    assert asked[0][:2] == ("nvidia-smi", "--id=GPU-ab-12")
    monkeypatch.setattr(common, "_first_line", lambda *_: None)
    assert common.describe_gpu_state() == {}


#: Of bytes in a second: a copy on an H100.
COPY_SPEED = 3.0e12
#: Bounds have two digits after the point.
ROUNDED = dict(abs=0.0051)


def gpu_report(shape=(8, 11, 720, 960), dtype=torch.bfloat16, **changes) -> report.Report:
    """A report with figures that reach every goal, in times of the copy: of the step, and as a graph."""
    times = {
        "ial_cuda cuda_two_launches": (1.9, 1.7),
        "ial_cuda cuda_two_launches, uint8 labels": (1.6, 1.5),
        "ial_cuda cuda_one_launch": (1.6, 1.5),
        "ial_cuda cuda_one_launch, uint8 labels": (1.4, 1.3),
        "reference": (1.0, None),
        "reference, compiled": (1.0, None),
        "F.cross_entropy": (9.0, 8.0),
        "F.cross_entropy, compiled": (2.5, 2.4),
        "FlagGems cross-entropy": (2.2, None),
        report.FLOOR: (1.5, None),
        report.COPY: (1.0, None),
    } | changes
    copy_ms = 2e3 * math.prod(shape) * dtype.itemsize / COPY_SPEED
    rows = [
        report.Row(
            name,
            median_ms=step and step * copy_ms,
            graph_ms=graph and graph * copy_ms,
            copy_percent=step and 100 * (1.5 + labels_of(name) / (shape[1] * dtype.itemsize)) / step,
            copy_ratio=step,
            extra_mib=0.1,
        )
        for name, (step, graph) in times.items()
    ]
    return report.Report(report.Case("cuda", dtype, shape), "synthetic", rows[:-1], rows[-1:])


def labels_of(name: str) -> int:
    return 1 if name.endswith(report.UINT8) else 8


def test_goals():
    reached = {goal.what: goal for goal in report.goals(gpu_report())}
    assert len(reached) == 4 * 3
    assert all(goal.reached for goal in reached.values())
    two = reached["ial_cuda cuda_two_launches: % of the copy's speed"]
    moved = 1.5 + 8 / 22
    assert two.measured == pytest.approx(100 * moved / 1.9) and two.as_graph == pytest.approx(
        100 * moved / 1.7, rel=1e-3
    )
    one = reached["ial_cuda cuda_one_launch: times the copy's time"]
    assert one.measured == pytest.approx(1.6) and one.as_graph == pytest.approx(1.5, rel=1e-3)
    peer = reached["ial_cuda cuda_two_launches, uint8 labels / best peer, FlagGems cross-entropy"]
    assert peer.measured == pytest.approx(1.6 / 2.2, rel=1e-3)
    assert peer.as_graph == pytest.approx(1.5 / 2.4, rel=1e-3), "of those that have one"
    assert reached["ial_cuda cuda_one_launch: extra MiB"].reached

    slow = gpu_report(**{"ial_cuda cuda_two_launches": (2.1, 2.0), "F.cross_entropy, compiled": (1.9, 1.9)})
    missed = {goal.what: goal.reached for goal in report.goals(slow)}
    assert missed["ial_cuda cuda_two_launches: % of the copy's speed"] is False
    assert missed["ial_cuda cuda_two_launches / best peer, F.cross_entropy, compiled"] is False
    assert missed["ial_cuda cuda_one_launch: times the copy's time"] is True

    peers = ["F.cross_entropy", "F.cross_entropy, compiled", "FlagGems cross-entropy"]
    absent = report.goals(gpu_report(**dict.fromkeys(peers, (None, None))))
    (goal,) = (
        goal for goal in absent if goal.what == "ial_cuda cuda_two_launches / best peer, none measured"
    )
    assert goal.measured is goal.reached is goal.as_graph is None
    assert report.make_goal_table(absent).row_count == len(absent)


@pytest.mark.parametrize("labels", [8, 1])
@pytest.mark.parametrize(
    ("shape", "dtype", "kept", "beside_us"),
    [
        ((1, 19, 1024, 2048), torch.bfloat16, 3 / 8, 6),
        ((8, 11, 720, 960), torch.float32, 3 / 11, 20),
        ((1, 19, 512, 512), torch.bfloat16, 0, 12),  # where it is not known what is kept
    ],
)
def test_the_arithmetic_of_goals(shape, dtype, kept, beside_us, labels):
    """In bytes and seconds."""
    pixels = shape[0] * shape[2] * shape[3]
    logits = pixels * shape[1] * dtype.itemsize
    microseconds = {
        "two launches": 1e6 * (3 * logits + 2 * labels * pixels) / COPY_SPEED,
        "one launch": 1e6 * ((3 - kept) * logits + 2 * labels * pixels) / COPY_SPEED,
        "peer": 1e6 * (3 * logits + 3 * 8 * pixels) / COPY_SPEED,
        "copy": 1e6 * 2 * logits / COPY_SPEED,
    }
    two, one = microseconds["two launches"] + 12, microseconds["one launch"] + beside_us
    suffix = report.UINT8 if labels == 1 else ""
    bounds = {goal.what: goal.bound for goal in report.goals(gpu_report(shape, dtype))}
    percent = bounds[f"ial_cuda cuda_two_launches{suffix}: % of the copy's speed"]
    assert percent == pytest.approx(100 * microseconds["two launches"] / two, abs=0.051)  # one digit
    copies = bounds[f"ial_cuda cuda_one_launch{suffix}: times the copy's time"]
    assert copies == pytest.approx(one / microseconds["copy"], **ROUNDED)
    for backend, ours in (("cuda_two_launches", two), ("cuda_one_launch", one)):
        peer = bounds[f"ial_cuda {backend}{suffix} / best peer, FlagGems cross-entropy"]
        assert peer == pytest.approx(ours / (microseconds["peer"] + 12), **ROUNDED)


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

    given = inputs.Inputs((1, 19, 4, 8), torch.float32, "cpu")
    provider = providers.Provider("reference, compiled", fails, program.reference_loss, compiled=True)
    row = compare.examine(provider, given, *compare.judge(program.reference_loss, given))
    assert row == report.Row(
        provider.name, skipped="torch.compile fails: InvalidCxxCompiler: no compiler in …"
    )


def test_compiled_code_is_never_what_another_process_left(monkeypatch, tmp_path):
    """torch would find the code of a narrower instruction set in its caches on disk, and take it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    double = providers.compile_anew(lambda x: 2 * x)
    assert double(torch.ones(3)).tolist() == [2, 2, 2]
    assert not (tmp_path / "fxgraph").exists()
