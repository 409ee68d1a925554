# SPDX-License-Identifier: Apache-2.0
"""The passes by torch's own convolution: zeros, as much padding before as after."""

from __future__ import annotations

import torch
from torch import Tensor

from ._geometry import Sextuple, Triple

_NOTHING = (0, 0, 0)


def suits(padding: Sextuple, mode: int) -> bool:
    """Whether torch's convolution has this padding."""
    return mode == 0 and padding[::2] == padding[1::2]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Triple,
    padding: Sextuple,
    dilation: Triple,
    mode: int,
    groups: int,
    activation: int = 0,
) -> Tensor:
    return torch.ops.aten.convolution(  # type: ignore[no-any-return]
        x, weight, bias, stride, padding[::2], dilation, False, _NOTHING, groups
    )


def grad_input(
    grad: Tensor,
    weight: Tensor,
    size: Triple,
    stride: Triple,
    padding: Sextuple,
    dilation: Triple,
    mode: int,
    groups: int,
    bias: Tensor | None,
) -> Tensor:
    x = grad.new_empty(1).expand(grad.shape[0], weight.shape[1] * groups, *size)
    geometry = (stride, padding[::2], dilation, False, _NOTHING, groups)
    result: Tensor = torch.ops.aten.convolution_backward(
        grad, x, weight, None, *geometry, (True, False, False)
    )[0]
    return result if bias is None else result + bias.view(-1, 1, 1, 1)


def grad_weight(
    grad: Tensor,
    x: Tensor,
    kernel: Triple,
    stride: Triple,
    padding: Sextuple,
    dilation: Triple,
    mode: int,
    groups: int,
) -> Tensor:
    weight = grad.new_empty(1).expand(grad.shape[1], x.shape[1] // groups, *kernel)
    geometry = (stride, padding[::2], dilation, False, _NOTHING, groups)
    return torch.ops.aten.convolution_backward(  # type: ignore[no-any-return]
        grad, x, weight, None, *geometry, (False, True, False)
    )[1]
