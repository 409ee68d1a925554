# SPDX-License-Identifier: Apache-2.0
"""`convert` changes what runs and nothing else; `revert` undoes it; both say what they did."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import voxconv
from voxconv import _ops
from voxconv._dilated_rule import _NATIVE
from voxconv.convert import ConvertReport, Layer, convert, revert

compiled = pytest.mark.skipif(not _ops.has_cpu(), reason="needs the compiled part")


class Net(nn.Module):
    """A U-Net in small: depthwise and dense, down and up, with a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 4, 1)
        self.enter = nn.Conv3d(4, 4, 5, padding=2, groups=4)
        self.norm = nn.GroupNorm(2, 4)
        self.down = nn.Conv3d(4, 8, 3, stride=2, padding=1, groups=4)
        self.mix = nn.Sequential(nn.Conv3d(8, 16, 1), nn.GELU(), nn.Conv3d(16, 8, 1))
        self.up = nn.ConvTranspose3d(
            8, 8, 3, stride=2, padding=1, output_padding=1, groups=8, bias=False
        )
        self.merge = nn.ConvTranspose3d(8, 4, 1)
        self.leave = nn.Conv3d(
            4, 4, (3, 1, 3), padding=(1, 0, 1), groups=4, padding_mode="replicate"
        )
        self.head = nn.Conv3d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.norm(self.enter(self.stem(x)))
        x = self.merge(self.up(self.mix(self.down(skip))))
        return self.head(self.leave(x + skip))


DEPTHWISE = ["enter", "down", "up", "leave"]
DENSE = ["stem", "mix.0", "mix.2", "merge", "head"]


def _names(layers: tuple[Layer, ...]) -> list[str]:
    return [layer.name for layer in layers]


