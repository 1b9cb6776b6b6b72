"""Class weights against a brute-force count and CamVid's figures."""

from __future__ import annotations

import os
import tracemalloc
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ial_cuda.class_weights import LabelError, median_frequency_weights
from ial_cuda.hierarchy import CAMVID, Hierarchy
from ial_cuda.label_images import LabelFolder

VOID = 255

# Of the pixels of the images that contain it, class 0 has 3/8, class 1 has 2/8, class 2 has 1/4: median 1/4.
TWO_IMAGES = np.array([[[0, 0], [1, 2]], [[0, 1], [VOID, VOID]]], dtype=np.uint8)
TWO_IMAGES_WEIGHTS = [2 / 3, 1.0, 1.0]


def brute_force(images, num_classes, ignore_index, count_void):
    """Eq. 2 in Python floats, one class and one image at a time."""
    frequency = {}
    for c in range(num_classes):
        containing = [image for image in images if c != ignore_index and (image == c).any()]
        if containing:
            pixels = sum(int((image == c).sum()) for image in containing)
            total = sum(int((image != ignore_index).sum()) for image in containing)
            if count_void:
                total = sum(image.size for image in containing)
            frequency[c] = pixels / total
    ordered = sorted(frequency.values())
    median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return [median / frequency[c] if c in frequency else 1.0 for c in range(num_classes)]


@settings(deadline=None)
@given(
    data=st.data(),
    num_classes=st.integers(1, 6),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)),
    ignore_index=st.sampled_from([VOID, -100, 0, 7]),
    count_void=st.booleans(),
)
def test_equals_brute_force_however_batched(data, num_classes, shape, ignore_index, count_void):
    values = st.sampled_from([*range(num_classes), ignore_index])
    images = data.draw(arrays(np.int64, shape, elements=values))
    assume((images != ignore_index).any())
    cuts = sorted(data.draw(st.sets(st.integers(1, shape[0]))))
    batches = [[images], np.split(images, cuts), images, torch.from_numpy(images)]
    options = dict(ignore_index=ignore_index, count_void=count_void)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = [median_frequency_weights(list(images), num_classes, **options)]
        results += [median_frequency_weights(maps, num_classes, batched=True, **options) for maps in batches]
    for result in results:
        assert torch.equal(result, results[0])
    expected = brute_force(images, num_classes, ignore_index, count_void)
    np.testing.assert_allclose(results[0].numpy(), expected, rtol=1e-7)


def test_images_of_different_shapes():
    images = [np.array([[0, 1, 1]]), np.array([[0], [1]]), np.array([[1]])]
    weights = median_frequency_weights(images, 2)
    np.testing.assert_allclose(weights.numpy(), brute_force(images, 2, VOID, True), rtol=1e-7)


def test_returns_float32_on_the_cpu():
    weights = median_frequency_weights(TWO_IMAGES, 3, batched=True)
    assert weights.shape == (3,)
    assert weights.dtype == torch.float32
    assert weights.device.type == "cpu"
    np.testing.assert_allclose(weights.numpy(), TWO_IMAGES_WEIGHTS, rtol=1e-7)


def test_void_is_counted_by_default_and_left_out_on_request():
    images = [np.array([[0, 0, 0, 1]]), np.array([[1, VOID, VOID, VOID]])]
    default = median_frequency_weights(images, 2)
    counted = median_frequency_weights(images, 2, count_void=True)
    left_out = median_frequency_weights(images, 2, count_void=False)
    assert torch.equal(default, counted)
    np.testing.assert_allclose(counted.numpy(), [0.5 / 0.75, 0.5 / 0.25], rtol=1e-7)  # 3/4 and 2/8
    np.testing.assert_allclose(left_out.numpy(), [0.575 / 0.75, 0.575 / 0.4], rtol=1e-7)  # 3/4 and 2/5


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"])
@pytest.mark.parametrize("container", ["numpy", "torch"])
def test_every_integer_dtype(container, dtype):
    void = 100  # fits every dtype
    labels = np.where(TWO_IMAGES == VOID, void, TWO_IMAGES).astype(dtype)
    label_map = torch.from_numpy(labels) if container == "torch" else labels
    weights = median_frequency_weights([label_map], 3, batched=True, ignore_index=void)
    np.testing.assert_allclose(weights.numpy(), TWO_IMAGES_WEIGHTS, rtol=1e-7)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"])
