# SPDX-License-Identifier: Apache-2.0
"""Limits: nothing in the batch, non-finite values, tensors past 2^31 elements."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import voxconv
from cases import CHANNELS_LAST, LAYOUTS, Case, Tensors, select
from testing import DTYPES, all_passes, bitwise_equal, by_torch, dtype_id, on, ours, reference


@pytest.mark.parametrize("path", ["direct", "torch", None])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", select("smoke"), ids=str)
def test_zero_batch(case: Case, layout: str, path: str | None) -> None:
    """Empty in, empty out; the gradients of the parameters are zero, not unwritten."""
    case = replace(case, n=0)
    with on(path):
        got = all_passes(ours, case, case.make(layout=layout))
    assert got["forward"].shape == (0, case.out_channels, *case.out_size)
    assert got["grad_input"].shape == (0, case.channels, *case.size)
    assert torch.equal(got["grad_weight"], torch.zeros_like(case.make().weight))
    assert torch.equal(got["grad_bias"], torch.zeros(case.out_channels))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_zero_batch_dtypes(dtype: torch.dtype) -> None:
    case = Case("none", n=0, channels=2, size=(3, 4, 5), padding=1)
    with on("direct"):
        assert all(t.dtype == dtype for t in all_passes(ours, case, case.make(dtype)).values())


LARGE = [
    Case("stride1", channels=16, size=(64, 64, 64), padding=1),
    Case("stride2", channels=16, size=(64, 64, 64), padding=1, stride=(2, 2, 2)),
    Case("lines3", channels=48, size=(43, 45, 47), padding=1),
    Case("lines4", channels=48, size=(43, 45, 47), kernel=(2, 5, 4), padding="same"),
    Case("lines7", channels=48, size=(43, 45, 47), kernel=(1, 3, 7), dilation=(1, 2, 3), padding=3),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_targets_written_past_the_caches(case: Case, layout: str, threads: int) -> None:
    """Results of 16 MiB and more are, by every thread, and are all there."""
    made = case.make(layout=layout)
    with on("direct"):
        got = all_passes(ours, case, made)
    expected = all_passes(by_torch, case, made)
    for which in ("forward", "grad_input"):
        torch.testing.assert_close(got[which], expected[which], rtol=1e-4, atol=1e-5)


# The kernels of the receptive-field tests: gaps (stride over the kernel, dilation), every mode.
Passes = dict[str, torch.Tensor]
REACH = [
    Case("plain", channels=2, size=(5, 6, 19), kernel=(3, 3, 5), padding=(1, 1, 2)),
    Case("wide", channels=2, size=(9, 3, 48), padding=1),
    Case("valid", channels=2, size=(4, 5, 17), padding="valid"),
    Case("stride2", channels=2, size=(5, 6, 19), stride=(2, 2, 2), padding=1),
    Case("skipping", channels=2, size=(7, 8, 20), kernel=(1, 2, 1), stride=(2, 3, 2)),
    Case("dilation3", channels=2, size=(8, 9, 20), dilation=(2, 3, 3), padding=2),
    Case("dw7", channels=2, size=(7, 7, 18), kernel=(7, 7, 7), padding=3),
    Case("multiplier2", channels=2, multiplier=2, size=(4, 5, 10), padding=1),
    Case("replicate", channels=2, size=(4, 5, 10), padding=2, mode="replicate"),
    Case("reflect", channels=2, size=(4, 5, 10), padding=2, mode="reflect"),
    Case("circular", channels=2, size=(4, 5, 10), padding=2, mode="circular", stride=(1, 2, 2)),
    Case("up", "transposed", channels=2, size=(3, 4, 9), stride=(2, 2, 2), padding=1),
    Case("up_gaps", "transposed", channels=2, size=(3, 4, 6), kernel=(1, 2, 1), stride=(2, 3, 2)),
]
SPOTS = [(0, 0, 0), (1, 2, 3), (-1, -1, -1), (2, 0, -2)]


def _spoil(t: torch.Tensor, spot: tuple[int, ...], value: float) -> torch.Tensor:
    """A copy with one bad cell, in the first sample and second channel."""
    spoilt = t.clone()
    spoilt[(0, 1, *spot)] = value
    return spoilt


def _assert_reach(
    which: str, got: Passes, expected: Passes, marks: Passes, *, at_least: bool = False
) -> None:
    """Non-finite exactly (or at least) where marked, and elsewhere not a bit changed."""
    touched, bad = marks[which] != 0, ~got[which].isfinite()
    if at_least:
        assert (bad | ~touched).all(), which
        touched = bad
    assert torch.equal(bad, touched), which
    assert torch.equal(got[which][~touched], expected[which][~touched]), which


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", REACH, ids=str)
def test_non_finite_input_reaches_its_field_only(case: Case, layout: str, value: float) -> None:
    """Outputs and weight gradients that read no bad cell keep every bit; those that do are bad."""
    clean = case.make(layout=layout)
    for spot in SPOTS:
        bad = clean._replace(x=_spoil(clean.x, spot, value))
        ones = [torch.ones_like(t, dtype=torch.float64) for t in clean]
        ones[0] = _spoil(torch.zeros_like(ones[0]), spot, 1.0)
        ones[2] = torch.zeros_like(ones[2])
        marks = all_passes(reference, case, Tensors(*ones))
        with on("direct"):
            expected, got = all_passes(ours, case, clean), all_passes(ours, case, bad)
        _assert_reach("forward", got, expected, marks)
        _assert_reach("grad_weight", got, expected, marks, at_least=case.transposed)
        assert got["grad_weight"].view(2, -1)[0].isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", REACH, ids=str)
def test_non_finite_gradient_reaches_its_field_only(case: Case, layout: str, value: float) -> None:
    """As above; a bad gradient may meet the zeros of the padding, in the weight of its channel."""
    clean = case.make(layout=layout)
    for spot in SPOTS[:3]:
        spot = tuple(i if i < 0 else i % n for i, n in zip(spot, case.out_size, strict=True))
        bad = clean._replace(grad=_spoil(clean.grad, spot, value))
        ones = [torch.ones_like(t, dtype=torch.float64) for t in clean]
        ones[3] = _spoil(torch.zeros_like(ones[3]), spot, 1.0)
        marks = all_passes(reference, case, Tensors(*ones))
        with on("direct"):
            expected, got = all_passes(ours, case, clean), all_passes(ours, case, bad)
        _assert_reach("grad_input", got, expected, marks)
        _assert_reach("grad_bias", got, expected, marks)
        _assert_reach("grad_weight", got, expected, marks, at_least=not case.transposed)
        others = [c for c in range(case.out_channels) if c != 1]
        assert got["grad_weight"].flatten(0, 1)[others].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fft_keeps_nan_in_its_channel(layout: str) -> None:
    """A transform mixes all voxels of one channel of one sample, and nothing else."""
    case = next(c for c in select("fft") if c.name == "dw13")
    case = replace(case, n=2)
    x, weight, bias, _ = case.make(layout=layout)
    x[1, 0, 2, 3, 4] = float("nan")
    y = torch.ops.voxconv.depthwise_forward_fft(
        x, weight, bias, case.stride, [p for pair in case.pads for p in pair], case.dilation, 0
    )
    assert y[1, 0, 2, 3, 4].isnan()
    assert y[0].isfinite().all()
    assert y[1, 1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_halves_overflow_to_infinity(dtype: torch.dtype) -> None:
    """Sums past the range of a half are infinite, as torch rounds them, and large ones survive."""
    largest = torch.finfo(dtype).max
    x = torch.full((1, 1, 1, 1, 9), largest, dtype=dtype)
    weight = torch.ones(1, 1, 1, 1, 3, dtype=dtype)
    assert voxconv.depthwise_conv3d(x, weight).isposinf().all()
    halved = voxconv.depthwise_conv3d(x, weight / 4)
    assert torch.equal(halved, (0.75 * x[..., :7].double()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_subnormals_are_kept(dtype: torch.dtype, layout: str) -> None:
    """Nothing flushes to zero: a delta kernel returns its input, however small."""
    tiny = torch.finfo(dtype).tiny / 4
    x = torch.arange(1, 2 * 3 * 4 * 20 + 1).view(1, 2, 3, 4, 20).to(dtype) % 7 * tiny
    if layout == CHANNELS_LAST:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    weight = torch.zeros(2, 1, 3, 3, 3, dtype=dtype)
    weight[:, :, 1, 1, 1] = 1
    with on("direct"):
        y = voxconv.depthwise_conv3d(x, weight, padding=1)
    assert x.count_nonzero() > 0
    assert torch.equal(y, x)


@pytest.mark.parametrize("kernel", [(1, 1, 33), (40, 1, 1)])
def test_kernels_past_31_run(kernel: tuple[int, int, int]) -> None:
    case = Case("long", channels=2, size=(41, 3, 36), kernel=kernel)
    tensors = case.make()
    got, oracle = (
        all_passes(ours, case, tensors),
        all_passes(reference, case, Tensors(*(t.double() for t in tensors))),
    )
    for which, t in got.items():
        torch.testing.assert_close(t.double(), oracle[which], rtol=1e-4, atol=1e-4)


BEYOND = [  # n, c, d, h, w with more than 2^31 elements
    pytest.param((1, 3, 900, 900, 1000), id="volume"),
    pytest.param((70_000, 8, 16, 16, 16), id="batch"),
    pytest.param((1, 2_200_000, 10, 10, 10), id="channels"),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", BEYOND)
def test_shapes_past_2_31(shape: tuple[int, ...], layout: str) -> None:
    """Shape functions on sizes that no test machine can hold."""
    geometry = ((1, 1, 2), (1, 1, 1, 1, 1, 1), (1, 1, 1), 0)
    memory = torch.channels_last_3d if layout == CHANNELS_LAST else torch.contiguous_format
    with FakeTensorMode():
        x = torch.empty(shape, memory_format=memory)
        weight = torch.empty(shape[1], 1, 3, 3, 3)
        y = torch.ops.voxconv.depthwise_forward(x, weight, None, *geometry)
        assert y.shape == (*shape[:4], shape[4] // 2)
        assert y.numel() > 2**30
        assert y.is_contiguous(memory_format=memory)
        dx = torch.ops.voxconv.depthwise_grad_input(y, weight, shape[2:], *geometry)
        assert dx.stride() == x.stride()
        dw = torch.ops.voxconv.depthwise_grad_weight(y, x, (3, 3, 3), *geometry)
        assert dw.shape == weight.shape
        assert torch.ops.voxconv.channel_sum(y).shape == (shape[1],)


@pytest.fixture
def sparse_memory(tmp_path: Path) -> Iterator[torch.Tensor]:
    """2^31 + 2^20 float32 in a sparse file: address space, of which only touched pages exist."""
    length = 2**31 + 2**20
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(4 * length)
    yield torch.from_file(str(path), shared=True, size=length, dtype=torch.float32)
    path.unlink()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axis", range(5), ids=list("ncdhw"))
def test_offsets_past_2_31(sparse_memory: torch.Tensor, axis: int, layout: str) -> None:
    """Both halves of an axis lie 2^31 elements apart: a 32-bit offset would read elsewhere."""
    case = Case("far", n=2, channels=2, size=(3, 3, 6), padding=1)
    tensors = case.make(layout=layout)

    def far(t: torch.Tensor) -> torch.Tensor:
        strides = list(t.stride())
        strides[axis] = 2**31 // (t.shape[axis] - 1) + 64
        view = sparse_memory.as_strided(t.shape, strides)
        return view.copy_(t)

    with on("direct"):
        expected = all_passes(ours, case, tensors)
        got = all_passes(ours, case, tensors._replace(x=far(tensors.x)))
        for which in ("forward", "grad_weight"):
            torch.testing.assert_close(got[which], expected[which], rtol=1e-5, atol=1e-5)
        got = all_passes(ours, case, tensors._replace(grad=far(tensors.grad)))
        for which in ("grad_input", "grad_weight", "grad_bias"):
            torch.testing.assert_close(got[which], expected[which], rtol=1e-5, atol=1e-5)


def test_every_small_geometry() -> None:
    """All of kernel 1..4, stride 1..3, dilation 1..2, padding 0..3 on one axis, bit for bit.

    Small whole numbers leave nothing to round, so any wrong tap shows as an integer.
    """
    x = torch.arange(1.0, 12).view(1, 1, 1, 1, 11)
    for k, s, d, p in itertools.product(range(1, 5), range(1, 4), range(1, 3), range(4)):
        case = Case(
            "one",
            size=(1, 1, 11),
            kernel=(1, 1, k),
            stride=(1, 1, s),
            dilation=(1, 1, d),
            padding=(0, 0, p),
        )
        weight = torch.tensor([1.0, 16, 256, 4096][:k]).view(1, 1, 1, 1, k)
        grad = torch.arange(1.0, case.out_size[2] + 1).view(1, 1, 1, 1, -1)
        tensors = case.make()._replace(x=x, weight=weight, bias=torch.zeros(1), grad=grad)
        with on("direct"):
            got = all_passes(ours, case, tensors)
        oracle = all_passes(reference, case, Tensors(*(t.double() for t in tensors)))
        for which, t in got.items():
            assert torch.equal(t.double(), oracle[which]), f"{which} k={k} s={s} d={d} p={p}"


def test_first_and_second_call_agree() -> None:
    """Nothing is left over in scratch from a larger problem before."""
    small, large = select("smoke")[0], select("smoke")[2]
    with on("direct"):
        fresh = all_passes(ours, small, small.make())
        all_passes(ours, large, large.make())
        again = all_passes(ours, small, small.make())
    assert all(bitwise_equal(fresh[which], again[which]) for which in fresh)
