# SPDX-License-Identifier: Apache-2.0
"""Outputs of every row of the table, in every dtype and through every kernel, by the oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import voxconv
from cases import CHANNELS_LAST, Case, scaled_down, select
from testing import (
    DTYPES,
    PATHS,
    assert_accurate,
    by_torch,
    dtype_id,
    on,
    oracle_passes,
    ours,
    reference,
    summands,
    torch_passes,
)


def _check(case: Case, dtype: torch.dtype, layout: str = "ncdhw") -> None:
    x, weight, bias, _ = case.make(dtype, layout=layout)
    got = ours(case, x, weight, bias)
    assert got.dtype == dtype
    theirs = torch_passes(case, dtype)
    assert_accurate(
        f"{case} forward",
        got,
        oracle_passes(case, dtype)["forward"],
        theirs and theirs["forward"],
        taps=summands(case, "forward"),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", select("smoke", "odd", "edge"), ids=str)
def test_direct(case: Case, dtype: torch.dtype) -> None:
    with on("direct"):
        _check(case, dtype)


@pytest.mark.parametrize("case", select("smoke", "odd", "edge"), ids=str)
def test_direct_channels_last(case: Case) -> None:
    with on("direct"):
        _check(case, torch.float32, CHANNELS_LAST)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", select("smoke"), ids=str)
def test_as_dispatched(case: Case, dtype: torch.dtype) -> None:
    _check(case, dtype)


@pytest.mark.parametrize("case", select("smoke", "odd", "edge"), ids=str)
def test_through_torch(case: Case) -> None:
    """The fallback takes what torch alone refuses: pairs, "same" with a stride, modes."""
    with on("torch"):
        _check(case, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "case", [c for c in select("smoke", "fft") if c.mode == "zeros" and "edge" in c.tags], ids=str
)
def test_through_fft(case: Case, dtype: torch.dtype) -> None:
    with on("fft"):
        _check(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("case", scaled_down("model", "bar"), ids=str)
def test_layers_of_models_scaled_down(case: Case, dtype: torch.dtype) -> None:
    _check(case, dtype, case.layout)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", select("smoke"), ids=str)
def test_without_bias(case: Case, path: str) -> None:
    if path == "fft" and case.mode != "zeros":
        pytest.skip("the FFT pads with zeros")
    x, weight, _, _ = case.make()
    with on(path):
        got = ours(case, x, weight, None)
    oracle = reference(case, x.double(), weight.double(), None)
    assert_accurate(
        f"{case} without bias", got, oracle, by_torch(case, x, weight, None), taps=case.taps
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", [c for c in select("smoke") if not c.transposed], ids=str)
def test_raw_op_is_the_function(case: Case, dtype: torch.dtype) -> None:
    """The op takes canonical arguments; nothing is lost on the way down to it."""
    x, weight, bias, _ = case.make(dtype)
    pads = [side for pair in case.pads for side in pair]
    mode = ("zeros", "replicate", "reflect", "circular").index(case.mode)
    got = torch.ops.voxconv.depthwise_forward(
        x, weight, bias, case.stride, pads, case.dilation, mode
    )
    with on("direct"):
        assert torch.equal(got, ours(case, x, weight, bias))


@pytest.mark.parametrize("case", select("smoke"), ids=str)
def test_drop_ins_pick_depthwise(case: Case) -> None:
    """``conv3d`` with groups equal to the channels is the depthwise function."""
    x, weight, bias, _ = case.make()
    groups = {"groups": case.channels}
    op = voxconv.conv_transpose3d if case.transposed else voxconv.conv3d
    assert torch.equal(op(x, weight, bias, **case.kwargs() | groups), ours(case, x, weight, bias))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "geometry",
    [
        pytest.param({"padding": 1}, id="padding1"),
        pytest.param({"padding": ((0, 2), (1, 0), (2, 2)), "stride": 2}, id="pairs"),
        pytest.param({"padding": "same", "stride": (1, 2, 3)}, id="same_stride"),
        pytest.param({"padding": "valid", "dilation": 2}, id="valid_dilation"),
        pytest.param({"padding": 1, "padding_mode": "reflect"}, id="reflect"),
        pytest.param({"padding": "same", "padding_mode": "circular", "stride": 2}, id="circular"),
    ],
)
def test_dense_runs_too(groups: int, geometry: dict) -> None:
    """A dense or grouped ``conv3d`` runs too, with the paddings that torch itself refuses."""
    x, bias = torch.randn(2, 4, 7, 8, 9), torch.randn(6)
    weight = torch.randn(6, 4 // groups, 3, 3, 3) / 10
    got = voxconv.conv3d(x, weight, bias, groups=groups, **geometry)
    oracle = voxconv.reference.conv3d(
        x.double(), weight.double(), bias.double(), groups=groups, **geometry
    )
    assert_accurate("dense", got, oracle, taps=27 * 4)


def test_dense_transposed_runs_too() -> None:
    x, weight, bias = torch.randn(2, 4, 3, 4, 5), torch.randn(4, 3, 3, 3, 3), torch.randn(6)
    args = (2, 1, 1, 2)
    got = voxconv.conv_transpose3d(x, weight, bias, *args)
    oracle = F.conv_transpose3d(x.double(), weight.double(), bias.double(), *args)
    assert_accurate("transposed", got, oracle, taps=27 * 2)


def test_spellings_of_torch() -> None:
    """Keywords and one-element sequences that F.conv3d takes."""
    case = Case("spelling", channels=2, size=(5, 6, 7))
    x, weight, bias, _ = case.make(torch.float64)
    kwargs = {"stride": (2,), "padding": [1], "dilation": (1,), "groups": 2}
    got = voxconv.conv3d(input=x, weight=weight, bias=bias, **kwargs)
    torch.testing.assert_close(got, F.conv3d(input=x, weight=weight, bias=bias, **kwargs))
