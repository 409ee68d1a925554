# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels for any geometry, run on the CPU; and what NaN and infinity reach."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from cases import Case, Triple, select
from cuda_kernels import cuda_kernels
from testing import HALVES, assert_case, dtype_id, ours, reference

MOST_PRODUCTS = 50_000  # of a row: more of them take seconds

ROWS = [
    case
    for case in select("smoke", "odd", "edge")
    if case.live_flops <= 2 * MOST_PRODUCTS and case.out_channels * case.taps <= 600
]

LINES = [
    Case("tiles", size=(5, 36, 70), kernel=(2, 1, 3), padding=(0, 1, 1)),
    Case("planes_as_lines", channels=2, size=(9, 1, 13), kernel=(3, 1, 5), padding=(1, 0, 2)),
    Case("phases_apart", channels=2, size=(4, 5, 24), dilation=(1, 2, 5), padding=(1, 2, 5)),
    Case("stride_apart", channels=2, size=(5, 6, 22), kernel=(2, 3, 9), stride=(1, 2, 4)),
    Case("stride3_dilation2", size=(5, 9, 22), stride=(1, 3, 3), dilation=(1, 2, 2), padding=1),
    Case("runs_of_4_and_7", size=(2, 3, 19), kernel=(1, 2, 11), padding=(0, 1, 5)),
    Case("circular_tiles", size=(3, 4, 67), kernel=(1, 2, 5), padding=(0, 1, 2), mode="circular"),
    Case("reflect_strides", size=(5, 7, 9), stride=(1, 2, 3), padding=2, mode="reflect"),
    Case("many_channels", n=2, channels=33, size=(2, 2, 3), kernel=(1, 2, 2), multiplier=2),
    Case("too_many_phases", size=(2, 3, 40), kernel=(1, 1, 3), dilation=(1, 1, 17), padding=17),
    Case("too_many_runs", size=(1, 2, 4), kernel=(1, 1, 132), padding=(0, 0, 66)),
]


@pytest.mark.parametrize("case", [*ROWS, *LINES], ids=str)
def test_lines(case: Case, kernels: ctypes.CDLL) -> None:
    with cuda_kernels(kernels, "lines"):
        assert_case(case, case.make(), torch.float32, versus_torch=True)


@pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=dtype_id)
@pytest.mark.parametrize("case", LINES[1:6], ids=str)
def test_lines_in_other_dtypes(case: Case, dtype: torch.dtype, kernels: ctypes.CDLL) -> None:
    with cuda_kernels(kernels, "lines"):
        assert_case(case, case.make(dtype), dtype, versus_torch=True)


@pytest.mark.parametrize("case", [c for c in select("smoke") if c in ROWS], ids=str)
def test_any(case: Case, kernels: ctypes.CDLL) -> None:
    with cuda_kernels(kernels, "any"):
        assert_case(case, case.make(), torch.float32, versus_torch=True)


@pytest.mark.parametrize("taps", [40, 80])  # a line each, in 26 and 102 KB of shared memory
def test_many_taps(taps: int, kernels: ctypes.CDLL) -> None:
    half = taps // 2
    case = Case("many_taps", size=(3, 2, 5), kernel=(taps, taps, 1), padding=(half, half, 0))
    x, weight, bias, _ = case.make()
    with cuda_kernels(kernels, "lines"):
        y = ours(case, x, weight, bias)
    torch.testing.assert_close(y, reference(case, x, weight, bias))


WAY_AND_STRIDE = [
    ("lines", (1, 2, 3)),
    *(("planes", (d, hw, hw)) for d, hw in [(1, 1), (1, 2), (2, 2)]),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("way", "stride"), WAY_AND_STRIDE)
def test_reach_of_one_cell(
    way: str, stride: Triple, value: float, transposed: bool, kernels: ctypes.CDLL
) -> None:
    """NaN and infinity come to those outputs alone whose taps meet them, through zeros too."""
    case = Case("one_cell", size=(5, 6, 9), kernel=(3, 3, 3), stride=stride, padding=1)
    if transposed:
        case = replace(case, op="transposed")
    x = torch.zeros(case.make().x.shape)
    x[0, 0, 2, 3, 4] = 1
    weight = torch.ones_like(case.make().weight)
    met = reference(case, x, weight, None) > 0
    weight[:, :, 1, 1, 1] = 0
    x[0, 0, 2, 3, 4] = value
    with cuda_kernels(kernels, way):
        y = ours(case, x, weight, None)
    assert torch.equal(~y.isfinite(), met)
