"""The sweep on tiny images: what it asks, how it judges, what it writes; other libraries; training steps."""

from __future__ import annotations

import bisect
import csv
import importlib
import inspect
import itertools
import json
import math
import sys
import types

import pytest
import torch

from ial_cuda import backends

program = pytest.importorskip("benchmarks.sweep", reason="needs ial_cuda[bench], and python -m pytest")
from benchmarks import __main__ as everything  # noqa: E402  (which need the same)
from benchmarks import common, compare, growth, inputs, libraries, providers, questions, report, step  # noqa: E402

pytestmark = pytest.mark.skipif(
    backends.get("cpu").missing is not None, reason=f"cpu: {backends.get('cpu').missing}"
)

ARGUMENTS = ["--device", "cpu", "--rounds", "3", "--no-compile", "--threads", str(torch.get_num_threads())]


@pytest.fixture
def tiny(monkeypatch):
    """Images of up to 32 x 32, in tiles of 8 x 8."""
    monkeypatch.setattr(program, "SIDES", [8, 16, 32])
    monkeypatch.setattr(program, "GRID_SIDES", [8, 16])
    monkeypatch.setattr(program, "GRID_CLASSES", [2, 19])
    monkeypatch.setattr(program, "CLASSES", [2, 19, 300])
    monkeypatch.setattr(program, "BATCHES", [1, 2])
    monkeypatch.setattr(program, "SIDE", 8)
    monkeypatch.setattr(program, "BATCH_SIDE", 16)
    monkeypatch.setattr(program, "TILE_SIDE", 8)


def read(folder, name: str = "sweep.json") -> dict:
    return json.loads((folder / name).read_text())


def test_a_tiny_sweep(tiny, tmp_path, capsys):
    assert program.main([*ARGUMENTS, "--output", str(tmp_path)]) == 0
    summary = read(tmp_path)
    measured = {case["input"]: case for case in summary["cases"]}
    assert len(measured) == len(summary["cases"]), "no case twice"
    asked = {question["what"]: question["inputs"] for question in summary["questions"]}
    assert set(asked) == set(questions.VALUES)
    assert {case for cases in asked.values() for case in cases} == set(measured)
    for case in summary["cases"]:
        names = [row["name"] for row in case["providers"]]
        assert names == [
            "ial_cuda cpu",
            "ial_cuda cpu, in place",
            "ial_cuda cpu, one level",
            "reference",
            "F.cross_entropy",
            "copy floor",
        ]
        for row in case["providers"]:
            assert row["median_ms"] > 0 and row["gb_per_s"] is not None, (case["input"], row)
    name = "1x19x32x32 float32 on cpu"
    reference = next(row for row in measured[name]["providers"] if row["name"] == "reference")
    size = 19 * 32 * 32 * 4
    assert reference["extra_mib"] > size / 2**20
    ours = measured[name]["providers"][0]
    moved = 3 * size + 2 * 8 * 32 * 32
    assert ours["gb_per_s"] == pytest.approx(moved / 1e6 / ours["median_ms"], abs=0.006)

    shown = capsys.readouterr().out
    assert "F.cross_entropy / ours" in shown and "against threads" in shown
    grown = {(one["name"], one["cost"]): one["exponent"] for one in summary["exponents"]}
    assert grown["reference", "extra_mib"] == pytest.approx(1, abs=0.1)
    with (tmp_path / "sweep.csv").open() as stream:
        assert {row["input"] for row in csv.DictReader(stream)} == set(measured)
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_each_kind_is_compiled_once():
    """Cases that share the compiled code of peers come one after another."""
    cases = program.make_cases("cpu", 4)
    assert len(set(cases)) == len(cases)
    kinds = [program.Kind.key(case) for case in cases]
    sizes = [max(math.prod(case.shape), program.LARGE) for case in cases]
    assert sizes == sorted(sizes), "the large ones last"
    others = kinds[: bisect.bisect_right(sizes, program.LARGE)]
    changes = sum(one != other for one, other in itertools.pairwise(others))
    assert changes == len(set(others)) - 1
    grid = {(case.shape[1], case.shape[2]) for case in cases}
    assert grid >= {(classes, side) for classes in (2, 11, 19, 59, 150) for side in (256, 512, 1024, 2048)}
    assert [case.threads for case in cases if case.threads] == [1, 2]


def result(given: inputs.Inputs, loss: providers.Loss) -> common.Result:
    return providers.loss_and_gradient(loss, given.targets[torch.int64], given.weight)(given.logits())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("loss", [providers.reference_loss, providers.cross_entropy])
