# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels for GPUs that are not there, as the launchers ask for them.

The launchers run on tensors without memory, and Triton takes their calls like any others, up to
the launch. `python triton_cubins.py ARCH ROW:DTYPE:LAYOUT...` compiles all different kernels, in a
process where the interpreter is off, and prints a line of JSON for each: registers and stack are
read from the machine code by the cuobjdump that Triton brings (a thread that has spilled has a
stack; Triton itself would ask a driver).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from voxconv.triton_kernels import depthwise

from cases import BY_NAME, CHANNELS_LAST, MODES, Case


@contextmanager
def compiling(arch: int) -> Iterator[None]:
    """Calls of kernels compile them and print what came of it, instead of launching them.

    Once for each kernel, dtypes of its tensors and constants: others differ in details at most, in
    which strides are known to be multiples of 16.
    """
    gpu = mock.Mock()
    gpu.get_current_device.return_value = 0
    gpu.get_current_target.return_value = GPUTarget("cuda", arch, 32)
    seen: set[tuple[Any, ...]] = set()
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, warmup: bool, **constants: Any) -> None:
        del constants["grid"]
        dtypes = [arg.dtype for arg in args if isinstance(arg, torch.Tensor)]
        key = (kernel.__name__, *dtypes, *constants.items())
        if key not in seen:
            seen.add(key)
            built = run(kernel, *args, grid=None, warmup=True, **constants)
            constants = {name: str(value) for name, value in constants.items()}
            print(json.dumps({"kernel": kernel.__name__, **constants, **usage(built)}), flush=True)

    with (
        mock.patch.object(driver, "_active", gpu),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        yield


def usage(built: Any) -> dict[str, int]:
    """What a thread and a block of a compiled kernel use."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()  # type: ignore[union-attr]
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": built.metadata.shared,
        "shuffles": built.asm["ptx"].count("shfl."),
    }


def launch(case: Case, dtype: torch.dtype, layout: str) -> None:
    """The passes of a row by the launchers, on tensors without memory."""
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


def main(arch: str, *rows: str) -> None:
    with compiling(int(arch)):
        for row in rows:
            name, dtype, layout = row.split(":")
            launch(BY_NAME[name], getattr(torch, dtype), layout)


if __name__ == "__main__":
    main(*sys.argv[1:])
