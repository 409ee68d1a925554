# SPDX-License-Identifier: Apache-2.0
"""The ops: schemas, shape functions, and where their kernels come from.

`torch.ops.voxconv.*` are raw: they have no gradients (`voxconv.autograd` gives them) and take
canonical arguments only, 5-D tensors and the fields of a `Geometry`. With x [N, C, D, H, W],
weight [C*m, 1, kD, kH, kW] and grad [N, C*m, oD, oH, oW]:

    depthwise_forward      x, weight, bias [C*m], activation               -> [N, C*m, oD, oH, oW]
    depthwise_grad_input   grad, weight [C, m, kD, kH, kW], size, bias [C] -> [N, C, *size]
    depthwise_grad_weight  grad, x, kernel                                 -> [C*m, 1, *kernel]
    channel_sum            grad                                            -> [C*m]

With weight [O, C/groups, kD, kH, kW] and grad [N, O, oD, oH, oW], of any groups:

    dilated_forward        x, weight, bias [O], activation                 -> [N, O, oD, oH, oW]
    dilated_grad_input     grad, weight, size, bias [C]                    -> [N, C, *size]
    dilated_grad_weight    grad, x, kernel                                 -> [O, C/groups, *kernel]

Results follow the layout of the first tensor (channels_last_3d or contiguous). Kernels for the CPU
and for CUDA are in the compiled part. `..._fft` are the same passes by FFT, zeros padding only: on
the CPU compiled, on a GPU by torch.fft. `..._triton` are those of `voxconv.triton_kernels`.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import _fft, _triton
from ._geometry import Geometry, Sextuple, Triple
from ._layout import empty_in_layout_of
from ._settings import warn_of_unknown

_GEOMETRY = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, int padding_mode"
_FORWARD = f"(Tensor x, Tensor weight, Tensor? bias, {_GEOMETRY}, int activation=0) -> Tensor"
_GRAD_INPUT = (
    f"(Tensor grad, Tensor weight, SymInt[] size, {_GEOMETRY}, Tensor? bias=None) -> Tensor"
)
_GRAD_WEIGHT = f"(Tensor grad, Tensor x, SymInt[] kernel, {_GEOMETRY}) -> Tensor"

_GROUPED = f"{_GEOMETRY}, int groups"
_DILATED = {
    "dilated_forward": f"(Tensor x, Tensor weight, Tensor? bias, {_GROUPED}, int activation=0)",
    "dilated_grad_input": f"(Tensor grad, Tensor weight, SymInt[] size, {_GROUPED}, Tensor? bias)",
    "dilated_grad_weight": f"(Tensor grad, Tensor x, SymInt[] kernel, {_GROUPED})",
}

_PASSES = ("depthwise_forward", "depthwise_grad_input", "depthwise_grad_weight")
_COMPILED = {
    "CPU": (*_PASSES, *(f"{name}_fft" for name in _PASSES), *_DILATED, "channel_sum"),
    "CUDA": (*_PASSES, "channel_sum"),
}
_FUNCTIONS = ("empty_cache", "cuda_build", "cuda_versions")  # of voxconv._C
_LEAST_CAPABILITY = (8, 0)

_library = torch.library.Library("voxconv", "FRAGMENT")


def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Triple,
    padding: Sextuple,
    dilation: Triple,
    padding_mode: int,
    *more: int,
) -> Tensor:
    batch, _, d, h, w = x.shape
    filters, _, kd, kh, kw = weight.shape
    geometry = Geometry((kd, kh, kw), stride, padding, dilation, padding_mode)
    return empty_in_layout_of(x, (batch, filters, *geometry.out_size((d, h, w))))


def _fake_grad_input(grad: Tensor, weight: Tensor, size: Triple, *geometry: Any) -> Tensor:
    return empty_in_layout_of(grad, (grad.shape[0], weight.shape[0], *size))


def _fake_grad_weight(grad: Tensor, x: Tensor, kernel: Triple, *geometry: Any) -> Tensor:
    return x.new_empty((grad.shape[1], 1, *kernel))


def _fake_dilated_grad_input(grad: Tensor, weight: Tensor, size: Triple, *geometry: Any) -> Tensor:
    groups = geometry[4]
    return empty_in_layout_of(grad, (grad.shape[0], groups * weight.shape[1], *size))


def _fake_dilated_grad_weight(grad: Tensor, x: Tensor, kernel: Triple, *geometry: Any) -> Tensor:
    return x.new_empty((grad.shape[1], x.shape[1] // geometry[4], *kernel))


def _fake_channel_sum(grad: Tensor) -> Tensor:
    return grad.new_empty((grad.shape[1],))


def _define(name: str, arguments: str, fake: Callable[..., Tensor]) -> None:
    _library.define(name + arguments, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"voxconv::{name}", fake, lib=_library)


for _kind in ("", "_fft", "_triton"):
    _define(f"depthwise_forward{_kind}", _FORWARD, _fake_forward)
    _define(f"depthwise_grad_input{_kind}", _GRAD_INPUT, _fake_grad_input)
    _define(f"depthwise_grad_weight{_kind}", _GRAD_WEIGHT, _fake_grad_weight)
for _kind in ("", "_triton"):
    _define(f"channel_sum{_kind}", "(Tensor grad) -> Tensor", _fake_channel_sum)


_DILATED_FAKES: tuple[Callable[..., Tensor], ...] = (
    _fake_forward,
    _fake_dilated_grad_input,
    _fake_dilated_grad_weight,
)
for _name, _fake in zip(_DILATED, _DILATED_FAKES, strict=True):
    for _kind in ("", "_triton"):
        _define(f"{_name}{_kind}", f"{_DILATED[_name]} -> Tensor", _fake)

for _name in (*_PASSES, "channel_sum"):
    _library.impl(f"{_name}_triton", _triton.launcher("depthwise", _name), "CUDA")
for _name in _DILATED:
    _library.impl(f"{_name}_triton", _triton.launcher("dilated", _name), "CUDA")
for _name in _PASSES:
    _library.impl(f"{_name}_fft", getattr(_fft, _name), "CUDA")


def _without_kernel(key: str) -> list[str]:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return [name for name in _COMPILED[key] if not has(f"voxconv::{name}", key)]


def _load() -> str | None:
    """Load the compiled part; returns why there is none, or None if all its kernels are there."""
    warn_of_unknown()
    if os.environ.get("VOXCONV_DISABLE_COMPILED", "0") not in ("", "0"):
        return "VOXCONV_DISABLE_COMPILED is set"
    try:
        library = importlib.import_module("voxconv._C")
    except Exception as error:  # whatever is wrong with it, the package works without
        reason = f"voxconv._C does not load: {error}"
    else:
        lacks = [f"CPU kernel for {name}" for name in _without_kernel("CPU")]
        lacks += [f"function {name}" for name in _FUNCTIONS if not hasattr(library, name)]
        if not lacks:
            return None
        reason = f"voxconv._C is of another version, it has no {', no '.join(lacks)}"
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


@cache
def cuda_build() -> str | None:
    """What the CUDA kernels were compiled for and by, "80;90a;100+PTX nvcc 13.0", if they were."""
    if _missing is not None or _without_kernel("CUDA"):
        return None
    return importlib.import_module("voxconv._C").cuda_build()  # type: ignore[no-any-return]


def cuda_versions() -> tuple[int, int]:
    """CUDA's version, 13000 for 13.0, of the compiled part and of this machine's driver."""
    return importlib.import_module("voxconv._C").cuda_versions()  # type: ignore[no-any-return]


def missing(device: torch.device) -> Mapping[str, str]:
    """Why backends cannot run on a device, by backend; those that can are left out."""
    reasons: dict[str, str | None] = {}
    if device.type == "cpu":
        reasons = {"cpu": _missing and f"the compiled part is not in use: {_missing}"}
    elif device.type == "cuda":
        reasons = _missing_on_gpu(*_capability(device.index))
    return {name: reason for name, reason in reasons.items() if reason}


@cache
def _capability(index: int | None) -> tuple[int, int]:
    if torch.version.hip or not torch.cuda.is_available():  # the latter of fake tensors
        return _LEAST_CAPABILITY
    return torch.cuda.get_device_capability(index)


@cache
def _missing_on_gpu(major: int, minor: int) -> dict[str, str | None]:
    name = f"sm_{major}{minor}"
    built = (cuda_build() or "").partition(" ")[0].split(";")
    cuda = None
    if torch.version.hip:
        cuda = "it is for NVIDIA GPUs, and this torch for AMD's"
    elif _missing is not None:
        cuda = f"the compiled part is not in use: {_missing}"
    elif built == [""]:
        cuda = (
            "the compiled part was built without CUDA: build it where nvcc is, with VOXCONV_CUDA=1"
        )
    elif (major, minor) < _LEAST_CAPABILITY:
        cuda = f"it needs a GPU of sm_80 or later, and this one is {name}"
    elif 0 < (versions := cuda_versions())[1] // 1000 < versions[0] // 1000:
        runtime, driver = (f"{v // 1000}.{v % 1000 // 10}" for v in versions)
        cuda = (
            f"the compiled part is for CUDA {runtime} and the driver for {driver}: update the "
            "driver, or build it with an older nvcc"
        )
    elif not any(_runs(architecture, major, minor) for architecture in built):
        cuda = (
            f"the compiled part was built for sm {', '.join(built)}, and this GPU is {name}: build "
            f"it with VOXCONV_CUDA_ARCH={major}{minor}"
        )
    return {"cuda": cuda, "triton": _triton.missing_reason()}


def _runs(architecture: str, major: int, minor: int) -> bool:
    """Whether code for an architecture runs on a GPU of a capability."""
    number, _, kept = architecture.partition("+")
    code = divmod(int(number.rstrip("a")), 10)
    if number.endswith("a"):
        return code == (major, minor)
    return code <= (major, minor) and (code[0] == major or kept == "PTX")
