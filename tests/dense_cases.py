# SPDX-License-Identifier: Apache-2.0
"""Problems of convolutions whose outputs read many channels, and layers of networks of that kind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cases import Case, Tensors, Triple

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Dense(Case):
    """A :class:`Case` with `filters` output channels and `groups`. ``op`` is "dense" or
    "transposed"."""

    op: str = "dense"
    filters: int = 1
    groups: int = 1

    @property
    def out_channels(self) -> int:
        return self.filters

    @property
    def weight_shape(self) -> tuple[int, ...]:
        if self.transposed:
            return self.channels, self.filters // self.groups, *self.kernel
        return self.filters, self.channels // self.groups, *self.kernel

    @property
    def flops(self) -> int:
        return super().flops * self.channels // self.groups

    @property
    def live_flops(self) -> int:
        return super().live_flops * self.channels // self.groups

    def bytes(self, itemsize: int = 4) -> int:
        weights = math.prod(self.weight_shape) - self.out_channels * self.taps
        return super().bytes(itemsize) + itemsize * weights

    def kwargs(self) -> dict[str, Any]:
        return super().kwargs() | {"groups": self.groups}

    def make(
        self, dtype: torch.dtype | None = None, seed: int = 0, layout: str | None = None
    ) -> Tensors:
        import torch

        drawn = super().make(dtype, seed, layout)
        generator = torch.Generator().manual_seed(seed + 1)
        summed = self.taps * self.channels // self.groups
        weight = torch.randn(self.weight_shape, generator=generator, dtype=torch.float64)
        return drawn._replace(weight=(weight / math.sqrt(summed)).to(drawn.x.dtype))


def _layer(
    name: str,
    channels: int,
    filters: int,
    size: int | Triple,
    dilation: int = 1,
    **fields: Any,
) -> Dense:
    """A layer of a network, whose padding keeps the size."""
    fields = {"kernel": (3, 3, 3), "padding": dilation, "tags": ("model",)} | fields
    return Dense(
        name,
        channels=channels,
        filters=filters,
        size=(size, size, size) if isinstance(size, int) else size,
        dilation=(dilation,) * 3,
        **fields,
    )


CAUSAL = ((2, 0), (1, 1), (1, 1))
MODELS = [
    *(_layer(f"meshnet_30_d{d}@256", 30, 30, 256, d) for d in (1, 2, 4, 8, 16)),
    *(_layer(f"meshnet_{c}_d4@256", c, c, 256, 4) for c in (5, 11, 20, 21)),
    _layer("highresnet_16_d1@96", 16, 16, 96),
    _layer("highresnet_32_d2@96", 32, 32, 96, 2),
    _layer("highresnet_64_d4@96", 64, 64, 96, 4),
    _layer("aspp_64_d2@32", 64, 64, 32, 2),
    _layer("aspp_64_d6@32", 64, 64, 32, 6),
    _layer("nnunet_32@128", 32, 32, 128),
    _layer("nnunet_down_32_64@128", 32, 64, 128, stride=(2, 2, 2)),
    _layer("nnunet_up_64_32@64", 64, 32, 64, op="transposed", kernel=(2, 2, 2), padding=0,
           stride=(2, 2, 2)),
    _layer("nnunet_320@8", 320, 320, 8),
    _layer("vae_96@4x152x104", 96, 96, (4, 152, 104), padding=CAUSAL),
    _layer("vae_384@1x38x26", 384, 384, (1, 38, 26), padding=CAUSAL),
    _layer("video_384@3x34x34", 384, 384, (3, 34, 34), n=8, padding=(0, 1, 1)),
]  # fmt: skip
BY_NAME = {case.name: case for case in MODELS}
