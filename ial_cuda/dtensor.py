"""Logits that are a DTensor: their placements give the split, and each process computes its shard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from .distributed import Split
from .validation import ClassWeights, is_dtensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

_Placements: TypeAlias = "tuple[Placement, ...]"


class Shards:
    """The shards of logits (N, C, *spatial), and of inputs and results that are split as they are.

    Args:
        logits: each mesh dimension shards the images or a spatial dimension, or has replicas.
        upsample: whether the logits are coarse. Their spatial dimensions must then be whole.
        name: of the logits in errors.

    Attributes:
        split: how the logits are split.
        pixels: the placements of a tensor (N, *spatial).
        images: the placements of a tensor (N, ...) of the images.
        replicas: the placements of a tensor of the whole batch.

    Raises:
        ValueError: the logits have another placement.
    """

    def __init__(self, logits: DTensor, *, upsample: bool, name: str) -> None:
        from torch.distributed.tensor import Replicate, Shard

        self.logits, self.name, mesh = logits, name, logits.device_mesh
        dims = [_sharded_dim(logits, placement, upsample, name) for placement in logits.placements]
        self.pixels = tuple(Replicate() if d is None else Shard(max(d - 1, 0)) for d in dims)
        self.images = tuple(Shard(0) if d == 0 else Replicate() for d in dims)
        self.replicas = tuple(Replicate() for _ in dims)
        self.split = Split(
            images=tuple(mesh.get_group(i) for i, d in enumerate(dims) if d == 0),
            pixels=tuple(mesh.get_group(i) for i, d in enumerate(dims) if d),
            one_loss=True,
        )

    def inputs(
        self, target: Tensor, weight: ClassWeights | None, pixel_weight: Tensor | None
    ) -> tuple[Tensor, Tensor, ClassWeights | None, Tensor | None]:
        """This process's shards of logits, target and pixel weights, and all class weights."""
        return (
            self.logits.to_local(),
            self.local(target, self.pixels, "target"),
            self.local(weight, self.replicas, "weight"),
            self.local(pixel_weight, self.pixels, "pixel_weight"),
        )

    def local(self, tensor: Any, placements: _Placements, name: str) -> Any:
        """This process's shard of an input. Anything but a DTensor, such as None or a list, is returned."""
        if not is_dtensor(tensor):
            return tensor
        mesh = self.logits.device_mesh
        if tensor.device_mesh != mesh:
            raise ValueError(f"{name} is on {tensor.device_mesh}, expected {mesh} like {self.name}")
        return tensor.redistribute(mesh, placements).to_local()

    def whole(self, shard: Tensor, placements: _Placements, shape: tuple[int, ...]) -> Tensor:
        """The DTensor (*shape) of which this process computed ``shard``."""
        from torch.distributed.tensor import DTensor

        result: Tensor = DTensor.from_local(
            shard,
            self.logits.device_mesh,
            placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=torch.empty(shape, device="meta").stride(),
        )
        return result


def _sharded_dim(logits: DTensor, placement: Placement, upsample: bool, name: str) -> int | None:
    """The dimension of the logits that the placement shards, None for replicas."""
    from torch.distributed.tensor import Shard

    if placement.is_replicate():
        return None
    dim = None
    if type(placement) is Shard:
        # torch.compile may make placement.dim a symbol, which Shard() does not take. range() has constants.
        dim = next(d for d in range(logits.dim()) if d == placement.dim)
    if dim is None:
        expected = "Replicate(), Shard(0) or Shard(d) of a spatial dimension d >= 2"
    elif dim == 1:
        expected = "all classes of a pixel on one rank; redistribute() the logits, for example to Shard(0)"
    elif dim > 1 and upsample:
        expected = (
            "whole images with upsample, where a pixel depends on the logits of other ranks; redistribute() "
            "the logits, for example to Shard(0)"
        )
    else:
        return dim
    raise ValueError(f"{name} has placements {tuple(logits.placements)}, expected {expected}")
