# SPDX-License-Identifier: Apache-2.0
"""How a result is judged: against the float64 oracle, and against torch in the same dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import voxconv
from cases import Case, Tensors
from voxconv import _dispatch, functional

MALLOC_FILL = 0xFE  # about -1.7e38 in float32 and bfloat16, -5e303 in float64, NaN in float16
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
LONGEST_CHAIN = 256  # of a sum over the volume, before it goes to a second accumulator
PATHS = ("direct", "fft", "torch")  # of depthwise rows
PASSES = ("forward", "grad_input", "grad_weight", "grad_bias")

Conv = Callable[[Case, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def accumulation_eps(dtype: torch.dtype) -> float:
    """Halves add in float32."""
    return torch.finfo(torch.float32 if dtype in HALVES else dtype).eps


def rms(t: torch.Tensor) -> float:
    return t.double().square().mean().sqrt().item() if t.numel() else 0.0


def assert_accurate(
    name: str,
    got: torch.Tensor,
    oracle64: torch.Tensor,
    torch_same_dtype: torch.Tensor | None = None,
    *,
    taps: int = 1,
    chain: int | None = None,
) -> None:
    """Holds ``got`` to what its arithmetic can give, where ``taps`` products make one output.

    With eps(out) of the output dtype, eps(acc) of the accumulator and E = got - oracle64:

    - RMS(E) <= (eps(out)/2 + eps(acc) sqrt(taps)) RMS(oracle): rounded once, added at random;
    - max|E| <= eps(out)|oracle| + 16 eps(acc) sqrt(taps) RMS(oracle): no single output is wrong;
    - the mean of E and its share along the oracle vanish: no offset, no wrong gain;
    - RMS(E) <= 2 x torch's own, or what one rounding and adding ``chain`` (else ``taps``) products
      one after the other cost: on small problems torch happens to add in a tree. (Not in float64,
      where the oracle errs as much.)
    """
    assert got.shape == oracle64.shape, f"{name}: shape {got.shape}, expected {oracle64.shape}"
    assert oracle64.dtype == torch.float64, f"{name}: the oracle is {oracle64.dtype}"
    if got.numel() == 0:
        return
    out_eps = torch.finfo(got.dtype).eps
    sum_eps = accumulation_eps(got.dtype) * math.sqrt(taps)
    error, scale = got.double() - oracle64, rms(oracle64)
    ours = rms(error)
    theirs = None if torch_same_dtype is None else rms(torch_same_dtype.double() - oracle64)
    figures = (
        f"{name}: RMS error {_relative(ours, scale)}, torch's {_relative(theirs, scale)}"
        f" (of RMS {scale:.3g}; {dtype_id(got.dtype)}, {taps} taps)"
    )
    allowed = (out_eps / 2 + sum_eps) * scale
    assert ours <= allowed, f"{figures}; allowed {_relative(allowed, scale)}"

    limit = out_eps * oracle64.abs() + 16 * sum_eps * scale
    worst = int((error.abs() - limit).argmax())
    assert error.flatten()[worst].abs() <= limit.flatten()[worst], (
        f"{figures}; at {_place(worst, got.shape)} {got.flatten()[worst]:.8g}"
        f" for {oracle64.flatten()[worst]:.8g}"
    )
    different = oracle64.unique().numel()  # copies of one output share its error
    chance = 8 * ours / math.sqrt(different) + (out_eps / 8 + accumulation_eps(got.dtype)) * scale
    assert error.mean().abs() <= chance, f"{figures}; mean error {error.mean():.3g} > {chance:.3g}"
    if scale > 0:
        gain = (error * oracle64).mean().abs() / scale
        assert gain <= chance, f"{figures}; error along the result {gain:.3g} > {chance:.3g}"
    if theirs is not None and got.dtype != torch.float64:
        plain = accumulation_eps(got.dtype) * math.sqrt(chain or taps) / 4
        twice = max(2 * theirs, (out_eps / 2 + plain) * scale)
        assert ours <= twice, f"{figures}; more than twice torch's"


def _relative(value: float | None, scale: float) -> str:
    return "unknown" if value is None else f"{value / scale if scale else value:.3g}"


def _place(flat: int, shape: torch.Size) -> tuple[int, ...]:
    place = []
    for length in reversed(shape):
        flat, i = divmod(flat, length)
        place.append(i)
    return tuple(reversed(place))


@contextmanager
def on(path: str | None, backend: str = "cpu") -> Iterator[None]:
    """Sends every call inside to one kernel of the CPU, or to torch; None lets the rules choose.

    Another `backend` is what the call takes it for, where a test has put others in its place.
    """
    if path in (None, "torch"):
        with voxconv.use_backend(path):
            yield
        return
    choice = _dispatch.Choice(backend, path, "asked for by a test")
    functional._calls.clear()
    with (
        mock.patch.object(_dispatch, "_cpu_kernel", return_value=choice),
        voxconv.use_backend("cpu"),
    ):
        yield
    functional._calls.clear()


@contextmanager
def ops_called() -> Iterator[set[str]]:
    """Names of the ops that reach the dispatcher inside, as "voxconv::depthwise_forward"."""
    called: set[str] = set()

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            called.add(func.name().split(".")[0])
            return func(*args, **kwargs or {})

    with Listen():
        yield called


def ours(
    case: Case, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The row through the public function."""
    op = {
        "depthwise": voxconv.depthwise_conv3d,
        "dilated": voxconv.dilated_conv3d,
        "transposed": voxconv.conv_transpose3d,
    }[case.op]
    return op(x, weight, bias, **case.kwargs())


