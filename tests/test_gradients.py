# SPDX-License-Identifier: Apache-2.0
"""Gradients of every row by the oracle's, first and second derivatives by finite differences."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import voxconv
from cases import CHANNELS_LAST, LAYOUTS, Case, scaled_down, select
from testing import DTYPES, PATHS, assert_case, by_torch, dtype_id, on, ops_called, ours, reference


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", select("smoke", "odd", "edge"), ids=str)
def test_direct(case: Case, dtype: torch.dtype) -> None:
    with on("direct"):
        assert_case(case, case.make(dtype), dtype, versus_torch=True)


@pytest.mark.parametrize("case", select("smoke", "odd", "edge"), ids=str)
def test_direct_channels_last(case: Case) -> None:
    with on("direct"):
        tensors = case.make(layout=CHANNELS_LAST)
        assert_case(case, tensors, torch.float32, versus_torch=True)


@pytest.mark.parametrize("case", select("smoke", "odd"), ids=str)
def test_as_dispatched(case: Case) -> None:
    assert_case(case, case.make(), torch.float32, versus_torch=True)


@pytest.mark.parametrize("case", select("smoke", "odd", "edge"), ids=str)
def test_through_torch(case: Case) -> None:
    with on("torch"):
        assert_case(case, case.make(), torch.float32, versus_torch=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "case", [c for c in select("fft") if c.mode == "zeros" and "edge" in c.tags], ids=str
)
def test_through_fft(case: Case, dtype: torch.dtype) -> None:
    with on("fft"):
        assert_case(case, case.make(dtype), dtype, versus_torch=True)


@pytest.mark.parametrize("case", scaled_down("model", "bar"), ids=str)
def test_layers_of_models_scaled_down(case: Case) -> None:
    assert_case(case, case.make(), torch.float32, versus_torch=True)


LONG = [
    Case("dw3", channels=4, size=(32, 32, 32), padding=1),
    Case("dw5_stride2", n=2, channels=3, size=(40, 41, 42), kernel=(5, 5, 5), stride=(2, 2, 2)),
    Case("dw3_rows", channels=2, size=(3, 4, 4097), padding=1),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_sums(case: Case, layout: str) -> None:
    """Gradients that add up a whole volume: errors must not pile up along it."""
    with on("direct"):
        assert_case(case, case.make(layout=layout), torch.float32, versus_torch=True)


def _tiny(name: str, **fields: object) -> Case:
    common = {"channels": 2, "size": (3, 3, 4), "kernel": (2, 3, 3), "padding": 1}
    return Case(name, **common | fields)  # type: ignore[arg-type]


DIFFERENTIATED = [
    _tiny("plain"),
    _tiny("batch", n=2, kernel=(1, 2, 3)),
    _tiny("stride", stride=(2, 1, 3), size=(4, 3, 5)),
    _tiny("dilation", dilation=(1, 2, 2), padding=2),
    _tiny("multiplier", multiplier=2, kernel=(2, 2, 2)),
    _tiny("pairs", padding=((0, 2), (1, 0), (2, 1))),
    _tiny("same_stride", padding="same", stride=(1, 2, 2)),
    _tiny("replicate", mode="replicate", padding=2),
    _tiny("reflect", mode="reflect", stride=(1, 2, 1)),
    _tiny("circular", mode="circular", dilation=(1, 1, 2)),
    _tiny("transposed", op="transposed", size=(2, 2, 3), stride=(1, 2, 2), padding=0),
    _tiny(
        "transposed_multiplier",
        op="transposed",
        size=(2, 2, 2),
        multiplier=2,
        stride=(2, 2, 2),
        output_padding=(1, 0, 1),
    ),
]


def _check_differences(case: Case, path: str) -> None:
    inputs = [t.requires_grad_() for t in case.make(torch.float64)[:3]]

    def conv(*args: torch.Tensor) -> torch.Tensor:
        return ours(case, *args)

    with on(path):
        assert torch.autograd.gradcheck(conv, inputs, nondet_tol=0.0)
        assert torch.autograd.gradgradcheck(conv, inputs, nondet_tol=0.0)


@pytest.mark.parametrize("case", DIFFERENTIATED, ids=str)
def test_finite_differences(case: Case) -> None:
    """gradcheck and gradgradcheck: the three passes close under differentiation."""
    _check_differences(case, "direct")


def test_finite_differences_fft() -> None:
    stride = (1, 2, 1)
    case = Case("least", channels=2, size=(1, 2, 4), kernel=(1, 2, 3), padding=1, stride=stride)
    _check_differences(case, "fft")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", [c for c in select("smoke") if c.mode == "zeros"], ids=str)
def test_second_order_agrees_with_torch(case: Case, path: str) -> None:
    """The gradient of a gradient penalty, as in a critic's loss, in float64."""
    tensors = case.make(torch.float64)

    def penalty(conv) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
        x, weight, bias = (t.clone().requires_grad_() for t in tensors[:3])
        y = conv(case, x, weight, bias)
        gx, gw = torch.autograd.grad((y * tensors.grad).sin().sum(), (x, weight), create_graph=True)
        return list(torch.autograd.grad(gx.square().sum() + gw.square().sum(), (x, weight, bias)))

    with on(path):
        got = penalty(ours)
    for mine, theirs in zip(got, penalty(by_torch), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


NEEDS = {
    "x": "voxconv::depthwise_grad_input",
    "weight": "voxconv::depthwise_grad_weight",
    "bias": "voxconv::channel_sum",
}


@pytest.mark.parametrize("wanted", NEEDS)
def test_only_the_gradients_asked_for_are_computed(wanted: str) -> None:
    case = select("smoke")[0]
    tensors = case.make()
    leaf = getattr(tensors, wanted).requires_grad_()
    with on("direct"):
        y = ours(case, *tensors[:3])
        with ops_called() as called:
            (grad,) = torch.autograd.grad(y, leaf, tensors.grad)
    assert called & set(NEEDS.values()) == {NEEDS[wanted]}
    x, weight, bias = (t.detach().double() for t in tensors[:3])
    inputs = {"x": x, "weight": weight, "bias": bias}
    inputs[wanted].requires_grad_()
    y64 = reference(case, x, weight, bias)
    (oracle,) = torch.autograd.grad(y64, inputs[wanted], tensors.grad.double())
    torch.testing.assert_close(grad.double(), oracle, rtol=1e-4, atol=1e-4)


def test_no_graph_without_need() -> None:
    case = select("smoke")[0]
    x, weight, bias, _ = case.make()
    assert ours(case, x, weight, bias).grad_fn is None
    weight.requires_grad_()
    with torch.no_grad():
        assert ours(case, x, weight, bias).grad_fn is None
    with torch.inference_mode():
        assert ours(case, x, weight, bias).is_inference()


@pytest.mark.parametrize("path", PATHS)
def test_backward_runs_where_the_forward_was_chosen(path: str) -> None:
    """The choice is made once: a backward outside the context does not change kernels."""
    case = select("smoke")[0]
    x, weight, bias, grad = case.make()
    weight.requires_grad_()
    with on(path):
        y = ours(case, x, weight, bias)
        (inside,) = torch.autograd.grad(y, weight, grad, retain_graph=True)
    other = "direct" if path == "torch" else "torch"
    with on(other):
        (outside,) = torch.autograd.grad(y, weight, grad)
    assert torch.equal(inside, outside)


def test_gradients_accumulate_over_reuse() -> None:
    """One weight used twice, one input used twice."""
    case = Case("twice", channels=2, size=(4, 5, 6), padding=1)
    tensors = case.make(torch.float64)

    def twice(conv) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
        x, weight, bias = (t.clone().requires_grad_() for t in tensors[:3])
        y = conv(case, conv(case, x, weight, bias) + x, weight, None) * x
        y.backward(tensors.grad)
        return [x.grad, weight.grad, bias.grad]  # type: ignore[list-item]

    with on("direct"):
        got = twice(ours)
    for mine, theirs in zip(got, twice(reference), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def _plain_call(x: torch.Tensor) -> torch.Tensor:
    weight = torch.linspace(-1, 1, x.shape[-4] * 27, dtype=x.dtype).view(-1, 1, 3, 3, 3)
    return voxconv.depthwise_conv3d(x, weight, padding=1)


def test_nothing_is_recorded_where_no_gradient_is_wanted() -> None:
    x = torch.randn(2, 3, 4, 5, 6)
    assert _plain_call(x).grad_fn is None
    x.requires_grad_()
    assert _plain_call(x).grad_fn is not None
    with torch.no_grad():
        assert _plain_call(x).grad_fn is None


def _loss(x: torch.Tensor) -> torch.Tensor:
    return _plain_call(x).square().sum()


def test_other_derivatives_are_left_to_torch() -> None:
    """Forward mode and torch.func, which our functions do not have, unless they are asked for."""
    x, along = torch.randn(2, 2, 3, 4, 5, 6, dtype=torch.float64).unbind()
    x.requires_grad_()
    (expected,) = torch.autograd.grad(_loss(x), x)
    x.requires_grad_(False)
    torch.testing.assert_close(torch.func.grad(_loss)(x), expected)
    _, derivative = torch.func.jvp(_loss, (x,), (along,))
    torch.testing.assert_close(derivative, (expected * along).sum())
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(_loss(forward_ad.make_dual(x, along))).tangent
    torch.testing.assert_close(tangent, derivative)
    each = torch.func.vmap(torch.func.grad(_loss))(torch.stack([x, along]))
    torch.testing.assert_close(each[0], expected)
    with (
        voxconv.use_backend("cpu"),
        forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="jvp"),
    ):
        _plain_call(forward_ad.make_dual(x, along))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_of_the_forward_pass_is_a_loop() -> None:
    x = torch.randn(3, 2, 4, 5, 6, 7)
    torch.testing.assert_close(
        torch.func.vmap(_plain_call)(x),
        torch.stack([_plain_call(item) for item in x]),
        atol=0,
        rtol=0,
    )
