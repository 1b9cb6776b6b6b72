"""Label images: the numbers stored in a PNG, errors that name the file, and the files of a folder."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import png
import pytest
from PIL import Image

from ial_cuda.label_images import CITYSCAPES_IDS, LabelFolder, read_labels

DEPTHS = [
    *((depth, png.GREY) for depth in (1, 2, 4, 8, 16)),
    *((depth, png.PALETTE) for depth in (1, 2, 4, 8)),
]


def palette(depth: int) -> bytes:
    """Colours that do not depend on the index."""
    return png.chunk(b"PLTE", random.Random(0).randbytes(3 * 2**depth))


def drawn(shape: tuple[int, int], depth: int) -> np.ndarray:
    """Random labels that include 0 and the maximum of ``depth`` bits."""
    labels = np.random.default_rng(0).integers(0, 2**depth, shape, dtype=np.uint16)
    labels.flat[0], labels.flat[-1] = 2**depth - 1, 0
    return labels


@pytest.mark.parametrize(("depth", "colour"), DEPTHS)
@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (13, 8), (37, 53)])
def test_every_depth_is_read_as_stored(tmp_path, depth, colour, interlaced, shape):
    labels = drawn(shape, depth)
    before = palette(depth) if colour == png.PALETTE else b""
    filters = (4, 1, 3, 2, 0)
    file = png.save(
        tmp_path / "a.png",
        labels,
        depth,
        colour,
        interlaced=interlaced,
        filters=filters,
        before=before,
        part=50,
    )
    read = read_labels(file)
    np.testing.assert_array_equal(read, labels)
    assert read.dtype == (np.uint16 if depth == 16 else np.uint8)
    if depth >= 8 or colour == png.PALETTE:  # checks the writer; Pillow scales other depths
        np.testing.assert_array_equal(np.asarray(Image.open(file)), labels)


@pytest.mark.parametrize(("depth", "colour"), DEPTHS)
def test_transparency_and_other_chunks_change_nothing(tmp_path, depth, colour):
    labels = drawn((6, 9), depth)
    chunks = {
        b"gAMA": struct.pack(">I", 45455),
        b"sBIT": b"\1" if colour == png.GREY else b"\1\1\1",
        b"tRNS": struct.pack(">H", int(labels[0, 0])) if colour == png.GREY else bytes(2**depth),
        b"tEXt": b"Software\0test",
    }
    before = b"".join(png.chunk(kind, data) for kind, data in chunks.items())
    before = palette(depth) + before if colour == png.PALETTE else before
    file = png.save(tmp_path / "a.png", labels, depth, colour, before=before)
    assert "transparency" in Image.open(file).info  # the file has transparency
    np.testing.assert_array_equal(read_labels(file), labels)


@pytest.mark.parametrize("mode", ["L", "P", "1", "I;16"])
@pytest.mark.parametrize("optimize", [False, True])
def test_what_pillow_writes(tmp_path, mode, optimize):
    """Large enough for several bands of rows."""
    labels = drawn((1500, 1000), {"1": 1, "I;16": 16}.get(mode, 8))
    labels[:, 300:] = labels[:, 300:301]  # runs, for the filters that Pillow chooses
    image = Image.fromarray(labels if mode == "I;16" else labels.astype(np.uint8))
    if mode == "1":
        image = Image.fromarray(labels == 1)
    elif mode == "P":
        image.putpalette(random.Random(0).randbytes(768))
    assert image.mode == mode
    image.save(tmp_path / "a.png", optimize=optimize)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), labels)


@pytest.mark.parametrize(
    ("colour", "samples", "what"),
    [
        (png.RGB, 3, "RGB colours"),
        (png.GREY_ALPHA, 2, "grey values with transparency"),
        (png.RGBA, 4, "RGBA colours"),
    ],
)
@pytest.mark.parametrize("depth", [8, 16])
def test_colours_are_refused_by_name(tmp_path, colour, samples, what, depth):
    file = png.save(tmp_path / "a.png", np.zeros((2, 2, samples), np.uint8), depth, colour)
    with pytest.raises(ValueError) as caught:
        read_labels(file)
    assert str(caught.value) == f"{file} stores {what}, expected labels: PNG grey values or palette indices"


@pytest.mark.parametrize("format", ["JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "text", "empty"])
def test_other_formats_are_refused_whatever_the_name(tmp_path, format):
    file = tmp_path / "a.png"
    if format in ("text", "empty"):
        file.write_text("no image" if format == "text" else "")
    else:
        Image.fromarray(drawn((8, 8), 4).astype(np.uint8)).save(file, format=format)
    with pytest.raises(ValueError) as caught:
        read_labels(file)
    assert str(caught.value) == (f"{file} is not a PNG image, expected PNG, which is lossless")


GOOD = png.png(drawn((50, 60), 8), filters=(1, 4), part=500)


def header(**changes: int) -> bytes:
    fields = dict(width=60, height=50, depth=8, colour=0, compression=0, filter=0, interlaced=0) | changes
    start = png.chunk(b"IHDR", struct.pack(">IIBBBBB", *fields.values()))
    return GOOD[:8] + start + GOOD[8 + len(start) :]


def data(rows: bytes) -> bytes:
    return GOOD[:33] + png.chunk(b"IDAT", rows) + png.chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        (GOOD[:8], "a part is missing"),
        (GOOD[: len(GOOD) // 2], "a part is missing"),
        (GOOD[:-12], "a part is missing"),
        (GOOD[:33] + GOOD[-12:], "its data end early"),
        (GOOD[:8] + GOOD[33:], "it has no header"),
        (GOOD[:35] + b"\xff" + GOOD[36:], "a part is missing"),
        (GOOD[:700] + bytes([GOOD[700] ^ 1]) + GOOD[701:], "the checksum of its chunk b'IDAT' is wrong"),
        (header(height=51), "its data end early"),
        (header(width=0), "its header is not valid"),
        (header(height=0), "its header is not valid"),
        (header(depth=3), "its header is not valid"),
        (header(depth=16, colour=3), "its header is not valid"),
        (header(colour=1), "its header is not valid"),
        (header(compression=1), "its header is not valid"),
        (header(filter=1), "its header is not valid"),
        (header(interlaced=2), "its header is not valid"),
        (data(b"no zlib"), "Error -3 while decompressing data: incorrect header check"),
        (data(zlib.compress(bytes(61 * 49))), "its data end early"),
        (data(zlib.compress(b"\5" + bytes(61 * 50 - 1))), "cannot decode image data"),
    ],
)
def test_damage_is_refused_by_name(tmp_path, damaged, reason):
    assert damaged != GOOD
    file = tmp_path / "a.png"
    file.write_bytes(damaged)
    with pytest.raises(ValueError) as caught:
        read_labels(file)
    assert str(caught.value) == f"{file} is a damaged PNG image: {reason}"


def test_any_changed_byte_is_refused(tmp_path):
    whole = png.png(drawn((3, 4), 8))
    file = tmp_path / "a.png"
    for i in range(len(whole)):
        file.write_bytes(whole[:i] + bytes([whole[i] ^ 16]) + whole[i + 1 :])
        with pytest.raises(ValueError, match="not a PNG image" if i < 8 else "is a damaged PNG image"):
            read_labels(file)


def test_missing_pillow_is_named(tmp_path, monkeypatch):
    file = png.save(tmp_path / "a.png", drawn((2, 2), 8))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"reading label images needs Pillow: pip install Pillow"):
        read_labels(file)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and a limit of address space")
def test_large_images_need_their_size_and_a_few_mib(tmp_path):
    """13,500 x 13,500 is more than Pillow opens. The memory limit is less than twice the size."""
    side = 13500
    assert side**2 > 2 * Image.MAX_IMAGE_PIXELS
    row = bytes([2]) + bytes(side - 1) + b"\1"  # filter "up": 1 more in each row
    rows = zlib.compressobj(1)
    compressed = b"".join(rows.compress(row) for _ in range(side)) + rows.flush()
    start = png.chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    file = tmp_path / "large.png"
    file.write_bytes(GOOD[:8] + start + png.chunk(b"IDAT", compressed) + png.chunk(b"IEND", b""))
    code = f"""
