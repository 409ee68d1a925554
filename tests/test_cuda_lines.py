# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel depthwise_lines, run on the CPU, through the public functions."""

from __future__ import annotations

import ctypes

import pytest
import torch

from cases import Case, select
from cuda_kernels import cuda_kernels
from testing import assert_case

MOST_PRODUCTS = 80_000  # of a row: more of them take seconds

ROWS = [
    case
    for case in select("smoke", "odd", "edge")
    if case.live_flops <= 2 * MOST_PRODUCTS and case.out_channels * case.taps <= 1000
]


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_rows(case: Case, kernels: ctypes.CDLL) -> None:
    with cuda_kernels(kernels, "lines"):
        assert_case(case, case.make(), torch.float32, versus_torch=True)
