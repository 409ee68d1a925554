# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels: values by Triton's interpreter, and machine code for GPUs that are not there.

The interpreter runs every operation as Python (see triton_on_cpu.py), so that problems are small.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from voxconv.triton_kernels import depthwise_plan as plan

from cases import CHANNELS_LAST, LAYOUTS, MODES, NCDHW, Case, Tensors, scaled_down, select
from testing import (
    DTYPES,
    all_passes,
    assert_case,
    bitwise_equal,
    by_torch,
    dtype_id,
    ours,
    reference,
)

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from voxconv.triton_kernels import depthwise

from triton_on_cpu import interpreted, triton_passes

HERE = Path(__file__).parent
THREE, FIVE = (3, 3, 3), (5, 5, 5)

PLANES = [
    Case("lines", channels=1, size=(3, 8, 3), padding=1),
    Case("weights_loaded", channels=2, size=(3, 4, 3), kernel=FIVE, padding=(2, 1, 2)),
    Case("pairs", n=2, channels=1, size=(3, 3, 4), padding=((0, 2), (1, 0), (3, 1))),
    Case("channels", channels=20, size=(2, 2, 3), padding=1),
    Case("multiplier", channels=2, multiplier=2, size=(3, 4, 5), padding=1),
    Case("lattices", channels=1, size=(5, 6, 4), dilation=(2, 3, 2), padding=2),
    Case("march", channels=1, size=(5, 6, 7), padding=1, stride=(2, 2, 3), dilation=(1, 1, 2)),
    Case("march_on_lattices", channels=1, size=(6, 8, 4), padding=2, stride=THREE,
         dilation=(2, 2, 1)),
    Case("replicate", channels=1, size=(3, 4, 3), padding=(4, 2, 1), mode="replicate"),
    Case("reflect", channels=1, size=(3, 3, 4), padding=(2, 2, 1), mode="reflect"),
    Case("circular_march", channels=1, size=(4, 3, 4), padding=(4, 1, 2), mode="circular",
         stride=(2, 2, 2)),
]  # fmt: skip
ANY = [
    Case("long", channels=2, size=(3, 2, 5), kernel=(2, 1, 10), padding=(0, 1, 5)),
    Case("many_taps", channels=2, size=(3, 2, 4), kernel=(10, 1, 7), padding=(5, 0, 3)),
    Case("long_circular", channels=1, size=(2, 2, 6), kernel=(1, 1, 10), padding=(0, 0, 5),
         mode="circular", stride=(1, 1, 2)),
    Case("up", op="transposed", channels=2, size=(2, 2, 3), stride=(2, 2, 2), padding=1),
    Case("up_phases", op="transposed", channels=1, multiplier=2, size=(2, 2, 2), stride=(3, 2, 4),
         dilation=(2, 4, 6), output_padding=(1, 0, 3)),
]  # fmt: skip
SLABS = [
    Case("slabs", channels=1, size=(24, 2, 2), kernel=(3, 1, 2), padding=1),
    Case("slabs_march", channels=1, size=(51, 2, 2), kernel=(5, 1, 1), stride=(2, 1, 1)),
]
BY_NAME = {case.name: case for case in PLANES + ANY + SLABS}
LAST = ("lines", "channels", "multiplier", "march_on_lattices", "reflect", "many_taps", "up_phases")

LAYERS = [case for case in scaled_down("model", "bar") if "fft" not in case.tags]  # of models
TABLE = [*select("smoke", "odd", "edge"), *LAYERS]


def _steps(case: Case) -> int:
    """What the interpreter's time goes with: taps that are walked through, plane by plane."""
    return (case.size[0] + case.out_size[0]) * case.taps


QUICK = [case for case in TABLE if "smoke" in case.tags or _steps(case) <= 600]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_table(case: Case, layout: str) -> None:
    with triton_passes():
        assert_case(case, case.make(layout=layout), torch.float32, versus_torch=True)


@pytest.mark.sweep
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [case for case in TABLE if case not in QUICK], ids=str)
def test_rest_of_the_table(case: Case, layout: str) -> None:
    test_table(case, layout)


@pytest.mark.sweep
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [case for case in TABLE if "fft" not in case.tags], ids=str)
def test_table_in_bfloat16(case: Case, layout: str) -> None:
    tensors = case.make(torch.bfloat16, layout=layout)
    with triton_passes():
        assert_case(case, tensors, torch.bfloat16, versus_torch=True)


@pytest.mark.parametrize("case", PLANES + ANY, ids=str)
def test_rows(case: Case) -> None:
    with triton_passes():
        assert_case(case, case.make(), torch.float32, versus_torch=True)


@pytest.mark.parametrize("name", LAST)
def test_channels_last(name: str) -> None:
    case = BY_NAME[name]
    with triton_passes():
        assert_case(case, case.make(layout=CHANNELS_LAST), torch.float32, versus_torch=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SLABS, ids=str)
def test_slabs(case: Case, layout: str) -> None:
    with triton_passes(programs=8):
        assert_case(case, case.make(layout=layout), torch.float32, versus_torch=True)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32], ids=dtype_id)
