# SPDX-License-Identifier: Apache-2.0
"""Random geometry against F.conv3d in float64, on whole numbers, where nothing may be rounded.

Inputs and weights are integers in -8..8: every sum is exact in float32, in any order, so outputs
and gradients must equal float64's to the last bit (halves: its rounding). A fixed profile draws
the same examples every time; ``VOXCONV_EXPLORE=1`` draws new ones, and prints what reproduces them,
``VOXCONV_EXAMPLES`` says how many.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cases import LAYOUTS, MODES, Case, Tensors
from testing import DTYPES, all_passes, by_torch, on, ours

EXPLORE = os.environ.get("VOXCONV_EXPLORE", "0") not in ("", "0")
settings.register_profile(
    "voxconv",
    derandomize=not EXPLORE,
    max_examples=int(os.environ.get("VOXCONV_EXAMPLES", 2000 if EXPLORE else 150)),
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
PROFILE = settings.get_profile("voxconv")


@st.composite
def axes(draw: st.DrawFn, mode: str, longest: int, widest: int) -> tuple[int, ...]:
    """Size, kernel, stride, dilation and padding pair of one axis that has an output."""
    n = draw(st.integers(1, longest))
    most = {"reflect": n - 1, "circular": n}.get(mode, 4)
    before, after = draw(st.tuples(*[st.integers(0, min(most, 4))] * 2))
    dilation = draw(st.integers(1, 3))
    room = (n + before + after - 1) // dilation + 1
    kernel = draw(st.integers(1, min(room, draw(st.sampled_from([3, 7, widest])))))
    return n, kernel, draw(st.integers(1, 3)), dilation, before, after


@st.composite
def convolutions(draw: st.DrawFn, modes: tuple[str, ...] = MODES) -> Case:
    mode = draw(st.sampled_from(modes))
    d, h, w = (draw(axes(mode, *limits)) for limits in ((6, 7), (7, 9), (70, 31)))
    size, kernel, stride, dilation, before, after = zip(d, h, w, strict=True)
    return Case(
        "random",
        n=draw(st.integers(1, 2)),
        channels=draw(st.integers(1, 9)),
        multiplier=draw(st.sampled_from([1, 1, 2, 3])),
        size=size,
        kernel=kernel,
        stride=stride,
        dilation=dilation,
        padding=tuple(zip(before, after, strict=True)),
        mode=mode,
        layout=draw(st.sampled_from(LAYOUTS)),
    )


@st.composite
def transposed_axes(draw: st.DrawFn, longest: int) -> tuple[int, ...]:
    n, kernel = draw(st.integers(1, longest)), draw(st.integers(1, 5))
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    extra = draw(st.integers(0, max(stride, dilation) - 1))
    full = (n - 1) * stride + dilation * (kernel - 1) + 1 + extra
    padding = draw(st.integers(0, min((full - 1) // 2, 4)))
    return n, kernel, stride, dilation, padding, extra


@st.composite
def transposed_convolutions(draw: st.DrawFn) -> Case:
    d, h, w = (draw(transposed_axes(longest)) for longest in (4, 4, 30))
    size, kernel, stride, dilation, padding, extra = zip(d, h, w, strict=True)
    return Case(
        "random",
        "transposed",
        n=draw(st.integers(1, 2)),
        channels=draw(st.integers(1, 9)),
        multiplier=draw(st.sampled_from([1, 1, 2])),
        size=size,
        kernel=kernel,
        stride=stride,
        dilation=dilation,
        padding=padding,
        output_padding=extra,
        layout=draw(st.sampled_from(LAYOUTS)),
    )


def _whole(case: Case, dtype: torch.dtype) -> Tensors:
    """The row's tensors as integers of at most 8, so that halves hold them too."""
    return Tensors(*((t * 4).round().clamp(-8, 8) for t in _loud(case.make(dtype), case)))


def _loud(tensors: Tensors, case: Case) -> Tensors:
    return tensors._replace(weight=tensors.weight * case.taps**0.5)


def _check_exact(case: Case, dtype: torch.dtype) -> None:
    tensors = _whole(case, dtype)
    expected = all_passes(by_torch, case, Tensors(*(t.double() for t in tensors)))
    with on("direct"):
        got = all_passes(ours, case, tensors)
    for which, oracle in expected.items():
        wrong = got[which] != oracle.to(dtype)
        assert not wrong.any(), f"{which}: {int(wrong.sum())} wrong, first at {wrong.nonzero()[0]}"


@given(case=convolutions(), dtype=st.sampled_from(DTYPES))
@settings(PROFILE)
def test_any_geometry(case: Case, dtype: torch.dtype) -> None:
    _check_exact(case, dtype)


@given(case=transposed_convolutions(), dtype=st.sampled_from(DTYPES))
@settings(PROFILE)
def test_any_transposed_geometry(case: Case, dtype: torch.dtype) -> None:
    _check_exact(case, dtype)


@pytest.mark.parametrize("strategy", [convolutions(("zeros",)), transposed_convolutions()])
def test_any_geometry_by_fft(strategy: st.SearchStrategy[Case]) -> None:
    @given(case=strategy)
    @settings(PROFILE, max_examples=PROFILE.max_examples // 2)
    def check(case: Case) -> None:
        tensors = _whole(case, torch.float64)
        expected = all_passes(by_torch, case, tensors)
        with on("fft"):
            got = all_passes(ours, case, tensors)
        for which, oracle in expected.items():
            torch.testing.assert_close(got[which], oracle, rtol=0, atol=1e-9)

    check()


@given(case=convolutions(), data=st.data())
@settings(PROFILE, max_examples=PROFILE.max_examples // 2)
def test_same_padding_is_ceil(case: Case, data: st.DataObject) -> None:
    """ "same" gives ceil(size / stride) outputs and equals the pairs it stands for."""
    same = Case(
        "same",
        channels=case.channels,
        size=case.size,
        kernel=case.kernel,
        stride=case.stride,
        dilation=case.dilation,
        padding="same",
    )
    x, weight, _, _ = _whole(same, torch.float32)
    with on(data.draw(st.sampled_from(["direct", "torch", None]))):
        y = ours(same, x, weight, None)
    assert y.shape[2:] == tuple(-(-n // s) for n, s in zip(same.size, same.stride, strict=True))
    assert torch.equal(y.double(), by_torch(same, x.double(), weight.double(), None))
