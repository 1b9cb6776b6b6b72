"""The settings that determine the result of a training."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """What the result of a training depends on, except machine, libraries and number of processes.

    Attributes:
        data: a name in `data.DATA_SETS`.
        network: a name in `networks.NETWORKS`.
        loss: "cross-entropy" or "ial".
        width: factor on the number of channels.
        weights: class weights, "median" (Eq. 2) or "none".
        gradient, factors: ``gradient`` and ``factor_normalization`` of IAL; None for cross-entropy.
        epochs: the budget. The learning rate falls to 0 over it.
        batch: the number of images per step, over all processes.
        optimizer, learning_rate, weight_decay: "adam" or "sgd" (with momentum 0.9).
        scale, crop, zoom: as in `data.TrainingSet`.
        seed: of the initial parameters, the order, the augmentation and the dropout.
        bf16: autocast to bfloat16.
        channels_last: memory format of the network.
    """

    data: str
    network: str
    loss: str
    width: float
    weights: str
    gradient: str | None
    factors: str | None
    epochs: int
    batch: int
    optimizer: str
    learning_rate: float
    weight_decay: float
    scale: float
    crop: tuple[int, int] | None
    zoom: float
    seed: int
    bf16: bool
    channels_last: bool

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"crop": self.crop and list(self.crop)}
