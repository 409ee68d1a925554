# SPDX-License-Identifier: Apache-2.0
"""Launchers of the depthwise family: the arguments and results of the raw ops (`voxconv._ops`).

Tensors may have any strides; results follow the layout of the first one. Nothing here waits for the
device, so that calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from voxconv._geometry import Geometry, Sextuple, Triple, pairs
from voxconv._layout import empty_in_layout_of, is_channels_last

from . import depthwise_plan as plan
from .depthwise_any import correlate_any, grad_weight_any
from .depthwise_plan import Axes, Axis
from .depthwise_planes import correlate_planes
from .depthwise_planes_weight import grad_weight_planes

ZEROS, REPLICATE, REFLECT, CIRCULAR = range(4)  # PaddingMode of csrc/common/conv3d.h


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
    """x [N,C,D,H,W], weight [C*m,1,kD,kH,kW], bias [C*m] -> y [N,C*m,oD,oH,oW].

    `activation` is an Activation of csrc/common/conv3d.h.
    """
    filters = weight.shape[0]
    size, kernel = _triple(x.shape[2:]), _triple(weight.shape[2:])
    geometry = Geometry(kernel, stride, padding, dilation, padding_mode)
    out = geometry.out_size(size)
    y = empty_in_layout_of(x, (x.shape[0], filters, *out))
    axes = _axes(size, out, geometry)
    taps = weight.reshape(filters, 1, -1)
    share = filters // x.shape[1]
    _correlate(x, taps, bias, y, axes, share, padding_mode, activation, backward=False)
    return y


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
    """grad [N,C*m,oD,oH,oW], weight [C,m,kD,kH,kW], bias [C] -> grad_x [N,C,*size]."""
    kernel, out = _triple(weight.shape[2:]), _triple(grad.shape[2:])
    shape = (grad.shape[0], weight.shape[0], *size)
    grad_x = empty_in_layout_of(grad, shape)
    taps = weight.flatten(2)
    if padding_mode == ZEROS:
        axes = _axes(_triple(size), out, Geometry(kernel, stride, padding, dilation, ZEROS))
        _correlate(grad, taps, bias, grad_x, axes, 1, ZEROS, 0, backward=True)
        return grad_x
    # The gradient of the padded volume, whose cells go to those that they were copied from.
    d, h, w = (n + before + after for n, (before, after) in zip(size, pairs(padding), strict=True))
    axes = _axes((d, h, w), out, Geometry(kernel, stride, (0,) * 6, dilation, ZEROS))
    dtype = torch.promote_types(grad.dtype, torch.float32)
    padded = torch.empty((*shape[:2], d, h, w), dtype=dtype, device=grad.device)
    _correlate(grad, taps, None, padded, axes, 1, ZEROS, 0, backward=True)
    for axis, pad in enumerate(pairs(padding)):
        padded = _fold(padded, 2 + axis, *pad, padding_mode)
    if bias is not None:
        padded += bias.view(-1, 1, 1, 1)
    return grad_x.copy_(padded)


def depthwise_grad_weight(
    grad: Tensor,
    x: Tensor,
    kernel: Triple,
    stride: Triple,
    padding: Sextuple,
    dilation: Triple,
    padding_mode: int,
) -> Tensor:
    """grad [N,C*m,oD,oH,oW], x [N,C,D,H,W] -> the weight's gradient [C*m,1,*kernel]."""
    batch, filters = grad.shape[:2]
    geometry = Geometry(_triple(kernel), stride, padding, dilation, padding_mode)
    d, h, w = axes = _axes(_triple(x.shape[2:]), _triple(grad.shape[2:]), geometry)
    taps = d.kernel * h.kernel * w.kernel
    if not grad.numel():
        return x.new_zeros((filters, 1, *kernel))
    last, wide = is_channels_last(grad), x.dtype == torch.float64
    way = plan.weight_planes(axes, batch, filters, last, wide)
    if way is None:
        grad, x = grad.contiguous(), x.contiguous()  # its lanes are along W
        own = plan.tap_blocks(axes, batch, filters)
        parts = _parts(x, batch * own.chunks, taps, filters, False)
        grad_weight_any[(own.grid,)](
            grad,
            x,
            parts,
            grad.stride(),
            x.stride(),
            parts.stride(),
            (d.target, h.target, w.target),
            (d.source, h.source, w.source),
            (d.kernel, h.kernel, w.kernel),
            (d.stride, h.stride, w.stride),
            (d.dilation, h.dilation, w.dilation),
            (d.before, h.before, w.before),
            filters,
            filters // x.shape[1],
            own.planes,
            own.chunks,
            MODE=padding_mode,
            TAPS=plan.BLOCK_TAPS,
            POSITIONS=plan.LANES,
            OFFSET=_offset(grad, x),
            num_warps=plan.LANES // 32,
        )
    else:
        groups = plan.ceil_div(filters, way.tile.channels) * (h.kernel // way.rows)
        parts = _parts(x, way.grid // groups, taps, filters, last)
        grad_weight_planes[(way.grid,)](
            grad,
            x,
            parts,
            grad.stride(),
            x.stride(),
            parts.stride(),
            (d.target, h.target, w.target),
            (d.source, h.source, w.source),
            (d.stride, h.stride, w.stride),
            (d.dilation, h.dilation, w.dilation),
            (d.before, h.before, w.before),
            (d.lattice, h.lattice),
            filters,
            filters // x.shape[1],
            way.slab,
            way.slabs,
            KD=d.kernel,
            KH=h.kernel,
            KW=w.kernel,
            MARCH_D=d.march,
            MARCH_H=h.march,
            MODE=padding_mode,
            OWN_KH=way.rows,
            LINES=way.lines,
            POSITIONS=way.tile.positions,
            CHANNELS=way.tile.channels,
            OFFSET=_offset(grad, x),
            num_warps=way.tile.warps,
        )
    return parts.sum(0).t().reshape(filters, 1, *kernel).to(x.dtype)


def channel_sum(grad: Tensor) -> Tensor:
    """grad [N,C,D,H,W] -> [C]: torch's own sum, which adds halves in float32, in a fixed order."""
    return grad.sum((0, 2, 3, 4))


def _correlate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    axes: Axes,
    share: int,
    mode: int,
    activation: int,
    backward: bool,
) -> None:
    """y [N,C,...] from x with weight [C, summed, taps]; `backward`: as grad_input does it.

    Channel c of y reads `summed` channels of x, from c * summed / share on.
    """
    if not y.numel():
        return
    batch, channels = y.shape[:2]
    summed = weight.shape[1]
    last, wide = is_channels_last(y), x.dtype == torch.float64
    way = None
    if not backward:
        way = plan.planes(axes, batch, channels, summed, last, wide)
    elif all(axis.stride == 1 for axis in axes):
        d, h, w = (axis.turned() for axis in axes)
        way = plan.planes((d, h, w), batch, channels, summed, last, wide)
    if way is not None:
        if backward:
            weight, axes = weight.flip(2), (d, h, w)
        d, h, w = axes
        correlate_planes[(way.grid,)](
            x,
            _pack(weight, way.tile.channels),
            bias,
            y,
            x.stride(),
            y.stride(),
            _triple(x.shape[2:]),
            _triple(y.shape[2:]),
            (d.stride, h.stride, w.stride),
            (d.dilation, h.dilation, w.dilation),
            (d.before, h.before, w.before),
            (d.lattice, h.lattice),
            channels,
            share,
            way.slab,
            way.slabs,
            SUMMED=summed,
            KD=d.kernel,
            KH=h.kernel,
            KW=w.kernel,
            MARCH_D=d.march,
            MARCH_H=h.march,
            MODE=mode,
            ACTIVATION=activation,
            LINES=way.lines,
            POSITIONS=way.tile.positions,
            CHANNELS=way.tile.channels,
            HOIST=way.hoist,
            OFFSET=_offset(x, y),
            num_warps=way.tile.warps,
        )
        return
    taps = [axis.backward_taps() if backward else axis.forward_taps() for axis in axes]
    targets = tuple(axis.turned() if backward else axis for axis in axes)
    own = plan.cells(targets, taps[1].divisor, batch, channels, last)
    correlate_any[(own.grid,)](
        x,
        _pack(weight, own.tile.channels),
        bias,
        y,
        x.stride(),
        y.stride(),
        _triple(x.shape[2:]),
        _triple(y.shape[2:]),
        *map(tuple, taps),
        channels,
        share,
        SUMMED=summed,
        MODE=mode,
        ACTIVATION=activation,
        POSITIONS=own.tile.positions,
        CHANNELS=own.tile.channels,
        PHASES=taps[2].divisor > 1,
        OFFSET=_offset(x, y),
        num_warps=own.tile.warps,
    )


def _fold(padded: Tensor, dim: int, before: int, after: int, mode: int) -> Tensor:
    """Add the cells of the padding of an axis to the ones that they are copies of."""
    n = padded.shape[dim] - before - after
    left, cells, right = padded.split((before, n, after), dim)
    cells = cells.clone()
    if mode == REPLICATE:
        cells.narrow(dim, 0, 1).add_(left.sum(dim, keepdim=True))
        cells.narrow(dim, n - 1, 1).add_(right.sum(dim, keepdim=True))
    elif mode == REFLECT:
        cells.narrow(dim, min(1, n - 1), before).add_(left.flip(dim))
        cells.narrow(dim, n - 1 - after, after).add_(right.flip(dim))
    else:
        cells.narrow(dim, n - before, before).add_(left)
        cells.narrow(dim, 0, after).add_(right)
    return cells


def _axes(source: Triple, target: Triple, geometry: Geometry) -> Axes:
    kernel, stride, padding, dilation, _ = geometry
    axes = zip(source, target, kernel, stride, dilation, padding[::2], strict=True)
    d, h, w = (Axis(*axis) for axis in axes)
    return d, h, w


def _triple(values: Sequence[int]) -> Triple:
    d, h, w = values
    return d, h, w


def _parts(x: Tensor, programs: int, taps: int, filters: int, channels_last: bool) -> Tensor:
    """Empty sums [programs, taps, filters]; what a program writes lies together."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if channels_last:
        return x.new_empty((programs, taps, filters), dtype=dtype)
    return x.new_empty((programs, filters, taps), dtype=dtype).transpose(1, 2)


def _offset(*tensors: Tensor) -> tl.dtype:
    """The type of an offset from a plane of a channel: 32 bits where they suffice."""
    spans = (
        sum((n - 1) * step for n, step in zip(t.shape[3:], t.stride()[3:], strict=True))
        for t in tensors
    )
    return tl.int32 if max(spans) < 2**31 else tl.int64


def _pack(weight: Tensor, block: int) -> Tensor:
    """[C, summed, taps] as [summed, blocks, taps, block]: the channels of a block lie together."""
    channels, summed, taps = weight.shape
    if block == 1 and summed == 1:
        return weight.contiguous()
    blocks = plan.ceil_div(channels, block)
    weight = F.pad(weight, (0, 0, 0, 0, 0, blocks * block - channels))
    return weight.view(blocks, block, summed, taps).permute(2, 0, 3, 1).contiguous()
