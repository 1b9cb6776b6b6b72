"""Runs commands of examples.paper in the processes of torchrun, whose start takes the most time.

Each argument is the JSON list of a command's arguments. Each process writes the network that it evaluated
beside the predictions, as RANK.pt.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from examples.paper import __main__ as paper
from examples.paper import training
from examples.paper.processes import Processes
from examples.paper.scores import Scores, evaluate


def evaluate_and_keep(network: torch.nn.Module, *arguments: Any, keep: Path, **options: Any) -> Scores:
    found = evaluate(network, *arguments, keep=keep, **options)
    torch.save(network.state_dict(), keep / f"{processes.rank}.pt")
    return found


with Processes(True, "cpu") as processes:
    # torchrun's processes cannot form a default group again: all commands share one.
    paper.Processes = lambda distributed, device: nullcontext(processes)
    training.evaluate = evaluate_and_keep
    failed = [paper.main(json.loads(command)) for command in sys.argv[1:]]
sys.exit(any(failed))
