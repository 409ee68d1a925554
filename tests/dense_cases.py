# SPDX-License-Identifier: Apache-2.0
"""Rows for the Triton kernels of convolutions whose outputs read many channels: small ones that can
be interpreted, and layers of networks in their own sizes, which are only planned and compiled."""

from __future__ import annotations

from typing import Any

from case import Case, Triple


def _row(name: str, **fields: Any) -> Case:
    return Case(name, **({"op": "dilated"} | fields))


def _layer(
    name: str,
    channels: int,
    filters: int,
    size: int | Triple,
    dilation: int = 1,
    **fields: Any,
) -> Case:
    """A layer of a network, whose padding keeps the size."""
    fields = {"kernel": (3, 3, 3), "padding": dilation, "tags": ("model",)} | fields
    return _row(
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
SMALL = [
    _row("odd", n=2, channels=5, filters=7, size=(3, 4, 5), padding=1),
    _row("blocks_of_channels", channels=11, filters=20, size=(2, 3, 4), kernel=(2, 3, 1),
          dilation=(1, 2, 1), padding=(0, 2, 0)),
    _row("wide", channels=21, filters=30, size=(2, 2, 5), kernel=(1, 1, 3), padding=(0, 0, 1)),
    _row("many_channels", channels=40, filters=36, size=(2, 3, 3), kernel=(2, 1, 3),
          padding=(1, 0, 1)),
    _row("groups", n=2, channels=6, filters=4, groups=2, size=(3, 3, 4), padding=1),
    _row("stride_dilation_pairs", channels=3, filters=5, size=(7, 6, 8), stride=(2, 1, 3),
          dilation=(1, 2, 2), padding=((0, 2), (1, 0), (3, 1))),
    _row("causal", channels=4, filters=3, size=(3, 3, 4), padding=((2, 0), (1, 1), (1, 1))),
    _row("replicate", channels=3, filters=4, size=(3, 3, 4), padding=(2, 1, 4), mode="replicate"),
    _row("reflect", channels=3, filters=2, size=(3, 4, 3), padding=((2, 1), (0, 3), (1, 2)),
          mode="reflect"),
    _row("circular_stride", channels=2, filters=4, groups=1, size=(4, 4, 5), padding=(1, 4, 2),
          stride=(2, 1, 2), dilation=(1, 2, 1), mode="circular"),
    _row("vectors", channels=8, filters=4, size=(2, 3, 8), dilation=(1, 1, 4),
          padding=(1, 1, 4)),
    _row("single_channel", channels=1, filters=3, size=(3, 4, 5), padding=1),
    _row("single_filter", channels=3, filters=1, size=(3, 4, 5), padding=1),
    _row("single_voxel", n=2, channels=4, filters=5, size=(1, 1, 1), padding=1),
    _row("pointwise", n=2, channels=5, filters=4, size=(2, 3, 4), kernel=(1, 1, 1)),
    _row("up", op="transposed", channels=4, filters=3, size=(2, 3, 4), kernel=(2, 2, 2),
          stride=(2, 2, 2)),
    _row("up_groups", op="transposed", n=2, channels=6, filters=4, groups=2, size=(2, 2, 3),
          stride=(1, 2, 2), padding=1, output_padding=(0, 1, 0)),
    _row("up_phases", op="transposed", channels=2, filters=3, size=(2, 2, 2), stride=(3, 2, 4),
          dilation=(2, 4, 6), padding=((1, 0), (0, 2), (1, 1))),
]  # fmt: skip
BY_NAME = {case.name: case for case in MODELS + SMALL}
