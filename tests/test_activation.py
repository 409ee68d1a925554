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
from cases import CHANNELS_LAST, NCDHW, Case, select
from cuda_kernels import cuda_kernels, plan
from testing import on
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
