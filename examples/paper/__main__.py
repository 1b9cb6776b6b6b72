"""The experiment of the IAL paper. See examples/paper/README.md.

Trains ENet, SegNet and FCN-8s on CamVid or Cityscapes with cross-entropy or IAL, reports the results, and
measures the share of the loss in a training step.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.harness.cli import at_least_2
from benchmarks.harness.machine import describe_machine, write_json
from benchmarks.harness.tables import make_console

from .data import DATA_SETS
from .networks import NETWORKS
from .processes import Processes
from .profiling import profile
from .recipe import Recipe
from .report import report
from .training import train


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.paper", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("run", help="train; resumes from the checkpoint in OUTPUT if there is one")
    command.set_defaults(main=run)
    command.add_argument("--loss", choices=("cross-entropy", "ial"), default="ial")
    add_recipe(command)
    add_root(command)
    command.add_argument(
        "--output", type=Path, required=True, help="folder for the checkpoint, the log and predictions"
    )
    command.add_argument("--split", default="test", help="split for evaluation: test (default) or val")
    command.add_argument("--evaluate-every", type=int, metavar="EPOCHS", help="default: only at the end")
    command.add_argument(
        "--interval", type=int, metavar="STEPS", help="steps between checkpoints; default: an epoch"
    )
    command.add_argument("--workers", type=int, default=2, help="processes that read images, default 2")
    command.add_argument("--distributed", action="store_true", help="join the other processes of torchrun")

    command = commands.add_parser("report", help="tables and pictures of all finished trainings in a folder")
    command.set_defaults(main=make_report)
    command.add_argument("folder", type=Path)
    add_root(command)

    command = commands.add_parser("profile", help="the share of the loss in a training step, and peak memory")
    command.set_defaults(main=make_profile, loss="ial")  # the other losses are measured beside it
    add_recipe(command)
    command.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON file")
    command.add_argument("--rounds", type=at_least_2, default=10, help="at least 2, default 10")
    return parser


def add_root(parser: argparse.ArgumentParser) -> None:
    root = os.environ.get("IAL_CAMVID")
    parser.add_argument(
        "--root", type=Path, default=root and Path(root), help="folder of the data set; default: $IAL_CAMVID"
    )


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Options that are fields of `Recipe`."""
    parser.add_argument("--network", choices=NETWORKS, default="enet")
    parser.add_argument("--data", choices=DATA_SETS, default="camvid")
    parser.add_argument("--weights", choices=("median", "none"), default="median", help="class weights")
    parser.add_argument("--gradient", choices=("exact", "paper"), default="exact", help="of IAL")
    parser.add_argument("--factors", choices=("mean", "sum"), default="mean", help="normalization in IAL")
    parser.add_argument("--epochs", type=int, default=300, help="default 300")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=float, default=1.0, help="factor on the number of channels")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the size of the images")
    parser.add_argument("--crop", type=int, nargs=2, metavar=("H", "W"), help="in pixels of scaled images")
    parser.add_argument("--zoom", type=float, default=1.25, help="maximum, default 1.25; 1: no zoom")
    default = "default: as for the network"
    parser.add_argument("--batch", type=int, help=default)
    parser.add_argument("--optimizer", choices=("adam", "sgd"), help=default)
    parser.add_argument("--learning-rate", type=float, help=default)
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all cores")


def make_recipe(arguments: argparse.Namespace) -> Recipe:
    defaults = NETWORKS[arguments.network]._asdict()
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    values = {field.name: (defaults | given).get(field.name) for field in fields(Recipe)}
    if arguments.loss != "ial":
        values |= {"gradient": None, "factors": None}
    return Recipe(**values | {"crop": arguments.crop and tuple(arguments.crop)})


def run(arguments: argparse.Namespace) -> None:
    if arguments.root is None:
        raise ValueError("neither --root nor IAL_CAMVID is given, expected the folder of the data set")
    with Processes(arguments.distributed, arguments.device) as processes:
        train(
            make_recipe(arguments),
            arguments.root,
            arguments.output,
            processes,
            split=arguments.split,
            workers=arguments.workers,
            interval=arguments.interval,
            evaluate_every=arguments.evaluate_every,
            console=Console(quiet=processes.rank > 0),
        )


def make_report(arguments: argparse.Namespace) -> None:
    report(arguments.folder, arguments.root, make_console())


def make_profile(arguments: argparse.Namespace) -> None:
    recipe = make_recipe(arguments)
    data_set = DATA_SETS[recipe.data]
    size = recipe.crop or [round(side * recipe.scale) for side in data_set.size]
    hierarchy, console = data_set.hierarchy, make_console()
    result = profile(recipe, size, hierarchy, arguments.device, arguments.rounds, console)
    write_json(arguments.output, {"machine": describe_machine()} | result)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    if "threads" in arguments:
        torch.set_num_threads(arguments.threads)
    try:
        arguments.main(arguments)
    except (OSError, ValueError, ArithmeticError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
