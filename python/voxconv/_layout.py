# SPDX-License-Identifier: Apache-2.0
"""The memory layout of results: that of the tensor they follow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a 5-D tensor is channels_last_3d; one that is also contiguous counts as NCDHW."""
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last_3d)


def empty_in_layout_of(leader: Tensor, shape: Sequence[int]) -> Tensor:
    """An empty 5-D tensor with the dtype, device and layout of `leader`."""
    layout = torch.channels_last_3d if is_channels_last(leader) else torch.contiguous_format
    return torch.empty(shape, dtype=leader.dtype, device=leader.device, memory_format=layout)
