# SPDX-License-Identifier: Apache-2.0
"""Convolutions over dense volumes: torch's own modules whose forward runs voxconv's functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from .. import functional
from .._activation import activation_index
from .._geometry import (
    IntOrTriple,
    PaddingLike,
    Triple,
    check_output_padding,
    integer,
    is_sequence,
    paddings,
    pairs,
    span,
    triple,
)

PaddingMode: TypeAlias = Literal["zeros", "reflect", "replicate", "circular"]
Device: TypeAlias = "torch.device | str | int | None"


def _positive(value: IntOrTriple, name: str) -> Triple:
    numbers = triple(value, name)
    if min(numbers) < 1:
        raise ValueError(f"{name} must be positive, got {value!r}")
    return numbers


def _count(value: int, name: str, least: int = 0) -> int:
    """A number of channels or groups; without channels a layer is as good as torch's."""
    number = integer(value, name)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return number


def _stored_padding(padding: PaddingLike) -> Any:
    """What a module keeps: a word, a triple where before == after as in torch, else three pairs."""
    parsed = paddings(padding)
    if isinstance(parsed, str):
        return parsed
    if min(parsed) < 0:
        raise ValueError(f"padding must not be negative, got {padding!r}")
    return parsed[::2] if parsed[::2] == parsed[1::2] else pairs(parsed)


def torch_accepts(padding: Any, stride: tuple[int, ...]) -> bool:
    """Whether torch's module accepts this stored padding with this stride."""
    if isinstance(padding, str):
        return padding == "valid" or stride == (1, 1, 1)
    return isinstance(padding, int) or isinstance(padding[0], int)


class Conv3d(torch.nn.Conv3d):
    """`torch.nn.Conv3d` on voxconv's kernels where they apply, else on torch's.

    Parameters, their initial values, state_dict keys and repr are torch's. `padding` also takes
    three (before, after) pairs, and "same" together with a stride: ceil(size / stride) outputs.

    Shapes: input [N, in_channels, D, H, W] or [in_channels, D, H, W], float32, float64, bfloat16
    or float16; weight [out_channels, in_channels / groups, kD, kH, kW]; bias [out_channels].

    Equivalent to: `torch.nn.Conv3d(...)` with the same arguments.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: int or (kD, kH, kW).
        stride: int or triple.
        padding: int, triple, three (before, after) pairs, "valid" or "same".
        dilation: int or triple.
        groups: number of blocks of channels; in_channels makes the convolution depthwise.
        bias: whether to add a learnable bias.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        device: where the parameters live.
        dtype: their type.
        activation: "relu", "leaky_relu", "gelu" or "silu", what follows (see `voxconv.conv3d`).

    Raises:
        TypeError: a size that is not an integer.
        ValueError: a size out of range, an unknown word.
    """

    activation: str | None = None  # of the layers that `convert` made, too

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrTriple,
        stride: IntOrTriple = 1,
        padding: PaddingLike = 0,
        dilation: IntOrTriple = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        activation_index(activation)
        kernel_size = _positive(kernel_size, "kernel_size")
        stride = _positive(stride, "stride")
        stored = _stored_padding(padding)
        known = torch_accepts(stored, stride)
        super().__init__(
            _count(in_channels, "in_channels"),
            _count(out_channels, "out_channels"),
            kernel_size,
            stride,
            stored if known else 0,
            _positive(dilation, "dilation"),
            _count(groups, "groups", 1),
            bias,
            padding_mode,
            device,
            dtype,
        )
        if not known:
            self.padding = stored
            if stored != "same":
                self._reversed_padding_repeated_twice = [n for pair in stored[::-1] for n in pair]
        if activation is not None:
            self.activation = activation

    def extra_repr(self) -> str:
        text: str = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation!r}"

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.conv3d(
            input,
            weight,
            bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.padding_mode,
            activation=self.activation,
        )


