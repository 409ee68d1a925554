# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels for GPUs that are not there, as the launchers would ask for them.

The launchers run on tensors without memory, and their calls are written down: a kernel, its
constants, and what Triton takes from the values of its arguments. `python triton_cubins.py ARCH
ROW:DTYPE:LAYOUT...` compiles all different ones, in a process where the interpreter is off, and
prints a line of JSON for each: registers and stack are read from the machine code by the cuobjdump
that Triton brings (a thread that has spilled has a stack; Triton itself would ask a driver).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from cases import BY_NAME, CHANNELS_LAST, MODES, Case

KERNELS = ("correlate_planes", "correlate_any", "grad_weight_planes", "grad_weight_any")
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
}


class Call:
    """A call of a kernel, as Triton specialises it: by dtypes, ones and multiples of 16."""

    def __init__(self, kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        self.warps = constants.pop("num_warps")
        self.kernel, self.constants = kernel, constants
        self.signature: dict[str, Any] = {}
        self.values: dict[tuple[int, ...], Any] = {}
        self.attributes: dict[tuple[int, ...], Any] = {}
        for i, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
            self.signature[name] = self._type((i,), value, name)
        for name, value in constants.items():
            self.signature[name] = "constexpr"
            self.values[(kernel.arg_names.index(name),)] = value

    def _type(self, path: tuple[int, ...], value: Any, name: str) -> Any:
        if isinstance(value, tuple):
            return tuple(self._type((*path, i), v, name) for i, v in enumerate(value))
        if isinstance(value, torch.Tensor):
            self.attributes[path] = [["tt.divisibility", 16]]
            return POINTERS[value.dtype]
        plain = name in self.kernel.do_not_specialize
        if value is None or (value == 1 and not plain):
            self.values[path] = value
            return "constexpr"
        if value % 16 == 0 and not plain:
            self.attributes[path] = [["tt.divisibility", 16]]
        return "i32" if value < 2**31 else "i64"

    @property
    def key(self) -> tuple[str, ...]:
        """Calls with the same one differ in details at most: whether strides are known to be
        multiples of 16, whether there is a bias."""
        dtype = next(iter(self.signature.values()))
        return (self.kernel.__name__, dtype, *map(str, self.constants.items()))

    def compiled(self, arch: int) -> dict[str, Any]:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        source = ASTSource(self.kernel, self.signature, self.values, self.attributes)
        target = GPUTarget("cuda", arch, 32)
        built = triton.compile(source, target=target, options={"num_warps": self.warps})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            tool = triton.knobs.nvidia.cuobjdump.path
            usage = subprocess.run(
                [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
        constants = {name: str(value) for name, value in self.constants.items()}
        return {
            "kernel": self.kernel.__name__,
            **constants,
            "warps": self.warps,
            "registers": int(registers),
            "stack": int(stack),
            "shared": built.metadata.shared,
            "shuffles": built.asm["ptx"].count("shfl."),
        }


@contextmanager
def recorded(calls: list[Call]) -> Iterator[None]:
    """The launchers write their calls down, and nothing runs."""
    from voxconv.triton_kernels import depthwise

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **constants: calls.append(Call(self.kernel, args, constants))

    with ExitStack() as stack:
        for name in KERNELS:
            recorder = Recorder(getattr(depthwise, name))
            stack.enter_context(mock.patch.object(depthwise, name, recorder))
        yield


def launch(case: Case, dtype: torch.dtype, layout: str) -> None:
    """The passes of a row by the launchers, on tensors without memory."""
    from voxconv.triton_kernels import depthwise

    last = layout == CHANNELS_LAST
    memory = torch.channels_last_3d if last else torch.contiguous_format

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory)

    size, out = (case.out_size, case.size) if case.transposed else (case.size, case.out_size)
    x, grad = empty(case.n, case.channels, *size), empty(case.n, case.out_channels, *out)
    weight = torch.empty(case.out_channels, 1, *case.kernel, dtype=dtype, device="meta")
    bias = torch.empty(case.out_channels, dtype=dtype, device="meta")
    pads = tuple(side for pair in case.pads for side in pair)
    geometry = (case.stride, pads, case.dilation, MODES.index(case.mode))
    depthwise.depthwise_forward(x, weight, bias, *geometry)
    split = weight.view(case.channels, -1, *case.kernel)
    depthwise.depthwise_grad_input(grad, split, size, *geometry)
    depthwise.depthwise_grad_weight(grad, x, case.kernel, *geometry)


def different(calls: Iterable[Call]) -> list[Call]:
    return list({call.key: call for call in calls}.values())


def main(arch: str, *rows: str) -> None:
    calls: list[Call] = []
    with recorded(calls):
        for row in rows:
            name, dtype, layout = row.split(":")
            launch(BY_NAME[name], getattr(torch, dtype), layout)
    for call in different(calls):
        print(json.dumps(call.compiled(int(arch))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
