"""The paper's experiment, tiny: networks, data, scores, losses, training, resuming, processes, report."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ial_cuda import CAMVID, CITYSCAPES, importance_aware_loss

pytest.importorskip("torchmetrics")
train = pytest.importorskip("examples.paper.__main__", reason="needs ial_cuda[bench], and python -m pytest")

from examples.paper import data, losses, networks, profiling, report, scores  # noqa: E402
from examples.paper.processes import Processes  # noqa: E402
from examples.paper.training import Training  # noqa: E402

ROOT = Path(__file__).parents[2]
VOID = 11


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """As in the processes that tests start, so that results are bitwise equal."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


def write_pair(image_file: Path, label_file: Path, labels: np.ndarray) -> None:
    """A label map, and an image whose blue is the label."""
    for file in (image_file, label_file):
        file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(label_file)
    Image.fromarray(np.stack([20 * labels, 255 - labels, labels], axis=-1)).save(image_file)


@pytest.fixture(scope="module")
def camvid(tmp_path_factory):
    """Six images to train and three to test, 48 x 72, in regions of twelve pixels."""
    root = tmp_path_factory.mktemp("camvid")
    random = np.random.default_rng(0)
    write_camvid(
        root, 6, 3, lambda: random.integers(0, VOID + 1, (4, 6), np.uint8).repeat(12, 0).repeat(12, 1)
    )
    return root


def write_camvid(root: Path, train: int, test: int, make_labels: Callable[[], np.ndarray]) -> None:
    for split, count in (("train", train), ("test", test)):
        for i in range(count):
            write_pair(root / split / f"{i}.png", root / f"{split}annot" / f"{i}.png", make_labels())


def write_city(root: Path, split: str, city: str, number: int, ids: np.ndarray) -> None:
    stem = f"{split}/{city}/{city}_{number:06}_000019_"
    image_file = root / "leftImg8bit" / f"{stem}leftImg8bit.png"
    write_pair(image_file, root / "gtFine" / f"{stem}gtFine_labelIds.png", ids)


def arguments(root: Path, output: Path, *options: object) -> list[str]:
    fixed = ["run", "--root", root, "--output", output, "--threads", 1, "--width", 0.05, "--workers", 0]
    return [str(option) for option in (*fixed, *options)]


def read_log(output: Path) -> dict:
    return json.loads((output / "log.json").read_text())


def read_state(output: Path) -> dict:
    return torch.load(output / "checkpoint.pt", weights_only=True)


