# SPDX-License-Identifier: Apache-2.0
"""Which backend and kernel runs a pass, and why: a pure function of the problem."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType, TracebackType
from typing import NamedTuple

import torch

from . import _dilated_rule
from ._geometry import PADDING_MODES, Geometry

BACKENDS = ("cpu", "cuda", "triton", "torch")
DEVICES = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda"}  # where a backend's kernels run
PASSES = ("forward", "grad_input", "grad_weight")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Measured costs, in multiply-adds of the direct kernel: of one cell of one FFT, by the cells of the
# volume (up to that many: the smallest have short lines, larger ones leave one cache after the
# other), and of a call. The direct kernel gains more from AVX-512 than the FFT. An FFT works on
# whole vectors of (batch, channel) pairs. Kernels with fewer taps are left to the direct kernel in
# any case: the FFT spreads rounding, inf and NaN over the volume.
FFT_CELL_COST = (
    ((2_000, 95), (16_000, 39), (64_000, 50), (250_000, 51), (math.inf, 84))
    if torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    else ((2_000, 30), (16_000, 20), (64_000, 25), (250_000, 32), (math.inf, 50))
)
FFT_CALL_COST = 500_000
# The same on a GPU, reckoned (bench/gpu_predict.py) and not yet measured: an FFT reads and writes
# a cell some eight times, which takes as long as 600 multiply-adds of a kernel at a third of the
# GPU's rate, as those for so many taps are; a call starts some 40 kernels.
CUDA_FFT_CELL_COST = 600
CUDA_FFT_CALL_COST = 1_000_000_000
CUDA_FFT_MIN_TAPS = 13**3
FFT_MIN_TAPS = 7**3
VECTOR_BYTES = 64


class Problem(NamedTuple):
    """One pass of one convolution: x [N,C,D,H,W], weight [C*m,1,kD,kH,kW] or, if it is not
    depthwise, [O,C/groups,kD,kH,kW].

    Of a transposed one, these are of the convolution that it transposes, after its input has been
    repeated for the multiplier. `missing` tells, by backend, why it is not there.
    """

    op: str
    device: str
    dtype: torch.dtype
    x_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    geometry: Geometry
    depthwise: bool = True
    transposed: bool = False
    channels_last: bool = False
    missing: Mapping[str, str] = MappingProxyType({})


class Choice(NamedTuple):
    """Who runs a pass, and why."""

    backend: str
    kernel: str
    reason: str


class _Forced(threading.local):
    backend: str | None = None


_forced = _Forced()


def forced_backend() -> str | None:
    """The backend that `use_backend` asks for in this thread."""
    return _forced.backend


class use_backend:
    """Context manager: run everything in this thread on one backend; None chooses again.

    Args:
        name: "cpu" (compiled kernels), "torch" (`torch.nn.functional`), "cuda", "triton" or None.

    Raises:
        ValueError: an unknown name.
        NotImplementedError: from the calls inside, when the backend cannot run them.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None and name not in BACKENDS:
            raise ValueError(f"backend must be one of {BACKENDS} or None, got {name!r}")
        self.name = name
        self._before: list[str | None] = []

    def __enter__(self) -> use_backend:
        self._before.append(_forced.backend)
        _forced.backend = self.name
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _forced.backend = self._before.pop()


def is_depthwise(channels: int, out_channels: int, groups: int) -> bool:
    """Whether a convolution is one for the depthwise kernels.

    Several filters of a single channel are not: there they are one matrix product.
    """
    return groups == channels and (channels > 1 or out_channels == 1)


def choose(problem: Problem, forced: str | None = None) -> Choice:
    """Choose who runs a pass.

    Raises:
        NotImplementedError: the forced backend cannot run it.
    """
    if forced == "torch":
        return Choice("torch", "conv3d", "asked for by use_backend")
    refusals = {name: _refusal(problem, name) for name in DEVICES}
    if forced is not None and refusals[forced] is not None:
        raise NotImplementedError(
            f"backend {forced!r} cannot run this convolution: {refusals[forced]}"
        )
    if forced is None and (better := _better_by_torch(problem)):
        return Choice("torch", "conv3d", better)
    for name in DEVICES:
        if forced in (None, name) and refusals[name] is None:
            return _KERNELS[name](problem)
    near = [name for name, device in DEVICES.items() if device == problem.device] or ["cpu"]
    return Choice("torch", "conv3d", "; ".join(dict.fromkeys(str(refusals[n]) for n in near)))


def _refusal(problem: Problem, backend: str) -> str | None:
    """Why a backend cannot run a problem."""
    if not problem.depthwise and backend == "cuda":
        return "not depthwise: an output channel reads several input channels"
    if problem.device != DEVICES[backend]:
        return f"its kernels for {DEVICES[backend]!r} do not run on device {problem.device!r}"
    if problem.dtype not in DTYPES:
        return f"no kernels for {problem.dtype}"
    return problem.missing.get(backend)


