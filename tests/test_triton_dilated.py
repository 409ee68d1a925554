# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of convolutions whose outputs read many channels: values by Triton's
interpreter, and machine code for GPUs that are not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import voxconv
from cases import CHANNELS_LAST, LAYOUTS, MODES, NCDHW, Case, Tensors
from dense_cases import BY_NAME, MODELS, SMALL
from testing import (
    DTYPES,
    all_passes,
    assert_case,
    bitwise_equal,
    dtype_id,
    on,
    ops_called,
    reference,
)
from testing import ours as public
from voxconv import _dispatch
from voxconv._dispatch import Choice, Problem
from voxconv._geometry import Geometry
from voxconv.autograd import Plan
from voxconv.autograd_dilated import dilated_forward, dilated_grad_input

pytest.importorskip("triton")
import triton.language as tl
from voxconv.triton_kernels import dilated
from voxconv.triton_kernels import dilated_plan as plan
from voxconv.triton_kernels.depthwise_plan import Axis
from voxconv.triton_kernels.dilated_plan import Config

from test_triton import _compiled
from triton_on_cpu import interpreted

TRITON = Plan(*("dilated_triton",) * 3, channel_sum="triton", activates=True)
LAST = ("odd", "wide", "groups", "stride_dilation_pairs", "reflect", "vectors", "up_groups")


def _geometry(case: Case) -> Geometry:
    pads = tuple(side for pair in case.pads for side in pair)
    return Geometry(case.kernel, case.stride, pads, case.dilation, MODES.index(case.mode))


def ours(
    case: Case, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if case.transposed:
        size = case.out_size
        return dilated_grad_input(x, weight, size, _geometry(case), case.groups, TRITON, bias)
    return dilated_forward(x, weight, bias, _geometry(case), case.groups, TRITON)


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    with interpreted():
        yield


@pytest.fixture
def whole() -> Iterator[None]:
    """Sums are not cut into parts."""
    with mock.patch.object(plan, "PROGRAMS", 1):
        yield


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_rows(case: Case) -> None:
    assert_case(case, case.make(), torch.float32, ours, versus_torch=True)


@pytest.mark.parametrize("name", LAST)
def test_channels_last(name: str) -> None:
    case = BY_NAME[name]
    tensors = case.make(layout=CHANNELS_LAST)
    assert_case(case, tensors, torch.float32, ours, versus_torch=True)
    y = ours(case, *tensors[:3])
    assert y.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("name", ["odd", "groups", "replicate", "up_phases"])
def test_sums_in_one_part(name: str) -> None:
    case = BY_NAME[name]
    assert_case(case, case.make(), torch.float32, ours, versus_torch=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32], ids=dtype_id)
