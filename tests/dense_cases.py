# SPDX-License-Identifier: Apache-2.0
"""Problems of convolutions whose outputs read many channels, small ones and layers of networks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cases import NCDHW, Case, Tensors, Triple

if TYPE_CHECKING:
    import torch

    from testing import Conv


@dataclass(frozen=True)
class Dense(Case):
    """A :class:`Case` with `filters` output channels in `groups`."""

    op: str = "dilated"
    filters: int = 1

    @property
    def weight_shape(self) -> tuple[int, ...]:
        if self.transposed:
            return self.channels, self.filters // self.groups, *self.kernel
        return self.filters, self.channels // self.groups, *self.kernel


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
SMALL = [
    Dense("odd", n=2, channels=5, filters=7, size=(3, 4, 5), padding=1),
    Dense("blocks_of_channels", channels=11, filters=20, size=(2, 3, 4), kernel=(2, 3, 1),
          dilation=(1, 2, 1), padding=(0, 2, 0)),
    Dense("wide", channels=21, filters=30, size=(2, 2, 5), kernel=(1, 1, 3), padding=(0, 0, 1)),
    Dense("many_channels", channels=40, filters=36, size=(2, 3, 3), kernel=(2, 1, 3),
          padding=(1, 0, 1)),
    Dense("groups", n=2, channels=6, filters=4, groups=2, size=(3, 3, 4), padding=1),
    Dense("stride_dilation_pairs", channels=3, filters=5, size=(7, 6, 8), stride=(2, 1, 3),
          dilation=(1, 2, 2), padding=((0, 2), (1, 0), (3, 1))),
    Dense("causal", channels=4, filters=3, size=(3, 3, 4), padding=((2, 0), (1, 1), (1, 1))),
    Dense("replicate", channels=3, filters=4, size=(3, 3, 4), padding=(2, 1, 4), mode="replicate"),
    Dense("reflect", channels=3, filters=2, size=(3, 4, 3), padding=((2, 1), (0, 3), (1, 2)),
          mode="reflect"),
    Dense("circular_stride", channels=2, filters=4, groups=1, size=(4, 4, 5), padding=(1, 4, 2),
          stride=(2, 1, 2), dilation=(1, 2, 1), mode="circular"),
    Dense("vectors", channels=8, filters=4, size=(2, 3, 8), dilation=(1, 1, 4),
          padding=(1, 1, 4)),
    Dense("single_channel", channels=1, filters=3, size=(3, 4, 5), padding=1),
    Dense("single_filter", channels=3, filters=1, size=(3, 4, 5), padding=1),
    Dense("single_voxel", n=2, channels=4, filters=5, size=(1, 1, 1), padding=1),
    Dense("pointwise", n=2, channels=5, filters=4, size=(2, 3, 4), kernel=(1, 1, 1)),
    Dense("up", op="transposed", channels=4, filters=3, size=(2, 3, 4), kernel=(2, 2, 2),
          stride=(2, 2, 2)),
    Dense("up_groups", op="transposed", n=2, channels=6, filters=4, groups=2, size=(2, 2, 3),
          stride=(1, 2, 2), padding=1, output_padding=(0, 1, 0)),
    Dense("up_phases", op="transposed", channels=2, filters=3, size=(2, 2, 2), stride=(3, 2, 4),
          dilation=(2, 4, 6), padding=((1, 0), (0, 2), (1, 1))),
]  # fmt: skip
BY_NAME = {case.name: case for case in MODELS + SMALL}


def reference(
    case: Dense, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The row through the package's oracle."""
    import voxconv

    op = voxconv.reference.conv_transpose3d if case.transposed else voxconv.reference.conv3d
    return op(x, weight, bias, **case.kwargs())


def public(
    case: Dense, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The row through the public function."""
    import voxconv

    op = voxconv.conv_transpose3d if case.transposed else voxconv.conv3d
    return op(x, weight, bias, **case.kwargs())


def by_torch(
    case: Dense, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The row by torch alone, which pads a copy."""
    import torch.nn.functional as F

    flat = [side for pair in reversed(case.pads) for side in pair]
    if case.transposed:
        y = F.conv_transpose3d(
            x, weight, bias, case.stride, 0, case.output_padding, case.groups, case.dilation
        )
        return F.pad(y, [-side for side in flat])
    padded = F.pad(x, flat, "constant" if case.mode == "zeros" else case.mode)
    return F.conv3d(padded, weight, bias, case.stride, 0, case.dilation, case.groups)


def summands(case: Dense, which: str) -> int:
    """How many products are added up for one number of a pass."""
    size, out = math.prod(case.size), math.prod(case.out_size)
    if which in ("grad_weight", "grad_bias"):
        return case.n * (size if case.transposed and which == "grad_weight" else out)
    if which == "forward":
        return case.taps * case.channels // case.groups + 1
    often = -(-out // size) if case.mode != "zeros" else 1  # cells of the border are read often
    return case.taps * case.filters // case.groups * often


def assert_dense(case: Dense, tensors: Tensors, dtype: torch.dtype, conv: Conv) -> None:
    """All four passes of a row held to :func:`assert_accurate`; seed 0 values, any strides."""
    from testing import all_passes, assert_accurate

    drawn = Tensors(*(t.double() for t in case.make(dtype)))
    oracle = all_passes(reference, case, drawn)
    theirs = all_passes(by_torch, case, case.make(dtype, layout=NCDHW))
    for which, got in all_passes(conv, case, tensors).items():
        assert got.dtype == dtype
        assert_accurate(
            f"{case} {which}", got, oracle[which], theirs[which], taps=summands(case, which)
        )
