# SPDX-License-Identifier: Apache-2.0
"""The weight and bias gradients of the CUDA kernels, run on the CPU."""

from __future__ import annotations

import ctypes

import pytest
import torch

from cases import Case
from cuda_kernels import cuda_kernels
from testing import assert_case

SLABS = [  # of depthwise_weight_slabs: tiles, slabs, filters of a block; patches moved back
    Case("dw3_tiles", channels=1, size=(2, 70, 67), padding=1),
    Case("dw3_slabs", channels=2, size=(37, 5, 6), padding=((0, 3), (2, 0), (1, 4))),
    Case("dw3_filters", n=2, channels=20, multiplier=2, size=(3, 4, 4), padding=1),
    Case("dw3_even", channels=3, size=(5, 9, 12), padding=1),
    Case("dw5_even", n=2, channels=3, size=(7, 8, 12), kernel=(5, 5, 5), padding=2),
    Case("dw5_far_padding", channels=1, size=(3, 4, 5), kernel=(5, 5, 5), padding=(7, 5, 6)),
    Case("dw5_tiles", channels=1, size=(3, 21, 70), kernel=(5, 5, 5), padding=2),
    Case("dw7_valid", channels=2, size=(8, 11, 12), kernel=(7, 7, 7)),
    Case("dw7_small", channels=9, size=(3, 4, 5), kernel=(7, 7, 7), padding=3),
]


@pytest.mark.parametrize("case", SLABS, ids=str)
def test_slabs(case: Case, kernels: ctypes.CDLL) -> None:
    with cuda_kernels(kernels, "slabs"):
        assert_case(case, case.make(), torch.float32, versus_torch=True)
        assert_case(case, case.make(torch.bfloat16), torch.bfloat16, versus_torch=True)
