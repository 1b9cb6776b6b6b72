"""The module: its arguments, its attributes, its weights under casts, and its repr."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import pydoc
import re

import numpy as np
import pytest
import torch
import torch._dynamo
from cases import BACKENDS, EMULATED, HIERARCHY, device_of, make_logits, make_target

from ial_cuda import CAMVID, CITYSCAPES, Hierarchy, ImportanceAwareLoss, functional, importance_aware_loss
from ial_cuda.options import OptionArguments, Options

LOGITS, TARGET = make_logits((2, 5, 6, 7), torch.float32), make_target((2, 6, 7), 5)
WEIGHT = [0.5, 1.0, 2.0, 1.5, 0.25]
#: Every option except the hierarchy, with a value that is not its default.
OPTIONS = dict(
    alpha=0.0,
    lambdas=(0.1, 0.2, 0.3),
    ignore_index=0,
    reduction="none",
    factor_normalization="sum",
    factor_scope="batch",
    gradient="paper",
    label_smoothing=0.1,
    upsample="bilinear",
    align_corners=True,
    backend="reference",
    inplace=True,
    grad_in_forward=False,
    return_components=True,
)


def test_module_is_the_function(recwarn):
    weight, pixel_weight = torch.rand(5), torch.rand(2, 6, 7)
    options = dict(alpha=0.5, lambdas=[0.1, 0.2, 0.3], ignore_index=3, reduction="none", factor_scope="batch")
    criterion = ImportanceAwareLoss(HIERARCHY, weight, **options)
    assert not recwarn, "an explicit ignore_index may be a class"
    target = TARGET.where(TARGET != 255, 3)
    expected = importance_aware_loss(
        LOGITS, target, HIERARCHY, weight=weight, pixel_weight=pixel_weight, **options
    )
    assert torch.equal(criterion(LOGITS, target, pixel_weight), expected)
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(other(LOGITS, target, pixel_weight), expected)
        assert repr(other) == repr(criterion)


BAD = {
    "hierarchy": (dict(hierarchy="voc"), ValueError, "hierarchy is 'voc', expected one of 'camvid', 'cityscapes'"),
    "weight": (dict(weight=torch.ones(3)), ValueError, "weight has shape (3,), expected (5,), one per class"),
    "weight type": (dict(weight="ones"), TypeError, "weight is a str, expected a torch.Tensor, an array or a list"),
    "alpha": (dict(alpha="1"), TypeError, "alpha is '1' (str), expected a number"),
    "alpha nan": (dict(alpha=np.nan), ValueError, "alpha is nan, expected a finite number"),
    "lambdas": (dict(lambdas=[1.0]), ValueError, "lambdas has 1 values, expected one, or 3 for 4 levels"),
    "ignore_index": (dict(ignore_index="void"), TypeError, "ignore_index is 'void' (str), expected an integer"),
    "ignore_index range": (dict(ignore_index=-(2**63) - 1), ValueError, "expected a 64-bit integer"),
    "reduction": (dict(reduction="max"), ValueError, "reduction is 'max', expected one of"),
    "factor_normalization": (dict(factor_normalization=None), ValueError, "factor_normalization is None, expected one of"),
    "factor_scope": (dict(factor_scope="pixel"), ValueError, "factor_scope is 'pixel', expected one of"),
    "gradient": (dict(gradient="true"), ValueError, "gradient is 'true', expected one of"),
    "label_smoothing": (dict(label_smoothing=1.5), ValueError, "label_smoothing is 1.5, expected a number from 0 to 1"),
    "upsample": (dict(upsample=True), ValueError, "upsample is True, expected one of None, 'bilinear'"),
    "align_corners": (dict(align_corners="no"), TypeError, "align_corners is 'no' (str), expected a bool"),
    "backend": (dict(backend="gpu"), ValueError, "backend is 'gpu', expected one of 'auto'"),
    "inplace": (dict(inplace="no"), TypeError, "inplace is 'no' (str), expected a bool"),
    "grad_in_forward": (dict(grad_in_forward=1), TypeError, "grad_in_forward is 1 (int), expected a bool"),
    "return_components": (dict(return_components=None), TypeError, "return_components is None (NoneType), expected a bool"),
    "process_group": (dict(process_group=1), TypeError, "process_group is 1 (int), expected a ProcessGroup or a DeviceMesh of one dimension"),
    "spatial_group": (dict(spatial_group="spatial"), TypeError, "spatial_group is 'spatial' (str), expected a ProcessGroup"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_found_at_construction_and_when_set(name):
    bad, exception, message = BAD[name]
    with pytest.raises(exception, match=re.escape(message)):
        ImportanceAwareLoss(**(dict(hierarchy=HIERARCHY) | bad))
    criterion = ImportanceAwareLoss(HIERARCHY, WEIGHT)
    before = repr(criterion)
    ((option, value),) = bad.items()
    with pytest.raises(exception, match=re.escape(message)):
        setattr(criterion, option, value)
    assert repr(criterion) == before


def test_an_unknown_option_is_an_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'beta'"):
        ImportanceAwareLoss(HIERARCHY, beta=1.0)


# ---- attributes -----------------------------------------------------------------------------------------


def test_every_option_is_an_attribute_and_documented():
    fields = {field.name for field in dataclasses.fields(Options)}
    assert {"hierarchy", "process_group", "spatial_group", *OPTIONS} == fields and fields <= set(BAD)
    criterion = ImportanceAwareLoss(HIERARCHY)
    text = pydoc.plain(pydoc.render_doc(ImportanceAwareLoss))
    arguments = text[text.index("Args:") : text.index("Raises:")]
    for field in dataclasses.fields(Options)[1:]:
        name, default = field.name, field.default
        assert re.search(rf"^ \| +{name}: ", arguments, re.MULTILINE), f"help() explains {name}"
        assert getattr(criterion, name) == (255 if name == "ignore_index" else default)


@pytest.mark.parametrize("call", [importance_aware_loss, ImportanceAwareLoss])
def test_signatures_have_every_option_and_its_default(call):
    options = {field.name: field.default for field in dataclasses.fields(Options)[1:]}
    parameters = inspect.signature(call).parameters
    given = {"logits", "target", "hierarchy", "weight", "pixel_weight", "divisor"}
    assert {name: parameters[name].default for name in parameters if name not in given} == options
    assert {*OptionArguments.__annotations__, "return_components"} == set(options)
    for name in options:
        assert re.search(rf"^ {{8}}{name}: ", call.__doc__, re.MULTILINE), f"help() explains {name}"


@pytest.mark.parametrize("name", OPTIONS)
def test_the_function_passes_every_option_on(name, monkeypatch):
    monkeypatch.setattr(functional, "compute_loss", lambda *arguments: arguments[-1])
    needed = {"upsample": "bilinear"} if name == "align_corners" else {}
    options = importance_aware_loss(LOGITS, TARGET, HIERARCHY, **needed, **{name: OPTIONS[name]})
    assert getattr(options, name) == OPTIONS[name]


@pytest.mark.parametrize("name", [name for name in OPTIONS if name not in ("align_corners", "inplace")])
def test_what_is_set_is_used(name):
    value = OPTIONS[name]
    target = make_target((2, 6, 7), 5, ignore_index=0)
    criterion = ImportanceAwareLoss(HIERARCHY, WEIGHT)
    setattr(criterion, name, value)
    assert getattr(criterion, name) == value
    expected = ImportanceAwareLoss(HIERARCHY, WEIGHT, **{name: value})(LOGITS, target)
    result = criterion(LOGITS, target)
    if name == "return_components":
        (result, parts), (expected, expected_parts) = result, expected
        assert all(torch.equal(a, b) for a, b in zip(parts, expected_parts, strict=True))
    assert torch.equal(result, expected)


def test_options_that_depend_on_another():
    criterion = ImportanceAwareLoss(HIERARCHY)
    with pytest.raises(ValueError, match="align_corners is True, expected False: upsample is None"):
        criterion.align_corners = True
    criterion.upsample = "bilinear"
    criterion.align_corners = True
    with pytest.raises(ValueError, match="inplace is True, expected False: with upsample="):
        criterion.inplace = True


def test_a_hierarchy_brings_its_own_void_label_and_number_of_levels():
    criterion = ImportanceAwareLoss("camvid", [1.0] * 11)
    assert criterion.hierarchy is CAMVID and criterion.ignore_index == 11
    with pytest.raises(ValueError, match=re.escape("weight has shape (11,), expected (19,), one per class")):
        criterion.hierarchy = CITYSCAPES
    criterion.weight = None
    criterion.hierarchy = "cityscapes"
    assert criterion.ignore_index == 255
    criterion.weight = np.ones(19)
    assert criterion.weight.dtype == torch.float64
    criterion.ignore_index = 3
    criterion.hierarchy = 19
    assert criterion.ignore_index == 3 and criterion.hierarchy == Hierarchy.flat(19)
    criterion.ignore_index = criterion.weight = None
    assert criterion.ignore_index == 255
    with pytest.raises(
        ValueError, match="ignore_index is None, which means 255, but 255 is one of the 300 classes"
    ):
        criterion.hierarchy = 300
    criterion.ignore_index, criterion.hierarchy = -100, 300
    with pytest.raises(
        ValueError, match="ignore_index is None, which means 255, but 255 is one of the 300 classes"
    ):
        criterion.ignore_index = None
    criterion.hierarchy = HIERARCHY
    criterion.lambdas = [1, 2, 3]
    with pytest.raises(ValueError, match="lambdas has 3 values, expected one, or 2 for 3 levels"):
        criterion.hierarchy = [[0, 1], [2], [3, 4]]


def test_repr_shows_what_is_not_a_default():
    assert repr(ImportanceAwareLoss(CAMVID)) == "ImportanceAwareLoss(11 classes, 4 levels)"
    plain = {name: value for name, value in OPTIONS.items() if name != "inplace"}
    text = repr(ImportanceAwareLoss(HIERARCHY, WEIGHT, **plain))
    assert text.startswith("ImportanceAwareLoss(5 classes, 4 levels, weight=(5,), ")
    for name, value in plain.items():
        assert f"{name}={value!r}" in text
    assert "inplace=True" in repr(ImportanceAwareLoss(HIERARCHY, inplace=True))


@torch._dynamo.config.patch(recompile_limit=32)  # each change recompiles
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values[0] not in EMULATED])
def test_compiled_module_sees_what_is_set(backend):
    torch._dynamo.reset()
    device = device_of(backend)
    logits, target = LOGITS.to(device), TARGET.to(device)
    criterion = ImportanceAwareLoss(HIERARCHY, WEIGHT, backend=backend).to(device)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    changes = [("alpha", 0.0), ("alpha", 2.5), ("lambdas", (1, 0, 1)), ("ignore_index", 2), ("weight", None)]
    changes += [("lambdas", 0.5), ("hierarchy", [[0, 1], [2, 3, 4]]), ("reduction", "none")]
    before = compiled(logits, target)
    for name, value in changes:
        setattr(criterion, name, value)
        criterion.ignore_index = 255 if name != "ignore_index" else value
        after = compiled(logits, target.clamp(max=4))
        torch.testing.assert_close(after, criterion(logits, target.clamp(max=4)), rtol=1e-6, atol=0)
        assert after.shape != before.shape or not torch.equal(after, before), f"{name} has no effect"
        before = after


# ---- class weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_casts_leave_the_weights(cast, dtype):
    """float16 cannot represent 1e6, and bfloat16 rounds 257 to 256."""
    weight = torch.tensor([1e6, 257.0, 1e-8, 1.0, 0.0], dtype=dtype)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 1), ImportanceAwareLoss(HIERARCHY, weight))
    getattr(network, cast)()
    assert network[0].weight.dtype != dtype or cast in ("float", "double")
    assert torch.equal(network[1].weight, weight) and network[1].weight.dtype == dtype
    assert torch.equal(network[1].state_dict()["weight"], weight)


def test_casts_move_the_weights():
    criterion = ImportanceAwareLoss(HIERARCHY, WEIGHT).to("meta", torch.float16)
    assert criterion.weight.device.type == "meta" and criterion.weight.dtype == torch.float32
    criterion.to_empty(device="cpu").load_state_dict({"weight": torch.tensor(WEIGHT)})
    assert torch.equal(criterion.weight, torch.tensor(WEIGHT))


def test_module_keeps_its_weight():
    criterion = ImportanceAwareLoss(CAMVID, torch.arange(11.0))
    assert list(criterion.state_dict()) == ["weight"]
    assert ImportanceAwareLoss(CAMVID).state_dict() == {}
    other = ImportanceAwareLoss(CAMVID, torch.zeros(11))
    other.load_state_dict(criterion.state_dict())
    assert torch.equal(other.weight, torch.arange(11.0))


@pytest.mark.parametrize(
    ("weight", "dtype"),
    [
        (WEIGHT, torch.float32),
        (tuple(WEIGHT), torch.float32),
        ([np.float32(value) for value in WEIGHT], torch.float32),
        (np.array(WEIGHT, dtype=np.float32), torch.float32),
        (np.array(WEIGHT, dtype=">f8"), torch.float64),
        (np.array(WEIGHT, dtype=np.float16), torch.float16),
        (np.array(WEIGHT, dtype=np.longdouble), torch.float64),
        ([1, 2, 3, 4, 5], torch.float32),
        (np.arange(5), torch.float32),
    ],
    ids=lambda value: f"{type(value).__name__}",
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_lists_and_arrays(backend, weight, dtype):
    device = device_of(backend)
    logits, target = LOGITS.to(device), TARGET.to(device)
    tensor = torch.tensor([float(value) for value in weight], dtype=dtype, device=device)
    expected = importance_aware_loss(logits, target, HIERARCHY, weight=tensor, backend=backend)
    loss = importance_aware_loss(logits, target, HIERARCHY, weight=weight, backend=backend)
    with torch.device("meta"):  # weights are values
        criterion = ImportanceAwareLoss(HIERARCHY, weight, backend=backend)
    assert criterion.weight.dtype == dtype and criterion.weight.device.type == "cpu"
    assert torch.equal(loss, expected) and torch.equal(criterion.to(device)(logits, target), expected)
