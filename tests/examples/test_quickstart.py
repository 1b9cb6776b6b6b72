"""The quickstart trains on synthetic data and on a folder of one's own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")
FILE = Path(__file__).parents[2] / "examples" / "quickstart.py"


def losses(*arguments: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, FILE, *arguments],
        env=os.environ | {"PYTHONPATH": str(FILE.parents[1])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return [float(loss) for loss in re.findall(r"^step +\d+: loss ([\d.]+)$", done.stdout, re.M)]


def test_synthetic_data():
    found = losses()
    assert len(found) == 6 and found[-1] < 0.5 * found[0]


def test_a_folder_of_ones_own(tmp_path):
    random = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for i in range(5):
        labels = random.integers(3, size=(5, 6), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        image = np.stack([80 * labels, 255 - 80 * labels, labels], axis=-1)
        labels[:4] = 255
        Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(labels).save(tmp_path / "labels" / f"{i}.png")
    found = losses(str(tmp_path), "3")
    assert len(found) == 6 and found[-1] < 0.5 * found[0]


def test_it_stays_short():
    assert len(FILE.read_text().splitlines()) <= 40