def _step(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    y = model(x)
    F.mse_loss(y, torch.ones_like(y)).backward()
    return y.detach(), {key: p.grad.clone() for key, p in model.named_parameters()}


def _classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@compiled
class TestByDefault:
    def test_swaps_what_our_kernels_run(self) -> None:
        model = Net()
        report = convert(model)
        assert isinstance(report, ConvertReport)
        assert _names(report.swapped) == DEPTHWISE
        assert _names(report.left) == DENSE
        assert report.total == 9
        assert all(layer.reason.startswith("cpu") for layer in report.swapped)
        assert all("one tap" in layer.reason for layer in report.left)
        for name in DEPTHWISE:
            assert type(model.get_submodule(name)).__module__.startswith("voxconv")
        for name in DENSE:
            assert type(model.get_submodule(name)).__module__.startswith("torch")

    def test_report_text(self) -> None:
        text = str(convert(Net()))
        assert text.startswith("voxconv.convert: 4 of 9 3-D convolutions swapped\n")
        assert "1 x  Conv3d(4, 4, k=5, groups=4)" in text
        assert "ConvTranspose3d(8, 8, k=3, stride=2, groups=8)" in text
        assert "Conv3d(4, 4, k=3x1x3, groups=4)" in text
        assert "5 x  torch: a kernel of one tap is a matrix product  stem, mix.0, mix.2 and" in text
        assert max(map(len, text.splitlines())) <= 120

    def test_forced_backend_does_not_matter(self) -> None:
        with voxconv.use_backend("torch"):
            assert _names(convert(Net()).swapped) == DEPTHWISE

    @pytest.mark.parametrize("device", ["cpu", "meta"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_dtypes_and_devices(self, dtype: torch.dtype, device: str) -> None:
        swapped = _names(convert(Net().to(device, dtype)).swapped)
        if _NATIVE[dtype] or dtype == torch.float64:
            assert swapped == DEPTHWISE
        else:  # torch has no quick matrix product either
            assert len(swapped) == 9

    def test_dense_layers_with_a_pass_of_ours(self) -> None:
        layers = [nn.Conv3d(c, c, (5, 3, 3), padding=4, dilation=4) for c in (5, 64)]
        layers += [nn.Conv3d(64, 64, (5, 3, 3)), nn.Conv3d(64, 64, 3)]
        report = convert(nn.Sequential(*layers))
        assert _names(report.swapped) == ["0", "1", "3"]
        assert report.swapped[0].reason == "cpu, dilated"
        assert report.swapped[1].reason.startswith("cpu, dilated: grad_input and grad_weight,")
        assert "oneDNN" in report.left[0].reason

    def test_unknown_dtype_is_left(self) -> None:
        report = convert(nn.Conv3d(2, 2, 3, groups=2, dtype=torch.complex64))
        assert not report.swapped
        assert "complex64" in report.left[0].reason


def test_without_the_compiled_part_nothing_is_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ops, "_missing", "lost in the post")
    report = convert(nn.Conv3d(7, 7, 3, groups=7))  # no other test has this shape: see the cache
    assert not report.swapped
    assert "lost in the post" in report.left[0].reason
    assert "(the model itself)" in str(report)


def test_values_and_gradients_stay() -> None:
    model = Net().double()
    x = torch.randn(2, 1, 8, 6, 10, dtype=torch.float64)
    y, grads = _step(model, x)
    report = convert(model, everything=True)
    assert len(report.swapped) == 9
    assert not report.left
    got, got_grads = _step(model, x)
    torch.testing.assert_close(got, y, rtol=1e-9, atol=1e-10)
    for key, grad in grads.items():
        torch.testing.assert_close(got_grads[key], grad, rtol=1e-7, atol=1e-10)


def test_float32_and_channels_last() -> None:
    model = Net()
    x = torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad():
        y = model(x)
        convert(model, everything=True)
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
        model.to(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)


def test_everything_else_stays() -> None:
    model = Net().eval()
    model.enter.train()
    model.down.weight.requires_grad_(False)
    model.enter.note = "mine"
    seen: list[str] = []
    model.enter.register_forward_hook(lambda *_: seen.append("forward"))
    model.enter.register_full_backward_hook(lambda *_: seen.append("backward"))
    parameters = list(model.parameters())
    keys = list(model.state_dict())
    text = repr(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    convert(model, everything=True)

    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys
    assert repr(model) == text
    assert model.enter.training
    assert not model.down.training
    assert model.enter.note == "mine"
    before = model.enter.weight.clone()
    _step_with_frozen(model)
    assert seen == ["forward", "backward"]
    optimizer.step()
    assert not torch.equal(before, model.enter.weight)


def _step_with_frozen(model: nn.Module) -> None:
    model(torch.randn(1, 1, 6, 6, 6)).square().mean().backward()
    assert model.down.weight.grad is None


def test_checkpoints_cross_over() -> None:
    plain, swapped = Net(), Net()
    convert(swapped, everything=True)
    swapped.load_state_dict(plain.state_dict())
    plain.load_state_dict(swapped.state_dict())


def test_a_converted_model_can_be_copied() -> None:
    model = Net()
    convert(model, everything=True)
    x = torch.randn(1, 1, 6, 6, 6)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert _classes(other) == _classes(model)
        assert torch.equal(other(x), model(x))


def test_a_converted_model_compiles_in_one_graph() -> None:
    model = Net()
    x = torch.randn(1, 1, 6, 6, 6)
    y = model(x)
    convert(model, everything=True)
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, y, rtol=1e-4, atol=1e-5)
    got.sum().backward()
    assert model.enter.weight.grad is not None


def test_twice_is_once() -> None:
    model = Net()
    convert(model, everything=True)
    classes = _classes(model)
    report = convert(model, everything=True)
    assert _classes(model) == classes
    assert not report.swapped
    assert {layer.reason for layer in report.left} == {"voxconv's already"}


def test_dry_run_changes_nothing() -> None:
    model = Net()
    classes = _classes(model)
    dry = convert(model, dry_run=True, everything=True)
    assert _classes(model) == classes
    assert dry.dry_run
    assert "9 of 9 3-D convolutions would be swapped" in str(dry)
    assert convert(model, everything=True).swapped == dry.swapped
    classes = _classes(model)
    assert len(revert(model, dry_run=True).swapped) == 9
    assert _classes(model) == classes


def test_only() -> None:
    model = Net()
    report = convert(model, everything=True, only=lambda name, layer: "mix" in name)
    assert _names(report.swapped) == ["mix.0", "mix.2"]
    assert {layer.reason for layer in report.left} == {"ruled out by `only`"}


@pytest.mark.parametrize(
    "conv", [nn.Conv3d(2, 2, 3, groups=2), nn.ConvTranspose3d(2, 2, 3, groups=2)]
)
def test_the_model_is_a_convolution(conv: nn.Module) -> None:
    conv = copy.deepcopy(conv)
    twin = copy.deepcopy(conv)
    x = torch.randn(1, 2, 5, 5, 5)
    assert convert(conv, everything=True).total == 1
    assert type(conv) is getattr(voxconv.nn, type(twin).__name__)
    torch.testing.assert_close(conv(x), twin(x))
    revert(conv)
    assert type(conv) is type(twin)


def test_shared_layer_counts_once() -> None:
    conv = nn.Conv3d(2, 2, 3, groups=2)
    assert convert(nn.Sequential(conv, nn.ReLU(), conv), everything=True).total == 1


def test_no_convolutions() -> None:
    report = convert(nn.Sequential(nn.Conv2d(1, 1, 3), nn.Linear(2, 2)))
    assert str(report) == "voxconv.convert: 0 of 0 3-D convolutions swapped"


@compiled
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv3d(4, 4, 3, padding=40, padding_mode="reflect", groups=4),
        nn.Conv3d(4, 4, 3, padding=40, padding_mode="circular", groups=4),
        nn.ConvTranspose3d(4, 4, 3, padding=20, groups=4),
    ],
    ids=["reflect", "circular", "transposed"],
)
def test_much_padding(layer: nn.Module) -> None:
    assert len(convert(nn.Sequential(layer)).swapped) == 1