def _better_by_torch(problem: Problem) -> str | None:
    """Why a pass is better left to torch."""
    if problem.depthwise or problem.dtype not in DTYPES:
        return None
    if problem.device == DEVICES["triton"] and _refusal(problem, "triton") is None:
        left, reason = _dilated_rule.gpu_rule(problem, torch.backends.cudnn.version())
        return reason if left else None
    return _dilated_rule.better_by_torch(problem) if problem.device == "cpu" else None


def _cpu_kernel(problem: Problem) -> Choice:
    """Which of the compiled kernels and the FFT runs a pass."""
    if not problem.depthwise:
        return Choice("cpu", "dilated", _dilated_rule.reason(problem))
    return _direct_or_fft(problem, "cpu", FFT_MIN_TAPS, _fft_cost)


def _cuda_kernel(problem: Problem) -> Choice:
    """Which of the compiled kernels and the FFT of torch runs a depthwise pass on a GPU."""
    if problem.dtype not in (torch.float32, torch.float64):
        reason = f"the FFT is for float32 and float64, not {problem.dtype}"
        return Choice("cuda", "direct", reason)
    return _direct_or_fft(problem, "cuda", CUDA_FFT_MIN_TAPS, _cuda_fft_cost)


def _direct_or_fft(
    problem: Problem, backend: str, least: int, fft_cost: Callable[[Problem], int]
) -> Choice:
    kernel, mode = problem.geometry.kernel, problem.geometry.mode
    if kernel[0] * kernel[1] * kernel[2] < least:
        return Choice(backend, "direct", f"the FFT is for {least} taps or more, not {kernel}")
    if mode:
        return Choice(backend, "direct", f"the FFT pads with zeros only, not {PADDING_MODES[mode]}")
    if _direct_cost(problem) < fft_cost(problem):
        return Choice(backend, "direct", "fewer operations than by FFT")
    return Choice(backend, "fft", "fewer operations than tap by tap")


def _triton_kernel(problem: Problem) -> Choice:
    if not problem.depthwise:
        left, reason = _dilated_rule.gpu_rule(problem, torch.backends.cudnn.version())
        return Choice("triton", "dilated_triton", "asked for by use_backend" if left else reason)
    reason = problem.missing.get("cuda", "asked for by use_backend")
    return Choice("triton", "triton", reason)


_KERNELS: dict[str, Callable[[Problem], Choice]] = {
    "cpu": lambda problem: _cpu_kernel(problem),  # looked up late: tests replace it
    "cuda": _cuda_kernel,
    "triton": _triton_kernel,
}


def _direct_cost(problem: Problem) -> int:
    """Multiply-adds of the direct kernel: it leaves out planes of padding, but not cells of it."""
    kernel, stride, padding, dilation, _ = problem.geometry
    size = problem.x_shape[2:]
    out = problem.geometry.out_size((size[0], size[1], size[2]))
    skipped = 0
    for pad in padding[:2]:
        # Taps in the padding, from output to output: a triangle, cut off after the last output.
        beyond = torch.sym_max(pad - out[0] * stride[0], 0)
        pairs = pad * (pad + dilation[0]) - beyond * (beyond + dilation[0])
        skipped += pairs // (2 * dilation[0] * stride[0])
    cost: int = problem.x_shape[0] * problem.weight_shape[0]
    cost *= torch.sym_max(kernel[0] * out[0] - skipped, out[0])
    for axis in (1, 2):
        # Taps that meet nothing but padding are cut off.
        met = (size[axis] - 1 + (out[axis] - 1) * stride[axis]) // dilation[axis] + 1
        cost *= out[axis] * torch.sym_min(kernel[axis], met)
    return cost


def _padded_volume(problem: Problem) -> int:
    """Cells of a volume with so much padding that taps which leave it at one end meet zeros."""
    volume = 1
    for axis, n in enumerate(problem.x_shape[2:]):
        before, after = problem.geometry.padding[2 * axis : 2 * axis + 2]
        volume *= n + torch.sym_max(before, after)
    return volume


def _fft_cost(problem: Problem) -> int:
    """The FFTs of input, kernel and output, one for each channel."""
    batch, channels = problem.x_shape[:2]
    filters = problem.weight_shape[0]
    lanes = VECTOR_BYTES // (8 if problem.dtype == torch.float64 else 4)
    volume = _padded_volume(problem)
    cell_cost = next(cost for cells, cost in FFT_CELL_COST if volume <= cells)
    volumes = sum(-(-n // lanes) * lanes for n in (batch * channels, filters, batch * filters))
    return volumes * volume * cell_cost + FFT_CALL_COST


def _cuda_fft_cost(problem: Problem) -> int:
    batch, channels = problem.x_shape[:2]
    filters = problem.weight_shape[0]
    cells = (batch * channels + filters + batch * filters) * _padded_volume(problem)
    return cells * CUDA_FFT_CELL_COST + CUDA_FFT_CALL_COST
