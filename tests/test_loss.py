"""The public interface: arguments and their errors, the choice of a backend, the text of `info`."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch._dynamo
from cases import BACKENDS, EMULATED, HIERARCHY, device_of, make_logits, make_target

from ial_cuda import (
    Hierarchy,
    ImportanceAwareLoss,
    backends,
    cross_entropy,
    extension,
    importance_aware_loss,
)

LOGITS, TARGET = make_logits((2, 5, 6, 7), torch.float32), make_target((2, 6, 7), 5)


def bad_label(value, dtype=torch.int64):
    target = TARGET.clone().to(dtype)
    target[0, 2, 3] = value
    target[1, 5, 6] = value
    return target


# (arguments that replace the good ones, exception, message)
BAD = {
    "logits type": (dict(logits=[1.0]), TypeError, "logits is a list, expected a torch.Tensor"),
    "logits dtype": (dict(logits=LOGITS.long()), TypeError, "logits has dtype torch.int64, expected one of torch.float64, torch.float32, torch.float16, torch.bfloat16"),
    "logits rank": (dict(logits=LOGITS[:, 0, 0, 0]), ValueError, "logits has shape (2,), expected (N, C, *spatial) with the C = 5 classes of hierarchy"),
    "logits classes": (dict(logits=LOGITS[:, :4]), ValueError, "logits has shape (2, 4, 6, 7), expected (N, C, *spatial) with the C = 5 classes of hierarchy"),
    "logits sparse": (dict(logits=LOGITS.to_sparse()), TypeError, "logits has layout torch.sparse_coo, expected torch.strided"),
    "wide target": (dict(target=torch.zeros(1, 1, 1, dtype=torch.uint8).expand(2, 1, 2**30), upsample="bilinear"), ValueError, "logits has shape (2, 5, 6, 7) and target (2, 1, 1073741824), expected h, w, H and W up to 1073741823"),
    "target type": (dict(target=1), TypeError, "target is a int, expected a torch.Tensor"),
    "target dtype": (dict(target=TARGET.float()), TypeError, "target has dtype torch.float32, expected one of torch.int64, torch.int32, torch.uint8"),
    "target probabilities": (dict(target=LOGITS.softmax(1)), TypeError, "target has dtype torch.float32, expected one of torch.int64, torch.int32, torch.uint8: class indices only; torch.nn.functional.cross_entropy takes probabilities"),
    "target int16": (dict(target=TARGET.short()), TypeError, "target has dtype torch.int16, expected one of torch.int64, torch.int32, torch.uint8"),
    "target channel": (dict(target=TARGET[:, None]), ValueError, "target has shape (2, 1, 6, 7), expected (N, *spatial) = (2, 6, 7) for logits (2, 5, 6, 7): pass target.squeeze(1)"),
    "fine target channel": (dict(target=TARGET[:, None], upsample="bilinear"), ValueError, "with h, w, H and W above 0, for upsample='bilinear': pass target.squeeze(1)"),
    "binary logits": (dict(logits=LOGITS[:, :1], hierarchy=2), ValueError, "logits has shape (2, 1, 6, 7), expected (N, C, *spatial) with the C = 2 classes of hierarchy: binary logits x need two channels, torch.cat([torch.zeros_like(x), x], 1)"),
    "binary labels": (dict(logits=LOGITS[:, :1], hierarchy=1, target=TARGET.clamp(max=1)), ValueError, "expected labels 0 to 0 or ignore_index=255: binary logits x need two channels, torch.cat([torch.zeros_like(x), x], 1)"),
    "target bool": (dict(target=TARGET > 3), TypeError, "target has dtype torch.bool, expected one of"),
    "target shape": (dict(target=TARGET[:, :5]), ValueError, "target has shape (2, 5, 7), expected (N, *spatial) = (2, 6, 7) for logits (2, 5, 6, 7)"),
    "target one-hot": (dict(target=torch.zeros(2, 5, 6, 7, dtype=torch.int64)), ValueError, "target has shape (2, 5, 6, 7), expected (N, *spatial) = (2, 6, 7) for logits (2, 5, 6, 7): class indices only, pass target.argmax(1)"),
    "target device": (dict(target=TARGET.to("meta")), ValueError, "target is on meta, expected cpu like logits"),
    "label high": (dict(target=bad_label(5)), ValueError, "target has label 5 at (0, 2, 3), the first of 2 bad pixels, expected labels 0 to 4 or ignore_index=255"),
    "label negative": (dict(target=bad_label(-1)), ValueError, "target has label -1 at (0, 2, 3), the first of 2 bad pixels"),
    "label huge": (dict(target=bad_label(2**40)), ValueError, "target has label 1099511627776 at (0, 2, 3), the first of 2 bad pixels"),
    "label beyond 32 bits": (dict(target=bad_label(2**32 + 1)), ValueError, "target has label 4294967297 at (0, 2, 3), the first of 2 bad pixels"),
    "label uint8": (dict(target=bad_label(254, torch.uint8)), ValueError, "target has label 254 at (0, 2, 3), the first of 2 bad pixels"),
    "label int32": (dict(target=bad_label(-7, torch.int32)), ValueError, "target has label -7 at (0, 2, 3), the first of 2 bad pixels"),
    "label -100": (dict(target=bad_label(-100)), ValueError, "or ignore_index=255: pass ignore_index=-100 if it is the void label"),
    "label -1": (dict(target=bad_label(-1, torch.int32)), ValueError, "or ignore_index=255: pass ignore_index=-1 if it is the void label"),
    "label 255": (dict(target=bad_label(255, torch.uint8), ignore_index=-100), ValueError, "expected labels 0 to 4 or ignore_index=-100: pass ignore_index=255 if it is the void label"),
    "ignore_index string": (dict(ignore_index="255"), TypeError, "ignore_index is '255' (str), expected an integer"),
    "ignore_index bool": (dict(ignore_index=True), TypeError, "ignore_index is True (bool), expected an integer"),
    "ignore_index range": (dict(ignore_index=2**63), ValueError, "ignore_index is 9223372036854775808, expected a 64-bit integer"),
    "ignore_index of many classes": (dict(logits=torch.zeros(1, 256, 2), target=torch.zeros(1, 2, dtype=torch.int64), hierarchy=256), ValueError, "ignore_index is None, which means 255, but 255 is one of the 256 classes: expected the label of void pixels"),
    "ignore_index type": (dict(ignore_index=0.5), TypeError, "ignore_index is 0.5 (float), expected an integer"),
    "hierarchy": (dict(hierarchy=0.5), TypeError, "hierarchy is 0.5 (float), expected an ial_cuda.Hierarchy, the name of a preset"),
    "hierarchy name": (dict(hierarchy="voc"), ValueError, "hierarchy is 'voc', expected one of 'camvid', 'cityscapes'"),
    "hierarchy classes": (dict(hierarchy=4), ValueError, "logits has shape (2, 5, 6, 7), expected (N, C, *spatial) with the C = 4 classes of hierarchy"),
    "weight type": (dict(weight=1.0), TypeError, "weight is a float, expected a torch.Tensor, an array or a list of numbers"),
    "weight string": (dict(weight="1"), TypeError, "weight is a str, expected a torch.Tensor, an array or a list of numbers"),
    "weight strings": (dict(weight=["1"] * 5), TypeError, "weight[0] is '1' (str), expected a number"),
    "weight bools": (dict(weight=[1.0, True, 1.0, 1.0, 1.0]), TypeError, "weight[1] is True (bool), expected a number"),
    "weight list shape": (dict(weight=[1.0] * 4), ValueError, "weight has shape (4,), expected (5,), one per class"),
    "weight array dtype": (dict(weight=np.ones(5, dtype=bool)), TypeError, "weight has dtype bool, expected numbers"),
    "weight array shape": (dict(weight=np.ones((5, 1))), ValueError, "weight has shape (5, 1), expected (5,), one per class"),
    "weight masked": (dict(weight=np.ma.masked_array([1.0] * 5, mask=[True] + [False] * 4)), TypeError, "weight is a MaskedArray, expected a torch.Tensor, an array or a list of numbers"),
    "weight beyond float32": (dict(weight=[1.0, 1e39, 1.0, 1.0, 1.0]), ValueError, "weight[1] is 1e+39, expected a number that float32 can hold"),
    "weight dtype": (dict(weight=torch.ones(5, dtype=torch.int64)), TypeError, "weight has dtype torch.int64, expected one of"),
    "weight shape": (dict(weight=torch.ones(4)), ValueError, "weight has shape (4,), expected (5,), one per class"),
    "weight gradient": (dict(weight=torch.ones(5, requires_grad=True)), ValueError, "weight requires a gradient, expected a constant: only logits are differentiated"),
    "weight device": (dict(weight=torch.ones(5, device="meta")), ValueError, "weight is on meta, expected cpu like logits"),
    "pixel_weight dtype": (dict(pixel_weight=TARGET), TypeError, "pixel_weight has dtype torch.int64, expected one of"),
    "pixel_weight shape": (dict(pixel_weight=torch.ones(2, 6)), ValueError, "pixel_weight has shape (2, 6), expected (N, *spatial) = (2, 6, 7)"),
    "pixel_weight gradient": (dict(pixel_weight=torch.ones(2, 6, 7, requires_grad=True)), ValueError, "pixel_weight requires a gradient, expected a constant"),
    "pixel_weight device": (dict(pixel_weight=torch.ones(2, 6, 7, device="meta")), ValueError, "pixel_weight is on meta, expected cpu like logits"),
    "alpha": (dict(alpha=float("nan")), ValueError, "alpha is nan, expected a finite number"),
    "alpha huge": (dict(alpha=10**400), ValueError, f"alpha is {10**400}, expected a finite number"),
    "alpha string": (dict(alpha="1"), TypeError, "alpha is '1' (str), expected a number"),
    "alpha None": (dict(alpha=None), TypeError, "alpha is None (NoneType), expected a number"),
    "alpha bool": (dict(alpha=True), TypeError, "alpha is True (bool), expected a number"),
    "alpha NumPy bool": (dict(alpha=np.True_), TypeError, "(bool), expected a number"),
    "alpha complex": (dict(alpha=1j), TypeError, "alpha is 1j (complex), expected a number"),
    "alpha tensor": (dict(alpha=torch.ones(1)), TypeError, "alpha is tensor([1.]) (Tensor), expected a number"),
    "alpha gradient": (dict(alpha=torch.tensor(1.0, requires_grad=True)), ValueError, "alpha requires a gradient, expected a constant: only logits are differentiated"),
    "lambdas string": (dict(lambdas="0.5"), TypeError, "lambdas is '0.5' (str), expected a number"),
    "lambdas None": (dict(lambdas=None), TypeError, "lambdas is None (NoneType), expected a number"),
    "lambdas meta": (dict(lambdas=torch.tensor(0.5, device="meta")), TypeError, "lambdas is a meta tensor, expected a number"),
    "lambdas strings": (dict(lambdas=[0.5, "0.5", 0.5]), TypeError, "lambdas[1] is '0.5' (str), expected a number"),
    "lambdas bool": (dict(lambdas=[0.5, 0.5, False]), TypeError, "lambdas[2] is False (bool), expected a number"),
    "lambdas gradient": (dict(lambdas=torch.ones(3, requires_grad=True)), ValueError, "lambdas[0] requires a gradient, expected a constant"),
    "lambdas array": (dict(lambdas=np.ones((3, 1))), TypeError, "lambdas[0] is array([1.]) (ndarray), expected a number"),
    "inplace": (dict(inplace="no"), TypeError, "inplace is 'no' (str), expected a bool"),
    "return_components": (dict(return_components=1), TypeError, "return_components is 1 (int), expected a bool"),
    "align_corners": (dict(align_corners=None, upsample="bilinear"), TypeError, "align_corners is None (NoneType), expected a bool"),
    "align_corners alone": (dict(align_corners=True), ValueError, "align_corners is True, expected False: upsample is None"),
    "upsample": (dict(upsample="nearest"), ValueError, "upsample is 'nearest', expected one of None, 'bilinear'"),
    "upsample inplace": (dict(upsample="bilinear", inplace=True), ValueError, "inplace is True, expected False: with upsample='bilinear'"),
    "lambdas number": (dict(lambdas=[0.5, 0.5]), ValueError, "lambdas has 2 values, expected one, or 3 for 4 levels"),
    "lambdas sign": (dict(lambdas=-0.5), ValueError, "lambdas is -0.5, expected finite, non-negative numbers"),
    "reduction None": (dict(reduction=None), ValueError, "reduction is None, expected one of 'mean', 'sum', 'none'"),
    "reduction array": (dict(reduction=np.array(["mean", "sum"])), ValueError, "expected one of 'mean', 'sum', 'none'"),
    "reduction": (dict(reduction="max"), ValueError, "reduction is 'max', expected one of 'mean', 'sum', 'none'"),
    "factor_normalization": (dict(factor_normalization="max"), ValueError, "factor_normalization is 'max', expected one of 'mean', 'sum'"),
    "factor_scope": (dict(factor_scope="pixel"), ValueError, "factor_scope is 'pixel', expected one of 'image', 'batch'"),
    "gradient": (dict(gradient="true"), ValueError, "gradient is 'true', expected one of 'exact', 'paper'"),
    "backend": (dict(backend="gpu"), ValueError, "backend is 'gpu', expected one of 'auto', 'cpu', 'cuda', "),
    "backend device": (dict(backend="cuda"), ValueError, "backend is 'cuda', expected one of 'auto', 'cpu', "),
    "process_group": (dict(process_group="world"), TypeError, "process_group is 'world' (str), expected a ProcessGroup"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_arguments(name, backend):
    bad, exception, message = BAD[name]
    arguments = dict(logits=LOGITS, target=TARGET, hierarchy=HIERARCHY, backend=backend) | bad
    with pytest.raises(exception, match=re.escape(message)):
        importance_aware_loss(**arguments)


# The operators check what their kernels rely on, since users can call them directly.
OPERATOR = dict(logits=LOGITS, target=TARGET, weight=None, pixel_weight=None, class_levels=[1, 2, 3, 0, 1], ignore_index=255, gradient="exact", label_smoothing=0.0, inplace=False)  # fmt: skip
BAD_FOR_OPERATOR = {
    "rank": (dict(logits=torch.zeros(2)), ValueError, "logits has shape [2], expected (N, C, *spatial)"),
    "dtype": (dict(logits=LOGITS.long()), TypeError, "logits has dtype Long, expected float64, float32, float16 or bfloat16"),
    "classes": (dict(class_levels=[0, 0]), ValueError, "expected (N, C, *spatial) with C = 2 classes"),
    "no classes": (dict(class_levels=[]), ValueError, "expected (N, C, *spatial) with C = 0 classes"),
    "nothing": (dict(logits=LOGITS[:, :0], class_levels=[]), ValueError, "expected (N, C, *spatial) with C = 0 classes"),
    "levels": (dict(class_levels=[0, 1, 2, 3, -1]), ValueError, "class_levels has level -1, expected 0 to 4"),
    "many levels": (dict(class_levels=[0, 1, 2, 3, 5]), ValueError, "class_levels has level 5, expected 0 to 4"),
    "target": (dict(target=TARGET[0]), ValueError, "target has shape [6, 7], expected (N, *spatial) of logits [2, 5, 6, 7]"),
    "target dtype": (dict(target=TARGET.short()), TypeError, "target has dtype Short, expected int64, int32 or uint8"),
    "weight": (dict(weight=torch.ones(4)), ValueError, "weight has shape [4], expected (5,), one per class"),
    "weight dtype": (dict(weight=torch.ones(5).long()), TypeError, "weight has dtype Long, expected a floating type"),
    "pixel_weight": (dict(pixel_weight=torch.ones(6, 7)), ValueError, "pixel_weight has shape [6, 7], expected"),
    "pixel_weight dtype": (dict(pixel_weight=TARGET), TypeError, "pixel_weight has dtype Long, expected a floating type"),
    "gradient": (dict(gradient="true"), ValueError, "gradient is 'true', expected 'exact' or 'paper'"),
    "label_smoothing": (dict(label_smoothing=1.5), ValueError, "label_smoothing is 1.5, expected 0 to 1"),
}  # fmt: skip


# The Triton operators use the checks of the loss, whose messages differ.
DTYPES = "one of torch.float64, torch.float32, torch.float16, torch.bfloat16"
OF_TRITON = {
    "rank": "logits has shape (2,), expected (N, C, *spatial) with the C = 5 classes of hierarchy",
    "dtype": f"logits has dtype torch.int64, expected {DTYPES}",
    "classes": "logits has shape (2, 5, 6, 7), expected (N, C, *spatial) with the C = 2 classes of hierarchy",
    "no classes": "logits has shape (2, 5, 6, 7), expected (N, C, *spatial) with the C = 0 classes of hierarchy",
    "nothing": "class_levels is [], expected a level for each class",
    "target": "target has shape (6, 7), expected (N, *spatial) = (2, 6, 7) for logits (2, 5, 6, 7)",
    "target dtype": "target has dtype torch.int16, expected one of torch.int64, torch.int32, torch.uint8",
    "weight": "weight has shape (4,), expected (5,), one per class",
    "weight dtype": f"weight has dtype torch.int64, expected {DTYPES}",
    "pixel_weight": "pixel_weight has shape (6, 7), expected (N, *spatial) = (2, 6, 7)",
    "pixel_weight dtype": f"pixel_weight has dtype torch.int64, expected {DTYPES}",
    "gradient": "gradient is 'true', expected one of 'exact', 'paper'",
}


# Both libraries of operators check their arguments on every device.
LIBRARIES = [
    pytest.param(name, marks=pytest.mark.skipif(backends.get(name).missing is not None, reason=name))
    for name in ("cpu", "triton")
]


@pytest.mark.parametrize("backend", LIBRARIES)
@pytest.mark.parametrize("name", BAD_FOR_OPERATOR)
def test_bad_arguments_of_the_operator(name, backend):
    bad, exception, message = BAD_FOR_OPERATOR[name]
    if backend == "triton":
        message = OF_TRITON.get(name, message)
    with pytest.raises(exception, match=re.escape(message)):
        backends.get(backend).operators().reduce(**(OPERATOR | bad))


@pytest.mark.parametrize("backend", LIBRARIES)
def test_bad_sums(backend):
    ops = backends.get(backend).operators()
    rest = (TARGET, None, None, [1, 2, 3, 0, 1], 255, "exact", 0.0)
    double, single = ("torch.float64", "torch.float32") if backend == "triton" else ("Double", "Float")
    expected = rf"grad_stats has shape .*, expected \(2, 4, 5\) of {double}, contiguous, on cpu"
    for sums in (torch.zeros(2, 4, 4).double(), torch.zeros(2, 4, 5), torch.zeros(1, 4, 5).double()):
        with pytest.raises(ValueError, match=expected):
            ops.reduce_backward(LOGITS, sums, *rest)
    stats = torch.zeros(2, 4, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="lambdas has 2 values, expected 3 for 4 levels"):
        ops.combine(stats, None, [0.5, 0.5], 1.0, "mean", "mean", "image", torch.float32)
    with pytest.raises(ValueError, match=rf"stats has shape .* of {single}.*, expected \(.*5\) of {double}"):
        ops.combine(stats.float(), None, [0.5] * 3, 1.0, "mean", "mean", "image", torch.float32)
    with pytest.raises(ValueError, match=r"stats has shape .2, 0, 5. of .*, expected \(.*5\) of"):
        ops.combine(stats[:, :0], None, [], 1.0, "mean", "mean", "image", torch.float32)
    with pytest.raises(ValueError, match=r"grad_loss has shape .3,?., expected 2 value\(s\)"):
        ops.combine_backward(stats, torch.zeros(3), None, [0.5] * 3, 1.0, "none", "mean", "image")
    with pytest.raises(ValueError, match=r"divisor has shape .*, expected (one value|1 value\(s\)) of"):
        ops.combine(stats, torch.ones(2), [0.5] * 3, 1.0, "mean", "mean", "image", torch.float32)


# ---- numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", ["exact", "paper"])
@pytest.mark.parametrize("offset", [0.0, 1e5, 1e30])
def test_what_all_logits_share_costs_no_precision(backend, gradient, offset):
    """pi is 1/3 for three equal logits of any value, and f = lambda pi^2 / 2."""
    logits = torch.full((1, 3, 4, 4), offset, device=device_of(backend))
    target = torch.zeros(1, 4, 4, dtype=torch.int64, device=device_of(backend))
    hierarchy = Hierarchy([[0], [1, 2]])
    _, components = importance_aware_loss(
        logits, target, hierarchy, gradient=gradient, backend=backend, return_components=True
    )
    torch.testing.assert_close(components.f.item(), 0.5 * 0.5 / 9, rtol=1e-6, atol=0)


NUMBERS = [np.float32, np.float64, np.float16, np.array, torch.tensor, lambda x: torch.tensor(x).half()]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values[0] not in EMULATED])
def test_numbers_of_numpy_and_torch(backend, number):
    device = device_of(backend)
    logits, target = LOGITS.to(device), TARGET.to(device)

    def loss(**options):
        result = importance_aware_loss(logits, target, HIERARCHY, backend=backend, **options)
        criterion = ImportanceAwareLoss(HIERARCHY, backend=backend, **options)
        assert type(criterion.alpha) is float and type(criterion.ignore_index) is int
        assert torch.equal(criterion(logits, target), result)
        return result

    expected = loss(alpha=0.5, lambdas=0.25, ignore_index=255)
    integer = number(255).astype(int) if hasattr(number(255), "astype") else number(255).long()
    assert torch.equal(loss(alpha=number(0.5), lambdas=number(0.25), ignore_index=integer), expected)
    assert torch.equal(loss(alpha=number(0.5), lambdas=[number(0.25)] * 3), expected)
    for lambdas in (np.full(3, 0.25), torch.full((3,), 0.25), range(3), (1, 0, 2)):
        assert torch.equal(loss(lambdas=lambdas), loss(lambdas=[float(value) for value in lambdas]))
    assert torch.equal(loss(align_corners=np.False_), loss())


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values[0] in ("cpu", "reference")])
@pytest.mark.parametrize("hierarchy", [5, [[0, 1], [2, 3, 4]], HIERARCHY], ids=["int", "list", "hierarchy"])
def test_compiled_functions_take_what_eager_ones_take(backend, hierarchy):
    """torch 2.11 cannot trace `vars(x).update` or an `operator.index` that fails."""
    torch._dynamo.reset()

    def step(logits, target, alpha):
        options = dict(lambdas=[alpha] * 3 if hierarchy is HIERARCHY else 1, backend=backend)
        loss = importance_aware_loss(logits, target, hierarchy, weight=[1.0] * 5, alpha=alpha, **options)
        return loss + cross_entropy(
            logits, target.repeat(1, 2, 3), ignore_index=255, upsample="bilinear", backend=backend
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for alpha in (1.0, 0.5, 3.0):
        torch.testing.assert_close(compiled(LOGITS, TARGET, alpha), step(LOGITS, TARGET, alpha))


# ---- rows -----------------------------------------------------------------------------------------------


def test_rows_are_images_and_warn_once_per_line():
    logits, target = make_logits((30, 5), torch.float32), make_target((30,), 5)
    criterion = ImportanceAwareLoss(HIERARCHY)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            importance_aware_loss(logits, target, HIERARCHY)
            criterion(logits, target)
    assert len(caught) == 2 and {warning.filename for warning in caught} == {__file__}
    for warning in caught:
        assert "logits has shape (30, 5): each row is an image of one pixel" in str(warning.message)
        assert 'factor_scope="batch", or logits (1, C, M)' in str(warning.message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = importance_aware_loss(logits, target, HIERARCHY, factor_scope="batch")
        image = importance_aware_loss(logits.T[None], target[None], HIERARCHY)
        importance_aware_loss(logits, target, 5)
        importance_aware_loss(logits[:1], target[:1], HIERARCHY)
    torch.testing.assert_close(batch, image, rtol=1e-6, atol=0)


# ---- the choice of a backend ----------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch):
    """The backends of a machine. Each has a reason why it is missing, or None."""
    monkeypatch.setattr(backends, "_warned", set())
    devices = {"cpu": ("cpu",), "cuda": ("cuda",), "triton": ("cuda",)}

    def only(**reasons):
        changed = [
            dataclasses.replace(backends.get(name), devices=devices[name], missing=missing)
            for name, missing in reasons.items()
        ]
        return backends.only(*changed, backends.get("reference"))

    return only


def test_auto_takes_the_first_available_backend(registry):
    with registry(cpu=None, cuda="no nvcc", triton=None):
        assert backends.choose("auto", torch.device("cpu")).name == "cpu"
        assert backends.choose("auto", torch.device("cuda")).name == "triton"


def test_slow_fallback_warns_once_with_the_reason(registry, recwarn):
    with registry(cpu="no compiler was there; reinstall", triton=None):
        for _ in range(2):
            importance_aware_loss(LOGITS, TARGET, HIERARCHY)
        missing = r"backend is 'cpu', which is missing: no compiler was there; reinstall"
        with pytest.raises(RuntimeError, match=missing):
            importance_aware_loss(LOGITS, TARGET, HIERARCHY, backend="cpu")
    assert [str(w.message) for w in recwarn] == [
        "ial_cuda uses its slow reference in plain PyTorch on cpu (cpu: no compiler was there; reinstall)"
    ]


def test_triton_without_the_extension_warns_once(registry, recwarn):
    with registry(cuda="no nvcc; reinstall", triton=None):
        for _ in range(2):
            assert backends.choose("auto", torch.device("cuda")).name == "triton"
    (warning,) = recwarn
    assert "uses its Triton kernels on cuda (" in str(warning.message)
    assert "cuda: no nvcc; reinstall" in str(warning.message)


def test_other_devices_compute_with_the_reference(registry):
    message = r"uses its slow reference in plain PyTorch on xpu \(there are no kernels"
    with registry(cpu=None), pytest.warns(UserWarning, match=message):
        assert backends.choose("auto", torch.device("xpu")).name == "reference"


@pytest.mark.parametrize(("value", "one_launch"), [("", False), ("0", False), ("1", True)])
def test_the_environment_asks_for_one_launch(value, one_launch):
    question = "from ial_cuda import backends; print(backends.get('cuda').one_launch)"
    environment = os.environ | {"IAL_CUDA_ONE_LAUNCH": value}
    command = [sys.executable, "-c", question]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == str(one_launch)


def test_registered_backends_are_temporary():
    """The error for an unknown name lists the known ones, registered ones included."""
    mine = backends.Backend("mine", ("cpu",))
    with backends.only(mine, backends.get("reference")):
        assert torch.equal(
            importance_aware_loss(LOGITS, TARGET, HIERARCHY, backend="mine"),
            importance_aware_loss(LOGITS, TARGET, HIERARCHY, backend="reference"),
        )
    with pytest.raises(ValueError, match="backend is 'mine', expected one of 'auto', 'cpu', 'cuda', "):
        importance_aware_loss(LOGITS, TARGET, HIERARCHY, backend="mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(torch="1.0"), "the extension was built for torch 1.0 (CUDA"),
        (dict(torch_cuda="11.8"), "(CUDA 11.8), but torch"),
    ],
    ids=["torch", "cuda"],
)
def test_a_foreign_extension_is_not_loaded(change, message):
    build = dict(torch=torch.__version__, torch_cuda=torch.version.cuda, compiler="g++", warning=None)
    module, problem = extension._load(build | change)
    assert module is None and message in problem
    assert "pip install --no-build-isolation" in problem


@pytest.mark.parametrize(
    ("cuda", "build", "message"),
    [
        (None, {}, "is a build without CUDA; install a CUDA build, then reinstall"),
        ("13.0", {"warning": "no working nvcc was found"}, "no working nvcc was found"),
        ("13.0", {"warning": None}, "for lack of nvcc; to have them, reinstall"),
    ],
)
def test_why_there_are_no_cuda_kernels(monkeypatch, cuda, build, message):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert message in extension._why_no_cuda(build)


def test_info():
    text = backends.describe()
    assert torch.__version__ in text
    for name in backends.names():
        reason = backends.get(name).missing
        assert re.search(rf"^  {name} +{'no: ' + re.escape(reason) if reason else 'yes'}", text, re.MULTILINE)
    assert re.search(r'^backend="auto" on cpu: (cpu|reference)$', text, re.MULTILINE)


def test_flat_hierarchy_on_the_default_device():
    device = device_of("cpu")
    loss = importance_aware_loss(LOGITS.to(device), TARGET, Hierarchy.flat(5))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(LOGITS, TARGET, ignore_index=255))
