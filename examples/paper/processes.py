"""Training in several processes, as if they were one: loss, statistics and dropout are of the whole batch.

DistributedDataParallel averages gradients over the processes. What else depends on the whole batch is here.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Processes:
    """This process among those that train together.

    Attributes:
        rank: of this one; that of rank 0 writes and shows.
        world: how many there are.
        device: of this one.
    """

    def __init__(self, distributed: bool, device: str) -> None:
        """``distributed``: join the others that torchrun has started; else there is this one alone."""
        self.rank, self.world, self.device = 0, 1, torch.device(device)
        if distributed:
            if "LOCAL_RANK" not in os.environ:
                raise RuntimeError("distributed training is started by torchrun, which sets LOCAL_RANK")
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

    def add(self, tensor: Tensor) -> Tensor:
        """``tensor``, replaced by its sum over the processes."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def prepare(self, network: nn.Module) -> nn.Module:
        """The network for this process: with one batch's statistics, dropout and gradients over all."""
        if self.world == 1:
            return network
        self._replace(network)
        devices = [self.device] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(network, device_ids=devices, broadcast_buffers=False)

    def _replace(self, module: nn.Module) -> None:
        """Replaces batch normalisation and dropout; the parameters' names stay."""
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                if self.device.type == "cuda":
                    setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
                else:
                    child.__class__ = BatchNormOfAll
            elif isinstance(child, nn.Dropout | nn.Dropout2d):
                setattr(module, name, DropoutOfAll(child, self.rank, self.world))
            else:
                self._replace(child)


class Sum(torch.autograd.Function):
    """The sum over the processes; the gradient of the sum of their losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class BatchNormOfAll(nn.BatchNorm2d):
    """Batch normalisation by the statistics of all processes, for the CPU: nn.SyncBatchNorm knows GPUs only.

    All processes have batches of one size.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        shape = (1, -1, 1, 1)
        pixels = dist.get_world_size() * x.numel() // x.shape[1]
        mean = Sum.apply(x.sum((0, 2, 3))) / pixels
        x = x - mean.view(shape)
        variance = Sum.apply(x.square().sum((0, 2, 3))) / pixels
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * pixels / (pixels - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return x * scale.view(shape) + self.bias.view(shape)


class DropoutOfAll(nn.Module):
    """This process' share of the dropout that one process would draw for the whole batch.

    Each process draws all of it, from the same state of the generator. All have batches of one size.
    """

    def __init__(self, dropout: nn.Dropout | nn.Dropout2d, rank: int, world: int) -> None:
        super().__init__()
        self.p, self.rank, self.world = dropout.p, rank, world
        self.channels_only = isinstance(dropout, nn.Dropout2d)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        pixels = (1, 1) if self.channels_only else x.shape[2:]
        of_all = x.new_empty((self.world * x.shape[0], x.shape[1], *pixels)).bernoulli_(1 - self.p)
        return x * of_all[self.rank :: self.world] / (1 - self.p)
