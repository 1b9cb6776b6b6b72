"""Reads label images: the numbers stored in PNG files, not their colours."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

#: The label ids of Cityscapes' 19 classes, in train-id order. The other ids up to 33 are void.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33)


class LabelFolder:
    """The label images of a folder and its sub-folders, sorted by path. Iterating reads one at a time.

    Yields the arrays (H, W) of `read_labels`. Files and folders whose names begin with a dot are skipped.
    Links to folders are followed, and no folder is read twice. Needs Pillow.

    Args:
        folder: the folder.
        pattern: a pattern for the end of a file's path, such as ``*_labelTrainIds.png`` or ``train/*.png``.
            Case is ignored.
        ids: optional, the label of each class in the files. Label ``ids[c]`` is read as class c. The other
            labels up to the highest of ``ids`` are read as 255.

    Attributes:
        files: the paths of the images, in the order of iteration.

    Raises:
        NotADirectoryError: ``folder`` is not a folder.
        FileNotFoundError: no file matches ``pattern``.
        OSError: a folder cannot be read. While iterating: a file cannot be read.
        ValueError: while iterating, what `read_labels` raises, or a label is above all ``ids``.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        pattern: str = "*.png",
        ids: Sequence[int] | None = None,
    ) -> None:
        if not Path(folder).is_dir():
            raise NotADirectoryError(f"folder is {os.fspath(folder)!r}, expected a folder of label images")
        self.files = sorted(_visible_files(Path(folder), pattern))
        if not self.files:
            raise FileNotFoundError(
                f"folder {os.fspath(folder)!r} and its sub-folders have no file {pattern!r}, "
                "expected label images"
            )
        self._class_of = None
        if ids is not None:
            self._class_of = np.full(max(ids) + 1, 255, np.uint8)
            self._class_of[list(ids)] = range(len(ids))

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[np.ndarray[Any, Any]]:
        for file in self.files:
            labels = read_labels(file)
            if self._class_of is not None:
                highest = len(self._class_of) - 1
                if labels.max() > highest:
                    raise ValueError(f"{file} has label {labels.max()}, expected label ids 0 to {highest}")
                labels = self._class_of[labels]
            yield labels


def _visible_files(folder: Path, pattern: str) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error  # os.walk would skip the folder

    seen = set()
    for root, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            file = Path(root, name)
            path = PurePosixPath(file.relative_to(folder).as_posix().lower())
            if not name.startswith(".") and path.match(pattern.lower().removeprefix("**/")):
                yield file


def read_labels(file: Path) -> np.ndarray[Any, Any]:
    """Reads the labels of a PNG file: its grey values or palette indices, exactly as stored.

    Every bit depth is read, interlaced or not. The palette itself is ignored. There is no limit on the size.
    The memory needed beside the result is the size of the file and a few MiB.

    Returns:
        Labels (H, W): uint8, or uint16 if the file stores 16 bits.

    Raises:
        ValueError: ``file`` is not a PNG, stores colours or transparency instead of labels, or is damaged.
            The message begins with its name.
        OSError: ``file`` cannot be read.
        MemoryError: the labels do not fit in memory.
        ImportError: Pillow is not installed.
    """
    if file.exists() and not file.is_file():  # reading a pipe would block
        raise ValueError(f"{file} is not a regular file, expected a PNG image")
    data = file.read_bytes()
    if not data.startswith(_SIGNATURE):
        raise ValueError(f"{file} is not a PNG image, expected PNG, which is lossless")
    try:
        return _decode(memoryview(data)[len(_SIGNATURE) :])
    except _Unsupported as error:
        raise ValueError(f"{file} {error}, expected labels: PNG grey values or palette indices") from None
    except MemoryError as error:
        raise MemoryError(f"{file} does not fit in memory: {error}") from error
    except (struct.error, zlib.error, ValueError) as error:
        reason = "a part is missing" if isinstance(error, struct.error) else error
        raise ValueError(f"{file} is a damaged PNG image: {reason}") from error


class _Unsupported(Exception):
    pass


_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _PALETTE = 0, 3
_OTHER_COLOURS = {2: "RGB colours", 4: "grey values with transparency", 6: "RGBA colours"}

# First column and row, and their steps, of each pass of an interlaced image.
_WHOLE = ((0, 0, 1, 1),)
_ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)

_BAND_PIXELS = 2**20


def _decode(data: memoryview) -> np.ndarray[Any, Any]:
    header, compressed = _chunks(data)
    width, height, depth, colour, *methods, interlaced = struct.unpack(">IIBBBBB", header)
    if colour in _OTHER_COLOURS:
        raise _Unsupported(f"stores {_OTHER_COLOURS[colour]}")
    depths = {_GREY: (1, 2, 4, 8, 16), _PALETTE: (1, 2, 4, 8)}
    if depth not in depths.get(colour, ()) or not width or not height or any(methods) or interlaced > 1:
        raise ValueError("its header is not valid")

    labels = np.empty((height, width), np.uint16 if depth == 16 else np.uint8)
    inflated = _Inflated(compressed)
    for x, y, dx, dy in _ADAM7 if interlaced else _WHOLE:
        part = labels[y::dy, x::dx]
        rows, columns = part.shape
        row_bytes = (columns * depth + 7) // 8
        above = bytes(row_bytes)
        band_rows = _BAND_PIXELS // max(columns, 1) + 1
        for top in range(0, rows if columns else 0, band_rows):
            band = part[top : top + band_rows]
            filtered = inflated.read(len(band) * (1 + row_bytes))
            stored = _unfilter(above, filtered, row_bytes, depth)
            above = stored[-1].tobytes()
            band[:] = _unpack(stored, depth)[:, :columns]
    return labels


def _chunks(data: memoryview) -> tuple[memoryview, list[memoryview]]:
    """The header, and the parts of the compressed image."""
    chunks = []
    kind = b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data)
        (checksum,) = struct.unpack_from(">I", data, 8 + length)
        if checksum != zlib.crc32(data[4 : 8 + length]):
            raise ValueError(f"the checksum of its chunk {kind!r} is wrong")
        chunks.append((kind, data[8 : 8 + length]))
        data = data[12 + length :]
    if chunks[0][0] != b"IHDR":
        raise ValueError("it has no header")
    return chunks[0][1], [chunk for kind, chunk in chunks if kind == b"IDAT"]


class _Inflated:
    """Decompresses the bytes on demand."""

    def __init__(self, compressed: list[memoryview]) -> None:
        inflate = zlib.decompressobj().decompress
        # deflate turns a byte into at most 1032 bytes: 4 KiB become about 4 MiB
        self._parts = (inflate(part[i : i + 4096]) for part in compressed for i in range(0, len(part), 4096))
        self._buffer = bytearray()

    def read(self, size: int) -> bytes:
        while len(self._buffer) < size:
            part = next(self._parts, None)
            if part is None:
                raise ValueError("its data end early")
            self._buffer += part
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken


def _unfilter(above: bytes, filtered: bytes, row_bytes: int, depth: int) -> np.ndarray[Any, Any]:
    """The rows (rows, row_bytes) without PNG's filters, which predict bytes from the row above."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading label images needs Pillow: pip install Pillow") from error

    # Pillow's PNG reader fills missing rows with 0, scales depths below 8 and rejects large images. Its
    # decoder of the filters does none of this if each pixel is a byte, or two bytes at 16 bits.
    mode, pixel_bytes = ("LA", 2) if depth == 16 else ("L", 1)
    rows = b"\0" + above + filtered  # filter 0: `above` is not filtered
    size = row_bytes // pixel_bytes, len(rows) // (1 + row_bytes)
    image = Image.frombytes(mode, size, zlib.compress(rows, 0), "zip", mode, 0)
    return np.asarray(image).reshape(-1, row_bytes)[1:]


def _unpack(stored: np.ndarray[Any, Any], depth: int) -> np.ndarray[Any, Any]:
    """The numbers of ``depth`` bits in rows of bytes, the highest bits first."""
    if depth == 16:
        return stored.view(">u2")
    shifts = np.arange(8 - depth, -1, -depth, dtype=np.uint8)
    numbers: np.ndarray[Any, Any] = stored[:, :, np.newaxis] >> shifts & 2**depth - 1
    return numbers.reshape(len(stored), -1)
