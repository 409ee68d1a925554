# SPDX-License-Identifier: Apache-2.0
"""`activation=`: what follows a convolution, in the kernel or after it."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

import voxconv
from cases import CHANNELS_LAST, LAYOUTS, NCDHW, Case, Tensors, select
from cuda_kernels import cuda_kernels, plan
from testing import DTYPES, HALVES, dtype_id, on, ops_called
from voxconv._activation import ACTIVATIONS

DW3 = select("smoke")[0]
BY_TORCH: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "silu": F.silu,
}


def test_every_activation_is_tested() -> None:
    assert tuple(BY_TORCH) == ACTIVATIONS


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("path", ["direct", "fft", "torch"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_functions(name: str, path: str, grad: bool) -> None:
    x, weight, bias, up = DW3.make(torch.float64)
    x.requires_grad_(grad)
    with on(path):
        plain = voxconv.depthwise_conv3d(x, weight, bias, **DW3.kwargs())
        got = voxconv.depthwise_conv3d(x, weight, bias, **DW3.kwargs(), activation=name)
        dense = voxconv.conv3d(
            x, weight, bias, **DW3.kwargs(), groups=DW3.channels, activation=name
        )
    expected = BY_TORCH[name](plain)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(dense, expected)
    if grad:
        torch.testing.assert_close(
            torch.autograd.grad(got, x, up), torch.autograd.grad(expected, x, up)
        )


DW5 = Case("dw5", channels=2, size=(3, 8, 16), kernel=(5, 5, 5), padding=2)
ON_CUDA = {  # a problem for each kernel that has activations
    "planes": (DW3, torch.float32, NCDHW),
    "channels": (DW3, torch.bfloat16, CHANNELS_LAST),
    "toeplitz": (DW5, torch.bfloat16, NCDHW),
    "lines": (replace(DW3, stride=(1, 2, 3)), torch.float16, NCDHW),
    "any": (DW3, torch.float64, CHANNELS_LAST),
}


@pytest.mark.parametrize("way", ON_CUDA)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_cuda_kernels_apply_it(name: str, way: str, kernels: ctypes.CDLL) -> None:
    case, dtype, layout = ON_CUDA[way]
    (launched,) = plan(kernels, case, "forward", dtype, layout)
    assert f"_{way}" in launched.kernel
    x, weight, bias, _ = case.make(dtype, layout=layout)
    with cuda_kernels(kernels) as passes:
        got = voxconv.depthwise_conv3d(x, weight, bias, **case.kwargs(), activation=name)
        assert passes.activations == [1 + ACTIVATIONS.index(name)]
    wide = (t.double() for t in (x, weight, bias))
    expected = BY_TORCH[name](voxconv.reference.depthwise_conv3d(*wide, **case.kwargs()))
    torch.testing.assert_close(got, expected.to(dtype))


def test_a_kernel_applies_none_where_a_gradient_is_asked_for(kernels: ctypes.CDLL) -> None:
    x, weight, bias, _ = DW3.make()
    weight.requires_grad_()
    with cuda_kernels(kernels) as passes:
        y = voxconv.depthwise_conv3d(x, weight, bias, **DW3.kwargs(), activation="silu")
        assert passes.activations == [0]
        with torch.no_grad():
            z = voxconv.depthwise_conv3d(x, weight, bias, **DW3.kwargs(), activation="silu")
        assert passes.activations == [0, 2 + ACTIVATIONS.index("gelu")]
    assert y.requires_grad
    torch.testing.assert_close(y.detach(), z)


# On the CPU. Which way a pass goes is a matter of its costs; test_levels.py forces each of them.
ON_CPU = [
    DW3,
    Case("one_channel", n=2, size=(5, 6, 21), padding=1),
    Case("ragged", channels=5, size=(9, 7, 19), kernel=(3, 5, 3), padding=(1, 2, 1)),
    Case("padding_only", channels=2, size=(3, 5, 40), padding=(6, 1, 1), dilation=(4, 1, 1)),
    Case("stride2", channels=3, size=(7, 8, 33), stride=(2, 2, 2), padding=1),
    Case("stride3", channels=3, multiplier=2, size=(7, 8, 20), stride=(1, 3, 3), padding=1),
    Case("cropped", channels=2, size=(4, 3, 3), kernel=(3, 9, 9), padding=(1, 4, 4)),
    Case("circular", channels=6, size=(5, 8, 18), padding=1, mode="circular"),
    Case("planes_as_rows", channels=4, size=(20, 9, 33), kernel=(5, 5, 5), padding=2),
    Case("vectors", channels=32, size=(5, 6, 9), padding=1),
    Case("overlapping_vectors", channels=37, size=(5, 11, 14), padding=1, stride=(1, 1, 2)),
    Case("busy_vectors", channels=64, size=(5, 6, 20), kernel=(5, 5, 5), padding=2),
    Case("lines", n=2, channels=3, size=(24, 20, 28), padding=1),
]
EMPTY = Case("empty", n=0, channels=4, size=(4, 5, 6), padding=1)
FAR = [  # results that are written past the caches, where the processor does that
    Case("far", channels=32, size=(36, 60, 72), padding=1),
    Case("far_ragged", channels=48, size=(36, 51, 64), kernel=(3, 3, 1), padding=(1, 1, 0)),
]


def _assert_activated(name: str, got: torch.Tensor, plain: torch.Tensor) -> None:
    """`plain` are the same sums, in a half type rounded, which the activation has not been."""
    expected = BY_TORCH[name](plain.double())
    info = torch.finfo(got.dtype)
    size = expected.abs() + plain.double().abs() if got.dtype in HALVES else 8 * expected.abs()
    smallest = max(info.smallest_normal * info.eps, 8 * torch.finfo(torch.float64).eps)
    limit = info.eps * size + smallest
    error = (got.double() - expected).abs()
    assert got.dtype == plain.dtype
    assert got.stride() == plain.stride()
    assert (error <= limit).all(), f"{name}: {(error / limit).max():.3g} times what it may be"
    if name == "relu":  # which rounding does not change
        assert torch.equal(got, F.relu(plain))
    if plain.numel() > 1:
        assert not torch.equal(got, plain)


def _on_cpu(case: Case, tensors: Tensors, path: str, name: str) -> None:
    x, weight, bias, _ = tensors
    with on(path):
        plain = voxconv.depthwise_conv3d(x, weight, bias, **case.kwargs())
        with ops_called() as called:
            got = voxconv.depthwise_conv3d(x, weight, bias, **case.kwargs(), activation=name)
    assert not any(f"aten::{op}" in called for op in ACTIVATIONS)
    assert f"voxconv::depthwise_forward{'_fft' if path == 'fft' else ''}" in called
    _assert_activated(name, got, plain)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("path", ["direct", "fft"])
def test_cpu_kernels_apply_it(path: str, name: str, dtype: torch.dtype, layout: str) -> None:
    for case in ON_CPU:
        if path == "direct" or case.mode == "zeros":
            _on_cpu(case, case.make(dtype, layout=layout), path, name)
    x, weight, bias, _ = EMPTY.make(dtype, layout=layout)
    with on(path):
        y = voxconv.depthwise_conv3d(x, weight, bias, **EMPTY.kwargs(), activation=name)
    assert y.shape == EMPTY.make()[3].shape


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("name", ["relu", "gelu"])
@pytest.mark.parametrize("case", FAR, ids=str)
def test_cpu_results_past_the_caches(
    case: Case, name: str, dtype: torch.dtype, layout: str
) -> None:
    _on_cpu(case, case.make(dtype, layout=layout), "direct", name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_cpu_threads_make_the_same_bits(name: str, layout: str, at_threads: Any) -> None:
    case = Case("threads", n=2, channels=20, size=(9, 20, 30), padding=1)
    x, weight, bias, _ = case.make(layout=layout)

    def run() -> torch.Tensor:
        return voxconv.depthwise_conv3d(x, weight, bias, **case.kwargs(), activation=name)

    assert torch.equal(at_threads(1, run), at_threads(2, run))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_cpu_numbers_at_the_ends(name: str, dtype: torch.dtype, layout: str) -> None:
    """Sums that are given numbers: NaN, infinities, zeros of both signs, and the whole range."""
    inf, nan = float("inf"), float("nan")
    special = torch.tensor([inf, -inf, nan, 0.0, -0.0, 1e4, -1e4, 6e4, -6e4, 1e-5, -1e-5, -100.0])
    spread = torch.linspace(-15, 15, 32 * 7 * 9 * 20 - len(special))
    x = torch.cat([special, spread]).to(dtype).view(1, 32, 7, 9, 20)
    weight, bias = torch.ones(32, 1, 1, 1, 1, dtype=dtype), torch.full((32,), -0.0, dtype=dtype)
    if layout == CHANNELS_LAST:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    with on("direct"):
        got = voxconv.depthwise_conv3d(x, weight, bias, activation=name)
    expected = BY_TORCH[name](x.double())
    assert torch.equal(got.isnan(), expected.isnan())
    got, expected = got.nan_to_num(1.0, inf, -inf), expected.nan_to_num(1.0, inf, -inf)
    assert torch.equal(got.signbit(), expected.signbit())
    finite = expected.isfinite()
    assert torch.equal(got[~finite].double(), expected[~finite])
    error = (got.double() - expected)[finite].abs()
    info = torch.finfo(dtype)
    least = max(info.smallest_normal, torch.finfo(torch.float64).eps * 8)
    assert (error <= 8 * info.eps * expected[finite].abs() + least).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_torch_applies_it_on_the_cpu_where_a_gradient_is_asked_for(name: str) -> None:
    x, weight, bias, _ = DW3.make()
    weight.requires_grad_()
    with on("direct"), ops_called() as called:
        y = voxconv.depthwise_conv3d(x, weight, bias, **DW3.kwargs(), activation=name)
    assert y.requires_grad
    assert f"aten::{name}" in called


@pytest.mark.parametrize("name", ["ReLU", "", "tanh", 1, F.relu])
def test_an_unknown_one_is_refused(name: Any) -> None:
    x, weight, _, _ = DW3.make()
    with pytest.raises(ValueError, match=r"one of .*'silu'.* or None, got"):
        voxconv.depthwise_conv3d(x, weight, activation=name)
    with pytest.raises(ValueError, match="activation"):
        voxconv.nn.DepthwiseConv3d(4, 3, activation=name)


@pytest.mark.parametrize("make", [voxconv.nn.Conv3d, voxconv.nn.DepthwiseConv3d])
def test_modules(make: Any) -> None:
    sizes = (4, 4, 3) if make is voxconv.nn.Conv3d else (4, 3)
    layer = make(*sizes, padding=1, activation="gelu")
    x = torch.randn(2, 4, 5, 6, 7)
    assert "activation='gelu'" in repr(layer)
    assert "activation" not in repr(make(*sizes))
    plain = F.conv3d(x, layer.weight, layer.bias, padding=1, groups=layer.groups)
    torch.testing.assert_close(layer(x), F.gelu(plain))
    torch.testing.assert_close(copy.deepcopy(layer)(x), F.gelu(plain))


def test_revert_leaves_a_layer_with_one() -> None:
    model = torch.nn.Sequential(
        voxconv.nn.DepthwiseConv3d(4, 3, activation="relu"), voxconv.nn.DepthwiseConv3d(4, 3)
    )
    report = voxconv.revert(model)
    assert [layer.reason for layer in report.left] == ["torch's layer has no activation"]
    assert isinstance(model[0], voxconv.nn.DepthwiseConv3d)
    assert type(model[1]) is torch.nn.Conv3d


def test_a_batch_norm_is_folded_by_torch() -> None:
    """torch.nn.utils.fusion takes our layers, and what it makes of them keeps the activation."""
    layer = voxconv.nn.DepthwiseConv3d(4, 3, padding=1, bias=False, activation="relu")
    norm = torch.nn.BatchNorm3d(4)
    x = torch.randn(2, 4, 5, 6, 7)
    for _ in range(3):
        norm(3 * x + 1)  # statistics
    fused = fuse_conv_bn_eval(layer.eval(), norm.eval())
    assert isinstance(fused, voxconv.nn.DepthwiseConv3d)
    plain = F.conv3d(x, layer.weight, padding=1, groups=4)
    torch.testing.assert_close(fused(x), F.relu(norm(plain)))
