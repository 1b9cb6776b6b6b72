"""The paper's experiment: trains ENet, SegNet and FCN-8s on CamVid or Cityscapes with cross-entropy or IAL,
reports what came of it, and measures the share of the loss in a training step. See examples/paper/README.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.command import at_least_2
from benchmarks.common import describe_machine, write_json

from .data import SOURCES
from .networks import NETWORKS
from .processes import Processes
from .profiling import profile
from .recipe import Recipe
from .report import HIERARCHIES, report
from .training import train

TABLE_WIDTH = 150  # rather too wide for the terminal than cut
FULL_SIZE = {"camvid": (360, 480), "cityscapes": (1024, 2048)}  # of the profiled images


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.paper", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("run", help="one training; goes on from OUTPUT's checkpoint if it has one")
    command.set_defaults(main=run)
    command.add_argument("--loss", choices=("cross-entropy", "ial"), default="ial")
    add_recipe(command)
    add_root(command)
    command.add_argument("--output", type=Path, required=True, help="folder of checkpoint, log, predictions")
    command.add_argument("--split", default="test", help="what is evaluated: test (default), val")
    command.add_argument("--evaluate-every", type=int, metavar="EPOCHS", help="default: at the end only")
    command.add_argument(
        "--interval", type=int, metavar="STEPS", help="from a checkpoint to the next; default: an epoch"
    )
    command.add_argument("--workers", type=int, default=2, help="processes that read images, default 2")
    command.add_argument("--distributed", action="store_true", help="this is one of torchrun's processes")

    command = commands.add_parser("report", help="tables and pictures of all trainings below a folder")
    command.set_defaults(main=make_report)
    command.add_argument("folder", type=Path)
    add_root(command)

    command = commands.add_parser("profile", help="the share of the loss in a step, and peak memory")
    command.set_defaults(main=make_profile, loss="ial")  # and the others beside it
    add_recipe(command)
    command.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON")
    command.add_argument("--rounds", type=at_least_2, default=10, help="at least 2, default 10")
    return parser


def add_root(parser: argparse.ArgumentParser) -> None:
    root = os.environ.get("IAL_CAMVID")
    parser.add_argument(
        "--root", type=Path, default=root and Path(root), help="the data set's folder; default: IAL_CAMVID"
    )


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Options of training; see `Recipe` for what they mean."""
    parser.add_argument("--network", choices=NETWORKS, default="enet")
    parser.add_argument("--data", choices=SOURCES, default="camvid")
    parser.add_argument("--weights", choices=("median", "none"), default="median", help="of the classes")
    parser.add_argument("--gradient", choices=("exact", "paper"), default="exact", help="of IAL")
    parser.add_argument("--factors", choices=("mean", "sum"), default="mean", help="of IAL, normalized by")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=float, default=1.0, help="multiplies channels")
    parser.add_argument("--scale", type=float, default=1.0, help="by which images are shrunk")
    parser.add_argument("--crop", type=int, nargs=2, metavar=("H", "W"), help="in pixels of shrunk images")
    parser.add_argument("--zoom", type=float, default=1.25, help="at most, default 1.25; 1: none")
    network = "default: the network's"
    parser.add_argument("--batch", type=int, help=network)
    parser.add_argument("--optimizer", choices=("adam", "sgd"), help=network)
    parser.add_argument("--learning-rate", type=float, help=network)
    parser.add_argument("--bf16", action="store_true", help="autocast")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: all cores")


def make_recipe(arguments: argparse.Namespace) -> Recipe:
    network = NETWORKS[arguments.network]
    ial = arguments.loss == "ial"
    return Recipe(
        data=arguments.data,
        network=arguments.network,
        loss=arguments.loss,
        width=arguments.width,
        weights=arguments.weights,
        gradient=arguments.gradient if ial else None,
        factors=arguments.factors if ial else None,
        epochs=arguments.epochs,
        batch=arguments.batch or network.batch,
        optimizer=arguments.optimizer or network.optimizer,
        learning_rate=arguments.learning_rate or network.learning_rate,
        weight_decay=network.weight_decay,
        scale=arguments.scale,
        crop=arguments.crop and tuple(arguments.crop),
        zoom=arguments.zoom,
        seed=arguments.seed,
        bf16=arguments.bf16,
        channels_last=arguments.channels_last,
    )


def run(arguments: argparse.Namespace) -> None:
    if arguments.root is None:
        raise ValueError("there is no --root, nor IAL_CAMVID: expected the data set's folder")
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
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    report(arguments.folder, arguments.root, console)


def make_profile(arguments: argparse.Namespace) -> None:
    recipe = make_recipe(arguments)
    size = recipe.crop or tuple(round(side * recipe.scale) for side in FULL_SIZE[recipe.data])
    void = {"camvid": 11, "cityscapes": 255}[recipe.data]
    processes = Processes(distributed=False, device=arguments.device)
    measured = profile(recipe, size, HIERARCHIES[recipe.data], void, processes, arguments.rounds, Console())
    write_json(arguments.output, {"machine": describe_machine()} | dict(measured))


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
