"""The public face: arguments and their errors, the module, the choice of a backend, what `info` says."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from cases import GPU_KERNELS, HIERARCHY, device_of, make_logits, make_target

from ial_cuda import (
    CAMVID,
    CITYSCAPES,
    Hierarchy,
    ImportanceAwareLoss,
    _ops,
    importance_aware_loss,
    reference,
    validate_target,
)
from ial_cuda import loss as loss_module

LOGITS, TARGET = make_logits((2, 5, 6, 7), torch.float32), make_target((2, 6, 7), 5)


def bad_label(value, dtype=torch.int64):
    target = TARGET.clone().to(dtype)
    target[0, 2, 3] = value
    target[1, 5, 6] = value
    return target


# (arguments over the good ones, exception, the message)
BAD = {
    "logits type": (dict(logits=[1.0]), TypeError, "logits is a list, expected a torch.Tensor"),
    "logits dtype": (dict(logits=LOGITS.long()), TypeError, "logits has dtype torch.int64, expected one of torch.float64, torch.float32, torch.float16, torch.bfloat16"),
    "logits rank": (dict(logits=LOGITS[:, 0, 0, 0]), ValueError, "logits has shape (2,), expected (N, C, *spatial) with the C = 5 classes of hierarchy"),
    "logits classes": (dict(logits=LOGITS[:, :4]), ValueError, "logits has shape (2, 4, 6, 7), expected (N, C, *spatial) with the C = 5 classes of hierarchy"),
    "target type": (dict(target=1), TypeError, "target is a int, expected a torch.Tensor"),
    "target dtype": (dict(target=TARGET.float()), TypeError, "target has dtype torch.float32, expected one of torch.int64, torch.int32, torch.uint8"),
    "target bool": (dict(target=TARGET > 3), TypeError, "target has dtype torch.bool, expected one of"),
    "target shape": (dict(target=TARGET[:, :5]), ValueError, "target has shape (2, 5, 7), expected (N, *spatial) = (2, 6, 7) for logits (2, 5, 6, 7)"),
    "target one-hot": (dict(target=torch.zeros(2, 5, 6, 7, dtype=torch.int64)), ValueError, "target has shape (2, 5, 6, 7), expected (N, *spatial) = (2, 6, 7)"),
    "target device": (dict(target=TARGET.to("meta")), ValueError, "target is on meta, expected cpu like logits"),
    "label high": (dict(target=bad_label(5)), ValueError, "target has label 5 at (0, 2, 3), the first of 2 bad pixels, expected labels 0 to 4 or ignore_index=255"),
    "label negative": (dict(target=bad_label(-1)), ValueError, "target has label -1 at (0, 2, 3), the first of 2 bad pixels"),
    "label huge": (dict(target=bad_label(2**40)), ValueError, "target has label 1099511627776 at (0, 2, 3), the first of 2 bad pixels"),
    "label beyond 32 bits": (dict(target=bad_label(2**32 + 1)), ValueError, "target has label 4294967297 at (0, 2, 3), the first of 2 bad pixels"),
    "label uint8": (dict(target=bad_label(254, torch.uint8)), ValueError, "target has label 254 at (0, 2, 3), the first of 2 bad pixels"),
    "label int32": (dict(target=bad_label(-7, torch.int32)), ValueError, "target has label -7 at (0, 2, 3), the first of 2 bad pixels"),
    "other ignore_index": (dict(ignore_index=-100), ValueError, "expected labels 0 to 4 or ignore_index=-100"),
    "ignore_index type": (dict(ignore_index=0.5), TypeError, "ignore_index is 0.5 (float), expected an integer"),
    "hierarchy": (dict(hierarchy=[[0, 1, 2, 3, 4]]), TypeError, "hierarchy is a list, expected an ial_cuda.Hierarchy"),
    "weight type": (dict(weight=[1.0] * 5), TypeError, "weight is a list, expected a torch.Tensor"),
    "weight dtype": (dict(weight=torch.ones(5, dtype=torch.int64)), TypeError, "weight has dtype torch.int64, expected one of"),
    "weight shape": (dict(weight=torch.ones(4)), ValueError, "weight has shape (4,), expected (5,), one per class"),
    "weight gradient": (dict(weight=torch.ones(5, requires_grad=True)), ValueError, "weight requires a gradient, expected a constant: only logits are differentiated"),
    "weight device": (dict(weight=torch.ones(5, device="meta")), ValueError, "weight is on meta, expected cpu like logits"),
    "pixel_weight dtype": (dict(pixel_weight=TARGET), TypeError, "pixel_weight has dtype torch.int64, expected one of"),
    "pixel_weight shape": (dict(pixel_weight=torch.ones(2, 6)), ValueError, "pixel_weight has shape (2, 6), expected (N, *spatial) = (2, 6, 7)"),
    "pixel_weight gradient": (dict(pixel_weight=torch.ones(2, 6, 7, requires_grad=True)), ValueError, "pixel_weight requires a gradient, expected a constant"),
    "pixel_weight device": (dict(pixel_weight=torch.ones(2, 6, 7, device="meta")), ValueError, "pixel_weight is on meta, expected cpu like logits"),
    "alpha": (dict(alpha=float("nan")), ValueError, "alpha is nan, expected a finite number"),
    "lambdas number": (dict(lambdas=[0.5, 0.5]), ValueError, "lambdas has 2 values, expected one, or 3 for 4 levels"),
    "lambdas sign": (dict(lambdas=-0.5), ValueError, "lambdas is -0.5, expected finite numbers from 0"),
    "reduction": (dict(reduction="max"), ValueError, "reduction is 'max', expected one of 'mean', 'sum', 'none'"),
    "factor_normalization": (dict(factor_normalization="max"), ValueError, "factor_normalization is 'max', expected one of 'mean', 'sum'"),
    "factor_scope": (dict(factor_scope="pixel"), ValueError, "factor_scope is 'pixel', expected one of 'image', 'batch'"),
    "gradient": (dict(gradient="true"), ValueError, "gradient is 'true', expected one of 'exact', 'paper'"),
    "backend": (dict(backend="gpu"), ValueError, "backend is 'gpu', expected one of 'auto', 'cpu', 'cuda', 'fused', 'triton', 'reference'"),
    "backend device": (dict(backend="cuda"), ValueError, "backend is 'cuda', expected one of 'auto', 'cpu', 'reference'"),
    "process_group": (dict(process_group=object()), NotImplementedError, "process_group is not None"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_arguments(name, backend):
    bad, exception, message = BAD[name]
    arguments = dict(logits=LOGITS, target=TARGET, hierarchy=HIERARCHY, backend=backend) | bad
    with pytest.raises(exception, match=re.escape(message)):
        importance_aware_loss(**arguments)


# The operators check for themselves what their kernels rely on, since anyone can call them.
OPERATOR = dict(logits=LOGITS, target=TARGET, weight=None, pixel_weight=None, class_levels=[1, 2, 3, 0, 1], ignore_index=255, gradient="exact", inplace=False)  # fmt: skip
BAD_FOR_OPERATOR = {
    "rank": (dict(logits=torch.zeros(2)), ValueError, "logits has shape [2], expected (N, C, *spatial)"),
    "dtype": (dict(logits=LOGITS.long()), TypeError, "logits has dtype Long, expected float64, float32, float16 or bfloat16"),
    "classes": (dict(class_levels=[0, 0]), ValueError, "expected (N, C, *spatial) with C = 2 classes"),
    "no classes": (dict(class_levels=[]), ValueError, "expected (N, C, *spatial) with C = 0 classes"),
    "levels": (dict(class_levels=[0, 1, 2, 3, -1]), ValueError, "class_levels has level -1, expected 0 to 4"),
    "many levels": (dict(class_levels=[0, 1, 2, 3, 5]), ValueError, "class_levels has level 5, expected 0 to 4"),
    "target": (dict(target=TARGET[0]), ValueError, "target has shape [6, 7], expected (N, *spatial) of logits [2, 5, 6, 7]"),
    "target dtype": (dict(target=TARGET.short()), TypeError, "target has dtype Short, expected int64, int32 or uint8"),
    "weight": (dict(weight=torch.ones(4)), ValueError, "weight has shape [4], expected (5,), one per class"),
    "weight dtype": (dict(weight=torch.ones(5).long()), TypeError, "weight has dtype Long, expected a floating type"),
    "pixel_weight": (dict(pixel_weight=torch.ones(6, 7)), ValueError, "pixel_weight has shape [6, 7], expected"),
    "pixel_weight dtype": (dict(pixel_weight=TARGET), TypeError, "pixel_weight has dtype Long, expected a floating type"),
    "gradient": (dict(gradient="true"), ValueError, "gradient is 'true', expected 'exact' or 'paper'"),
}  # fmt: skip


# The two libraries of operators check before they come to a device.
LIBRARIES = [
    pytest.param(name, marks=pytest.mark.skipif(_ops.unavailable[name] is not None, reason=name))
    for name in ("cpu", "triton")
]


@pytest.mark.parametrize("backend", LIBRARIES)
@pytest.mark.parametrize("name", BAD_FOR_OPERATOR)
def test_bad_arguments_of_the_operator(name, backend):
    bad, exception, message = BAD_FOR_OPERATOR[name]
    with pytest.raises(exception, match=re.escape(message)):
        _ops.operators(backend).reduce(**(OPERATOR | bad))


@pytest.mark.parametrize("backend", LIBRARIES)
def test_bad_tables_and_stats(backend):
    ops = _ops.operators(backend)
    rest = (TARGET, None, None, [1, 2, 3, 0, 1], 255, "exact")
    for table in (torch.zeros(2, 4, 4).double(), torch.zeros(2, 4, 5), torch.zeros(1, 4, 5).double()):
        with pytest.raises(ValueError, match=r"table has shape .*, expected \(2, 4, 5\) of Double"):
            ops.gradient(LOGITS, table, *rest)
    stats = torch.zeros(2, 4, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="lambdas has 2 values, expected 3 for 4 levels"):
        ops.combine(stats, [0.5, 0.5], 1.0, "mean", "mean", "image", torch.float32)
    with pytest.raises(ValueError, match=r"stats has shape .* of Float, expected"):
        ops.combine(stats.float(), [0.5] * 3, 1.0, "mean", "mean", "image", torch.float32)
    with pytest.raises(ValueError, match=r"grad_loss has shape \[3\], expected 2 value"):
        ops.table(stats, torch.zeros(3), [0.5] * 3, 1.0, "none", "mean", "image")


def test_validate_target():
    validate_target(TARGET, 5)
    validate_target(torch.tensor([0, 4, -1]), 5, ignore_index=-1)
    with pytest.raises(
        ValueError, match=re.escape("target has label 5 at (0, 2, 3), the first of 2 bad pixels")
    ):
        validate_target(bad_label(5), 5)


@pytest.mark.parametrize("backend", GPU_KERNELS)
def test_bad_labels_on_a_gpu(backend, monkeypatch):
    logits, target = LOGITS.cuda().requires_grad_(), bad_label(5).cuda()
    loss = importance_aware_loss(logits, target, HIERARCHY, backend=backend)
    assert loss.isnan()
    loss.backward()
    assert importance_aware_loss(logits, TARGET.cuda(), HIERARCHY, backend=backend).isfinite(), (
        "context alive"
    )
    monkeypatch.setenv("IAL_CUDA_DEBUG", "1")
    with pytest.raises(ValueError, match="target has label 5 at"):
        importance_aware_loss(logits, target, HIERARCHY, backend=backend)


def test_reference_leaves_bad_labels_out_and_says_nan():
    """What a CUDA tensor gets; on the CPU the public function raises before it comes to that."""
    logits = LOGITS.clone().requires_grad_()
    loss, *_ = reference.importance_aware_loss(logits, bad_label(5), HIERARCHY, lambdas=(0.5,) * 3)
    assert loss.isnan()


# ---- the module -----------------------------------------------------------------------------------------


def test_module_is_the_function():
    weight, pixel_weight = torch.rand(5), torch.rand(2, 6, 7)
    options = dict(alpha=0.5, lambdas=[0.1, 0.2, 0.3], ignore_index=3, reduction="none", factor_scope="batch")
    with pytest.warns(
        UserWarning, match="ignore_index is 3, a class of the hierarchy: its pixels are left out"
    ):
        criterion = ImportanceAwareLoss(HIERARCHY, weight, **options)
    target = TARGET.where(TARGET != 255, 3)
    expected = importance_aware_loss(
        LOGITS, target, HIERARCHY, weight=weight, pixel_weight=pixel_weight, **options
    )
    assert torch.equal(criterion(LOGITS, target, pixel_weight), expected)
    for other in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert torch.equal(other(LOGITS, target, pixel_weight), expected)


def test_module_keeps_its_weight():
    criterion = ImportanceAwareLoss(CAMVID, torch.arange(11.0))
    assert list(criterion.state_dict()) == ["weight"]
    assert criterion.double().weight.dtype == torch.float64
    assert "11 classes, 4 levels" in repr(criterion) and "reduction='mean'" in repr(criterion)
    assert ImportanceAwareLoss(CAMVID).state_dict() == {}


@pytest.mark.parametrize(
    ("bad", "exception", "message"),
    [
        (dict(hierarchy="camvid"), TypeError, "hierarchy is a str, expected an ial_cuda.Hierarchy"),
        (dict(weight=torch.ones(3)), ValueError, "weight has shape (3,), expected (5,), one per class"),
        (dict(reduction="max"), ValueError, "reduction is 'max', expected one of"),
        (dict(lambdas=[1.0]), ValueError, "lambdas has 1 values, expected one, or 3 for 4 levels"),
        (dict(ignore_index="void"), TypeError, "ignore_index is 'void' (str), expected an integer"),
        (dict(beta=1.0), TypeError, "unexpected keyword argument 'beta'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_options_are_found_at_construction(bad, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        ImportanceAwareLoss(**(dict(hierarchy=HIERARCHY) | bad))


def test_components():
    loss, components = importance_aware_loss(
        LOGITS.clone().requires_grad_(),
        TARGET,
        HIERARCHY,
        alpha=0.25,
        reduction="none",
        return_components=True,
    )
    f, F, S, count = components
    assert [tuple(value.shape) for value in components] == [(2, 3), (2, 3), (2, 4), (2, 4)]
    assert not any(value.requires_grad for value in components)
    torch.testing.assert_close(F, f + 0.25, rtol=0, atol=0)
    assert count.sum() == (TARGET != 255).sum()
    chain = S[:, 3]
    for k in (2, 1, 0):
        chain = S[:, k] + F[:, k] * chain  # Eqs. 5 to 8
    torch.testing.assert_close(loss.detach(), chain)


# ---- the choice of a backend ----------------------------------------------------------------------------


def test_auto_takes_the_first_that_is_there(monkeypatch):
    there = {"cpu": None, "cuda": "x", "fused": "x", "triton": None, "reference": None}
    monkeypatch.setattr(_ops, "unavailable", there)
    assert loss_module._choose_backend("auto", torch.device("cpu")) == "cpu"
    assert loss_module._choose_backend("auto", torch.device("cuda")) == "triton"


def test_slow_fallback_warns_once_with_the_reason(monkeypatch, recwarn):
    monkeypatch.setitem(_ops.unavailable, "cpu", "no compiler was there; reinstall")
    monkeypatch.setattr(loss_module, "_warned", set())
    for _ in range(2):
        importance_aware_loss(LOGITS, TARGET, HIERARCHY)
    assert [str(w.message) for w in recwarn] == [
        "ial_cuda computes on cpu with its slow reference, in plain PyTorch (cpu: no compiler was there; reinstall)"
    ]
    with pytest.raises(
        RuntimeError, match=r"backend is 'cpu', which is not there: no compiler was there; reinstall"
    ):
        importance_aware_loss(LOGITS, TARGET, HIERARCHY, backend="cpu")


def test_triton_without_the_extension_warns_once(monkeypatch, recwarn):
    monkeypatch.setattr(
        _ops,
        "unavailable",
        _ops.unavailable | {"cuda": "no nvcc; reinstall", "triton": None, "fused": "no nvcc"},
    )
    monkeypatch.setattr(loss_module, "_warned", set())
    for _ in range(2):
        assert loss_module._choose_backend("auto", torch.device("cuda")) == "triton"
    (warning,) = recwarn
    assert "computes on cuda with its Triton kernels (" in str(warning.message)
    assert "cuda: no nvcc; reinstall" in str(warning.message)


def test_other_devices_compute_with_the_reference(monkeypatch):
    monkeypatch.setattr(loss_module, "_warned", set())
    with pytest.warns(UserWarning, match="computes on xpu with its slow reference"):
        assert loss_module._choose_backend("auto", torch.device("xpu")) == "reference"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(torch="1.0"), "the extension was built for torch 1.0 (CUDA"),
        (dict(torch_cuda="11.8"), "(CUDA 11.8), but torch"),
        (dict(compiler=None, warning="built without a compiler"), "built without a compiler"),
    ],
    ids=["torch", "cuda", "no compiler"],
)
def test_a_foreign_extension_is_not_loaded(change, message):
    build = dict(torch=torch.__version__, torch_cuda=torch.version.cuda, compiler="g++", warning=None)
    module, problem = _ops._load(build | change)
    assert module is None and message in problem
    assert "compiler" in message or "pip install --no-build-isolation" in problem


@pytest.mark.parametrize(
    ("cuda", "build", "message"),
    [
        (None, {}, "is a build without CUDA; install one with it, then reinstall"),
        ("13.0", {"warning": "no working nvcc was found"}, "no working nvcc was found"),
        ("13.0", {"warning": None}, "the extension was built without the CUDA kernels; reinstall"),
    ],
)
def test_why_there_are_no_cuda_kernels(monkeypatch, cuda, build, message):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert message in _ops._why_no_cuda(build)


def test_info():
    text = _ops.describe()
    assert torch.__version__ in text
    for backend, reason in _ops.unavailable.items():
        assert re.search(
            rf"^  {backend} +{'no: ' + re.escape(reason) if reason else 'yes'}", text, re.MULTILINE
        )
    assert re.search(r'^backend="auto" on cpu: (cpu|reference)$', text, re.MULTILINE)


def test_presets_train():
    """The ten lines of the README."""
    torch.manual_seed(0)
    model = torch.nn.Conv2d(3, 19, 3, padding=1)
    criterion = ImportanceAwareLoss(CITYSCAPES, weight=torch.ones(19))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    images, labels = torch.randn(2, 3, 16, 32), make_target((2, 16, 32), 19)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_flat_hierarchy_on_the_default_device():
    device = device_of("cpu")
    loss = importance_aware_loss(LOGITS.to(device), TARGET, Hierarchy.flat(5))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(LOGITS, TARGET, ignore_index=255))
