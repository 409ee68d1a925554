# SPDX-License-Identifier: Apache-2.0
"""The passes of convolutions whose outputs read many channels, as autograd functions.

As in `autograd`, forward, input gradient and weight gradient are each one's gradients, and are
differentiable as often as one likes. All take canonical 5-D tensors, a `Geometry`, the number of
groups and a `Plan`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import _by_torch, _ops  # noqa: F401  (defines the ops)
from ._fold import fold_padding
from ._geometry import Geometry, Triple
from .autograd import Plan, channel_sum, tracked

_Op = Callable[..., Tensor]
_ops_of = torch.ops.voxconv
_FORWARD: dict[str, _Op] = {
    "dilated": _ops_of.dilated_forward.default,
    "dilated_triton": _ops_of.dilated_forward_triton.default,
    "conv3d": _by_torch.forward,
}
_GRAD_INPUT: dict[str, _Op] = {
    "dilated": _ops_of.dilated_grad_input.default,
    "dilated_triton": _ops_of.dilated_grad_input_triton.default,
    "conv3d": _by_torch.grad_input,
}
_GRAD_WEIGHT: dict[str, _Op] = {
    "dilated": _ops_of.dilated_grad_weight.default,
    "dilated_triton": _ops_of.dilated_grad_weight_triton.default,
    "conv3d": _by_torch.grad_weight,
}


class DilatedForward(Function):
    """x [N,C,D,H,W], weight [O,C/groups,kD,kH,kW], bias [O] -> y [N,O,oD,oH,oW].

    An `activation` other than 0 is for calls that nobody differentiates: it has no gradient here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        groups: int,
        plan: Plan,
        activation: int = 0,
    ) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)
        ctx.size = x.shape[2:]
        ctx.settings = geometry, groups, plan
        _, stride, padding, dilation, mode = geometry
        run = _FORWARD[plan.forward]
        return run(x, weight, bias, stride, padding, dilation, mode, groups, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = grad_bias = None
        if need_x:
            grad_x = dilated_grad_input(grad, weight, ctx.size, *ctx.settings)
        if need_weight:
            grad_weight = dilated_grad_weight(grad, x, *ctx.settings)
        if need_bias:
            grad_bias = channel_sum(grad, ctx.settings[-1])
        return grad_x, grad_weight, grad_bias, None, None, None, None


class DilatedGradInput(Function):
    """The transposed convolution: grad [N,O,oD,oH,oW], weight [O,C/groups,kD,kH,kW] -> [N,C,*size].

    `bias` [C], if any, is added to the result.
    """

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        weight: Tensor,
        size: Triple,
        geometry: Geometry,
        groups: int,
        plan: Plan,
        bias: Tensor | None = None,
    ) -> Tensor:
        need_grad, need_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(grad if need_weight else None, weight if need_grad else None)
        ctx.settings = geometry, groups, plan
        _, stride, padding, dilation, mode = geometry
        run = _GRAD_INPUT[plan.grad_input]
        if mode == 0:
            return run(grad, weight, size, stride, padding, dilation, mode, groups, bias)
        return fold_padding(
            lambda padded, dtype: run(
                grad.to(dtype),
                weight.to(dtype),
                padded,
                stride,
                (0,) * 6,
                dilation,
                0,
                groups,
                None,
            ),
            size,
            padding,
            mode,
            grad.dtype,
        )

    @staticmethod
    def backward(ctx: Any, up: Tensor) -> tuple[Tensor | None, ...]:
        grad, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad_grad = grad_weight = grad_bias = None
        if needs[0]:
            grad_grad = dilated_forward(up, weight, None, *ctx.settings)
        if needs[1]:
            grad_weight = dilated_grad_weight(grad, up, *ctx.settings)
        if len(needs) == 7 and needs[6]:
            grad_bias = channel_sum(up, ctx.settings[-1])
        return grad_grad, grad_weight, None, None, None, None, grad_bias


class DilatedGradWeight(Function):
    """The weight gradient: grad [N,O,oD,oH,oW], x [N,C,D,H,W] -> [O,C/groups,kD,kH,kW]."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, geometry: Geometry, groups: int, plan: Plan
    ) -> Tensor:
        need_grad, need_x = ctx.needs_input_grad[:2]
        ctx.save_for_backward(grad if need_x else None, x if need_grad else None)
        ctx.size = x.shape[2:]
        ctx.settings = geometry, groups, plan
        run = _GRAD_WEIGHT[plan.grad_weight]
        return run(grad, x, *geometry, groups)

    @staticmethod
    def backward(ctx: Any, up: Tensor) -> tuple[Tensor | None, ...]:
        grad, x = ctx.saved_tensors
        grad_grad = grad_x = None
        if ctx.needs_input_grad[0]:
            grad_grad = dilated_forward(x, up, None, *ctx.settings)
        if ctx.needs_input_grad[1]:
            grad_x = dilated_grad_input(grad, up, ctx.size, *ctx.settings)
        return grad_grad, grad_x, None, None, None


dilated_forward = tracked(DilatedForward)
dilated_grad_input = tracked(DilatedGradInput)
dilated_grad_weight = tracked(DilatedGradWeight)
