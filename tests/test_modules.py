# SPDX-License-Identifier: Apache-2.0
"""The modules are torch's in everything but the kernels: init, repr, state_dict, results."""

from __future__ import annotations

import copy
import io
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import voxconv
from voxconv import nn


def _arguments(in_channels: int, out_channels: int, kernel_size: Any, **more: Any) -> dict:
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "kernel_size": kernel_size,
    } | more


# Arguments that torch's modules take too.
CONV = {
    "dense": _arguments(3, 5, 3),
    "grouped": _arguments(4, 6, (1, 2, 3), groups=2, padding=1),
    "depthwise": _arguments(4, 4, 3, groups=4, padding=(0, 1, 2)),
    "multiplier": _arguments(3, 6, 3, groups=3, stride=2),
    "dilated": _arguments(4, 4, 3, groups=4, dilation=(1, 2, 1), bias=False),
    "same": _arguments(4, 4, (2, 3, 4), groups=4, padding="same"),
    "valid": _arguments(4, 4, 2, groups=4, padding="valid"),
    "reflect": _arguments(4, 4, 5, groups=4, padding=2, padding_mode="reflect"),
    "circular": _arguments(4, 4, 3, groups=4, padding="same", padding_mode="circular"),
}
TRANSPOSED = {
    "dense": _arguments(3, 5, 2, stride=2),
    "depthwise": _arguments(4, 4, 3, groups=4, padding=1),
    "multiplier": _arguments(3, 6, (2, 3, 4), groups=3, stride=(1, 2, 3)),
    "output_padding": _arguments(
        4, 4, 5, groups=4, stride=2, padding=2, output_padding=(1, 0, 1), bias=False
    ),
}
PAIRS = [
    pytest.param(nn.Conv3d, torch.nn.Conv3d, arguments, id=f"conv-{name}")
    for name, arguments in CONV.items()
] + [
    pytest.param(nn.ConvTranspose3d, torch.nn.ConvTranspose3d, arguments, id=f"transposed-{name}")
    for name, arguments in TRANSPOSED.items()
]


def _volume(channels: int, *, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, channels, 7, 6, 8, dtype=dtype)


def _close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(("ours", "theirs", "arguments"), PAIRS)
class TestLikeTorch:
    def test_init_is_bitwise_torchs(
        self, ours: type, theirs: type, arguments: dict[str, Any]
    ) -> None:
        torch.manual_seed(5)
        a = ours(**arguments)
        torch.manual_seed(5)
        b = theirs(**arguments)
        assert list(a.state_dict()) == list(b.state_dict())
        for key, value in b.state_dict().items():
            assert torch.equal(a.state_dict()[key], value)

    def test_repr_and_attributes(self, ours: type, theirs: type, arguments: dict[str, Any]) -> None:
        a, b = ours(**arguments), theirs(**arguments)
        assert isinstance(a, theirs)
        assert repr(a) == repr(b)
        for name in b.__constants__:
            assert getattr(a, name) == getattr(b, name), name
        assert a._reversed_padding_repeated_twice == b._reversed_padding_repeated_twice

    def test_state_dict_goes_both_ways(
        self, ours: type, theirs: type, arguments: dict[str, Any]
    ) -> None:
        a, b = ours(**arguments, dtype=torch.float64), theirs(**arguments, dtype=torch.float64)
        x = _volume(arguments["in_channels"])
        a.load_state_dict(b.state_dict())
        _close(a(x), b(x))
        c = theirs(**arguments, dtype=torch.float64)
        c.load_state_dict(a.state_dict())
        _close(a(x), c(x))

    def test_gradients(self, ours: type, theirs: type, arguments: dict[str, Any]) -> None:
        a, b = ours(**arguments, dtype=torch.float64), theirs(**arguments, dtype=torch.float64)
        a.load_state_dict(b.state_dict())
        x = _volume(arguments["in_channels"])
        xa, xb = x.clone().requires_grad_(), x.clone().requires_grad_()
        ya, yb = a(xa), b(xb)
        grad = torch.randn_like(yb)
        ya.backward(grad)
        yb.backward(grad)
        _close(ya, yb)
        _close(xa.grad, xb.grad)
        for pa, pb in zip(a.parameters(), b.parameters(), strict=True):
            _close(pa.grad, pb.grad)

    def test_copies(self, ours: type, theirs: type, arguments: dict[str, Any]) -> None:
        layer = ours(**arguments)
        x = _volume(arguments["in_channels"], dtype=torch.float32)
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        copies = [
            copy.deepcopy(layer),
            pickle.loads(pickle.dumps(layer)),
            torch.load(buffer, weights_only=False),
        ]
        for other in copies:
            assert type(other) is ours
            assert repr(other) == repr(layer)
            assert other.weight is not layer.weight
            assert torch.equal(other(x), layer(x))


