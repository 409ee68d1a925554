# SPDX-License-Identifier: Apache-2.0
"""The weight and bias gradients of the CUDA kernels, run on the CPU."""

from __future__ import annotations

import ctypes

import pytest
import torch

from cases import CHANNELS_LAST, NCDHW, Case
from cuda_kernels import Passes, cuda_kernels
from testing import DTYPES, assert_accurate, assert_case, dtype_id

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


SUMS = [  # n, channels, size: several pieces; no vectors; many channels; a piece for each result
    (2, 3, (17, 18, 55)),
    (1, 2, (5, 64, 64)),
    (2, 5, (7, 9, 11)),
    (1, 300, (2, 3, 3)),
    (3, 16, (4, 4, 4)),
    (1, 520, (1, 2, 2)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", [NCDHW, CHANNELS_LAST])
def test_channel_sum(layout: str, dtype: torch.dtype, kernels: ctypes.CDLL) -> None:
    last = layout == CHANNELS_LAST
    passes = Passes(kernels, "choose")
    for n, channels, size in SUMS:
        x = torch.rand((n, channels, *size), dtype=torch.float64).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last_3d) if last else x
        got, expected = passes.channel_sum(x), x.double().sum((0, 2, 3, 4))
        summed = n * size[0] * size[1] * size[2]
        assert_accurate(str(x.shape), got, expected, expected.to(dtype), taps=summed, chain=64)
