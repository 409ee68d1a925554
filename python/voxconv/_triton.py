# SPDX-License-Identifier: Apache-2.0
"""Whether the kernels of `voxconv.triton_kernels` can be used; Triton itself is imported by them,
when they are first called."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor


def missing_reason() -> str | None:
    """Why the Triton kernels cannot be used; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if importlib.util.find_spec("voxconv.triton_kernels") is None:
        return "voxconv runs from its sources without being installed: pip install -e ."
    return None


def launcher(family: str, name: str) -> Callable[..., Tensor]:
    """A function of `voxconv.triton_kernels.<family>`."""

    def launch(*args: Any) -> Tensor:
        module = importlib.import_module(f"voxconv.triton_kernels.{family}")
        return getattr(module, name)(*args)  # type: ignore[no-any-return]

    return launch
