# SPDX-License-Identifier: Apache-2.0
"""The ops as torch sees them: opcheck, compile, autocast, and the same bits every time."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import voxconv
from cases import CHANNELS_LAST, LAYOUTS, Case, select
from testing import (
    DTYPES,
    HALVES,
    PASSES,
    all_passes,
    assert_accurate,
    bitwise_equal,
    by_torch,
    dtype_id,
    on,
    ours,
    reference,
)

OP_CASES = [
    Case("plain", n=2, channels=3, size=(4, 5, 9), padding=1),
    Case("last", n=2, channels=3, size=(4, 5, 9), padding=1, layout=CHANNELS_LAST),
    Case("multiplier2", channels=2, multiplier=2, size=(4, 5, 9), kernel=(1, 2, 3)),
    Case("stride2", channels=3, size=(4, 6, 9), stride=(2, 1, 2), dilation=(1, 2, 1), padding=2),
    Case("circular", channels=3, size=(4, 5, 6), padding=((1, 2), (0, 1), (2, 0)), mode="circular"),
]


def _arguments(case: Case, op: str, dtype: torch.dtype) -> tuple[Any, ...]:
    x, weight, bias, grad = case.make(dtype)
    pads = [side for pair in case.pads for side in pair]
    mode = ("zeros", "replicate", "reflect", "circular").index(case.mode)
    geometry = (list(case.stride), pads, list(case.dilation), mode)
    if op.startswith("depthwise_forward"):
        return (x, weight, bias, *geometry)
    if op.startswith("depthwise_grad_input"):
        weight = weight.view(case.channels, case.multiplier, *case.kernel)
        return (grad, weight, list(case.size), *geometry)
    if op.startswith("depthwise_grad_weight"):
        return (grad, x, list(case.kernel), *geometry)
    return (grad,)


OPS = ("depthwise_forward", "depthwise_grad_input", "depthwise_grad_weight", "channel_sum")
FFT_OPS = tuple(f"{op}_fft" for op in OPS[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("op", OPS + FFT_OPS)
@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_opcheck(case: Case, op: str, dtype: torch.dtype) -> None:
    """Schema, registration, shape function (strides too) and a dynamic trace of every op."""
    if op.endswith("_fft") and case.mode != "zeros":
        pytest.skip("the FFT pads with zeros")
    torch.library.opcheck(getattr(torch.ops.voxconv, op).default, _arguments(case, op, dtype))


@pytest.mark.parametrize("op", OPS)
def test_opcheck_without_elements(op: str) -> None:
    case = Case("none", n=0, channels=3, size=(4, 5, 9), padding=1)
    torch.library.opcheck(
        getattr(torch.ops.voxconv, op).default, _arguments(case, op, torch.float32)
    )


@pytest.mark.parametrize("op", ["depthwise_forward", "depthwise_forward_fft"])
def test_opcheck_with_an_activation(op: str) -> None:
    arguments = _arguments(OP_CASES[0], op, torch.float32)
    torch.library.opcheck(getattr(torch.ops.voxconv, op).default, (*arguments, 3))


def _compiled(case: Case, backend: Any, dynamic: bool) -> Callable[..., torch.Tensor]:
    @torch.compile(fullgraph=True, backend=backend, dynamic=dynamic)
    def compiled(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return ours(case, x, weight, bias).relu()

    return lambda case, *args: compiled(*args)


def _eager(case: Case, *args: torch.Tensor) -> torch.Tensor:
    return ours(case, *args).relu()


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


TRACED = [
    *(c for c in select("smoke") if c.name in ("dw3", "dw5_dilation2", "dw3_circular", "up3")),
    *(c for c in select("odd") if c.name in ("dw4_same_stride3", "up3_multiplier2")),
]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", TRACED, ids=str)
def test_compile_traces_whole(case: Case, layout: str) -> None:
    """Forward and backward in one graph each, with the bits of eager mode."""
    tensors = case.make(layout=layout)
    expected = all_passes(_eager, case, tensors)
    got = all_passes(_compiled(case, "aot_eager", False), case, tensors)
    for which in PASSES:
        assert bitwise_equal(got[which], expected[which]), which
        assert got[which].stride() == expected[which].stride(), which


def _resized(case: Case, step: int) -> Case:
    """Batch and volume that share no size with each other, nor with a channel count."""
    return replace(case, n=7 + step, size=(13 + step, 17 + 2 * step, 23 + 3 * step))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("case", TRACED[:-1], ids=str)
def test_compile_with_dynamic_shapes(case: Case) -> None:
    """One graph serves every batch and volume."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = _compiled(case, counter, True)
    for step in range(3):
        sized = _resized(case, step)
        tensors = sized.make()
        expected, got = all_passes(_eager, sized, tensors), all_passes(compiled, sized, tensors)
        for which in PASSES:
            assert bitwise_equal(got[which], expected[which]), f"{which}, step {step}"
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_through_inductor(dynamic: bool) -> None:
    case = next(c for c in select("smoke") if c.name == "dw3")
    compiled = _compiled(case, "inductor", dynamic)
    for step in range(2 if dynamic else 1):
        sized = _resized(case, step)
        tensors = sized.make()
        expected, got = all_passes(_eager, sized, tensors), all_passes(compiled, sized, tensors)
        for which in PASSES:
            torch.testing.assert_close(got[which], expected[which])


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_under_a_forced_backend() -> None:
    """The choice is part of what was compiled for."""
    case = select("smoke")[0]
    tensors = case.make()
    for backend in ("torch", "cpu"):
        with voxconv.use_backend(backend):
            expected = all_passes(_eager, case, tensors)
            got = all_passes(_compiled(case, "aot_eager", False), case, tensors)
        assert bitwise_equal(got["forward"], expected["forward"])