def reference(
    case: Case, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The row through the package's oracle, in the dtype of the tensors."""
    ref = voxconv.reference
    op = {
        "depthwise": ref.depthwise_conv3d,
        "dilated": ref.conv3d,
        "transposed": ref.conv_transpose3d,
    }[case.op]
    return op(x, weight, bias, **case.kwargs())


def by_torch(
    case: Case, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The row as a user would write it with torch alone: a padded copy and ``F.conv3d``."""
    flat = [side for pair in reversed(case.pads) for side in pair]
    if case.transposed:
        even = all(a == b for a, b in case.pads)
        y = F.conv_transpose3d(
            x,
            weight,
            bias,
            case.stride,
            tuple(a if even else 0 for a, _ in case.pads),
            case.output_padding,
            case.blocks,
            case.dilation,
        )
        return y if even else F.pad(y, [-side for side in flat])
    if case.mode == "zeros" and all(a == b for a, b in case.pads):
        pads = tuple(a for a, _ in case.pads)
        return F.conv3d(x, weight, bias, case.stride, pads, case.dilation, case.blocks)
    wide = x if case.mode == "zeros" or x.dtype not in HALVES else x.float()
    padded = F.pad(wide, flat, "constant" if case.mode == "zeros" else case.mode).to(x.dtype)
    return F.conv3d(padded, weight, bias, case.stride, 0, case.dilation, case.blocks)


def all_passes(conv: Conv, case: Case, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Output and the three gradients of one row, keyed as in ``PASSES``."""
    x, weight, bias = (t.detach().requires_grad_() for t in tensors[:3])
    y = conv(case, x, weight, bias)
    grads = torch.autograd.grad(y, (x, weight, bias), tensors.grad)
    return dict(zip(PASSES, (y.detach(), *grads), strict=True))


@lru_cache(maxsize=1024)
def oracle_passes(case: Case, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """``all_passes`` of the oracle, in float64, on the values the tensors have in ``dtype``.

    Problems too large for a loop over the taps take F.conv3d in float64, which test_reference
    holds against that loop.
    """
    cells = case.n * case.out_channels * math.prod(case.out_size)
    oracle = reference if case.products * cells <= 2e6 else by_torch
    return all_passes(oracle, case, Tensors(*(t.double() for t in case.make(dtype, seed))))


def _hangs_torch(case: Case, dtype: torch.dtype) -> bool:
    """oneDNN's kernels for halves (torch 2.13, AVX512-BF16 and -FP16) never return from these."""
    return dtype in HALVES and case.kernel[2] >= 15


@lru_cache(maxsize=1024)
def torch_passes(case: Case, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor] | None:
    """``all_passes`` of torch in ``dtype``; None where torch has no kernel for it."""
    if _hangs_torch(case, dtype):
        return None
    try:
        return all_passes(by_torch, case, case.make(dtype, seed, layout="ncdhw"))
    except (NotImplementedError, RuntimeError):
        return None


def products(case: Case, which: str) -> int:
    """How many products are added up for one number of forward or grad_input, at most."""
    made = case.channels if which == "grad_input" else case.out_channels
    return case.taps * case.pairs // made


def summands(case: Case, which: str) -> int:
    """How many products are added up for one number of a pass."""
    size, out = math.prod(case.size), math.prod(case.out_size)
    if which == "grad_bias":
        return case.n * out
    if which == "grad_weight":
        return case.n * (size if case.transposed else out)
    if which == "grad_input" and case.mode != "zeros":  # cells of the border are read many times
        return products(case, which) * -(-out // size)
    return products(case, which) + 1


def assert_case(
    case: Case, tensors: Tensors, dtype: torch.dtype, conv: Conv = ours, *, versus_torch: bool
) -> None:
    """All four passes of a row held to :func:`assert_accurate`; seed 0 values, any strides."""
    theirs = torch_passes(case, dtype) if versus_torch else None
    oracle = oracle_passes(case, dtype)
    for which, got in all_passes(conv, case, tensors).items():
        assert got.dtype == dtype
        whole = which in ("grad_weight", "grad_bias")
        longest = LONGEST_CHAIN if whole else products(case, which)
        assert_accurate(
            f"{case} {which}",
            got,
            oracle[which],
            theirs and theirs[which],
            taps=summands(case, which),
            chain=min(summands(case, which), longest),
        )


def bitwise_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same bits everywhere (so NaN equals NaN and 0.0 differs from -0.0)."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.contiguous().view(whole), b.contiguous().view(whole))