@pytest.mark.parametrize("container", ["numpy", "torch"])
def test_numbers_beyond_the_dtype_are_no_label(container, dtype):
    """Neither ``ignore_index`` nor the number of classes may wrap to a label in a small dtype."""
    top = int(np.iinfo(dtype).max)
    values = {0, 1, top, top - 99, int(np.iinfo(dtype).min)}
    labels = np.array([sorted(values)], dtype=dtype)
    maps = torch.from_numpy(labels) if container == "torch" else labels
    flat = [Hierarchy.flat(num_classes) for num_classes in (2, 200, 256, 300, 70000)]
    for ignore_index in (-1, -100, 156, 255, 300, 2**32 + 1, -(2**32) + 1, 2**63 - 1, -(2**63)):
        for hierarchy in flat:
            num_classes = hierarchy.num_classes
            allowed = {*range(num_classes), ignore_index} & values
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if allowed == values:
                    weights = median_frequency_weights(maps, hierarchy, ignore_index=ignore_index)
                    assert torch.equal(weights, torch.ones(num_classes))  # one pixel of each
                    continue
                with pytest.raises(LabelError) as caught:
                    median_frequency_weights(maps, hierarchy, ignore_index=ignore_index)
            bad = sorted(values - allowed)
            assert f"has label {bad[0]} at" in str(caught.value)
            assert f"the first of {len(bad)} bad pixels" in str(caught.value)


@pytest.mark.parametrize("container", ["numpy", "torch"])
def test_bool_is_two_classes(container):
    labels = np.array([[True, False, True, True]])
    weights = median_frequency_weights(torch.from_numpy(labels) if container == "torch" else labels, 2)
    assert torch.equal(weights, median_frequency_weights(labels.astype(np.int64), 2))
    with pytest.raises(LabelError, match=r"has label True at .* first of 3 bad pixels"):
        median_frequency_weights(labels, 1)


def test_ignore_index_is_the_data_sets_else_255():
    camvid, plain = np.array([[0, 11, 3]]), np.array([[0, 255, 3]])
    with pytest.warns(UserWarning, match="no image contains"):
        expected = median_frequency_weights(camvid, 11, ignore_index=11)
    with pytest.warns(UserWarning, match="no image contains"):
        assert torch.equal(median_frequency_weights(camvid, "camvid"), expected)
    with pytest.warns(UserWarning, match="no image contains"):
        assert torch.equal(median_frequency_weights(plain, 11), expected)
    with pytest.raises(LabelError, match=r"has label 255 .* or ignore_index=11"):
        median_frequency_weights(plain, "camvid")
    with pytest.raises(
        ValueError, match="ignore_index is None, which means 255, but 255 is one of the 256 classes"
    ):
        median_frequency_weights(plain, 256)
    with pytest.warns(UserWarning, match="no image contains"):
        assert median_frequency_weights(plain, 256, ignore_index=255)[255] == 1


@pytest.mark.parametrize(
    "hierarchy",
    [3, np.int64(3), torch.tensor(3), [[2], [0, 1]], {"levels": [[0, 1, 2]], "ignore_index": 255}],
)
def test_hierarchy_is_whatever_says_how_many_classes(hierarchy):
    weights = median_frequency_weights(TWO_IMAGES, hierarchy, batched=True)
    np.testing.assert_allclose(weights.numpy(), TWO_IMAGES_WEIGHTS, rtol=1e-7)


@pytest.mark.parametrize("container", ["numpy", "torch"])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_batched_says_what_the_first_dimension_is(container, rank):
    labels = np.random.default_rng(rank).integers(0, 3, (4, 3, 2, 2)[:rank], dtype=np.uint8)
    labels[0] = 0  # an image without the classes 1 and 2
    maps = torch.from_numpy(labels) if container == "torch" else labels
    one_image = median_frequency_weights([maps], 3, batched=False)
    np.testing.assert_allclose(one_image.numpy(), brute_force([labels], 3, VOID, True), rtol=1e-7)
    assert torch.equal(median_frequency_weights(maps, 3, batched=False), one_image)
    if rank > 1:
        images = median_frequency_weights([maps], 3, batched=True)
        np.testing.assert_allclose(images.numpy(), brute_force(list(labels), 3, VOID, True), rtol=1e-7)
        assert not torch.equal(images, one_image)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TWO_IMAGES.transpose(0, 2, 1)[:, ::-1],
        lambda: torch.from_numpy(TWO_IMAGES).permute(0, 2, 1),
        lambda: np.broadcast_to(TWO_IMAGES, TWO_IMAGES.shape),
        lambda: TWO_IMAGES.astype(">i4"),
    ],
    ids=["reversed", "permuted", "read-only", "big-endian"],
)
def test_any_memory_layout(make):
    weights = median_frequency_weights([make()], 3, batched=True)
    np.testing.assert_allclose(weights.numpy(), TWO_IMAGES_WEIGHTS, rtol=1e-7)


