"""Training in several processes with the same result as in one process.

DistributedDataParallel averages the gradients. This module adds the rest that depends on the whole batch:
sums, batch normalization and dropout.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Processes:
    """This process and the others of the same training.

    Attributes:
        rank: the index of this process. Rank 0 writes files and prints.
        world: the number of processes.
        device: the device of this process.
    """

    def __init__(self, distributed: bool, device: str) -> None:
        """``distributed``: join the processes that torchrun started. Otherwise there is only this one."""
        self.rank, self.world, self.device = 0, 1, torch.device(device)
        if distributed:
            if "LOCAL_RANK" not in os.environ:
                raise ValueError("LOCAL_RANK is not set: start distributed training with torchrun")
            if device == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
            self.rank, self.world = dist.get_rank(), dist.get_world_size()

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
        """The network for this process, with synchronized batch normalization, dropout and gradients."""
        if self.world == 1:
            return network
        self._replace_layers(network)
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(network, device_ids=devices, broadcast_buffers=False)

    def _replace_layers(self, module: nn.Module) -> None:
        """Replaces batch normalization and dropout. The names of the parameters stay."""
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                if self.device.type == "cuda":
                    setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
                else:
                    child.__class__ = CpuSyncBatchNorm
            elif isinstance(child, nn.Dropout | nn.Dropout2d):
                setattr(module, name, SyncDropout(child, self.rank, self.world))
            else:
                self._replace_layers(child)


class AllReduceSum(torch.autograd.Function):
    """The sum over the processes, with the gradient of the sum of their losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return AllReduceSum.apply(gradient)


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """Batch normalization over all processes on the CPU, where nn.SyncBatchNorm is not available.

    All processes must have batches of the same size.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        shape = (1, -1, 1, 1)
        pixels = dist.get_world_size() * x.numel() // x.shape[1]
        mean = AllReduceSum.apply(x.sum((0, 2, 3))) / pixels
        x = x - mean.view(shape)
        variance = AllReduceSum.apply(x.square().sum((0, 2, 3))) / pixels
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * pixels / (pixels - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return x * scale.view(shape) + self.bias.view(shape)


class SyncDropout(nn.Module):
    """This process's part of the dropout that one process would draw for the whole batch.

    Every process draws the whole mask from the same generator state. All batches must have the same size.
    """

    def __init__(self, dropout: nn.Dropout | nn.Dropout2d, rank: int, world: int) -> None:
        super().__init__()
        self.p, self.rank, self.world = dropout.p, rank, world
        self.channels_only = isinstance(dropout, nn.Dropout2d)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        pixels = (1, 1) if self.channels_only else x.shape[2:]
        mask = x.new_empty((self.world * x.shape[0], x.shape[1], *pixels)).bernoulli_(1 - self.p)
        return x * mask[self.rank :: self.world] / (1 - self.p)
