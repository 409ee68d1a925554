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

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ._layout import empty_in_layout_of

SCRATCH_BYTES = 64 << 20

_AXES = (-3, -2, -1)


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
    """The circular volume of one pass and the places of taps and outputs in it."""

    def __init__(
        self,
        size: Sequence[int],
        out: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        padding_mode: int,
    ) -> None:
        if padding_mode != 0:
            raise NotImplementedError("the FFT passes pad with zeros only")
        self.shape: list[int] = []
        self.taps: list[Tensor] = []
        for axis in range(3):
            before, after = padding[2 * axis], padding[2 * axis + 1]
            taps = torch.arange(kernel[axis]) * dilation[axis]
            length = fast_length(
                max(
                    size[axis] + max(before, after),
                    (kernel[axis] - 1) * dilation[axis] + 1,
                    (out[axis] - 1) * stride[axis] + 1,
                )
            )
            self.shape.append(length)
            self.taps.append((taps - before) % length)
        self.outputs = (
            ...,
            *(slice(0, (n - 1) * s + 1, s) for n, s in zip(out, stride, strict=True)),
        )
        self.inputs = (..., *(slice(0, n) for n in size))

    def transform(self, volume: Tensor) -> Tensor:
        return torch.fft.rfftn(volume, s=self.shape, dim=_AXES)

    def inverse(self, spectrum: Tensor) -> Tensor:
        return torch.fft.irfftn(spectrum, s=self.shape, dim=_AXES)

    def kernel(self, weight: Tensor) -> Tensor:
        """The spectrum of `weight` [..., kD, kH, kW]."""
        volume = weight.new_zeros(*weight.shape[:-3], *self.shape)
        d, h, w = (taps.to(weight.device) for taps in self.taps)
        volume[..., d[:, None, None], h[:, None], w] = weight
        return self.transform(volume)

    def gradient(self, grad: Tensor) -> Tensor:
        """The spectrum of `grad` [..., oD, oH, oW], spread out by the stride."""
        volume = grad.new_zeros(*grad.shape[:-3], *self.shape)
        volume[self.outputs] = grad
        return self.transform(volume)

    def blocks(self, channels: int, multiplier: int, itemsize: int) -> Iterator[slice]:
        """Runs of input channels whose volumes and spectra fit the scratch."""
        cells = self.shape[0] * self.shape[1] * (self.shape[2] + 2)
        step = max(1, SCRATCH_BYTES // (cells * itemsize * (2 + 4 * multiplier)))
        return (slice(c, min(c + step, channels)) for c in range(0, channels, step))


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    padding_mode: int,
) -> Tensor:
    """`depthwise_forward` by FFT."""
    batch, channels = x.shape[:2]
    kernel = weight.shape[2:]
    size = x.shape[2:]
    out = [
        (size[i] + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel[i] - 1) - 1)
        // stride[i]
        + 1
        for i in range(3)
    ]
    y = empty_in_layout_of(x, (batch, weight.shape[0], *out))
    if y.numel() == 0:
        return y
    volume = _Volume(size, out, kernel, stride, padding, dilation, padding_mode)
    dtype = _compute_dtype(x.dtype)
    multiplier = weight.shape[0] // channels
    weights = weight.reshape(channels, multiplier, *kernel)
    outputs = y.view(batch, channels, multiplier, *out)
    biases = None if bias is None else bias.view(channels, multiplier, 1, 1, 1).to(dtype)
    for block in volume.blocks(channels, multiplier, dtype.itemsize):
        taps = volume.kernel(weights[block].to(dtype)).conj()
        for n in range(batch):
            spectrum = volume.transform(x[n, block].to(dtype)).unsqueeze(1)
            result = volume.inverse(spectrum * taps)[volume.outputs]
            outputs[n, block] = result if biases is None else result + biases[block]
    return y


def grad_input(
    grad: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    padding_mode: int,
) -> Tensor:
    """`depthwise_grad_input` by FFT."""
    batch, out, kernel = grad.shape[0], grad.shape[2:], weight.shape[2:]
    channels, multiplier = weight.shape[:2]
    result = empty_in_layout_of(grad, (batch, channels, *size))
    if result.numel() == 0:
        return result
    volume = _Volume(size, out, kernel, stride, padding, dilation, padding_mode)
    dtype = _compute_dtype(grad.dtype)
    grads = grad.unflatten(1, (channels, multiplier))
    for block in volume.blocks(channels, multiplier, dtype.itemsize):
        taps = volume.kernel(weight[block].to(dtype))
        for n in range(batch):
            spectrum = volume.gradient(grads[n, block].to(dtype)).mul_(taps).sum(1)
            result[n, block] = volume.inverse(spectrum)[volume.inputs]
    return result


def grad_weight(
    grad: Tensor,
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    padding_mode: int,
) -> Tensor:
    """`depthwise_grad_weight` by FFT."""
    batch, channels = x.shape[:2]
    result = x.new_zeros((grad.shape[1], 1, *kernel))
    if x.numel() == 0:
        return result
    volume = _Volume(x.shape[2:], grad.shape[2:], kernel, stride, padding, dilation, padding_mode)
    dtype = _compute_dtype(x.dtype)
    multiplier = grad.shape[1] // channels
    grads = grad.unflatten(1, (channels, multiplier))
    results = result.view(channels, multiplier, *kernel)
    d, h, w = (taps.to(x.device) for taps in volume.taps)
    for block in volume.blocks(channels, multiplier, dtype.itemsize):
        total: Tensor | None = None
        for n in range(batch):
            spectrum = volume.transform(x[n, block].to(dtype)).unsqueeze(1)
            product = volume.gradient(grads[n, block].to(dtype)).conj() * spectrum
            total = product if total is None else total.add_(product)
        assert total is not None
        results[block] = volume.inverse(total)[..., d[:, None, None], h[:, None], w]
    return result
