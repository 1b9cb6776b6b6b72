"""Benchmarks of the loss on this machine. By default the most important cases, in three minutes."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

#: The options of each program.
QUICK = {
    "loss": ("--quick", "--rounds", "20", "--seconds", "8"),
    "upsample": ("--quick", "--rounds", "10", "--seconds", "5", "--no-compile"),
    "pixel_losses": ("--quick", "--rounds", "10", "--seconds", "5", "--no-compile"),
    "sweep": ("--quick", "--rounds", "10", "--seconds", "2", "--no-compile"),
}
FULL = {
    "loss": ("--rounds", "20"),
    "upsample": ("--rounds", "10", "--seconds", "10"),
    "pixel_losses": ("--rounds", "10", "--seconds", "10"),
    "step": ("--rounds", "10"),
    "sweep": ("--largest", "4096"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="Other options are passed to every program; see python -m benchmarks.loss --help.",
    )
    parser.add_argument("--full", action="store_true", help="all cases of all programs; half an hour")
    arguments, others = parser.parse_known_args(argv)
    failed = False
    for name, options in (FULL if arguments.full else QUICK).items():
        command = [sys.executable, "-m", f"{__package__}.{name}", *options, *others]
        failed |= subprocess.run(command, check=False).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