@pytest.mark.parametrize("name", ["odd", "vectors", "circular_stride", "up_groups"])
def test_other_dtypes(name: str, dtype: torch.dtype, layout: str) -> None:
    case = BY_NAME[name]
    assert_case(case, case.make(dtype, layout=layout), dtype, ours, versus_torch=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("activation", range(5))
def test_activations(activation: int, dtype: torch.dtype) -> None:
    """By the kernel that makes whole sums and by the one that adds parts."""
    case = replace(BY_NAME["groups"], n=1)
    tensors = case.make(dtype)
    tensors.x[0, 0, 0, 0, 0] = torch.nan
    then: Callable[[torch.Tensor], torch.Tensor] = (
        lambda x: x, F.relu, F.leaky_relu, F.gelu, F.silu,
    )[activation]  # fmt: skip
    expected = then(reference(case, *tensors[:3]))
    for programs in (1, plan.PROGRAMS):
        with mock.patch.object(plan, "PROGRAMS", programs):
            got = dilated.dilated_forward(
                *tensors[:3], *_geometry(case)[1:], case.groups, activation
            )
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", ["stride_dilation_pairs", "replicate", "up_groups"])
def test_any_strides(name: str) -> None:
    case = BY_NAME[name]
    tensors = case.make()
    wide = [
        t.repeat_interleave(2, -1).transpose(-1, -2).contiguous() for t in tensors if t.dim() == 5
    ]
    x, weight, grad = (t[..., ::2, :].transpose(-1, -2) for t in wide)
    assert not x.is_contiguous()
    assert_case(
        case, Tensors(x, weight, tensors.bias, grad), torch.float32, ours, versus_torch=True
    )


@pytest.mark.parametrize("name", ["odd", "stride_dilation_pairs", "up"])
def test_the_same_bits_each_time(name: str) -> None:
    case = BY_NAME[name]
    first, second = (all_passes(ours, case, case.make()) for _ in range(2))
    assert all(bitwise_equal(first[which], second[which]) for which in first)


@pytest.mark.parametrize("name", ["odd", "stride_dilation_pairs"])
def test_infinities_reach_what_reads_them(name: str) -> None:
    """All else keeps every bit."""
    case = BY_NAME[name]
    tensors, mark = case.make(), case.make()
    clean = ours(case, *case.make()[:3])
    tensors.x[0, 0, -1, 1, 0] = torch.inf
    mark.x.zero_()[0, 0, -1, 1, 0] = 1
    touched = reference(case, mark.x, torch.ones_like(mark.weight), None) != 0
    got = ours(case, *tensors[:3])
    assert 0 < touched.sum() < touched.numel()
    assert torch.equal(~got.isfinite(), touched)
    assert torch.equal(got[~touched], clean[~touched])


@pytest.mark.parametrize("name", ["odd", "reflect", "up_groups"])
def test_empty_batch(name: str) -> None:
    case = replace(BY_NAME[name], n=0)
    got = all_passes(ours, case, case.make())
    for which, expected in all_passes(reference, case, case.make()).items():
        assert torch.equal(got[which], expected), which


def test_offsets_of_64_bits() -> None:
    case = BY_NAME["stride_dilation_pairs"]
    with mock.patch.object(dilated, "_offset", return_value=tl.int64):
        assert_case(case, case.make(), torch.float32, ours, versus_torch=True)
    for depth, offset in ((63, tl.int32), (64, tl.int64)):
        x = torch.empty(1, 32, depth, 2**10, 2**10, device="meta")
        assert dilated._offset(x, x[:, :1]) == offset


def test_other_paddings_of_grad_input_are_refused() -> None:
    case = BY_NAME["replicate"]
    _, weight, _, grad = case.make()
    geometry = _geometry(case)[1:]
    with pytest.raises(NotImplementedError, match="zeros"):
        dilated.dilated_grad_input(grad, weight, case.size, *geometry, 1, None)


def test_tf32_where_torch_has_it() -> None:
    """The switch of torch for convolutions decides, and nobody else's."""
    x = torch.empty(1)
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        for precision in ("tf32", "ieee"):
            torch.backends.cudnn.conv.fp32_precision = precision
            expected = "tf32" if precision == "tf32" else "float32"
            assert dilated._kind(x) == expected
            assert dilated._kind(x.double()) == "float64"
            assert dilated._kind(x.half()) == dilated._kind(x.bfloat16()) == "half"
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.parametrize("name", ["odd", "groups", "up_groups"])
def test_public_functions(name: str) -> None:
    case = BY_NAME[name]
    tensors = case.make()
    with on("dilated_triton", "triton"), ops_called() as called:
        got = all_passes(public, case, tensors)
    ran = {name.removeprefix("voxconv::") for name in called if name.startswith("voxconv::")}
    passes = ("forward", "grad_input", "grad_weight")
    expected = {f"dilated_{which}_triton" for which in passes[case.transposed :]}
    assert expected <= ran <= {f"dilated_{w}_triton" for w in passes} | {"channel_sum_triton"}
    for which, value in all_passes(ours, case, tensors).items():
        assert bitwise_equal(got[which], value), which


def test_second_derivatives() -> None:
    case = replace(BY_NAME["groups"], n=1, size=(2, 2, 3), kernel=(1, 2, 2))
    x, weight, bias, _ = (t.requires_grad_() for t in case.make(torch.float64))
    assert torch.autograd.gradgradcheck(partial(ours, case), (x, weight, bias), fast_mode=True)


# What is chosen.


def _choice(forced: str | None = None, case: Case | None = None, **changes: Any) -> Choice:
    case = case or BY_NAME["meshnet_21_d4@256"]
    fields = {
        "op": "forward",
        "device": "cuda",
        "dtype": torch.bfloat16,
        "x_shape": (case.n, case.channels, *case.size),
        "weight_shape": case.weight_shape,
        "geometry": _geometry(case),
        "depthwise": False,
        "missing": {"cuda": "built without CUDA"},
    }
    return _dispatch.choose(Problem(**fields | changes), forced)  # type: ignore[arg-type]


FEW, EVEN = BY_NAME["meshnet_21_d4@256"], BY_NAME["highresnet_64_d4@96"]
OURS, TORCH = ("triton", "dilated_triton"), ("torch", "conv3d")


@pytest.mark.parametrize(
    ("case", "changes", "expected", "words"),
    [
        (FEW, {}, OURS, "multiples of 8"),
        (FEW, {"dtype": torch.float32}, TORCH, "left to cuDNN"),
        (EVEN, {}, TORCH, "left to cuDNN"),
        (replace(FEW, dilation=(1, 1, 1), padding=1), {}, TORCH, "left to cuDNN"),
        (replace(FEW, dilation=(1, 1, 1), mode="reflect"), {}, TORCH, "left to cuDNN"),
        (FEW, {"missing": {"triton": "Triton is not installed"}}, TORCH, "not installed"),
        (FEW, {"dtype": torch.complex64}, TORCH, "complex64"),
    ],
)
def test_a_gpu_keeps_what_cudnn_is_good_at(
    case: Case, changes: dict[str, Any], expected: tuple[str, str], words: str
) -> None:
    choice = _choice(None, case, **changes)
    assert choice[:2] == expected
    assert words in choice.reason


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("version", [90701, 90800, 91002, 91500, None])
def test_versions_of_cudnn_that_torch_does_not_use_for_halves(
    version: int | None, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    fallback = version in (90800, 91002) and not channels_last
    choice = _choice(None, EVEN, channels_last=channels_last)
    assert choice[:2] == (OURS if fallback else TORCH)
    assert not fallback or str(version) in choice.reason
    pointwise = replace(EVEN, kernel=(1, 1, 1), padding=0)
    for case, changes in ((EVEN, {"dtype": torch.float32}), (pointwise, {})):
        assert _choice(None, case, channels_last=channels_last, **changes)[:2] == TORCH


@pytest.mark.parametrize("case", [FEW, EVEN], ids=str)
def test_backends_asked_for_on_a_gpu(case: Case) -> None:
    assert _choice("triton", case)[:2] == OURS
    assert _choice("torch", case)[:2] == TORCH
    with pytest.raises(NotImplementedError, match="not depthwise"):
        _choice("cuda", case)
    with pytest.raises(NotImplementedError, match="not installed"):
        _choice("triton", case, missing={"triton": "Triton is not installed"})


def test_fake_tensors_of_a_gpu() -> None:
    """Shapes are worked out for a GPU that is not there, as torch.compile does it."""
    with FakeTensorMode():
        x = torch.empty(2, 4, 6, 7, 8, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(6, 4, 3, 3, 3, device="cuda", dtype=torch.bfloat16)
        with voxconv.use_backend("triton"), ops_called() as called:
            y = voxconv.conv3d(x, weight, stride=2, padding=1, activation="relu")
            z = voxconv.conv_transpose3d(y, weight, stride=2, padding=1)
        explained = voxconv.explain(x, weight, padding=2, dilation=2)
    assert y.shape == (2, 6, 3, 4, 4)
    assert z.shape == (2, 4, 5, 7, 7)
    assert {"voxconv::dilated_forward_triton", "voxconv::dilated_grad_input_triton"} <= called
    assert explained.kernel == "dilated_triton"
    assert "multiples of 8" in str(explained)


def _axes(case: Case) -> tuple[Axis, Axis, Axis]:
    size, out = (case.out_size, case.size) if case.transposed else (case.size, case.out_size)
    axes = zip(size, out, case.kernel, case.stride, case.dilation, case.pads, strict=True)
    d, h, w = (Axis(*axis[:-1], axis[-1][0]) for axis in axes)
    return d, h, w


def _cuts(case: Case, kind: str, align: int) -> Iterator[tuple[str, plan.Cut, list[plan.Cut]]]:
    """By pass: the plan, and those of its variants."""
    axes, groups = _axes(case), case.groups
    source, target = case.channels // groups, case.filters // groups
    if case.transposed:
        source, target = target, source
    back = tuple(axis._replace(source=axis.target, target=axis.source) for axis in axes)
    for which, problem in (
        ("forward", (axes, (1, 1, 1), case.n, groups, target, source, kind)),
        ("grad_input", (back, case.stride, case.n, groups, source, target, kind)),
    ):
        own = plan.correlate(*problem, align)
        yield which, own, [plan.cut(c, *problem) for c in plan.variants(own.config, kind)]
    problem = (axes, case.n, groups, target, source, kind)
    own = plan.weight(*problem)
    tiles = plan.variants(own.config, kind)
    yield "grad_weight", own, [plan.weight_cut(c, *problem) for c in tiles]


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("kind", plan.KINDS)
@pytest.mark.parametrize("case", MODELS, ids=str)
def test_plans(case: Case, kind: str, align: int) -> None:
    """Tiles that Triton can make, enough programs, little scratch; and the order of the sums does
    not depend on a choice among variants."""
    for which, own, others in _cuts(case, kind, align):
        config = own.config
        assert others[0] == own
        assert config.sums <= 64
        assert config.rows >= 16
        assert config.columns >= 16
        assert config.terms >= 16, "Triton 3.6 has no shorter products"
        assert 1 <= own.grid < 2**31
        assert {(c.config.terms, c.splits) for c in others} == {(config.terms, own.splits)}
        cells = case.channels * case.filters // case.groups * case.taps
        if which != "grad_weight":
            size = case.out_size if (which == "forward") != case.transposed else case.size
            channels = case.filters if (which == "forward") != case.transposed else case.channels
            cells = case.n * channels * size[0] * size[1] * size[2]
        scratch = own.splits * cells * (8 if kind == "float64" else 4)
        assert own.splits == 1 or scratch <= 64 << 20
        assert own.grid >= plan.PROGRAMS / 2 or case.size[0] < 8, (which, own)


def test_vectors_need_all_numbers_to_fit() -> None:
    def align(case: Case, layout: str, dtype: torch.dtype = torch.bfloat16) -> int:
        x = case.make(dtype, layout=layout).x
        units = (dilated._unit(x),) * 2
        _, _, w = _axes(case)
        whole = w.stride == 1
        lined = dilated._lined(units[0], whole, w.source, w.target, w.before, w.dilation)
        return dilated._alignment(x, x, units, case.channels, case.channels, lined)

    case = Case(
        "",
        op="dilated",
        channels=12,
        filters=12,
        size=(2, 2, 16),
        dilation=(1, 1, 4),
        padding=(0, 0, 4),
    )
    assert align(case, NCDHW) == 4
    assert align(case, CHANNELS_LAST) == 4
    assert align(case, NCDHW, torch.float64) == 2
    assert align(replace(case, dilation=(1, 1, 1), padding=(0, 0, 1)), NCDHW) == 1
    assert align(replace(case, stride=(1, 1, 2)), NCDHW) == 1
    assert align(replace(case, channels=21), CHANNELS_LAST) == 1
    assert align(replace(case, channels=30), CHANNELS_LAST) == 2


def test_launchers_take_the_tuned_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any variant gives right results."""
    case = BY_NAME["odd"]
    for index in (1, -1):
        asked: list[str] = []

        def tuned(name: str, *args: Any, at: int = index, names: list[str] = asked) -> Config:
            names.append(name)
            return args[2][at]

        monkeypatch.setattr(dilated, "tuned", tuned)
        assert_case(case, case.make(), torch.float32, ours, versus_torch=True)
        assert asked == ["correlate", "correlate", "weight"]


# Machine code.

SHARED = 99 << 10  # what a block can have on all GPUs from sm_80 on (163 KiB on an sm_80 itself)
COMPILED = [
    (80, ["meshnet_30_d1@256:bfloat16:ncdhw", "meshnet_30_d16@256:ieee:channels_last_3d",
          "nnunet_32@128:bfloat16:channels_last_3d", "nnunet_up_64_32@64:float64:ncdhw"]),
    (90, ["meshnet_30_d1@256:bfloat16:channels_last_3d", "meshnet_30_d16@256:bfloat16:ncdhw",
          "meshnet_30_d1@256:float32:ncdhw", "meshnet_30_d16@256:ieee:ncdhw"]),
    (90, ["meshnet_5_d4@256:bfloat16:ncdhw", "meshnet_21_d4@256:bfloat16:channels_last_3d",
          "nnunet_320@8:bfloat16:ncdhw", "nnunet_320@8:bfloat16:channels_last_3d"]),
    (90, ["aspp_64_d6@32:float16:ncdhw", "vae_96@4x152x104:bfloat16:ncdhw",
          "reflect:bfloat16:ncdhw", "up_phases:float64:ncdhw"]),
    (100, ["meshnet_30_d16@256:bfloat16:channels_last_3d", "nnunet_320@8:bfloat16:ncdhw",
           "vae_96@4x152x104:bfloat16:channels_last_3d", "meshnet_30_d1@256:float32:ncdhw"]),
]  # fmt: skip


def _check(arch: int, rows: list[str]) -> None:
    """No spills in loops (values for the end of a kernel may be put away before them), memory
    that all GPUs have, and products on tensor cores but for float32 without TF32."""
    built = _compiled(arch, rows)
    assert {"correlate", "correlate_weight"} <= {kernel["kernel"] for kernel in built}
    for kernel in built:
        assert kernel["looped"] == 0, kernel
        assert kernel["stack"] <= 64, kernel
        assert kernel["shared"] <= SHARED, kernel
        if kernel["kernel"] != "add_parts" and kernel["product"] != "ieee float32":
            assert kernel["products"] > 0, kernel


@pytest.mark.parametrize(("arch", "rows"), COMPILED)
def test_compiles_for(arch: int, rows: list[str]) -> None:
    _check(arch, rows)


@pytest.mark.sweep
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "ieee", "float64"])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_compiles_for_all_models(arch: int, dtype: str) -> None:
    _check(arch, [f"{case}:{dtype}:{layout}" for case in MODELS for layout in LAYOUTS])
