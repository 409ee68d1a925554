# SPDX-License-Identifier: Apache-2.0
"""The ops: schemas, shape functions, and the compiled part that holds their CPU kernels.

`torch.ops.voxconv.*` are raw: they have no gradients (`voxconv.autograd` gives them) and take
canonical arguments only, 5-D tensors and the fields of a `Geometry`. With x [N, C, D, H, W],
weight [C*m, 1, kD, kH, kW] and grad [N, C*m, oD, oH, oW]:

    depthwise_forward      x, weight, bias [C*m]                           -> [N, C*m, oD, oH, oW]
    depthwise_grad_input   grad, weight [C, m, kD, kH, kW], size, bias [C] -> [N, C, *size]
    depthwise_grad_weight  grad, x, kernel                                 -> [C*m, 1, *kernel]
    channel_sum            grad                                            -> [C*m]

Results follow the layout of the first tensor (channels_last_3d or contiguous). `..._fft` are the
same passes by FFT, zeros padding only.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._geometry import Geometry, Sextuple, Triple
from ._layout import empty_in_layout_of
from ._settings import warn_of_unknown

_GEOMETRY = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, int padding_mode"
_FORWARD = f"(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor"
_GRAD_INPUT = (
    f"(Tensor grad, Tensor weight, SymInt[] size, {_GEOMETRY}, Tensor? bias=None) -> Tensor"
)
_GRAD_WEIGHT = f"(Tensor grad, Tensor x, SymInt[] kernel, {_GEOMETRY}) -> Tensor"

_PASSES = ("depthwise_forward", "depthwise_grad_input", "depthwise_grad_weight")
_COMPILED = (*_PASSES, *(f"{name}_fft" for name in _PASSES), "channel_sum")

_library = torch.library.Library("voxconv", "FRAGMENT")


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Triple,
    padding: Sextuple,
    dilation: Triple,
    padding_mode: int,
) -> Tensor:
    batch, _, d, h, w = x.shape
    filters, _, kd, kh, kw = weight.shape
    geometry = Geometry((kd, kh, kw), stride, padding, dilation, padding_mode)
    return empty_in_layout_of(x, (batch, filters, *geometry.out_size((d, h, w))))


def _fake_grad_input(grad: Tensor, weight: Tensor, size: Triple, *geometry: Any) -> Tensor:
    return empty_in_layout_of(grad, (grad.shape[0], weight.shape[0], *size))


def _fake_grad_weight(grad: Tensor, x: Tensor, kernel: Triple, *geometry: Any) -> Tensor:
    return x.new_empty((grad.shape[1], 1, *kernel))


def _fake_channel_sum(grad: Tensor) -> Tensor:
    return grad.new_empty((grad.shape[1],))


def _define(name: str, arguments: str, fake: Callable[..., Tensor]) -> None:
    _library.define(name + arguments, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"voxconv::{name}", fake, lib=_library)


for _kind in ("", "_fft"):
    _define(f"depthwise_forward{_kind}", _FORWARD, _fake_forward)
    _define(f"depthwise_grad_input{_kind}", _GRAD_INPUT, _fake_grad_input)
    _define(f"depthwise_grad_weight{_kind}", _GRAD_WEIGHT, _fake_grad_weight)
_define("channel_sum", "(Tensor grad) -> Tensor", _fake_channel_sum)


def _has_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"voxconv::{name}", "CPU")


def _load() -> str | None:
    """Load the compiled part; returns why there is none, or None if all its kernels are there."""
    warn_of_unknown()
    if os.environ.get("VOXCONV_DISABLE_COMPILED", "0") not in ("", "0"):
        return "VOXCONV_DISABLE_COMPILED is set"
    try:
        importlib.import_module("voxconv._C")
    except Exception as error:  # whatever is wrong with it, the package works without
        reason = f"voxconv._C does not load: {error}"
    else:
        missing = [name for name in _COMPILED if not _has_kernel(name)]
        if not missing:
            return None
        reason = f"voxconv._C has no CPU kernel for {', '.join(missing)}"
    warnings.warn(f"voxconv runs through torch, slower: {reason}", RuntimeWarning, stacklevel=2)
    return reason


_missing = _load()


def has_cpu() -> bool:
    """Whether the compiled CPU kernels are loaded."""
    return _missing is None


def empty_cache() -> None:
    """Free what the compiled part keeps for later results (see `voxconv.empty_cache`)."""
    importlib.import_module("voxconv._C").empty_cache()


def missing_reason() -> str | None:
    """Why the compiled part is not in use; None when it is."""
    return _missing
