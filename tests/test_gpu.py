# SPDX-License-Identifier: Apache-2.0
"""The case table on a GPU, by the CUDA kernels and by Triton's; bench/gpu.sh runs it."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import voxconv
from cases import CASES, LAYOUTS, Case, select
from dense_cases import SMALL
from testing import DTYPES, all_passes, assert_case, bitwise_equal, dtype_id, ours
from voxconv import _ops

pytestmark = pytest.mark.gpu
BACKENDS = ("cuda", "triton")
SMOKE = select("smoke")
MODELS = [case for case in CASES if "model" in case.tags]


def on_gpu(
    backend: str | None,
    case: Case,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The row through the public function, on copies of its tensors."""
    with voxconv.use_backend(backend):
        return ours(case, x.cuda(), weight.cuda(), None if bias is None else bias.cuda()).cpu()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", select("smoke", "odd", "edge", "fft"), ids=str)
def test_rows(case: Case, layout: str, backend: str) -> None:
    run = partial(on_gpu, backend)
    assert_case(case, case.make(layout=layout), torch.float32, run, versus_torch=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", [c.small() for c in MODELS], ids=str)
def test_layers_of_models(case: Case, dtype: torch.dtype, backend: str) -> None:
    tensors = case.make(dtype, layout=case.layout)
    assert_case(case, tensors, dtype, partial(on_gpu, backend), versus_torch=False)


@pytest.mark.parametrize("case", SMOKE, ids=str)
def test_the_rules_choose_a_gpu_backend(case: Case) -> None:
    x, weight, bias, _ = (t.cuda() for t in case.make())
    kwargs = case.kwargs() | {"groups": case.channels, "transposed": case.transposed}
    assert voxconv.explain(x, weight, bias, **kwargs).backend == "cuda"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SMOKE, ids=str)
def test_the_same_bits_each_time(case: Case, backend: str) -> None:
    first, second = (all_passes(partial(on_gpu, backend), case, case.make()) for _ in range(2))
    for which in first:
        assert bitwise_equal(first[which], second[which]), which


@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_capture(backend: str) -> None:
    """Forward and backward are captured, and a replay follows the values of its input."""
    case = SMOKE[0]
    x, weight, bias, grad = (t.cuda() for t in case.make())
    x.requires_grad_()
    weight.requires_grad_()

    def step() -> tuple[torch.Tensor, ...]:
        y = ours(case, x, weight, bias)
        return (y, *torch.autograd.grad(y, (x, weight), grad))

    with voxconv.use_backend(backend):
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            x.mul_(-2)
        graph.replay()
        for got, expected in zip(captured, step(), strict=True):
            assert bitwise_equal(got.cpu(), expected.cpu())


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend: str) -> None:
    case = SMOKE[0]
    x, weight, bias, _ = (t.cuda() for t in case.make())
    weight.requires_grad_()
    compiled = torch.compile(partial(ours, case), fullgraph=True)
    with voxconv.use_backend(backend):
        y = compiled(x, weight, bias)
        expected = ours(case, x, weight, bias)
    torch.testing.assert_close(y, expected)
    assert torch.autograd.grad(y.sum(), weight)[0].isfinite().all()


def test_another_stream() -> None:
    case = SMOKE[0]
    x, weight, bias, _ = (t.cuda() for t in case.make())
    expected = ours(case, x, weight, bias)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = x * 1  # not there yet on the default stream
        y = ours(case, late, weight, bias)
    stream.synchronize()
    assert bitwise_equal(y.cpu(), expected.cpu())


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_2_to_the_31_elements(layout: str, backend: str) -> None:
    """The last volume of the batch is right where offsets need 64 bits."""
    batch, channels, size = 129, 16, (128, 128, 64)
    shape = (batch, channels, *size)
    assert batch * channels * 128 * 128 * 64 > 2**31
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("not enough memory on this GPU")
    format = torch.contiguous_format if layout == "ncdhw" else torch.channels_last_3d
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda", memory_format=format)
    x.zero_()
    x[-1].normal_()
    weight = torch.randn(channels, 1, 3, 3, 3, dtype=torch.bfloat16, device="cuda")
    with voxconv.use_backend(backend):
        y = voxconv.depthwise_conv3d(x, weight, padding=1)
        last = voxconv.depthwise_conv3d(x[-1:].contiguous(memory_format=format), weight, padding=1)
    assert torch.equal(y[-1:], last)
    assert not y[0].any()


def test_mixed_devices_are_refused() -> None:
    x, weight, bias, _ = SMOKE[0].make()
    for tensors in ((x.cuda(), weight, bias), (x, weight.cuda(), bias), (x, weight, bias.cuda())):
        with pytest.raises(ValueError, match=r"is on .*, the input on"):
            ours(SMOKE[0], *tensors)


def test_the_compiled_part_was_built_for_this_gpu() -> None:
    assert "cuda" not in _ops.missing(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [c for c in SMALL if c.channels > 1], ids=str)
def test_rows_that_are_not_depthwise(case: Case, layout: str, dtype: torch.dtype) -> None:
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        tensors = case.make(dtype, layout=layout)
        assert_case(case, tensors, dtype, partial(on_gpu, "triton"), versus_torch=True)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