def test_empty_maps_and_void_images_change_nothing():
    nothing = [np.zeros((0, 2, 2), np.uint8), np.zeros((1, 0, 5), np.uint8), np.full((1, 3, 3), VOID)]
    weights = median_frequency_weights([*nothing, TWO_IMAGES], 3, batched=True)
    np.testing.assert_allclose(weights.numpy(), TWO_IMAGES_WEIGHTS, rtol=1e-7)


def test_absent_classes_get_one_and_a_warning():
    with pytest.warns(UserWarning) as caught:
        weights = median_frequency_weights([TWO_IMAGES], 5, batched=True)
    assert [str(warning.message) for warning in caught] == [
        "no image contains the classes [3, 4]; their weight is 1"
    ]
    assert caught[0].filename == __file__
    np.testing.assert_allclose(weights.numpy(), [*TWO_IMAGES_WEIGHTS, 1.0, 1.0], rtol=1e-7)


def test_label_maps_are_streamed():
    references = []

    def label_maps():
        for _ in range(5):
            label_map = TWO_IMAGES.copy()
            references.append(weakref.ref(label_map))
            yield label_map
            del label_map
            alive = sum(reference() is not None for reference in references)
            assert alive <= 1, f"{alive} label maps are held at once"

    weights = median_frequency_weights(label_maps(), 3, batched=True)
    assert len(references) == 5
    np.testing.assert_allclose(weights.numpy(), TWO_IMAGES_WEIGHTS, rtol=1e-7)


@pytest.mark.parametrize(
    "make",
    [
        lambda labels: labels,
        lambda labels: labels.T,
        lambda labels: labels[::-2, ::-1],
        torch.from_numpy,
        lambda labels: torch.from_numpy(labels).t(),
    ],
    ids=["C", "Fortran", "strided", "torch", "torch transposed"],
)
@pytest.mark.parametrize("bad", [False, True])
def test_memory_does_not_grow_with_the_map(make, bad):
    labels = np.tile(np.arange(8, dtype=np.uint8), (4096, 512))  # 16 MiB
    labels[-2:, -2:] = 77 if bad else 0
    maps = make(labels)
    tracemalloc.start()
    try:
        if bad:
            with pytest.raises(LabelError, match="has label 77"):
                median_frequency_weights([maps], 8)
        else:
            median_frequency_weights([maps], 8)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20  # blocks of 2**18 labels in 8 bytes, and the masks


def test_many_blocks_count_like_one():
    """A map of several blocks. The last one is not full, and the bad label is not in the first."""
    labels = np.random.default_rng(0).integers(0, 5, (777, 1111), dtype=np.uint8)
    expected = brute_force([labels], 5, VOID, True)
    np.testing.assert_allclose(median_frequency_weights([labels], 5).numpy(), expected, rtol=1e-7)
    labels[600, 13] = labels[770, 14] = 5  # in two blocks
    for layout in (labels, np.asfortranarray(labels)):
        with pytest.raises(LabelError, match=r"has label 5 at \(600, 13\), the first of 2 bad pixels"):
            median_frequency_weights([layout], 5)


