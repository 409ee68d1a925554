# SPDX-License-Identifier: Apache-2.0
"""Every instruction set the library was compiled for, on this machine: each in a process of its
own, because the choice is made once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from voxconv import _ops

HERE = Path(__file__).parent
BELOW = {"AVX512": ("x86-64-v3", "baseline"), "AVX2": ("baseline",)}
LEVELS = BELOW.get(torch.backends.cpu.get_cpu_capability(), ())

pytestmark = [
    pytest.mark.skipif(not _ops.has_cpu(), reason="the compiled part is missing"),
    pytest.mark.skipif(not LEVELS, reason="this processor has one level only"),
]


def _run(level: str | None, *command: str) -> str:
    environment = os.environ | {"VOXCONV_EXAMPLES": "60"}
    environment.pop("VOXCONV_CPU_LEVEL", None)
    if level is not None:
        environment["VOXCONV_CPU_LEVEL"] = level
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=HERE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def test_the_switch_switches() -> None:
    """Without fused multiply-add, a sum of 343 products has other last bits."""
    program = (
        "import hashlib, torch; from cases import BY_NAME; from testing import on, ours\n"
        "case = BY_NAME['dw7']\n"
        "with on('direct'): y = ours(case, *case.make()[:3])\n"
        "print(hashlib.sha256(y.numpy().tobytes()).hexdigest())"
    )
    assert _run("baseline", "-c", program) != _run(None, "-c", program)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_lower_levels(level: str) -> None:
    """The tests on whole numbers, where every tap shows, and of the receptive field, once more."""
    chosen = "any or field_only or small_geometry or subnormals or overflow or fft_keeps"
    files = ("test_properties.py", "test_edges.py")
    quiet = ("-q", "-x", "--no-header", "-p", "no:cacheprovider")
    assert "passed" in _run(level, "-m", "pytest", *quiet, *files, "-k", chosen)
