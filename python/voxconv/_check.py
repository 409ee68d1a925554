# SPDX-License-Identifier: Apache-2.0
"""Everything about a call that the values in its tensors do not change, checked and chosen."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from . import _dispatch, _ops
from ._dispatch import Choice, Problem, is_depthwise
from ._geometry import Geometry, Sextuple, Triple, resolve, resolve_transposed
from .autograd import Plan

_DTYPES = (*_dispatch.DTYPES, torch.complex64, torch.complex128)

_ADDRESSABLE = 2**47  # bytes a process can have


class Passes(NamedTuple):
    """The choice for the result and for the two gradients."""

    forward: Choice
    grad_input: Choice
    grad_weight: Choice


class Call(NamedTuple):
    """A checked call. `plan` is None when it goes through torch; `out_shape` has a batch axis."""

    geometry: Geometry
    plan: Plan | None
    passes: Passes
    groups: int
    depthwise: bool
    out_shape: tuple[int, ...]
    output_padding: Triple


def check(
    transposed: bool,
    x_shape: torch.Size,
    weight_shape: torch.Size,
    bias_shape: torch.Size | None,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None],
    devices: tuple[torch.device, torch.device, torch.device | None],
    layouts: tuple[torch.layout, torch.layout, torch.layout | None],
    stride: Triple,
    padding: Sextuple | str,
    dilation: Triple,
    groups: int | None,
    mode: int,
    output_padding: Triple,
    channels_last: bool,
    family: str | None,
    forced: str | None,
) -> Call:
    """Check parsed arguments against each other and choose what runs; `groups=None` is depthwise.

    Raises:
        ValueError, TypeError: with the sizes in the message.
        NotImplementedError: the forced backend cannot run it.
    """
    _check_types(dtypes, devices, layouts)
    check_ranks(x_shape, weight_shape)
    batch = x_shape[0] if len(x_shape) == 5 else 1
    channels, d, h, w = x_shape[-4:]
    size = (d, h, w)
    named = groups is None or family is not None
    out_channels, groups = check_channels(transposed, x_shape, weight_shape, bias_shape, groups)
    kernel = (weight_shape[2], weight_shape[3], weight_shape[4])
    if transposed:
        geometry, out = resolve_transposed(size, kernel, stride, padding, output_padding, dilation)
    else:
        geometry = resolve(size, kernel, stride, padding, dilation, mode)
        out = geometry.out_size(size)
    out_shape = (batch, out_channels, *out)
    _check_bytes(out_shape, dtypes[0])
    # Several filters of a single channel are for the depthwise kernels only if asked for.
    asked = forced is not None or named or is_depthwise(channels, out_channels, groups)
    depthwise = groups == channels and family != "dilated" and asked
    problem = Problem(
        op="forward",
        device=devices[0].type,
        dtype=dtypes[0],
        x_shape=out_shape if transposed else (batch, channels, *size),
        weight_shape=(out_channels, 1, *kernel) if depthwise else tuple(weight_shape),
        geometry=geometry,
        depthwise=depthwise,
        transposed=transposed,
        channels_last=channels_last,
        missing=_ops.missing(devices[0]),
    )
    passes = [_dispatch.choose(problem._replace(op=op), forced) for op in _dispatch.PASSES]
    plan = None
    if any(choice.backend != "torch" for choice in passes):
        backend = next(choice.backend for choice in passes if choice.backend != "torch")
        forward, grad_input, grad_weight = (choice.kernel for choice in passes)
        plan = Plan(
            forward,
            grad_input,
            grad_weight,
            channel_sum="triton" if backend == "triton" else "direct",
            # The FFT on a GPU is that of torch.
            activates=forward != "conv3d" and (backend == "cpu" or forward != "fft"),
        )
    if transposed:  # its result is the input gradient of the geometry, and the reverse
        passes[:2] = passes[1], passes[0]
    return Call(geometry, plan, Passes(*passes), groups, depthwise, out_shape, output_padding)


def _check_types(
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype | None],
    devices: tuple[torch.device, torch.device, torch.device | None],
    layouts: tuple[torch.layout, torch.layout, torch.layout | None],
) -> None:
    names = ("input", "weight", "bias")
    if dtypes[0] not in _DTYPES:
        raise TypeError(f"input must be floating point or complex, got {dtypes[0]}")
    for name, dtype, device in zip(names, dtypes, devices, strict=True):
        if dtype is not None and dtype != dtypes[0]:
            raise TypeError(f"{name} has dtype {dtype}, the input {dtypes[0]}: they must agree")
        if device is not None and device != devices[0]:
            raise ValueError(f"{name} is on {device}, the input on {devices[0]}")
    for name, layout in zip(names, layouts, strict=True):
        if layout not in (torch.strided, None):
            raise TypeError(f"{name} must be a dense tensor, got one of layout {layout}")


def check_ranks(x_shape: torch.Size, weight_shape: torch.Size) -> None:
    """ValueError unless the input has 4 or 5 axes and the weight 5."""
    if len(x_shape) not in (4, 5):
        raise ValueError(
            f"input must be [N, C, D, H, W] or [C, D, H, W], got shape {tuple(x_shape)}"
        )
    if len(weight_shape) != 5:
        raise ValueError(f"weight must have 5 axes, got shape {tuple(weight_shape)}")


def _check_bytes(out_shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if all(isinstance(n, int) for n in out_shape):
        size = math.prod(out_shape) * dtype.itemsize
        if size >= _ADDRESSABLE:
            raise ValueError(f"the output {list(out_shape)} of {dtype} would take {size:.3g} bytes")


def check_channels(
    transposed: bool,
    x_shape: torch.Size,
    weight_shape: torch.Size,
    bias_shape: torch.Size | None,
    groups: int | None,
) -> tuple[int, int]:
    """Check the channels; returns those of the output, and the groups."""
    out_channels, groups = _channels(transposed, x_shape, weight_shape, groups)
    if bias_shape is not None and tuple(bias_shape) != (out_channels,):
        raise ValueError(f"bias must have shape ({out_channels},), got {tuple(bias_shape)}")
    return out_channels, groups


def _channels(
    transposed: bool, x_shape: torch.Size, weight_shape: torch.Size, groups: int | None
) -> tuple[int, int]:
    channels, (first, second) = x_shape[-4], weight_shape[:2]
    shapes = f"input {tuple(x_shape)}, weight {tuple(weight_shape)}"
    if first < 1 and not transposed:
        raise ValueError(f"the weight has no filters: {shapes}")
    if groups is None:
        if channels < 1 or second != 1 or first % channels != 0:
            raise ValueError(
                "a depthwise convolution of C channels needs a weight [C*m, 1, kD, kH, kW], "
                f"got {shapes}"
            )
        return first, channels
    if groups < 1:
        raise ValueError(f"groups must be positive, got {groups}")
    if transposed:
        if channels != first or first % groups != 0 or second < 1:
            raise ValueError(
                f"a transposed convolution of C channels in {groups} groups needs a weight "
                f"[C, O/{groups}, kD, kH, kW] with C divisible by {groups}, got {shapes}"
            )
        out_channels = second * groups
    else:
        if channels != second * groups or first % groups != 0:
            whole = second > 0 and channels % second == 0 and first % (channels // second) == 0
            hint = f"; did you mean groups={channels // second}?" if whole and groups == 1 else ""
            raise ValueError(
                f"a convolution of C channels in {groups} groups needs a weight "
                f"[O, C/{groups}, kD, kH, kW] with O divisible by {groups}, got {shapes}{hint}"
            )
        out_channels = first
    return out_channels, groups
