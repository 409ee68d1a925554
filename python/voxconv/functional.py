# SPDX-License-Identifier: Apache-2.0
"""The functions: canonicalise, check once, choose, and hand over to autograd or to torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import _dispatch
from ._activation import activate, activation_index
from ._check import Call, check
from ._geometry import (
    PADDING_MODES,
    IntOrTriple,
    PaddingLike,
    integer,
    mode_index,
    paddings,
    pairs,
    triple,
)
from ._layout import is_channels_last
from .autograd import depthwise_forward, depthwise_grad_input, transformed, watched
from .autograd_dilated import dilated_forward, dilated_grad_input

_ZERO = (0, 0, 0)
_CACHED_CALLS = 4096
_calls: dict[Any, Call] = {}


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTriple = 1,
    padding: PaddingLike = 0,
    dilation: IntOrTriple = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    *,
    activation: str | None = None,
) -> Tensor:
    """3-D convolution, by our kernels or, pass by pass, by torch where it is quicker.

    Equivalent to: `F.conv3d(input, weight, bias, stride, padding, dilation, groups)`, and like
    `torch.nn.Conv3d` for the other padding modes.

    Args:
        input: [N, C, D, H, W] or [C, D, H, W], any strides; float32, float64, bfloat16 or float16
            on our kernels, other types as torch has them.
        weight: [O, C/groups, kD, kH, kW], same dtype and device.
        bias: [O].
        stride: cells of the input from output to output, int or (D, H, W).
        padding: int, 3 ints, 3 (before, after) pairs, "valid", or "same", which gives
            ceil(size / stride) outputs with the odd cell after.
        dilation: cells of the input from tap to tap, int or (D, H, W).
        groups: blocks of channels that do not meet; C makes the convolution depthwise.
        padding_mode: "zeros", "replicate", "reflect" or "circular".
        activation: what follows, as `torch.nn.functional.relu`, `leaky_relu`, `gelu` or `silu` (by
            name, with their defaults); in the kernel itself where no gradient is asked for.

    Returns:
        [N, O, oD, oH, oW] (or without N), in the layout of the input.

    Raises:
        ValueError: shapes, devices or values that do not fit, or an empty output.
        TypeError: not tensors, not integers, mixed dtypes.
        NotImplementedError: the backend asked for by `use_backend` cannot run it.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            conv3d,
            (input, weight, bias),
            input,
            weight,
            bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            padding_mode=padding_mode,
            activation=activation,
        )
    groups = integer(groups, "groups")
    return _convolve(
        input, weight, bias, stride, padding, dilation, groups, padding_mode, activation
    )


