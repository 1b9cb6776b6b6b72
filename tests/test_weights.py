"""Class weights against a brute-force count and CamVid's figures; label folders; the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

import ial_cuda
from ial_cuda.__main__ import main
from ial_cuda.hierarchy import CAMVID
from ial_cuda.weights import LabelError, LabelFolder, median_frequency_weights

VOID = 255

# Of the pixels of the images that contain it, class 0 has 3/8, class 1 has 2/8, class 2 has 1/4: median 1/4.
TWO_IMAGES = np.array([[[0, 0], [1, 2]], [[0, 1], [VOID, VOID]]], dtype=np.uint8)
TWO_IMAGES_WEIGHTS = [2 / 3, 1.0, 1.0]


def brute_force(images, num_classes, ignore_index, count_void):
    """Eq. 2 word by word, one class and one image at a time, in Python floats."""
    frequency = {}
    for c in range(num_classes):
        containing = [image for image in images if c != ignore_index and (image == c).any()]
        if containing:
            pixels = sum(int((image == c).sum()) for image in containing)
            total = sum(int((image != ignore_index).sum()) for image in containing)
            if count_void:
                total = sum(image.size for image in containing)
            frequency[c] = pixels / total
    ordered = sorted(frequency.values())
    median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return [median / frequency[c] if c in frequency else 1.0 for c in range(num_classes)]


@settings(deadline=None)
@given(
    data=st.data(),
    num_classes=st.integers(1, 6),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)),
    ignore_index=st.sampled_from([VOID, -100, 0, 7]),
    count_void=st.booleans(),
)
def test_equals_brute_force_however_batched(data, num_classes, shape, ignore_index, count_void):
    values = st.sampled_from([*range(num_classes), ignore_index])
    images = data.draw(arrays(np.int64, shape, elements=values))
    assume((images != ignore_index).any())
    cuts = sorted(data.draw(st.sets(st.integers(1, shape[0]))))
    batchings = [list(images), [images], np.split(images, cuts), torch.from_numpy(images)]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = [
            median_frequency_weights(maps, num_classes, ignore_index=ignore_index, count_void=count_void)
            for maps in batchings
        ]
    for result in results:
        assert torch.equal(result, results[0])
    expected = brute_force(images, num_classes, ignore_index, count_void)
    np.testing.assert_allclose(results[0].numpy(), expected, rtol=1e-7)


def test_images_of_different_shapes():
    images = [np.array([[0, 1, 1]]), np.array([[0], [1]]), np.array([[1]])]
    weights = median_frequency_weights(images, 2)
    np.testing.assert_allclose(weights.numpy(), brute_force(images, 2, VOID, True), rtol=1e-7)


def test_returns_float32_on_the_cpu():
    weights = median_frequency_weights([TWO_IMAGES], 3)
    assert weights.shape == (3,)
    assert weights.dtype == torch.float32
    assert weights.device.type == "cpu"
    np.testing.assert_allclose(weights.numpy(), TWO_IMAGES_WEIGHTS, rtol=1e-7)


def test_void_is_counted_by_default_and_left_out_on_request():
    images = [np.array([[0, 0, 0, 1]]), np.array([[1, VOID, VOID, VOID]])]
    default = median_frequency_weights(images, 2)
    counted = median_frequency_weights(images, 2, count_void=True)
    left_out = median_frequency_weights(images, 2, count_void=False)
    assert torch.equal(default, counted)
    np.testing.assert_allclose(counted.numpy(), [0.5 / 0.75, 0.5 / 0.25], rtol=1e-7)  # 3/4 and 2/8
    np.testing.assert_allclose(left_out.numpy(), [0.575 / 0.75, 0.575 / 0.4], rtol=1e-7)  # 3/4 and 2/5


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"])
@pytest.mark.parametrize("container", ["numpy", "torch"])
def test_every_integer_dtype(container, dtype):
    void = 100  # fits every dtype
    labels = np.where(TWO_IMAGES == VOID, void, TWO_IMAGES).astype(dtype)
    label_map = torch.from_numpy(labels) if container == "torch" else labels
    weights = median_frequency_weights([label_map], 3, ignore_index=void)
    np.testing.assert_allclose(weights.numpy(), TWO_IMAGES_WEIGHTS, rtol=1e-7)


def test_values_beyond_the_dtype_are_no_class():
    """300 classes and ignore_index=-1 with 8-bit labels: neither may wrap around to a label."""
    labels = np.array([[255, 44]], dtype=np.uint8)
    with pytest.warns(UserWarning, match="no image contains"):
        weights = median_frequency_weights([labels, labels, labels[:, :1]], 300, ignore_index=-1)
    np.testing.assert_allclose(weights[[44, 255]].numpy(), [0.55 / 0.5, 0.55 / 0.6], rtol=1e-7)  # 2/4, 3/5


@pytest.mark.parametrize(
    "make",
    [
        lambda: TWO_IMAGES.transpose(0, 2, 1)[:, ::-1],
        lambda: torch.from_numpy(TWO_IMAGES).permute(0, 2, 1),
        lambda: np.broadcast_to(TWO_IMAGES, TWO_IMAGES.shape),
        lambda: TWO_IMAGES.astype(">i4"),
    ],
    ids=["reversed", "permuted", "read-only", "big-endian"],
)
def test_any_memory_layout(make):
    weights = median_frequency_weights([make()], 3)
    np.testing.assert_allclose(weights.numpy(), TWO_IMAGES_WEIGHTS, rtol=1e-7)


def test_empty_maps_and_void_images_change_nothing():
    nothing = [np.zeros((0, 2, 2), np.uint8), np.zeros((0, 5), np.uint8), np.full((3, 3), VOID)]
    weights = median_frequency_weights([*nothing, TWO_IMAGES], 3)
    np.testing.assert_allclose(weights.numpy(), TWO_IMAGES_WEIGHTS, rtol=1e-7)


def test_absent_classes_get_one_and_a_warning():
    with pytest.warns(UserWarning) as caught:
        weights = median_frequency_weights([TWO_IMAGES], 5)
    assert [str(warning.message) for warning in caught] == [
        "no image contains the classes [3, 4]; their weight is 1"
    ]
    assert caught[0].filename == __file__
    np.testing.assert_allclose(weights.numpy(), [*TWO_IMAGES_WEIGHTS, 1.0, 1.0], rtol=1e-7)


def test_label_maps_are_streamed():
    references = []

    def label_maps():
        for _ in range(5):
            label_map = TWO_IMAGES.copy()
            references.append(weakref.ref(label_map))
            yield label_map
            del label_map
            alive = sum(reference() is not None for reference in references)
            assert alive <= 1, f"{alive} label maps are held at once"

    weights = median_frequency_weights(label_maps(), 3)
    assert len(references) == 5
    np.testing.assert_allclose(weights.numpy(), TWO_IMAGES_WEIGHTS, rtol=1e-7)


GOOD = np.zeros((2, 2), np.uint8)
ERRORS = [
    (
        dict(label_maps=[GOOD, [[0, 1]]]),
        TypeError,
        "label_maps[1] is a list, expected a torch.Tensor or numpy.ndarray",
    ),
    (
        dict(label_maps=[(GOOD, GOOD)]),
        TypeError,
        "label_maps[0] is a tuple, expected a torch.Tensor or numpy.ndarray",
    ),
    (
        dict(label_maps=[GOOD, GOOD.astype(np.float32)]),
        TypeError,
        "label_maps[1] has dtype float32, expected an integer dtype",
    ),
    (
        dict(label_maps=[GOOD.astype(bool)]),
        TypeError,
        "label_maps[0] has dtype bool, expected an integer dtype",
    ),
    (
        dict(label_maps=[torch.zeros(2, 2, dtype=torch.bfloat16)]),
        TypeError,
        "label_maps[0] has dtype torch.bfloat16, expected an integer dtype",
    ),
    (
        dict(label_maps=[torch.zeros(2, 2, dtype=torch.bool)]),
        TypeError,
        "label_maps[0] has dtype torch.bool, expected an integer dtype",
    ),
    (
        dict(label_maps=GOOD),
        ValueError,
        "label_maps[0] has shape (2,), expected (H, W) or (N, H, W)",
    ),
    (
        dict(label_maps=[torch.zeros(4, 1, 2, 2, dtype=torch.uint8)]),
        ValueError,
        "label_maps[0] has shape (4, 1, 2, 2), expected (H, W) or (N, H, W)",
    ),
    (
        dict(label_maps=[GOOD, np.array([[0, 1, 3], [4, VOID, 3]])]),
        LabelError,
        "label_maps[1] has label 3 at (0, 2), the first of 3 bad pixels, "
        "expected labels 0 to 2 or ignore_index=255",
    ),
    (
        dict(label_maps=[torch.tensor([[[0, 1]], [[2, -1]]])], ignore_index=7),
        LabelError,
        "label_maps[0] has label -1 at (1, 0, 1), the first of 1 bad pixels, "
        "expected labels 0 to 2 or ignore_index=7",
    ),
    (
        dict(label_maps=[]),
        ValueError,
        "label_maps has no pixel of any class in 0 images, "
        "expected at least one label that is not ignore_index=255",
    ),
    (
        dict(label_maps=[GOOD, GOOD], ignore_index=0),
        ValueError,
        "label_maps has no pixel of any class in 2 images, "
        "expected at least one label that is not ignore_index=0",
    ),
    (dict(label_maps=[GOOD], num_classes=0), ValueError, "num_classes is 0, expected at least 1"),
    (
        dict(label_maps=[GOOD], num_classes=3.0),
        TypeError,
        "num_classes is 3.0 (float), expected an integer",
    ),
    (
        dict(label_maps=[GOOD], ignore_index=None),
        TypeError,
        "ignore_index is None (NoneType), expected an integer",
    ),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), ERRORS, ids=[error[2][:60] for error in ERRORS])
def test_errors_name_argument_value_and_expectation(arguments, kind, message):
    with pytest.raises(kind) as caught:
        median_frequency_weights(**dict(num_classes=3) | arguments)
    assert str(caught.value) == message


def test_label_error_is_a_value_error_that_knows_its_map():
    with pytest.raises(ValueError) as caught:
        median_frequency_weights([GOOD, GOOD, GOOD + 3], 3)
    assert caught.value.map_index == 2


@pytest.fixture(scope="module")
def camvid() -> LabelFolder:
    root = os.environ.get("IAL_CAMVID")
    if not root:
        pytest.skip("IAL_CAMVID does not name a folder with CamVid's trainannot/*.png")
    return LabelFolder(Path(root) / "trainannot")


@pytest.mark.parametrize(
    ("count_void", "expected"),
    [
        (True, [0.2793, 0.2017, 4.7865, 0.1490, 1.0, 0.4217, 3.8467, 1.9736, 0.7889, 6.3747, 8.8587]),
        (False, [0.2794, 0.2018, 4.7889, 0.1491, 1.0, 0.4235, 3.8464, 1.9798, 0.7890, 6.3847, 8.8193]),
    ],
)
def test_camvid_figures(camvid, count_void, expected):
    assert len(camvid) == 367
    weights = median_frequency_weights(camvid, CAMVID.num_classes, ignore_index=11, count_void=count_void)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=0, atol=5.1e-5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``TWO_IMAGES``, the first as a grey image, the second with a palette; saved out of order."""
    grey, palette = Image.fromarray(TWO_IMAGES[0]), Image.fromarray(TWO_IMAGES[1])
    palette.putpalette([255 - i // 3 for i in range(768)])
    assert palette.mode == "P"
    folder = tmp_path / "labels"
    folder.mkdir()
    palette.save(folder / "b.png")
    grey.save(folder / "a.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_label_folder_reads_sorted_labels_again_and_again(folder):
    labels = LabelFolder(folder)
    assert [file.name for file in labels.files] == ["a.png", "b.png"]
    assert len(labels) == 2
    for _ in range(2):
        read = list(labels)
        assert all(image.dtype == np.uint8 for image in read)
        np.testing.assert_array_equal(read, TWO_IMAGES)


def test_label_folder_refuses_what_is_no_folder_of_labels(tmp_path):
    with pytest.raises(NotADirectoryError) as caught:
        LabelFolder(tmp_path / "nowhere")
    assert str(caught.value) == f"folder is {str(tmp_path / 'nowhere')!r}, expected a folder of label images"
    with pytest.raises(FileNotFoundError) as caught:
        LabelFolder(tmp_path)
    assert str(caught.value) == f"folder {str(tmp_path)!r} has no *.png, expected label images in it"


@pytest.mark.parametrize("mode", ["RGB", "LA", "1", "I;16"])
def test_label_folder_names_the_image_of_another_kind(folder, mode):
    Image.new(mode, (2, 2)).save(folder / "c.png")
    with pytest.raises(ValueError) as caught:
        list(LabelFolder(folder))
    assert str(caught.value).startswith(f"{folder / 'c.png'} has mode {mode}")
    assert str(caught.value).endswith("expected 8-bit labels, a single channel (L) or a palette (P)")


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "header length", "chunk length"])
def test_label_folder_names_the_broken_file(folder, damage):
    file = folder / "c.png"
    noise = np.random.default_rng(0).integers(0, 255, (400, 400), dtype=np.uint8)  # several IDAT chunks
    Image.fromarray(noise).save(file)
    whole = file.read_bytes()
    file.write_bytes(
        {
            "empty": b"",
            "text": b"not a PNG",
            "cut": whole[: len(whole) // 2],
            "header length": whole[:11] + b"\0" + whole[12:],
            "chunk length": whole[:34] + b"\0" + whole[35:],
        }[damage]
    )
    with pytest.raises(OSError, match="cannot be read as an image") as caught:
        list(LabelFolder(folder))
    assert str(file) in str(caught.value)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ial_cuda", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_command_prints_the_table_and_a_line_of_python(folder):
    finished = run("weights", folder, "--num-classes", 3)
    assert finished.returncode == 0
    assert finished.stderr == ""
    *table, line = finished.stdout.splitlines()
    assert [row.split() for row in table] == [["0", "0.6667"], ["1", "1.0000"], ["2", "1.0000"]]
    scope = {"torch": torch}
    exec(line, scope)
    assert torch.equal(scope["weight"], median_frequency_weights([TWO_IMAGES], 3))


def test_command_leaves_one_line_and_status_2(folder):
    finished = run("weights", folder, "--num-classes", 2)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr == (
        f"error: {folder / 'a.png'}: label_maps[0] has label 2 at (1, 1), the first of 1 bad pixels, "
        "expected labels 0 to 1 or ignore_index=255\n"
    )


def test_hierarchy_gives_names_and_warnings_are_one_line(folder, capsys):
    main(["weights", str(folder), "--hierarchy", "camvid"])
    printed = capsys.readouterr()
    *table, _ = printed.out.splitlines()
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
def test_options_reach_the_count(tmp_path, options, keywords):
    labels = np.array([[0, 0, 1, 2]], dtype=np.uint8), np.array([[1, 2, 2, 255]], dtype=np.uint8)
    labels[1][labels[1] == 255] = keywords.get("ignore_index", 255)
    for i, image in enumerate(labels):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
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
    assert torch.equal(load(file), median_frequency_weights([TWO_IMAGES], 3))
    assert capsys.readouterr().out.endswith(f"saved to {file}\n")


def test_info_prints_what_the_operators_describe(monkeypatch, capsys):
    operators = types.ModuleType("ial_cuda._ops")
    operators.describe = lambda: "torch 2.13\ncpu: available"
    monkeypatch.setitem(sys.modules, "ial_cuda._ops", operators)
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
    (["weights", "{folder}", "--num-classes", "0"], "error: num_classes is 0, expected at least 1"),
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
        "error: argument --output: '{folder}/none/w.pt' is in no existing folder, expected a file in one",
    ),
    (
        ["weights", "{folder}", "--num-classes", "3", "--output", "{folder}/taken.pt"],
        "error: [Errno 21] Is a directory: '{folder}/taken.pt'",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "message"), COMMAND_ERRORS, ids=[error[1][7:70] for error in COMMAND_ERRORS]
)
def test_command_errors_are_one_line(folder, capsys, arguments, message):
    (folder / "taken.pt").mkdir()
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(folder=folder) for argument in arguments])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(message.format(folder=folder))
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("PIL", "error: reading label images needs Pillow: pip install 'ial_cuda[cli]'\n"),
        ("tqdm", "error: the progress bar needs tqdm: pip install 'ial_cuda[cli]'\n"),
    ],
)
def test_missing_package_is_named_with_the_mend(folder, capsys, monkeypatch, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as stopped:
        main(["weights", str(folder), "--num-classes", "3"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == message
