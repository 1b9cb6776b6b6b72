"""The command line: its weights, output and files. Every failure is one line and an exit status."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import png
import pytest
import torch

import ial_cuda
from ial_cuda import __main__ as command
from ial_cuda.__main__ import main
from ial_cuda.class_weights import median_frequency_weights
from ial_cuda.hierarchy import CAMVID, CITYSCAPES

VOID = 255
TWO_IMAGES = np.array([[[0, 0], [1, 2]], [[0, 1], [VOID, VOID]]], dtype=np.uint8)
WEIGHTS = median_frequency_weights(list(TWO_IMAGES), 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``TWO_IMAGES``, the first grey and the second with a palette, and a file that is not an image."""
    folder = tmp_path / "labels"
    folder.mkdir()
    palette = png.chunk(b"PLTE", bytes(range(255, -1, -1)) * 3)
    png.save(folder / "b.png", TWO_IMAGES[1], colour=png.PALETTE, before=palette)
    png.save(folder / "a.png", TWO_IMAGES[0])
    (folder / "notes.txt").write_text("no image")
    return folder


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered) | options
    return subprocess.run(
        [sys.executable, "-m", "ial_cuda", *map(str, arguments)], text=True, timeout=600, **options
    )


def test_command_prints_the_table_and_a_line_of_python(folder):
    finished = run("weights", folder, "--num-classes", 3)
    assert finished.returncode == 0
    assert finished.stderr == ""
    count, *table, line = finished.stdout.splitlines()
    assert count == "2 images"
    assert [row.split() for row in table] == [["0", "0.6667"], ["1", "1.0000"], ["2", "1.0000"]]
    scope = {"torch": torch}
    exec(line, scope)
    assert torch.equal(scope["weight"], WEIGHTS)


def test_command_leaves_one_line_and_status_2(folder):
    finished = run("weights", folder, "--num-classes", 2)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr == (
        f"error: {folder / 'a.png'} has label 2 at (1, 1), the first of 1 bad pixels, "
        "expected labels 0 to 1 or ignore_index=255\n"
    )