def depthwise_conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTriple = 1,
    padding: PaddingLike = 0,
    dilation: IntOrTriple = 1,
    padding_mode: str = "zeros",
    *,
    activation: str | None = None,
) -> Tensor:
    """Depthwise 3-D convolution: output channel c*m + j filters input channel c alone.

    Equivalent to: `F.conv3d(input, weight, bias, stride, padding, dilation, groups=C)`.

    Args:
        input: [N, C, D, H, W] or [C, D, H, W], any strides, types as in `conv3d`.
        weight: [C*m, 1, kD, kH, kW], same dtype and device.
        bias: [C*m].
        stride, padding, dilation, padding_mode, activation: see `conv3d`.

    Returns:
        [N, C*m, oD, oH, oW] (or without N), in the layout of the input.

    Raises:
        ValueError, TypeError, NotImplementedError: see `conv3d`.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            depthwise_conv3d,
            (input, weight, bias),
            input,
            weight,
            bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            padding_mode=padding_mode,
            activation=activation,
        )
    return _convolve(input, weight, bias, stride, padding, dilation, None, padding_mode, activation)


def dilated_conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTriple = 1,
    padding: PaddingLike = 0,
    dilation: IntOrTriple = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    *,
    activation: str | None = None,
) -> Tensor:
    """3-D convolution by the kernels for outputs that read many channels, dilated or not.

    Equivalent to: `F.conv3d(input, weight, bias, stride, padding, dilation, groups)`. Unlike
    `conv3d` it does not look for a depthwise convolution; it does leave to torch what torch is
    quicker at.

    Args:
        All as in `conv3d`.

    Returns:
        [N, O, oD, oH, oW] (or without N), in the layout of the input.

    Raises:
        ValueError, TypeError, NotImplementedError: see `conv3d`.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            dilated_conv3d,
            (input, weight, bias),
            input,
            weight,
            bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            padding_mode=padding_mode,
            activation=activation,
        )
    groups = integer(groups, "groups")
    return _convolve(
        input, weight, bias, stride, padding, dilation, groups, padding_mode, activation, "dilated"
    )


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTriple = 1,
    padding: PaddingLike = 0,
    output_padding: IntOrTriple = 0,
    groups: int = 1,
    dilation: IntOrTriple = 1,
) -> Tensor:
    """Transposed 3-D convolution, by our kernels or, pass by pass, by torch where it is quicker.

    Equivalent to: `F.conv_transpose3d(input, weight, bias, stride, padding, output_padding, groups,
    dilation)`.

    Args:
        input: [N, C, D, H, W] or [C, D, H, W], any strides, types as in `conv3d`.
        weight: [C, O/groups, kD, kH, kW], same dtype and device.
        bias: [O].
        stride: cells of the output from input to input, int or (D, H, W).
        padding: int, 3 ints or 3 (before, after) pairs; it shortens the output.
        output_padding: cells added after; smaller than the stride or the dilation.
        groups, dilation: see `conv3d`.

    Returns:
        [N, O, oD, oH, oW] (or without N), in the layout of the input.

    Raises:
        ValueError, TypeError, NotImplementedError: see `conv3d`; "same" and "valid" are refused.
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            conv_transpose3d,
            (input, weight, bias),
            input,
            weight,
            bias,
            stride=stride,
            padding=padding,
            output_padding=output_padding,
            groups=groups,
            dilation=dilation,
        )
    input, weight, bias = tensors(input, weight, bias)
    groups = integer(groups, "groups")
    call = settle(
        True, input, weight, bias, stride, padding, dilation, groups, "zeros", output_padding
    )
    batched = input.dim() == 5
    if not batched:
        input = input.unsqueeze(0)
    if call.plan is None:
        y = _torch_conv_transpose3d(input, weight, bias, call)
    elif not call.depthwise:
        y = _dilated_transpose(input, weight, bias, call)
    else:
        y = _depthwise_transpose(input, weight, bias, call)
    return y if batched else y.squeeze(0)


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: IntOrTriple,
    padding: PaddingLike,
    dilation: IntOrTriple,
    groups: int | None,
    padding_mode: str,
    activation: str | None,
    family: str | None = None,
) -> Tensor:
    then = activation_index(activation)
    x, weight, bias = tensors(x, weight, bias)
    geometry = (stride, padding, dilation, groups, padding_mode, _ZERO)
    call = settle(False, x, weight, bias, *geometry, family)
    batched = x.dim() == 5
    if not batched:
        x = x.unsqueeze(0)
    if call.plan is None:
        y = _torch_conv3d(x, weight, bias, call)
    else:
        more: tuple[int, ...] = ()
        if then and call.plan.activates and not watched((x, weight, bias)):
            more, then = (then,), 0
        if call.depthwise:
            y = depthwise_forward(x, weight, bias, call.geometry, call.plan, *more)
        else:
            y = dilated_forward(x, weight, bias, call.geometry, call.groups, call.plan, *more)
    y = activate(y, then) if then else y
    return y if batched else y.squeeze(0)


def _dilated_transpose(x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
    x = _with_output_padding(x, call)
    size = call.out_shape[2:]
    return dilated_grad_input(x, weight, size, call.geometry, call.groups, call.plan, bias)


def _with_output_padding(x: Tensor, call: Call) -> Tensor:
    """With zeros behind, where the output goes beyond what the input reaches."""
    more = [p // s for p, s in zip(call.output_padding, call.geometry.stride, strict=True)]
    if not any(more):
        return x
    d, h, w = more
    return F.pad(x, (0, w, 0, h, 0, d))


def _depthwise_transpose(x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
    geometry = call.geometry
    multiplier = weight.shape[1]
    dtype = x.dtype
    if multiplier > 1:
        if dtype in (
            torch.bfloat16,
            torch.float16,
        ):  # gradients of the copies are added: in float32
            x, weight = x.float(), weight.float()
            bias = None if bias is None else bias.float()
        x = _repeat_channels(x, multiplier)
        weight = weight.reshape(-1, 1, *geometry.kernel)
    x = _with_output_padding(x, call)
    size = call.out_shape[2:]
    return depthwise_grad_input(x, weight, size, geometry, call.plan, bias).to(dtype)


def _repeat_channels(x: Tensor, times: int) -> Tensor:
    """`x.repeat_interleave(times, 1)` in the layout of x."""
    if is_channels_last(x):
        x = x.permute(0, 2, 3, 4, 1).unsqueeze(-1).expand(-1, -1, -1, -1, -1, times)
        return x.flatten(4).permute(0, 4, 1, 2, 3)
    return x.unsqueeze(2).expand(-1, -1, times, -1, -1, -1).flatten(1, 2)


def _torch_conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
    _, stride, (ad, bd, ah, bh, aw, bw), dilation, mode = call.geometry
    padding = (ad, ah, aw)
    if mode or (bd, bh, bw) != padding:
        padding = (0, 0, 0)
        last = is_channels_last(x)
        x = F.pad(x, (aw, bw, ah, bh, ad, bd), PADDING_MODES[mode] if mode else "constant")
        if last:
            x = x.contiguous(memory_format=torch.channels_last_3d)
    return F.conv3d(x, weight, bias, stride, padding, dilation, call.groups)


def _torch_conv_transpose3d(x: Tensor, weight: Tensor, bias: Tensor | None, call: Call) -> Tensor:
    _, stride, padding, dilation, _ = call.geometry
    both = [min(pair) for pair in pairs(padding)]
    y = F.conv_transpose3d(
        x, weight, bias, stride, both, call.output_padding, call.groups, dilation
    )
    for axis in range(3):
        n = call.out_shape[axis + 2]
        if y.shape[axis + 2] != n:
            y = y.narrow(axis + 2, padding[2 * axis] - both[axis], n)
    return y


def tensors(x: Any, weight: Any, bias: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check that the arguments are tensors, and cast them as autocast does for torch's conv3d."""
    if not (
        isinstance(x, Tensor)
        and isinstance(weight, Tensor)
        and (bias is None or isinstance(bias, Tensor))
    ):
        kinds = ", ".join(type(value).__name__ for value in (x, weight, bias))
        raise TypeError(f"input, weight and bias must be tensors, got {kinds}")
    if x.is_nested or weight.is_nested:
        raise TypeError("input and weight must be dense tensors, got a nested one")
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = _cast(x, device, dtype), _cast(weight, device, dtype)
        bias = None if bias is None else _cast(bias, device, dtype)
    return x, weight, bias


