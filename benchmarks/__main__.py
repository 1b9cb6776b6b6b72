"""All benchmarks of the loss on this machine, one after another: a real-sized input and everyone who computes
its loss, coarse logits, a training step, and how costs go with everything that may change."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

MINUTES = 8.5
#: Each with its options; the sweep gets what time is left.
PROGRAMS = {
    "loss": ("--rounds", "20"),
    "upsample": ("--rounds", "10", "--seconds", "10"),
    "step": ("--rounds", "10"),
    "sweep": (),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    latest = Path(__file__).parent / "results" / "latest"
    parser.add_argument("--output", type=Path, default=latest, metavar="DIR", help=f"default: {latest}")
    parser.add_argument(
        "--minutes",
        type=float,
        default=MINUTES,
        metavar="M",
        help=f"after which no case is begun; default {MINUTES}",
    )
    arguments, others = parser.parse_known_args(argv)
    start, failed = time.monotonic(), False
    for name, options in PROGRAMS.items():
        left = arguments.minutes - (time.monotonic() - start) / 60
        command = [sys.executable, "-m", f"{__package__}.{name}", *options, *others]
        bounds = ["--minutes", f"{left:.2f}", "--output", str(arguments.output)]
        failed |= subprocess.run([*command, *bounds], check=False).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
