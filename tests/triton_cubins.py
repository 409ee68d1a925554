# SPDX-License-Identifier: Apache-2.0
"""Compiles the Triton kernels for GPUs that are not there, as the launchers ask for them.

The launchers run on tensors without memory, and Triton takes their calls like any others, up to
the launch. `python triton_cubins.py ARCH ROW:DTYPE:LAYOUT...` ("ieee" is float32 where torch does
without TF32 in convolutions) compiles all different kernels, in a
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
from voxconv.triton_kernels import depthwise, dilated

import cases
import dense_cases
from cases import CHANNELS_LAST, MODES, Case

ROWS = {**cases.BY_NAME, **dense_cases.BY_NAME}
assert len(ROWS) == len(cases.BY_NAME) + len(dense_cases.BY_NAME), "a name is used twice"


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
            if "PRECISION" in constants:
                constants["product"] = f"{constants['PRECISION']} {str(dtypes[0])[6:]}"
            print(json.dumps({"kernel": kernel.__name__, **constants, **usage(built)}), flush=True)

    with (
        mock.patch.object(driver, "_active", gpu),
        mock.patch.object(JITFunction, "run", compile_only),
    ):
        yield


def usage(built: Any) -> dict[str, int]:
    """What a thread and a block of a compiled kernel use, and what it is made of."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        used, code = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", used).groups()  # type: ignore[union-attr]
    ptx = built.asm["ptx"]
    return {
        "registers": int(registers),
        "stack": int(stack),
        "looped": _local_in_loops(code),
        "shared": built.metadata.shared,
        "shuffles": ptx.count("shfl."),
        "products": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
        "copies": len(re.findall(r"\bcp\.async\.c[ag]\b", ptx)),
    }


def _cuobjdump(*args: str) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, *args], capture_output=True, text=True, check=True).stdout


def _local_in_loops(code: str) -> int:
    """Loads and stores of what was put out of registers, in loops: between a jump back and the
    place that it goes to."""
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", code)
    lines = [(int(address, 16), instruction) for address, instruction in found]
    jumps = [(int(to[1], 16), at) for at, i in lines if (to := re.search(r"BRA.*0x([0-9a-f]+)", i))]
    local = [at for at, i in lines if re.search(r"\b(LDL|STL)\b", i)]
    return sum(any(to <= at <= back for to, back in jumps) for at in local)


def launch(case: Case, dtype: torch.dtype, layout: str) -> None:
    """The passes of a row by the launchers, on tensors without memory."""
    last = layout == CHANNELS_LAST
    memory = torch.channels_last_3d if last else torch.contiguous_format

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory)

    def vector(n: int) -> torch.Tensor:
        return torch.empty(n, dtype=dtype, device="meta")

    size, out = (case.out_size, case.size) if case.transposed else (case.size, case.out_size)
    pads = tuple(side for pair in case.pads for side in pair)
    geometry = (case.stride, pads, case.dilation, MODES.index(case.mode))
    if case.filters:
        filters, channels = case.filters, case.channels
        if case.transposed:
            filters, channels = channels, filters
        weight = vector(filters * channels // case.groups * case.taps)
        weight = weight.view(filters, -1, *case.kernel)
        x, grad = empty(case.n, channels, *size), empty(case.n, filters, *out)
        dilated.dilated_forward(x, weight, vector(filters), *geometry, case.groups)
        if not geometry[-1]:
            dilated.dilated_grad_input(grad, weight, size, *geometry, case.groups, None)
        dilated.dilated_grad_weight(grad, x, case.kernel, *geometry, case.groups)
        return
    x, grad = empty(case.n, case.channels, *size), empty(case.n, case.out_channels, *out)
    weight = vector(case.out_channels * case.taps).view(-1, 1, *case.kernel)
    depthwise.depthwise_forward(x, weight, vector(case.out_channels), *geometry)
    split = weight.view(case.channels, -1, *case.kernel)
    depthwise.depthwise_grad_input(grad, split, size, *geometry)
    depthwise.depthwise_grad_weight(grad, x, case.kernel, *geometry)


def main(arch: str, *rows: str) -> None:
    with compiling(int(arch)):
        for row in rows:
            name, dtype, layout = row.split(":")
            precise = dtype == "ieee"
            torch.backends.cudnn.conv.fp32_precision = "ieee" if precise else "tf32"
            launch(ROWS[name], torch.float32 if precise else getattr(torch, dtype), layout)


if __name__ == "__main__":
    main(*sys.argv[1:])