def _shape(tensor: Tensor) -> torch.Size:
    """In numbers: `torch.jit.trace` has tensors there, of which a trace can keep nothing here."""
    if torch._C._get_tracing_state() is None:
        return tensor.shape
    return torch.Size([int(n) for n in tensor.shape])


def _cast(tensor: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype) if tensor.device.type == device else tensor


def settle(
    transposed: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: IntOrTriple,
    padding: PaddingLike,
    dilation: IntOrTriple,
    groups: int | None,
    padding_mode: str,
    output_padding: IntOrTriple,
    family: str | None = None,
) -> Call:
    """Check the arguments against each other and choose what runs; `groups=None` is depthwise.

    `family` "dilated" asks for the kernels of that family, not those of depthwise ones. Derivatives
    that ours do not have are left to torch, if no backend is asked for."""
    forced, compiling = _dispatch.forced_backend(), torch.compiler.is_compiling()
    if forced is None and not compiling and transformed():
        forced = "torch"
    key = (
        transposed,
        _shape(x),
        _shape(weight),
        None if bias is None else _shape(bias),
        (x.dtype, weight.dtype, None if bias is None else bias.dtype),
        (x.device, weight.device, None if bias is None else bias.device),
        (x.layout, weight.layout, None if bias is None else bias.layout),
        triple(stride, "stride"),
        paddings(padding),
        triple(dilation, "dilation"),
        groups,
        mode_index(padding_mode),
        triple(output_padding, "output_padding"),
        groups is not None and x.dim() == 5 and groups != x.shape[1] and is_channels_last(x),
        family,
        forced,
    )
    if compiling:
        return check(*key)
    try:
        call = _calls.get(key)
    except TypeError:  # symbolic sizes have no hash
        return check(*key)
    if call is None:
        call = check(*key)
        if len(_calls) >= _CACHED_CALLS:
            _calls.clear()
        _calls[key] = call
    return call
