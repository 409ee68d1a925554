# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels for channels_last_3d, run on the CPU, through the public functions."""

from __future__ import annotations

import ctypes

import pytest
import torch

from cases import CHANNELS_LAST, Case
from cuda_kernels import cuda_kernels
from testing import assert_case, dtype_id

FIVE, SEVEN = (5, 5, 5), (7, 7, 7)

ROWS = [
    Case("tiles", channels=20, size=(2, 18, 15), padding=1),  # along h, w and the channels
    Case("slabs", n=2, channels=3, size=(29, 3, 4), padding=((0, 3), (2, 0), (1, 4))),
    Case("one_channel", channels=1, size=(3, 2, 130), padding=1),
    Case("units_of_16_bytes", channels=8, size=(3, 4, 18), padding=1),
    Case("units_of_4_bytes", channels=18, size=(3, 4, 8), padding=1),
    Case("long_lines", channels=5, size=(1, 2, 26), kernel=SEVEN, padding=3),
    Case("dw5_even", n=2, channels=6, size=(7, 8, 12), kernel=FIVE, padding=2),
    Case("dw5_far_padding", channels=4, size=(3, 4, 5), kernel=FIVE, padding=(7, 5, 6)),
    Case("dw7_valid", channels=2, size=(8, 9, 11), kernel=SEVEN),
    Case("dw7_small", channels=9, size=(2, 3, 3), kernel=SEVEN, padding=3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_rows(case: Case, dtype: torch.dtype, kernels: ctypes.CDLL) -> None:
    with cuda_kernels(kernels, "channels"):
        assert_case(case, case.make(dtype, layout=CHANNELS_LAST), dtype, versus_torch=True)
