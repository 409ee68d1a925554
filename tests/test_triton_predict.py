# SPDX-License-Identifier: Apache-2.0
"""The figures of docs/dilated.md that are reckoned, not measured (bench/triton_predict.py)."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cases import LAYOUTS, Case
from cuda_kernels import ROOT
from dense_cases import MODELS

pytest.importorskip("triton")
sys.path.append(str(ROOT / "bench"))
import triton_predict

SCRIPT = ROOT / "bench" / "triton_predict.py"


def _check(*options: str) -> None:
    command = [sys.executable, SCRIPT, "--check", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}python bench/triton_predict.py --write"


def test_page_is_up_to_date() -> None:
    _check()


@pytest.mark.sweep
def test_machine_code_is_as_the_page_says() -> None:
    _check("--compile")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", MODELS, ids=str)
def test_all_products_are_made(case: Case, layout: str) -> None:
    """Those of cells that exist, and not many times as many where channels fill the blocks."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for which, launch in triton_predict.launches(case, dtype, layout).items():
            share = triton_predict.share(case, launch)
            assert share <= 1, (which, launch)
            whole = case.channels % 32 == case.filters % 32 == 0
            alone = case.flops / 2 / launch.products  # with taps in the padding
            assert alone >= (0.6 if whole and min(case.size) > 4 else 0.09), (which, launch)
