"""Training in several processes, each on its part of a batch."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Processes:
    """This process and the others of the same training.

    Attributes:
        rank: the index of this process. Rank 0 writes files and prints.
        world: the number of processes.
        device: the device of this process.
        group: all processes, for losses over the whole batch; None for one process.
    """

    def __init__(self, distributed: bool, device: str) -> None:
        """``distributed``: join the processes that torchrun started. Otherwise there is only this one."""
        self.rank, self.world, self.device = 0, 1, torch.device(device)
        self.group: ProcessGroup | None = None
        if distributed:
            if "LOCAL_RANK" not in os.environ:
                raise ValueError("LOCAL_RANK is not set: start distributed training with torchrun")
            if device == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
            self.group = dist.group.WORLD if self.world > 1 else None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """``tensor``, replaced by its sum over the processes."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def prepare(self, network: nn.Module) -> nn.Module:
        """The network with synchronized gradients and, on CUDA, batch statistics of the whole batch."""
        if self.world == 1:
            return network
        devices = None
        if self.device.type == "cuda":  # nn.SyncBatchNorm has no implementation for the CPU
            network, devices = nn.SyncBatchNorm.convert_sync_batchnorm(network), [self.device]
        return nn.parallel.DistributedDataParallel(network, device_ids=devices)

    def broadcast_buffers(self, network: nn.Module) -> None:
        """Gives all processes the running statistics of rank 0, which are those of the checkpoint."""
        if self.world > 1:
            for buffer in network.buffers():
                dist.broadcast(buffer, 0)