def test_export() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = voxconv.nn.DepthwiseConv3d(4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).relu()

    block, x = Block().eval(), torch.randn(2, 4, 5, 6, 7)
    program = torch.export.export(block, (x,))
    assert torch.equal(program.module()(x), block(x))


# Autocast, row by row as torch's own convolution does it on this machine.
MIXES = [
    pytest.param((torch.float32, torch.float32), id="float32"),
    pytest.param((torch.bfloat16, torch.float32), id="bfloat16-float32"),
    pytest.param((torch.float32, torch.bfloat16), id="float32-bfloat16"),
    pytest.param((torch.float16, torch.float32), id="float16-float32"),
    pytest.param((torch.float64, torch.float64), id="float64"),
    pytest.param((torch.float64, torch.float32), id="float64-float32"),
]


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
@pytest.mark.parametrize("enabled", [True, False], ids=["on", "off"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("op", ["depthwise", "transposed"])
def test_autocast_follows_torch(
    op: str, mix: tuple[torch.dtype, torch.dtype], enabled: bool, dtype: torch.dtype
) -> None:
    """The same output dtype as torch for every mix of inputs, or an error where it has one."""
    case = Case("cast", op, channels=3, size=(4, 5, 6), padding=1)
    x, weight, bias, _ = case.make(torch.float64)
    x, weight, bias = x.to(mix[0]), weight.to(mix[1]), bias.to(mix[1])
    with torch.autocast("cpu", dtype=dtype, enabled=enabled):
        try:
            theirs = by_torch(case, x, weight, bias)
        except RuntimeError:
            with pytest.raises(TypeError, match="dtype"):
                ours(case, x, weight, bias)
            return
        got = ours(case, x, weight, bias)
    assert got.dtype == theirs.dtype
    cast = [t.to(dtype) if enabled and t.dtype != torch.float64 else t for t in (x, weight, bias)]
    oracle = reference(case, *(t.double() for t in cast))
    assert_accurate("autocast", got, oracle, theirs, taps=28)


@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
def test_autocast_gradients(dtype: torch.dtype) -> None:
    """Gradients come back in the dtype of the leaves."""
    case = Case("cast", channels=3, size=(4, 5, 6), padding=1)
    leaves = [t.requires_grad_() for t in case.make()[:3]]
    with torch.autocast("cpu", dtype=dtype):
        y = ours(case, *leaves)
        assert y.dtype == dtype
    y.float().square().sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=dtype):
        theirs = [t.detach().requires_grad_() for t in leaves]
        F.conv3d(*theirs, padding=1, groups=3).float().square().sum().backward()
    for mine, other in zip(leaves, theirs, strict=True):
        torch.testing.assert_close(
            mine.grad, other.grad, rtol=0.1, atol=0.05 * other.grad.abs().max().item()
        )


# Large enough that two threads get work, odd enough that their shares differ.
SPLIT = [
    Case("dw3", n=2, channels=9, size=(13, 14, 37), padding=1),
    Case("dw5_c1", n=1, channels=1, size=(21, 30, 45), kernel=(5, 5, 5), padding=2),
    Case("dw7_stride2", channels=5, size=(17, 18, 39), kernel=(7, 7, 7), stride=(2, 2, 2)),
    Case("dilation2", channels=6, size=(15, 14, 40), dilation=(2, 2, 2), padding=2),
    Case("multiplier2", n=2, channels=4, multiplier=2, size=(10, 11, 33), padding=1),
    Case("reflect", channels=6, size=(12, 13, 35), padding=1, mode="reflect"),
    Case("up", "transposed", channels=6, size=(9, 8, 21), stride=(2, 2, 2), padding=1),
]


def _assert_same_bits(case: Case, dtype: torch.dtype, layout: str, path: str, at_threads) -> None:  # type: ignore[no-untyped-def]
    tensors = case.make(dtype, layout=layout)
    with on(path):
        first = at_threads(1, lambda: all_passes(ours, case, tensors))
        for threads in (1, 2, 2, 3):
            again = at_threads(threads, lambda: all_passes(ours, case, tensors))
            for which in PASSES:
                assert bitwise_equal(again[which], first[which]), f"{which}, {threads} threads"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", SPLIT, ids=str)
def test_same_bits_on_any_threads(case: Case, dtype: torch.dtype, layout: str, at_threads) -> None:  # type: ignore[no-untyped-def]
    _assert_same_bits(case, dtype, layout, "direct", at_threads)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", [c for c in SPLIT if c.mode == "zeros"], ids=str)
def test_same_bits_on_any_threads_fft(
    case: Case,
    dtype: torch.dtype,
    layout: str,
    at_threads,  # type: ignore[no-untyped-def]
) -> None:
    _assert_same_bits(case, dtype, layout, "fft", at_threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", SPLIT[:3], ids=str)
def test_same_bits_at_any_address(case: Case, dtype: torch.dtype) -> None:
    """Where a tensor starts does not decide how it is added up."""
    tensors = case.make(dtype)

    def shifted(t: torch.Tensor) -> torch.Tensor:
        return torch.zeros(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)

    with on("direct"):
        expected = all_passes(ours, case, tensors)
        got = all_passes(ours, case, tensors.__class__(*(shifted(t) for t in tensors)))
    for which in PASSES:
        assert bitwise_equal(got[which], expected[which]), which


def test_same_bits_for_every_batch_and_channel() -> None:
    """A sample's result does not depend on its neighbours in the batch, nor a channel's."""
    case = SPLIT[0]
    x, weight, bias, _ = case.make()
    with on("direct"):
        whole = ours(case, x, weight, bias)
        single = ours(case, x[1:], weight, bias)
        some = voxconv.depthwise_conv3d(x[:, 2:7], weight[2:7], bias[2:7], padding=1)
    assert torch.equal(whole[1:], single)
    assert torch.equal(whole[:, 2:7], some)


@pytest.mark.usefixtures("threads")
def test_calls_from_several_threads_at_once() -> None:
    """No scratch is shared: four Python threads, four problems, the bits of each alone."""
    problems = [(case, case.make()) for case in SPLIT[:4]]
    expected = [all_passes(ours, case, tensors) for case, tensors in problems]
    wrong: list[str] = []

    def work(index: int) -> None:
        case, tensors = problems[index]
        for _ in range(5):
            got = all_passes(ours, case, tensors)
            wrong.extend(
                f"{case} {which}"
                for which in PASSES
                if not bitwise_equal(got[which], expected[index][which])
            )

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_memory_is_given_back() -> None:
    """No copy of the input outlives a call: a hundred calls leave the process as it was."""
    case = Case("leak", channels=8, size=(16, 16, 128), padding=1)
    tensors = case.make()
    for _ in range(20):
        all_passes(ours, case, tensors)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(100):
        all_passes(ours, case, tensors)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 20_000  # kilobytes; 100 leaked inputs would be 100 MB
