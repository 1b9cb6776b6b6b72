"""What memory alone would take: a copy of the logits, and a read; and how near to that a step comes."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from .common import Step
from .compare import Timing
from .inputs import Inputs
from .report import COPY, SUM, Row


class Part(NamedTuple):
    """A piece of a step, and the bytes that it has to move."""

    step: Step
    moved: int = 0


def copy_parts(inputs: Inputs) -> dict[str, Part]:
    """What the floor is made of: the logits copied to memory that is there already, and read once more."""
    warm = torch.empty_like(inputs.written)
    size = inputs.written.nbytes
    return {
        COPY: Part(lambda logits: warm.copy_(logits.detach()), 2 * size),
        SUM: Part(lambda logits: logits.detach().sum(), size),
    }


def floor(inputs: Inputs) -> Part:
    """Both of them: what reduce and gradient must move of the logits."""
    parts = copy_parts(inputs).values()
    return Part(lambda logits: [part.step(logits) for part in parts], sum(part.moved for part in parts))


def step_bytes(inputs: Inputs, labels: torch.dtype) -> int:
    """2 reads and 1 write of the logits, 2 reads of the labels."""
    return 3 * inputs.written.nbytes + 2 * inputs.targets[labels].nbytes


def with_speed(timing: Timing, row: Row, moved: int, inputs: Inputs, **more: float | None) -> Row:
    """The row with its times and, of the bytes that it has to move, the speed, beside that of the copy."""
    row = timing.fill(row, **more)
    copy_ms = timing.times[COPY].median_ms
    speed, copy_speed = moved / 1e6 / row.median_ms, 2 * inputs.written.nbytes / 1e6 / copy_ms
    return replace(
        row,
        gb_per_s=round(speed, 2) if moved else None,
        copy_percent=round(100 * speed / copy_speed, 1) if moved else None,
        copy_ratio=round(row.median_ms / copy_ms, 3),
    )
