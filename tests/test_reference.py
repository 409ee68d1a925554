# SPDX-License-Identifier: Apache-2.0
"""The oracle against F.conv3d in float64, and everything against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import voxconv
from cases import Case, select
from testing import (
    PASSES,
    all_passes,
    assert_accurate,
    by_torch,
    reference,
    summands,
)


@pytest.mark.parametrize("case", select("smoke", "odd", "edge"), ids=str)
def test_oracle_agrees_with_torch(case: Case) -> None:
    """Two float64 programs that share no code: explicit index maps, and ATen."""
    tensors = case.make(torch.float64)
    theirs = all_passes(by_torch, case, tensors)
    for which, got in all_passes(reference, case, tensors).items():
        taps = 4 * summands(case, which)
        assert_accurate(f"{case} {which}", got, theirs[which], taps=taps)


@pytest.mark.parametrize(
    ("name", "weight", "bias", "groups"),
    [
        ("conv3d", (4, 1, 3, 3, 3), None, 1),
        ("conv3d", (4, 1, 3, 3, 3), 1, 4),
        ("conv3d", (4, 3, 3, 3), None, 4),
        ("conv_transpose3d", (8, 1, 3, 3, 3), None, 4),
        ("conv_transpose3d", (4, 1, 3, 3, 3), 1, 4),
    ],
)
def test_oracle_does_not_broadcast(
    name: str, weight: tuple[int, ...], bias: int | None, groups: int
) -> None:
    x, b = torch.zeros(1, 4, 6, 6, 6), None if bias is None else torch.zeros(bias)
    with pytest.raises(ValueError, match=r"weight|bias"):
        getattr(voxconv.reference, name)(x, torch.zeros(weight), b, groups=groups)


def test_oracle_is_differentiable_twice() -> None:
    case = Case("tiny", channels=2, size=(3, 3, 4), kernel=(2, 2, 3), padding=1, stride=(1, 2, 1))
    inputs = [t.requires_grad_() for t in case.make(torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda *a: reference(case, *a), inputs)
    assert torch.autograd.gradgradcheck(lambda *a: reference(case, *a), inputs)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_dense_oracle_agrees_with_torch(groups: int) -> None:
    x = torch.randn(2, 4, 5, 6, 7, dtype=torch.float64)
    weight = torch.randn(8, 4 // groups, 3, 2, 3, dtype=torch.float64)
    bias = torch.randn(8, dtype=torch.float64)
    geometry = ((1, 2, 1), (1, 0, 2), (2, 1, 1), groups)
    got = voxconv.reference.conv3d(x, weight, bias, *geometry)
    assert_accurate("dense", got, F.conv3d(x, weight, bias, *geometry), taps=72)


# Rows of x against the kernel [1, 10, 100], so that the digits of a result are the cells it read.
LITERALS = [
    pytest.param([1, 2, 3, 4], {"padding": 1}, [210, 321, 432, 43], id="zeros"),
    pytest.param(
        [1, 2, 3, 4],
        {"padding": 1, "padding_mode": "replicate"},
        [211, 321, 432, 443],
        id="replicate",
    ),
    pytest.param(
        [1, 2, 3, 4], {"padding": 1, "padding_mode": "reflect"}, [212, 321, 432, 343], id="reflect"
    ),
    pytest.param(
        [1, 2, 3, 4],
        {"padding": 1, "padding_mode": "circular"},
        [214, 321, 432, 143],
        id="circular",
    ),
    pytest.param([1, 2, 3, 4], {"padding": "valid"}, [321, 432], id="valid"),
    pytest.param([1, 2, 3, 4], {"padding": "same"}, [210, 321, 432, 43], id="same"),
    pytest.param([1, 2, 3, 4], {"padding": "same", "stride": 2}, [321, 43], id="same_stride2"),
    pytest.param([1, 2, 3, 4, 5], {"padding": "same", "stride": 3}, [321, 54], id="same_stride3"),
    pytest.param([1, 2, 3, 4, 5], {"dilation": 2}, [531], id="dilation2"),
    pytest.param([1, 2, 3, 4], {"padding": (2, 0)}, [100, 210, 321, 432], id="causal"),
    pytest.param([1, 2, 3, 4], {"padding": (0, 1), "stride": 2}, [321, 43], id="pair_stride"),
    pytest.param([7], {"padding": 1}, [70], id="one_cell"),
    pytest.param([1, 2], {"padding": 3}, [0, 100, 210, 21, 2, 0], id="padding_over_kernel"),
]


def _along(axis: int, row: list[float], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A row as a [1,1,D,H,W] tensor that lies along spatial axis ``axis``."""
    shape = [1, 1, 1, 1, 1]
    shape[2 + axis] = len(row)
    return torch.tensor(row, dtype=dtype).reshape(shape)


