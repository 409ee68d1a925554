# SPDX-License-Identifier: Apache-2.0
"""Any strides give the right answer, and the layout that comes in goes out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cases import CHANNELS_LAST, LAYOUTS, NCDHW, Case, Tensors, select
from testing import (
    DTYPES,
    PASSES,
    all_passes,
    assert_accurate,
    assert_case,
    bitwise_equal,
    dtype_id,
    on,
    ours,
    reference,
    summands,
)

BASIC = Case("basic", n=2, channels=3, size=(5, 6, 11), padding=1)
WALKED = [
    BASIC,
    Case("stride2", n=2, channels=3, size=(5, 6, 11), padding=1, stride=(2, 2, 2)),
    Case("multiplier2", n=2, channels=3, multiplier=2, size=(4, 5, 9), kernel=(3, 1, 5), padding=1),
    Case("circular_c9", n=2, channels=9, size=(5, 6, 7), mode="circular", padding=2),
    Case("up", "transposed", n=2, channels=3, size=(3, 4, 5), stride=(2, 2, 2), padding=1),
]


def _sliced(t: torch.Tensor) -> torch.Tensor:
    """The same values as a window of a bigger buffer, NaN all around."""
    buffer = torch.full([n + 3 for n in t.shape], float("nan"), dtype=t.dtype)
    window = buffer[tuple(slice(1, n + 1) for n in t.shape)]
    return window.copy_(t)


def _stepped(t: torch.Tensor) -> torch.Tensor:
    """Every second cell of a buffer along every axis."""
    buffer = torch.full([2 * n for n in t.shape], float("nan"), dtype=t.dtype)
    window = buffer[tuple(slice(1, 2 * n, 2) for n in t.shape)]
    return window.copy_(t)


def _offset(t: torch.Tensor) -> torch.Tensor:
    """Contiguous, but starting one element into its storage: no alignment to count on."""
    buffer = torch.empty(t.numel() + 1, dtype=t.dtype)
    return buffer[1:].view(t.shape).copy_(t)


def _permuted(*order: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same values with axes stored in ``order``, outermost first."""

    def permute(t: torch.Tensor) -> torch.Tensor:
        stored = t.permute(order).contiguous()
        back = sorted(range(5), key=order.__getitem__)
        return stored.permute(back)

    return permute


def _last_sliced(t: torch.Tensor) -> torch.Tensor:
    """Some channels of a wider channels_last_3d tensor."""
    wide = torch.full((t.shape[0], t.shape[1] + 5, *t.shape[2:]), float("nan"), dtype=t.dtype)
    wide = wide.contiguous(memory_format=torch.channels_last_3d)
    return wide[:, 2 : 2 + t.shape[1]].copy_(t)


