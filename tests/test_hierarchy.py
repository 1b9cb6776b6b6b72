"""Hierarchy: what it accepts, what it derives, what it refuses, and the two presets against the paper."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ial_cuda.hierarchy import CAMVID, CITYSCAPES, Hierarchy


def grouped_names(hierarchy: Hierarchy) -> list[set[str]]:
    return [{hierarchy.names[c] for c in level} for level in hierarchy.levels]


def test_camvid_is_figure_1():
    assert CAMVID.names[:4] == ("Sky", "Building", "Column/Pole", "Road")
    assert CAMVID.names[4:8] == ("Sidewalk", "Tree", "Sign/Symbol", "Fence")
    assert CAMVID.names[8:] == ("Car", "Pedestrian", "Bicyclist")
    assert grouped_names(CAMVID) == [
        {"Sky"},
        {"Building", "Column/Pole", "Tree", "Fence"},
        {"Road", "Sidewalk", "Sign/Symbol"},
        {"Car", "Pedestrian", "Bicyclist"},
    ]
    assert CAMVID.class_levels == (0, 1, 1, 2, 2, 1, 2, 1, 3, 3, 3)


def test_cityscapes_is_the_text_of_section_5():
    train_ids = dict(road=0, sidewalk=1, building=2, wall=3, fence=4, pole=5, vegetation=8, terrain=9, sky=10)
    train_ids |= dict(person=11, rider=12, car=13, truck=14, bus=15, train=16, motorcycle=17, bicycle=18)
    train_ids |= {"traffic light": 6, "traffic sign": 7}
    assert {name: c for c, name in enumerate(CITYSCAPES.names)} == train_ids
    text = """
        Sky
        Building, Wall, Fence, Vegetation, Terrain
        Road, Sidewalk, Train
        Person, Rider, Car, Truck, Bus, Motorcycle, Bicycle, Traffic light, Traffic sign, Pole
    """
    groups = [set(line.strip().lower().split(", ")) for line in text.strip().splitlines()]
    assert grouped_names(CITYSCAPES) == groups


@pytest.mark.parametrize(
    "levels",
    [
        [[1, 0], [2, 3]],
        ([0, 1], (3, 2)),
        ({0, 1}, range(2, 4)),
        np.array([[0, 1], [2, 3]], dtype=np.uint8),
        torch.tensor([[0, 1], [2, 3]]),
        (iter(level) for level in [[0, 1], [2, 3]]),
    ],
    ids=["lists", "mixed", "set and range", "numpy", "torch", "iterators"],
)
def test_any_nested_sequence_is_normalised(levels):
    hierarchy = Hierarchy(levels, names=list("abcd"))
    assert hierarchy.levels == ((0, 1), (2, 3))
    assert all(type(c) is int for level in hierarchy.levels for c in level)
    assert hierarchy.names == ("a", "b", "c", "d")
    assert hierarchy == Hierarchy(((0, 1), (2, 3)), ["a", "b", "c", "d"])
    assert hash(hierarchy) == hash(Hierarchy(((0, 1), (2, 3)), ("a", "b", "c", "d")))


def test_hierarchies_differ_by_order_of_levels_and_by_names():
    assert Hierarchy([[0], [1]]) != Hierarchy([[1], [0]])
    assert Hierarchy([[0], [1]]) != Hierarchy([[0], [1]], names=["a", "b"])


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_class_levels_inverts_levels(drawn):
    used = sorted(set(drawn))
    expected = tuple(used.index(k) for k in drawn)
    hierarchy = Hierarchy([[c for c, k in enumerate(drawn) if k == level] for level in used])
    assert hierarchy.class_levels == expected
    assert hierarchy.num_classes == len(drawn)
    assert hierarchy.num_levels == len(used)


@pytest.mark.parametrize("num_classes", [1, 2, np.int64(19)])
def test_flat_has_one_level_with_every_class(num_classes):
    hierarchy = Hierarchy.flat(num_classes)
    assert hierarchy.levels == (tuple(range(num_classes)),)
    assert hierarchy.num_levels == 1
    assert hierarchy.num_classes == num_classes
    assert hierarchy.class_levels == (0,) * num_classes


def test_frozen_and_class_levels_computed_once():
    assert CAMVID.class_levels is CAMVID.class_levels
    with pytest.raises(dataclasses.FrozenInstanceError):
        CAMVID.levels = ()


def test_survives_pickle_deepcopy_repr_and_replace():
    assert pickle.loads(pickle.dumps(CAMVID)) == CAMVID
    assert copy.deepcopy(CAMVID).class_levels == CAMVID.class_levels
    assert eval(repr(CITYSCAPES)) == CITYSCAPES
    swapped = dataclasses.replace(Hierarchy([[0], [1, 2]]), levels=[[1, 2], [0]])
    assert swapped.class_levels == (1, 0, 0)


def test_str_shows_levels_classes_and_names():
    assert str(Hierarchy([[1], [2, 0]], names=["person", "sky", "car"])) == (
        "Hierarchy: 3 classes, 2 levels, least important first\n  level 0: 1 sky\n  level 1: 0 person, 2 car"
    )
    assert str(Hierarchy.flat(2)).endswith("\n  level 0: 0, 1")


ERRORS = [
    (dict(levels=3), TypeError, "levels is 3 (int), expected a sequence of levels"),
    (dict(levels="01"), TypeError, "levels is '01' (str), expected a sequence of levels"),
    (dict(levels=[]), ValueError, "levels is empty, expected at least one level"),
    (dict(levels=[0, 1]), TypeError, "levels[0] is 0 (int), expected a sequence of class indices"),
    (dict(levels=[[0], "1"]), TypeError, "levels[1] is '1' (str), expected a sequence of class indices"),
    (dict(levels=[[0], []]), ValueError, "levels[1] is empty, expected at least one class in every level"),
    (dict(levels=[[0], [2, 1.0]]), TypeError, "levels[1][1] is 1.0 (float), expected an integer"),
    (dict(levels=[[False], [True]]), TypeError, "levels[0][0] is False (bool), expected an integer"),
    (dict(levels=[[0], [None]]), TypeError, "levels[1][0] is None (NoneType), expected an integer"),
    (dict(levels=[[[0]]]), TypeError, "levels[0][0] is [0] (list), expected an integer"),
    (dict(levels=[[0], [1, -1]]), ValueError, "levels[1] holds class -1, expected class indices from 0"),
    (
        dict(levels=[[0, 1], [2], [1]]),
        ValueError,
        "levels holds class 1 twice, in levels[0] and levels[2], expected every class in exactly one level",
    ),
    (
        dict(levels=[[0, 0]]),
        ValueError,
        "levels holds class 0 twice, in levels[0] and levels[0], expected every class in exactly one level",
    ),
    (
        dict(levels=[[0], [3, 1]]),
        ValueError,
        "levels goes up to class 3 but has no class 2, expected every class in exactly one level",
    ),
    (
        dict(levels=[[1], [2]]),
        ValueError,
        "levels goes up to class 2 but has no class 0, expected every class in exactly one level",
    ),
    (
        dict(levels=[[0], [1]], names=["a"]),
        ValueError,
        "names has length 1, expected 2, one for each class in levels",
    ),
    (dict(levels=[[0], [1]], names="ab"), TypeError, "names is 'ab' (str), expected a sequence of strings"),
    (dict(levels=[[0], [1]], names=7), TypeError, "names is 7 (int), expected a sequence of strings"),
    (dict(levels=[[0], [1]], names=["a", 7]), TypeError, "names[1] is 7 (int), expected a string"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), ERRORS, ids=lambda value: str(value)[:60])
def test_errors_name_argument_value_and_expectation(arguments, kind, message):
    with pytest.raises(kind) as caught:
        Hierarchy(**arguments)
    assert str(caught.value) == message


def test_numpy_bool_is_no_class():
    with pytest.raises(TypeError, match=r"levels\[0\]\[0\] is .*, expected an integer"):
        Hierarchy([[np.False_]])


@pytest.mark.parametrize(
    ("num_classes", "kind", "message"),
    [
        (0, ValueError, "num_classes is 0, expected at least 1"),
        (-1, ValueError, "num_classes is -1, expected at least 1"),
        (2.0, TypeError, "num_classes is 2.0 (float), expected an integer"),
        (True, TypeError, "num_classes is True (bool), expected an integer"),
    ],
)
def test_flat_errors(num_classes, kind, message):
    with pytest.raises(kind) as caught:
        Hierarchy.flat(num_classes)
    assert str(caught.value) == message
