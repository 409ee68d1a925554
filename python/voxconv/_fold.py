# SPDX-License-Identifier: Apache-2.0
"""The input gradient of padding that repeats cells: what they got comes back to where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._geometry import PADDING_MODES, Sextuple


def fold_padding(
    padded: Callable[[Sequence[int], torch.dtype], Tensor],
    size: Sequence[int],
    padding: Sextuple,
    mode: int,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of x [N, C, *size], given that of x padded.

    Args:
        padded: `padded(size, dtype)` gives the gradient [N, C, *size] of the padded input; halves
            are asked for, and added, in float32.
        padding: cells before and after D, H and W.
        mode: index of the padding mode, not that of zeros.
        dtype: of the result.
    """
    wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    pairs = [(padding[2 * i], padding[2 * i + 1]) for i in range(3)]
    grad = padded([n + a + b for n, (a, b) in zip(size, pairs, strict=True)], wide)
    for axis, (n, (before, after)) in enumerate(zip(size, pairs, strict=True), 2):
        grad = _fold(grad, axis, n, before, after, PADDING_MODES[mode])
    return grad.to(dtype)


def _fold(grad: Tensor, axis: int, n: int, before: int, after: int, mode: str) -> Tensor:
    if not (before or after):
        return grad
    kept = grad.narrow(axis, before, n).clone()
    low, high = grad.narrow(axis, 0, before), grad.narrow(axis, before + n, after)
    if mode == "replicate":
        kept.narrow(axis, 0, 1).add_(low.sum(axis, keepdim=True))
        kept.narrow(axis, n - 1, 1).add_(high.sum(axis, keepdim=True))
    elif mode == "reflect":
        kept.narrow(axis, 1, before).add_(low.flip(axis))
        kept.narrow(axis, n - 1 - after, after).add_(high.flip(axis))
    else:
        kept.narrow(axis, n - before, before).add_(low)
        kept.narrow(axis, 0, after).add_(high)
    return kept
