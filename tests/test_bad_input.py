# SPDX-License-Identifier: Apache-2.0
"""Every bad argument gets one clear error, with the numbers in it, before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import voxconv
from testing import on

X = torch.zeros(2, 3, 5, 6, 7)
W = torch.zeros(3, 1, 3, 3, 3)
B = torch.zeros(3)


def _row(error: type[Exception], *words: str, id: str, **changes: Any) -> Any:
    """A bad call: good arguments but for ``changes``; the message must have all of ``words``."""
    return pytest.param(changes, error, words, id=id)


def _call(function: Callable[..., torch.Tensor], changes: dict[str, Any]) -> torch.Tensor:
    return function(**{"input": X, "weight": W, "bias": B} | changes)


# Good arguments: x [2, 3, 5, 6, 7], weight [3, 1, 3, 3, 3], bias [3].
ANY_CONV = [
    _row(ValueError, "5, 6, 7", id="x_3d", input=torch.zeros(5, 6, 7)),
    _row(ValueError, "1, 2, 3, 5, 6, 7", id="x_6d", input=X[None]),
    _row(ValueError, "3, 3, 3, 3", id="weight_4d", weight=W[:, 0]),
    _row(ValueError, "3, 27", id="weight_2d", weight=torch.zeros(3, 27)),
    _row(ValueError, "4", "3", id="bias_length", bias=torch.zeros(4)),
    _row(ValueError, "3, 1", id="bias_2d", bias=torch.zeros(3, 1)),
    _row(ValueError, "stride", "0", id="stride_0", stride=0),
    _row(ValueError, "stride", "-2", id="stride_negative", stride=(1, -2, 1)),
    _row(ValueError, "stride", "(2, 2)", id="stride_2_long", stride=(2, 2)),
    _row(ValueError, "stride", "(1, 1, 1, 1)", id="stride_4_long", stride=(1, 1, 1, 1)),
    _row(TypeError, "stride", "1.5", "float", id="stride_float", stride=1.5),
    _row(TypeError, "stride", "2.0", id="stride_float_in_triple", stride=(1, 2.0, 1)),
    _row(TypeError, "stride", "'2'", id="stride_word", stride="2"),
    _row(TypeError, "stride", "None", id="stride_none", stride=None),
    _row(TypeError, "stride", "tensor(True)", id="stride_bool", stride=torch.tensor(True)),
    _row(TypeError, "stride", "bytes", id="stride_bytes", stride=b"\1\2\3"),
    _row(TypeError, "padding", "bytes", id="padding_bytes", padding=b"\1\2\3\4"),
    _row(ValueError, "padding", "pairs", id="padding_pairs_bytes", padding=[b"\1\2"] * 3),
    _row(ValueError, "dilation", "0", id="dilation_0", dilation=(1, 1, 0)),
    _row(ValueError, "dilation", "-1", id="dilation_negative", dilation=-1),
    _row(TypeError, "dilation", "0.5", id="dilation_float", dilation=0.5),
    _row(ValueError, "padding", "-1", id="padding_negative", padding=-1),
    _row(
        ValueError, "padding", "-3", id="padding_pair_negative", padding=((0, 0), (0, -3), (0, 0))
    ),
    _row(ValueError, "padding", "1, 1, 2, 2, 0, 0", id="padding_flat", padding=(1, 1, 2, 2, 0, 0)),
    _row(ValueError, "padding", "(1, 1)", id="padding_2_long", padding=(1, 1)),
    _row(ValueError, "padding", "(1, 2, 3)", id="padding_pair_3_long", padding=((1, 2, 3),) * 3),
    _row(TypeError, "padding", "1.0", id="padding_float", padding=1.0),
    _row(TypeError, "padding", "0.5", id="padding_pair_float", padding=((0, 0.5), (1, 1), (1, 1))),
    _row(ValueError, "padding", "full", id="padding_word", padding="full"),
    _row(TypeError, "list", id="x_list", input=[1.0, 2.0]),
    _row(TypeError, "nested", id="x_nested", input=torch.nested.nested_tensor([X[0], X[0]])),
    _row(TypeError, "ndarray", id="x_numpy", input=numpy.zeros((2, 3, 5, 6, 7), numpy.float32)),
    _row(TypeError, "NoneType", id="weight_none", weight=None),
    _row(TypeError, "float", id="bias_number", bias=1.0),
    _row(TypeError, "float32", "float64", id="weight_dtype", weight=W.double()),
    _row(TypeError, "float32", "bfloat16", id="bias_dtype", bias=B.bfloat16()),
    _row(TypeError, "float16", "float32", id="x_dtype", input=X.half()),
    _row(TypeError, "int64", id="integers", input=X.long(), weight=W.long(), bias=B.long()),
    _row(TypeError, "bool", id="bools", input=X.bool(), weight=W.bool(), bias=B.bool()),
    _row(ValueError, "cpu", "meta", id="weight_device", weight=W.to("meta")),
    _row(ValueError, "cpu", "meta", id="bias_device", bias=B.to("meta")),
    _row(ValueError, "0", id="kernel_empty", weight=torch.zeros(3, 1, 3, 0, 3)),
    _row(ValueError, "stride", "2**31", str(2**40), id="stride_huge", stride=2**40),
    _row(ValueError, "dilation", "2**31", id="dilation_huge", dilation=2**31, padding=2**31),
    _row(TypeError, "input", "sparse", id="input_sparse", input=X.to_sparse()),
    _row(TypeError, "bias", "sparse", id="bias_sparse", bias=B.to_sparse()),
    _row(ValueError, "0", id="x_empty_axis", input=torch.zeros(2, 3, 5, 0, 7)),
]

FORWARD = [
    _row(
        ValueError, "3, 2, 3, 3, 3", "3", id="weight_not_depthwise", weight=W.expand(3, 2, 3, 3, 3)
    ),
    _row(ValueError, "4", "3", id="weight_channels", weight=torch.zeros(4, 1, 3, 3, 3), bias=None),
    _row(ValueError, "2", "3", id="fewer_out", weight=torch.zeros(2, 1, 3, 3, 3), bias=None),
    _row(ValueError, "padding_mode", "mirror", id="mode_unknown", padding_mode="mirror"),
    _row(ValueError, "padding_mode", "2", id="mode_number", padding_mode=2),
    _row(ValueError, "reflect", "5", id="reflect", padding=(5, 1, 1), padding_mode="reflect"),
    _row(
        ValueError,
        "reflect",
        "(0, 7)",
        id="reflect_pair",
        padding=((0, 0), (1, 1), (0, 7)),
        padding_mode="reflect",
    ),
    _row(
        ValueError, "circular", "7", "6", id="circular", padding=(1, 7, 1), padding_mode="circular"
    ),
    _row(ValueError, "5, 6, 7", "9", id="empty_output", weight=torch.zeros(3, 1, 9, 3, 3)),
    _row(ValueError, "5, 6, 7", "11", id="empty_by_dilation", dilation=(1, 5, 1)),
    _row(ValueError, "padded", "2**31", id="padding_huge", padding=2**40),
    _row(ValueError, "bytes", "float32", id="output_huge", padding=2**18),
]

GROUPED = [
    _row(ValueError, "2", "3", id="groups_do_not_divide", groups=2),
    _row(ValueError, "0", id="groups_0", groups=0),
    _row(ValueError, "-3", id="groups_negative", groups=-3),
    _row(TypeError, "groups", "1.5", id="groups_float", groups=1.5),
]

DENSE = [
    _row(ValueError, "groups=3", id="groups_forgotten", groups=1),
]

TRANSPOSED = [
    _row(ValueError, "same", id="same", padding="same"),
    _row(ValueError, "valid", id="valid", padding="valid"),
    _row(ValueError, "4", "3", id="weight_channels", weight=torch.zeros(4, 1, 3, 3, 3), bias=None),
    _row(ValueError, "output_padding", "2", id="output_padding", stride=2, output_padding=2),
    _row(ValueError, "output_padding", "-1", id="output_padding_negative", output_padding=-1),
    _row(TypeError, "output_padding", "0.5", id="output_padding_float", output_padding=0.5),
    _row(ValueError, "5, 6, 7", "4", id="empty_output", padding=4),
]


class _Nothing(TorchDispatchMode):
    """Fails as soon as an op is dispatched."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise AssertionError(f"{func} ran before the arguments were checked")


