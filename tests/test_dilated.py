# SPDX-License-Identifier: Apache-2.0
"""Convolutions whose outputs read many channels, on the CPU: the rows of cases_dilated.py."""

from __future__ import annotations

import math

import pytest
import torch

import voxconv
from cases import BY_NAME, CHANNELS_LAST, LAYOUTS, Case, scaled_down, select
from testing import (
    DTYPES,
    accumulation_eps,
    all_passes,
    assert_case,
    bitwise_equal,
    by_torch,
    dtype_id,
    on,
    ops_called,
    ours,
    reference,
    rms,
    summands,
)
from voxconv._layout import is_channels_last

ROWS = select("dense", "dense_odd")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_rows(case: Case, dtype: torch.dtype) -> None:
    with on("dilated"), ops_called() as called:
        assert_case(case, case.make(dtype), dtype, versus_torch=True)
    assert "voxconv::dilated_forward" in called or case.transposed
    assert "voxconv::dilated_grad_input" in called
    assert "voxconv::dilated_grad_weight" in called


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_channels_last(case: Case) -> None:
    tensors = case.make(layout=CHANNELS_LAST)
    with on("dilated"):
        assert_case(case, tensors, torch.float32, versus_torch=True)
        y = ours(case, *tensors[:3])
    if is_channels_last(tensors.x):  # one channel is NCDHW
        assert y.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", scaled_down("dense_model", "dense_bar"), ids=str)
def test_as_dispatched(case: Case, layout: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert_case(case, case.make(dtype, layout=layout), dtype, versus_torch=True)


@pytest.mark.parametrize("name", ["meshnet_30_dilation2@64", "dense3_32@48"])
def test_full_size(name: str) -> None:
    """Tiles and chunks of channels as they are in a network, which small rows do not have."""
    case = BY_NAME[name]
    tensors = case.make()
    expected = all_passes(by_torch, case, tensors)
    with on("dilated"):
        got = all_passes(ours, case, tensors)
    for which, value in expected.items():
        sums = math.sqrt(summands(case, which)) * accumulation_eps(torch.float32)
        torch.testing.assert_close(got[which], value, rtol=0, atol=16 * sums * rms(value))


@pytest.mark.parametrize("case", select("dense"), ids=str)
def test_gradients(case: Case) -> None:
    x, weight, bias, _ = (t.requires_grad_() for t in case.small().make(torch.float64))

    def call(*args: torch.Tensor) -> torch.Tensor:
        return ours(case.small(), *args)

    with on("dilated"):
        assert torch.autograd.gradcheck(call, (x, weight, bias), fast_mode=True)
        assert torch.autograd.gradgradcheck(call, (x, weight, bias), fast_mode=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", select("dense"), ids=str)
def test_same_bits_with_any_threads(case: Case, layout: str) -> None:
    tensors = case.make(layout=layout)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with on("dilated"):
                results.append(all_passes(ours, case, tensors))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(bitwise_equal(other[which], results[0][which]) for which in other)


@pytest.mark.parametrize("case", [c for c in ROWS if c.mode == "zeros"], ids=str)
def test_any_strides(case: Case) -> None:
    x, weight, bias, grad = case.make()
    wide = [t.repeat_interleave(2, -1).transpose(-1, -2).contiguous() for t in (x, weight, grad)]
    x2, weight2, grad2 = (t[..., ::2, :].transpose(-1, -2) for t in wide)
    with on("dilated"):
        expected = all_passes(ours, case, type(case.make())(x, weight, bias, grad))
        got = all_passes(ours, case, type(case.make())(x2, weight2, bias, grad2))
    for which in ("forward", "grad_input", "grad_weight"):
        assert bitwise_equal(got[which], expected[which]), which


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", [c for c in select("dense") if c.n == 1], ids=str)
def test_reach_of_one_cell(case: Case, value: float) -> None:
    """NaN and infinity come to those outputs alone whose taps meet them."""
    x = torch.zeros_like(case.make().x)
    weight = torch.ones_like(case.make().weight)
    cell = (0, 0, *(n // 2 for n in case.size))
    x[cell] = 1
    met = reference(case, x, weight, None) > 0
    x[cell] = value
    with on("dilated"):
        assert torch.equal(~ours(case, x, weight, None).isfinite(), met)


@pytest.mark.parametrize("case", select("dense"), ids=str)
def test_empty_batch(case: Case) -> None:
    x, weight, bias, grad = case.make()
    tensors = type(case.make())(x[:0], weight, bias, grad[:0])
    with on("dilated"):
        got = all_passes(ours, case, tensors)
    assert got["forward"].shape == (0, *grad.shape[1:])
    assert not got["grad_weight"].any()
    assert not got["grad_bias"].any()


def test_unbatched_and_no_bias() -> None:
    case = select("dense")[1]
    x, weight, _, _ = case.make()
    y = voxconv.dilated_conv3d(x[0], weight, **case.kwargs())
    torch.testing.assert_close(y, reference(case, x, weight, None)[0])


@pytest.mark.parametrize("case", select("dense"), ids=str)
def test_compiles(case: Case) -> None:
    torch._dynamo.reset()
    tensors = case.make()

    def compiled(case: Case, *args: torch.Tensor | None) -> torch.Tensor:
        return torch.compile(lambda *a: ours(case, *a), fullgraph=True, backend="aot_eager")(*args)

    with voxconv.use_backend("cpu"):
        expected = all_passes(ours, case, tensors)
        got = all_passes(compiled, case, tensors)
    for which in expected:
        assert bitwise_equal(got[which], expected[which]), which
