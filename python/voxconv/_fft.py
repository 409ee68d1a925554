# SPDX-License-Identifier: Apache-2.0
"""The depthwise passes by torch.fft, for kernels of many taps on a GPU; zeros padding only.

Along every axis the volume is a circle of L cells: the input's, and so many behind them that a tap
which leaves the input at either end meets zeros. With tap k at place (k * dilation - before) mod L,
output o at place o * stride and spectra X, W and Y of them

    forward      Y = X conj(W)
    grad_input   X = Y W
    grad_weight  W = conj(Y) X

(the correlation theorem). Numbers that are not finite spread over their volume, and results are
rounded as sums over all of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ._geometry import Geometry, Sextuple, Triple
from ._layout import empty_in_layout_of

_CHUNK_BYTES = 1 << 28  # of a spectrum: channels are transformed so many at a time
_AXES = (-3, -2, -1)

Places = tuple[slice, slice, slice]


class _Circle:
    """The volume that a pass works on, and what lies where in it."""

    def __init__(self, x_size: Triple, geometry: Geometry) -> None:
        kernel, stride, padding, dilation, mode = geometry
        if mode:
            raise NotImplementedError("the FFT pads with zeros only")
        self.inputs = _places(x_size, (1, 1, 1))
        self.outputs = _places(geometry.out_size(x_size), stride)
        self.taps = _places(kernel, dilation)
        self.before = padding[::2]  # taps lie that much earlier, round the circle
        d, h, w = (
            fast_length(max(n + max(before, after), taps.stop, outputs.stop))
            for n, before, after, taps, outputs in zip(
                x_size, padding[::2], padding[1::2], self.taps, self.outputs, strict=True
            )
        )
        self.size = (d, h, w)

    def spectrum(self, values: Tensor, places: Places) -> Tensor:
        """The transform of a volume with `values` at `places` and zeros elsewhere."""
        volume = values.new_zeros((*values.shape[:-3], *self.size))
        d, h, w = places
        volume[..., d, h, w] = values
        if places is self.taps:
            volume = volume.roll([-n for n in self.before], _AXES)
        transformed: Tensor = torch.fft.rfftn(volume, dim=_AXES)
        return transformed

    def values(self, spectrum: Tensor, places: Places) -> Tensor:
        """The values at `places` of a volume, given its spectrum."""
        volume: Tensor = torch.fft.irfftn(spectrum, s=self.size, dim=_AXES)
        if places is self.taps:
            volume = volume.roll(self.before, _AXES)
        d, h, w = places
        return volume[..., d, h, w]

    def chunks(self, batch: int, channels: int, multiplier: int, item: int) -> Iterable[slice]:
        """Channels, so many at a time that their spectra stay small."""
        each = batch * multiplier * math.prod(self.size) * item
        step = max(_CHUNK_BYTES // max(each, 1), 1)
        return (slice(first, first + step) for first in range(0, channels, step))


def _places(counts: Triple, steps: Triple) -> Places:
    d, h, w = (
        slice(0, (count - 1) * step + 1, step) for count, step in zip(counts, steps, strict=True)
    )
    return d, h, w


def fast_length(least: int) -> int:
    """The smallest even number from `least` on without prime factors above 7 (even: real FFTs)."""
    length = least + least % 2
    while not _is_smooth(length):
        length += 2
    return length


def _is_smooth(number: int) -> bool:
    for prime in (2, 3, 5, 7):
        while number % prime == 0:
            number //= prime
    return number == 1


def depthwise_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Triple,
    padding: Sextuple,
    dilation: Triple,
    padding_mode: int,
    activation: int = 0,
) -> Tensor:
    """As the op of `voxconv._ops`."""
    if activation:
        raise NotImplementedError("the FFT has no activation of its own")
    batch, channels, size, kernel = x.shape[0], x.shape[1], _triple(x), _triple(weight)
    geometry = Geometry(kernel, stride, padding, dilation, padding_mode)
    circle = _Circle(size, geometry)
    filters = weight.reshape(channels, -1, *kernel)
    out = geometry.out_size(size)
    y = empty_in_layout_of(x, (batch, weight.shape[0], *out))
    split = y.unflatten(1, filters.shape[:2])
    for some in circle.chunks(batch, channels, filters.shape[1], x.element_size()):
        spectrum = circle.spectrum(x[:, some], circle.inputs).unsqueeze(2)
        spectrum = spectrum * circle.spectrum(filters[some], circle.taps).conj()
        split[:, some] = circle.values(spectrum, circle.outputs)
    return y if bias is None else y.add_(bias.view(-1, 1, 1, 1))


def depthwise_grad_input(
    grad: Tensor,
    weight: Tensor,
    size: Triple,
    stride: Triple,
    padding: Sextuple,
    dilation: Triple,
    padding_mode: int,
    bias: Tensor | None = None,
) -> Tensor:
    """As the op of `voxconv._ops`."""
    batch, channels = grad.shape[0], weight.shape[0]
    geometry = Geometry(_triple(weight), stride, padding, dilation, padding_mode)
    size = (size[0], size[1], size[2])
    circle = _Circle(size, geometry)
    grads = grad.unflatten(1, weight.shape[:2])
    x = empty_in_layout_of(grad, (batch, channels, *size))
    for some in circle.chunks(batch, channels, weight.shape[1], grad.element_size()):
        spectrum = circle.spectrum(grads[:, some], circle.outputs)
        spectrum = (spectrum * circle.spectrum(weight[some], circle.taps)).sum(2)
        x[:, some] = circle.values(spectrum, circle.inputs)
    return x if bias is None else x.add_(bias.view(-1, 1, 1, 1))


def depthwise_grad_weight(
    grad: Tensor,
    x: Tensor,
    kernel: Triple,
    stride: Triple,
    padding: Sextuple,
    dilation: Triple,
    padding_mode: int,
) -> Tensor:
    """As the op of `voxconv._ops`."""
    batch, channels, size = x.shape[0], x.shape[1], _triple(x)
    kernel = (kernel[0], kernel[1], kernel[2])
    geometry = Geometry(kernel, stride, padding, dilation, padding_mode)
    circle = _Circle(size, geometry)
    grads = grad.unflatten(1, (channels, -1))
    weight = x.new_empty((channels, grads.shape[2], *kernel))
    for some in circle.chunks(batch, channels, grads.shape[2], x.element_size()):
        spectrum = circle.spectrum(x[:, some], circle.inputs).unsqueeze(2)
        spectrum = (spectrum * circle.spectrum(grads[:, some], circle.outputs).conj()).sum(0)
        weight[some] = circle.values(spectrum, circle.taps)
    return weight.flatten(0, 1).unsqueeze(1)


def _triple(tensor: Tensor) -> Triple:
    d, h, w = tensor.shape[-3:]
    return d, h, w