@compiled
@pytest.mark.parametrize("name", ["stride", "padding", "dilation", "kernel_size"])
def test_a_number_in_place_of_three(name: str) -> None:
    """What was set by hand, as torch's forward takes it."""
    model = nn.Sequential(nn.Conv3d(4, 4, 3, padding=1, groups=4))
    setattr(model[0], name, 3 if name == "kernel_size" else 2)
    x = torch.randn(1, 4, 7, 8, 9)
    before = model(x)
    assert len(convert(model).swapped) == 1
    torch.testing.assert_close(model(x), before)
    assert len(revert(model).swapped) == 1
    assert torch.equal(model(x), before)


class TestLeftAlone:
    def _reason(self, layer: nn.Module) -> str:
        kind = type(layer)
        report = convert(nn.Sequential(layer), everything=True)
        assert not report.swapped
        assert type(layer) is kind
        return report.left[0].reason

    def test_subclass(self) -> None:
        class Standardised(nn.Conv3d):
            def forward(self, input: Tensor) -> Tensor:
                return super().forward(input - input.mean())

        assert self._reason(Standardised(2, 2, 3)) == "a subclass of Conv3d"

    def test_replaced_forward(self) -> None:
        conv = nn.Conv3d(2, 2, 3)
        conv.forward = lambda x: x  # type: ignore[method-assign]
        assert self._reason(conv) == "its forward was replaced"

    def test_lazy(self) -> None:
        lazy = nn.LazyConv3d(2, 3)
        assert self._reason(lazy) == "lazy: run the model once first"
        lazy(torch.zeros(1, 3, 4, 4, 4))
        assert len(convert(lazy, everything=True).swapped) == 1


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.int8])
def test_types_that_no_call_takes(dtype: torch.dtype) -> None:
    layer = nn.Conv3d(4, 4, 3, groups=4)
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    report = convert(nn.Sequential(nn.Conv3d(4, 4, 3, groups=4), layer), everything=True)
    assert _names(report.swapped) == ["0"]
    assert str(dtype) in report.left[0].reason


