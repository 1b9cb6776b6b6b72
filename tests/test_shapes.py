"""Meta and fake tensors, through every function and module on every backend."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from cases import BACKENDS, HIERARCHY, NAMES, device_of
from torch._subclasses.fake_tensor import FakeTensorMode

from ial_cuda import (
    ImportanceAwareLoss,
    backends,
    cross_entropy,
    importance_aware_loss,
    validate_target,
)


def shapes(device, backend, **options):
    """The shapes and dtypes of all results, forward and backward, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        leaf = torch.ones(2, 5, 6, 7, device=device, requires_grad=True)
        target = torch.zeros(2, 6, 7, dtype=torch.uint8, device=device)
        weighted = dict(weight=[1.0] * 5, pixel_weight=torch.ones(2, 6, 7, device=device))
        validate_target(target, 5)
        loss, components = importance_aware_loss(
            leaf * 1, target, HIERARCHY, backend=backend, return_components=True, **weighted, **options
        )
        loss.sum().backward()
        criterion = ImportanceAwareLoss(HIERARCHY, np.ones(5), backend=backend, **options).to(device)
        again = criterion(leaf * 1, target)
        assert again.shape == loss.shape
        again.sum().backward()
        if not options.get("inplace"):
            fine = torch.zeros(2, 11, 13, dtype=torch.int64, device=device)
            cross_entropy(leaf, fine, np.ones(5), upsample="bilinear", backend=backend).backward()
    assert leaf.grad.device.type == loss.device.type == device
    return [tuple(tensor.shape) for tensor in (loss, leaf.grad, *components)], loss.dtype


TRACED = [name for name in NAMES if not name.startswith("simt")]  # those have no fakes
OPTIONS = [{}, dict(reduction="none"), dict(factor_scope="batch"), dict(inplace=True)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", ["auto", *TRACED])
def test_shapes_of_meta_tensors(backend, options):
    expected = shapes("cpu", "reference", **options)
    assert shapes("meta", backend, **options) == expected
    with torch.device("meta"):
        assert shapes("meta", backend, **options) == expected


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("backend", ["auto", *[b for b in BACKENDS if b.values[0] in TRACED]])
def test_shapes_of_fake_tensors(backend, options):
    device = "cpu" if backend == "auto" else device_of(backend)
    expected = shapes("cpu", "reference", **options)
    with FakeTensorMode():
        assert shapes(device, backend, **options) == expected
    with torch.device("meta"):
        assert shapes(device, backend, **options) == expected, "real tensors while the default device is meta"


def test_shapes_without_the_extension():
    cpu = dataclasses.replace(backends.get("cpu"), missing="no compiler")
    with backends.only(cpu, backends.get("reference")):
        assert shapes("meta", "auto") == shapes("cpu", "reference")
