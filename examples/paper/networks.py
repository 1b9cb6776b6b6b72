"""ENet, SegNet and FCN-8s, as published where that is possible without pretrained weights.

Every network takes images (N, 3, H, W) of any size. ENet and SegNet return logits (N, C, H, W). FCN-8s
returns coarse logits (N, C, h, w): an eighth of the image size, rounded up. ``width`` multiplies the number
of channels of every hidden layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Channels of VGG16's convolutions (Simonyan and Zisserman 2015, configuration D), by stage. Each stage
#: ends with max-pooling by two.
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


def scaled(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def half_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """Max-pooling by two, and the indices of the maxima. An odd last row or column is pooled alone."""
    return F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)


class Initial(nn.Module):
    """ENet's Fig. 2a: a strided convolution, concatenated with the max-pooled image (3 channels)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, channels - 3, 3, stride=2, padding=1, bias=False)
        self.end = nn.Sequential(nn.BatchNorm2d(channels), nn.PReLU(channels))

    def forward(self, image: Tensor) -> Tensor:
        pooled = F.max_pool2d(image, 2, ceil_mode=True)
        return self.end(torch.cat([self.convolution(image), pooled], dim=1))


class Bottleneck(nn.Module):
    """ENet's Fig. 2b: projection to a quarter of the channels, a convolution, expansion, and the sum with x.

    Args:
        channels: the number of channels of input and output.
        dilation: the dilation of the 3x3 convolution.
        asymmetric: 5x1 and 1x5 instead of 3x3.
        dropout: the probability of dropping a channel of the branch.
    """

    def __init__(
        self, channels: int, dilation: int = 1, asymmetric: bool = False, dropout: float = 0.1
    ) -> None:
        super().__init__()
        inner = max(1, channels // 4)
        if asymmetric:
            convolution = [
                nn.Conv2d(inner, inner, (5, 1), padding=(2, 0), bias=False),
                nn.Conv2d(inner, inner, (1, 5), padding=(0, 2)),
            ]
        else:
            convolution = [nn.Conv2d(inner, inner, 3, padding=dilation, dilation=dilation)]
        self.branch = nn.Sequential(
            *normalized(nn.Conv2d(channels, inner, 1, bias=False), inner),
            *normalized(nn.Sequential(*convolution), inner),
            *expansion(inner, channels, dropout),
        )
        self.activation = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x + self.branch(x))


