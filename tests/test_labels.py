"""Bad labels on every backend, for every integer dtype, compiled, exported and under vmap."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
import torch
import torch._dynamo
from cases import BACKENDS, GPU_KERNELS, HIERARCHY, check, device_of, make_logits, make_target
from test_loss import LOGITS, TARGET, bad_label

from ial_cuda import (
    CAMVID,
    Hierarchy,
    ImportanceAwareLoss,
    cross_entropy,
    importance_aware_loss,
    reference,
    validate_target,
    validation,
)
from ial_cuda.options import Options


def test_validate_target():
    validate_target(TARGET, 5)
    validate_target(torch.tensor([0, 4, -1]), 5, ignore_index=-1)
    with pytest.raises(
        ValueError, match=re.escape("target has label 5 at (0, 2, 3), the first of 2 bad pixels")
    ):
        validate_target(bad_label(5), 5)


UNSIGNED = [torch.uint8, torch.uint16, torch.uint32, torch.uint64]
INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, *UNSIGNED]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_validate_target_of_every_integer(dtype):
    """Labels and ignore_index at the limits of a dtype, and pairs that are equal after wrapping."""
    limits = torch.iinfo(dtype)
    numbers = {limits.min, limits.min + 1, limits.max - 1, limits.max, 0, 1, 70, 127, 156, 255, -100, -1}
    labels = [n for n in numbers if limits.min <= n <= limits.max]
    ignored = [n for n in (*numbers, *(n + limits.max + 1 - limits.min for n in labels)) if abs(n) < 2**63]
    assert any(n not in range(limits.min, limits.max + 1) for n in ignored) or dtype == torch.int64
    for label, ignore_index, classes in itertools.product(labels, ignored, (1, 100, 300, 70000)):
        target = torch.tensor([[0, label]], dtype=dtype)
        if 0 <= label < classes or label == ignore_index:
            validate_target(target, classes, ignore_index)
        else:
            with pytest.raises(
                ValueError, match=re.escape(f"target has label {label} at (0, 1), the first of 1")
            ):
                validate_target(target, classes, ignore_index)


def test_validate_target_of_bools_and_of_large_uint64():
    validate_target(torch.tensor([True, False]), 2)
    with pytest.raises(ValueError, match=re.escape("target has label 1 at (0,), the first of 1 bad pixels")):
        validate_target(torch.tensor([True, False]), 1)
    # As int64 that is -100.
    target = torch.tensor([2**64 - 100], dtype=torch.uint64)
    with pytest.raises(ValueError, match=f"target has label {2**64 - 100} at"):
        validate_target(target, 5, ignore_index=-100)


@pytest.mark.parametrize(
    ("bad", "exception", "message"),
    [
        (dict(target=[1]), TypeError, "target is a list, expected a torch.Tensor"),
        (
            dict(target=TARGET.float()),
            TypeError,
            "target has dtype torch.float32, expected one of torch.int64, ",
        ),
        (
            dict(target=TARGET.float()),
            TypeError,
            "torch.uint64: class indices only; torch.nn.functional.cross_entropy takes probabilities",
        ),
        (dict(target=TARGET + 1j), TypeError, "target has dtype torch.complex64, expected one of"),
        (dict(num_classes=0), ValueError, "num_classes is 0, expected a positive 64-bit integer"),
        (dict(num_classes=5.0), TypeError, "num_classes is 5.0 (float), expected an integer"),
        (dict(ignore_index="255"), TypeError, "ignore_index is '255' (str), expected an integer"),
        (
            dict(ignore_index=2**63),
            ValueError,
            "ignore_index is 9223372036854775808, expected a 64-bit integer",
        ),
        (
            dict(num_classes=256),
            ValueError,
            "ignore_index is None, which means 255, but 255 is one of the 256 classes",
        ),
    ],
)
def test_bad_arguments_of_validate_target(bad, exception, message):
    with pytest.raises(exception, match=re.escape(message)):
        validate_target(**(dict(target=TARGET, num_classes=5) | bad))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "classes", "ignore_index"),
    [
        (torch.uint8, 157, -100),  # 156 as uint8
        (torch.uint8, 157, 2**8 + 3),
        (torch.uint8, 157, 2**32 + 3),
        (torch.uint8, 300, -100),  # 300 as uint8 is 44
        (torch.uint8, 300, 3),
        (torch.int32, 157, 2**32 + 3),
        (torch.int32, 157, -(2**32) + 3),
        (torch.int64, 157, 2**32 + 3),
    ],
    ids=str,
)
def test_labels_are_not_compared_modulo_their_dtype(backend, dtype, classes, ignore_index):
    target = make_target((1, 4, 80), min(classes, 256), ignored=0.0, dtype=dtype)
    target[0, 0, :8] = torch.tensor([3, 44, 69, 70, 99, 155, 156, 0], dtype=dtype)
    hierarchy = Hierarchy([range(100), range(100, classes)])
    check(
        backend, make_logits((1, classes, 4, 80), torch.float32), target, hierarchy, ignore_index=ignore_index
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_255_is_no_default_where_it_is_a_class(backend):
    device = device_of(backend)
    logits, target = (
        make_logits((1, 256, 8), torch.float32).to(device),
        torch.full((1, 8), 255, device=device),
    )
    message = "ignore_index is None, which means 255, but 255 is one of the 256 classes: expected the label"
    with pytest.raises(ValueError, match=message):
        importance_aware_loss(logits, target, 256, backend=backend)
    with pytest.raises(ValueError, match=message):
        ImportanceAwareLoss(256, backend=backend)
    with pytest.raises(ValueError, match=message):
        reference.importance_aware_loss(logits, target, Options(Hierarchy.flat(256)))
    coarse = logits[..., None]
    expected = torch.nn.functional.cross_entropy(logits, target)
    for ignore_index in (-100, np.int64(-100), torch.tensor(-100)):
        loss = importance_aware_loss(logits, target, 256, ignore_index=ignore_index, backend=backend)
        torch.testing.assert_close(loss, expected)
    loss = cross_entropy(coarse, target[..., None], upsample="bilinear", backend=backend)
    torch.testing.assert_close(loss, expected)
    assert importance_aware_loss(logits, target, 256, ignore_index=255, backend=backend) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_void_label_is_the_hierarchys(backend):
    device = device_of(backend)
    logits, target = make_logits((1, 11, 4, 8), torch.float32), make_target((1, 4, 8), 11, ignore_index=11)
    logits, target = logits.to(device), target.to(device)
    expected = importance_aware_loss(logits, target, CAMVID.levels, ignore_index=11, backend=backend)
    for hierarchy in ("camvid", CAMVID, CAMVID.to_dict()):
        assert torch.equal(importance_aware_loss(logits, target, hierarchy, backend=backend), expected)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values[0] in ("cpu", "reference")])
def test_compiled_code_finds_bad_labels(backend):
    torch._dynamo.reset()

    def step(logits, target):
        return importance_aware_loss(logits, target, HIERARCHY, backend=backend)

    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(LOGITS, TARGET), step(LOGITS, TARGET))
    with pytest.raises(ValueError, match="target has label 5 at"):
        compiled(LOGITS, bad_label(5))


def test_compiled_code_validates_targets():
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager")
    def step(target):
        validate_target(target, 5)
        return target + 1

    assert torch.equal(step(TARGET), TARGET + 1)
    with pytest.raises(ValueError, match="target has label 5 at"):
        step(bad_label(5))


def test_vmap_checks_labels():
    """The check is an operator, so vmap can batch it."""

    def loss(logits, target):
        validate_target(target, 5)
        return importance_aware_loss(logits[None], target[None], HIERARCHY, backend="reference")

    grads = torch.func.vmap(torch.func.grad(loss))(LOGITS, TARGET)
    for logits, target, grad in zip(LOGITS, TARGET, grads, strict=True):
        leaf = logits.clone().requires_grad_()
        loss(leaf, target).backward()
        torch.testing.assert_close(grad, leaf.grad)
    torch.func.vmap(torch.func.grad(loss), in_dims=(0, None))(LOGITS, TARGET[0])
    for function in (loss, lambda _, target: validate_target(target, 5)):
        with pytest.raises(ValueError, match="target has label 5 at"):
            torch.func.vmap(function)(LOGITS, bad_label(5))


def test_opcheck_of_the_check():
    torch.library.opcheck(validation.checked_target, (TARGET, 5, 255))
    torch.library.opcheck(validation.checked_target, (TARGET.mT.to(torch.uint8), 5, 255))


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
    """The result for a CUDA tensor. On the CPU the public function raises first."""
    logits = LOGITS.clone().requires_grad_()
    loss, *_ = reference.importance_aware_loss(logits, bad_label(5), Options(HIERARCHY))
    assert loss.isnan()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.values[0] in ("cpu", "reference")])
@pytest.mark.parametrize("upsample", [None, "bilinear"])
def test_export_with_a_batch_of_any_size(backend, upsample):
    criterion = ImportanceAwareLoss(HIERARCHY, np.ones(5), backend=backend, upsample=upsample)
    images = torch.export.Dim("images", min=1, max=64)
    shapes = {"logits": {0: images}, "target": {0: images}, "pixel_weight": None}
    program = torch.export.export(criterion, (LOGITS, TARGET, None), dynamic_shapes=shapes).module()
    logits, target = LOGITS.repeat(3, 1, 1, 1), TARGET.repeat(3, 1, 1)
    torch.testing.assert_close(program(logits, target, None), criterion(logits, target))
    with pytest.raises(ValueError, match="target has label 5 at"):
        program(LOGITS, bad_label(5), None)
