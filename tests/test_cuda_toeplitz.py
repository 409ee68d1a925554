# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels that use tensor cores, run on the CPU, through the public functions."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from cases import Case
from cuda_kernels import cuda_kernels
from testing import HALVES, assert_case, bitwise_equal, dtype_id, ours, reference

ROWS = [  # tiles of a warp, warps and blocks along every axis, groups of planes, taps of 1-3 steps
    Case("dw5", n=2, channels=2, size=(5, 8, 16), kernel=(5, 5, 5), padding=2),
    Case("dw7_three_tiles", channels=1, size=(7, 9, 24), kernel=(7, 7, 7), padding=3),
    Case("dw7_small", channels=3, size=(6, 6, 6), kernel=(7, 7, 7), padding=3),
    Case("dw5_four_tiles", channels=1, size=(2, 17, 61), kernel=(5, 5, 5), padding=2),
    Case("dw9_deep", channels=1, size=(21, 8, 8), kernel=(9, 1, 9), padding=(4, 0, 4)),
    Case("dw5_wide", channels=1, size=(1, 3, 80), kernel=(1, 3, 5), padding=(0, 1, 2)),
    Case("dw6_high", channels=1, size=(1, 133, 9), kernel=(1, 2, 6), padding=(0, 1, 3)),
    Case("dw335_multiplier2", n=2, channels=2, multiplier=2, size=(4, 9, 15), kernel=(3, 3, 5)),
    Case(
        "dw11_pairs",
        channels=1,
        size=(3, 8, 12),
        kernel=(2, 3, 11),
        padding=((4, 0), (0, 3), (2, 9)),
    ),
    Case("dw13_even", channels=2, size=(3, 10, 16), kernel=(5, 5, 13), padding=(2, 2, 6)),
    Case("dw21_over_volume", channels=1, size=(4, 6, 8), kernel=(9, 21, 21), padding=(4, 10, 10)),
    Case("dw31_three_tiles", channels=1, size=(2, 4, 40), kernel=(1, 3, 31), padding=(0, 1, 15)),
    Case("dw33_long_line", channels=1, size=(1, 2, 64), kernel=(1, 2, 41)),
    Case("dw5_far_padding", channels=1, size=(3, 8, 8), kernel=(3, 3, 5), padding=(9, 4, 12)),
]


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_toeplitz(case: Case, dtype: torch.dtype, kernels: ctypes.CDLL) -> None:
    with cuda_kernels(kernels, "toeplitz"):
        assert_case(case, case.make(dtype), dtype, versus_torch=True)


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_hankel(case: Case, dtype: torch.dtype, kernels: ctypes.CDLL) -> None:
    with cuda_kernels(kernels, "hankel"):
        assert_case(case, case.make(dtype), dtype, versus_torch=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_non_finite_cells_reach_their_field_only(value: float, kernels: ctypes.CDLL) -> None:
    """The zeros between the taps of a tile are no taps."""
    case = replace(ROWS[0], channels=1)
    x, weight, *_ = case.make(torch.bfloat16)
    spoilt = x.clone()
    spoilt[0, 0, 2, 3, 4] = value
    expected = reference(case, spoilt.double(), weight.double(), None)
    with cuda_kernels(kernels, "toeplitz"):
        got, clean = (ours(case, t, weight, None) for t in (spoilt, x))
    touched = ~expected.isfinite()
    assert touched.any()
    assert torch.equal(~got.isfinite(), touched)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.allclose(got[~touched], clean[~touched], rtol=2**-7)


def _lanes(rows: int, columns: int, place) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """For each lane, the cells of a matrix [rows, columns] that ``place(group, thread)`` names."""
    cells = [place(lane // 4, lane % 4) for lane in range(32)]
    return torch.tensor([[row * columns + column for row, column in own] for own in cells])


# The fragments of mma.m16n8k16 as the PTX manual gives them, element by element.
A = _lanes(16, 16, lambda g, t: [
    (g + 8 * (2 <= i < 4 or i >= 6), 2 * t + i % 2 + 8 * (i >= 4)) for i in range(8)
])  # fmt: skip
B = _lanes(16, 8, lambda g, t: [(2 * t + i % 2 + 8 * (i >= 2), g) for i in range(4)])
SUMS = _lanes(16, 8, lambda g, t: [(g + 8 * (i >= 2), 2 * t + i % 2) for i in range(4)])


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
def test_product_is_that_of_matrices(dtype: torch.dtype, kernels: ctypes.CDLL) -> None:
    a, b, start = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8)
    own_a, own_b, own = (t.flatten()[at].contiguous() for t, at in ((a, A), (b, B), (start, SUMS)))
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (own_a, own_b, own))
    error = kernels.run_product(dtype == torch.bfloat16, *pointers)
    assert error == b""
    expected = start + a.double() @ b.double()
    assert torch.allclose(own.double(), expected.flatten()[SUMS], atol=1e-5)


def test_pieces_are_fragments(kernels: ctypes.CDLL) -> None:
    """Two pieces of 8 lines are the left half of A."""
    rows, got = torch.randn(16, 8).half(), torch.zeros(32, 4).half()
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (rows, got))
    assert kernels.run_pieces(*pointers) == b""
    left = torch.cat([rows, torch.zeros_like(rows)], dim=1).flatten()
    assert bitwise_equal(got, left[A[:, :4]])
