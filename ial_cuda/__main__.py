"""The command line: ``python -m ial_cuda weights`` counts class weights, ``info`` lists the backends."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from . import __version__
from .hierarchy import CAMVID, CITYSCAPES
from .weights import LabelError, LabelFolder, median_frequency_weights

HIERARCHIES = {"camvid": CAMVID, "cityscapes": CITYSCAPES}
WRITERS: dict[str, Callable[[Any, Any], Any]] = {
    ".json": lambda file, weights: file.write(json.dumps(weights.tolist()).encode()),
    ".npy": lambda file, weights: np.save(file, weights.numpy()),
    ".pt": lambda file, weights: torch.save(weights, file),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line on ``argv``; bad input leaves one line on stderr and exits with status 2."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        arguments.command(arguments)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m ial_cuda", description="Class weights, and what this build can do.")
    parser.add_argument("--version", action="version", version=f"ial_cuda {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="the build, the backends, and why one is missing")
    info.set_defaults(command=_info)

    weights = commands.add_parser("weights", help="median frequency weights of a folder of label images")
    weights.set_defaults(command=_weights)
    weights.add_argument("folder", metavar="FOLDER", help="label images *.png, 8-bit grey or palette")
    classes = weights.add_mutually_exclusive_group(required=True)
    classes.add_argument("--num-classes", type=int, metavar="C", help="number of classes")
    classes.add_argument("--hierarchy", choices=HIERARCHIES, help="preset with number and names of classes")
    weights.add_argument(
        "--ignore-index", type=int, default=255, metavar="I", help="label of void (default 255)"
    )
    weights.add_argument(
        "--count-void",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether the pixels of an image include its void pixels",
    )
    weights.add_argument("--output", type=_output, metavar="FILE", help="save to a .json, .npy or .pt file")
    return parser


def _output(text: str) -> Path:
    file = Path(text)
    if file.suffix not in WRITERS:
        raise argparse.ArgumentTypeError(f"{text!r} ends in {file.suffix!r}, expected {', '.join(WRITERS)}")
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is in no existing folder, expected a file in one")
    return file


def _info(arguments: argparse.Namespace) -> None:
    from ._ops import describe

    print(describe())


def _weights(arguments: argparse.Namespace) -> None:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("the progress bar needs tqdm: pip install 'ial_cuda[cli]'") from error

    hierarchy = HIERARCHIES.get(arguments.hierarchy)
    label_maps = LabelFolder(arguments.folder)
    with (
        warnings.catch_warnings(record=True) as caught,
        tqdm(label_maps, unit="image", leave=False, disable=None) as progress,
    ):
        warnings.simplefilter("always")
        try:
            weights = median_frequency_weights(
                progress,
                hierarchy.num_classes if hierarchy else arguments.num_classes,
                ignore_index=arguments.ignore_index,
                count_void=arguments.count_void,
            )
        except LabelError as error:
            raise ValueError(f"{label_maps.files[error.map_index]}: {error}") from error
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)

    names = hierarchy.names if hierarchy else None
    width = max(map(len, names)) if names else 0
    for c, weight in enumerate(weights.tolist()):
        name = f"{names[c]:<{width}}  " if names else ""
        print(f"{c:>5}  {name}{weight:>10.4f}")

    if arguments.output:
        with arguments.output.open("wb") as file:
            WRITERS[arguments.output.suffix](file, weights)
        print(f"saved to {arguments.output}")
    else:
        # str() of a float32 is the shortest decimal that reads back as the same float32
        print(f"weight = torch.tensor([{', '.join(map(str, weights.numpy()))}])")


if __name__ == "__main__":
    main()