class ConvTranspose3d(torch.nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` on voxconv's kernels where they apply, else on torch's.

    Parameters, their initial values, state_dict keys and repr are torch's. `padding` also takes
    three (before, after) pairs: the cells cut off each end of the output.

    Shapes: input [N, in_channels, D, H, W] or [in_channels, D, H, W], float32, float64, bfloat16
    or float16; weight [in_channels, out_channels / groups, kD, kH, kW]; bias [out_channels].

    Equivalent to: `torch.nn.ConvTranspose3d(...)` with the same arguments.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: int or (kD, kH, kW).
        stride: int or triple.
        padding: int, triple or three (before, after) pairs.
        output_padding: int or triple, cells added to the end of the output.
        groups: number of blocks of channels; in_channels makes the convolution depthwise.
        bias: whether to add a learnable bias.
        dilation: int or triple.
        padding_mode: "zeros", the only one torch has.
        device: where the parameters live.
        dtype: their type.

    Raises:
        TypeError: a size that is not an integer.
        ValueError: a size out of range, a word as padding.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: IntOrTriple,
        stride: IntOrTriple = 1,
        padding: IntOrTriple | Sequence[Sequence[int]] = 0,
        output_padding: IntOrTriple = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: IntOrTriple = 1,
        padding_mode: PaddingMode = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if isinstance(padding, str):
            raise ValueError(
                f"a transposed convolution takes its padding as numbers, got {padding!r}"
            )
        stored = _stored_padding(padding)
        known = isinstance(stored[0], int)
        stride, dilation = _positive(stride, "stride"), _positive(dilation, "dilation")
        extra = triple(output_padding, "output_padding")
        check_output_padding(extra, stride, dilation)
        super().__init__(
            _count(in_channels, "in_channels"),
            _count(out_channels, "out_channels"),
            _positive(kernel_size, "kernel_size"),
            stride,
            stored if known else 0,
            extra,
            _count(groups, "groups", 1),
            bias,
            dilation,
            padding_mode,
            device,
            dtype,
        )
        if not known:
            self.padding = stored
            self._reversed_padding_repeated_twice = [n for pair in stored[::-1] for n in pair]

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Apply the layer.

        Args:
            input: [N, in_channels, D, H, W] or [in_channels, D, H, W].
            output_size: the wanted (D, H, W), alone or after (N, C); replaces `output_padding`.

        Returns:
            The output, in the layout of the input.

        Raises:
            ValueError: shapes that do not fit, an output size out of reach.
            TypeError: not a tensor, an output size that is not made of integers, mixed dtypes.
        """
        return functional.conv_transpose3d(
            input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.output_padding if output_size is None else self._reach(input, output_size),
            self.groups,
            self.dilation,
        )

    def _reach(self, input: Tensor, output_size: Sequence[int]) -> Triple:
        """The output padding that gives `output_size`."""
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a tensor, got {type(input).__name__}")
        if not is_sequence(output_size):
            raise TypeError(f"output_size must be a sequence of integers, got {output_size!r}")
        wanted = [integer(n, "output_size") for n in output_size]
        if input.dim() not in (4, 5) or len(wanted) not in (3, input.dim()):
            raise ValueError(
                f"output_size needs 3 or {input.dim()} elements for an input of shape "
                f"{tuple(input.shape)}, a batch of volumes or one; got {tuple(wanted)}"
            )
        cut = paddings(self.padding)
        assert not isinstance(cut, str)
        stride = triple(self.stride, "stride")
        spans = span(triple(self.kernel_size, "kernel_size"), triple(self.dilation, "dilation"))
        least = [
            (n - 1) * s + width - before - after
            for n, s, width, before, after in zip(
                input.shape[-3:], stride, spans, cut[::2], cut[1::2], strict=True
            )
        ]
        d, h, w = (want - n for want, n in zip(wanted[-3:], least, strict=True))
        if any(not 0 <= more < s for more, s in zip((d, h, w), stride, strict=True)):
            most = [n + s - 1 for n, s in zip(least, stride, strict=True)]
            raise ValueError(
                f"output_size {tuple(wanted)} cannot be reached from an input of shape "
                f"{tuple(input.shape)}: from {tuple(least)} to {tuple(most)} can"
            )
        return d, h, w


class DepthwiseConv3d(Conv3d):
    """A convolution of every channel with filters of its own.

    Shapes: input [N, channels, D, H, W] or [channels, D, H, W], float32, float64, bfloat16 or
    float16; weight [channels * multiplier, 1, kD, kH, kW]; output channels c * multiplier ... are
    filters of channel c.

    Equivalent to: `torch.nn.Conv3d(channels, channels * multiplier, kernel_size, groups=channels)`.

    Args:
        channels: channels of the input.
        kernel_size: int or (kD, kH, kW).
        stride: int or triple.
        padding: int, triple, three (before, after) pairs, "valid" or "same".
        dilation: int or triple.
        multiplier: filters per channel.
        bias: whether to add a learnable bias.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
        device: where the parameters live.
        dtype: their type.
        activation: what follows, as in `Conv3d`.

    Raises:
        TypeError: a size that is not an integer.
        ValueError: a size out of range, an unknown word.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: IntOrTriple,
        stride: IntOrTriple = 1,
        padding: PaddingLike = 0,
        dilation: IntOrTriple = 1,
        multiplier: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        channels = _count(channels, "channels", 1)
        multiplier = _count(multiplier, "multiplier", 1)
        super().__init__(
            channels,
            channels * multiplier,
            kernel_size,
            stride,
            padding,
            dilation,
            groups=channels,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
            activation=activation,
        )