STORED = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last_3d),
    "sliced": _sliced,
    "stepped": _stepped,
    "offset": _offset,
    "w_h_swapped": _permuted(0, 1, 2, 4, 3),
    "w_outermost": _permuted(4, 0, 1, 2, 3),
    "batch_innermost": _permuted(1, 2, 3, 4, 0),
    "channels_last_sliced": _last_sliced,
    "d_h_swapped_channels_last": _permuted(0, 3, 2, 4, 1),
}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("case", WALKED, ids=str)
def test_input_and_gradient_strides(case: Case, stored: str) -> None:
    """Both tensors of every pass, in the same odd strides."""
    tensors, store = case.make(), STORED[stored]
    odd = Tensors(store(tensors.x), tensors.weight, tensors.bias, store(tensors.grad))
    assert torch.equal(odd.x, tensors.x)
    with on("direct"):
        assert_case(case, odd, torch.float32, versus_torch=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("stored", ["stepped", "channels_last_sliced", "offset"])
def test_strides_in_every_dtype(stored: str, dtype: torch.dtype) -> None:
    tensors, store = BASIC.make(dtype), STORED[stored]
    odd = Tensors(store(tensors.x), tensors.weight, tensors.bias, store(tensors.grad))
    with on("direct"):
        assert_case(BASIC, odd, dtype, versus_torch=False)


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("case", WALKED, ids=str)
def test_mixed_layouts(case: Case, x_layout: str, grad_layout: str) -> None:
    tensors = case.make(layout=x_layout)._replace(grad=case.make(layout=grad_layout).grad)
    with on("direct"):
        assert_case(case, tensors, torch.float32, versus_torch=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_fft_of_channels_that_share_cache_lines(dtype: torch.dtype) -> None:
    """Vectors of channels go side by side where they share lines, the last ones do not fill one."""
    case = Case("lines", n=2, channels=70, size=(5, 6, 7), kernel=(3, 5, 3), padding=(1, 2, 1))
    with on("fft"):
        last = all_passes(ours, case, case.make(dtype, layout=CHANNELS_LAST))
        alone = all_passes(ours, case, case.make(dtype))
        assert_case(case, case.make(dtype, layout=CHANNELS_LAST), dtype, versus_torch=False)
    by_fft = [name for name in PASSES if name != "grad_bias"]
    assert all(bitwise_equal(last[name], alone[name]) for name in by_fft)


@pytest.mark.parametrize("stored", ["channels_last", "sliced", "stepped", "w_outermost"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", WALKED, ids=str)
def test_weight_and_bias_strides(case: Case, layout: str, stored: str) -> None:
    tensors = case.make(layout=layout)
    wide = torch.stack([tensors.bias, tensors.bias], 1)
    odd = tensors._replace(weight=STORED[stored](tensors.weight), bias=wide[:, 0])
    with on("direct"):
        assert_case(case, odd, torch.float32, versus_torch=False)


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (3,), (4,), (0, 1), (2, 3, 4), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("which", ["x", "grad", "weight"])
def test_expanded(which: str, axes: tuple[int, ...]) -> None:
    """Zero strides: one value broadcast along axes, as autograd of a sum or a shared kernel has."""
    tensors = BASIC.make()
    full = getattr(tensors, which)
    thin = full[tuple(slice(0, 1) if axis in axes else slice(None) for axis in range(5))]
    tensors = tensors._replace(**{which: thin.expand(full.shape)})
    oracle = all_passes(reference, BASIC, Tensors(*(t.double() for t in tensors)))
    with on("direct"):
        got = all_passes(ours, BASIC, tensors)
    for name in PASSES:
        assert_accurate(name, got[name], oracle[name], taps=4 * summands(BASIC, name))


def _is(t: torch.Tensor, layout: str) -> bool:
    last = t.is_contiguous(memory_format=torch.channels_last_3d) and not t.is_contiguous()
    return last if layout == CHANNELS_LAST else t.is_contiguous()


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("case", WALKED, ids=str)
def test_layout_in_is_layout_out(
    case: Case, dtype: torch.dtype, x_layout: str, grad_layout: str
) -> None:
    """The output has the layout of the input, the input's gradient that of the output's."""
    tensors = case.make(dtype, layout=x_layout)._replace(
        grad=case.make(dtype, layout=grad_layout)[3]
    )
    with on("direct"):
        got = all_passes(ours, case, tensors)
    assert _is(got["forward"], x_layout)
    assert _is(got["grad_input"], grad_layout)
    assert got["grad_weight"].is_contiguous()


@pytest.mark.parametrize("path", ["direct", "torch", None])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", select("smoke"), ids=str)
def test_layout_whatever_the_backend(case: Case, layout: str, path: str | None) -> None:
    x, weight, bias, _ = case.make(layout=layout)
    with on(path):
        assert _is(ours(case, x, weight, bias), layout)


@pytest.mark.parametrize("stored", ["sliced", "stepped", "w_outermost", "channels_last_sliced"])
def test_other_strides_give_a_contiguous_output(stored: str) -> None:
    x, weight, bias, _ = BASIC.make()
    with on("direct"):
        assert ours(BASIC, STORED[stored](x), weight, bias).is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", WALKED, ids=str)
def test_arguments_are_left_alone(case: Case, dtype: torch.dtype, layout: str) -> None:
    """Also the NaN around a window: nothing is written outside the result."""
    tensors = case.make(dtype, layout=layout)
    x = _sliced(tensors.x)
    base = x._base
    assert base is not None
    held = [base, *tensors]
    before = [t.clone() for t in held]
    with on("direct"):
        all_passes(ours, case, tensors._replace(x=x))
    assert all(bitwise_equal(a, b) for a, b in zip(held, before, strict=True))


@pytest.mark.parametrize("layout", [NCDHW, CHANNELS_LAST])
@pytest.mark.parametrize("case", WALKED, ids=str)
def test_unbatched(case: Case, layout: str) -> None:
    """A 4-D input is a batch of one, in and out."""
    x, weight, bias, _ = case.make(layout=layout)
    whole = ours(case, x[:1], weight, bias)
    single = ours(case, x[0], weight, bias)
    assert single.shape == whole.shape[1:]
    assert torch.equal(single, whole[0])
    leaf = x[0].clone().requires_grad_()
    ours(case, leaf, weight, bias).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.shape == x.shape[1:]
