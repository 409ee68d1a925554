# SPDX-License-Identifier: Apache-2.0
"""Launchers of the dilated family: the arguments and results of the raw ops (`voxconv._ops`).

Tensors may have any strides; results follow the layout of the first one. Nothing here waits for the
device, so that calls can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from voxconv._geometry import Geometry, Sextuple, Triple
from voxconv._layout import empty_in_layout_of, is_channels_last

from . import dilated_plan as plan
from .autotune import tuned
from .depthwise_plan import Axes, Axis, AxisTaps, ceil_div
from .dilated_gemm import add_parts, correlate, correlate_weight
from .dilated_plan import Config

ADDED = 256  # elements of a program of add_parts
_KINDS = {
    torch.bfloat16: "half",
    torch.float16: "half",
    torch.float32: "float32",
    torch.float64: "float64",
}
# Blocks that begin inside of a tensor may end that far behind it.
_OFFSETS = 2**31 - 2**16


def dilated_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Triple,
    padding: Sextuple,
    dilation: Triple,
    padding_mode: int,
    groups: int,
    activation: int = 0,
) -> Tensor:
    """x [N,C,D,H,W], weight [O,C/groups,kD,kH,kW], bias [O] -> y [N,O,oD,oH,oW].

    `activation` is an Activation of csrc/common/conv3d.h.
    """
    size, kernel = _triple(x.shape[2:]), _triple(weight.shape[2:])
    out = Geometry(kernel, stride, padding, dilation, padding_mode).out_size(size)
    y = empty_in_layout_of(x, (x.shape[0], weight.shape[0], *out))
    axes = _axes(size, out, kernel, stride, padding, dilation)
    taps = [axis.forward_taps() for axis in axes]
    matrices = weight.flatten(2).unflatten(0, (groups, -1)).permute(0, 3, 2, 1)
    _correlate(x, matrices, bias, y, axes, taps, padding_mode, activation)
    return y


def dilated_grad_input(
    grad: Tensor,
    weight: Tensor,
    size: Triple,
    stride: Triple,
    padding: Sextuple,
    dilation: Triple,
    padding_mode: int,
    groups: int,
    bias: Tensor | None,
) -> Tensor:
    """grad [N,O,oD,oH,oW], weight [O,C/groups,kD,kH,kW], bias [C] -> grad_x [N,C,*size].

    Of zeros as padding only: what cells of other paddings got is added by `voxconv._fold`.
    """
    if padding_mode != 0:
        raise NotImplementedError(f"grad_input has no padding mode but zeros, got {padding_mode}")
    kernel, out = _triple(weight.shape[2:]), _triple(grad.shape[2:])
    grad_x = empty_in_layout_of(grad, (grad.shape[0], groups * weight.shape[1], *size))
    axes = _axes(_triple(size), out, kernel, stride, padding, dilation)
    taps = [axis.backward_taps() for axis in axes]
    d, h, w = (axis._replace(target=axis.source, source=axis.target) for axis in axes)
    matrices = weight.flatten(2).unflatten(0, (groups, -1)).permute(0, 3, 1, 2)
    _correlate(grad, matrices, bias, grad_x, (d, h, w), taps, 0, 0)
    return grad_x


def dilated_grad_weight(
    grad: Tensor,
    x: Tensor,
    kernel: Triple,
    stride: Triple,
    padding: Sextuple,
    dilation: Triple,
    padding_mode: int,
    groups: int,
) -> Tensor:
    """grad [N,O,oD,oH,oW], x [N,C,D,H,W] -> the weight's gradient [O,C/groups,*kernel]."""
    batch, filters, channels = grad.shape[0], grad.shape[1] // groups, x.shape[1] // groups
    y = x.new_empty((groups * filters, channels, *kernel))
    if not y.numel():
        return y
    if not grad.numel():
        return y.zero_()
    d, h, w = axes = _axes(
        _triple(x.shape[2:]), _triple(grad.shape[2:]), kernel, stride, padding, dilation
    )
    kind = _kind(x)
    problem = (axes, batch, groups, filters, channels, kind)
    units = _unit(grad), _unit(x)
    lined = _lined(units[1], w.stride == 1, w.source, w.target, w.before, w.dilation)
    align = _alignment(grad, x, units, filters, channels, lined)

    def launch(config: Config) -> None:
        own = plan.weight_cut(config, *problem)
        target = y if own.splits == 1 else _parts(y, own.splits)
        correlate_weight[(own.grid,)](
            grad,
            x,
            target,
            grad.stride(),
            x.stride(),
            (d.target, h.target, w.target),
            (d.source, h.source, w.source),
            (d.kernel, h.kernel, w.kernel),
            (d.stride, h.stride, w.stride),
            (d.dilation, h.dilation, w.dilation),
            (d.before, h.before, w.before),
            batch,
            groups,
            filters,
            channels,
            own.splits,
            y.numel(),
            MODE=padding_mode,
            PRECISION="tf32" if kind == "tf32" else "ieee",
            WIDEN=_widens(x),
            ROWS=config.rows,
            COLUMNS=config.columns,
            TERMS=config.terms,
            TAPS=config.taps,
            GRAD_UNIT=units[0],
            X_UNIT=units[1],
            ALIGN=align,
            OFFSET=_offset(grad, x),
            num_warps=config.warps,
            num_stages=config.stages,
        )
        _add(target, None, y, own.splits, 0)

    config = plan.weight(*problem).config
    launch(tuned("weight", x, (problem, units, align), plan.variants(config, kind), launch))
    return y