def _refused(
    function: Callable[..., torch.Tensor],
    changes: dict[str, Any],
    error: type[Exception],
    words: tuple[str, ...],
) -> None:
    with pytest.raises(error) as caught, _Nothing():
        _call(function, changes)
    assert caught.type is error
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert len(message) < 400


@pytest.mark.parametrize(("changes", "error", "words"), ANY_CONV + FORWARD)
@pytest.mark.parametrize("path", [None, "direct", "torch"], ids=str)
def test_depthwise(
    path: str | None, changes: dict[str, Any], error: type[Exception], words: tuple[str, ...]
) -> None:
    with on(path):
        _refused(voxconv.depthwise_conv3d, changes, error, words)


@pytest.mark.parametrize(("changes", "error", "words"), ANY_CONV + FORWARD + GROUPED + DENSE)
def test_conv3d(changes: dict[str, Any], error: type[Exception], words: tuple[str, ...]) -> None:
    _refused(voxconv.conv3d, {"groups": 3} | changes, error, words)


@pytest.mark.parametrize(("changes", "error", "words"), ANY_CONV + GROUPED + TRANSPOSED)
def test_conv_transpose3d(
    changes: dict[str, Any], error: type[Exception], words: tuple[str, ...]
) -> None:
    _refused(voxconv.conv_transpose3d, {"groups": 3} | changes, error, words)


@pytest.mark.parametrize(("changes", "error", "words"), ANY_CONV + FORWARD)
def test_explain(changes: dict[str, Any], error: type[Exception], words: tuple[str, ...]) -> None:
    """What cannot run cannot be explained either, with the same words."""
    _refused(voxconv.explain, {"groups": 3} | changes, error, words)


