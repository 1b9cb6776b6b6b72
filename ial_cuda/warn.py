"""Warnings that point to the line that called this package."""

from __future__ import annotations

import sys
import warnings


def warn(message: str) -> None:
    """Warns at the line that called this package, directly or through torch's modules."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", __package__):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