class TestParametrized:
    def test_parametrization(self) -> None:
        class Positive(nn.Module):
            def forward(self, w: Tensor) -> Tensor:
                return w.abs()

        conv = nn.Conv3d(3, 3, 3, groups=3)
        parametrize.register_parametrization(conv, "weight", Positive())
        twin = copy.deepcopy(conv)
        x = torch.randn(1, 3, 5, 5, 5)
        keys = list(conv.state_dict())
        assert len(convert(conv, everything=True).swapped) == 1
        assert isinstance(conv, voxconv.nn.Conv3d)
        assert not isinstance(twin, voxconv.nn.Conv3d)
        assert parametrize.is_parametrized(conv, "weight")
        assert list(conv.state_dict()) == keys
        torch.testing.assert_close(conv(x), twin(x))
        conv(x).sum().backward()
        assert conv.parametrizations.weight.original.grad is not None
        other = copy.deepcopy(conv)
        assert torch.equal(other(x), conv(x))
        assert not convert(conv, everything=True).swapped

        revert(other)
        assert parametrize.type_before_parametrizations(other) is nn.Conv3d
        torch.testing.assert_close(other(x), twin(x))

        parametrize.remove_parametrizations(conv, "weight")
        assert type(conv) is voxconv.nn.Conv3d
        torch.testing.assert_close(conv(x), twin(x))

    @pytest.mark.parametrize(
        "norm",
        [
            parametrizations.weight_norm,
            parametrizations.spectral_norm,
            nn.utils.spectral_norm,
            pytest.param(
                nn.utils.weight_norm,
                marks=pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
            ),
        ],
    )
    def test_norms(self, norm: object) -> None:
        conv = norm(nn.Conv3d(3, 3, 3, groups=3)).eval()  # type: ignore[operator]
        x = torch.randn(1, 3, 5, 5, 5)
        y = conv(x)
        assert len(convert(conv, everything=True).swapped) == 1
        torch.testing.assert_close(conv(x), y)
        conv.train()(x).sum().backward()
        revert(conv)
        assert not isinstance(conv, voxconv.nn.Conv3d)
        conv(x)


class TestRevert:
    def test_undoes_convert(self) -> None:
        model = Net()
        classes, text = _classes(model), repr(model)
        parameters = list(model.parameters())
        x = torch.randn(1, 1, 6, 6, 6)
        y = model(x)
        convert(model, everything=True)
        report = revert(model)
        assert len(report.swapped) == 9
        assert str(report).startswith("voxconv.revert: 9 of 9 3-D convolutions swapped")
        assert _classes(model) == classes
        assert repr(model) == text
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
        assert torch.equal(model(x), y)

    def test_takes_back_ours_and_leaves_torchs(self) -> None:
        model = nn.Sequential(
            nn.Conv3d(2, 2, 3), voxconv.nn.DepthwiseConv3d(2, 3, padding=((1, 1),) * 3)
        )
        x = torch.randn(1, 2, 6, 6, 6)
        y = model(x)
        report = revert(model)
        assert _names(report.swapped) == ["1"]
        assert not report.left
        assert type(model[1]) is nn.Conv3d
        torch.testing.assert_close(model(x), y)

    @pytest.mark.parametrize(
        "layer",
        [
            voxconv.nn.Conv3d(2, 2, 3, padding=((0, 1),) * 3),
            voxconv.nn.DepthwiseConv3d(2, 3, stride=2, padding="same"),
            voxconv.nn.ConvTranspose3d(2, 2, 3, padding=((0, 1), (0, 0), (0, 0))),
        ],
    )
    def test_leaves_what_torch_cannot_do(self, layer: nn.Module) -> None:
        kind = type(layer)
        report = revert(layer)
        assert type(layer) is kind
        assert report.left[0].reason == "torch has no such padding"


@pytest.mark.parametrize("function", [convert, revert])
def test_not_a_model(function: object) -> None:
    with pytest.raises(TypeError, match="Tensor"):
        function(torch.zeros(1))  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_model() -> None:
    scripted = torch.jit.trace(nn.Conv3d(1, 1, 1), torch.zeros(1, 1, 2, 2, 2))
    with pytest.raises(TypeError, match="scripted"):
        convert(scripted)