GOOD = np.zeros((2, 2), np.uint8)
ERRORS = [
    (dict(label_maps=None), TypeError, "label_maps is a NoneType, expected label maps or one"),
    (
        dict(label_maps=[GOOD, [[0, 1]]]),
        TypeError,
        "label_maps[1] is a list, expected a torch.Tensor or numpy.ndarray",
    ),
    (
        dict(label_maps=[(GOOD, GOOD)]),
        TypeError,
        "label_maps[0] is a tuple, expected a torch.Tensor or numpy.ndarray",
    ),
    (
        dict(label_maps=[GOOD, GOOD.astype(np.float32)]),
        TypeError,
        "label_maps[1] has dtype float32, expected an integer dtype",
    ),
    (
        dict(label_maps=[torch.zeros(2, 2, dtype=torch.bfloat16)]),
        TypeError,
        "label_maps[0] has dtype torch.bfloat16, expected an integer dtype",
    ),
    (
        dict(label_maps=[np.ma.masked_equal(GOOD, 1)]),
        TypeError,
        "label_maps[0] is a MaskedArray, expected a torch.Tensor or numpy.ndarray",
    ),
    (
        dict(label_maps=[torch.zeros(2, 2, dtype=torch.uint8, device="meta")]),
        ValueError,
        "label_maps[0] is on the meta device, expected a device that stores values",
    ),
    *(
        (
            dict(label_maps=label_maps),
            ValueError,
            f"label_maps[0] has shape {shape}, expected (H, W), or batched=True for (N, *spatial), or "
            "batched=False for (*spatial)",
        )
        for label_maps, shape in [
            (GOOD[0], (2,)),
            (GOOD[None], (1, 2, 2)),
            ([GOOD[None]], (1, 2, 2)),
            (torch.zeros(3, 2, 2, dtype=torch.uint8), (3, 2, 2)),
            ([torch.zeros(4, 1, 2, 2, dtype=torch.uint8)], (4, 1, 2, 2)),
        ]
    ),
    (
        dict(label_maps=[GOOD[0]], batched=True),
        ValueError,
        "label_maps[0] has shape (2,), expected (N, *spatial) for batched=True",
    ),
    (
        dict(label_maps=[torch.tensor(1)], batched=False),
        ValueError,
        "label_maps[0] has shape (), expected (*spatial) for batched=False",
    ),
    (
        dict(label_maps=[GOOD, np.array([[0, 1, 3], [4, VOID, 3]])]),
        LabelError,
        "label_maps[1] has label 3 at (0, 2), the first of 3 bad pixels, "
        "expected labels 0 to 2 or ignore_index=255",
    ),
    (
        dict(label_maps=[torch.tensor([[[0, 1]], [[2, -1]]])], ignore_index=7, batched=True),
        LabelError,
        "label_maps[0] has label -1 at (1, 0, 1), the first of 1 bad pixels, "
        "expected labels 0 to 2 or ignore_index=7",
    ),
    (
        dict(label_maps=[]),
        ValueError,
        "label_maps has no pixel of any class in 0 images, "
        "expected at least one label that is not ignore_index=255",
    ),
    (
        dict(label_maps=[GOOD, GOOD], ignore_index=0),
        ValueError,
        "label_maps has no pixel of any class in 2 images, "
        "expected at least one label that is not ignore_index=0",
    ),
    (
        dict(label_maps=[GOOD], hierarchy=0),
        ValueError,
        "hierarchy is 0, expected 1 to 1048576 classes",
    ),
    (
        dict(label_maps=[GOOD], hierarchy=10**14),
        ValueError,
        "hierarchy is 100000000000000, expected 1 to 1048576 classes",
    ),
    (
        dict(label_maps=[GOOD], ignore_index="255"),
        TypeError,
        "ignore_index is '255' (str), expected an integer",
    ),
    (
        dict(label_maps=[GOOD], ignore_index=2**63),
        ValueError,
        "ignore_index is 9223372036854775808, expected a 64-bit integer",
    ),
    (
        dict(label_maps=[GOOD], batched="no"),
        TypeError,
        "batched is 'no' (str), expected a bool",
    ),
    (
        dict(label_maps=[GOOD], count_void="no"),
        TypeError,
        "count_void is 'no' (str), expected a bool",
    ),
    (
        dict(label_maps=[GOOD], process_group="data"),
        TypeError,
        "process_group is 'data' (str), expected a ProcessGroup or a DeviceMesh of one dimension",
    ),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), ERRORS, ids=[error[2][:60] for error in ERRORS])
def test_errors_name_argument_value_and_expectation(arguments, kind, message):
    with pytest.raises(kind) as caught:
        median_frequency_weights(**dict(hierarchy=3) | arguments)
    assert str(caught.value) == message


def test_label_error_is_a_value_error_that_knows_its_map():
    with pytest.raises(ValueError) as caught:
        median_frequency_weights([GOOD, GOOD, GOOD + 3], 3)
    assert caught.value.map_index == 2


@pytest.fixture(scope="module")
def camvid() -> LabelFolder:
    root = os.environ.get("IAL_CAMVID")
    if not root:
        pytest.skip("IAL_CAMVID does not name a folder with CamVid's trainannot/*.png")
    return LabelFolder(Path(root) / "trainannot")


@pytest.mark.parametrize(
    ("count_void", "expected"),
    [
        (True, [0.2793, 0.2017, 4.7865, 0.1490, 1.0, 0.4217, 3.8467, 1.9736, 0.7889, 6.3747, 8.8587]),
        (False, [0.2794, 0.2018, 4.7889, 0.1491, 1.0, 0.4235, 3.8464, 1.9798, 0.7890, 6.3847, 8.8193]),
    ],
)
def test_camvid_figures(camvid, count_void, expected):
    assert len(camvid) == 367
    weights = median_frequency_weights(camvid, CAMVID, count_void=count_void)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=0, atol=5.1e-5)
