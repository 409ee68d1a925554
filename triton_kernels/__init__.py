# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of voxconv: device code and launchers, without autograd.

Installed as ``voxconv.triton_kernels``, because the bare name ``triton_kernels`` belongs to Triton.
Triton is imported with ``voxconv.triton_kernels.depthwise``, not before: ask `available` first.
"""

from __future__ import annotations

import importlib
from functools import cache

__all__ = ["available"]


@cache
def available() -> str | None:
    """Why Triton cannot be used; None when it can."""
    try:
        importlib.import_module("triton.language")
    except Exception as error:  # a Triton that breaks is as good as none
        return f"triton does not load: {error}"
    return None
