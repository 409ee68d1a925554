# SPDX-License-Identifier: Apache-2.0
"""The passes as autograd functions.

Forward, input gradient and weight gradient are bilinear and each one's gradients are the other two,
so they are differentiable as often as one likes. All take canonical 5-D tensors, a `Geometry` (of
the forward convolution) and a `Plan`, the kernel of each pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import Function, forward_ad

from . import _ops  # noqa: F401  (defines the ops)
from ._geometry import Geometry, Triple


class Plan(NamedTuple):
    """The kernel of each pass: "direct", "fft" or "triton"; and whether that of the forward pass
    has activations of its own."""

    forward: str
    grad_input: str
    grad_weight: str
    channel_sum: str
    activates: bool = False


_Op = Callable[..., Tensor]
_ops_of = torch.ops.voxconv
_FORWARD: dict[str, _Op] = {
    "direct": _ops_of.depthwise_forward.default,
    "fft": _ops_of.depthwise_forward_fft.default,
    "triton": _ops_of.depthwise_forward_triton.default,
}
_GRAD_INPUT: dict[str, _Op] = {
    "direct": _ops_of.depthwise_grad_input.default,
    "fft": _ops_of.depthwise_grad_input_fft.default,
    "triton": _ops_of.depthwise_grad_input_triton.default,
}
_GRAD_WEIGHT: dict[str, _Op] = {
    "direct": _ops_of.depthwise_grad_weight.default,
    "fft": _ops_of.depthwise_grad_weight_fft.default,
    "triton": _ops_of.depthwise_grad_weight_triton.default,
}
_CHANNEL_SUM: dict[str, _Op] = {
    "direct": _ops_of.channel_sum.default,
    "triton": _ops_of.channel_sum_triton.default,
}


class DepthwiseForward(Function):
    """x [N,C,D,H,W], weight [C*m,1,kD,kH,kW], bias [C*m] -> y [N,C*m,oD,oH,oW].

    An `activation` other than 0 is for calls that nobody differentiates: it has no gradient here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        plan: Plan,
        activation: int = 0,
    ) -> Tensor:
        need_x, need_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if need_weight else None, weight if need_x else None)
        ctx.x_shape = x.shape
        ctx.geometry = geometry
        ctx.plan = plan
        _, stride, padding, dilation, mode = geometry
        run = _FORWARD[plan.forward]
        return run(x, weight, bias, stride, padding, dilation, mode, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        geometry, plan = ctx.geometry, ctx.plan
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        _, channels, *size = ctx.x_shape
        grad_x = grad_weight = grad_bias = None
        if need_x:
            weight = _split(weight, channels)
            grad_x = depthwise_grad_input(grad, weight, size, geometry, plan, None)
        if need_weight:
            grad_weight = depthwise_grad_weight(grad, x, geometry, plan)
        if need_bias:
            grad_bias = channel_sum(grad, plan)
        return grad_x, grad_weight, grad_bias, None, None, None


class DepthwiseGradInput(Function):
    """The transposed convolution: grad [N,C*m,oD,oH,oW], weight [C,m,kD,kH,kW] -> [N,C,*size].

    `bias` [C], if any, is added to the result.
    """

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        weight: Tensor,
        size: Triple,
        geometry: Geometry,
        plan: Plan,
        bias: Tensor | None = None,
    ) -> Tensor:
        need_grad, need_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(grad if need_weight else None, weight if need_grad else None)
        ctx.geometry = geometry
        ctx.plan = plan
        _, stride, padding, dilation, mode = geometry
        run = _GRAD_INPUT[plan.grad_input]
        return run(grad, weight, size, stride, padding, dilation, mode, bias)

    @staticmethod
    def backward(ctx: Any, up: Tensor) -> tuple[Tensor | None, ...]:
        grad, weight = ctx.saved_tensors
        geometry, plan = ctx.geometry, ctx.plan
        needs = ctx.needs_input_grad
        grad_grad = grad_weight = grad_bias = None
        if needs[0]:
            weight = weight.reshape(-1, 1, *geometry.kernel)
            grad_grad = depthwise_forward(up, weight, None, geometry, plan)
        if needs[1]:
            grad_weight = depthwise_grad_weight(grad, up, geometry, plan)
            grad_weight = _split(grad_weight, up.shape[1])
        if len(needs) == 6 and needs[5]:
            grad_bias = channel_sum(up, plan)
        return grad_grad, grad_weight, None, None, None, grad_bias


class DepthwiseGradWeight(Function):
    """The weight gradient: grad [N,C*m,oD,oH,oW], x [N,C,D,H,W] -> [C*m,1,kD,kH,kW]."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, geometry: Geometry, plan: Plan) -> Tensor:
        need_grad, need_x = ctx.needs_input_grad[:2]
        ctx.save_for_backward(grad if need_x else None, x if need_grad else None)
        ctx.x_shape = x.shape
        ctx.geometry = geometry
        ctx.plan = plan
        run = _GRAD_WEIGHT[plan.grad_weight]
        return run(grad, x, *geometry)

    @staticmethod
    def backward(ctx: Any, up: Tensor) -> tuple[Tensor | None, ...]:
        grad, x = ctx.saved_tensors
        geometry, plan = ctx.geometry, ctx.plan
        _, channels, *size = ctx.x_shape
        grad_grad = grad_x = None
        if ctx.needs_input_grad[0]:
            grad_grad = depthwise_forward(x, up, None, geometry, plan)
        if ctx.needs_input_grad[1]:
            up = _split(up, channels)
            grad_x = depthwise_grad_input(grad, up, size, geometry, plan, None)
        return grad_grad, grad_x, None, None


class ChannelSum(Function):
    """The bias gradient: grad [N,C,D,H,W] -> [C]."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, plan: Plan) -> Tensor:
        ctx.shape = grad.shape
        return _CHANNEL_SUM[plan.channel_sum](grad)

    @staticmethod
    def backward(ctx: Any, up: Tensor) -> tuple[Tensor, None]:
        return up.view(-1, 1, 1, 1).expand(ctx.shape), None


def _split(weight: Tensor, channels: int) -> Tensor:
    """View a weight [C*m,1,kD,kH,kW] as [C,m,kD,kH,kW]."""
    if weight.shape[0] == channels:
        return weight
    return weight.reshape(channels, -1, *weight.shape[2:])


class _Untracked:
    """The context of a call that nobody will differentiate."""

    needs_input_grad = (False,) * 7

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass


def tracked(function: type[Function]) -> _Op:
    """`function.apply`, or its forward alone where nobody will ask for a derivative: the records of
    autograd take longer than a small layer."""

    def call(*args: Any) -> Tensor:
        if watched(args):
            return function.apply(*args)  # type: ignore[no-any-return]
        return function.forward(_Untracked(), *args)  # type: ignore[no-any-return]

    call.__doc__ = function.__doc__
    return call


def transformed() -> bool:
    """Whether derivatives are taken in a way that these functions do not have: forward, or by
    `torch.func`."""
    if forward_ad._current_level >= 0:
        return True
    levels = torch._C._functorch.get_interpreter_stack()
    return levels is not None and any(level.key() != TransformType.Vmap for level in levels)


def watched(args: tuple[Any, ...]) -> bool:
    """Whether somebody may ask for a derivative with respect to one of the arguments."""
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for arg in args:
            if isinstance(arg, Tensor) and arg.requires_grad:
                return True
    return False


depthwise_forward = tracked(DepthwiseForward)
depthwise_grad_input = tracked(DepthwiseGradInput)
depthwise_grad_weight = tracked(DepthwiseGradWeight)
channel_sum = tracked(ChannelSum)
