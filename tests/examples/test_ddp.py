"""The example of several processes trains with DDP and with FSDP2, on the CPU."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "examples" / "ddp.py"


def start(*arguments: str) -> subprocess.Popen[str]:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [sys.executable, "-m", *torchrun, FILE, *arguments],
        env=os.environ | {"PYTHONPATH": str(FILE.parents[1]), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses_of(process: subprocess.Popen[str]) -> list[float]:
    printed, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return [float(loss) for loss in re.findall(r"^step \d: loss (.+)$", printed, re.M)]


def test_ddp_and_fsdp():
    ddp, fsdp = map(losses_of, [start(), start("--fsdp")])
    assert len(ddp) == 10 and all(map(math.isfinite, ddp))
    assert ddp[-1] < 0.8 * ddp[0]
    # Both add the same float32 gradients of two processes. The last of four printed digits may differ.
    assert fsdp == pytest.approx(ddp, abs=2e-4)
