# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA kernels on the CPU (cuda_on_cpu/), for tests through the public functions."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from cases import CHANNELS_LAST, NCDHW, Case
from testing import DTYPES, PASSES, bitwise_equal, on
from voxconv import _ops, autograd
from voxconv._geometry import PADDING_MODES, Geometry
from voxconv._layout import is_channels_last
from voxconv._settings import CUDA_WAYS

HERE = Path(__file__).parent / "cuda_on_cpu"
ROOT = HERE.parent.parent
WAYS = ("choose", *CUDA_WAYS)


class Shape(ctypes.Structure):
    """Conv3dShape of csrc/common/conv3d.h."""

    _fields_ = [
        ("batch_channels_multiplier", ctypes.c_int64 * 3),
        ("axes", ctypes.c_int64 * 7 * 3),
        ("mode", ctypes.c_int),
    ]


class How(ctypes.Structure):
    """How of cuda_on_cpu/depthwise.cpp."""

    _fields_ = [
        ("which", ctypes.c_int),
        ("channels_last", ctypes.c_bool),
        ("way", ctypes.c_int),
        ("activation", ctypes.c_int),
    ]


class Work(ctypes.Structure):
    """Work of cuda_on_cpu/depthwise.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("source", "other", "bias", "target")] + [
        (f"{name}_bytes", ctypes.c_size_t) for name in ("source", "other", "bias", "target")
    ]


def build() -> ctypes.CDLL:
    """The library of the kernels, by the C++ compiler; one that was built from the same is kept."""
    compiler = shutil.which("c++")
    assert compiler, "the package is built with c++"
    sources = sorted(HERE.glob("*.cpp"))
    read = [*sources, *HERE.glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.*h")]
    read += [ROOT / "csrc" / "common" / "conv3d.h", ROOT / "csrc" / "cpu" / "half.h"]
    flags = ["-O1", "-std=c++17", "-Wall", "-Werror", "-fPIC", "-shared", f"-I{HERE}"]
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in sorted(read):
        digest.update(path.read_bytes())
    library = ROOT / "build" / "cuda_on_cpu" / f"{digest.hexdigest()[:16]}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of all processes that test, one builds
        if not library.exists():
            for old in library.parent.glob("*.so"):
                old.unlink()
            command = [compiler, *flags, *map(str, sources), "-o", str(library)]
            subprocess.run(command, check=True)
    return load(library)


def load(library: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library))
    for name in ("run_depthwise", "plan_depthwise", "run_fault", "run_product", "run_pieces"):
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def _shape(x: tuple[int, ...], filters: int, kernel: Any, *geometry: Any) -> Shape:
    stride, padding, dilation, mode = geometry
    sizes = zip(x[2:], Geometry(kernel, *geometry).out_size(x[2:]), strict=True)
    axes = (ctypes.c_int64 * 7 * 3)()
    for i, (n, out) in enumerate(sizes):
        axes[i][:] = (n, out, kernel[i], stride[i], dilation[i], *padding[2 * i : 2 * i + 2])
    return Shape((x[0], x[1], filters // x[1]), axes, mode)


def _dense(tensor: torch.Tensor, last: bool) -> torch.Tensor:
    return tensor.contiguous(
        memory_format=torch.channels_last_3d if last else torch.contiguous_format
    )


class Passes:
    """The raw ops, by the CUDA kernels; every pass is run in both orders of the threads."""

    def __init__(self, library: ctypes.CDLL, way: str) -> None:
        self.library = library
        self.way = WAYS.index(way)
        self.activations: list[int] = []  # of the forward passes, as they came

    def _run(
        self,
        which: str,
        shape: Shape,
        source: torch.Tensor,
        other: torch.Tensor | None,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        last: bool,
        activation: int = 0,
    ) -> torch.Tensor:
        results = []
        for falling in (False, True):
            into = torch.empty_like(target)
            tensors = (source, other, bias, into)
            work = Work(
                *(None if t is None else t.data_ptr() for t in tensors),
                *(0 if t is None else t.numel() * t.element_size() for t in tensors),
            )
            how = How(PASSES.index(which), last, self.way, activation)
            error = self.library.run_depthwise(
                ctypes.byref(how),
                DTYPES.index(source.dtype),
                ctypes.byref(shape),
                ctypes.byref(work),
                falling,
            )
            assert not error, error.decode()
            results.append(into)
        assert bitwise_equal(*results), "the result changes with the order of the threads"
        return results[0]

    def forward(self, x: Any, weight: Any, bias: Any, *geometry: Any) -> torch.Tensor:
        *geometry, activation = geometry  # type: ignore[assignment]
        target = _ops._fake_forward(x, weight, bias, *geometry)
        self.activations.append(activation)
        last = is_channels_last(x)  # the layout of the first tensor, as in depthwise.cu
        shape = _shape(x.shape, weight.shape[0], weight.shape[2:], *geometry)
        tensors = (_dense(x, last), weight.contiguous(), bias, target)
        return self._run("forward", shape, *tensors, last, activation)

    def grad_input(self, grad: Any, weight: Any, size: Any, *geometry: Any) -> torch.Tensor:
        *geometry, bias = geometry  # type: ignore[assignment]
        target = _ops._fake_grad_input(grad, weight, size)
        shape = _shape(target.shape, grad.shape[1], weight.shape[2:], *geometry)
        last = is_channels_last(grad)
        tensors = (_dense(grad, last), weight.contiguous(), bias, target)
        return self._run("grad_input", shape, *tensors, last)

    def grad_weight(self, grad: Any, x: Any, kernel: Any, *geometry: Any) -> torch.Tensor:
        target = _ops._fake_grad_weight(grad, x, kernel)
        last = is_channels_last(grad)
        shape = _shape(x.shape, grad.shape[1], kernel, *geometry)
        tensors = (_dense(x, last), _dense(grad, last), None, target)
        return self._run("grad_weight", shape, *tensors, last)

    def channel_sum(self, grad: Any) -> torch.Tensor:
        last, one = is_channels_last(grad), (1, 1, 1)
        shape = _shape(grad.shape, grad.shape[1], one, one, (0,) * 6, one, 0)
        target = _ops._fake_channel_sum(grad)
        return self._run("grad_bias", shape, _dense(grad, last), None, None, target, last)


@contextmanager
def cuda_kernels(library: ctypes.CDLL, way: str = "choose") -> Iterator[Passes]:
    """The functions of autograd call the CUDA kernels, those of `way` where they can."""
    passes = Passes(library, way)
    with (
        on("direct", "cuda"),
        mock.patch.dict(autograd._FORWARD, direct=passes.forward),
        mock.patch.dict(autograd._GRAD_INPUT, direct=passes.grad_input),
        mock.patch.dict(autograd._GRAD_WEIGHT, direct=passes.grad_weight),
        mock.patch.dict(autograd._CHANNEL_SUM, direct=passes.channel_sum),
    ):
        yield passes


class Launched(NamedTuple):
    """A kernel as it would be launched."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    scratch: int  # bytes of device memory that the kernels of the pass share


def plan(
    library: ctypes.CDLL, case: Case, which: str, dtype: torch.dtype, layout: str = NCDHW
) -> list[Launched]:
    """The kernels that a pass of a row is made of, of the convolution that a transposed row turns
    round."""
    pads = tuple(side for pair in case.pads for side in pair)
    x_size = case.out_size if case.transposed else case.size
    x = (case.n, case.out_channels if case.transposed else case.channels, *x_size)
    mode = PADDING_MODES.index(case.mode)
    shape = _shape(x, case.out_channels, case.kernel, case.stride, pads, case.dilation, mode)
    how = How(PASSES.index(which), layout == CHANNELS_LAST, WAYS.index("choose"), 0)
    text = library.plan_depthwise(
        ctypes.byref(how), DTYPES.index(dtype), ctypes.byref(shape)
    ).decode()
    names = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    launched = []
    for line in names.stdout.splitlines():
        name, *numbers = line.rsplit(" ", 8)
        gx, gy, gz, bx, by, bz, shared, scratch = map(int, numbers)
        name = re.sub(r"^void |voxconv::device::|voxconv::", "", name).partition("(")[0]
        launched.append(Launched(name, (gx, gy, gz), (bx, by, bz), shared, scratch))
    return launched
