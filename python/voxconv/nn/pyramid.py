# SPDX-License-Identifier: Apache-2.0
"""Convolutions of several dilations side by side, on one input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._geometry import IntOrTriple
from .dense import Conv3d, Device, PaddingMode


class DilatedPyramid3d(torch.nn.Module):
    """Branches that read one input with kernels of different size and dilation (ASPP).

    Shapes: input [N, in_channels, D, H, W] or [in_channels, D, H, W], float32, float64, bfloat16 or
    float16; output [N, branches * out_channels, D, H, W], the channels of the first branch first.
    Each branch is a `voxconv.nn.Conv3d` with padding "same", in `branches`.

    Equivalent to: `torch.cat([conv(x) for conv in branches], dim=-4)`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output of each branch.
        kernel_sizes: of each branch, an int or (kD, kH, kW).
        dilations: of each branch, an int or triple.
        bias: whether branches add a learnable bias.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        device: where the parameters live.
        dtype: their type.
        activation: what follows each branch, see `voxconv.conv3d`.

    Raises:
        ValueError: no branch, kernel sizes and dilations that are not as many, sizes out of range.
        TypeError: a size that is not an integer.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_sizes: Sequence[IntOrTriple] = (1, 3, 3, 3),
        dilations: Sequence[IntOrTriple] = (1, 2, 4, 6),
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        if not kernel_sizes or len(kernel_sizes) != len(dilations):
            raise ValueError(
                "a pyramid needs as many kernel_sizes as dilations, one at least, got "
                f"{kernel_sizes!r} and {dilations!r}"
            )
        super().__init__()
        self.branches = torch.nn.ModuleList(
            Conv3d(
                in_channels,
                out_channels,
                kernel_size,
                padding="same",
                dilation=dilation,
                bias=bias,
                padding_mode=padding_mode,
                device=device,
                dtype=dtype,
                activation=activation,
            )
            for kernel_size, dilation in zip(kernel_sizes, dilations, strict=True)
        )

    def forward(self, input: Tensor) -> Tensor:
        """All branches of the input, one behind the other along the channels."""
        return torch.cat([branch(input) for branch in self.branches], dim=-4)
