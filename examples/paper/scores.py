"""How good predictions are: IoU and accuracy of each class, level and overall, void left out."""

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
SHOWN = 4  # predictions that are kept


class Scores(MulticlassJaccardIndex):
    """torchmetrics' IoU of each class, NaN for one that is neither there nor predicted.

    It is not synchronised by itself, which would have to be asked of all processes at once: `gather` is.
    """

    def __init__(self, hierarchy: Hierarchy, ignore_index: int) -> None:
        super().__init__(
            hierarchy.num_classes,
            average="none",
            ignore_index=ignore_index,
            zero_division=float("nan"),
            validate_args=False,
            sync_on_compute=False,
            compute_with_cache=False,
        )
        self.hierarchy = hierarchy

    def gather(self, processes: Processes) -> Scores:
        processes.add(self.confmat)
        return self

    def mean(self) -> float:
        return self.compute().nanmean().item()

    def as_json(self) -> dict[str, Any]:
        """IoU and accuracy (the part of a class' pixels that is found), in percent; None where there is none.

        ``iou``, ``accuracy``: (C,); ``group_iou``: (g,), the mean over the classes of a level; and both
        means over all classes.
        """
        iou = 100 * self.compute()
        accuracy = 100 * self.confmat.diagonal() / self.confmat.sum(1)
        groups = torch.stack([iou[list(level)].nanmean() for level in self.hierarchy.levels])
        values = {
            "iou": iou,
            "group_iou": groups,
            "mean_iou": iou.nanmean(),
            "accuracy": accuracy,
            "mean_accuracy": accuracy.nanmean(),
        }
        return {name: rounded(value.tolist()) for name, value in values.items()}


def rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return None if value != value else round(value, 3)


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
    """The scores of a network, left in the mode for evaluation, on all images of the source.

    Images are shrunk by ``scale``; the logits are brought to the labels' full size, bilinearly. Some
    predictions are written to the folder ``keep``, as label maps under the images' names.
    """
    network.eval()
    device = processes.device
    scores = Scores(source.hierarchy, source.ignore_index).to(device)
    mine = range(processes.rank, len(source.pairs), processes.world)
    shown = set(np.linspace(0, len(source.pairs) - 1, SHOWN).astype(int).tolist())
    keep.mkdir(parents=True, exist_ok=True)
    loader = DataLoader(Subset(EvaluationSet(source, scale), mine), EVALUATION_BATCH, num_workers=workers)
    indices = iter(mine)
    for images, labels in loader:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = network(as_input(images, device)).float()
        found = F.interpolate(logits, labels.shape[1:], mode="bilinear").argmax(1)
        scores.update(found, labels.to(device))
        for prediction, index in zip(found, indices, strict=False):
            if index in shown:
                file = keep / f"{source.pairs[index].image.stem}.png"
                Image.fromarray(prediction.to("cpu", torch.uint8).numpy()).save(file)
    return scores.gather(processes)


def update_at_logits(scores: Scores, logits: Tensor, labels: Tensor) -> None:
    """Adds predictions in training, at the logits' size; labels (N, H, W) are sampled where it is smaller."""
    if logits.shape[2:] != labels.shape[1:]:
        labels = F.interpolate(labels[:, None], logits.shape[2:], mode="nearest")[:, 0]
    scores.update(logits.argmax(1), labels)
