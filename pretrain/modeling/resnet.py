"""ResNet encoders with a projection head: uint8 images -> features -> projection.

The backbone's tensors have torchvision's names (``conv1``, ``bn1``, ``layer1.0.conv1`` ...) and the
projection head is ``fc``, as in the published MoCo checkpoints, so that one converter reads both.
A width multiplier scales all channel counts: 2 and 4 give the R50-w2x and R50-w4x of the MoCo paper
(He et al. 2020, Table 1); 0.25 is meant for CPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco_common.backbone.resnet import BLOCKS_PER_STAGE, has_bottlenecks
from moco_common.errors import UserError
from pretrain.modeling.batch_norm import SplitBatchNorm2d
from pretrain.modeling.heads import MapHead

# Mean and standard deviation of ImageNet's RGB channels, on the scale of uint8 pixels.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)
Norm = Callable[[int], nn.Module]


class Normalize(nn.Module):
    """Scale pixels from [0, 255] to zero mean and unit variance per channel (ImageNet statistics).

    Shape: (N, 3, H, W), uint8, RGB, any memory format, which is preserved -> the same in float32.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        # On the CPU even for a network that is built on "meta": no checkpoint fills them.
        mean, std = (
            torch.tensor(row, device="cpu").view(1, 3, 1, 1) for row in (PIXEL_MEAN, PIXEL_STD)
        )
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("scale", std.reciprocal_(), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return images.to(torch.float32).sub_(self.mean).mul_(self.scale)


def conv(
    in_channels: int, out_channels: int, size: int, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """Return a convolution without bias (BN follows), padded to keep the size at stride 1."""
    return nn.Conv2d(
        in_channels,
        out_channels,
        size,
        stride=stride,
        padding=size // 2,
        groups=groups,
        bias=False,
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, Fig. 5 left): ResNet-18 and -34."""

    expansion = 1

    def __init__(
        self, in_channels: int, base: int, stride: int, width: int, groups: int, norm: Norm
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, base, 3, stride)
        self.bn1 = norm(base)
        self.conv2 = conv(base, base, 3)
        self.bn2 = norm(base)
        self.downsample = _shortcut(in_channels, base, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(out.add_(shortcut), inplace=True)


class Bottleneck(nn.Module):
    """1x1, strided 3x3 and 1x1 convolutions and a shortcut (He et al. 2016, Fig. 5 right; v1.5)."""

    expansion = 4

    def __init__(
        self, in_channels: int, base: int, stride: int, width: int, groups: int, norm: Norm
    ) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, width, 1)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, 3, stride, groups)
        self.bn2 = norm(width)
        self.conv3 = conv(width, base * self.expansion, 1)
        self.bn3 = norm(base * self.expansion)
        self.downsample = _shortcut(in_channels, base * self.expansion, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        shortcut = x if self.downsample is None else self.downsample(x)
        return F.relu(out.add_(shortcut), inplace=True)


def _shortcut(in_channels: int, out_channels: int, stride: int, norm: Norm) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(conv(in_channels, out_channels, 1, stride), norm(out_channels))


class ResNet(nn.Module):
    """A ResNet or ResNeXt with torchvision's tensor names and a projection head, ``fc``.

    Args:
        depth: 18, 34, 50, 101 or 152.
        width: multiplier of all channel counts, 1/16 to 8; products are rounded.
        groups: cardinality of the 3x3 convolutions (32 in ResNeXt-50 32x4d).
        width_per_group: channels per group in the first stage, before ``width`` is applied (4 in
            ResNeXt-50 32x4d).
        bn_groups: number of slices of the batch with separate BN statistics, see
            `SplitBatchNorm2d`.
        head: builds the projection head, given the number of backbone features; None for no head.

    Shape: images (N, 3, H, W), uint8 RGB or already normalised float -> (N, C), where C is the
    output size of the head, or ``num_features`` without one; with a `MapHead`, what it returns.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential
    autocast_dtype: torch.dtype | None = None  # set by `pretrain.engine.train_step.TrainStep`

    def __init__(
        self,
        depth: int = 50,
        *,
        width: float = 1.0,
        groups: int = 1,
        width_per_group: int = 64,
        bn_groups: int = 1,
        head: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if depth not in BLOCKS_PER_STAGE:
            raise UserError(f"MODEL.DEPTH is {depth}: choose one of {sorted(BLOCKS_PER_STAGE)}.")
        block = Bottleneck if has_bottlenecks(depth) else BasicBlock
        if block is BasicBlock and (groups, width_per_group) != (1, 64):
            raise UserError(
                f"MODEL.GROUPS and MODEL.WIDTH_PER_GROUP need a ResNet with bottlenecks, but "
                f"MODEL.DEPTH is {depth}: choose 50, 101 or 152."
            )
        if not 1 / 16 <= width <= 8:
            raise UserError(f"MODEL.WIDTH is {width}: choose a multiplier from 0.0625 to 8.")
        self.normalize = Normalize()
        norm: Norm = partial(SplitBatchNorm2d, groups=bn_groups)
        channels = round(64 * width)
        self.conv1 = conv(3, channels, 7, 2)
        self.bn1 = norm(channels)
        for stage, num_blocks in enumerate(BLOCKS_PER_STAGE[depth], start=1):
            base = round(64 * width * 2 ** (stage - 1))
            inner = round(base * width_per_group / 64) * groups
            blocks = []
            for i in range(num_blocks):
                stride = 2 if stage > 1 and i == 0 else 1
                blocks.append(block(channels, base, stride, inner, groups, norm))
                channels = base * block.expansion
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.num_features = channels
        self.fc: nn.Module = nn.Identity() if head is None else head(channels)
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and not name.startswith("fc."):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_map(self, images: Tensor) -> Tensor:
        """Return the last stage's output: (N, num_features, H / 32, W / 32), rounded up."""
        x = self.normalize(images) if images.dtype == torch.uint8 else images
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        return x

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the global average of the last stage's output: (N, num_features)."""
        return self.forward_map(images).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return the head's output, or the features without a head.

        With ``autocast_dtype`` set, the network runs in that dtype, but the output is still
        float32, so that losses and dictionaries never see lower precision.
        """
        if self.autocast_dtype is None:
            return self._embed(images)
        with torch.autocast(images.device.type, dtype=self.autocast_dtype):
            outputs = self._embed(images)
            if isinstance(outputs, Tensor):
                return outputs.float()
            return tuple(output.float() for output in outputs)

    def _embed(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        dense = isinstance(self.fc, MapHead)
        x = self.forward_map(images) if dense else self.forward_features(images)
        embeddings: Tensor | tuple[Tensor, ...] = self.fc(x)
        return embeddings
