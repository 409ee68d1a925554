# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA kernels on the CPU (cuda_on_cpu/), for tests through the public functions."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from testing import DTYPES, PASSES, bitwise_equal, on
from voxconv import _ops, autograd
from voxconv._geometry import Geometry
from voxconv._layout import is_channels_last

HERE = Path(__file__).parent / "cuda_on_cpu"
WAYS = ("choose", "any", "planes", "toeplitz", "hankel")  # Way of csrc/cuda/launch.cuh


class Shape(ctypes.Structure):
    """Conv3dShape of csrc/common/conv3d.h."""

    _fields_ = [
        ("batch_channels_multiplier", ctypes.c_int64 * 3),
        ("axes", ctypes.c_int64 * 7 * 3),
        ("mode", ctypes.c_int),
    ]


class Work(ctypes.Structure):
    """Work of cuda_on_cpu/depthwise.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("source", "other", "bias", "target")] + [
        (f"{name}_bytes", ctypes.c_size_t) for name in ("source", "other", "bias", "target")
    ]


def build(folder: Path) -> ctypes.CDLL:
    """The library of the kernels, built by the C++ compiler."""
    compiler = shutil.which("c++")
    assert compiler, "the package is built with c++"
    library = folder / "kernels.so"
    sources = [str(path) for path in sorted(HERE.glob("*.cpp"))]
    flags = ["-O1", "-std=c++17", "-Wall", "-Werror", "-fPIC", "-shared", f"-I{HERE}"]
    subprocess.run([compiler, *flags, *sources, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    for run in (loaded.run_depthwise, loaded.run_fault, loaded.run_product, loaded.run_pieces):
        run.restype = ctypes.c_char_p
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

    def _run(
        self,
        which: str,
        shape: Shape,
        source: torch.Tensor,
        other: torch.Tensor | None,
        bias: torch.Tensor | None,
        target: torch.Tensor,
    ) -> torch.Tensor:
        last = is_channels_last(source)
        results = []
        for falling in (False, True):
            into = torch.empty_like(target)
            tensors = (source, other, bias, into)
            work = Work(
                *(None if t is None else t.data_ptr() for t in tensors),
                *(0 if t is None else t.numel() * t.element_size() for t in tensors),
            )
            error = self.library.run_depthwise(
                PASSES.index(which),
                DTYPES.index(source.dtype),
                ctypes.byref(shape),
                last,
                self.way,
                0,
                ctypes.byref(work),
                falling,
            )
            assert not error, error.decode()
            results.append(into)
        assert bitwise_equal(*results), "the result changes with the order of the threads"
        return results[0]

    def forward(self, x: Any, weight: Any, bias: Any, *geometry: Any) -> torch.Tensor:
        target = _ops._fake_forward(x, weight, bias, *geometry)
        x = _dense(x, is_channels_last(target))
        shape = _shape(x.shape, weight.shape[0], weight.shape[2:], *geometry)
        return self._run("forward", shape, x, weight.contiguous(), bias, target)

    def grad_input(self, grad: Any, weight: Any, size: Any, *geometry: Any) -> torch.Tensor:
        *geometry, bias = geometry  # type: ignore[assignment]
        target = _ops._fake_grad_input(grad, weight, size)
        shape = _shape(target.shape, grad.shape[1], weight.shape[2:], *geometry)
        grad = _dense(grad, is_channels_last(target))
        return self._run("grad_input", shape, grad, weight.contiguous(), bias, target)

    def grad_weight(self, grad: Any, x: Any, kernel: Any, *geometry: Any) -> torch.Tensor:
        target = _ops._fake_grad_weight(grad, x, kernel)
        last = is_channels_last(grad)
        shape = _shape(x.shape, grad.shape[1], kernel, *geometry)
        return self._run("grad_weight", shape, _dense(x, last), _dense(grad, last), None, target)

    def channel_sum(self, grad: Any) -> torch.Tensor:
        grad = grad if is_channels_last(grad) else grad.contiguous()
        one = (1, 1, 1)
        shape = _shape(grad.shape, grad.shape[1], one, one, (0,) * 6, one, 0)
        return self._run("grad_bias", shape, grad, None, None, _ops._fake_channel_sum(grad))


@contextmanager
def cuda_kernels(library: ctypes.CDLL, way: str = "choose") -> Iterator[None]:
    """The functions of autograd call the CUDA kernels, those of `way` where they can."""
    passes = Passes(library, way)
    with (
        on("direct"),
        mock.patch.dict(autograd._FORWARD, direct=passes.forward),
        mock.patch.dict(autograd._GRAD_INPUT, direct=passes.grad_input),
        mock.patch.dict(autograd._GRAD_WEIGHT, direct=passes.grad_weight),
        mock.patch.object(autograd, "_CHANNEL_SUM", passes.channel_sum),
    ):
        yield
