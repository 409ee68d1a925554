# SPDX-License-Identifier: Apache-2.0
"""Runs the Triton kernels on the CPU, interpreted, for tests through the public functions.

conftest.py switches the interpreter on, before anything imports Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from voxconv.triton_kernels import depthwise
from voxconv.triton_kernels import depthwise_plan as plan

from testing import on

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


# On a GPU the ops are Triton's from the start.
_cpu = torch.library.Library("voxconv", "IMPL", "CPU")
for _name in ("depthwise_forward", "depthwise_grad_input", "depthwise_grad_weight", "channel_sum"):
    _cpu.impl(f"{_name}_triton", getattr(depthwise, _name))


@contextmanager
def triton_passes(programs: int = 1) -> Iterator[None]:
    """Calls go to the Triton kernels, cut into slabs for so many programs."""
    with (
        on("triton", "triton"),
        interpreted(),
        mock.patch.object(plan, "PROGRAMS", programs),
    ):
        yield
