"""A small PNG writer that shares no code with the reader: every bit depth and filter, and interlacing."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6

#: First row and column, and their steps, of the seven passes of Adam7.
ADAM7 = [
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    labels: np.ndarray,
    depth: int = 8,
    colour: int = GREY,
    *,
    interlaced: bool = False,
    filters: tuple[int, ...] = (0,),
    before: bytes = b"",
    part: int = 2**20,
) -> bytes:
    """The bytes of a PNG.

    Args:
        labels: (H, W), or (H, W, samples) of a colour with several.
        depth: bits of a sample.
        colour: PNG's number of the colour type.
        filters: the filters of the rows, repeated.
        before: chunks between the header and the data.
        part: the bytes of one IDAT chunk.
    """
    height, width = labels.shape[:2]
    parts = [labels[y::dy, x::dx] for y, x, dy, dx in ADAM7] if interlaced else [labels]
    rows = b"".join(filtered(packed(image, depth), filters, depth) for image in parts if image.size)
    data = zlib.compress(rows)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    idat = b"".join(chunk(b"IDAT", data[i : i + part]) for i in range(0, len(data), part))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + idat + chunk(b"IEND", b"")


def save(file: Path, *arguments, **options) -> Path:
    file.write_bytes(png(*arguments, **options))
    return file


def packed(image: np.ndarray, depth: int) -> list[bytes]:
    """The rows as bits, each padded to whole bytes."""
    rows = []
    for row in image.reshape(len(image), -1):
        bits = "".join(f"{value:0{depth}b}" for value in row.tolist())
        bits += "0" * (-len(bits) % 8)
        rows.append(int(bits, 2).to_bytes(len(bits) // 8, "big"))
    return rows


def filtered(rows: list[bytes], filters: tuple[int, ...], depth: int) -> bytes:
    """Section 9 of the PNG specification: a byte minus the prediction from its left and upper neighbours."""
    step = max(depth // 8, 1)
    out = bytearray()
    above = bytes(len(rows[0]))
    for y, row in enumerate(rows):
        kind = filters[y % len(filters)]
        out.append(kind)
        for x, byte in enumerate(row):
            a, c = (row[x - step], above[x - step]) if x >= step else (0, 0)
            b = above[x]
            nearest = min((a, b, c), key=lambda value, p=a + b - c: abs(p - value))  # the first on a tie
            out.append((byte - (0, a, b, (a + b) // 2, nearest)[kind]) % 256)
        above = row
    return bytes(out)