import resource, sys
from pathlib import Path
import numpy as np
from PIL import Image
from ial_cuda.label_images import read_labels
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + {side**2} + (64 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
labels = read_labels(Path({str(file)!r}))
assert labels.shape == ({side}, {side})
assert not labels[:, :-1].any()
assert (labels[:, -1] == np.arange(1, {side} + 1) % 256).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_what_does_not_fit_in_memory_is_named(tmp_path, monkeypatch):
    file = png.save(tmp_path / "a.png", drawn((2, 2), 8))

    def too_much(*_):
        raise MemoryError("Unable to allocate 373. GiB")

    monkeypatch.setattr(np, "empty", too_much)
    with pytest.raises(MemoryError) as caught:
        read_labels(file)
    assert str(caught.value) == f"{file} does not fit in memory: Unable to allocate 373. GiB"


def tree(folder: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        png.save(folder / name, np.full((1, 2), i, np.uint8))
    return folder


def names(folder: Path, *arguments: object) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in LabelFolder(folder, *arguments).files]


def test_folder_reads_sorted_labels_again_and_again(tmp_path):
    labels = LabelFolder(tree(tmp_path, "c.png", "sub/b.PNG", "a.Png", "sub/deeper/d.png"))
    assert len(labels) == 4
    for _ in range(2):
        assert [image.tolist() for image in labels] == [[[2, 2]], [[0, 0]], [[1, 1]], [[3, 3]]]


def test_folder_skips_hidden_files_and_other_names(tmp_path):
    hidden = [
        "._a.png",
        ".b.png",
        ".hidden/c.png",
        "sub/.d/e.png",
        "sub/._f.png",
        "g.txt",
        "h.png.bak",
        "png",
    ]
    tree(tmp_path, "a.png", "sub/b.png", *hidden)
    (tmp_path / "folder.png").mkdir()
    assert names(tmp_path) == ["a.png", "sub/b.png"]
    inside = tmp_path / ".hidden"  # asked for by name
    assert names(inside) == ["c.png"]


def test_folder_takes_the_files_of_a_pattern(tmp_path):
    tree(tmp_path, "x/a_labelIds.png", "x/a_color.png", "y/B_LABELIDS.PNG", "y/c_labelTrainIds.png")
    assert names(tmp_path, "*_labelIds.png") == ["x/a_labelIds.png", "y/B_LABELIDS.PNG"]
    assert names(tmp_path, "y/*.png") == ["y/B_LABELIDS.PNG", "y/c_labelTrainIds.png"]
    assert names(tmp_path, "*_Color.*") == ["x/a_color.png"]
    tree(tmp_path, "top.png")
    assert names(tmp_path, "**/t*.png") == ["top.png"], "as with glob, ** also matches no folder"


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links here")
def test_folder_follows_links_and_reads_no_folder_twice(tmp_path):
    tree(tmp_path / "elsewhere", "a.png")
    tree(tmp_path / "labels", "b.png", "sub/c.png")
    (tmp_path / "labels" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "labels" / "sub" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "labels" / "sub" / "loop").symlink_to(tmp_path / "labels")
    files = LabelFolder(tmp_path / "labels").files
    assert sorted(file.name for file in files) == ["a.png", "b.png", "c.png"]


def test_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    tree(tmp_path, "a.png", "sub/b.png")
    scan = os.scandir

    def scandir(path):
        if Path(path) == tmp_path / "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="sub"):
        LabelFolder(tmp_path)


def test_folder_refuses_what_has_no_labels(tmp_path):
    with pytest.raises(NotADirectoryError) as caught:
        LabelFolder(tmp_path / "nowhere")
    assert str(caught.value) == f"folder is {str(tmp_path / 'nowhere')!r}, expected a folder of label images"
    with pytest.raises(FileNotFoundError) as caught:
        LabelFolder(tmp_path, "*.gif")
    assert str(caught.value) == (
        f"folder {str(tmp_path)!r} and its sub-folders have no file '*.gif', expected label images"
    )


def test_broken_link_is_named(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        list(LabelFolder(tmp_path))


# The table of the data set's authors: each id and its train id. 255 is not evaluated.
CITYSCAPES_TABLE = """
    0 255  1 255  2 255  3 255  4 255  5 255  6 255  7 0    8 1    9 255  10 255  11 2   12 3   13 4   14 255
    15 255  16 255  17 5   18 255  19 6   20 7   21 8   22 9   23 10  24 11  25 12  26 13  27 14  28 15
    29 255  30 255  31 16  32 17  33 18
"""


def test_cityscapes_ids(tmp_path):
    ids, train_ids = np.array(CITYSCAPES_TABLE.split(), dtype=int).reshape(-1, 2).T
    np.testing.assert_array_equal(ids, np.arange(34))
    png.save(tmp_path / "a.png", ids[np.newaxis])
    (labels,) = LabelFolder(tmp_path, ids=CITYSCAPES_IDS)
    np.testing.assert_array_equal(labels, train_ids[np.newaxis])


@pytest.mark.parametrize("label", [34, 255])
def test_labels_above_all_ids_are_refused(tmp_path, label):
    file = png.save(tmp_path / "a.png", np.array([[7, label]]))
    with pytest.raises(ValueError) as caught:
        list(LabelFolder(tmp_path, ids=CITYSCAPES_IDS))
    assert str(caught.value) == f"{file} has label {label}, expected label ids 0 to 33"
