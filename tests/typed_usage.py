"""Documented usage for type checkers: test_typing.py runs mypy on it. Undetected mistakes fail the test."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import assert_type

import ial_cuda
from ial_cuda import (
    CAMVID,
    Components,
    CrossEntropyLoss,
    Hierarchy,
    ImportanceAwareLoss,
    importance_aware_loss,
)


def functions(logits: Tensor, labels: Tensor, flag: bool) -> None:
    loss = importance_aware_loss(logits, labels, CAMVID)
    loss.backward()
    importance_aware_loss(logits, labels, [[0], [1, 2]], alpha=np.float32(0.5), lambdas=[0.1]).backward()
    importance_aware_loss(logits, labels, "camvid", weight=[1.0, 2.0], upsample="bilinear").backward()
    importance_aware_loss(logits, labels, 3, weight=np.ones(3), alpha=torch.tensor(1.0)).backward()
    importance_aware_loss(logits, labels, 3, return_components=False).backward()
    assert_type(importance_aware_loss(logits, labels, CAMVID, return_components=False), Tensor)
    both = importance_aware_loss(logits, labels, CAMVID, return_components=True)
    assert_type(both, tuple[Tensor, Components])
    loss, components = both
    parts: Components = components
    parts.f.mean().item()
    either = importance_aware_loss(logits, labels, CAMVID, return_components=flag)
    assert_type(either, Tensor | tuple[Tensor, Components])
    either.backward()  # type: ignore[union-attr]
    ial_cuda.cross_entropy(logits, labels, [1.0, 2.0], 255, "sum", divisor=torch.tensor(3)).backward()
    ial_cuda.validate_target(labels, 11)
    importance_aware_loss(logits, labels, CAMVID, reduction="avg")  # type: ignore[call-overload]
    importance_aware_loss(logits, labels, CAMVID, lambdas="0.5")  # type: ignore[arg-type]
    importance_aware_loss(logits, labels, CAMVID, factor_scop="batch")  # type: ignore[call-overload]
    ial_cuda.cross_entropy(logits, labels, backend="gpu")  # type: ignore[arg-type]


def processes(logits: Tensor, labels: Tensor, group: ProcessGroup, mesh: DeviceMesh) -> None:
    importance_aware_loss(logits, labels, CAMVID, process_group=mesh["data"], spatial_group=group).backward()
    criterion = CrossEntropyLoss(process_group=group)
    criterion.spatial_group = mesh["rows"]
    criterion.process_group = None
    ial_cuda.median_frequency_weights(labels, 3, process_group=group)
    importance_aware_loss(logits, labels, CAMVID, process_group="world")  # type: ignore[call-overload]


def modules(logits: Tensor, labels: Tensor) -> None:
    criterion = ImportanceAwareLoss(
        Hierarchy([[0], [1, 2]], names=["sky", "road", "car"]), weight=[1.0, 1.0, 2.0]
    )
    criterion(logits, labels, divisor=12).backward()
    criterion.ignore_index = None
    index: int = criterion.ignore_index
    criterion.alpha = np.float64(index)
    alpha: float = criterion.alpha
    criterion.hierarchy = "cityscapes"
    levels: tuple[tuple[int, ...], ...] = criterion.hierarchy.levels
    criterion.reduction = "sum"
    criterion.lambdas = [alpha] * (len(levels) - 1)
    criterion.reduction = "avg"  # type: ignore[assignment]
    plain = CrossEntropyLoss(np.ones(3), ignore_index=255, label_smoothing=0.1, upsample="bilinear")
    assert_type(plain(logits, labels), Any)
    smoothing: float = plain.label_smoothing
    plain.label_smoothing = np.float32(smoothing)
    CrossEntropyLoss(reduction="avg")  # type: ignore[arg-type]
    ImportanceAwareLoss(CAMVID, factor_scope="pixel")  # type: ignore[arg-type]
    ImportanceAwareLoss(CAMVID, alpha="1")  # type: ignore[arg-type]
