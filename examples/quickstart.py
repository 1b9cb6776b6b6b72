"""Trains a tiny network with the importance-aware loss: python quickstart.py [FOLDER [CLASSES]]

FOLDER has images/*.png and labels/*.png with the same names, all of one size. A pixel of a label image is its
class 0, 1, …, or 255 for void. Without FOLDER the data are synthetic.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from ial_cuda import Hierarchy, ImportanceAwareLoss, median_frequency_weights

if len(sys.argv) > 1:
    files = sorted(Path(sys.argv[1], "images").glob("*.png"))
    images = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    labels = np.stack([np.asarray(Image.open(file.parents[1] / "labels" / file.name)) for file in files])
else:
    labels = np.random.default_rng(0).integers(4, size=(8, 16, 16), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    images = np.stack([60 * labels, 255 - 60 * labels, labels], axis=-1)
    labels[:, :8] = 255
pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255  # (N, 3, H, W)
target = torch.from_numpy(labels).long()  # (N, H, W)
classes = int(sys.argv[2]) if len(sys.argv) > 2 else int(target[target != 255].max()) + 1
# Levels of importance, the least important one first. Replace them by your own, such as [[0, 2], [1], [3]].
hierarchy = Hierarchy([[0], range(1, classes)], ignore_index=255)
criterion = ImportanceAwareLoss(hierarchy, weight=median_frequency_weights(list(labels), hierarchy))
network = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, classes, 1))
optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
for step in range(100):
    batch = torch.randperm(len(pixels))[:4]
    loss = criterion(network(pixels[batch]), target[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0 or step == 99:
        print(f"step {step:2}: loss {loss.item():.4f}")
