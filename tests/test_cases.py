"""Tests of cases.py: tensors keep their values, strides and offsets when they move to a device."""

from __future__ import annotations

import cases
import pytest
import torch
from test_oracle import LAYOUTS

from ial_cuda import functional


class Handed(Exception):
    """Raised to end the call, since there are no kernels for meta tensors."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_offsets_survive_the_way_to_a_device(layout, monkeypatch):
    """On "meta", which represents a GPU. `Tensor.to` makes most layouts dense."""
    logits = LAYOUTS[layout](lambda *shape: cases.make_logits(shape, torch.float32))
    target = LAYOUTS[layout](lambda *shape: cases.make_target(shape, 5))[:, 1]
    pixel_weight = LAYOUTS[layout](lambda *shape: torch.rand(shape))[:, 2]
    weight = torch.rand(10)[::2]
    handed = []

    def remember(logits, target, weight, pixel_weight, *_):
        handed.extend([logits, target, pixel_weight, weight])
        raise Handed

    monkeypatch.setattr(cases, "device_of", lambda backend: "meta")
    monkeypatch.setattr(functional, "compute_loss", remember)
    with pytest.raises(Handed):
        cases.run("cuda", logits, target, weight=weight, pixel_weight=pixel_weight)
    for tensor, given in zip(handed, (logits, target, pixel_weight, weight), strict=True):
        assert tensor.is_meta and tensor.shape == given.shape and tensor.dtype == given.dtype
        assert tensor.stride() == given.stride()
        assert tensor.storage_offset() == given.storage_offset()
    assert handed[0].requires_grad


def test_values_survive_it_too():
    whole = torch.arange(24.0).view(2, 3, 4)
    for tensor in (whole, whole[..., 1::2], whole.transpose(0, 2), whole[:1].expand(2, 3, 4), whole[:0]):
        moved = cases.move(tensor, "cpu")
        assert torch.equal(moved, tensor) and moved.stride() == tensor.stride()