def _correlate(
    x: Tensor,
    matrices: Tensor,
    bias: Tensor | None,
    y: Tensor,
    axes: Axes,
    taps: Sequence[AxisTaps],
    mode: int,
    activation: int,
) -> None:
    """y from x with matrices [groups, taps, channels of x, channels of y]."""
    if not y.numel():
        return
    groups, _, channels, filters = matrices.shape
    d, h, w = taps
    kind = _kind(x)
    classes = [axis.divisor for axis in taps]
    problem = (axes, classes, y.shape[0], groups, filters, channels, kind)
    units = _unit(x), _unit(y)
    lined = _lined(
        units[0],
        w.scale == w.divisor == 1,
        x.shape[4],
        y.shape[4],
        w.shift,
        w.step,
    )
    align = _alignment(x, y, units, channels, filters, lined)

    def launch(config: Config) -> None:
        own = plan.cut(config, *problem)
        whole = own.splits == 1
        target = y if whole else _parts(y, own.splits)
        correlate[(own.grid,)](
            x,
            _pack(matrices, config.terms, config.columns),
            bias if whole else None,
            target,
            x.stride(),
            y.stride(),
            _triple(x.shape[2:]),
            _triple(y.shape[2:]),
            tuple(d),
            tuple(h),
            tuple(w),
            y.shape[0],
            groups,
            channels,
            filters,
            own.splits,
            y.numel(),
            MODE=mode,
            ACTIVATION=activation if whole else 0,
            PRECISION="tf32" if kind == "tf32" else "ieee",
            WIDEN=_widens(x),
            ROWS=config.rows,
            COLUMNS=config.columns,
            TERMS=config.terms,
            X_UNIT=units[0],
            Y_UNIT=units[1],
            ALIGN=align,
            OFFSET=_offset(x, y),
            num_warps=config.warps,
            num_stages=config.stages,
        )
        _add(target, bias, y, own.splits, activation)

    config = plan.correlate(*problem, align).config
    launch(tuned("correlate", x, (problem, units, align), plan.variants(config, kind), launch))


def _add(parts: Tensor, bias: Tensor | None, y: Tensor, splits: int, activation: int) -> None:
    """y, dense in memory, from its parts, if there are any."""
    if splits > 1:
        inner = 1 if is_channels_last(y) else y[0, 0].numel()
        add_parts[(ceil_div(y.numel(), ADDED),)](
            parts,
            bias,
            y,
            y.numel(),
            inner,
            y.shape[1],
            splits,
            ACTIVATION=activation,
            ELEMENTS=ADDED,
        )


def _parts(y: Tensor, splits: int) -> Tensor:
    dtype = torch.promote_types(y.dtype, torch.float32)
    return y.new_empty(splits * y.numel(), dtype=dtype)


def _kind(x: Tensor) -> str:
    """How products are made: of float32 as torch's own switch for convolutions says."""
    if x.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32":
        return "tf32"
    return _KINDS[x.dtype]


def _widens(x: Tensor) -> bool:
    """Whether operands become float32: bfloat16 in Triton's interpreter, which is wrong there."""
    return x.dtype == torch.bfloat16 and triton.knobs.runtime.interpret


def _axes(
    source: Triple, target: Triple, kernel: Triple, stride: Triple, padding: Sextuple, step: Triple
) -> Axes:
    axes = zip(source, target, kernel, stride, step, padding[::2], strict=True)
    d, h, w = (Axis(*axis) for axis in axes)
    return d, h, w


def _triple(values: Sequence[int]) -> Triple:
    d, h, w = values
    return d, h, w


def _unit(x: Tensor) -> int:
    """The axis along which neighbours lie side by side: channels or W; -1 if neither."""
    return next((axis for axis in (1, 4) if x.stride(axis) == 1 and x.shape[axis] > 1), -1)


def _lined(unit: int, whole: bool, *numbers: int) -> Sequence[int]:
    """What vectors along W have to fit: `numbers` where lines are read cell after cell."""
    if unit != 4:
        return ()
    return numbers if whole else (1,)


def _alignment(
    a: Tensor,
    b: Tensor,
    units: tuple[int, int],
    a_channels: int,
    b_channels: int,
    lined: Sequence[int],
) -> int:
    """ALIGN of the kernels, for two tensors and what vectors along W have to fit."""
    numbers = [*lined]
    for t, unit, channels in ((a, units[0], a_channels), (b, units[1], b_channels)):
        numbers += [t.stride(axis) for axis in range(5) if axis != unit]
        numbers += [channels] if unit == 1 else []
    return plan.alignment(numbers, a.element_size())


def _offset(*tensors: Tensor) -> tl.dtype:
    """The type of an offset in a tensor, and of the number of a position: 32 bits if they do."""
    spans = (
        sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) for t in tensors
    )
    return tl.int32 if max(spans) < _OFFSETS else tl.int64


def _pack(matrices: Tensor, terms: int, columns: int) -> Tensor:
    """Matrices [groups, taps, channels, filters] side by side, with zeros up to whole blocks."""
    groups, taps, channels, filters = matrices.shape
    rows, width = (
        ceil_div(channels, terms) * terms,
        ceil_div(filters, columns) * columns,
    )
    if (rows, width) == (channels, filters):
        return matrices.contiguous()
    packed = matrices.new_zeros((groups, taps, rows, width))
    packed[:, :, :channels, :filters] = matrices
    return packed
