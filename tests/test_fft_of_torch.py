# SPDX-License-Identifier: Apache-2.0
"""The passes by torch.fft, which GPUs take for kernels of many taps; on the CPU here."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from cases import LAYOUTS, Case, select
from testing import assert_case, on
from voxconv import _fft, autograd

MODELS = ("model", "bar")  # too large for tests
ROWS = [
    case
    for case in select("smoke", "odd", "edge", "fft")
    if case.mode == "zeros" and not set(MODELS) & set(case.tags)
]


@pytest.fixture(autouse=True)
def _by_torch() -> Iterator[None]:
    with (
        on("fft"),
        mock.patch.dict(autograd._FORWARD, fft=_fft.depthwise_forward),
        mock.patch.dict(autograd._GRAD_INPUT, fft=_fft.depthwise_grad_input),
        mock.patch.dict(autograd._GRAD_WEIGHT, fft=_fft.depthwise_grad_weight),
    ):
        yield


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_rows(case: Case, layout: str) -> None:
    assert_case(case, case.make(layout=layout), torch.float32, versus_torch=False)


@pytest.mark.parametrize("case", [c for c in ROWS if "fft" in c.tags], ids=str)
def test_float64(case: Case) -> None:
    assert_case(case, case.make(torch.float64), torch.float64, versus_torch=False)


@pytest.mark.parametrize("case", [c for c in ROWS if "smoke" in c.tags], ids=str)
def test_a_channel_at_a_time(case: Case) -> None:
    with mock.patch.object(_fft, "_CHUNK_BYTES", 1):
        assert_case(case, case.make(), torch.float32, versus_torch=False)


def test_lengths_have_small_factors_and_are_even() -> None:
    lengths = [_fft.fast_length(n) for n in range(1, 300)]
    assert all(length >= n and length % 2 == 0 for n, length in enumerate(lengths, 1))
    assert lengths == sorted(lengths)
    assert {_fft.fast_length(n) for n in (11, 13, 65, 121)} == {12, 14, 70, 126}


def test_other_padding_is_refused() -> None:
    x, weight = torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 1, 3, 3, 3)
    with pytest.raises(NotImplementedError, match="zeros only"):
        _fft.depthwise_forward(x, weight, None, (1,) * 3, (1,) * 6, (1,) * 3, 3)
