"""Losses of images and pixels that are split over processes. `distributed_cases.py` runs in each process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cases import GPU_KERNELS

TESTS = Path(__file__).parent


def run(processes: int, *cases: str) -> str:
    """Runs ``CASE.BACKEND``, ... in some processes. Starting one takes seconds."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *command, str(TESTS / "distributed_cases.py"), *cases],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0 or cases[-1].startswith("killed"), output
    return output


@pytest.mark.backends("cpu", "reference")
def test_one_to_four_processes_equal_one():
    """Uneven parts, ranks with only void or nothing; every reduction and scope; a mesh of 2x2; DTensors."""
    cases = ("split", "arguments", "groups", "derivatives", "dtensors", "dtensor_arguments")
    run(4, "split.reference", *(f"{case}.cpu" for case in cases))


@pytest.mark.backends("cpu")
def test_training_compilation_and_errors():
    """DDP and FSDP2; torch.compile; collectives and their bytes; different options, a killed rank."""
    output = run(2, "training.cpu", "compiled.cpu", "wire.cpu", "mismatches.cpu", "killed.cpu")
    assert "rank 0 got the error" in output, output


@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_on_a_gpu(backend):
    """Four processes that share a GPU, by gloo, and one by NCCL."""
    run(4, f"split.{backend}")
    run(1, f"nccl.{backend}")