def test_hierarchy_gives_names_and_warnings_are_one_line(folder, capsys):
    main(["weights", str(folder), "--hierarchy", "camvid", "--ignore-index", "255"])
    printed = capsys.readouterr()
    _, *table, _ = printed.out.splitlines()
    assert len(table) == CAMVID.num_classes
    assert len({len(row) for row in table}) == 1
    assert table[2].split() == ["2", "Column/Pole", "1.0000"]
    assert (
        printed.err == "warning: no image contains the classes [3, 4, 5, 6, 7, 8, 9, 10]; their weight is 1\n"
    )


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        ([], {}),
        (["--count-void"], dict(count_void=True)),
        (["--no-count-void"], dict(count_void=False)),
        (["--ignore-index", "2"], dict(ignore_index=2)),
    ],
)
def test_options_change_the_count(tmp_path, options, keywords):
    labels = np.array([[0, 0, 1, 2]], dtype=np.uint8), np.array([[1, 2, 2, 255]], dtype=np.uint8)
    labels[1][labels[1] == 255] = keywords.get("ignore_index", 255)
    for i, image in enumerate(labels):
        png.save(tmp_path / f"{i}.png", image)
    main(["weights", str(tmp_path), "--num-classes", "3", *options, "--output", str(tmp_path / "w.npy")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = median_frequency_weights(labels, 3, **keywords)
    np.testing.assert_array_equal(np.load(tmp_path / "w.npy"), expected.numpy())


@pytest.mark.parametrize(
    ("suffix", "load"),
    [
        (".json", lambda file: torch.tensor(json.loads(file.read_text()))),
        (".npy", lambda file: torch.from_numpy(np.load(file))),
        (".pt", lambda file: torch.load(file, weights_only=True)),
    ],
)
def test_output_is_saved_exactly(folder, tmp_path, capsys, suffix, load):
    file = tmp_path / f"weights{suffix}"
    main(["weights", str(folder), "--num-classes", "3", "--output", str(file)])
    assert torch.equal(load(file), WEIGHTS)
    assert capsys.readouterr().out.endswith(f"saved to {file}\n")


def test_info_prints_what_the_operators_describe(monkeypatch, capsys):
    operators = types.ModuleType("ial_cuda.backends")
    operators.describe = lambda: "torch 2.13\ncpu: available"
    monkeypatch.setitem(sys.modules, "ial_cuda.backends", operators)
    main(["info"])
    assert capsys.readouterr().out == "torch 2.13\ncpu: available\n"


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"ial_cuda {ial_cuda.__version__}\n"


COMMAND_ERRORS = [
    ([], "error: the following arguments are required: COMMAND"),
    (["weights"], "error: the following arguments are required: FOLDER"),
    (["weights", "{folder}"], "error: one of the arguments --num-classes --hierarchy is required"),
    (
        ["weights", "{folder}", "--num-classes", "3", "--hierarchy", "camvid"],
        "error: argument --hierarchy: not allowed with argument --num-classes",
    ),
    (["weights", "{folder}", "--num-classes", "x"], "error: argument --num-classes: invalid int value: 'x'"),
    (
        ["weights", "{folder}", "--num-classes", "0"],
        "error: --num-classes is 0, expected 1 to 1048576 classes",
    ),
    (
        ["weights", "{folder}", "--num-classes", str(10**14)],
        "error: --num-classes is 100000000000000, expected 1 to 1048576 classes",
    ),
    (
        ["weights", "{folder}", "--num-classes", "300"],
        "error: --ignore-index is None, which means 255, but 255 is one of the 300 classes",
    ),
    (
        ["weights", "{folder}", "--num-classes", "3", "--ignore-index", str(2**63)],
        "error: --ignore-index is 9223372036854775808, expected a 64-bit integer",
    ),
    (
        ["weights", "{folder}", "--num-classes", "3", "--pattern", "*_x.png"],
        "error: folder '{folder}' and its sub-folders have no file '*_x.png', expected label images",
    ),
    (
        ["weights", "{folder}", "--num-classes", "19", "--cityscapes-ids", "--pattern", "*.png"],
        "error: {folder}/b.png has label 255, expected label ids 0 to 33",
    ),
    (["weights", "{folder}", "--hierarchy", "kitti"], "error: argument --hierarchy: invalid choice: 'kitti'"),
    (
        ["weights", "{folder}/none", "--num-classes", "3"],
        "error: folder is '{folder}/none', expected a folder of label images",
    ),
    (
        ["weights", "{folder}", "--num-classes", "3", "--output", "w.txt"],
        "error: argument --output: 'w.txt' ends in '.txt', expected .json, .npy, .pt",
    ),
    (
        ["weights", "{folder}", "--num-classes", "3", "--output", "{folder}/none/w.pt"],
        "error: argument --output: '{folder}/none/w.pt' is in a folder that does not exist, "
        "expected one that exists",
    ),
    (
        ["weights", "{folder}", "--num-classes", "3", "--output", "{folder}/taken.pt"],
        "error: argument --output: '{folder}/taken.pt' is not a regular file, expected a regular file or a "
        "new name",
    ),
    (
        ["weights", "{folder}", "--num-classes", "3", "--output", "{folder}/device.pt"],
        "error: argument --output: '{folder}/device.pt' is not a regular file, expected a regular file or a "
        "new name",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "message"), COMMAND_ERRORS, ids=[error[1][7:70] for error in COMMAND_ERRORS]
)
def test_command_errors_are_one_line(folder, capsys, arguments, message):
    (folder / "taken.pt").mkdir()
    (folder / "device.pt").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(folder=folder) for argument in arguments])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(message.format(folder=folder))
    assert printed.count("\n") == 1


