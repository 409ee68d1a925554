# SPDX-License-Identifier: Apache-2.0
"""Which passes of a convolution that is not depthwise torch is quicker at on the CPU.

A pure function of the problem. torch's oneDNN is near the roof in float32, and past it in halves
where the processor multiplies them, if channels fill its blocks and tensors are channels_last_3d;
ours is as near from either layout, skips padding, has a backward pass for dilations, and takes few
products for 3 taps along D and H (csrc/cpu/dilated_winograd.inc). The bounds follow timings of the
rows tagged dense_model with AVX2 and AVX-512 (bench/run.py --op dilated times them).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from . import _by_torch

if TYPE_CHECKING:
    from ._dispatch import Problem

# Whether torch's oneDNN has convolutions of a type for this processor.
_NATIVE = {
    torch.float32: True,
    torch.float64: False,
    torch.bfloat16: bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    torch.float16: bool(torch.ops.mkldnn._is_mkldnn_fp16_supported()),
}
BLOCK = 16  # channels that oneDNN works on at a time
# Pairs of channels from which on its products are worth the reordering of an NCDHW tensor, and with
# channels_last_3d tensors, which need none.
MANY_PAIRS = {False: 2048, True: 100}
# Bytes of an NCDHW tensor from which on torch's copies of it are fresh pages at every call.
LARGE = 32 << 20
# Of all of them, at most: more is slow, and more memory than this package wants to take unseen.
MOST_REORDERED = 64 << 20
# torch takes im2col and a matrix product, and not oneDNN, for one sample with so few lines of cells
# and kernels of so many taps along H and W; that is as quick from so many pairs of channels on.
FEW_LINES, SHORT_KERNEL, PRODUCT_PAIRS = 20480, 3, 4096

# Pairs of channels up to which ours is quicker at 3 taps along D and H. Beyond, weights do not stay
# in the caches, and weight gradients are few products for each sum of lanes; so they are in narrow
# volumes, and in volumes of few cells weights take longer to prepare than to use.
WINOGRAD_PAIRS = {"forward": 1 << 16, "grad_input": 1 << 16, "grad_weight": 1 << 12}
WINOGRAD_FEW_LINES_PAIRS = 400**2
LEAST_CELLS, LEAST_WIDTH = 512, 16


def better_by_torch(problem: Problem) -> str | None:
    """Why a pass is better left to torch; None if it is not."""
    kernel, _, padding, dilation, mode = problem.geometry
    if math.prod(kernel) == 1 and (_NATIVE[problem.dtype] or problem.dtype == torch.float64):
        return "a kernel of one tap is a matrix product"
    if not _by_torch.suits(padding, mode):
        # Then it is all of the passes, on a padded copy, or none.
        if max(dilation) > 1 or problem.transposed:
            return None
        reason = _reason(problem._replace(op="forward"))
        return reason and f"{reason}, a padded copy included"
    if problem.op != "forward" and max(dilation) > 1:
        return None
    return _reason(problem)


def _reason(problem: Problem) -> str | None:
    filters, own, *kernel = problem.weight_shape
    batch, channels, d, h, _ = problem.x_shape
    groups = channels // own
    pairs = own * filters // groups
    if not _NATIVE[problem.dtype]:
        return None
    one = batch == 1 and groups == 1 and max(kernel[1:]) <= SHORT_KERNEL
    few_lines = one and channels * d * h <= FEW_LINES
    if _in_pairs(problem) and pairs <= _most_pairs(problem.op, few_lines):
        return None
    if few_lines:
        return "one matrix product of columns" if pairs >= PRODUCT_PAIRS else None
    if not problem.channels_last and _reordered_bytes(problem) > MOST_REORDERED:
        return None
    if problem.dtype != torch.float32:
        return f"oneDNN has products of {problem.dtype} on this processor"
    if pairs < MANY_PAIRS[problem.channels_last]:
        return None
    if not problem.channels_last and _is_reordered_slowly(problem):
        return None
    if problem.channels_last:
        return "oneDNN is near the roof in channels_last_3d"
    if own % BLOCK or (filters // groups) % BLOCK:
        return None
    return "oneDNN is near the roof with channels in blocks of 16"


def _in_pairs(problem: Problem) -> bool:
    """Whether ours takes few products for it: outputs in pairs (csrc/cpu/dilated_winograd.inc)."""
    kernel, stride, *_ = problem.geometry
    size = problem.x_shape[2:]
    return (
        problem.dtype == torch.float32
        and not problem.channels_last
        and kernel[:2] == (3, 3)
        and stride[:2] == (1, 1)
        and math.prod(size) >= LEAST_CELLS
        and (problem.op != "grad_weight" or size[2] >= LEAST_WIDTH)
    )


def _most_pairs(op: str, few_lines: bool) -> int:
    return WINOGRAD_FEW_LINES_PAIRS if few_lines and op != "grad_weight" else WINOGRAD_PAIRS[op]


def _reordered_bytes(problem: Problem) -> int:
    """What oneDNN's copies of the NCDHW tensors take."""
    d, h, w = problem.x_shape[2:]
    outputs = problem.weight_shape[0] * math.prod(problem.geometry.out_size((d, h, w)))
    cells = math.prod(problem.x_shape) + problem.x_shape[0] * outputs
    return cells * problem.dtype.itemsize


def _is_reordered_slowly(problem: Problem) -> bool:
    """Whether bringing NCDHW tensors into oneDNN's order takes longer than its products."""
    if problem.op == "grad_weight":
        return False
    if problem.transposed:
        return problem.op == "grad_input"
    size = math.prod(problem.x_shape) * problem.dtype.itemsize
    return max(problem.geometry.stride) > 1 and size >= LARGE


def reason(problem: Problem) -> str:
    """Why it is ours."""
    if not _NATIVE[problem.dtype]:
        return f"torch has no quick convolution for {problem.dtype} on this processor"
    return "tiles that stay in the caches, no columns of the volume"


# cuDNN's versions with which torch does not use it for halves in NCDHW, but a copy of the volume
# for each tap and a matrix product (slow_conv_dilated3d).
_WITHOUT_HALVES = range(90800, 91500)
_HALVES = (torch.bfloat16, torch.float16)


def gpu_rule(problem: Problem, cudnn: int | None = None) -> tuple[bool, str]:
    """Whether a convolution that is not depthwise is left to torch on a GPU, and why.

    Nothing of this is measured yet, so cuDNN keeps all that it is known to be good at. Ours take
    what it, or torch in its place, is known to be slow at. Asymmetric padding and the modes but
    zeros cost torch a padded copy; they are ours only if `use_backend("triton")` asks for it.

    Args:
        problem: one that runs on a GPU.
        cudnn: cuDNN's version, 91002 for 9.10.2; None where there is none.
    """
    halves = problem.dtype in _HALVES
    kernel, _, _, dilation, _ = problem.geometry
    odd = any(channels % 8 for channels in (problem.x_shape[1], problem.weight_shape[0]))
    if halves and cudnn in _WITHOUT_HALVES and kernel != (1, 1, 1) and not problem.channels_last:
        return False, f"torch does not use cuDNN {cudnn} for halves in NCDHW, but copies of columns"
    if halves and odd and max(dilation) > 1:
        return False, "dilated, and cuDNN pads channels of halves to multiples of 8 in copies"
    return True, "left to cuDNN: nothing says that it is slow there"
