# SPDX-License-Identifier: Apache-2.0
"""What the kernels share: index maps, activations, the dtype of sums."""

from __future__ import annotations

import triton
import triton.language as tl

# PaddingMode and Activation of csrc/common/conv3d.h.
REPLICATE = tl.constexpr(1)
REFLECT = tl.constexpr(2)
CIRCULAR = tl.constexpr(3)

RELU = tl.constexpr(1)
LEAKY_RELU = tl.constexpr(2)
GELU = tl.constexpr(3)
SILU = tl.constexpr(4)


@triton.jit
def source_index(i, n, MODE: tl.constexpr):
    """The cell that position i of a padded axis reads; beyond the axis where it reads none."""
    if MODE == REPLICATE:
        i = tl.minimum(tl.maximum(i, 0), n - 1)
    elif MODE == REFLECT:
        i = tl.where(i < 0, -i, i)
        i = tl.where(i < n, i, 2 * (n - 1) - i)
    elif MODE == CIRCULAR:
        i = tl.where(i < 0, i + n, i)
        i = tl.where(i < n, i, i - n)
    return i


@triton.jit
def first_tap(t, axis):
    """The first tap that target t reads with, the source it reads with it, and whether any does."""
    scale, shift, step, divisor, common, inverse, every, _ = axis
    at = t * scale + shift
    k = at // common % every * inverse % every
    return k, (at + k * step) // divisor, at % common == 0


@triton.jit
def activate(x, KIND: tl.constexpr):
    """What an output is, given its sum. NaN stays NaN."""
    if KIND == RELU:
        x = tl.where(x < 0, 0.0, x)
    elif KIND == LEAKY_RELU:
        x = tl.where(x < 0, 0.01 * x, x)
    elif KIND == GELU:
        x = 0.5 * x * (1 + tl.erf(0.70710678118654752440 * x))
    elif KIND == SILU:
        x = x / (1 + tl.exp(-x))
    return x