@pytest.mark.parametrize("name", ["pairs", "many_taps", "up"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    with triton_passes():
        assert_case(BY_NAME[name], BY_NAME[name].make(dtype), dtype, versus_torch=True)


def _forward(case: Case, tensors: Tensors, activation: int = 0) -> torch.Tensor:
    pads = tuple(side for pair in case.pads for side in pair)
    geometry = (case.stride, pads, case.dilation, MODES.index(case.mode))
    with interpreted(), mock.patch.object(plan, "PROGRAMS", 1):
        return depthwise.depthwise_forward(*tensors[:3], *geometry, activation)


ACTIVATIONS = (lambda x: x, F.relu, F.leaky_relu, F.gelu, F.silu)  # enum Activation of conv3d.h


@pytest.mark.parametrize("name", ["lines", "long"])
@pytest.mark.parametrize("activation", range(5))
def test_activations(activation: int, name: str) -> None:
    case = BY_NAME[name]
    for dtype in (torch.float32, torch.float64):
        tensors = case.make(dtype)
        tensors.x[0, 0, 0, 0, 0] = torch.nan
        expected = ACTIVATIONS[activation](by_torch(case, *tensors[:3]))
        torch.testing.assert_close(
            _forward(case, tensors, activation), expected, rtol=1e-5, atol=1e-5, equal_nan=True
        )


@pytest.mark.parametrize(
    ("name", "layout"), [("march", NCDHW), ("channels", CHANNELS_LAST), ("long", NCDHW)]
)
def test_infinities_reach_what_reads_them(name: str, layout: str) -> None:
    """All else keeps every bit, and so do the weights of taps that no infinity meets."""
    case = BY_NAME[name]
    for cell in (0, -1):
        tensors = case.make(layout=layout)
        ones = Tensors(*(torch.ones_like(t) for t in tensors))
        for t, to in ((tensors.x, torch.inf), (ones.x.zero_(), 1)):
            t[0, 0, cell, cell, cell] = to
        marks = all_passes(reference, case, ones._replace(bias=torch.zeros_like(ones.bias)))
        with triton_passes():
            expected = all_passes(ours, case, case.make(layout=layout))
            got = all_passes(ours, case, tensors)
        for which in ("forward", "grad_weight"):
            touched = marks[which] != 0
            assert torch.equal(~got[which].isfinite(), touched), which
            assert torch.equal(got[which][~touched], expected[which][~touched]), which


@pytest.mark.parametrize("name", ["pairs", "many_taps", "up"])
def test_any_strides(name: str) -> None:
    case = BY_NAME[name]
    tensors = case.make()
    wide = [
        t.repeat_interleave(2, -1).transpose(-1, -2).contiguous() for t in tensors if t.dim() == 5
    ]
    x, weight, grad = (t[..., ::2, :].transpose(-1, -2) for t in wide)
    assert not x.is_contiguous()
    with triton_passes():
        expected = all_passes(ours, case, tensors)
        got = all_passes(ours, case, Tensors(x, weight, tensors.bias, grad))
    for which in ("forward", "grad_input", "grad_weight"):
        assert bitwise_equal(got[which], expected[which]), which


def test_offsets_of_64_bits() -> None:
    """Where a plane of a channel spans 2^31 elements or more."""
    case = BY_NAME["pairs"]
    with mock.patch.object(depthwise, "_offset", return_value=tl.int64), triton_passes():
        assert_case(case, case.make(), torch.float32, versus_torch=True)
    for width, offset in ((2**13, tl.int32), (2**15, tl.int64)):
        x = torch.empty(1, 16, 2, 2**13, width, device="meta")
        assert depthwise._offset(x) == tl.int32
        assert depthwise._offset(x, x.to(memory_format=torch.channels_last_3d)) == offset


@pytest.mark.parametrize("name", ["pairs", "many_taps", "up", "reflect"])
def test_empty_batch(name: str) -> None:
    case = replace(BY_NAME[name], n=0)
    with triton_passes():
        got = all_passes(ours, case, case.make())
    for which, expected in all_passes(reference, case, case.make()).items():
        assert torch.equal(got[which], expected), which


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", select("model", "bar"), ids=str)
def test_plans(case: Case, layout: str) -> None:
    """Tiles fit the warps and waste little; sums fit the registers; kernels of 9 go by planes."""
    geometry = zip(
        case.size, case.out_size, case.kernel, case.stride, case.dilation, case.pads, strict=True
    )
    d, h, w = (plan.Axis(*axis[:-1], axis[-1][0]) for axis in geometry)
    if case.transposed:
        d, h, w = (axis._replace(source=axis.target, target=axis.source) for axis in (d, h, w))
    last = layout == CHANNELS_LAST
    both = (
        plan.planes((d, h, w), case.n, case.out_channels, 1, last, False),
        plan.weight_planes((d, h, w), case.n, case.out_channels, last, False),
    )
    assert (both[0] is not None) == (max(case.kernel) <= 9)
    assert (both[1] is not None) == (case.kernel[0] * case.kernel[2] <= 64)
    planes = plan.ceil_div(d.target, d.lattice)
    for own, steps in zip(both, (planes, planes + d.ring - 1), strict=True):
        if own is None:
            continue
        assert own.slab * (own.slabs - 1) < steps <= own.slab * own.slabs
        cells = own.tile.positions * own.tile.channels
        assert cells // (32 * own.tile.warps) in (0, 1, 2, 4)
        positions = plan.ceil_div(plan.ceil_div(h.target, h.lattice), own.lines) * w.target
        work = positions * own.lines * case.out_channels * h.lattice
        used = plan.ceil_div(positions, own.tile.positions) * own.tile.positions
        used *= plan.ceil_div(case.out_channels, own.tile.channels) * own.tile.channels
        assert work <= used * own.lines * h.lattice <= 1.5 * work or positions < 32
        assert own.grid < 2**31


def test_without_triton() -> None:
    code = (
        "import sys, voxconv.triton_kernels\n"
        "from voxconv import _triton\n"
        "assert 'triton' not in sys.modules\n"
        "assert _triton.missing_reason() is None\n"
        "sys.modules['triton'] = None\n"
        "print(_triton.missing_reason())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "Triton is not installed: pip install triton\n", run.stderr


@triton.jit
def _copy(p_from, p_to, i_from, i_to, limit, CELLS: tl.constexpr):
    o = tl.arange(0, CELLS)
    b = tl.load(p_from + i_from + o, mask=i_from + o < limit, other=-1.0)
    tl.store(p_to + i_to + o, b, mask=i_to + o < limit)


@pytest.mark.parametrize(
    ("i_from", "i_to", "limit", "good"),
    [(0, 0, 8, True), (3, 5, 8, True), (1, 0, 9, False), (-1, 0, 8, False), (0, 1, 9, False),
     (0, -1, 8, False)],
)  # fmt: skip
def test_accesses_outside_are_seen(i_from: int, i_to: int, limit: int, good: bool) -> None:
    around, to = torch.arange(24.0), torch.zeros(24)
    arguments = (around[8:16], to[8:16], i_from, i_to, limit, 8)
    with interpreted():
        if good:
            _copy[(1,)](*arguments)
            expected = [8.0 + i_from + i if i_from + i < 8 else -1.0 for i in range(8 - i_to)]
            assert to.tolist() == [0.0] * (8 + i_to) + expected + [0.0] * 8
        else:
            with pytest.raises(InterpreterError, match="outside of the tensors"):
                _copy[(1,)](*arguments)


@triton.jit
def _parting(p_y, CELLS: tl.constexpr):
    i_program = tl.program_id(0)
    total = i_program * 0
    for i in range(i_program % 3):
        total += i + 1
        if i_program >= 4:
            total += 10 * i_program
    o = tl.arange(0, CELLS)
    tl.store(p_y + i_program * CELLS + o, total + tl.sum(o * i_program, 0))


def test_programs_go_their_own_ways() -> None:
    y = torch.zeros(7, 4, dtype=torch.int32)
    with interpreted():
        _parting[(7,)](y, 4)
    for i, row in enumerate(y.tolist()):
        assert row == [sum(j + 1 + 10 * i * (i >= 4) for j in range(i % 3)) + 6 * i] * 4


def _compiled(arch: int, rows: list[str]) -> list[dict[str, Any]]:
    """What the compiler says of the kernels of some rows (see triton_cubins.py)."""
    run = subprocess.run(
        [sys.executable, HERE / "triton_cubins.py", str(arch), *rows],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def _check(built: list[dict[str, Any]]) -> None:
    """Nothing spilled in inner loops (ptxas may put a value for the end of a plane away), and no
    exchange among threads in correlate_planes."""
    assert built
    for kernel in built:
        assert kernel["shared"] <= 4096, kernel
        if kernel["kernel"].endswith("_planes"):
            assert kernel["stack"] <= 8, kernel
        if kernel["kernel"] == "correlate_planes":
            assert kernel["shared"] == kernel["shuffles"] == 0, kernel


@pytest.mark.parametrize(
    ("arch", "rows"),
    [
        (80, ["mednext_dw7_32@128:float32:ncdhw", "mednext_dw3_32@128:bfloat16:channels_last_3d"]),
        (90, ["mednext_dw7_32@128:bfloat16:channels_last_3d", "mednext_dw3_32@128:float32:ncdhw"]),
        (90, ["mednext_up5_64@64:float32:ncdhw", "bar_dw13_48@24:float32:ncdhw"]),
        (90, ["one_channel:float32:ncdhw", "dw13_circular:float16:ncdhw"]),
        (100, ["mednext_dw5_32@128:float32:ncdhw", "mednext_dw5_32@128:float64:channels_last_3d"]),
    ],
)  # fmt: skip
def test_compiles_for(arch: int, rows: list[str]) -> None:
    _check(_compiled(arch, rows))


@pytest.mark.sweep
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_for_all_models(layout: str) -> None:
    _check(_compiled(90, [f"{case}:float32:{layout}" for case in select("bar", "model")]))