def test_positional_arguments_are_in_torchs_order() -> None:
    conv = nn.Conv3d(4, 8, 3, 2, 1, 1, 4, False, "replicate", "cpu", torch.float64)
    assert repr(conv) == repr(torch.nn.Conv3d(4, 8, 3, 2, 1, 1, 4, False, "replicate"))
    assert conv.weight.dtype == torch.float64
    up = nn.ConvTranspose3d(4, 8, 3, 2, 1, 1, 4, False, 2, "zeros", "meta", torch.float16)
    assert repr(up) == repr(torch.nn.ConvTranspose3d(4, 8, 3, 2, 1, 1, 4, False, 2))
    assert up.weight.is_meta
    assert up.weight.dtype == torch.float16


@pytest.mark.parametrize("groups", [1, 4])
def test_pairs_of_padding(groups: int) -> None:
    padding = ((1, 0), (0, 2), (2, 1))
    layer = nn.Conv3d(4, 4, 3, padding=padding, groups=groups, dtype=torch.float64)
    x = _volume(4)
    want = F.conv3d(F.pad(x, (2, 1, 0, 2, 1, 0)), layer.weight, layer.bias, groups=groups)
    _close(layer(x), want)
    assert "padding=((1, 0), (0, 2), (2, 1))" in repr(layer)
    assert layer._reversed_padding_repeated_twice == [2, 1, 0, 2, 1, 0]


def test_even_pairs_become_torchs_triple() -> None:
    assert nn.Conv3d(1, 1, 3, padding=((1, 1), (2, 2), (0, 0))).padding == (1, 2, 0)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("stride", [2, (1, 2, 3)])
