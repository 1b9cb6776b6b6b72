"""What a training's result depends on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """All that the result of a training depends on, beside machine and libraries.

    Attributes:
        data, network, loss: names in `data.SOURCES`, `networks.NETWORKS` and `losses.LOSSES`.
        width: multiplies the network's channels.
        weights: of the classes, "median" (Eq. 2) or "none".
        gradient, factors: IAL's ``gradient`` and ``factor_normalization``; None for cross-entropy.
        epochs: the budget; the learning rate falls to 0 over it.
        batch: images a step, over all processes.
        optimizer, learning_rate, weight_decay: "adam" or "sgd" (with momentum 0.9).
        scale, crop, zoom: as in `data.TrainingSet`.
        seed: of the network's start, the order, the augmentation and the dropout.
        bf16: autocast to bfloat16.
        channels_last: the memory format of the network and all that it computes.
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
        crop = None if self.crop is None else list(self.crop)
        return asdict(self) | {"crop": crop}
