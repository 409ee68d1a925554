# SPDX-License-Identifier: Apache-2.0
"""Runs the Triton kernels on the CPU, interpreted, for tests through the public functions.

Triton's interpreter runs one program after the other, and takes as long for an operation on one
number as on thousands. Here the programs of a launch run together: all that a kernel computes with
has one more axis, the first, as long as there are programs, or one where they agree. Where a branch
or a range parts programs, those of each way start again on their own; what has been stored by then
is stored again.

What a load reads and a store writes has to lie within one of the tensors of the launch.

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
from triton.runtime.interpreter import GridExecutor, TensorHandle
from voxconv.triton_kernels import depthwise, dilated
from voxconv.triton_kernels import depthwise_plan as plan

from testing import on

_patch_and_call = interpreter.InterpretedFunction.__call__
_patch_tensor = interpreter._patch_lang_tensor
_run_grid = GridExecutor.__call__


class _Parted(BaseException):
    """Programs go different ways, by these values. (The interpreter wraps every Exception.)"""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values


class _Builder(interpreter.InterpreterBuilder):
    """The interpreter's operations, for `programs` at once that may touch `spans` of addresses."""

    programs = np.zeros(1, np.int32)
    spans: list[tuple[int, int]] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        # Half of the time went to look for integers that overflow, which nobody is told of.
        self.options = interpreter.InterpreterOptions(sanitize_overflow=False)

    def create_get_program_id(self, axis: int) -> TensorHandle:
        assert axis == 0
        return TensorHandle(self.programs, tl.int32)

    def create_make_range(self, ret_ty: Any, start: int, stop: int) -> TensorHandle:
        return TensorHandle(np.arange(start, stop, dtype=np.int32)[None], tl.int32)

    def create_splat(self, ret_ty: Any, arg: TensorHandle) -> TensorHandle:
        numbers = arg.data.reshape(-1, *(1 for _ in ret_ty.shape))
        return self.create_broadcast(TensorHandle(numbers, arg.dtype), ret_ty.shape)

    def create_broadcast(self, arg: TensorHandle, shape: Any) -> TensorHandle:
        return TensorHandle(np.broadcast_to(arg.data, (len(arg.data), *shape)), arg.dtype.scalar)

    def create_expand_dims(self, arg: TensorHandle, axis: int) -> TensorHandle:
        return super().create_expand_dims(arg, axis + 1)

    def create_masked_load(
        self, ptrs: TensorHandle, mask: TensorHandle, other: TensorHandle | None, *options: Any
    ) -> TensorHandle:
        if other is None:
            other = self.get_null_value(ptrs.get_element_ty())
        ptrs, mask, other = self._checked(ptrs, mask, other)
        return super().create_masked_load(ptrs, mask, other, *options)

    def create_masked_store(
        self, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *options: Any
    ) -> None:
        ptrs, mask, value = self._checked(ptrs, mask, value)
        super().create_masked_store(ptrs, value, mask, *options)

    def _checked(
        self, ptrs: TensorHandle, mask: TensorHandle, value: TensorHandle
    ) -> Iterator[TensorHandle]:
        handles = (ptrs, mask, value)
        arrays = np.broadcast_arrays(*(handle.data for handle in handles))
        touched = arrays[0][arrays[1]]
        if touched.size:
            size = ptrs.get_element_ty().primitive_bitwidth // 8
            first, last = int(touched.min()), int(touched.max()) + size
            if not any(start <= first and last <= end for start, end in self.spans):
                raise IndexError("an access outside of the tensors")
        return (TensorHandle(a, handle.dtype) for a, handle in zip(arrays, handles, strict=True))

    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        """The interpreter cuts the end of a bfloat16 off; GPUs round."""
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            rounded = torch.from_numpy(np.array(src.data)).bfloat16()
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return super().cast_impl(src, dst_type)


class _Reduce(interpreter.ReduceOps):
    def sum(self, input: tl.tensor) -> tl.tensor:
        data = input.handle.data
        sums = data.sum(axis=1 + self.axis, dtype=data.dtype, keepdims=self.keep_dims)
        kind = tl.block_type(input.dtype, list(sums.shape[1:])) if sums.ndim > 1 else input.dtype
        return tl.tensor(TensorHandle(sums, input.dtype), kind)


def _number(tensor: tl.tensor) -> Any:
    """The number that a branch or a range depends on; the programs that go on agree in it."""
    values = tensor.handle.data
    if (values != values[0]).any():
        raise _Parted(values)
    return values[0].item()


def _tensor_patches(tensor: Any, *scope: Any) -> None:
    _patch_tensor(tensor, *scope)
    tensor.__index__ = _number
    tensor.__bool__ = lambda self: self.type.is_block() or bool(_number(self))  # as Triton has it


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The interpreter patches Triton's language for a kernel; and once more for each function that
    it calls, which takes as long as ten operations and is in vain for ours."""
    if self.fn.__module__.startswith("voxconv."):
        return self.rewrite()(*args, **kwargs)
    return _patch_and_call(self, *args, **kwargs)


def _span(t: torch.Tensor) -> tuple[int, int]:
    elements = 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + elements * t.element_size()


def _run_together(self: Any, *args: Any, **kwargs: Any) -> None:
    builder = interpreter.interpreter_builder
    builder.spans = [_span(t) for t in args if isinstance(t, torch.Tensor) and t.numel()]
    groups = [np.arange(self.grid[0], dtype=np.int32)]
    self.grid = (1,)
    while groups:
        builder.programs = programs = groups.pop()
        try:
            _run_grid(self, *args, **kwargs)
        except _Parted as parted:
            groups += [programs[parted.values == value] for value in np.unique(parted.values)]


@contextmanager
def interpreted() -> Iterator[None]:
    builder = _Builder()
    with (
        mock.patch.object(interpreter, "interpreter_builder", builder),
        mock.patch.object(interpreter.interpreter_semantic, "builder", builder),
        mock.patch.object(interpreter, "ReduceOps", _Reduce),
        mock.patch.object(interpreter, "_patch_lang_tensor", _tensor_patches),
        mock.patch.object(interpreter.InterpretedFunction, "__call__", _call),
        mock.patch.object(GridExecutor, "__call__", _run_together),
    ):
        yield


# On a GPU the ops are Triton's from the start.
_cpu = torch.library.Library("voxconv", "IMPL", "CPU")
_PASSES = ("forward", "grad_input", "grad_weight")
for _module, _names in (
    (depthwise, (*(f"depthwise_{name}" for name in _PASSES), "channel_sum")),
    (dilated, tuple(f"dilated_{name}" for name in _PASSES)),
):
    for _name in _names:
        _cpu.impl(f"{_name}_triton", getattr(_module, _name))


@contextmanager
def triton_passes(programs: int = 1) -> Iterator[None]:
    """Calls go to the Triton kernels, cut into slabs for so many programs."""
    with (
        on("triton", "triton"),
        interpreted(),
        mock.patch.object(plan, "PROGRAMS", programs),
    ):
        yield
