# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, run on the CPU, through the public functions."""

from __future__ import annotations

import ctypes

import pytest
import torch

from cases import CHANNELS_LAST, NCDHW, Case, select
from cuda_kernels import cuda_kernels
from testing import DTYPES, assert_case, dtype_id

MOST_PRODUCTS = 150_000  # of a row: more of them take seconds

ROWS = [
    case
    for case in select("smoke", "odd", "edge")
    if case.live_flops <= 2 * MOST_PRODUCTS and case.out_channels * case.taps <= 1000
]


@pytest.mark.parametrize("layout", [NCDHW, CHANNELS_LAST])
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_rows(case: Case, layout: str, kernels: ctypes.CDLL) -> None:
    with cuda_kernels(kernels):
        assert_case(case, case.make(layout=layout), torch.float32, versus_torch=True)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32], ids=dtype_id)
@pytest.mark.parametrize("case", [c for c in select("smoke") if c in ROWS], ids=str)
def test_other_dtypes(case: Case, dtype: torch.dtype, kernels: ctypes.CDLL) -> None:
    with cuda_kernels(kernels):
        assert_case(case, case.make(dtype), dtype, versus_torch=True)


FAULTS = {  # in the order of faults.cpp, with what is said of them; None: the result shows them
    "read_behind": "access outside",
    "write_before": "access outside",
    "read_behind_shared": "access outside",
    "no_barrier": None,
    "barrier_of_some": "a barrier that not all threads reach",
    "unwritten": None,
    "not_waited_for": "copies that nobody waits for",
    "sum_of_warp": None,
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_seen(name: str, kernels: ctypes.CDLL) -> None:
    def run(right: bool, falling: bool) -> tuple[str, list[float]]:
        x, y = torch.arange(64.0), torch.zeros(64)
        number = list(FAULTS).index(name)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (x, y))
        return kernels.run_fault(number, *pointers, right, falling).decode(), y.tolist()

    right, reverse = run(True, False), run(True, True)
    assert right == reverse
    assert right[0] == ""
    wrong = [run(False, falling) for falling in (False, True)]
    if (message := FAULTS[name]) is not None:
        assert all(message in error for error, _ in wrong)
    else:
        assert all(error == "" and y != right[1] for error, y in wrong)
