# SPDX-License-Identifier: Apache-2.0
"""When torch's convolution is quicker than ours on the CPU: a pure function of the problem."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ._dispatch import Problem


# Whether torch's oneDNN has convolutions of a type for this processor.
_NATIVE = {
    torch.float32: True,
    torch.float64: False,
    torch.bfloat16: bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    torch.float16: bool(torch.ops.mkldnn._is_mkldnn_fp16_supported()),
}


def better_by_torch(problem: Problem) -> str | None:
    """Why the whole problem, all its passes, is better left to torch."""
    return None


def reason(problem: Problem) -> str:
    """Why it is ours."""
    if not _NATIVE[problem.dtype]:
        return f"torch has no convolution for {problem.dtype} on this processor but a loop"
    return "tiles that stay in the caches, no columns of the volume"