class Down(nn.Module):
    """A bottleneck that halves the size. The skip connection is the pooled x and channels of zeros."""

    def __init__(self, before: int, channels: int, dropout: float) -> None:
        super().__init__()
        inner = max(1, channels // 4)
        self.more = channels - before
        self.branch = nn.Sequential(
            *normalized(nn.Conv2d(before, inner, 2, stride=2, bias=False), inner),
            *normalized(nn.Conv2d(inner, inner, 3, padding=1), inner),
            *expansion(inner, channels, dropout),
        )
        self.activation = nn.PReLU(channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled, indices = half_pool(x)
        height, width = x.shape[2:]
        even = F.pad(x, (0, width % 2, 0, height % 2))  # the branch and the pooling get the same size
        pooled = F.pad(pooled, (0, 0, 0, 0, 0, self.more))
        return self.activation(pooled + self.branch(even)), indices


class Up(nn.Module):
    """A bottleneck that doubles the size. The skip connection is x, unpooled to the places of the maxima."""

    def __init__(self, before: int, channels: int, dropout: float = 0.1) -> None:
        super().__init__()
        inner = max(1, channels // 4)
        self.main = nn.Sequential(nn.Conv2d(before, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.project = nn.Sequential(*normalized(nn.Conv2d(before, inner, 1, bias=False), inner))
        self.upsample = nn.ConvTranspose2d(inner, inner, 3, stride=2, padding=1)
        self.expand = nn.Sequential(
            nn.BatchNorm2d(inner), nn.PReLU(inner), *expansion(inner, channels, dropout)
        )
        self.activation = nn.PReLU(channels)

    def forward(self, x: Tensor, indices: Tensor, size: torch.Size) -> Tensor:
        """``size``: (H, W) before the pooling that gave ``indices``."""
        main = F.max_unpool2d(self.main(x), indices, 2, output_size=size)
        return self.activation(main + self.expand(self.upsample(self.project(x), output_size=size)))


def normalized(convolution: nn.Module, channels: int) -> Iterator[nn.Module]:
    yield from (convolution, nn.BatchNorm2d(channels), nn.PReLU(channels))


def expansion(inner: int, channels: int, dropout: float) -> Iterator[nn.Module]:
    """The end of each branch. The PReLU follows the sum."""
    yield from (nn.Conv2d(inner, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.Dropout2d(dropout))


class ENet(nn.Module):
    """Paszke, Chaurasia, Kim and Culurciello, "ENet" (arXiv 1606.02147, Table 1); 0.37 M parameters.

    All of it is trained at once. The authors train the encoder first.
    """

    def __init__(self, classes: int, width: float = 1.0) -> None:
        super().__init__()
        first, half, full = scaled(16, width), scaled(64, width), scaled(128, width)
        first = max(first, 4)  # three channels are the pooled image
        self.initial = Initial(first)
        self.down1 = Down(first, half, dropout=0.01)
        self.stage1 = nn.Sequential(*(Bottleneck(half, dropout=0.01) for _ in range(4)))
        self.down2 = Down(half, full, dropout=0.1)
        self.stages2and3 = nn.Sequential(*self._section(full), *self._section(full))
        self.up4 = Up(full, half)
        self.stage4 = nn.Sequential(Bottleneck(half), Bottleneck(half))
        self.up5 = Up(half, first)
        self.stage5 = Bottleneck(first)
        self.classifier = nn.ConvTranspose2d(first, classes, 3, stride=2, padding=1)

    @staticmethod
    def _section(channels: int) -> Iterator[Bottleneck]:
        """Stage 2 after its first bottleneck; stage 3 is the same."""
        for dilation in (2, 8):
            yield Bottleneck(channels)
            yield Bottleneck(channels, dilation=dilation)
            yield Bottleneck(channels, asymmetric=True)
            yield Bottleneck(channels, dilation=2 * dilation)

    def forward(self, image: Tensor) -> Tensor:
        initial = self.initial(image)
        x, indices1 = self.down1(initial)
        stage1 = self.stage1(x)
        x, indices2 = self.down2(stage1)
        x = self.stages2and3(x)
        x = self.stage4(self.up4(x, indices2, stage1.shape[2:]))
        x = self.stage5(self.up5(x, indices1, initial.shape[2:]))
        return self.classifier(x, output_size=image.shape[2:])


# SegNet and FCN-8s


def convolutions(channels: list[int]) -> nn.Sequential:
    """SegNet's 3x3 convolutions, each with batch normalisation and ReLU, from channels[0] to channels[-1]."""
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class SegNet(nn.Module):
    """Badrinarayanan, Kendall and Cipolla, "SegNet" (PAMI 2017); 29.46 M parameters (ENet's Table 3).

    The encoder is VGG16's. The decoder mirrors it and unpools to the positions of the encoder's maxima.
    """

    def __init__(self, classes: int, width: float = 1.0) -> None:
        super().__init__()
        encoder, decoder = [], []
        before = 3
        for stage in VGG16:
            channels = [scaled(c, width) for c in stage]
            encoder.append(convolutions([before, *channels]))
            # A stage in reverse: its channels backwards, then the channels of the previous stage.
            decoder.insert(0, [*channels[::-1], before])
            before = channels[-1]
        decoder[-1].pop()  # the channels of the image: the classifier takes their place
        self.encoder = nn.ModuleList(encoder)
        self.decoder = nn.ModuleList(map(convolutions, decoder))
        self.classifier = nn.Conv2d(decoder[-1][-1], classes, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        x, pooled = image, []
        for stage in self.encoder:
            x = stage(x)
            size = x.shape[2:]
            x, indices = half_pool(x)
            pooled.append((indices, size))
        for stage in self.decoder:
            indices, size = pooled.pop()
            x = stage(F.max_unpool2d(x, indices, 2, output_size=size))
        return self.classifier(x)


class FCN8s(nn.Module):
    """Long, Shelhamer and Darrell, "Fully Convolutional Networks" (CVPR 2015), on VGG16; 134 M parameters.

    Differences: the authors pad the image by 100 pixels for the 7x7 window of conv6, and crop; here conv6 is
    padded by 3. Scores are upsampled by bilinear interpolation, the authors' initial value of their
    transposed convolutions. The last upsampling, by eight, is left to the loss. Without
    pretrained weights, layers are initialized after He et al. (2015) and classifiers with zero.
    """

    def __init__(self, classes: int, width: float = 1.0) -> None:
        super().__init__()
        stages: list[nn.Sequential] = []
        before = 3
        for stage in VGG16:
            layers: list[nn.Module] = []
            for channels in (scaled(c, width) for c in stage):
                layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU(inplace=True)]
                before = channels
            stages.append(nn.Sequential(*layers, nn.MaxPool2d(2, ceil_mode=True)))
        full = scaled(4096, width)
        self.to_pool3, self.to_pool4 = nn.Sequential(*stages[:3]), stages[3]
        self.to_conv7 = nn.Sequential(
            stages[4],
            *(nn.Conv2d(before, full, 7, padding=3), nn.ReLU(inplace=True), nn.Dropout()),
            *(nn.Conv2d(full, full, 1), nn.ReLU(inplace=True), nn.Dropout()),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        self.scores = nn.ModuleList(
            nn.Conv2d(channels, classes, 1) for channels in (scaled(256, width), scaled(512, width), full)
        )
        for layer in self.scores:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, image: Tensor) -> Tensor:
        pool3 = self.to_pool3(image)
        pool4 = self.to_pool4(pool3)
        scores = [
            score(x) for score, x in zip(self.scores, (pool3, pool4, self.to_conv7(pool4)), strict=True)
        ]
        fused = scores.pop()
        while scores:
            finer = scores.pop()
            fused = finer + F.interpolate(fused, finer.shape[2:], mode="bilinear")
        return fused


class Network(NamedTuple):
    """A network and how its authors train it, where that works without pretrained weights."""

    make: Callable[[int, float], nn.Module]
    coarse: bool  # whether the logits are smaller than the labels
    optimizer: str
    learning_rate: float
    weight_decay: float
    batch: int


NETWORKS = {
    # Section 4: Adam, 5e-4, L2 of 2e-4, batches of 10
    "enet": Network(ENet, False, "adam", 5e-4, 2e-4, 10),
    # Section 3.1: SGD, 0.1, momentum 0.9, batches of 12; the weight decay is from their solver file
    "segnet": Network(SegNet, False, "sgd", 0.1, 5e-4, 12),
    # Section 4.3: batches of 20, weight decay 5e-4. Their SGD at 1e-4 is for fine-tuning.
    "fcn8s": Network(FCN8s, True, "adam", 1e-4, 5e-4, 20),
}
