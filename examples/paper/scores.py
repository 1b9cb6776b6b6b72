"""Scores of predictions: IoU and accuracy of each class and level, and their means, without void."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchmetrics.classification import MulticlassJaccardIndex

from ial_cuda import Hierarchy

from .data import EvaluationSet, Source, as_input
from .processes import Processes

EVALUATION_BATCH = 4
KEPT_PREDICTIONS = 4


class Scores(MulticlassJaccardIndex):
    """torchmetrics' IoU of each class; NaN for a class that is neither in the labels nor predicted.

    `gather` sums over the processes. torchmetrics' own synchronization would need every process to call
    `compute`, and progress is shown by one process alone.
    """

    def __init__(self, hierarchy: Hierarchy) -> None:
        super().__init__(
            hierarchy.num_classes,
            average="none",
            ignore_index=hierarchy.ignore_index,
            zero_division=float("nan"),
            validate_args=False,
            sync_on_compute=False,
            compute_with_cache=False,
        )
        self.hierarchy = hierarchy

    def gather(self, processes: Processes) -> Scores:
        processes.all_reduce(self.confmat)
        return self

    def mean(self) -> float:
        return self.compute().nanmean().item()

    def as_json(self) -> dict[str, Any]:
        """IoU and accuracy (recall) of each class in percent, and their means; None for a missing class.

        ``group_iou`` is the mean over the classes of each level.
        """
        iou = 100 * self.compute()
        accuracy = 100 * self.confmat.diagonal() / self.confmat.sum(1)
        groups = torch.stack([iou[list(level)].nanmean() for level in self.hierarchy.levels])
        return {
            "iou": rounded(iou),
            "group_iou": rounded(groups),
            "mean_iou": rounded(iou.nanmean()[None])[0],
            "accuracy": rounded(accuracy),
            "mean_accuracy": rounded(accuracy.nanmean()[None])[0],
        }


def rounded(values: Tensor) -> list[float | None]:
    return [None if value != value else round(value, 3) for value in values.tolist()]


@torch.no_grad()
def evaluate(
    network: nn.Module,
    source: Source,
    scale: float,
    processes: Processes,
    *,
    bf16: bool,
    workers: int,
    keep: Path,
) -> Scores:
    """The scores of rank 0's network on all images of a source. The network stays in evaluation mode.

    Images are scaled down by ``scale``. The logits are interpolated to the full size of the labels. Some
    predictions are written to the folder ``keep`` as label maps.
    """
    network.eval()
    processes.broadcast_buffers(network)
    device = processes.device
    scores = Scores(source.hierarchy).to(device)
    mine = range(processes.rank, len(source.pairs), processes.world)
    kept = set(np.linspace(0, len(source.pairs) - 1, KEPT_PREDICTIONS).astype(int).tolist())
    keep.mkdir(parents=True, exist_ok=True)
    loader = DataLoader(Subset(EvaluationSet(source, scale), mine), EVALUATION_BATCH, num_workers=workers)
    indices = iter(mine)
    for images, labels in loader:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = network(as_input(images, device)).float()
        predictions = F.interpolate(logits, labels.shape[1:], mode="bilinear").argmax(1)
        scores.update(predictions, labels.to(device))
        for prediction, index in zip(predictions, indices, strict=False):
            if index in kept:
                file = keep / f"{source.pairs[index].image.stem}.png"
                Image.fromarray(prediction.to("cpu", torch.uint8).numpy()).save(file)
    return scores.gather(processes)


def update_at_logits(scores: Scores, logits: Tensor, labels: Tensor) -> None:
    """Adds predictions at the size of the logits. Labels (N, H, W) are subsampled to it."""
    if logits.shape[2:] != labels.shape[1:]:
        labels = F.interpolate(labels[:, None], logits.shape[2:], mode="nearest")[:, 0]
    scores.update(logits.argmax(1), labels)
