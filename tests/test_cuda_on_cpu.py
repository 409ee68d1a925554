# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, run on the CPU (cuda_on_cpu/), through the public functions."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from cases import CHANNELS_LAST, NCDHW, Case, select
from testing import DTYPES, PASSES, assert_case, bitwise_equal, dtype_id, on
from voxconv import _ops, autograd
from voxconv._geometry import Geometry
from voxconv._layout import is_channels_last

HERE = Path(__file__).parent / "cuda_on_cpu"
MOST_PRODUCTS = 150_000  # of a row: more of them take seconds


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


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The library of the kernels, built by the C++ compiler."""
    compiler = shutil.which("c++")
    assert compiler, "the package is built with c++"
    library = tmp_path_factory.mktemp("cuda_on_cpu") / "kernels.so"
    sources = [str(path) for path in sorted(HERE.glob("*.cpp"))]
    flags = ["-O1", "-std=c++17", "-Wall", "-Werror", "-fPIC", "-shared", f"-I{HERE}"]
    subprocess.run([compiler, *flags, *sources, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.run_depthwise.restype = loaded.run_fault.restype = ctypes.c_char_p
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

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

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
def cuda_kernels(library: ctypes.CDLL) -> Iterator[None]:
    """The functions of autograd call the CUDA kernels."""
    passes = Passes(library)
    with (
        on("direct"),
        mock.patch.dict(autograd._FORWARD, direct=passes.forward),
        mock.patch.dict(autograd._GRAD_INPUT, direct=passes.grad_input),
        mock.patch.dict(autograd._GRAD_WEIGHT, direct=passes.grad_weight),
        mock.patch.object(autograd, "_CHANNEL_SUM", passes.channel_sum),
    ):
        yield


ROWS = [
    case
    for case in select("smoke", "odd", "edge")
    if case.live_flops <= 2 * MOST_PRODUCTS and case.out_channels * case.taps <= 1000
]


@pytest.mark.parametrize("layout", [NCDHW, CHANNELS_LAST])
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_rows(case: Case, layout: str, kernels: ctypes.CDLL) -> None:
    with cuda_kernels(kernels):
        assert_case(case, case.make(layout=layout), torch.float32, versus_torch=True)


PLANES = [  # of depthwise_planes: several tiles, slabs, channels of a block; all kinds of padding
    Case("dw3_tiles", channels=1, size=(2, 70, 67), padding=1),
    Case("dw3_slabs", channels=3, size=(29, 5, 6), padding=((0, 3), (2, 0), (1, 4))),
    Case("dw3_channels", n=2, channels=20, multiplier=2, size=(3, 3, 4), padding=1),
    Case("dw5_even", n=2, channels=3, size=(7, 8, 12), kernel=(5, 5, 5), padding=2),
    Case("dw5_far_padding", channels=1, size=(3, 4, 5), kernel=(5, 5, 5), padding=(7, 5, 6)),
    Case("dw7_valid", channels=2, size=(8, 9, 11), kernel=(7, 7, 7)),
    Case("dw7_small", channels=9, size=(3, 3, 3), kernel=(7, 7, 7), padding=3),
]


@pytest.mark.parametrize("case", PLANES, ids=str)
def test_planes(case: Case, kernels: ctypes.CDLL) -> None:
    with cuda_kernels(kernels):
        assert_case(case, case.make(), torch.float32, versus_torch=True)
        assert_case(case, case.make(torch.bfloat16), torch.bfloat16, versus_torch=True)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32], ids=dtype_id)
@pytest.mark.parametrize("case", [c for c in select("smoke") if c in ROWS], ids=str)
def test_other_dtypes(case: Case, dtype: torch.dtype, kernels: ctypes.CDLL) -> None:
    with cuda_kernels(kernels):
        assert_case(case, case.make(dtype), dtype, versus_torch=True)


FAULTS = {  # in the order of faults.cpp, with what is said of them; None: the result shows them
    "read_behind": "access outside",
    "write_before": "access outside",
    "read_behind_shared": "access outside",
    "no_barrier": None,
    "barrier_of_some": "a barrier that not all threads reach",
    "unwritten": None,
    "not_waited_for": "copies that nobody waits for",
    "sum_of_warp": None,
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_seen(name: str, kernels: ctypes.CDLL) -> None:
    def run(right: bool, falling: bool) -> tuple[str, list[float]]:
        x, y = torch.arange(64.0), torch.zeros(64)
        number = list(FAULTS).index(name)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, y))
        return kernels.run_fault(number, *pointers, right, falling).decode(), y.tolist()

    right, reverse = run(True, False), run(True, True)
    assert right == reverse
    assert right[0] == ""
    wrong = [run(False, falling) for falling in (False, True)]
    if (message := FAULTS[name]) is not None:
        assert all(message in error for error, _ in wrong)
    else:
        assert all(error == "" and y != right[1] for error, y in wrong)