def test_missing_pillow_is_named(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(SystemExit) as stopped:
        main(["weights", str(folder), "--num-classes", "3"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == ("error: reading label images needs Pillow: pip install Pillow\n")


def test_tqdm_is_not_needed(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    main(["weights", str(folder), "--num-classes", "3", "--output", str(tmp_path / "w.npy")])
    assert capsys.readouterr().err == ""
    np.testing.assert_array_equal(np.load(tmp_path / "w.npy"), WEIGHTS.numpy())


@pytest.fixture(scope="module")
def cityscapes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A tree like that of Cityscapes, with train ids and macOS' hidden files, and its weights."""
    root = tmp_path_factory.mktemp("cityscapes") / "gtFine" / "train"
    train_id = np.full(34, VOID)
    train_id[[7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]] = range(19)
    generator = np.random.default_rng(0)
    maps = []
    for city in ("aachen", "bremen", "zurich"):
        (root / city).mkdir(parents=True)
        for frame in range(2):
            stem = root / city / f"{city}_00000{frame}_000019_gtFine"
            ids = np.repeat(generator.integers(0, 34, (16, 8)), 4, axis=1)
            maps.append(train_id[ids])
            png.save(Path(f"{stem}_labelIds.png"), ids)
            png.save(Path(f"{stem}_labelTrainIds.png"), train_id[ids])
            png.save(Path(f"{stem}_instanceIds.png"), np.where(ids > 23, ids * 1000 + 1, ids), 16)
            png.save(Path(f"{stem}_color.png"), ids[..., np.newaxis].repeat(4, axis=2), colour=png.RGBA)
            Path(f"{stem}_polygons.json").write_text("{}")
            (root / city / f"._{stem.name}_labelIds.png").write_bytes(b"\0\5\x16\7")
            (root / city / f"._{stem.name}_labelTrainIds.png").write_bytes(b"\0\5\x16\7")
    return root, median_frequency_weights(maps, CITYSCAPES.num_classes)


@pytest.mark.parametrize(
    "options",
    [
        ["--hierarchy", "cityscapes", "--cityscapes-ids"],
        ["--hierarchy", "cityscapes", "--pattern", "*_labelTrainIds.png"],
        ["--num-classes", "19", "--cityscapes-ids", "--pattern", "*/*_gtFine_labelIds.png"],
    ],
    ids=["ids", "train ids", "numbers"],
)
def test_cityscapes_as_downloaded(cityscapes, tmp_path, options):
    root, weights = cityscapes
    finished = run("weights", root, *options, "--output", tmp_path / "w.json")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    assert finished.stdout.startswith("6 images\n")
    assert torch.equal(torch.tensor(json.loads((tmp_path / "w.json").read_text())), weights)


def test_cityscapes_without_a_pattern_names_the_wrong_file(cityscapes):
    root, _ = cityscapes
    finished = run("weights", root, "--hierarchy", "cityscapes")
    assert finished.returncode == 2
    assert finished.stdout == ""
    wrong = root / "aachen" / "aachen_000000_000019_gtFine_color.png"
    assert finished.stderr == (
        f"error: {wrong} stores RGBA colours, expected labels: PNG grey values or palette indices\n"
    )


def test_png_of_every_depth(tmp_path):
    """In one folder, with labels up to the maximum of each depth."""
    kinds = [(depth, png.GREY) for depth in (1, 2, 4, 8, 16)] + [
        (depth, png.PALETTE) for depth in (1, 2, 4, 8)
    ]
    maps = []
    for i, (depth, colour) in enumerate(kinds):
        labels = np.random.default_rng(i).integers(0, min(2**depth, 1000), (40, 50))
        palette = png.chunk(b"PLTE", bytes(3 * 2**depth)) if colour == png.PALETTE else b""
        png.save(tmp_path / f"{i}.png", labels, depth, colour, before=palette)
        maps.append(labels)
    finished = run("weights", tmp_path, "--num-classes", 1000, "--ignore-index", -1)
    assert finished.returncode == 0, finished.stderr
    scope = {"torch": torch}
    exec(finished.stdout.splitlines()[-1], scope)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(scope["weight"], median_frequency_weights(maps, 1000, ignore_index=-1))


@pytest.mark.skipif("IAL_CAMVID" not in os.environ, reason="IAL_CAMVID does not name CamVid's folder")
def test_camvid_as_downloaded(capsys):
    main(["weights", str(Path(os.environ["IAL_CAMVID"], "trainannot")), "--hierarchy", "camvid"])
    count, *table, _ = capsys.readouterr().out.splitlines()
    assert count == "367 images"
    assert table[2].split() == ["2", "Column/Pole", "4.7865"]


@pytest.mark.parametrize(
    ("suffix", "old"), [(".json", b"old"), (".npy", b"old"), (".pt", b"old"), (".pt", None)]
)
def test_a_full_disk_leaves_the_old_file(folder, tmp_path, suffix, old):
    """Only a few bytes may be written to a file: one line of error and status 2."""
    resource = pytest.importorskip("resource", reason="no limits here")
    kept = tmp_path / "kept"
    kept.mkdir()
    file = kept / f"w{suffix}"
    if old:
        file.write_bytes(old)
    finished = run(
        *("weights", folder, "--num-classes", 3, "--output", file),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (16, 16)),
    )
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr == f"error: {str(file)!r} cannot be saved: File too large\n"
    assert [path.read_bytes() for path in kept.iterdir()] == [old] * bool(old)


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_while_saving_leaves_no_file_behind(folder, tmp_path, capsys, monkeypatch, failure):
    def fail(_):
        raise failure

    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "w.pt").write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stopped:  # the second would end pytest
        main(["weights", str(folder), "--num-classes", "3", "--output", str(kept / "w.pt")])
    assert getattr(stopped.value, "code", None) == (2 if isinstance(failure, OSError) else 130)
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in kept.iterdir()] == ["w.pt"]
    assert (kept / "w.pt").read_text() == "old"


def test_a_link_stays_a_link(folder, tmp_path):
    (tmp_path / "real").mkdir()
    for target in ("old.json", "new.json"):
        link = tmp_path / f"link-{target}"
        link.symlink_to(Path("real") / target)
        if target == "old.json":
            link.write_text("old")
        main(["weights", str(folder), "--num-classes", "3", "--output", str(link)])
        assert link.is_symlink()
        assert json.loads((tmp_path / "real" / target).read_text()) == WEIGHTS.tolist()
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == ["new.json", "old.json"]


@pytest.mark.skipif(os.name != "posix", reason="no modes here")
def test_modes_are_those_of_any_new_file_or_of_the_old_one(folder, tmp_path):
    file = tmp_path / "w.npy"
    arguments = ["weights", str(folder), "--num-classes", "3", "--output", str(file)]
    mask = os.umask(0o027)
    try:
        main(arguments)
        assert stat.S_IMODE(file.stat().st_mode) == 0o640
        file.chmod(0o604)
        main(arguments)
        assert stat.S_IMODE(file.stat().st_mode) == 0o604
    finally:
        os.umask(mask)


def test_a_file_that_may_not_be_written_is_refused_before_counting(tmp_path, capsys, monkeypatch):
    file = tmp_path / "w.pt"
    file.write_text("old")
    for denied in (file, tmp_path):
        monkeypatch.setattr(os, "access", lambda path, mode, denied=denied: path != denied)
        with pytest.raises(SystemExit) as stopped:
            main(["weights", "nowhere", "--num-classes", "3", "--output", str(file)])
        assert stopped.value.code == 2
        assert capsys.readouterr().err == (
            f"error: argument --output: {str(file)!r} cannot be written, "
            f"expected write permission for {str(denied)!r}\n"
        )


def test_an_interrupt_is_one_line_and_status_130(folder, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "median_frequency_weights", interrupted)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as stopped:  # the second would end pytest
        main(["weights", str(folder), "--num-classes", "3"])
    assert getattr(stopped.value, "code", None) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


@pytest.mark.skipif(os.name != "posix", reason="no signals here")
def test_a_real_interrupt_while_images_are_read(folder):
    """The process prints a line when it reads the first image, and reads slowly."""
    code = f"""
import time
from ial_cuda import __main__, label_images
label_images.read_labels = lambda file: print("reading", flush=True) or time.sleep(600)
__main__.main(["weights", {str(folder)!r}, "--num-classes", "3"])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "reading\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


@pytest.mark.skipif(os.name != "posix", reason="no signals here")
@pytest.mark.parametrize("arguments", [["info"], ["weights", "{folder}", "--num-classes", "3"]])
def test_a_closed_pipe_ends_it_silently(folder, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer) as out:
        finished = run(*(argument.format(folder=folder) for argument in arguments), stdout=out)
    assert finished.returncode == -signal.SIGPIPE
    assert finished.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_is_one_line(folder):
    with open("/dev/full", "w") as out:
        finished = run("weights", folder, "--num-classes", 3, stdout=out)
    assert finished.returncode == 2
    assert finished.stderr == "error: [Errno 28] No space left on device\n"


def test_what_does_not_fit_in_memory_is_one_line(folder, capsys, monkeypatch):
    def too_much(*_, **__):
        raise MemoryError

    monkeypatch.setattr(command, "median_frequency_weights", too_much)
    with pytest.raises(SystemExit) as stopped:
        main(["weights", str(folder), "--num-classes", "3"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: out of memory\n"


def test_a_pipe_among_the_images_is_not_read(folder):
    os.mkfifo(folder / "c.png")
    finished = run("weights", folder, "--num-classes", 3)
    assert finished.returncode == 2
    assert finished.stderr == f"error: {folder}/c.png is not a regular file, expected a PNG image\n"


def test_closed_stderr(folder):
    command = f"{sys.executable} -m ial_cuda weights {folder} --num-classes 3 2>&-"
    finished = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, text=True, timeout=600)
    assert finished.returncode == 0
    assert finished.stdout.startswith("2 images\n")