def test_the_truth_of_a_tile_is_that_of_the_whole(loss, layout):
    tile = inputs.Inputs((2, 5, 8, 8), torch.float32, "cpu", layout=layout)
    whole = inputs.Tiled(tile, 4, layout)
    logits = whole.logits()
    assert logits.shape == (2, 5, 32, 32) and logits.is_contiguous(memory_format=layout)
    assert torch.equal(logits[:, :, 8:16, 24:], tile.source)
    judges = compare.judge(loss, whole.tile)
    got = result(whole, loss)
    pieces = list(whole.pieces(got))
    assert len(pieces) == 16
    assert all(common.why_refused(piece, *judges) is None for piece in pieces)
    got.gradient[1, 3, 17, 30] += 1e-4
    refused = [common.why_refused(piece, *judges) for piece in whole.pieces(got)]
    assert [place for place, reason in enumerate(refused) if reason] == [4 * (17 // 8) + 30 // 8]


def test_a_loss_that_overflows_is_no_standard():
    """The weights of 512 x 512 pixels are more than float16 can hold; ours adds in float32."""
    given = inputs.Inputs((1, 2, 512, 512), torch.float16, "cpu")
    judges = compare.judge(providers.cross_entropy, given)
    assert compare.examine(
        providers.Provider("F.cross_entropy", providers.cross_entropy, providers.cross_entropy),
        given,
        *judges,
    ).refused
    ours = providers.our_cross_entropy("cpu")
    assert compare.examine(
        providers.Provider("ial_cuda cpu", ours, providers.cross_entropy), given, *judges
    ) == (compare.Row("ial_cuda cpu"))


def test_who_would_need_more_memory_than_there_is_is_skipped(tiny, tmp_path, monkeypatch, capsys):
    """By what it held of fewer pixels."""
    monkeypatch.setattr(program, "free_bytes", lambda _: 2 * 19 * 32 * 32 * 4)
    assert program.main([*ARGUMENTS, "--output", str(tmp_path)]) == 0
    rows = {
        (case["input"], row["name"]): row for case in read(tmp_path)["cases"] for row in case["providers"]
    }
    assert rows["1x19x16x16 float32 on cpu", "reference"]["skipped"] is None
    skipped = rows["1x19x32x32 float32 on cpu", "reference"]
    assert skipped["skipped"].startswith("needs 0.0 GiB") and skipped["median_ms"] is None
    assert rows["1x19x32x32 float32 on cpu", "ial_cuda cpu"]["median_ms"] > 0
    assert "reference: needs" in capsys.readouterr().out


def test_cases_for_which_there_is_no_time_are_told(tiny, tmp_path, capsys):
    assert program.main([*ARGUMENTS, "--minutes", "0", "--output", str(tmp_path)]) == 0
    assert "Out of time for 1x19x8x8 float32 on cpu; " in capsys.readouterr().out
    assert not (tmp_path / "sweep.json").exists()


def test_a_device_without_threads(tiny, tmp_path, monkeypatch):
    """As a GPU is; and of images so small that most questions have no answer."""
    asked = program.questions
    monkeypatch.setattr(program, "questions", lambda *rest: asked(*rest)[:-1])
    arguments = [*ARGUMENTS, "--largest", "8", "--only", "1x(2|19)x"]
    assert program.main([*arguments, "--output", str(tmp_path)]) == 0
    assert {case["input"].split("x")[1] for case in read(tmp_path)["cases"]} == {"2", "19"}
    assert "threads" not in {question["what"] for question in read(tmp_path)["questions"]}
    assert (tmp_path / "sweep.png").exists()
    on_a_gpu = asked("cuda", 2)
    assert {question.what for question in on_a_gpu} == set(questions.VALUES) - {"threads"}
    assert on_a_gpu[0].cases[0].dtype == torch.bfloat16


def test_few_rounds_of_what_is_slow():
    calls = []
    common.time_interleaved({"step": calls.append}, lambda: torch.ones(1), "cpu", 50, lambda: None, seconds=0)
    assert len(calls) == common.LEAST_ROUNDS, "whoever has so little time does not warm up"
    calls.clear()
    common.time_interleaved({"step": calls.append}, lambda: torch.ones(1), "cpu", 50, lambda: None)
    assert len(calls) == common.WARM_UP_ROUNDS + 50


def test_tiles_that_are_compared(monkeypatch):
    tile = inputs.Inputs((1, 3, 4, 4), torch.float32, "cpu")
    whole = inputs.Tiled(tile, 8)
    result = common.Result(torch.zeros(()), torch.arange(64.0).view(1, 1, 8, 8).repeat_interleave(4, 2))
    result = common.Result(result.loss, result.gradient.repeat_interleave(4, 3).expand(1, 3, 32, 32))

    def compared():
        return [int(piece.gradient[0, 0, 0, 0]) // 64 for piece in whole.pieces(result)]

    assert len(compared()) == inputs.CHECKED
    monkeypatch.setattr(inputs, "CHECKED_LOGITS", 5 * 48)
    assert compared() == [0, 16, 32, 47, 63]
    monkeypatch.setattr(inputs, "CHECKED_LOGITS", 1)
    assert compared() == [0, 63], "never less than the first and the last"


def test_goals_on_a_gpu_count_the_labels_of_the_case():
    shape = (1, 19, 512, 512)
    rows, copy = [report.Row(name) for name in report.OURS[:2]], report.Row(report.COPY, median_ms=0.01)

    def bounds(labels):
        case = questions.Case("cuda", torch.bfloat16, shape, labels)
        return [goal.bound for goal in report.goals(report.Report(case, "synthetic", rows, [copy]))]

    assert bounds(torch.uint8)[:3] == bounds(torch.int64)[3:] != bounds(torch.int64)[:3]


def test_exponents():
    line = growth.Line("ours", [1, 10, 100, 1000], [5, 5, 50, 500], since=10)
    assert line.exponent == 1
    assert growth.Line("ours", [1, 10], [5, 5]).exponent == 0
    assert growth.Line("ours", [1], [5]).exponent is None
    assert growth.Line("ours", [1, 10], [0, 5]).exponent is None


ON_THE_CPU = [library for library in libraries.LIBRARIES if "cpu" in library.devices]
ON_A_GPU = {library.name: library for library in libraries.LIBRARIES if library not in ON_THE_CPU}


@pytest.mark.parametrize("library", ON_THE_CPU, ids=lambda library: library.name)
def test_libraries_compute_what_they_are_said_to(library):
    package = pytest.importorskip(library.module.partition(".")[0])
    assert package is not None
    given = inputs.Inputs((2, 7, 16, 24), torch.float32, "cpu")
    given.targets[torch.int64][:, :4] = inputs.IGNORE_INDEX
    got = result(given, library.make(importlib.import_module(library.module)))
    assert common.why_refused(got, *compare.judge(library.eager, given)) is None


class Liger:
    def __init__(self, weight, ignore_index):
        self.options = weight, ignore_index

    def __call__(self, rows, target):
        weight, ignore_index = self.options
        return torch.nn.functional.cross_entropy(rows, target, weight, ignore_index=ignore_index)


def flag_gems(inp, target, weight=None, reduction="mean", ignore_index=-100, label_smoothing=0.0):
    """Has no label that is not a class: the library would read beyond the logits."""
    assert target.min() >= 0 and target.max() < inp.shape[1] and inp.is_contiguous()
    assert reduction == "none", "its own mean is slow"
    return torch.nn.functional.cross_entropy(inp, target, weight, reduction=reduction)


def quack(
    x,
    target,
    lse_partial=None,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    inplace_backward=False,
):
    assert x.is_contiguous() and x.shape == (len(target), len(weight)) and weight.dtype == torch.float32
    assert reduction == "sum", "its own mean would read beyond the weights"
    return torch.nn.functional.cross_entropy(
        x.float(), target, weight, ignore_index=ignore_index, reduction=reduction
    )


#: Their kernels run on a GPU alone. Here cross-entropy in PyTorch stands in for each, under its name.
STAND_INS = {
    "FlagGems cross-entropy": ("cross_entropy_loss", flag_gems),
    "quack cross-entropy": ("cross_entropy", quack),
    "Liger cross-entropy": ("LigerCrossEntropyLoss", Liger),
}


@pytest.mark.parametrize("shape", [(2, 7, 16, 24), (1, 300, 16, 24)], ids=str)
@pytest.mark.parametrize("name", ON_A_GPU)
def test_what_libraries_on_a_gpu_get(name, shape):
    library, stand_in = ON_A_GPU[name], types.SimpleNamespace(**dict([STAND_INS[name]]))
    given = inputs.Inputs(shape, torch.float32, "cpu")
    given.targets[torch.int64][:, :4] = inputs.IGNORE_INDEX
    got = result(given, library.make(stand_in))
    assert common.why_refused(got, *compare.judge(library.eager, given)) is None


@pytest.mark.parametrize("name", ON_A_GPU)
def test_libraries_on_a_gpu_are_as_their_stand_ins(name):
    function, stand_in = STAND_INS[name]
    try:
        real = getattr(importlib.import_module(ON_A_GPU[name].module), function)
    except Exception as error:  # some cannot be imported without a GPU
        pytest.skip(f"{type(error).__name__}: {compare.first_line(error)}")
    assert set(inspect.signature(stand_in).parameters) <= set(inspect.signature(real).parameters)


@pytest.mark.parametrize(("classes", "reason"), [(19, "a row has 38"), (20, None)])
def test_rows_that_quack_cannot_copy(classes, reason):
    quack_row = ON_A_GPU["quack cross-entropy"]
    loss = quack_row.make(types.SimpleNamespace(cross_entropy=quack))
    given = inputs.Inputs((1, classes, 16, 24), torch.bfloat16, "cpu")
    provider = providers.Provider(quack_row.name, loss, quack_row.eager)
    row = compare.examine(provider, given, *compare.judge(quack_row.eager, given))
    assert row.refused is None
    assert row.skipped == (reason and f"raises ValueError: cp.async copies 4, 8 or 16 bytes, {reason}")


def test_a_library_that_is_not_there_is_skipped(monkeypatch):
    monkeypatch.setattr(libraries.importlib.util, "find_spec", lambda name: None)
    rows = {provider.name: provider.missing for provider in libraries.make_libraries("cpu")}
    assert rows["MONAI FocalLoss"] == "monai is not installed"
    assert rows["Liger cross-entropy"] == "runs on cuda only"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            r"raise RuntimeError('\n\x1b[91mNo device in /dev/x\x1b[0m!\nCheck it.')",
            "RuntimeError: No device in …",
        ),
        ("import sys; sys.modules[__name__].__spec__ = None; 1 / 0", "ZeroDivisionError: division by zero"),
        ("", "ModuleNotFoundError: No module named 'broken_library.losses'"),
        ("assert 0, 'far ' * 99", "AssertionError: far far"),
    ],
)
def test_a_library_that_cannot_be_imported_is_skipped(monkeypatch, tmp_path, code, reason):
    (tmp_path / "broken_library").mkdir()
    (tmp_path / "broken_library" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    broken = ON_THE_CPU[0]._replace(module="broken_library.losses")
    monkeypatch.setattr(libraries, "LIBRARIES", (broken,))
    (provider,) = libraries.make_libraries("cpu")
    sys.modules.pop("broken_library", None)
    assert provider.missing.startswith(f"broken_library cannot be used: {reason}")
    assert len(provider.missing) < 250 and provider.missing.isprintable()


@pytest.fixture
def small_steps(monkeypatch):
    monkeypatch.setitem(step.SIZES, "cpu", (16, 32))


def test_a_training_step(small_steps, tmp_path, capsys):
    assert step.main([*ARGUMENTS, "--output", str(tmp_path)]) == 0
    (case,) = read(tmp_path, "step.json")["cases"]
    assert case["input"] == "training step, 1x19x16x32 float32 on cpu"
    names = [row["name"] for row in case["providers"]]
    assert names == ["ial_cuda", "ial_cuda, one level", "reference", "F.cross_entropy"]
    assert all(row["median_ms"] > 0 and row["extra_mib"] > 0 for row in case["providers"])
    assert case["providers"][0]["ratio"] == 1


def test_a_step_that_goes_elsewhere_has_no_time(small_steps, tmp_path, monkeypatch, capsys):
    def twice(backend):
        return lambda *arguments: 2 * providers.our_loss(backend)(*arguments)

    monkeypatch.setattr(step, "our_loss", twice)
    assert step.main([*ARGUMENTS, "--output", str(tmp_path)]) == 1
    ours, *others = read(tmp_path, "step.json")["cases"][0]["providers"]
    assert ours["refused"].startswith("loss differ by 1.0e+00") and ours["median_ms"] is None
    assert all(row["median_ms"] > 0 for row in others)


def test_all_programs_one_after_another(monkeypatch, tmp_path):
    """Each gets the same folder and the time that is left; one that fails stops no other."""
    commands = []

    def run(command, check):
        commands.append(command[2:])
        return types.SimpleNamespace(returncode=int(command[2] == "benchmarks.upsample"))

    monkeypatch.setattr(everything.subprocess, "run", run)
    assert everything.main(["--output", str(tmp_path), "--minutes", "3", "--no-compile"]) == 1
    assert [command[0] for command in commands] == [f"benchmarks.{name}" for name in everything.PROGRAMS]
    for command in commands:
        assert "--no-compile" in command and command[-2:] == ["--output", str(tmp_path)]
        assert 2.9 < float(command[command.index("--minutes") + 1]) <= 3
