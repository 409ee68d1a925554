# SPDX-License-Identifier: Apache-2.0
"""The environment variables that kernels read, once, when they are first used."""

from __future__ import annotations

import os
import warnings

# Kernel families, in the order of csrc/cuda/launch.cuh.
CUDA_WAYS = ("any", "planes", "channels", "lines", "slabs", "weight_lines", "toeplitz", "hankel")
CPU_WAYS = ("flat", "rows", "channels", "direct", "winograd")  # of csrc/cpu/depthwise_costs.cpp
CPU_LEVELS = ("x86-64-v4", "x86-64-v3", "baseline")  # from the most a processor can do to the least

# What each may be, as a test and in words.
_KNOWN = {
    "VOXCONV_CPU_LEVEL": (CPU_LEVELS.__contains__, f"one of {', '.join(CPU_LEVELS)}"),
    "VOXCONV_CPU_WAY": (CPU_WAYS.__contains__, f"one of {', '.join(CPU_WAYS)}"),
    "VOXCONV_CUDA_WAY": (CUDA_WAYS.__contains__, f"one of {', '.join(CUDA_WAYS)}"),
    "VOXCONV_CACHE_MIB": (str.isdecimal, "a whole number of MiB"),
    "VOXCONV_AUTOTUNE": (("0", "1").__contains__, "0 or 1"),
}


def setting(name: str) -> str | None:
    """The value of a variable; None if it is not set, empty, or nothing that it may be."""
    value = os.environ.get(name)
    allowed, _ = _KNOWN[name]
    return value if value and allowed(value) else None


def warn_of_unknown() -> None:
    """One RuntimeWarning for each variable whose value means nothing, and so is not followed."""
    for name, (_, words) in _KNOWN.items():
        if os.environ.get(name) and setting(name) is None:
            text = f"{name}={os.environ[name]!r} is not followed: it may be {words}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
