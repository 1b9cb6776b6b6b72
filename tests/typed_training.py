"""A training script for type checkers: test_typing.py checks it with mypy, and with pyright if installed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ial_cuda import CITYSCAPES, ImportanceAwareLoss, importance_aware_loss


def train(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    criterion = ImportanceAwareLoss(CITYSCAPES, alpha=1.0, upsample="bilinear")
    optimizer = torch.optim.AdamW(network.parameters())
    total = 0.0
    for images, labels in batches:
        optimizer.zero_grad()
        logits: Tensor = network(images)
        auxiliary = importance_aware_loss(logits, labels, criterion.hierarchy, upsample="bilinear")
        loss, components = importance_aware_loss(
            logits, labels, CITYSCAPES, upsample="bilinear", return_components=True
        )
        (loss + 0.4 * auxiliary + criterion(logits, labels)).backward()
        optimizer.step()
        total += loss.item() + float(components.F.mean())
    return total
