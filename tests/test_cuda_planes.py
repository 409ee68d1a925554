# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels that walk through planes (planes, planes_up), run on the CPU."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from cases import Case
from cuda_kernels import cuda_kernels, plan
from testing import assert_case

FIVE, SEVEN = (5, 5, 5), (7, 7, 7)
TWO, FLAT_TWO = (2, 2, 2), (1, 2, 2)

PLANES = [  # several tiles, slabs, channels of a block; all kinds of padding
    Case("dw3_tiles", channels=1, size=(2, 70, 67), padding=1),
    Case("dw3_slabs", channels=3, size=(29, 5, 6), padding=((0, 3), (2, 0), (1, 4))),
    Case("dw3_channels", n=2, channels=20, multiplier=2, size=(3, 3, 4), padding=1),
    Case("dw5_even", n=2, channels=3, size=(7, 8, 12), kernel=FIVE, padding=2),
    Case("dw5_far_padding", channels=1, size=(3, 4, 5), kernel=FIVE, padding=(7, 5, 6)),
    Case("dw5_slabs", size=(23, 4, 5), kernel=FIVE, padding=2),
    Case("dw7_valid", channels=2, size=(8, 9, 11), kernel=SEVEN),
    Case("dw7_small", channels=9, size=(3, 3, 3), kernel=SEVEN, padding=3),
    Case("dw9", channels=3, size=(4, 5, 6), kernel=(9, 9, 9), padding=(4, 4, 5)),
    Case("dw355", n=2, channels=2, size=(6, 7, 10), kernel=(3, 5, 5), padding=(0, 2, 2)),
    Case("dilation123", size=(8, 9, 12), kernel=FIVE, dilation=(1, 2, 3), padding=(2, 3, 6)),
    Case("dilation4", channels=2, size=(9, 10, 11), dilation=(4, 4, 4), padding=4),
]
# Of these, forward is by planes, and grad_input by planes_up where padding along W is odd or even
# as half of the kernel is. The transposed convolution has them the other way round.
STRIDED = [
    Case("s2_dw3", channels=2, size=(6, 8, 16), stride=TWO, padding=1),
    Case("s2_dw3_tiles", size=(3, 75, 141), stride=TWO, padding=(1, 0, 1)),
    Case("s2_dw3_slabs", n=2, channels=5, size=(41, 5, 7), stride=TWO,
         padding=((0, 3), (2, 0), (3, 1))),
    Case("s2_dw3_multiplier", channels=4, multiplier=3, size=(5, 6, 8), stride=TWO, padding=1),
    Case("s2_dw3_valid", channels=3, size=(7, 8, 9), stride=TWO),
    Case("s2_dw5", channels=3, size=(8, 8, 24), kernel=FIVE, stride=TWO, padding=2),
    Case("s2_dw5_pairs", n=2, channels=2, size=(9, 7, 13), kernel=FIVE, stride=TWO,
         padding=((1, 4), (3, 0), (4, 2))),
    Case("s2_dw5_wide", size=(2, 3, 141), kernel=FIVE, stride=TWO, padding=2),
    Case("s2_dw7", channels=2, size=(8, 9, 16), kernel=SEVEN, stride=TWO, padding=3),
    Case("s2_dw7_far", size=(4, 5, 7), kernel=SEVEN, stride=TWO, padding=(6, 7, 5)),
    Case("s122_dw3", channels=2, size=(11, 6, 14), stride=FLAT_TWO, padding=1),
    Case("s122_dw5", channels=2, size=(7, 8, 9), kernel=FIVE, stride=FLAT_TWO, padding=(0, 2, 2)),
]  # fmt: skip


@pytest.mark.parametrize("case", PLANES, ids=str)
def test_planes(case: Case, kernels: ctypes.CDLL) -> None:
    with cuda_kernels(kernels, "planes"):
        assert_case(case, case.make(), torch.float32, versus_torch=True)
        assert_case(case, case.make(torch.bfloat16), torch.bfloat16, versus_torch=True)


@pytest.mark.parametrize("transposed", [False, True], ids=["down", "up"])
@pytest.mark.parametrize("case", STRIDED, ids=str)
def test_strided(case: Case, transposed: bool, kernels: ctypes.CDLL) -> None:
    if transposed:
        case = replace(case, op="transposed", size=tuple(n // 2 + 3 for n in case.size))
        case = replace(case, padding=tuple(min(a, b) for a, b in case.pads), multiplier=1)
    with cuda_kernels(kernels, "planes"):
        assert_case(case, case.make(), torch.float32, versus_torch=True)
        assert_case(case, case.make(torch.float16), torch.float16, versus_torch=True)


def test_which_kernel(kernels: ctypes.CDLL) -> None:
    """The rows above are run by what they are for, not by what takes over from it."""

    def first(case: Case, which: str) -> str:
        return plan(kernels, case, which, torch.float32)[0].kernel.partition("<")[0]

    for case in STRIDED:
        assert first(case, "forward") == "depthwise_planes", case
        near = (case.pads[2][0] - case.kernel[2] // 2) % 2 == 0 and case.multiplier == 1
        expected = "depthwise_planes_up" if near else "depthwise_lines"
        assert first(case, "grad_input") == expected, case
