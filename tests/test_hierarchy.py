"""Hierarchy: accepted inputs, properties, errors, and the two presets against the paper."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ial_cuda.hierarchy import CAMVID, CITYSCAPES, Hierarchy, as_int, resolve_ignore_index


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


def test_hierarchies_differ_by_order_of_levels_names_and_void_label():
    assert Hierarchy([[0], [1]]) != Hierarchy([[1], [0]])
    assert Hierarchy([[0], [1]]) != Hierarchy([[0], [1]], names=["a", "b"])
    assert Hierarchy([[0], [1]]) != Hierarchy([[0], [1]], ignore_index=255)


def test_presets_know_the_void_label_of_their_labels():
    assert CAMVID.ignore_index == 11
    assert CITYSCAPES.ignore_index == 255
    assert Hierarchy([[0], [1]]).ignore_index is None


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


WRITTEN = [
    CAMVID,
    CITYSCAPES,
    Hierarchy.flat(3),
    Hierarchy([[1], [0]], ignore_index=-100),
    Hierarchy([[1], [0]], names=["straße", "no"]),
]


@pytest.mark.parametrize("hierarchy", WRITTEN, ids=lambda hierarchy: str(hierarchy)[:30])
def test_survives_dictionaries_json_and_yaml(hierarchy):
    written = hierarchy.to_dict()
    assert list(written) == ["levels", "names", "ignore_index"]
    texts = [json.dumps(written), json.dumps(dataclasses.asdict(hierarchy))]
    for data in [written, dataclasses.asdict(hierarchy), *map(json.loads, texts)]:
        for read in (Hierarchy(**data), Hierarchy.from_dict(data), Hierarchy.of(data)):
            assert read == hierarchy
            assert read.class_levels == hierarchy.class_levels
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    assert Hierarchy.from_dict(yaml.safe_load(yaml.safe_dump(written))) == hierarchy


def test_to_dict_is_a_copy():
    CAMVID.to_dict()["levels"][0].append(11)
    assert CAMVID.levels[0] == (0,)


@pytest.mark.parametrize("hierarchy", WRITTEN, ids=lambda hierarchy: str(hierarchy)[:30])
def test_a_checkpoint_loads_with_the_defaults_of_torch(hierarchy):
    file = io.BytesIO()
    torch.save({"weight": torch.ones(2), "hyper_parameters": {"hierarchy": hierarchy}}, file)
    file.seek(0)
    read = torch.load(file)["hyper_parameters"]["hierarchy"]
    assert read == hierarchy
    assert read.class_levels == hierarchy.class_levels


def test_what_is_unpickled_is_checked():
    whole = pickle.dumps(Hierarchy([[0], [1]], names=["one class", "another"]), protocol=2)
    assert whole.count(b"K\x01") == 1  # the class 1
    with pytest.raises(ValueError, match="levels goes up to class 7 but has no class 1"):
        pickle.loads(whole.replace(b"K\x01", b"K\x07"))


class Index:
    def __index__(self) -> int:
        return 4


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (CAMVID, CAMVID),
        ("camvid", CAMVID),
        ("cityscapes", CITYSCAPES),
        *(
            (value, Hierarchy.flat(4))
            for value in (4, np.int64(4), np.uint8(4), np.array(4), torch.tensor(4), Index())
        ),
        ([[2], [0, 1]], Hierarchy([[2], [0, 1]])),
        (((2,), range(2)), Hierarchy([[2], [0, 1]])),
        (([c] for c in range(3)), Hierarchy([[0], [1], [2]])),
        (np.array([[0], [1]]), Hierarchy([[0], [1]])),
        (torch.tensor([[0], [1]]), Hierarchy([[0], [1]])),
        (torch.tensor([[0]]), Hierarchy([[0]])),
        (np.array([[0]]), Hierarchy([[0]])),
        ({"levels": [[1], [0]]}, Hierarchy([[1], [0]])),
        ({"levels": [[1], [0]], "ignore_index": 2}, Hierarchy([[1], [0]], ignore_index=2)),
    ],
    ids=lambda value: str(value)[:30],
)
def test_of_every_form_of_a_configuration_file(value, expected):
    assert Hierarchy.of(value) == expected


def test_of_a_hierarchy_is_itself():
    assert Hierarchy.of(CAMVID) is CAMVID
    assert Hierarchy.of("camvid") is CAMVID


OF_EXPECTED = (
    "expected an ial_cuda.Hierarchy, the name of a preset, a number of classes, "
    "or a nested sequence of class indices"
)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (None, TypeError, f"h is None (NoneType), {OF_EXPECTED}"),
        (2.5, TypeError, f"h is 2.5 (float), {OF_EXPECTED}"),
        (True, TypeError, "h is True (bool), expected an integer"),
        (torch.tensor(True), TypeError, "h is tensor(True) (Tensor), expected an integer"),
        (torch.tensor(2.0), TypeError, "h is tensor(2.) (Tensor), expected an integer"),
        (0, ValueError, "h is 0, expected 1 to 1048576 classes"),
        (10**14, ValueError, "h is 100000000000000, expected 1 to 1048576 classes"),
        ("kitti", ValueError, "h is 'kitti', expected one of 'camvid', 'cityscapes'"),
        ("19", ValueError, "h is '19', expected one of 'camvid', 'cityscapes'"),
        ([0, 1], TypeError, "h: levels[0] is 0 (int), expected a sequence of class indices"),
        ([], ValueError, "h: levels is empty, expected at least one level"),
        ([["0"]], TypeError, "h: levels[0][0] is '0' (str), expected an integer"),
        (
            [[0], [2]],
            ValueError,
            "h: levels goes up to class 2 but has no class 1, expected every class in exactly one level",
        ),
        (
            {"classes": 3},
            TypeError,
            "h: data has the keys ['classes'], expected levels and, optionally, names and ignore_index",
        ),
        (
            {"levels": [[0]], "x": 1},
            TypeError,
            "h: data has the keys ['levels', 'x'], expected levels and, optionally, names and ignore_index",
        ),
        ({"levels": [[0]], "names": 3}, TypeError, "h: names is 3 (int), expected a sequence of strings"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_of_names_its_argument(value, kind, message):
    with pytest.raises(kind) as caught:
        Hierarchy.of(value, "h")
    assert str(caught.value) == message


def test_from_dict_needs_a_mapping():
    with pytest.raises(TypeError) as caught:
        Hierarchy.from_dict([[0], [1]])
    assert str(caught.value) == "data is [[0], [1]] (list), expected a mapping such as to_dict returns"


@pytest.mark.parametrize(
    ("ignore_index", "num_classes", "void_label", "expected"),
    [
        (None, 19, None, 255),
        (None, 255, None, 255),
        (None, 11, 11, 11),
        (None, 300, 300, 300),
        (None, 300, -100, -100),
        (7, 19, 255, 7),
        (255, 300, None, 255),
        (np.int64(-1), 19, None, -1),
        (torch.tensor(-1), 19, None, -1),
        (-(2**63), 19, None, -(2**63)),
        (2**63 - 1, 19, None, 2**63 - 1),
    ],
)
def test_the_rule_of_ignore_index(ignore_index, num_classes, void_label, expected):
    resolved = resolve_ignore_index(ignore_index, num_classes, void_label)
    assert resolved == expected
    assert type(resolved) is int


@pytest.mark.parametrize(
    ("ignore_index", "num_classes", "kind", "message"),
    [
        (
            None,
            256,
            ValueError,
            "ignore_index is None, which means 255, but 255 is one of the 256 classes: expected the label of "
            "void pixels, or -100 if there are none",
        ),
        (2**63, 19, ValueError, "ignore_index is 9223372036854775808, expected a 64-bit integer"),
        (
            -(2**63) - 1,
            19,
            ValueError,
            "ignore_index is -9223372036854775809, expected a 64-bit integer",
        ),
        (255.0, 19, TypeError, "ignore_index is 255.0 (float), expected an integer"),
        ("255", 19, TypeError, "ignore_index is '255' (str), expected an integer"),
        (False, 19, TypeError, "ignore_index is False (bool), expected an integer"),
    ],
)
def test_errors_of_ignore_index(ignore_index, num_classes, kind, message):
    with pytest.raises(kind) as caught:
        resolve_ignore_index(ignore_index, num_classes)
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [True, np.True_, torch.tensor(True), 1.0, np.float64(1), "1", None])
def test_as_int_takes_no_boolean_and_no_fraction(value):
    with pytest.raises(TypeError, match=r"^n is .* \(.*\), expected an integer$"):
        as_int(value, "n")


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
    (
        dict(levels=[[0], [1]], ignore_index=1),
        ValueError,
        "ignore_index is 1, a class in levels, expected a label outside 0 to 1",
    ),
    (
        dict(levels=[[0], [1]], ignore_index=2**63),
        ValueError,
        "ignore_index is 9223372036854775808, expected a 64-bit integer",
    ),
    (
        dict(levels=[[0], [1]], ignore_index="255"),
        TypeError,
        "ignore_index is '255' (str), expected an integer",
    ),
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
        (0, ValueError, "num_classes is 0, expected 1 to 1048576 classes"),
        (-1, ValueError, "num_classes is -1, expected 1 to 1048576 classes"),
        (2**20 + 1, ValueError, "num_classes is 1048577, expected 1 to 1048576 classes"),
        (2.0, TypeError, "num_classes is 2.0 (float), expected an integer"),
        (True, TypeError, "num_classes is True (bool), expected an integer"),
    ],
)
def test_flat_errors(num_classes, kind, message):
    with pytest.raises(kind) as caught:
        Hierarchy.flat(num_classes)
    assert str(caught.value) == message
