# SPDX-License-Identifier: Apache-2.0
"""The speeds this project promises on the CPU: a table, which bars.py measures and judges."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

import _path  # noqa: F401
import testing
from run import LOSING, SUITE_MODES, SUITE_TAG

PASSES = ("fwd", "grad_input", "grad_weight")
DW5 = ("bar_dw5_48@48", "bar_dw5_64@32", "bar_dw5_96@24")
DW7 = ("uxnet_dw7_48@48", "bar_dw7_64@32", "uxnet_dw7_96@24")
DW3 = ("bar_dw3_48@48",)
DW21 = ("bar_dw21_48@24",)
STRIDE2 = ("bar_stride2_dw3_48@48", "bar_stride2_dw5_48@48", "bar_stride2_dw7_48@48")
DENSE_BARS = ("dense3_32@48", "dense3_32@48_dilation2")
DENSE_64 = ("dense3_16@32_dilation2",)
MESHNET = tuple(f"meshnet_30_dilation{d}@64" for d in (4, 8, 16))
DILATED = {
    "bar_dw3_48@48": ("bar_dilation2_dw3_48@48", "bar_dilation3_dw3_48@48"),
    "bar_dw3_32@64": ("bar_dilation2_dw3_32@64", "bar_dilation3_dw3_32@64"),
    "bar_dw5_48@48": ("bar_dilation2_dw5_48@48", "bar_dilation3_dw5_48@48"),
    "uxnet_dw7_48@48": ("bar_dilation2_dw7_48@48", "bar_dilation3_dw7_48@48"),
}


@dataclass(frozen=True)
class Bar:
    """One promise: every figure that ``metric`` finds for ``rows`` and ``modes`` keeps it."""

    name: str
    metric: str
    threshold: float
    rows: tuple[str, ...] = ()
    modes: tuple[str, ...] = PASSES
    rival: str = ""
    dtype: torch.dtype = torch.float32
    tag: str = SUITE_TAG  # of the rows that "suite" and "slowest" look at


DEPTHWISE = (
    Bar("dw5, dw7 forward, share of roof", "roof", 0.80, DW5 + DW7, ("fwd",)),
    Bar("dw5, dw7 grad_input, share of roof", "roof", 0.80, DW5 + DW7, ("grad_input",)),
    Bar("dw5, dw7 grad_weight, share of roof", "roof", 0.65, DW5 + DW7, ("grad_weight",)),
    Bar("dw3 forward, share of roof", "roof", 0.60, DW3, ("fwd",)),
    Bar("dw3 grad_input, share of roof", "roof", 0.60, DW3, ("grad_input",)),
    Bar("dw3 grad_weight, share of roof", "roof", 0.50, DW3, ("grad_weight",)),
    Bar("channels_last_3d time over NCDHW", "layout", 1.2, DW5 + DW7 + DW3),
    Bar("dilation 2, 3 time over dilation 1", "dilation", 1.3, tuple(DILATED)),
    Bar("stride 2, share of roof", "roof", 0.40, STRIDE2),
    Bar("bfloat16 time over float32", "bfloat16", 1.3, DW5 + DW7 + DW3),
    Bar("float16 time over float32", "float16", 1.3, DW5 + DW7 + DW3),
    Bar("dw21 forward, x better torch layout", "speedup", 5, DW21, ("fwd",), "best"),
    Bar("dw21 backward, x better torch layout", "speedup", 15, DW21, ("bwd",), "best"),
    Bar("suite forward, geomean x F.conv3d NCDHW", "suite", 10, (), ("fwd",), "conv3d"),
    Bar("suite forward, geomean x better layout", "suite", 2.5, (), ("fwd",), "best"),
    Bar("suite fwd+bwd, geomean x F.conv3d NCDHW", "suite", 25, (), ("full",), "conv3d"),
    Bar("suite fwd+bwd, geomean x better layout", "suite", 8, (), ("full",), "best"),
    Bar("suite, slowest row x better layout", "slowest", LOSING, (), SUITE_MODES, "best"),
    Bar("call overhead over F.conv3d, us", "overhead", 20, (), ("fwd",)),
)
DENSE = (
    *(
        replace(bar, name=f"dense {testing.dtype_id(dtype)} {bar.name}", dtype=dtype)
        for dtype in (torch.bfloat16, torch.float16)
        for bar in (
            Bar("forward, x torch without oneDNN", "emulated", 100, DENSE_BARS, ("fwd",), "best"),
            Bar("fwd+bwd, x torch without oneDNN", "emulated", 50, DENSE_BARS, ("full",), "best"),
            Bar("time over float32", testing.dtype_id(dtype), 1.5, DENSE_BARS, ("fwd", "full")),
        )
    ),
    Bar(
        "dense float64 forward, x better layout",
        "speedup",
        8,
        DENSE_64,
        ("fwd",),
        "best",
        torch.float64,
    ),
    Bar(
        "dense float64 fwd+bwd, x better layout",
        "speedup",
        5,
        DENSE_64,
        ("full",),
        "best",
        torch.float64,
    ),
    Bar("dense MeshNet forward, x NCDHW", "speedup", 2.5, MESHNET, ("fwd",), "conv3d"),
    Bar("dense MeshNet fwd+bwd, x NCDHW", "speedup", 1.7, MESHNET, ("full",), "conv3d"),
    Bar(
        "dense suite, slowest row x better layout",
        "slowest",
        LOSING,
        (),
        SUITE_MODES,
        "best",
        tag="dense_model",
    ),
    Bar(
        "dense stride 2, x F.pad and F.conv3d",
        "speedup",
        1,
        ("meshnet_30_stride2@64",),
        SUITE_MODES,
        "best",
    ),
    Bar(
        "dense MeshNet 128^3, extra MB",
        "memory",
        64,
        ("meshnet_30_dilation16@128",),
        ("fwd",),
        dtype=torch.bfloat16,
    ),
)

# Under the name of the file that their figures go to.
BARS = {"bars": DEPTHWISE, "dense_bars": DENSE}
SUITES = {SUITE_TAG: "suite", "dense_model": "dense_suite"}
