# SPDX-License-Identifier: Apache-2.0
"""Runs the Triton kernels on the CPU, interpreted, for tests through the public functions.

conftest.py switches the interpreter on, before anything imports Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from testing import on
from voxconv import autograd
from voxconv.triton_kernels import depthwise
from voxconv.triton_kernels import depthwise_plan as plan

_patch_and_call = interpreter.InterpretedFunction.__call__
_truncate = interpreter.InterpreterBuilder.cast_impl


def _cast(self: Any, source: Any, target: Any) -> Any:
    """The interpreter cuts the end of a bfloat16 off; GPUs round."""
    if target.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
    return _truncate(self, source, target)


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The interpreter patches Triton's language for a kernel; and once more for each function that
    it calls, which takes as long as ten operations and is in vain for ours."""
    if self.fn.__module__.startswith("voxconv."):
        return self.rewrite()(*args, **kwargs)
    return _patch_and_call(self, *args, **kwargs)


@contextmanager
def interpreted() -> Iterator[None]:
    with (
        mock.patch.object(interpreter.InterpreterBuilder, "cast_impl", _cast),
        mock.patch.object(interpreter.InterpretedFunction, "__call__", _call),
    ):
        yield


@contextmanager
def triton_passes(programs: int = 1) -> Iterator[None]:
    """The functions of autograd call the Triton kernels, cut into slabs for so many programs."""
    patches = (
        on("direct"),
        interpreted(),
        mock.patch.dict(autograd._FORWARD, direct=depthwise.depthwise_forward),
        mock.patch.dict(autograd._GRAD_INPUT, direct=depthwise.depthwise_grad_input),
        mock.patch.dict(autograd._GRAD_WEIGHT, direct=depthwise.depthwise_grad_weight),
        mock.patch.object(autograd, "_CHANNEL_SUM", depthwise.channel_sum),
        mock.patch.object(plan, "PROGRAMS", programs),
    )
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield
