"""Class weights of label maps that are sharded over processes."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import DeviceMesh

from ial_cuda.class_weights import LabelError, median_frequency_weights

RANKS = range(3)
# A rank that waits for another one fails after this time.
TIMEOUT = timedelta(minutes=5)


class DiskError(Exception):
    """An error of a data set, of a type that the package does not know."""


class Outcome(NamedTuple):
    """What a rank got. Floats compare as exactly as the float32 weights that they were."""

    weights: list[float] | None = None
    warnings: tuple[tuple[str, str], ...] = ()  # with the file that they name
    error: tuple[type[Exception], str] | None = None


class Case(NamedTuple):
    """Label maps, arguments and expected outcome of each rank, and the name of their group."""

    shards: list[Iterable[np.ndarray]]
    arguments: list[dict]
    expected: list[Outcome]
    group: str = "world"


def outcome(label_maps: Iterable[np.ndarray], **arguments: object) -> Outcome:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            weights = median_frequency_weights(label_maps, **arguments)
        except (TypeError, ValueError, DiskError) as error:  # a timeout is none of these, and fails the test
            return Outcome(error=(type(error), str(error)))
    return Outcome(weights.tolist(), tuple((str(warning.message), warning.filename) for warning in caught))


def make_maps(count: int) -> list[np.ndarray]:
    """Images of the classes 0 to 4 and void. The sizes differ, and most images lack a class."""
    rng = np.random.default_rng(0)
    return [
        rng.choice([*range(rng.integers(1, 6)), 255], size=rng.integers(3, 40, 2)).astype(np.uint8)
        for _ in range(count)
    ]


def broken_data_set(label_map: np.ndarray) -> Iterator[np.ndarray]:
    yield label_map
    raise DiskError("no space left")


def as_one_process(shards: list[list[np.ndarray]], group: str = "world", **arguments: object) -> Case:
    label_maps = [label_map for shard in shards for label_map in shard]
    expected = outcome(label_maps, **arguments)
    return Case(shards, [arguments for _ in RANKS], [expected for _ in RANKS], group)


def error(kind: type[Exception], message: str) -> Outcome:
    return Outcome(error=(kind, message))


def another_failed(rank: int, kind: type[Exception], message: str) -> Outcome:
    return error(ValueError, f"process_group: rank {rank} of the group failed: {kind.__name__}: {message}")


def make_cases() -> dict[str, Case]:
    maps = make_maps(23)
    # Two classes are in the last shard alone.
    uneven = [maps[:17], [], [*maps[17:], np.array([[5, 6, 255]])]]
    batches = [[np.stack([label_map[:3, :3] for label_map in shard])] for shard in (maps[:4], maps[4:])]
    seven = dict(hierarchy=7)

    bad = [maps[0], np.array([[0, 1, 77]])]
    bad_label = (
        LabelError,
        "label_maps[1] has label 77 at (0, 2), the first of 1 bad pixels, "
        "expected labels 0 to 6 or ignore_index=255",
    )
    bad_dtype = TypeError, "label_maps[0] has dtype float32, expected an integer dtype"
    bad_argument = TypeError, "count_void is 'no' (str), expected a bool"
    disk = DiskError, "no space left"

    def one_fails(
        rank: int, shard: Iterable[np.ndarray], what: tuple[type[Exception], str], **arguments
    ) -> Case:
        return Case(
            [shard if r == rank else maps for r in RANKS],
            [seven | arguments if r == rank else seven for r in RANKS],
            [error(*what) if r == rank else another_failed(rank, *what) for r in RANKS],
        )

    def rank_1_differs(difference: str, **arguments: object) -> Case:
        message = f"process_group: {difference}, expected the same on all ranks"
        return Case(uneven, [seven, seven | arguments, seven], [error(ValueError, message) for _ in RANKS])

    return {
        # Errors come first. The cases after them show that the group still works.
        "bad label": one_fails(1, bad, bad_label),
        "bad dtype": one_fails(2, [maps[0].astype(np.float32)], bad_dtype),
        "bad argument": one_fails(2, maps, bad_argument, count_void="no"),
        "iterator raises": one_fails(0, broken_data_set(maps[0]), disk),
        "two fail": Case(
            [maps, broken_data_set(maps[0]), bad],
            [seven for _ in RANKS],
            [another_failed(1, *disk), error(*disk), error(*bad_label)],
        ),
        "number of classes": rank_1_differs(
            "the number of classes is 8 on rank 1 of the group and 7 on rank 0", hierarchy=8
        ),
        "ignore_index": rank_1_differs(
            "ignore_index is -100 on rank 1 of the group and 255 on rank 0", ignore_index=-100
        ),
        "count_void": rank_1_differs(
            "count_void is False on rank 1 of the group and True on rank 0", count_void=False
        ),
        "ranks 1 and 2": Case(
            [maps, maps, bad],
            [seven for _ in RANKS],
            [
                error(
                    ValueError,
                    "process_group is a group without this process, expected one of its own groups",
                ),
                another_failed(1, *bad_label),
                error(*bad_label),
            ],
            "ranks 1 and 2",
        ),
        "no pixel": as_one_process([[np.full((2, 2), 255)], [], [np.full((3, 1), 255)] * 2], **seven),
        "uneven": as_one_process(uneven, **seven),
        "batched": as_one_process([batches[0], [], batches[1]], hierarchy=5, batched=True),
        "void left out": as_one_process(uneven, **seven, count_void=False),
        "class as void": as_one_process(uneven, hierarchy=256, ignore_index=1),
        "mesh": as_one_process(uneven, "mesh", **seven),
        "one process": Case(
            uneven, [seven for _ in RANKS], [outcome(shard, **seven) for shard in uneven], "one process"
        ),
    }


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=len(RANKS), timeout=TIMEOUT
    )
    world = dist.group.WORLD
    own = [dist.new_group([r], timeout=TIMEOUT) for r in RANKS][rank]
    groups = {
        "world": world,
        "one process": own,
        "ranks 1 and 2": dist.new_group([1, 2], timeout=TIMEOUT),
        "mesh": DeviceMesh.from_group(world, "cpu"),
    }
    outcomes = {
        name: outcome(case.shards[rank], **case.arguments[rank], process_group=groups[case.group])
        for name, case in make_cases().items()
    }
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(outcomes))
    dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo")
def test_all_ranks_get_the_weights_of_one_process_or_raise(tmp_path):
    torch.multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=len(RANKS))
    of_ranks = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in RANKS]
    for name, case in make_cases().items():
        assert [outcomes[name] for outcomes in of_ranks] == case.expected, name