def test_same_with_stride(groups: int, stride: int | tuple[int, int, int]) -> None:
    layer = nn.Conv3d(4, 4, 4, stride, "same", groups=groups, dtype=torch.float64)
    x = _volume(4)
    strides = (stride,) * 3 if isinstance(stride, int) else stride
    y = layer(x)
    assert y.shape[2:] == tuple(-(-n // s) for n, s in zip(x.shape[2:], strides, strict=True))
    pads: list[int] = []
    for n, s in zip(reversed(x.shape[2:]), reversed(strides), strict=True):
        total = max((-(-n // s) - 1) * s + 4 - n, 0)
        pads += [total // 2, total - total // 2]
    _close(y, F.conv3d(F.pad(x, pads), layer.weight, layer.bias, strides, groups=groups))
    assert "padding=same" in repr(layer)


def test_transposed_pairs_cut_the_full_output() -> None:
    layer = nn.ConvTranspose3d(4, 4, 3, 2, ((1, 0), (0, 2), (1, 1)), groups=4, dtype=torch.float64)
    x = _volume(4)
    full = F.conv_transpose3d(x, layer.weight, layer.bias, 2, groups=4)
    _close(layer(x), full[:, :, 1:, :-2, 1:-1])


@pytest.mark.parametrize("name", TRANSPOSED)
def test_output_size(name: str) -> None:
    arguments = TRANSPOSED[name]
    ours = nn.ConvTranspose3d(**arguments, dtype=torch.float64)
    theirs = torch.nn.ConvTranspose3d(**arguments, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    x = _volume(arguments["in_channels"])
    with torch.no_grad():
        least = F.conv_transpose3d(
            x, theirs.weight, None, theirs.stride, theirs.padding, 0, theirs.groups
        ).shape[2:]
    size = [n + s - 1 for n, s in zip(least, theirs.stride, strict=True)]
    for wanted in (size, torch.Size(size), [2, 9, *size]):
        got = ours(x, output_size=wanted)
        assert list(got.shape[2:]) == size
        _close(got, theirs(x, list(wanted)))
    _close(ours(x[0], size), theirs(x, size)[0])


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((13, 11, 15), ("(13, 11, 15)", "from (13, 12, 16) to (14, 13, 17)")),
        ((15, 12, 16), ("(15, 12, 16)", "from (13, 12, 16) to (14, 13, 17)")),
        ((13, 12), ("(13, 12)", "3 or 5 elements")),
        ((1, 13, 12, 16), ("(1, 13, 12, 16)", "3 or 5 elements")),
    ],
)
def test_unreachable_output_size(size: tuple[int, ...], words: tuple[str, ...]) -> None:
    layer = nn.ConvTranspose3d(4, 4, (3, 2, 4), 2, (1, 0, 1), groups=4)
    with pytest.raises(ValueError, match="output_size") as caught:
        layer(torch.zeros(1, 4, 7, 6, 8), size)
    for word in words:
        assert word in str(caught.value)


class TestDepthwise:
    def test_is_a_conv3d(self) -> None:
        torch.manual_seed(3)
        layer = nn.DepthwiseConv3d(4, 3, 2, 1, 1, 2, False, "replicate", "cpu", torch.float64)
        torch.manual_seed(3)
        twin = torch.nn.Conv3d(
            4, 8, 3, 2, 1, groups=4, bias=False, padding_mode="replicate", dtype=torch.float64
        )
        assert isinstance(layer, nn.Conv3d)
        assert torch.equal(layer.weight, twin.weight)
        assert repr(layer) == f"Depthwise{twin!r}"
        x = _volume(4)
        _close(layer(x), twin(x))
        twin.load_state_dict(layer.state_dict())

    @pytest.mark.parametrize("multiplier", [1, 3])
    def test_one_channel(self, multiplier: int) -> None:
        layer = nn.DepthwiseConv3d(1, 3, padding=1, multiplier=multiplier, dtype=torch.float64)
        x = _volume(1)
        _close(layer(x), F.conv3d(x, layer.weight, layer.bias, padding=1))

    def test_other_channels(self) -> None:
        """As many as the weight could serve with another multiplier."""
        with pytest.raises(ValueError, match="1, 16, 5, 5, 5"):
            nn.DepthwiseConv3d(8, 3, multiplier=4)(torch.zeros(1, 16, 5, 5, 5))
        with pytest.raises(TypeError, match="multiplier"):
            nn.DepthwiseConv3d(8, 3, multiplier=1.5)

    def test_copies(self) -> None:
        layer = nn.DepthwiseConv3d(2, 3, padding=((0, 1), (1, 1), (2, 0)))
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(other) is nn.DepthwiseConv3d
            assert other.padding == layer.padding


LAYERS = [
    pytest.param(lambda **k: nn.Conv3d(4, 4, **{"kernel_size": 3} | k), id="conv"),
    pytest.param(lambda **k: nn.ConvTranspose3d(4, 4, **{"kernel_size": 3} | k), id="transposed"),
    pytest.param(lambda **k: nn.DepthwiseConv3d(4, **{"kernel_size": 3} | k), id="depthwise"),
]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("arguments", "error", "word"),
    [
        ({"kernel_size": 0}, ValueError, "kernel_size"),
        ({"kernel_size": (3, 3)}, ValueError, "(3, 3)"),
        ({"kernel_size": 3.0}, TypeError, "3.0"),
        ({"stride": 0}, ValueError, "stride"),
        ({"stride": (1, -1, 1)}, ValueError, "(1, -1, 1)"),
        ({"dilation": 0}, ValueError, "dilation"),
        ({"padding": -1}, ValueError, "-1"),
        ({"padding": "full"}, ValueError, "full"),
        ({"padding": (1, 1, 1, 1, 1, 1)}, ValueError, "(1, 1, 1, 1, 1, 1)"),
        ({"padding": 1.5}, TypeError, "1.5"),
        ({"padding_mode": "mirror"}, ValueError, "padding"),
    ],
)
def test_bad_arguments(layer: Any, arguments: dict, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=re.escape(word)):
        layer(**arguments)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: nn.ConvTranspose3d(4, 4, 3, padding="same"), "same"),
        (lambda: nn.ConvTranspose3d(4, 4, 3, padding_mode="circular"), "zeros"),
        (lambda: nn.Conv3d(4, 6, 3, groups=3), "groups"),
        (lambda: nn.DepthwiseConv3d(4, 3, multiplier=0), "multiplier"),
        (lambda: nn.DepthwiseConv3d(0, 3), "channels"),
        (lambda: nn.ConvTranspose3d(4, 4, 3, 2, output_padding=5), "output_padding"),
        (lambda: nn.ConvTranspose3d(4, 4, 3, 2, output_padding=-1), "output_padding"),
    ],
)
def test_more_bad_arguments(make: Any, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make()


@pytest.mark.parametrize(
    ("make", "error", "word"),
    [
        (lambda: nn.Conv3d(-1, 4, 3), ValueError, "in_channels must be at least 0, got -1"),
        (lambda: nn.Conv3d(4, -4, 3), ValueError, "out_channels must be at least 0, got -4"),
        (lambda: nn.Conv3d("2", 4, 3), TypeError, "in_channels must be made of integers, got '2'"),
        (lambda: nn.Conv3d(None, 4, 3), TypeError, "in_channels must be made of integers"),
        (lambda: nn.Conv3d(4, 4, 3, groups=2.0), TypeError, "groups must be made of integers"),
        (lambda: nn.ConvTranspose3d(4, 4, 3, groups=0), ValueError, "groups must be at least 1"),
        (lambda: nn.ConvTranspose3d(4, 4.0, 3), TypeError, "out_channels must be made of integers"),
    ],
)
def test_bad_channels(make: Any, error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=re.escape(word)):
        make()


@pytest.mark.parametrize("size", [13, "abc", ("a", "b", "c"), (13.0, 13, 13)])
def test_output_size_is_made_of_integers(size: Any) -> None:
    layer = nn.ConvTranspose3d(4, 4, 3, 2, groups=4)
    with pytest.raises(TypeError, match="output_size must be "):
        layer(torch.zeros(1, 4, 6, 6, 6), size)
    with pytest.raises(TypeError, match="input must be a tensor, got list"):
        layer([1.0], (13, 13, 13))


@pytest.mark.parametrize("layer", LAYERS)
def test_bad_input(layer: Any) -> None:
    made = layer()
    with pytest.raises(ValueError, match="1, 3, 5, 5, 5"):
        made(torch.zeros(1, 3, 5, 5, 5))
    with pytest.raises(ValueError, match="5, 5"):
        made(torch.zeros(5, 5))
    with pytest.raises(TypeError, match="float64"):
        made(torch.zeros(1, 4, 5, 5, 5, dtype=torch.float64))
    with pytest.raises(TypeError, match="list"):
        made([1.0])


@pytest.mark.parametrize("layer", LAYERS)
def test_layout_and_unbatched(layer: Any) -> None:
    made = layer()
    x = torch.randn(2, 4, 5, 6, 7)
    y = made(x)
    assert y.is_contiguous()
    last = made(x.contiguous(memory_format=torch.channels_last_3d))
    assert last.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(last, y)
    torch.testing.assert_close(made(x[1]), y[1])


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("layer", LAYERS)
def test_traces_where_no_derivative_is_wanted(layer: Any, tmp_path: Path) -> None:
    made, x = layer(), torch.randn(1, 4, 6, 7, 8)
    with torch.no_grad():
        traced = torch.jit.trace(made, x)
        traced.save(tmp_path / "layer.pt")
        assert torch.equal(torch.jit.load(tmp_path / "layer.pt")(x), made(x))


def test_modules_ask_the_public_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module holds parameters only: `use_backend` and autocast reach it."""
    layer = nn.Conv3d(4, 4, 3, groups=4)
    x = torch.randn(1, 4, 5, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with voxconv.use_backend("triton"), pytest.raises(NotImplementedError, match="triton"):
        layer(x)


def test_a_subclass_written_for_torch_gets_our_kernels() -> None:
    class Standardised(nn.Conv3d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3, 4), keepdim=True)
            return self._conv_forward(input, weight, self.bias)

    layer = Standardised(4, 4, 3, groups=4)
    with voxconv.use_backend("triton"), pytest.raises(NotImplementedError, match="triton"):
        layer(torch.randn(1, 4, 5, 5, 5))
