# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels that use tensor cores, run on the CPU, through the public functions."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from cases import Case, Tensors
from cuda_kernels import cuda_kernels, plan
from testing import HALVES, all_passes, assert_case, bitwise_equal, dtype_id, ours, reference

TOEPLITZ = [
    # Walks along D with 2, 3 and 4 tiles of 8 columns of a warp.
    Case("dw5", n=2, channels=2, size=(5, 8, 16), kernel=(5, 5, 5), padding=2),
    Case("dw7_three_tiles", channels=1, size=(7, 9, 24), kernel=(7, 7, 7), padding=3),
    Case("dw5_four_tiles", channels=1, size=(2, 17, 61), kernel=(5, 5, 5), padding=2),
    Case("dw3_multiplier2", n=2, channels=2, multiplier=2, size=(4, 9, 15), kernel=(3, 3, 5)),
    Case("dw3_wide", channels=2, size=(4, 9, 33), padding=1),
    Case("dw3_long_walk", n=88, size=(7, 8, 9), kernel=(3, 1, 5), padding=(1, 0, 2)),
    Case("dw7_small", channels=3, size=(6, 6, 6), kernel=(7, 7, 7), padding=3),
    # Groups of planes: fewer than kd, and more; several blocks along each axis.
    Case("dw9_groups", n=22, size=(10, 8, 32), kernel=(9, 1, 9), padding=(4, 0, 4)),
    Case("dw13_late", n=8, size=(6, 16, 32), kernel=(13, 1, 9), padding=(6, 0, 4)),
    Case("dw2_groups", n=22, size=(21, 8, 8), kernel=(2, 1, 9), padding=(0, 0, 4)),
    Case("dw1_wide", channels=1, size=(1, 3, 200), kernel=(1, 3, 5), padding=(0, 1, 2)),
    Case("dw1_high", channels=1, size=(1, 133, 9), kernel=(1, 2, 6), padding=(0, 1, 3)),
    # Two and three steps of taps; padding of all kinds.
    Case("dw11", size=(3, 8, 12), kernel=(2, 3, 11), padding=((4, 0), (0, 3), (2, 9))),
    Case("dw13_even", channels=2, size=(3, 10, 16), kernel=(5, 5, 13), padding=(2, 2, 6)),
    Case("dw21_over_volume", size=(2, 8, 8), kernel=(3, 21, 21), padding=(1, 10, 10)),
    Case("dw31", size=(2, 4, 40), kernel=(1, 3, 31), padding=(0, 1, 15)),
    Case("dw41_valid", size=(1, 2, 64), kernel=(1, 2, 41)),
    Case("dw5_far_padding", size=(3, 8, 8), kernel=(3, 3, 5), padding=(9, 4, 12)),
]
HANKEL = [
    # 1 to 4 times 8 taps of a line; groups of kh, parts of 8 kd.
    Case("dw5", n=2, channels=2, size=(5, 8, 16), kernel=(5, 5, 5), padding=2),
    Case("dw9", size=(9, 4, 30), kernel=(9, 9, 9), padding=4),
    Case("dw21", channels=2, size=(3, 4, 16), kernel=(3, 21, 21), padding=(1, 10, 10)),
    Case("dw31", size=(2, 4, 16), kernel=(4, 7, 31), padding=((2, 1), (3, 3), (15, 15))),
    # Long slabs, and tiles along each axis.
    Case("dw3_slab", n=3, size=(13, 4, 16), kernel=(3, 5, 5), padding=(1, 2, 2)),
    Case("dw3_wide", size=(3, 6, 100), kernel=(3, 5, 5), padding=(1, 2, 2)),
    Case("dw7_high", size=(2, 70, 16), kernel=(2, 7, 7), padding=(0, 3, 3)),
    Case("dw3_blocks_high", size=(2, 150, 60), kernel=(3, 5, 5), padding=(1, 2, 2)),
    Case("dw3_multiplier2", n=2, channels=2, multiplier=2, size=(4, 9, 15), kernel=(3, 3, 5)),
    Case("dw5_pairs", size=(4, 7, 16), kernel=(5, 5, 5), padding=((6, 0), (0, 3), (7, 1))),
]


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
@pytest.mark.parametrize("case", TOEPLITZ, ids=str)
def test_toeplitz(case: Case, dtype: torch.dtype, kernels: ctypes.CDLL) -> None:
    with cuda_kernels(kernels, "toeplitz"):
        assert_case(case, case.make(dtype), dtype, versus_torch=True)


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
@pytest.mark.parametrize("case", HANKEL, ids=str)
def test_hankel(case: Case, dtype: torch.dtype, kernels: ctypes.CDLL) -> None:
    with cuda_kernels(kernels, "hankel"):
        assert_case(case, case.make(dtype), dtype, versus_torch=True)


@pytest.mark.parametrize(
    ("kernel", "width", "takes"), [(5, 16, True), (3, 32, True), (3, 31, False), (2, 64, False)]
)
def test_short_lines_of_taps(kernel: int, width: int, takes: bool, kernels: ctypes.CDLL) -> None:
    case = Case("dw", size=(3, 8, width), kernel=(3, 3, kernel), padding=1)
    (launched,) = plan(kernels, case, "forward", torch.bfloat16)
    assert launched.kernel.startswith("depthwise_toeplitz") == takes


@pytest.mark.parametrize("spot", [(0, 0, 0), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_non_finite_cells_reach_their_field_only(
    value: float, spot: tuple[int, ...], kernels: ctypes.CDLL
) -> None:
    """Zeros between the taps of a tile, and in the padding of a gradient, are no taps."""
    case = replace(TOEPLITZ[0], channels=1)
    clean = case.make(torch.bfloat16)
    bad = clean._replace(x=clean.x.clone())
    marks = Tensors(*(torch.ones_like(t, dtype=torch.float64) for t in clean))
    marks = marks._replace(x=torch.zeros_like(marks.x), bias=torch.zeros_like(marks.bias))
    at = (0, 0, *spot)
    bad.x[at], marks.x[at] = value, 1
    touched = all_passes(reference, case, marks)
    with cuda_kernels(kernels):
        got, expected = (all_passes(ours, case, tensors) for tensors in (bad, clean))
    for which in ("forward", "grad_weight"):
        fine = touched[which] == 0
        assert torch.equal(got[which].isfinite(), fine), which
        assert torch.allclose(got[which][fine], expected[which][fine], rtol=2**-6), which


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
