# SPDX-License-Identifier: Apache-2.0
"""Separable, dilated and sparse 3-D convolutions for PyTorch.

`conv3d` and `conv_transpose3d` are drop-ins for their namesakes in `torch.nn.functional`;
`convert(model)` puts them under the convolutions of a model.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from . import nn, reference
from ._dispatch import use_backend
from .convert import convert, revert
from .explain import explain
from .functional import conv3d, conv_transpose3d, depthwise_conv3d, dilated_conv3d
from .memory import empty_cache

try:
    __version__ = version("voxconv")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

__all__ = [
    "__version__",
    "conv3d",
    "conv_transpose3d",
    "convert",
    "depthwise_conv3d",
    "dilated_conv3d",
    "empty_cache",
    "explain",
    "nn",
    "reference",
    "revert",
    "use_backend",
]