def without_times(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


# Networks


@pytest.mark.parametrize(
    ("network", "classes", "published", "tolerance"),
    [
        ("enet", 19, 0.37e6, 0.005e6),  # Table 3 of the ENet paper, rounded
        ("segnet", 11, 29.46e6, 0.02e6),  # the same table
        ("fcn8s", 21, 134e6, 0.5e6),  # Table 1 of the FCN paper, rounded
    ],
)
def test_as_many_parameters_as_published(network, classes, published, tolerance):
    with torch.device("meta"):
        made = networks.NETWORKS[network].make(classes, 1.0)
    assert sum(parameter.numel() for parameter in made.parameters()) == pytest.approx(
        published, abs=tolerance
    )


@pytest.mark.parametrize("size", [(64, 96), (45, 67), (33, 31)], ids=str)
@pytest.mark.parametrize("network", networks.NETWORKS)
def test_images_of_any_size(network, size):
    made = networks.NETWORKS[network]
    logits = made.make(11, 0.05).eval()(torch.randn(2, 3, *size))
    expected = [-(-side // 8) for side in size] if made.coarse else size
    assert logits.shape == (2, 11, *expected)


def test_enet_has_the_layers_of_its_table():
    """Five stages of 5, 9, 8, 3 and 2 bottlenecks; dilated by 2, 4, 8, 16 and asymmetric, twice each."""
    enet = networks.ENet(19)
    kinds = (networks.Bottleneck, networks.Down, networks.Up)
    assert sum(isinstance(module, kinds) for module in enet.modules()) == 5 + 9 + 8 + 3 + 2
    convolutions = [module for module in enet.modules() if isinstance(module, torch.nn.Conv2d)]
    for dilation in (2, 4, 8, 16):
        assert sum(layer.dilation == (dilation, dilation) for layer in convolutions) == 2
    assert sum(layer.kernel_size == (5, 1) for layer in convolutions) == 4


# Data


def test_cityscapes(tmp_path):
    ids = np.array([[7, 8, 11, 12], [33, 32, 0, 10], [26, 24, 34, 1]], np.uint8).repeat(4, 0).repeat(4, 1)
    expected = [[0, 1, 2, 3], [18, 17, 255, 255], [13, 11, 255, 255]]
    for split, city in (("train", "ulm"), ("train", "bonn"), ("val", "jena")):
        write_city(tmp_path, split, city, 0, ids)
    source = data.cityscapes(tmp_path, "train")
    assert [pair.image.parent.name for pair in source.pairs] == ["bonn", "ulm"]
    assert source.hierarchy == CITYSCAPES
    image, labels = data.EvaluationSet(source, 1.0)[0]
    assert (labels[::4, ::4] == torch.tensor(expected)).all()
    assert image[..., 2].equal(torch.from_numpy(ids)), "the image of these labels"
    assert len(data.cityscapes(tmp_path, "val").pairs) == 1

    (tmp_path / "gtFine/train/ulm/ulm_000000_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"ulm.*leftImg8bit.png has no label map .*labelIds.png"):
        data.cityscapes(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="test has no images"):
        data.cityscapes(tmp_path, "test")


def test_cityscapes_trains(tmp_path):
    random = np.random.default_rng(0)
    for number, split in enumerate(("train", "train", "val")):
        ids = random.integers(0, 34, (4, 8), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        write_city(tmp_path, split, "ulm", number, ids // 2 * 2 + 1)
    options = ["--data", "cityscapes", "--split", "val", "--epochs", 1, "--batch", 2, "--weights", "none"]
    assert train.main(arguments(tmp_path, tmp_path / "out", *options)) == 0
    assert len(read_log(tmp_path / "out")["evaluations"][-1]["iou"]) == 19


def test_image_and_labels_are_augmented_alike(camvid):
    source = data.camvid(camvid, "train")
    images = data.TrainingSet(source, seed=3, scale=0.5, crop=(16, 20), max_zoom=1.5)
    seen = {}
    for epoch in range(4):
        for index in range(len(images)):
            image, labels = seen[epoch, index] = images[epoch, index]
            assert image.shape == (16, 20, 3) and labels.shape == (16, 20)
            inside = (image[..., 2] == labels).float().mean()  # else between two regions
            assert inside > 0.6, "the image's blue is the label"
    assert any(not seen[0, i][1].equal(seen[1, i][1]) for i in range(len(images))), "epochs differ"
    again = data.TrainingSet(source, seed=3, scale=0.5, crop=(16, 20), max_zoom=1.5)
    assert again[3, 5][0].equal(seen[3, 5][0]), "whatever was asked for before"
    other = data.TrainingSet(source, seed=4, scale=0.5, crop=(16, 20), max_zoom=1.5)
    assert any(not other[0, i][1].equal(seen[0, i][1]) for i in range(len(images)))


def test_without_augmentation_there_is_the_whole_image_or_its_mirror(camvid):
    source = data.camvid(camvid, "train")
    images = data.TrainingSet(source, seed=0, scale=1.0, crop=None, max_zoom=1.0)
    full = torch.from_numpy(np.array(source.labels(2)))
    seen = [images[epoch, 2][1] for epoch in range(8)]
    mirrored = [labels.equal(full.flip(1)) for labels in seen]
    assert all(flipped or labels.equal(full) for flipped, labels in zip(mirrored, seen, strict=True))
    assert 0 < sum(mirrored) < 8


def test_crop_larger_than_the_image_is_refused(camvid):
    with pytest.raises(ValueError, match=r"crop is \(30, 20\), larger than"):
        data.TrainingSet(data.camvid(camvid, "train"), seed=0, scale=0.5, crop=(30, 20), max_zoom=1.0)


def test_order_depends_on_seed_and_step_alone():
    all_steps = list(data.Batches(10, 4, seed=1, start=0, stop=6))
    assert list(data.Batches(10, 4, seed=1, start=3, stop=6)) == all_steps[3:]
    for epoch in range(3):
        keys = [key for batch in all_steps[2 * epoch : 2 * epoch + 2] for key in batch]
        assert {e for e, _ in keys} == {epoch} and len({index for _, index in keys}) == 8
    shares = [list(data.Batches(10, 4, seed=1, start=0, stop=6, rank=rank, world=2)) for rank in (0, 1)]
    for batch, first, second in zip(all_steps, *shares, strict=True):
        assert batch == [first[0], second[0], first[1], second[1]]
    assert list(data.Batches(10, 4, seed=2, start=0, stop=6)) != all_steps


@pytest.mark.skipif("IAL_CAMVID" not in os.environ, reason="IAL_CAMVID is not set")
def test_real_camvid():
    root = Path(os.environ["IAL_CAMVID"])
    source = data.camvid(root, "train")
    assert (len(source.pairs), len(data.camvid(root, "test").pairs)) == (367, 233)
    image, labels = data.TrainingSet(source, seed=0, scale=0.5, crop=None, max_zoom=1.25)[0, 17]
    assert image.shape == (180, 240, 3) and labels.shape == (180, 240)
    assert labels.max() <= VOID and len(labels.unique()) > 5
    image, labels = data.EvaluationSet(source, 0.5)[17]
    assert image.shape == (180, 240, 3) and labels.shape == (360, 480)


# Scores


def test_scores_by_hand():
    """Void does not count, and a class that is neither in the labels nor predicted has no score."""
    labels = torch.tensor([[0, 0, 0, 0], [8, 8, 9, VOID]])
    found = torch.tensor([[0, 0, 0, 8], [8, 8, 8, 10]])
    counted = scores.Scores(CAMVID)
    counted.update(found, labels)
    got = counted.as_json()
    iou = dict(enumerate(got["iou"]))
    assert {c: value for c, value in iou.items() if value is not None} == {0: 75.0, 8: 50.0, 9: 0.0}
    assert got["group_iou"] == [75.0, None, None, 25.0]
    assert got["mean_iou"] == pytest.approx(125 / 3, abs=1e-3)
    assert (got["accuracy"][0], got["accuracy"][8], got["accuracy"][9]) == (75.0, 100.0, 0.0)
    assert got["mean_accuracy"] == pytest.approx(175 / 3, abs=1e-3)


# Losses


LOSSES = {
    "cross-entropy": ["--loss", "cross-entropy", "--weights", "none"],
    "cross-entropy, weighted": ["--loss", "cross-entropy"],
    "IAL": [],
    "IAL, paper": ["--gradient", "paper"],
    "IAL, sum": ["--factors", "sum"],
}


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("network", networks.NETWORKS)
def test_five_steps(network, options, camvid, tmp_path):
    options = ["--network", network, "--epochs", 5, "--batch", 6, "--interval", 1, *options]
    if "sum" in options:
        options += ["--optimizer", "adam"]  # its steps do not grow with the loss
    assert train.main(arguments(camvid, tmp_path, *options)) == 0
    log = read_log(tmp_path)
    assert [row["step"] for row in log["rows"]] == [1, 2, 3, 4, 5]
    for row in log["rows"]:
        assert math.isfinite(row["loss"]) and 0 <= row["train_iou"] <= 100
        assert (row["f"] is None) == ("cross-entropy" in options)
    first = log["rows"][0]
    if network == "fcn8s" and "none" in options:
        assert first["loss"] == pytest.approx(math.log(11)), "its initial logits are zero"
    if "--gradient" in options or not options[6:]:
        assert all(0 < f < 0.75 for f in first["f"]), "at most (1 + lambda) / 2"
    if "sum" in options:
        assert first["f"][0] > 100, "it grows with the image"
    (evaluation,) = log["evaluations"]
    assert evaluation["step"] == 5 and 0 <= evaluation["mean_iou"] <= 100
    assert {file.stem for file in (tmp_path / "predictions").iterdir()} == {"0", "1", "2"}


def make_recipe(*options: str):
    return train.make_recipe(train.make_parser().parse_args(["run", "--output", ".", *options]))


@pytest.mark.parametrize("network", ["enet", "fcn8s"])
@pytest.mark.parametrize("loss", ["ial", "cross-entropy"])
def test_each_loss_is_the_one_of_its_name(network, loss):
    torch.manual_seed(0)
    recipe = make_recipe("--network", network, "--loss", loss)
    coarse = networks.NETWORKS[network].coarse
    logits = torch.randn(2, 11, *((3, 4) if coarse else (24, 32)))
    labels = torch.randint(VOID + 1, (2, 24, 32), dtype=torch.uint8)
    weight = torch.rand(11) + 0.5
    got, f = losses.make_loss(recipe, CAMVID, weight)(logits, labels)
    measured = profiling.make_losses(recipe, CAMVID, weight)
    fine = F.interpolate(logits, (24, 32), mode="bilinear") if coarse else logits
    if loss == "cross-entropy":
        assert f is None
        expected = F.cross_entropy(fine, labels.long(), weight, ignore_index=VOID)
        assert measured["F.cross_entropy"](logits, labels)[0].equal(expected)
    else:
        assert f.shape == (2, 3)
        expected = importance_aware_loss(fine, labels, CAMVID, weight=weight, ignore_index=VOID)
        for name in ("IAL, ial_cuda", "IAL, reference"):
            torch.testing.assert_close(measured[name](logits, labels), (expected, f))
    torch.testing.assert_close(got, expected)


def test_training_learns(tmp_path):
    """Sky above, road and car below, each in its colour, with channels-last images."""
    random = np.random.default_rng(0)

    def make_labels() -> np.ndarray:
        labels = np.full((48, 72), 3, dtype=np.uint8)
        labels[: random.integers(16, 32)] = 0
        labels[32:, random.integers(20, 52) :] = 8
        return labels

    write_camvid(tmp_path, 6, 2, make_labels)
    options = ["--width", 0.25, "--batch", 3, "--epochs", 16, "--learning-rate", 0.005, "--channels-last"]
    options += ["--weights", "none", "--evaluate-every", 8]
    assert train.main(arguments(tmp_path, tmp_path / "out", *options)) == 0
    log = read_log(tmp_path / "out")
    assert log["rows"][-1]["loss"] < 0.7 * log["rows"][0]["loss"]
    assert log["rows"][-1]["learning_rate"] == 0
    assert [evaluation["step"] for evaluation in log["evaluations"]] == [16, 32]
    assert log["evaluations"][-1]["accuracy"][0] > 25, "of eleven classes"


def test_a_loss_that_is_not_finite_ends_the_run(camvid, tmp_path, capsys):
    options = ["--network", "fcn8s", "--optimizer", "sgd", "--learning-rate", "1e30", "--epochs", 4]
    assert train.main(arguments(camvid, tmp_path, *options, "--batch", 6)) == 1
    assert "the loss is nan in steps" in capsys.readouterr().err


def test_bad_arguments(camvid, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert train.main(arguments(camvid, tmp_path, "--distributed")) == 1
    assert "LOCAL_RANK is not set" in capsys.readouterr().err
    assert train.main(arguments(camvid, tmp_path, "--batch", 7)) == 1
    assert "batch is 7, more than the 6 images" in capsys.readouterr().err
    assert train.main(arguments(camvid, tmp_path, "--split", "val")) == 1
    assert "val has no images" in capsys.readouterr().err


# Resuming, and several processes


def start(*command: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL)


def test_killed_and_resumed_equals_never_killed(camvid, tmp_path):
    options = ["--epochs", 10, "--batch", 2, "--interval", 1]  # 30 steps of ENet, with dropout and momentum
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = start("examples.paper", *arguments(camvid, killed, *options))
    deadline = time.monotonic() + 600
    while not (killed / "log.json").exists() or len(read_log(killed)["rows"]) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 3 <= read_state(killed)["step"] < 30
    assert (
        train.main(arguments(camvid, killed, *options, "--workers", 1)) == 0
    )  # the result does not depend on workers
    assert train.main(arguments(camvid, whole, *options)) == 0

    resumed, expected = read_state(killed), read_state(whole)
    assert resumed["step"] == expected["step"] == 30
    for name, value in expected["network"].items():
        assert value.equal(resumed["network"][name]), name
    for parameter, momenta in expected["optimizer"]["state"].items():
        for name, value in momenta.items():
            assert value.equal(resumed["optimizer"]["state"][parameter][name]), name
    assert without_times(resumed["rows"]) == without_times(expected["rows"])
    assert read_log(killed)["evaluations"] == read_log(whole)["evaluations"]


def test_a_finished_training_stays_and_other_recipes_are_refused(camvid, tmp_path, capsys):
    options = ["--epochs", 1, "--batch", 6]
    assert train.main(arguments(camvid, tmp_path, *options)) == 0
    before = read_log(tmp_path)
    (tmp_path / "log.json").unlink()  # as if killed between checkpoint and log
    assert train.main(arguments(camvid, tmp_path, *options)) == 0
    assert read_log(tmp_path) == before
    assert train.main(arguments(camvid, tmp_path, *options, "--seed", 1)) == 1
    assert (
        "the checkpoint belongs to another training, with seed=0, expected seed=1" in capsys.readouterr().err
    )


def test_two_processes_equal_one(camvid, tmp_path):
    """A step of FCN-8s, with class weights and unlike amounts of void in the two processes; evaluation.

    FCN-8s has no batch statistics, and its classifiers start at zero. So in the first step dropout changes
    the gradient of the classifier on conv7 alone. ENet's batch statistics differ between the processes.
    """
    options = ["--network", "fcn8s", "--optimizer", "sgd", "--epochs", 1, "--batch", 4]
    steps = {loss: [*options, "--loss", loss] for loss in ("ial", "cross-entropy")}
    evaluations = steps | {"enet": ["--network", "enet", "--epochs", 1, "--batch", 4]}
    one, two = tmp_path / "one", tmp_path / "two"
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    commands = (json.dumps(arguments(camvid, two / name, *line)) for name, line in evaluations.items())
    process = start(*torchrun, "-m", "tests.examples.paper_processes", *commands)
    for name, line in steps.items():
        assert train.main(arguments(camvid, one / name, *line)) == 0
    assert process.wait() == 0

    for name in steps:
        got, expected = read_state(two / name), read_state(one / name)
        for parameter, value in expected["network"].items():
            if parameter == "scores.2.weight":
                continue
            # The gradient is a sum over at most 216 pixels, in another order.
            tolerance = 16 * torch.finfo(torch.float32).eps * value.abs().max().item()
            ours = got["network"][parameter]
            torch.testing.assert_close(ours, value, rtol=0, atol=tolerance, msg=f"{name}, {parameter}")
        (ours,), (theirs,) = got["rows"], expected["rows"]
        for figure in ("loss", "f", "train_iou"):
            # pytest's relative tolerance, 1e-6, is eight eps of float32.
            assert ours[figure] == pytest.approx(theirs[figure]), f"{name}, {figure}"

    for name in evaluations:
        log, checkpoint = read_log(two / name), read_state(two / name)["network"]
        assert log["processes"] == 2
        for rank in (0, 1):
            evaluated = torch.load(two / name / "predictions" / f"{rank}.pt", weights_only=True)
            for tensor, value in checkpoint.items():
                assert evaluated[tensor].equal(value), f"{name}, {tensor}, rank {rank}"
        network = networks.NETWORKS[log["recipe"]["network"]].make(11, 0.05)
        network.load_state_dict(checkpoint)
        again = scores.evaluate(
            *(network, data.camvid(camvid, "test"), 1.0, Processes(False, "cpu")),
            **{"bf16": False, "workers": 0, "keep": tmp_path / "again"},
        )
        # A process evaluates fewer images at a time, which may round differently: a pixel or two may change.
        assert log["evaluations"][0]["iou"] == pytest.approx(again.as_json()["iou"], abs=0.1), name


def test_processes_draw_their_own_dropout_masks():
    def classifier_of(rank: int) -> torch.Tensor:
        processes = Processes(False, "cpu")
        processes.rank = rank
        training = Training(make_recipe("--network", "fcn8s", "--width", "0.05"), CAMVID, None, 1, processes)
        training.take_step(*profiling.make_batch(2, (48, 72), CAMVID))
        return training.network.scores[2].weight

    expected = classifier_of(0)
    assert classifier_of(0).equal(expected)
    assert not classifier_of(1).equal(expected)


# Report and profile


@pytest.fixture
def logged(tmp_path):
    """Logs of two losses with two seeds each, and of an unfinished training."""

    def write(name: str, loss: str, seed: int, iou: float, steps: int = 2, **others: object) -> None:
        recipe = make_recipe("--loss", loss, "--seed", str(seed)).as_json() | others
        rows = [
            {"step": step, "epoch": float(step), "f": [0.5, 0.3, 0.2] if loss == "ial" else None}
            for step in (1, 2)
        ]
        classes = [iou] * 8 + [iou, iou + 3, None]
        evaluation = {"step": 2, "split": "test", "iou": classes, "accuracy": [2 * iou] * 11}
        log = {"recipe": recipe, "steps": steps, "rows": rows, "evaluations": [evaluation]}
        folder = tmp_path / name
        folder.mkdir()
        (folder / "log.json").write_text(json.dumps(log))
        (folder / "predictions").mkdir()
        Image.fromarray(np.zeros((48, 72), np.uint8)).save(folder / "predictions" / "1.png")

    write("a", "cross-entropy", 0, 30.0)
    write("b", "cross-entropy", 1, 32.0)
    write("c", "ial", 0, 40.0)
    write("d", "ial", 1, 40.0)
    write("e", "ial", 2, 90.0, steps=3)
    return tmp_path, write


def test_report(logged, camvid, capsys):
    folder, write = logged
    assert train.main(["report", str(folder), "--root", str(camvid)]) == 0
    iou, accuracy = (folder / "tables.md").read_text().split("class accuracy in %")
    assert "mean ± standard deviation over 2 seeds" in iou
    rows = {row.split(" | ")[0]: row.split(" | ")[1:] for row in iou.splitlines() if row.startswith("| ENet")}
    names = ("paper", "paper, IAL", "cross-entropy, weights", "IAL, weights")
    assert list(rows) == [f"| ENet, {name}" for name in names]
    # The mean over all, that of Group 4, bicyclist (in no image), pedestrian, car.
    means = ["31.3 ± 1.4", "32.5 ± 1.4", "", "34.0 ± 1.4", "31.0 ± 1.4"]
    assert rows["| ENet, cross-entropy, weights"][:5] == means
    assert rows["| ENet, paper"][:5] == ["68.3", "61.2", "34.1", "67.2", "82.4"]
    assert "62.0 ± 2.8" in accuracy
    assert "Column/Pole" in capsys.readouterr().out
    for picture in ("iou.png", "factors.png", "predictions-enet.png"):
        assert Image.open(folder / picture).size > (300, 200)

    write("f", "ial", 3, 40.0, epochs=7)
    with pytest.raises(ValueError, match=r"f.log.json differs from the runs before it in \['epochs'\]"):
        report.load(folder)


def test_the_papers_means_are_of_its_figures():
    """The last column is the mean of the eleven classes up to rounding, so no figure is mistyped."""
    for rows in report.PAPER.values():
        for figures in rows.values():
            assert np.mean(figures[:-1]) == pytest.approx(figures[-1], abs=0.06)


README = (ROOT / "examples" / "paper" / "README.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def test_the_readme_has_the_figures_of_the_logs(tmp_path):
    shutil.copytree(RESULTS / "camvid-enet-half-size", tmp_path / "runs")
    assert train.main(["report", str(tmp_path / "runs")]) == 0
    tables = (tmp_path / "runs" / "tables.md").read_text()
    assert tables == (RESULTS / "camvid-enet-half-size" / "tables.md").read_text()
    full = [row.split(" | ")[:6] for row in tables.split("class accuracy")[0].splitlines()]
    quoted = [
        row.removesuffix(" |").split(" | ") for row in README.splitlines() if row.startswith("| ENet, ")
    ]
    quoted = [row for row in quoted if "±" in row[1]]
    assert len(quoted) == 6 and all(row in full for row in quoted)


@pytest.mark.parametrize("network", networks.NETWORKS)
def test_the_readme_has_the_profiles(network):
    measured = json.loads((RESULTS / f"cpu-amd-epyc-avx512/profile-{network}.json").read_text())
    rows = {row["name"]: row for row in measured["rows"]}
    losses = ("F.cross_entropy", "IAL, reference", "IAL, ial_cuda")
    alone = [rows[f"alone, {loss}"] for loss in losses]
    cells = [
        f"{rows['step, F.cross_entropy']['median_ms']:.1f}",
        ", ".join(f"{row['median_ms']:.1f}" for row in alone),
        ", ".join(f"{measured['share_percent'][loss]:.2f}" for loss in losses),
        ", ".join(f"{row['extra_mib']:.1f}" for row in alone),
    ]
    assert f" images | {' | '.join(cells)} |" in README


def test_nothing_to_report(tmp_path, capsys):
    assert train.main(["report", str(tmp_path)]) == 1
    assert "has no log.json" in capsys.readouterr().err


@pytest.mark.parametrize("network", ["enet", "fcn8s"])
def test_profile(network, tmp_path):
    file = tmp_path / "profile.json"
    options = ["--network", network, "--crop", 48, 64, "--batch", 2, "--width", 0.05, "--rounds", 2]
    command = ["profile", *options, "--threads", 1, "--output", file]
    assert train.main([str(part) for part in command]) == 0
    measured = json.loads(file.read_text())
    extra = {row["name"]: row["extra_mib"] for row in measured["rows"]}
    assert set(measured["share_percent"]) == {"IAL, ial_cuda", "IAL, reference", "F.cross_entropy"}
    assert all(0 < share < 100 for share in measured["share_percent"].values())
    assert extra["alone, IAL, ial_cuda"] < extra["alone, IAL, reference"]
    assert extra["step, IAL, ial_cuda"] <= extra["step, IAL, reference"]
