# SPDX-License-Identifier: Apache-2.0
"""The judges judged: the accuracy rule refuses wrong results, the poison reaches every allocator,
and the table says what it means."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path

import pytest
import torch

from cases import CASES, LAYOUTS, MODES, Case, select
from testing import DTYPES, HALVES, MALLOC_FILL, assert_accurate, bitwise_equal, by_torch, dtype_id

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)


@pytest.fixture
def oracle() -> torch.Tensor:
    return torch.randn(4, 8, 13, 17, 19, dtype=torch.float64)


@each_dtype
def test_accepts_a_result_rounded_once(oracle: torch.Tensor, dtype: torch.dtype) -> None:
    assert_accurate("rounded", oracle.to(dtype), oracle, oracle.to(dtype), taps=1)


def test_accepts_a_float32_sum(oracle: torch.Tensor) -> None:
    terms = torch.randn(343, 20_000, dtype=torch.float64).float()
    total = torch.zeros(20_000)
    for term in terms:
        total = total + term
    assert_accurate("sum", total, terms.double().sum(0), total, taps=343)


def test_accepts_what_is_empty_or_zero() -> None:
    none = torch.zeros(0, 3, 4, 5, 6)
    assert_accurate("empty", none, none.double(), none)
    zero = torch.zeros(1, 2, 3, 4, 5)
    assert_accurate("zero", zero, zero.double(), zero)
    with pytest.raises(AssertionError, match="tiny"):
        assert_accurate("tiny", zero + 1e-30, zero.double())


def _one_wrong(t: torch.Tensor) -> torch.Tensor:
    wrong = t.clone()
    wrong[1, 2, 3, 4, 5] += 1.0
    return wrong


def _truncated(t: torch.Tensor) -> torch.Tensor:
    """Rounds toward zero to half the bits of the mantissa that ``t`` was meant to keep."""
    return t.float().view(torch.int32).bitwise_and(~0xFFFF).view(torch.float32).bfloat16()


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda t: t.roll(1, -1), id="shifted"),
        pytest.param(lambda t: t + 0.02, id="offset"),
        pytest.param(lambda t: t * 1.02, id="gain"),
        pytest.param(_one_wrong, id="one_wrong"),
        pytest.param(lambda t: t.where(t < 4, math.nan), id="nan"),
        pytest.param(lambda t: t.where(t < 4, math.inf), id="inf"),
        pytest.param(torch.zeros_like, id="zeros"),
        pytest.param(lambda t: t[:, :, :-1], id="shape"),
        pytest.param(lambda t: t + 0.02 * torch.randn_like(t), id="noise"),
    ],
)
@each_dtype
def test_refuses_a_wrong_result(oracle: torch.Tensor, dtype: torch.dtype, spoil) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(AssertionError, match="spoilt"):
        assert_accurate("spoilt", spoil(oracle).to(dtype), oracle, taps=27)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda t: t.float() * (1 + 4e-6), id="gain"),
        pytest.param(lambda t: t.float() + 4e-6, id="offset"),
    ],
)
def test_refuses_a_small_bias_in_float32(oracle: torch.Tensor, spoil) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(AssertionError, match="spoilt"):
        assert_accurate("spoilt", spoil(oracle), oracle, taps=27)


def test_refuses_truncation_to_bfloat16(oracle: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match="along the result"):
        assert_accurate("truncated", _truncated(oracle), oracle, taps=27)


def test_refuses_an_accumulator_in_half(oracle: torch.Tensor) -> None:
    terms = torch.randn(125, 4000, dtype=torch.float64).bfloat16()
    total = torch.zeros(4000, dtype=torch.bfloat16)
    for term in terms:
        total = total + term
    with pytest.raises(AssertionError, match="allowed"):
        assert_accurate("half sum", total, terms.double().sum(0), taps=125)


def test_refuses_more_than_twice_the_error_of_torch(oracle: torch.Tensor) -> None:
    noisy = (oracle + 4e-7 * torch.randn_like(oracle)).float()
    assert_accurate("noisy", noisy, oracle, noisy, taps=27)
    with pytest.raises(AssertionError, match=r"noisy: RMS error \S+, torch's \S+ .*twice torch's"):
        assert_accurate("noisy", noisy, oracle, oracle.float(), taps=27)


def test_bitwise_equal() -> None:
    a = torch.tensor([0.0, math.nan])
    assert bitwise_equal(a, a.clone())
    assert not bitwise_equal(a, torch.tensor([-0.0, math.nan]))
    assert not bitwise_equal(a, a.double())


@pytest.mark.parametrize(
    "allocate",
    [
        pytest.param(lambda: torch.empty(7), id="empty"),
        pytest.param(lambda: torch.empty_like(torch.zeros(7)), id="empty_like"),
        pytest.param(lambda: torch.zeros(1).new_empty(7), id="new_empty"),
        pytest.param(lambda: torch.empty_strided((7, 2), (2, 1)), id="empty_strided"),
        pytest.param(lambda: torch.ops.aten.empty.memory_format([7]), id="aten_empty"),
        pytest.param(lambda: torch.ops.aten.new_empty(torch.zeros(1), [7]), id="aten_new_empty"),
        pytest.param(lambda: torch.zeros(0).resize_(7), id="resize"),
        pytest.param(lambda: torch.empty(7, dtype=torch.bfloat16), id="empty-bfloat16"),
    ],
)
def test_aten_allocations_are_nan(allocate) -> None:  # type: ignore[no-untyped-def]
    assert allocate().isnan().all()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="poison needs glibc")
@pytest.mark.parametrize("length", [7, 1000, 10**6])
def test_stable_abi_allocations_are_poisoned(length: int) -> None:
    """The shim under the kernels' outputs goes past ``aten::empty``; malloc's fill catches it."""
    lib = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    handle, data = ctypes.c_void_p(), ctypes.c_void_p()
    sizes, strides = (ctypes.c_int64 * 1)(length), (ctypes.c_int64 * 1)(1)
    float32 = lib.aoti_torch_dtype_float32()
    one = ctypes.c_int64(1)
    assert not lib.aoti_torch_empty_strided(
        one, sizes, strides, float32, 0, 0, ctypes.byref(handle)
    )
    lib.aoti_torch_get_data_ptr(handle, ctypes.byref(data))
    assert data.value is not None
    held = ctypes.string_at(data.value, 4 * length)
    lib.aoti_torch_delete_tensor_object(handle)
    assert held == bytes([MALLOC_FILL]) * (4 * length)


def test_names_are_unique() -> None:
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_row_agrees_with_torch_about_the_output(case: Case) -> None:
    small = case.small()
    for row in (case, small):
        x, weight, bias = (
            torch.empty(shape, device="meta")
            for shape in (
                (row.n, row.channels, *row.size),
                row.weight_shape,
                (row.out_channels,),
            )
        )
        y = by_torch(row, x, weight, bias)
        assert tuple(y.shape) == (row.n, row.out_channels, *row.out_size)
    assert small.flops <= 2e8
    for field in ("kernel", "stride", "padding", "dilation", "mode", "multiplier", "op"):
        assert getattr(small, field) == getattr(case, field)


def test_live_flops_leave_out_the_padding() -> None:
    case = Case("row", channels=2, size=(1, 1, 4), kernel=(1, 1, 3), padding=(0, 0, 1))
    assert case.flops == 2 * 2 * 4 * 3
    assert case.live_flops == 2 * 2 * (4 * 3 - 2)
    assert case.bytes(4) == 4 * 2 * (4 + 4 + 3)


@pytest.mark.parametrize("layout", LAYOUTS)
@each_dtype
def test_tensors_of_a_row(dtype: torch.dtype, layout: str) -> None:
    case = Case("row", n=2, channels=3, multiplier=2, size=(4, 5, 6), padding=1)
    tensors = case.make(dtype, seed=3, layout=layout)
    assert {t.dtype for t in tensors} == {dtype}
    assert tensors.weight.shape == (6, 1, 3, 3, 3)
    assert tensors.grad.shape == (2, 6, 4, 5, 6)
    last = layout == "channels_last_3d"
    for t in (tensors.x, tensors.grad):
        assert t.is_contiguous(memory_format=torch.channels_last_3d) == last
    again = case.make(dtype, seed=3, layout="ncdhw")
    assert all(torch.equal(a, b) for a, b in zip(tensors, again, strict=True))
    assert not torch.equal(again.x, case.make(dtype, seed=4).x)


def test_table_covers_the_promises() -> None:
    tested = select("smoke", "odd", "edge")
    assert {case.mode for case in tested if not case.transposed} == set(MODES)
    for mode in MODES:
        assert any(c.mode == mode and max(c.stride) > 1 for c in tested)
    assert {k for c in tested for k in c.kernel} >= {1, 2, 3, 4, 5, 6, 7, 9, 13, 14, 31}
    assert len(HALVES) == 2
    assert {case.name for case in select("bar")} >= {"uxnet_dw7_48@48", "bar_dw21_48@24"}
