"""Trains in several processes. Each has its own images; the loss is that of the images of all processes.

    torchrun --nproc-per-node 2 examples/ddp.py         # DistributedDataParallel
    torchrun --nproc-per-node 2 examples/ddp.py --fsdp  # FSDP2, which also shards the parameters

Each process uses its own GPU, or the CPU if there is none. The data are synthetic.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ial_cuda import CITYSCAPES, ImportanceAwareLoss

device, backend = ("cuda", "nccl") if torch.cuda.is_available() else ("cpu", "gloo")
if device == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group(backend)
rank, processes = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)  # the same network and colours in all processes
network = nn.Sequential(nn.Conv2d(3, 32, 4, stride=4), nn.ReLU(), nn.Conv2d(32, 19, 1)).to(device)
colours = torch.rand(19, 3, device=device)
if "--fsdp" in sys.argv:
    network = fully_shard(network, mesh=init_device_mesh(device, (processes,)))
else:
    network = DistributedDataParallel(network)

torch.manual_seed(rank)  # different images in each process
labels = torch.randint(19, (4, 8, 16), device=device).repeat_interleave(8, 1).repeat_interleave(8, 2)
images = colours[labels].movedim(-1, 1)  # (N, 3, H, W): each class has a colour
labels[:, : 64 * rank // processes] = 255  # void pixels, and more of them in later processes

criterion = ImportanceAwareLoss(CITYSCAPES, upsample="bilinear", process_group=dist.group.WORLD)
optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
for step in range(10):
    loss = criterion(network(images), labels)  # coarse logits; the same loss in all processes
    optimizer.zero_grad()
    loss.backward()  # DDP and FSDP average over the processes: the result is the gradient of the loss
    optimizer.step()
    if rank == 0:
        print(f"step {step}: loss {loss.item():.4f}")
dist.destroy_process_group()