def _only_on(axis: int, geometry: dict[str, object]) -> dict[str, object]:
    """The geometry of one axis, neutral on the two others."""
    neutral = {"padding": (0, 0), "stride": 1, "dilation": 1, "output_padding": 0}
    spread: dict[str, object] = {}
    for key, value in geometry.items():
        if isinstance(value, str):
            spread[key] = value
            continue
        triple = [neutral[key]] * 3
        triple[axis] = (value, value) if key == "padding" and isinstance(value, int) else value
        spread[key] = tuple(triple)
    return spread


FUNCTIONS = [
    pytest.param(voxconv.reference.depthwise_conv3d, id="reference"),
    pytest.param(voxconv.depthwise_conv3d, id="voxconv"),
]
along_each_axis = pytest.mark.parametrize("axis", [0, 1, 2], ids=["d", "h", "w"])


@pytest.mark.parametrize(("row", "geometry", "expected"), LITERALS)
@along_each_axis
@pytest.mark.parametrize("conv", FUNCTIONS)
def test_by_hand(
    conv: Callable[..., torch.Tensor],
    axis: int,
    row: list[float],
    geometry: dict[str, object],
    expected: list[float],
) -> None:
    got = conv(_along(axis, row), _along(axis, [1, 10, 100]), **_only_on(axis, geometry))
    assert got.flatten().tolist() == expected
    assert got.shape == _along(axis, expected).shape


@pytest.mark.parametrize("conv", FUNCTIONS)
def test_multiplier_by_hand(conv: Callable[..., torch.Tensor]) -> None:
    """Output channels c*m .. c*m + m-1 read input channel c."""
    x = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1, 1)
    weight = torch.tensor([1.0, 10, 100, 1000, 10_000, 100_000]).view(6, 1, 1, 1, 1)
    bias = torch.tensor([0.5, 0, 0, 0, 0, 0])
    assert conv(x, weight, bias).flatten().tolist() == [1.5, 10, 200, 2000, 30_000, 300_000]


TRANSPOSED = [
    pytest.param({"stride": 2}, [1, 10, 102, 20, 200], id="stride2"),
    pytest.param({"stride": 2, "padding": 1}, [10, 102, 20], id="padding1"),
    pytest.param(
        {"stride": 2, "padding": 1, "output_padding": 1}, [10, 102, 20, 200], id="output_padding1"
    ),
    pytest.param({"stride": 2, "output_padding": 1}, [1, 10, 102, 20, 200, 0], id="beyond"),
    pytest.param({"stride": 1}, [1, 12, 120, 200], id="stride1"),
    pytest.param({"dilation": 2}, [1, 2, 10, 20, 100, 200], id="dilation2"),
]


@pytest.mark.parametrize(("geometry", "expected"), TRANSPOSED)
@along_each_axis
@pytest.mark.parametrize(
    "conv",
    [
        pytest.param(voxconv.reference.conv_transpose3d, id="reference"),
        pytest.param(voxconv.conv_transpose3d, id="voxconv"),
    ],
)
def test_transposed_by_hand(
    conv: Callable[..., torch.Tensor],
    axis: int,
    geometry: dict[str, object],
    expected: list[float],
) -> None:
    args = _only_on(axis, geometry)
    if "padding" in args:
        args["padding"] = tuple(before for before, _ in args["padding"])  # type: ignore[attr-defined]
    got = conv(_along(axis, [1, 2]), _along(axis, [1, 10, 100]), **args)
    assert got.flatten().tolist() == expected


@along_each_axis
@pytest.mark.parametrize("conv", FUNCTIONS)
def test_gradients_by_hand(conv: Callable[..., torch.Tensor], axis: int) -> None:
    x = _along(axis, [1, 2, 3, 4]).requires_grad_()
    weight = _along(axis, [1, 10, 100]).requires_grad_()
    bias = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    y = conv(x, weight, bias, **_only_on(axis, {"padding": 1}))
    y.backward(_along(axis, [1, 1, 1, 2]))
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [11, 111, 112, 120]
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [1 + 2 + 2 * 3, 1 + 2 + 3 + 2 * 4, 2 + 3 + 4]
    assert bias.grad is not None
    assert bias.grad.tolist() == [5]


def test_every_pass_is_compared() -> None:
    case = select("smoke")[0]
    assert set(all_passes(reference, case, case.make(torch.float64))) == set(PASSES)


def test_what_is_not_finite_reaches_what_reads_it() -> None:
    x = torch.zeros(1, 2, 5, 5, 5)
    x[0, 0, 0, 0, 0] = torch.nan
    y = voxconv.reference.depthwise_conv3d(x, torch.ones(2, 1, 3, 3, 3), padding=1)
    assert y.isnan().sum() == 8
    assert y[0, 0, :2, :2, :2].isnan().all()
