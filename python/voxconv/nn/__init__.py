# SPDX-License-Identifier: Apache-2.0
"""Modules with the arguments, parameters and state_dict keys of their torch.nn namesakes."""

from .dense import Conv3d, ConvTranspose3d, DepthwiseConv3d
from .pyramid import DilatedPyramid3d

__all__ = ["Conv3d", "ConvTranspose3d", "DepthwiseConv3d", "DilatedPyramid3d"]
