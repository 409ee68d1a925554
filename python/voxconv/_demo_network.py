# SPDX-License-Identifier: Apache-2.0
"""The network of the demo."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = 32
KERNEL = 5
LEVELS = 3
CLASSES = 3
MULTIPLE = 2**LEVELS  # every axis of the input divides by it


class Block(nn.Module):
    """MedNeXt's block: depthwise convolution, norm, 1x1x1 to twice the channels, GELU, 1x1x1.

    `step` is "keep", "down" (half the size) or "up" (twice the size).
    """

    def __init__(self, channels: int, out_channels: int, kernel: int, step: str = "keep") -> None:
        super().__init__()
        half = kernel // 2
        self.spatial: nn.Module
        self.skip: nn.Module = nn.Identity()
        if step == "up":
            self.spatial = nn.ConvTranspose3d(
                channels, channels, kernel, 2, half, output_padding=1, groups=channels
            )
            self.skip = nn.ConvTranspose3d(channels, out_channels, 1, 2, output_padding=1)
        else:
            stride = 2 if step == "down" else 1
            self.spatial = nn.Conv3d(channels, channels, kernel, stride, half, groups=channels)
            if step == "down":
                self.skip = nn.Conv3d(channels, out_channels, 1, 2)
        self.norm = nn.GroupNorm(channels, channels)
        self.expand = nn.Conv3d(channels, 2 * channels, 1)
        self.shrink = nn.Conv3d(2 * channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.shrink(F.gelu(self.expand(self.norm(self.spatial(x)))))
        return y + self.skip(x)  # type: ignore[no-any-return]


class SmallMedNeXt(nn.Module):
    """A U-shaped network of `Block`s: two per level on both ways, two at the bottom."""

    def __init__(self, channels: int = CHANNELS, kernel: int = KERNEL) -> None:
        super().__init__()

        def pair(c: int) -> nn.Sequential:
            return nn.Sequential(Block(c, c, kernel), Block(c, c, kernel))

        widths = [channels * 2**level for level in range(LEVELS)]
        self.stem = nn.Conv3d(1, channels, 1)
        self.encoders = nn.ModuleList(pair(c) for c in widths)
        self.downs = nn.ModuleList(Block(c, 2 * c, kernel, "down") for c in widths)
        self.bottom = pair(2 * widths[-1])
        self.ups = nn.ModuleList(Block(2 * c, c, kernel, "up") for c in reversed(widths))
        self.decoders = nn.ModuleList(pair(c) for c in reversed(widths))
        self.head = nn.Conv3d(channels, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skips = []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            skips.append(encoder(x))
            x = down(skips[-1])
        x = self.bottom(x)
        for up, decoder in zip(self.ups, self.decoders, strict=True):
            x = decoder(up(x) + skips.pop())
        return self.head(x)  # type: ignore[no-any-return]


def build_network() -> tuple[nn.Module, str]:
    """MONAI's MedNeXt if installed, else ours of the same plan; with a name to print."""
    torch.manual_seed(0)
    plan = f"{CHANNELS} channels, {KERNEL}x{KERNEL}x{KERNEL}, {LEVELS} levels"
    try:
        mednext = importlib.import_module("monai.networks.nets").MedNeXt
    except (ImportError, AttributeError):
        return SmallMedNeXt(), f"a small MedNeXt of our own ({plan})"
    two = (2,) * LEVELS
    model = mednext(
        init_filters=CHANNELS,
        out_channels=CLASSES,
        kernel_size=KERNEL,
        use_residual_connection=True,
        blocks_down=two,
        blocks_up=two,
    )
    return model, f"MONAI's MedNeXt ({plan})"
