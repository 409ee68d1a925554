# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels for channels_last_3d, run on the CPU, through the public functions."""

from __future__ import annotations

import ctypes

import pytest
import torch

from cases import CHANNELS_LAST, Case, Tensors
from cuda_kernels import cuda_kernels
from testing import all_passes, assert_case, bitwise_equal, dtype_id, ours, reference

FIVE, SEVEN = (5, 5, 5), (7, 7, 7)

ROWS = [
    Case("tiles", channels=20, size=(2, 10, 15), padding=1),  # along h, w and the channels
    Case("slabs", n=2, channels=3, size=(29, 3, 4), padding=((0, 3), (2, 0), (1, 4))),
    Case("two_channels", channels=2, size=(3, 2, 66), padding=1),
    Case("units_of_16_bytes", channels=8, size=(3, 4, 18), padding=1),
    Case("units_of_4_bytes", channels=18, size=(3, 4, 8), padding=1),
    Case("long_lines", channels=5, size=(1, 2, 26), kernel=SEVEN, padding=3),
    Case("dw5_even", n=2, channels=6, size=(7, 8, 12), kernel=FIVE, padding=2),
    Case("dw5_far_padding", channels=4, size=(3, 4, 5), kernel=FIVE, padding=(7, 5, 6)),
    Case("dw7_valid", channels=2, size=(8, 9, 11), kernel=SEVEN),
    Case("dw7_small", channels=9, size=(2, 3, 3), kernel=SEVEN, padding=3),
]

MANY_BLOCKS = [  # so many that slabs are longer than the kernel, and threads own 16 lines
    Case("dw3_many", n=133, channels=2, size=(3, 32, 1), padding=1),
    Case("dw5_many", n=133, channels=2, size=(5, 32, 1), kernel=FIVE, padding=2),
    Case("dw7_many", n=133, channels=2, size=(7, 16, 1), kernel=SEVEN, padding=3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_rows(case: Case, dtype: torch.dtype, kernels: ctypes.CDLL) -> None:
    with cuda_kernels(kernels, "channels"):
        assert_case(case, case.make(dtype, layout=CHANNELS_LAST), dtype, versus_torch=True)


@pytest.mark.parametrize("case", MANY_BLOCKS, ids=str)
def test_many_blocks(case: Case, kernels: ctypes.CDLL) -> None:
    tensors = case.make(layout=CHANNELS_LAST)
    with cuda_kernels(kernels, "channels"):
        assert_case(case, tensors, torch.float32, versus_torch=True)


@pytest.mark.parametrize("spot", [(0, 0, 0), (1, 8, 7), (3, 9, 13)])
def test_nan_reaches_its_field_only(spot: tuple[int, int, int], kernels: ctypes.CDLL) -> None:
    """A cell of x spoils what it meets; the lines, planes and lanes that do not exist meet none."""
    case = Case("nan", channels=20, size=(4, 10, 14), padding=((0, 0), (1, 1), (0, 1)))
    clean = case.make(layout=CHANNELS_LAST)
    at = (0, 1, *spot)
    x = clean.x.clone()
    x[at] = torch.nan
    one = torch.zeros_like(clean.x, dtype=torch.float64)
    one[at] = 1
    ones = (torch.ones_like(t, dtype=torch.float64) for t in (clean.weight, clean.grad))
    weight, grad = ones
    met = all_passes(reference, case, Tensors(one, weight, torch.zeros(20).double(), grad))
    with cuda_kernels(kernels, "channels"):
        expected = all_passes(ours, case, clean)
        got = all_passes(ours, case, clean._replace(x=x))
    for which in ("forward", "grad_weight"):
        spoilt = met[which] != 0
        assert torch.equal(got[which].isnan(), spoilt), which
        kept = torch.where(spoilt, expected[which], got[which])
        assert bitwise_equal(kept, expected[which]), which
