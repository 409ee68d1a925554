# SPDX-License-Identifier: Apache-2.0
"""Who is timed: ours, torch in both layouts, and a table where further rivals go.

A rival is a row of ``RIVALS``: a function (case, x, weight, bias) -> y, the layout its tensors are
given in (its best one; None takes the row's), and what it refuses. A package that is not installed
imports inside its function and says so in ``refuses``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import _path  # noqa: F401
import testing
from cases import CHANNELS_LAST, NCDHW, Case, Tensors
from timing import Call
from voxconv import autograd, autograd_dilated, functional

Conv = Callable[[Case, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]

# What one call of a mode returns, in the order of its results.
RESULTS = {
    "fwd": ("forward",),
    "bwd": ("grad_input", "grad_weight", "grad_bias"),
    "full": ("forward", "grad_input", "grad_weight", "grad_bias"),
    "grad_input": ("grad_input",),
    "grad_weight": ("grad_weight",),
}
# Passes in a mode; each reads two of x, weight and y, and writes the third.
SWEEPS = {"fwd": 1, "bwd": 2, "full": 3, "grad_input": 1, "grad_weight": 1}

# Nanoseconds per multiply-add that torch's slowest paths stay under; halves run unvectorised.
SLOWEST_NS = {torch.float32: 5.0, torch.float64: 8.0, torch.bfloat16: 25.0, torch.float16: 25.0}


def _anything(case: Case, dtype: torch.dtype, device: str) -> str | None:
    return None


@dataclass(frozen=True)
class Contestant:
    """One column of the table; ``gradient`` gives its gradients without the autograd engine."""

    name: str
    title: str
    conv: Conv
    layout: str | None = None
    gradient: Callable[[Case, Tensors, str], Call] | None = None
    refuses: Callable[[Case, torch.dtype, str], str | None] = _anything


def _torch_gradient(case: Case, t: Tensors, mode: str) -> Call:
    args = (
        t.grad,
        t.x,
        t.weight,
        None,
        case.stride,
        [a for a, _ in case.pads],
        case.dilation,
        False,
        (0, 0, 0),
        case.blocks,
        [mode == "grad_input", mode == "grad_weight", False],
    )
    return lambda: torch.ops.aten.convolution_backward(*args)


def _our_gradient(case: Case, t: Tensors, mode: str) -> Call:
    groups = case.groups if case.filters else None
    like = functional.settle(
        False, t.x, t.weight, None, case.stride, case.pads, case.dilation, groups, case.mode, 0
    )
    geometry, plan, size = like.geometry, like.plan, t.x.shape[2:]
    if plan is None:
        return _torch_gradient(case, t, mode)
    if not like.depthwise:
        given = (geometry, case.groups, plan)
        if mode == "grad_weight":
            return lambda: autograd_dilated.dilated_grad_weight(t.grad, t.x, *given)
        return lambda: autograd_dilated.dilated_grad_input(t.grad, t.weight, size, *given)
    if mode == "grad_weight":
        return lambda: autograd.depthwise_grad_weight(t.grad, t.x, geometry, plan)
    weight = t.weight.view(case.channels, -1, *case.kernel)
    return lambda: autograd.depthwise_grad_input(t.grad, weight, size, geometry, plan, None)


OURS = Contestant("ours", "voxconv", testing.ours, gradient=_our_gradient)
RIVALS = {
    rival.name: rival
    for rival in (
        Contestant("conv3d", "F.conv3d NCDHW", testing.by_torch, NCDHW, _torch_gradient),
        Contestant(
            "conv3d_cl",
            "F.conv3d channels_last_3d",
            testing.by_torch,
            CHANNELS_LAST,
            _torch_gradient,
        ),
    )
}
TORCH_LAYOUTS = ("conv3d", "conv3d_cl")


class Problem:
    """The tensors of a row, made once; each layout when it is first asked for."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> None:
        self.case, self.dtype, self.device, self.seed = case, dtype, device, seed
        self._made: dict[str, Tensors] = {}

    def tensors(self, layout: str) -> Tensors:
        if NCDHW not in self._made:
            made = self.case.make(self.dtype, self.seed, layout=NCDHW)
            self._made[NCDHW] = Tensors(*(t.to(self.device) for t in made))
        if layout not in self._made:
            x, weight, bias, grad = self._made[NCDHW]
            last = torch.channels_last_3d
            x, weight, grad = (t.contiguous(memory_format=last) for t in (x, weight, grad))
            self._made[layout] = Tensors(x, weight, bias, grad)
        return self._made[layout]


def make_call(who: Contestant, problem: Problem, mode: str, layout: str) -> Call:
    """The call to time: ``mode`` of one row by one contestant, given the tensors beforehand.

    fwd: forward alone. full: forward with gradients on, then backward for x, weight and bias.
    bwd: that backward alone. grad_input, grad_weight: one gradient alone.
    """
    case = problem.case
    t = problem.tensors(who.layout or layout)
    if mode == "fwd":
        return lambda: who.conv(case, t.x, t.weight, t.bias)
    if mode in ("grad_input", "grad_weight") and who.gradient and _plain(case):
        return who.gradient(case, t, mode)
    x, weight, bias = (v.detach() for v in t[:3])
    wanted = {"grad_input": (x,), "grad_weight": (weight,)}.get(mode, (x, weight, bias))
    for tensor in wanted:
        tensor.requires_grad_()
    if mode == "full":

        def full() -> tuple[torch.Tensor, ...]:
            y = who.conv(case, x, weight, bias)
            return (y.detach(), *torch.autograd.grad(y, wanted, t.grad))

        return full
    y = who.conv(case, x, weight, bias)
    return lambda: torch.autograd.grad(y, wanted, t.grad, retain_graph=True)


def _plain(case: Case) -> bool:
    """Whether torch runs the row as one convolution, not transposed and without padding a copy."""
    return not case.transposed and case.mode == "zeros" and all(a == b for a, b in case.pads)


def results(mode: str, value: Any) -> dict[str, torch.Tensor]:
    """What a call of :func:`make_call` returned, keyed by pass."""
    found = [value] if isinstance(value, torch.Tensor) else [v for v in value if v is not None]
    return dict(zip(RESULTS[mode], found, strict=True))


def predicted_seconds(
    who: Contestant, case: Case, dtype: torch.dtype, mode: str, layout: str, cap: float
) -> float:
    """What one call will take, from one call with a few of the channels; 0 if surely below ``cap``.

    Only ever used to leave a call out: depthwise time is proportional to batch and channels. Of
    other rows it is not asked.
    """
    if case.filters or case.flops / 2 * SWEEPS[mode] * SLOWEST_NS[dtype] * 1e-9 < cap:
        return 0.0
    few = 16 if (who.layout or layout) == CHANNELS_LAST else 4
    small = replace(case, n=1, channels=min(few, case.channels))
    call = make_call(who, Problem(small, dtype), mode, layout)
    start = time.perf_counter()
    call()
    took = time.perf_counter() - start
    return took * case.n * case.channels / small.channels
