"""The command line: ``python -m ial_cuda weights`` computes class weights, ``info`` lists the backends."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import secrets
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from . import __version__
from .class_weights import LabelError, median_frequency_weights
from .hierarchy import PRESETS, Hierarchy, resolve_ignore_index
from .label_images import CITYSCAPES_IDS, LabelFolder


def _with_file(write: Callable[[io.BytesIO, torch.Tensor], None]) -> Callable[[torch.Tensor], bytes]:
    def to_bytes(weights: torch.Tensor) -> bytes:
        file = io.BytesIO()
        write(file, weights)
        return file.getvalue()

    return to_bytes


# Serialised to bytes first: torch.save and np.save raise other errors when a file cannot be written.
TO_BYTES = {
    ".json": lambda weights: json.dumps(weights.tolist()).encode(),
    ".npy": _with_file(lambda file, weights: np.save(file, weights.numpy())),
    ".pt": _with_file(lambda file, weights: torch.save(weights, file)),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Bad input prints one line to stderr and exits with status 2. An interrupt prints one line and exits with
    status 130.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        arguments.command(arguments)
        _flush()
    except KeyboardInterrupt:
        parser.exit(128 + signal.SIGINT, "interrupted\n")
    except (ImportError, MemoryError, OSError, ValueError) as error:
        parser.error(str(error) or "out of memory")


def _flush() -> None:
    try:
        print(end="", flush=True)
    except OSError:
        # Python would flush again at exit and print a second message.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m ial_cuda", description="Computes class weights, and shows the build.")
    parser.add_argument("--version", action="version", version=f"ial_cuda {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="show the build, the backends, and why one is missing")
    info.set_defaults(command=_info)

    weights = commands.add_parser(
        "weights",
        help="compute median frequency weights from a folder of label images",
        description="Computes median frequency weights from a folder of label images. A label image is a PNG "
        "file of any bit depth that stores the class of each pixel as a grey value or a palette index. For "
        "Cityscapes as downloaded: weights gtFine/train --hierarchy cityscapes --cityscapes-ids",
    )
    weights.set_defaults(command=_weights)
    weights.add_argument(
        "folder", metavar="FOLDER", help="folder of label images; its sub-folders are included"
    )
    classes = weights.add_mutually_exclusive_group(required=True)
    classes.add_argument("--num-classes", type=int, metavar="C", help="number of classes")
    classes.add_argument(
        "--hierarchy", choices=PRESETS, help="data set, which defines classes, names and void label"
    )
    weights.add_argument(
        "--pattern",
        metavar="GLOB",
        help="pattern of the label images' paths, such as '*_labelTrainIds.png' (default '*.png'). Case is "
        "ignored, and hidden files are skipped",
    )
    weights.add_argument(
        "--cityscapes-ids",
        action="store_true",
        help="the files store Cityscapes label ids (7 is road): convert them to train ids. The default of "
        "--pattern becomes '*_labelIds.png'",
    )
    weights.add_argument(
        "--ignore-index",
        type=int,
        metavar="I",
        help="label of void pixels (default: that of --hierarchy; 255 with --num-classes)",
    )
    weights.add_argument(
        "--count-void",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="include void pixels in the pixel count of an image (default: yes)",
    )
    weights.add_argument(
        "--output", type=_output, metavar="FILE", help="save the weights to a .json, .npy or .pt file"
    )
    return parser


def _output(text: str) -> Path:
    file = Path(text)
    if file.suffix not in TO_BYTES:
        raise argparse.ArgumentTypeError(f"{text!r} ends in {file.suffix!r}, expected {', '.join(TO_BYTES)}")
    target = Path(os.path.realpath(file))
    if not target.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"{text!r} is in a folder that does not exist, expected one that exists"
        )
    if target.exists() and not target.is_file():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a regular file, expected a regular file or a new name"
        )
    for path in (target, target.parent):
        if path.exists() and not os.access(path, os.W_OK):
            raise argparse.ArgumentTypeError(
                f"{text!r} cannot be written, expected write permission for {str(path)!r}"
            )
    return file


def _info(arguments: argparse.Namespace) -> None:
    from .backends import describe

    print(describe())


def _weights(arguments: argparse.Namespace) -> None:
    if arguments.hierarchy:
        hierarchy = PRESETS[arguments.hierarchy]
    else:
        hierarchy = Hierarchy.of(arguments.num_classes, "--num-classes")
    ignore_index = resolve_ignore_index(
        arguments.ignore_index, hierarchy.num_classes, hierarchy.ignore_index, "--ignore-index"
    )
    ids = arguments.cityscapes_ids
    label_maps = LabelFolder(
        arguments.folder,
        arguments.pattern or ("*_labelIds.png" if ids else "*.png"),
        CITYSCAPES_IDS if ids else None,
    )
    with warnings.catch_warnings(record=True) as caught, _progress(label_maps) as progress:
        warnings.simplefilter("always")
        try:
            weights = median_frequency_weights(
                progress, hierarchy, ignore_index=ignore_index, count_void=arguments.count_void
            )
        except LabelError as error:
            what = str(error).removeprefix(f"label_maps[{error.map_index}]")
            raise ValueError(f"{label_maps.files[error.map_index]}{what}") from error
    if arguments.output:
        _save(arguments.output, TO_BYTES[arguments.output.suffix](weights))
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)

    print(f"{len(label_maps)} images")
    names = hierarchy.names
    width = max(map(len, names)) if names else 0
    for c, weight in enumerate(weights.tolist()):
        name = f"{names[c]:<{width}}  " if names else ""
        print(f"{c:>5}  {name}{weight:>10.4f}")
    if arguments.output:
        print(f"saved to {arguments.output}")
    else:
        # str() of a float32 is the shortest decimal that parses back to the same float32
        print(f"weight = torch.tensor([{', '.join(map(str, weights.numpy()))}])")


def _progress(label_maps: LabelFolder) -> contextlib.AbstractContextManager[Any]:
    """``label_maps``, with a progress bar if tqdm is installed and stderr is a terminal."""
    if sys.stderr is None:  # closed
        return contextlib.nullcontext(label_maps)
    try:
        from tqdm import tqdm
    except ImportError:
        return contextlib.nullcontext(label_maps)
    bar: contextlib.AbstractContextManager[Any] = tqdm(label_maps, unit="image", leave=False, disable=None)
    return bar


def _save(file: Path, data: bytes) -> None:
    """Replaces the file in one step: a kill or a full disk leaves the old file or the new one, complete."""
    target = Path(os.path.realpath(file))  # a symbolic link is kept
    new = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with new.open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        if target.exists():
            shutil.copymode(target, new)
        os.replace(new, target)
    except OSError as error:
        raise OSError(f"{str(file)!r} cannot be saved: {error.strerror}") from error
    finally:
        new.unlink(missing_ok=True)


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # exits silently in `| head`, like other tools
    main()