@pytest.mark.parametrize("function", [voxconv.conv3d, voxconv.conv_transpose3d])
@pytest.mark.parametrize("groups", [None, 1.0, "3", True])
def test_groups_are_an_integer(function: Callable[..., torch.Tensor], groups: Any) -> None:
    with pytest.raises(TypeError, match="groups must be made of integers, got "):
        function(X, W, groups=groups)


def test_no_filters() -> None:
    with pytest.raises(ValueError, match=r"no filters: .*weight \(0, 3, 3, 3, 3\)"):
        voxconv.conv3d(X, torch.zeros(0, 3, 3, 3, 3))


def test_explain_knows_what_a_function_has() -> None:
    with pytest.raises(ValueError, match="conv_transpose3d has no padding_mode, got 'reflect'"):
        voxconv.explain(X, W, padding=1, padding_mode="reflect", transposed=True)
    with pytest.raises(ValueError, match=r"conv3d has no output_padding, got \(1, 0, 0\)"):
        voxconv.explain(X, W, output_padding=(1, 0, 0))


def test_the_good_arguments_are_good() -> None:
    assert _call(voxconv.depthwise_conv3d, {}).shape == (2, 3, 3, 4, 5)
    assert _call(voxconv.conv3d, {"groups": 3}).shape == (2, 3, 3, 4, 5)
    assert _call(voxconv.conv_transpose3d, {"groups": 3}).shape == (2, 3, 7, 8, 9)


@pytest.mark.parametrize(
    "integer",
    [pytest.param(numpy.int64(2), id="numpy"), pytest.param(torch.tensor(2), id="tensor")],
)
def test_what_counts_as_an_integer(integer: Any) -> None:
    expected = _call(voxconv.depthwise_conv3d, {"stride": 2, "padding": 2})
    got = _call(voxconv.depthwise_conv3d, {"stride": integer, "padding": (integer,) * 3})
    assert got.shape == expected.shape


def test_lists_are_triples() -> None:
    assert _call(
        voxconv.depthwise_conv3d, {"stride": [1, 2, 1], "padding": [[1, 1], [0, 2], [1, 0]]}
    ).shape == (2, 3, 5, 3, 6)


def test_sparse_and_quantised_tensors_do_not_crash() -> None:
    errors = (TypeError, ValueError, NotImplementedError)
    with pytest.raises(errors):
        voxconv.depthwise_conv3d(X.to_sparse(), W)
    with pytest.raises(errors):
        voxconv.depthwise_conv3d(X, W.to_sparse())
    with pytest.raises(errors):
        voxconv.depthwise_conv3d(torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), W)


GEOMETRY = ((1, 1, 1), (0, 0, 0, 0, 0, 0), (1, 1, 1), 0)


@pytest.mark.parametrize(
    ("op", "args"),
    [
        pytest.param("depthwise_forward", (X[0], W, None, *GEOMETRY), id="forward-4d"),
        pytest.param("depthwise_forward", (X, W.double(), None, *GEOMETRY), id="forward-dtype"),
        pytest.param("depthwise_forward", (X, W[:2], None, *GEOMETRY), id="forward-channels"),
        pytest.param("depthwise_forward", (X, W, B[:2], *GEOMETRY), id="forward-bias"),
        pytest.param(
            "depthwise_forward", (X, W, None, (0, 1, 1), *GEOMETRY[1:]), id="forward-stride"
        ),
        pytest.param("depthwise_forward", (X, W, None, (1, 1), *GEOMETRY[1:]), id="forward-triple"),
        pytest.param("depthwise_forward", (X, W, None, *GEOMETRY[:3], 7), id="forward-mode"),
        pytest.param("depthwise_forward", (X[..., :2], W, None, *GEOMETRY), id="forward-empty"),
        pytest.param("depthwise_forward", (X.long(), W.long(), None, *GEOMETRY), id="forward-int"),
        pytest.param("depthwise_grad_input", (X, W, (5, 6, 7), *GEOMETRY), id="grad_input-size"),
        pytest.param(
            "depthwise_grad_input", (X, W[:2], (7, 8, 9), *GEOMETRY), id="grad_input-weight"
        ),
        pytest.param("depthwise_grad_input", (X, W, (7, 8), *GEOMETRY), id="grad_input-pair"),
        pytest.param("depthwise_grad_weight", (X, X, (3, 3, 3), *GEOMETRY), id="grad_weight-size"),
        pytest.param(
            "depthwise_grad_weight", (X[:1], X, (1, 1, 1), *GEOMETRY), id="grad_weight-batch"
        ),
        pytest.param("depthwise_grad_weight", (X, X, (1, 1), *GEOMETRY), id="grad_weight-kernel"),
        pytest.param("channel_sum", (X[0],), id="channel_sum-4d"),
        pytest.param("channel_sum", (X.long(),), id="channel_sum-int"),
    ],
)
def test_raw_ops_guard_memory(op: str, args: tuple[Any, ...]) -> None:
    """Called past the checks, an op refuses what would make it read outside its tensors."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        getattr(torch.ops.voxconv, op)(*args)
