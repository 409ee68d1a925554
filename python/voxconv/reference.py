# SPDX-License-Identifier: Apache-2.0
"""The oracle: every op by explicit index maps and a loop over the taps, in plain torch.

Slow and obvious. Works in the dtype it is given (use float64) and is differentiable by autograd,
any number of times. Arguments, shapes and errors are those of the functions of the same name in
`voxconv`; dtypes and devices are whatever torch can multiply and add.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ._check import check_channels, check_ranks
from ._geometry import (
    PADDING_MODES,
    Geometry,
    IntOrTriple,
    PaddingLike,
    Triple,
    canonicalise,
    integer,
    paddings,
    pairs,
    resolve_transposed,
    triple,
)


def source_index(cell: int, n: int, padding_mode: str) -> int | None:
    """The cell of an axis that a padded position reads.

    Args:
        cell: the position, counted from the first cell that is no padding; it may be negative.
        n: the size of the axis.
        padding_mode: "zeros", "replicate", "reflect" or "circular".

    Returns:
        A cell from 0 to n - 1, or None for a zero.
    """
    if 0 <= cell < n:
        return cell
    if padding_mode == "replicate":
        return 0 if cell < 0 else n - 1
    if padding_mode == "reflect":
        return -cell if cell < 0 else 2 * (n - 1) - cell
    if padding_mode == "circular":
        return cell % n
    return None


def _check(transposed: bool, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> int:
    """The groups, once the shapes are known to fit: no shape is broadcast."""
    check_ranks(x.shape, weight.shape)
    b_shape = None if bias is None else bias.shape
    return check_channels(transposed, x.shape, weight.shape, b_shape, integer(groups, "groups"))[1]


def _gather(x: Tensor, axis: int, cells: list[int | None]) -> Tensor:
    """Take `cells` of a spatial axis; None takes zeros."""
    index = torch.tensor([0 if cell is None else cell for cell in cells], device=x.device)
    live = torch.tensor([cell is not None for cell in cells], device=x.device)
    shape = [1] * x.dim()
    shape[axis] = len(cells)
    return x.index_select(axis, index).masked_fill(~live.view(shape), 0)


def _taps(kernel: Triple) -> Iterator[Triple]:
    for kd in range(kernel[0]):
        for kh in range(kernel[1]):
            for kw in range(kernel[2]):
                yield kd, kh, kw


def _convolve(x: Tensor, weight: Tensor, geometry: Geometry, groups: int) -> Tensor:
    batch, channels, *size = x.shape
    d, h, w = size
    out = geometry.out_size((d, h, w))
    x = x.unflatten(1, (groups, channels // groups))
    weight = weight.unflatten(0, (groups, -1))
    y = x.new_zeros((batch, groups, weight.shape[1], *out))
    for tap in _taps(geometry.kernel):
        kd, kh, kw = tap
        seen = x
        for axis in range(3):
            start = tap[axis] * geometry.dilation[axis] - pairs(geometry.padding)[axis][0]
            cells = [
                source_index(start + o * geometry.stride[axis], size[axis], _mode(geometry))
                for o in range(out[axis])
            ]
            seen = _gather(seen, 3 + axis, cells)
        y = y + torch.einsum("ngcdhw,goc->ngodhw", seen, weight[..., kd, kh, kw])
    return y.flatten(1, 2)


def _mode(geometry: Geometry) -> str:
    return PADDING_MODES[geometry.mode]


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTriple = 1,
    padding: PaddingLike = 0,
    dilation: IntOrTriple = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """`voxconv.conv3d`, slowly: y[o] = bias + sum over taps k of w[k] x[o*stride + k*dilation - p].

    Equivalent to: `F.conv3d(x, weight, bias, stride, padding, dilation, groups)`.

    Args:
        x: [N, C, D, H, W] or [C, D, H, W].
        weight: [O, C/groups, kD, kH, kW].
        bias: [O].
        stride, padding, dilation, groups, padding_mode: see `voxconv.conv3d`.

    Returns:
        [N, O, oD, oH, oW] (or without N).

    Raises:
        ValueError, TypeError: shapes or values that do not fit.
    """
    groups = _check(False, x, weight, bias, groups)
    if x.dim() == 4:
        arguments = (weight, bias, stride, padding, dilation, groups, padding_mode)
        return conv3d(x.unsqueeze(0), *arguments).squeeze(0)
    d, h, w = x.shape[2:]
    kd, kh, kw = weight.shape[2:]
    geometry = canonicalise((d, h, w), (kd, kh, kw), stride, padding, dilation, padding_mode)
    y = _convolve(x, weight, geometry, groups)
    return y if bias is None else y + bias.view(-1, 1, 1, 1)


def depthwise_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTriple = 1,
    padding: PaddingLike = 0,
    dilation: IntOrTriple = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """`voxconv.depthwise_conv3d`, slowly.

    Equivalent to: `F.conv3d(x, weight, bias, stride, padding, dilation, groups=C)`.

    Args:
        x: [N, C, D, H, W] or [C, D, H, W].
        weight: [C*m, 1, kD, kH, kW].
        bias: [C*m].
        stride, padding, dilation, padding_mode: see `voxconv.conv3d`.

    Returns:
        [N, C*m, oD, oH, oW] (or without N).

    Raises:
        ValueError, TypeError: shapes or values that do not fit.
    """
    check_ranks(x.shape, weight.shape)
    return conv3d(x, weight, bias, stride, padding, dilation, x.shape[-4], padding_mode)


def conv_transpose3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTriple = 1,
    padding: PaddingLike = 0,
    output_padding: IntOrTriple = 0,
    groups: int = 1,
    dilation: IntOrTriple = 1,
) -> Tensor:
    """`voxconv.conv_transpose3d`, slowly: x[i] w[k] is added to y[i*stride + k*dilation - p].

    Equivalent to: `F.conv_transpose3d(x, weight, bias, stride, padding, output_padding, groups,
    dilation)`.

    Args:
        x: [N, C, D, H, W] or [C, D, H, W].
        weight: [C, O/groups, kD, kH, kW].
        bias: [O].
        stride, padding, output_padding, groups, dilation: see `voxconv.conv_transpose3d`.

    Returns:
        [N, O, oD, oH, oW] (or without N).

    Raises:
        ValueError, TypeError: shapes or values that do not fit.
    """
    groups = _check(True, x, weight, bias, groups)
    if x.dim() == 4:
        arguments = (weight, bias, stride, padding, output_padding, groups, dilation)
        return conv_transpose3d(x.unsqueeze(0), *arguments).squeeze(0)
    batch, channels, *size = x.shape
    d, h, w = size
    kd, kh, kw = weight.shape[2:]
    geometry, out = resolve_transposed(
        (d, h, w),
        (kd, kh, kw),
        triple(stride, "stride"),
        paddings(padding),
        triple(output_padding, "output_padding"),
        triple(dilation, "dilation"),
    )
    x = x.unflatten(1, (groups, channels // groups))
    weight = weight.unflatten(0, (groups, -1))
    y = x.new_zeros((batch, groups, weight.shape[2], *out))
    for tap in _taps(geometry.kernel):
        kd, kh, kw = tap
        sent = torch.einsum("ngcdhw,gco->ngodhw", x, weight[..., kd, kh, kw])
        for axis in range(3):
            start = tap[axis] * geometry.dilation[axis] - pairs(geometry.padding)[axis][0]
            sender: list[int | None] = [None] * out[axis]
            for i in range(size[axis]):
                if 0 <= start + i * geometry.stride[axis] < out[axis]:
                    sender[start + i * geometry.stride[axis]] = i
            sent = _gather(sent, 3 + axis, sender)
        y = y + sent
    y = y.flatten(1, 2)
    return y if bias is None else y + bias.view(-1, 1, 1, 1)
