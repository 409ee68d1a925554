# SPDX-License-Identifier: Apache-2.0
"""Depthwise passes through `torch.fft`, for large kernels; zeros padding only.

All three work on circular volumes of one common size per axis. Tap k of the kernel sits at cell
(k * dilation - padding before) mod size, so nothing has to be shifted afterwards, stride becomes a
slice of the output (or a zero-stuffed gradient) and dilation a stuffed kernel. The volume is long
enough that what wraps around meets zeros only.

Blocks of channels are transformed one after the other so that the scratch stays near
`SCRATCH_BYTES` whatever the batch and the channel count. Each block is computed in one fixed order.
Arithmetic is float32 (float64 for float64 tensors); halves are rounded once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from ._geometry import Geometry, Sextuple, Triple
from ._layout import empty_in_layout_of

SCRATCH_BYTES = 16 << 20

_AXES = (-3, -2, -1)
_Cells: TypeAlias = slice | Tensor


def fast_length(least: int) -> int:
    """The smallest integer >= `least` whose prime factors are 2, 3 and 5."""
    best = 1 << max(least - 1, 0).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            rest = -(-least // three)
            best = min(best, three << max(rest - 1, 0).bit_length())
            three *= 3
        five *= 5
    return best


class _Volume:
    """The circular volume of one pass and the places of taps, inputs and outputs in it."""

    def __init__(self, size: Triple, geometry: Geometry) -> None:
        kernel, stride, padding, dilation, mode = geometry
        if mode != 0:
            raise NotImplementedError("the FFT passes pad with zeros only")
        d, h, w = size
        self.out = geometry.out_size((d, h, w))
        self.inputs = (slice(0, d), slice(0, h), slice(0, w))
        od, oh, ow = (slice(0, (n - 1) * s + 1, s) for n, s in zip(self.out, stride, strict=True))
        self.outputs = (od, oh, ow)
        self.shape: list[int] = []
        self.taps: list[Tensor] = []
        for axis in range(3):
            before, after = padding[2 * axis], padding[2 * axis + 1]
            taps = torch.arange(kernel[axis]) * dilation[axis]
            length = fast_length(
                max(
                    size[axis] + max(before, after),
                    (kernel[axis] - 1) * dilation[axis] + 1,
                    (self.out[axis] - 1) * stride[axis] + 1,
                )
            )
            self.shape.append(length)
            self.taps.append((taps - before) % length)

    def transform(self, volume: Tensor) -> Tensor:
        spectrum: Tensor = torch.fft.rfftn(volume, s=self.shape, dim=_AXES)
        return spectrum

    def inverse(self, spectrum: Tensor, d: _Cells, h: _Cells, w: _Cells) -> Tensor:
        """The cells at `d`, `h`, `w` of the real volume of a spectrum.

        Along the last axis by a complex transform of the half that is kept, each line counted
        twice but the first and, of an even length, the last: MKL's complex-to-real one rounds
        differently for each number of threads.
        """
        length = self.shape[2]
        half = torch.fft.ifftn(spectrum, dim=_AXES[:2])[..., d, :, :][..., h, :]
        twice = half.new_full((length // 2 + 1,), 2)
        twice[0] = 1
        if length % 2 == 0:
            twice[-1] = 1
        volume: Tensor = torch.fft.ifft(half * twice, n=length, dim=-1).real[..., w]
        return volume

    def kernel(self, weight: Tensor) -> Tensor:
        """The spectrum of `weight` [..., kD, kH, kW]."""
        volume = weight.new_zeros(*weight.shape[:-3], *self.shape)
        d, h, w = (taps.to(weight.device) for taps in self.taps)
        volume[..., d[:, None, None], h[:, None], w] = weight
        return self.transform(volume)

    def gradient(self, grad: Tensor) -> Tensor:
        """The spectrum of `grad` [..., oD, oH, oW], spread out by the stride."""
        volume = grad.new_zeros(*grad.shape[:-3], *self.shape)
        d, h, w = self.outputs
        volume[..., d, h, w] = grad
        return self.transform(volume)

    def blocks(self, channels: int, multiplier: int, itemsize: int) -> Iterator[slice]:
        """Runs of input channels whose volumes and spectra fit the scratch."""
        cells = self.shape[0] * self.shape[1] * (self.shape[2] + 2)
        step = max(1, SCRATCH_BYTES // (cells * itemsize * (2 + 4 * multiplier)))
        return (slice(c, min(c + step, channels)) for c in range(0, channels, step))


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product(a: Tensor, b: Tensor, conjugate: bool = False) -> Tensor:
    """`a * b` or `a.conj() * b`, from real products.

    The complex product rounds differently where the cells of two threads meet, and inside a
    compiled graph nobody heeds the lazy bit of `Tensor.conj`.
    """
    real, imag = a.real * b.real, a.real * b.imag
    if conjugate:
        return torch.complex(real.add_(a.imag * b.imag), imag.sub_(a.imag * b.real))
    return torch.complex(real.sub_(a.imag * b.imag), imag.add_(a.imag * b.real))


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Triple,
    padding: Sextuple,
    dilation: Triple,
    padding_mode: int,
) -> Tensor:
    """`depthwise_forward` by FFT."""
    batch, channels, d, h, w = x.shape
    kernel = (weight.shape[2], weight.shape[3], weight.shape[4])
    volume = _Volume((d, h, w), Geometry(kernel, stride, padding, dilation, padding_mode))
    y = empty_in_layout_of(x, (batch, weight.shape[0], *volume.out))
    if y.numel() == 0:
        return y
    dtype = _compute_dtype(x.dtype)
    multiplier = weight.shape[0] // channels
    weights = weight.view(channels, multiplier, *kernel)
    outputs = y.view(batch, channels, multiplier, *volume.out)
    biases = None if bias is None else bias.view(channels, multiplier, 1, 1, 1).to(dtype)
    for block in volume.blocks(channels, multiplier, dtype.itemsize):
        taps = volume.kernel(weights[block].to(dtype))
        for n in range(batch):
            spectrum = volume.transform(x[n, block].to(dtype)).unsqueeze(1)
            result = volume.inverse(_product(taps, spectrum, conjugate=True), *volume.outputs)
            outputs[n, block] = result if biases is None else result + biases[block]
    return y


def grad_input(
    grad: Tensor,
    weight: Tensor,
    size: Triple,
    stride: Triple,
    padding: Sextuple,
    dilation: Triple,
    padding_mode: int,
    bias: Tensor | None = None,
) -> Tensor:
    """`depthwise_grad_input` by FFT."""
    batch = grad.shape[0]
    channels, multiplier = weight.shape[:2]
    kernel = (weight.shape[2], weight.shape[3], weight.shape[4])
    volume = _Volume(size, Geometry(kernel, stride, padding, dilation, padding_mode))
    result = empty_in_layout_of(grad, (batch, channels, *size))
    if result.numel() == 0:
        return result
    dtype = _compute_dtype(grad.dtype)
    grads = grad.view(batch, channels, multiplier, *volume.out)
    for block in volume.blocks(channels, multiplier, dtype.itemsize):
        taps = volume.kernel(weight[block].to(dtype))
        for n in range(batch):
            products = _product(volume.gradient(grads[n, block].to(dtype)), taps)
            total = products[:, 0]
            for j in range(1, multiplier):
                total += products[:, j]
            cells = volume.inverse(total, *volume.inputs)
            if bias is not None:
                cells += bias[block].view(-1, 1, 1, 1).to(dtype)
            result[n, block] = cells
    return result


def grad_weight(
    grad: Tensor,
    x: Tensor,
    kernel: Triple,
    stride: Triple,
    padding: Sextuple,
    dilation: Triple,
    padding_mode: int,
) -> Tensor:
    """`depthwise_grad_weight` by FFT."""
    batch, channels, d, h, w = x.shape
    volume = _Volume((d, h, w), Geometry(kernel, stride, padding, dilation, padding_mode))
    result = x.new_zeros((grad.shape[1], 1, *kernel))
    if x.numel() == 0:
        return result
    dtype = _compute_dtype(x.dtype)
    multiplier = grad.shape[1] // channels
    grads = grad.view(batch, channels, multiplier, *volume.out)
    results = result.view(channels, multiplier, *kernel)
    taps = [cells.to(x.device) for cells in volume.taps]
    for block in volume.blocks(channels, multiplier, dtype.itemsize):
        total: Tensor | None = None
        for n in range(batch):
            spectrum = volume.transform(x[n, block].to(dtype)).unsqueeze(1)
            gradient = volume.gradient(grads[n, block].to(dtype))
            product = _product(gradient, spectrum, conjugate=True)
            total = product if total is None else total.add_(product)
        assert total is not None
        results[block] = volume.inverse(total, *taps)
    return result
