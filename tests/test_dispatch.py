# SPDX-License-Identifier: Apache-2.0
"""The choice of backend and kernel: pure, explained, overridable per thread."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import voxconv
from cases import CASES, Case, select
from testing import all_passes, assert_case, on, ops_called, ours
from voxconv import _dispatch, _ops
from voxconv._dispatch import Choice, Problem
from voxconv._geometry import PADDING_MODES, Geometry

needs_kernels = pytest.mark.skipif(not _ops.has_cpu(), reason="the compiled part is missing")


def _problem(case: Case, **changes: Any) -> Problem:
    pads = tuple(side for pair in case.pads for side in pair)
    size = case.out_size if case.transposed else case.size
    geometry = Geometry(
        case.kernel, case.stride, pads, case.dilation, PADDING_MODES.index(case.mode)
    )
    fields = {
        "op": "forward",
        "device": "cpu",
        "dtype": torch.float32,
        "x_shape": (case.n, case.channels, *size),
        "weight_shape": (case.out_channels, 1, *case.kernel),
        "geometry": geometry,
        "transposed": case.transposed,
    }
    return Problem(**fields | changes)


DW3 = select("smoke")[0]


def test_every_row_has_a_choice_and_a_reason() -> None:
    for case in CASES:
        for op in _dispatch.PASSES:
            choice = _dispatch.choose(_problem(case, op=op))
            assert choice.backend in ("cpu", "torch"), case
            assert choice.kernel in ("direct", "fft", "conv3d"), case
            assert len(choice.reason) > 10, case
            assert choice == _dispatch.choose(_problem(case, op=op)), case


def test_the_fft_is_chosen_only_where_it_can_run() -> None:
    for case in CASES:
        for op in _dispatch.PASSES:
            choice = _dispatch.choose(_problem(case, op=op), "cpu")
            if case.mode != "zeros" or case.taps < 7**3:
                assert choice[:2] == ("cpu", "direct"), case


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        pytest.param({"device": "mps"}, "mps", id="device"),
        pytest.param({"dtype": torch.complex64}, "complex64", id="dtype"),
        pytest.param({"missing": {"cpu": "no library"}}, "no library", id="missing"),
    ],
)
def test_what_the_cpu_refuses_goes_to_torch(changes: dict[str, Any], words: str) -> None:
    problem = _problem(DW3, **changes)
    choice = _dispatch.choose(problem)
    assert choice.backend == "torch"
    assert words in choice.reason
    with pytest.raises(NotImplementedError, match=words):
        _dispatch.choose(problem, "cpu")


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_backends_for_gpus_refuse_the_cpu(name: str) -> None:
    with voxconv.use_backend(name), pytest.raises(NotImplementedError, match=f"{name}.*'cpu'"):
        ours(DW3, *DW3.make()[:3])


NO_CUDA = {"cuda": "built without CUDA"}
NO_GPU_KERNELS = NO_CUDA | {"triton": "Triton is not installed"}


@pytest.mark.parametrize(
    ("missing", "forced", "expected"),
    [
        ({}, None, ("cuda", "direct")),
        ({}, "triton", ("triton", "triton")),
        (NO_CUDA, None, ("triton", "triton")),
        (NO_GPU_KERNELS, None, ("torch", "conv3d")),
    ],
    ids=["both", "asked", "no_cuda", "neither"],
)
def test_a_gpu_has_two_backends(
    missing: dict[str, str], forced: str | None, expected: tuple[str, str]
) -> None:
    choice = _dispatch.choose(_problem(DW3, device="cuda", missing=missing), forced)
    assert choice[:2] == expected
    assert all(reason in choice.reason for reason in missing.values() if forced is None)


@pytest.mark.parametrize("forced", ["cuda", "triton"])
def test_what_a_gpu_lacks_is_told(forced: str) -> None:
    problem = _problem(DW3, device="cuda", missing=NO_GPU_KERNELS)
    with pytest.raises(NotImplementedError, match=f"'{forced}'.*{NO_GPU_KERNELS[forced]}"):
        _dispatch.choose(problem, forced)


def test_large_kernels_in_float32_take_the_fft_on_a_gpu() -> None:
    big = Case("dw21", channels=48, size=(48, 48, 48), kernel=(21, 21, 21), padding=10)

    def kernel(case: Case, dtype: torch.dtype) -> str:
        return _dispatch.choose(_problem(case, device="cuda", dtype=dtype)).kernel

    assert kernel(big, torch.float32) == "fft"
    assert kernel(big, torch.bfloat16) == "direct"
    assert kernel(replace(big, mode="circular"), torch.float32) == "direct"
    assert kernel(replace(big, kernel=(7, 7, 7), padding=3), torch.float32) == "direct"


@pytest.mark.parametrize(
    ("built", "capability", "driver", "word"),
    [
        ("80;90a;100+PTX", (8, 6), 13000, None),
        ("80;90a;100+PTX", (9, 0), 13020, None),
        ("80;90a;100+PTX", (12, 0), 14000, None),
        ("80;90a;100+PTX", (7, 5), 13000, "sm_80 or later"),
        ("80;90a;100+PTX", (9, 0), 12080, "CUDA 13.0 and the driver for 12.8"),
        ("90a", (8, 0), 13000, "VOXCONV_CUDA_ARCH=80"),
        ("80", (9, 0), 13000, "VOXCONV_CUDA_ARCH=90"),
        (None, (9, 0), 13000, "VOXCONV_CUDA=1"),
    ],
)
def test_which_gpus_the_compiled_part_runs_on(
    built: str | None, capability: tuple[int, int], driver: int, word: str | None
) -> None:
    with (
        mock.patch.object(_ops, "cuda_build", return_value=built and f"{built} nvcc 13.0"),
        mock.patch.object(_ops, "cuda_versions", return_value=(13000, driver)),
        mock.patch.object(_ops, "_missing", None),
    ):
        reason = _ops._missing_on_gpu.__wrapped__(*capability)["cuda"]
    assert reason is None if word is None else word in reason


def test_forced_torch_takes_everything() -> None:
    for case in CASES:
        assert _dispatch.choose(_problem(case), "torch").backend == "torch"


@needs_kernels
def test_forced_cpu_runs_what_is_not_depthwise() -> None:
    x, weight = torch.randn(1, 4, 3, 4, 5), torch.randn(4, 2, 1, 1, 1)
    expected = F.conv3d(x, weight, groups=2)
    with voxconv.use_backend("cpu"), ops_called() as called:
        torch.testing.assert_close(voxconv.conv3d(x, weight, groups=2), expected)
        voxconv.conv_transpose3d(x, torch.zeros(4, 4, 1, 1, 1))
        voxconv.conv3d(x, torch.zeros(4, 1, 1, 1, 1), groups=4)
    assert {name for name in called if name.startswith("voxconv")} == {
        "voxconv::dilated_forward",
        "voxconv::dilated_grad_input",
        "voxconv::depthwise_forward",
    }


def test_one_channel_of_many_outputs_is_dense() -> None:
    """[O, 1, k] over one channel is a dense kernel; as ``depthwise_conv3d`` it still runs."""
    assert _dispatch.is_depthwise(4, 8, 4)
    assert not _dispatch.is_depthwise(4, 8, 2)
    assert not _dispatch.is_depthwise(1, 8, 1)
    x, weight = torch.randn(1, 1, 4, 5, 6), torch.randn(8, 1, 3, 3, 3)
    torch.testing.assert_close(
        voxconv.depthwise_conv3d(x, weight), torch.nn.functional.conv3d(x, weight)
    )


def _names(backend: str | None) -> set[str]:
    tensors = DW3.make()
    with voxconv.use_backend(backend), ops_called() as called:
        ours(DW3, *tensors[:3])
    return called


@needs_kernels
def test_use_backend_decides_what_runs() -> None:
    assert "voxconv::depthwise_forward" in _names("cpu")
    assert not any(name.startswith("voxconv") for name in _names("torch"))
    assert "aten::convolution" in _names("torch")
    assert _names(None) == _names("cpu")  # the cache keeps them apart, whatever the order


def test_use_backend_nests() -> None:
    current = _dispatch.forced_backend
    assert current() is None
    with voxconv.use_backend("torch"):
        assert current() == "torch"
        with voxconv.use_backend("cpu"):
            assert current() == "cpu"
            with voxconv.use_backend(None):
                assert current() is None
            assert current() == "cpu"
        assert current() == "torch"
    assert current() is None


def test_use_backend_is_left_by_an_error() -> None:
    with pytest.raises(KeyError), voxconv.use_backend("torch"):
        raise KeyError("inside")
    assert _dispatch.forced_backend() is None


def test_use_backend_can_be_reused() -> None:
    context = voxconv.use_backend("torch")
    with context, voxconv.use_backend("cpu"), context:
        assert _dispatch.forced_backend() == "torch"
    assert _dispatch.forced_backend() is None


def test_use_backend_belongs_to_the_thread() -> None:
    seen = []
    with voxconv.use_backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(_dispatch.forced_backend()))
        thread.start()
        thread.join()
    assert seen == [None]


@pytest.mark.parametrize("name", ["gpu", "", "CPU", 1])
def test_use_backend_knows_its_names(name: Any) -> None:
    with pytest.raises(ValueError, match=r"cpu.*cuda.*triton.*torch"):
        voxconv.use_backend(name)


def _explain(case: Case, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    kwargs = case.kwargs() | {"groups": case.channels}
    return voxconv.explain(x, weight, bias, transposed=case.transposed, **kwargs)


@pytest.mark.parametrize("path", ["direct", "fft", "torch"])
@pytest.mark.parametrize("case", [c for c in select("smoke") if c.mode == "zeros"], ids=str)
def test_explain_tells_what_would_run(case: Case, path: str) -> None:
    x, weight, bias, _ = case.make()
    with on(path):
        with ops_called() as called:
            explained = _explain(case, x, weight, bias)
        assert not called
        with ops_called() as called:
            y = ours(case, x, weight, bias)
    assert explained.output_shape == tuple(y.shape)
    assert explained.flops == case.flops
    assert explained.bytes == case.bytes(4) + 4 * bias.numel()
    op = "depthwise_grad_input" if case.transposed else "depthwise_forward"
    ran = {
        "direct": f"voxconv::{op}",
        "fft": f"voxconv::{op}_fft",
        "torch": "aten::convolution",
    }
    assert ran[path] in called
    assert (explained.backend, explained.kernel) == {
        "direct": ("cpu", "direct"),
        "fft": ("cpu", "fft"),
        "torch": ("torch", "conv3d"),
    }[path]


@pytest.mark.parametrize("layout", ["batched", "unbatched"])
def test_explanation_reads_well(layout: str) -> None:
    x, weight, bias, _ = DW3.make()
    x = x if layout == "batched" else x[0]
    explained = _explain(DW3, x, weight, bias)
    text = str(explained)
    shape = [2, 4, 6, 7, 10] if layout == "batched" else [4, 6, 7, 10]
    assert str(shape) in text
    for name, choice in zip(
        ("forward", "grad_input", "grad_weight"), explained.passes, strict=True
    ):
        assert f"{choice.backend}/{choice.kernel}: {choice.reason}" in text
        assert name in text
    assert explained.reason in text
    with pytest.raises(dataclasses.FrozenInstanceError):
        explained.backend = "cuda"


def test_explain_reads_no_data() -> None:
    """Sizes suffice: tensors that no machine holds can be explained."""
    x = torch.empty(64, 512, 512, 512, 512, device="meta")
    weight = torch.empty(512, 1, 7, 7, 7, device="meta")
    explained = voxconv.explain(x, weight, padding=3)
    assert explained.output_shape == tuple(x.shape)
    assert explained.flops == 2 * x.numel() * 343


DENSE = {
    "one_tap": ((1, 4, 3, 4, 5), (8, 2, 1, 1, 1), {}, ("torch",) * 3),
    "float64": ((1, 64, 32, 32, 32), (64, 64, 3, 3, 3), {"dtype": torch.float64}, ("cpu",) * 3),
    "few_channels": ((1, 30, 64, 64, 64), (30, 30, 3, 3, 3), {}, ("cpu",) * 3),
    "many": ((2, 128, 16, 16, 16), (128, 128, 3, 3, 3), {}, ("cpu", "cpu", "torch")),
    "more": ((2, 512, 16, 16, 16), (512, 512, 3, 3, 3), {}, ("torch",) * 3),
    "few_lines": ((1, 320, 8, 8, 8), (320, 320, 3, 3, 3), {}, ("cpu", "cpu", "torch")),
    "strided": ((2, 64, 32, 32, 32), (64, 64, 3, 3, 3), {"stride": (1, 2, 1)}, ("torch",) * 3),
    "along_w": ((2, 64, 32, 32, 32), (64, 64, 3, 3, 5), {"stride": (1, 1, 2)}, ("cpu",) * 3),
    "dilated": ((2, 64, 32, 32, 32), (64, 64, 5, 3, 3), {"dilation": 2, "padding": 2},
                ("torch", "cpu", "cpu")),
    "causal": ((2, 64, 32, 32, 32), (64, 64, 5, 3, 3), {"padding": ((4, 0), (1, 1), (1, 1))},
               ("torch",) * 3),
    "causal_many": ((1, 96, 4, 76, 52), (96, 96, 3, 3, 3), {"padding": ((2, 0), (1, 1), (1, 1))},
                    ("cpu",) * 3),
    "causal_dilated": ((2, 64, 32, 32, 32), (64, 64, 3, 3, 3),
                       {"dilation": 2, "padding": ((4, 0), (2, 2), (2, 2))}, ("cpu",) * 3),
}  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("name", DENSE)
def test_who_runs_what_is_not_depthwise(name: str) -> None:
    x_shape, weight_shape, kwargs, backends = DENSE[name]
    kwargs = dict(kwargs)
    dtype = kwargs.pop("dtype", torch.float32)
    cell = torch.zeros((), dtype=dtype)
    passes = voxconv.explain(cell.expand(x_shape), cell.expand(weight_shape), **kwargs).passes
    assert tuple(choice.backend for choice in passes) == backends
    assert all(choice.reason for choice in passes)


@needs_kernels
def test_passes_by_torch_and_by_us_make_one_call() -> None:
    case = Case("row", op="dilated", n=2, channels=48, filters=48, size=(4, 5, 6), padding=2,
                kernel=(2, 3, 3), dilation=(2, 2, 2))  # fmt: skip
    assert_case(case, case.make(), torch.float32, versus_torch=True)
    explained = voxconv.explain(*case.make()[:3], **case.kwargs())
    assert [choice.backend for choice in explained.passes] == ["torch", "cpu", "cpu"]


@needs_kernels
def test_a_pass_of_its_own_kernel() -> None:
    """Forward direct and both gradients by FFT, in one backward: the plan is per pass."""

    def mixed(problem: Problem) -> Choice:
        return Choice("cpu", "direct" if problem.op == "forward" else "fft", "mixed by a test")

    tensors = DW3.make(torch.float64)
    with on("direct"), pytest.MonkeyPatch.context() as patch:
        expected = all_passes(ours, DW3, tensors)
        patch.setattr(_dispatch, "_cpu_kernel", mixed)
        voxconv.functional._calls.clear()
        with ops_called() as called:
            got = all_passes(ours, DW3, tensors)
    assert called >= {
        "voxconv::depthwise_forward",
        "voxconv::depthwise_grad_input_fft",
        "voxconv::depthwise_grad_weight_fft",
    }
    for which, t in got.items():
        torch.testing.assert_close(t, expected[which])


def test_without_the_compiled_part() -> None:
    """Asked to, the package runs through torch: same results, no warning."""
    program = (
        "import warnings; warnings.simplefilter('error')\n"
        "import torch, voxconv\n"
        "x, w = torch.randn(1, 2, 4, 5, 6), torch.randn(2, 1, 3, 3, 3)\n"
        "e = voxconv.explain(x, w)\n"
        "assert e.backend == 'torch' and 'VOXCONV_DISABLE_COMPILED' in e.reason, e\n"
        "y = voxconv.depthwise_conv3d(x, w, padding='same', stride=2)\n"
        "z = voxconv.reference.depthwise_conv3d(x, w, padding='same', stride=2)\n"
        "torch.testing.assert_close(y, z)\n"
        "try:\n"
        "    with voxconv.use_backend('cpu'): voxconv.depthwise_conv3d(x, w)\n"
        "except NotImplementedError as error: assert 'VOXCONV_DISABLE_COMPILED' in str(error)\n"
        "else: raise SystemExit('use_backend did not refuse')\n"
    )
    environment = os.environ | {"VOXCONV_DISABLE_COMPILED": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VOXCONV_CPU_LEVEL", "avx2"),
        ("VOXCONV_CPU_WAY", "fastest"),
        ("VOXCONV_CUDA_WAY", "fastest"),
        ("VOXCONV_CACHE_MIB", "2GB"),
        ("VOXCONV_CACHE_MIB", "-5"),
        ("VOXCONV_AUTOTUNE", "yes"),
    ],
)
def test_a_setting_that_means_nothing_is_told(name: str, value: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import voxconv"],
        env=os.environ | {name: value},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"RuntimeWarning: {name}={value!r} is not followed: it may be " in done.stderr


def test_fake_tensors_of_a_gpu() -> None:
    """Shapes are worked out for a GPU that is not there, as torch.compile does it."""
    with FakeTensorMode():
        x = torch.empty(2, 4, 6, 7, 8, device="cuda")
        weight, bias = torch.empty(4, 1, 3, 3, 3, device="cuda"), torch.empty(4, device="cuda")
        y = voxconv.depthwise_conv3d(x, weight, bias, stride=2, padding=1, activation="relu")
    assert y.shape == (2, 4, 3, 4, 4)
    assert y.device.type == "cuda"


@needs_kernels
def test_no_large_copies_by_torch() -> None:
    """oneDNN brings NCDHW tensors into an order of its own: not those of a large volume."""
    weight = torch.empty((), dtype=torch.float32).expand(64, 64, 5, 3, 3)
    cell = torch.empty(())
    small, large = (cell.expand(1, 64, n, n, n) for n in (32, 96))
    assert voxconv.explain(small, weight, padding=1).backend == "torch"
    assert {p.backend for p in voxconv.explain(large, weight, padding=1).passes} == {"cpu"}


@needs_kernels
def test_transposed_layers_that_torch_reorders_slowly() -> None:
    x, weight = torch.empty(1, 64, 8, 32, 32), torch.empty(64, 32, 2, 2, 2)
    passes = voxconv.explain(x, weight, stride=2, transposed=True).passes
    assert passes.forward.backend == "cpu"
    assert passes.grad_input.backend == passes.grad_weight.backend == "torch"
    last = x.contiguous(memory_format=torch.channels_last_3d)
    assert voxconv.explain(last, weight, stride=2, transposed=True).backend == "torch"
