# SPDX-License-Identifier: Apache-2.0
"""The functions that may follow a convolution: by the kernel itself where it can, else by torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

# In the order of `Activation` in csrc/common/conv3d.h; index 0 is none.
_BY_TORCH: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,  # slope 0.01
    "gelu": F.gelu,  # by the error function
    "silu": F.silu,
}
_FUNCTIONS = tuple(_BY_TORCH.values())
_INDEX = {name: index for index, name in enumerate(_BY_TORCH)}
ACTIVATIONS = tuple(name for name in _BY_TORCH if name is not None)


def activation_index(name: Any) -> int:
    """Its number in the ops; ValueError for an unknown one."""
    if name is not None and (not isinstance(name, str) or name not in _INDEX):
        raise ValueError(f"activation must be one of {ACTIVATIONS} or None, got {name!r}")
    return _INDEX[name]


def activate(x: Tensor, index: int) -> Tensor:
    """Apply an activation by torch."""
    return _FUNCTIONS[index](x)
