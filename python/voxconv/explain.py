# SPDX-License-Identifier: Apache-2.0
"""What a call would do, and at what cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ._check import Passes
from ._geometry import IntOrTriple, PaddingLike, integer, mode_index, triple
from .functional import settle, tensors

_ZERO = (0, 0, 0)


@dataclass(frozen=True)
class Explanation:
    """What a call would do; print it for a few lines of text.

    Attributes:
        backend: "cpu", "cuda", "triton" or "torch": who computes the result.
        kernel: the kernel there: "direct", "fft", "triton", "dilated", "dilated_triton", or
            "conv3d" of torch.
        reason: why this one.
        output_shape: of the result.
        flops: of the result alone: two for each tap of each output.
        bytes: of the result alone: every tensor read or written once.
        passes: the choices for the result, the gradient of the input and that of the weight, each
            with `backend`, `kernel` and `reason`.
    """

    backend: str
    kernel: str
    reason: str
    output_shape: tuple[int, ...]
    flops: int
    bytes: int
    passes: Passes

    def __str__(self) -> str:
        lines = [
            f"output {list(self.output_shape)}, {self.flops / 1e9:.3g} GFLOP, "
            f"{self.bytes / 1e6:.3g} MB"
        ]
        for name, choice in zip(Passes._fields, self.passes, strict=True):
            lines.append(f"{name:<12}{choice.backend}/{choice.kernel}: {choice.reason}")
        return "\n".join(lines)


def explain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrTriple = 1,
    padding: PaddingLike = 0,
    dilation: IntOrTriple = 1,
    groups: int | None = None,
    padding_mode: str = "zeros",
    *,
    transposed: bool = False,
    output_padding: IntOrTriple = 0,
) -> Explanation:
    """Tell which backend and kernel a call would use, why, and what it costs; runs nothing.

    Args:
        groups: as in `conv3d`; None takes what the shape of the weight says.
        transposed: explain `conv_transpose3d` instead of `conv3d`.
        All others: as in `conv3d` and `conv_transpose3d`.

    Returns:
        The `Explanation`.

    Raises:
        ValueError, TypeError, NotImplementedError: those of the call itself; ValueError for an
            argument that the function to explain does not have.
    """
    input, weight, bias = tensors(input, weight, bias)
    if transposed and mode_index(padding_mode):
        raise ValueError(f"conv_transpose3d has no padding_mode, got {padding_mode!r}")
    if not transposed and triple(output_padding, "output_padding") != _ZERO:
        raise ValueError(f"conv3d has no output_padding, got {output_padding!r}")
    if groups is not None:
        groups = integer(groups, "groups")
    if groups is None and input.dim() in (4, 5) and weight.dim() == 5:
        channels, per_group = input.shape[-4], weight.shape[1]
        if transposed:
            groups = channels if per_group == 1 else 1
        elif per_group != 1:
            groups = max(channels // max(per_group, 1), 1)
    call = settle(
        transposed,
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        padding_mode,
        output_padding,
    )
    meetings = call.out_shape[0] * math.prod(input.shape[-3:] if transposed else call.out_shape[2:])
    values = input.numel() + weight.numel() + math.prod(call.out_shape)
    if bias is not None:
        values += bias.numel()
    first = call.passes.forward
    return Explanation(
        backend=first.backend,
        kernel=first.kernel,
        reason=first.reason,
        output_shape=call.out_shape if input.dim() == 5 else call.out_shape[1:],
        flops=2 * weight.numel() * meetings,
        bytes=values * input.element_size(),
        passes=call.passes,
    )
