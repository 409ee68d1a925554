# SPDX-License-Identifier: Apache-2.0
"""The weight and bias gradients of the CUDA kernels, run on the CPU."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch

from cases import CHANNELS_LAST, NCDHW, Case
from cuda_kernels import Passes, cuda_kernels
from testing import DTYPES, all_passes, assert_accurate, assert_case, dtype_id, reference

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


LINES = [  # of depthwise_weight_lines: chunks of taps, classes and tiles of rows, tiles of columns
    Case("dw511", channels=2, size=(9, 4, 13), kernel=(5, 1, 1), padding=(2, 0, 0)),
    Case("dw133", n=2, channels=3, size=(3, 19, 37), kernel=(1, 3, 3), padding=(0, 1, 1)),
    Case("dw355", channels=2, multiplier=2, size=(4, 7, 9), kernel=(3, 5, 5), padding=(0, 2, 2)),
    Case("dw9", channels=1, size=(7, 11, 9), kernel=(9, 9, 9), padding=4),
    Case("dw8_far", channels=1, size=(3, 4, 5), kernel=(2, 8, 4), padding=((3, 0), (9, 8), (6, 5))),
    Case("dw3_stride122", channels=2, size=(5, 20, 11), stride=(1, 2, 2), padding=1),
    Case(
        "dw7_stride2", channels=1, size=(9, 12, 13), kernel=(7, 7, 7), stride=(2, 2, 2), padding=3
    ),
    Case(
        "dw5_dilation3", channels=1, size=(8, 9, 10), kernel=(5, 5, 5), dilation=(3,) * 3, padding=6
    ),
    Case(
        "dw4_stride3_dilation2",
        channels=1,
        size=(11, 40, 13),
        kernel=(4, 4, 4),
        stride=(3, 3, 3),
        dilation=(2, 2, 2),
        padding=(2, 3, 4),
    ),
    Case(
        "dw3_stride2_dilation4",
        channels=1,
        size=(9, 37, 9),
        stride=(2, 2, 2),
        dilation=(4,) * 3,
        padding=4,
    ),
    Case("dw2_stride4", channels=2, size=(9, 11, 14), kernel=(2, 2, 2), stride=(4, 3, 5)),
    Case("dw1_stride2", channels=2, size=(4, 5, 9), kernel=(1, 1, 1), stride=(2, 2, 2)),
    Case("dw3_deep", channels=1, size=(40, 3, 3), kernel=(3, 3, 1), padding=(1, 1, 0)),
    Case("dw3_tall", channels=1, size=(2, 70, 33), kernel=(1, 3, 1), padding=(0, 1, 0)),
]


@pytest.mark.parametrize("case", LINES, ids=str)
def test_lines(case: Case, kernels: ctypes.CDLL) -> None:
    with cuda_kernels(kernels, "weight_lines"):
        assert_case(case, case.make(), torch.float32, versus_torch=True)
        assert_case(case, case.make(torch.bfloat16), torch.bfloat16, versus_torch=True)


REACH = [  # patches that are moved back, threads behind the last column, rows of a class that end
    Case("slabs", channels=2, size=(5, 6, 7), padding=1),
    Case("slabs_tiles", channels=2, size=(3, 37, 9), padding=1),
    Case("lines", channels=2, size=(5, 6, 35), kernel=(3, 3, 5), padding=(1, 1, 2)),
    Case("lines_classes", channels=2, size=(7, 19, 9), dilation=(2, 3, 2), padding=(2, 3, 2)),
    Case("lines_stride", channels=2, size=(7, 18, 9), stride=(2, 2, 2), padding=1),
]


@pytest.mark.parametrize("case", REACH, ids=str)
def test_infinite_input_reaches_its_taps_only(case: Case, kernels: ctypes.CDLL) -> None:
    """Weight gradients that meet no bad cell keep every bit; those that do are not finite."""
    clean = case.make()
    passes = Passes(kernels, "choose")

    def run(x: torch.Tensor) -> torch.Tensor:
        pads = [side for pair in case.pads for side in pair]
        return passes.grad_weight(clean.grad, x, case.kernel, case.stride, pads, case.dilation, 0)

    expected = run(clean.x)
    for spot in [(0, 0, 0), (1, 2, 3), (-1, -1, -1), (2, 0, -2)]:
        bad, mark, cell = clean.x.clone(), torch.zeros_like(clean.x), (0, 1, *spot)
        bad[cell], mark[cell] = float("inf"), 1.0
        touched = (
            all_passes(
                reference,
                case,
                clean._replace(
                    x=mark.double(),
                    grad=torch.ones_like(clean.grad).double(),
                    weight=clean.weight.double(),
                    bias=clean.bias.double(),
                ),
            )["grad_weight"]
            != 0
        )
        got = run(bad)
        assert torch.equal(~got.isfinite(), touched)
        assert torch.equal(got[~touched], expected[~touched])


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


@pytest.mark.parametrize("step", ["dilation", "stride"])
def test_steps_whose_products_leave_32_bits(step: str, kernels: ctypes.CDLL) -> None:
    """A line of x that is read has more cells than shared memory, and than an int counts bytes."""
    far = 60_000_000
    case = Case(
        "far", channels=2, size=(1, 32, 1), kernel=(3, 3, 3), padding=((1, 1), (1, 1), (far, far))
    )
    case = replace(case, **{step: (1, 1, far)})
    with cuda_kernels(kernels):
        assert_case(case, case.make(), torch.float32, versus_torch=False)


def test_a_voxel_whose_layout_is_either(kernels: ctypes.CDLL) -> None:
    case = Case(
        "voxel", channels=17, size=(1, 1, 1), kernel=(3, 2, 1), padding=((4, 4), (2, 2), (0, 0))
    )
    with cuda_kernels(kernels):
        assert_case(case, case.make(layout=CHANNELS_LAST), torch.float32, versus_torch=False)
