# SPDX-License-Identifier: Apache-2.0
"""Every instruction set the library was compiled for, on this machine, and every way through a pass
of NCDHW tensors: each in a process of its own, because the choice is made once."""

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

pytestmark = pytest.mark.skipif(not _ops.has_cpu(), reason="the compiled part is missing")
several_levels = pytest.mark.skipif(not LEVELS, reason="this processor has one level only")


def _run(*command: str, **settings: str) -> str:
    environment = os.environ | {"VOXCONV_EXAMPLES": "60"}
    for name in ("VOXCONV_CPU_LEVEL", "VOXCONV_CPU_WAY"):
        environment.pop(name, None)
    environment |= settings
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=HERE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


def _run_tests(files: tuple[str, ...], chosen: str, **settings: str) -> str:
    quiet = ("-q", "-x", "--no-header", "-p", "no:cacheprovider")
    return _run("-m", "pytest", *quiet, *files, "-k", chosen, **settings)


# The last bits of a result are those of the order of its sums.
PROGRAM = (
    "import hashlib, torch; from cases import BY_NAME; from testing import on, ours\n"
    "case = BY_NAME['dw7']\n"
    "with on('direct'): y = ours(case, *case.make()[:3])\n"
    "print(hashlib.sha256(y.numpy().tobytes()).hexdigest())"
)


@several_levels
def test_the_switch_switches() -> None:
    """Without fused multiply-add, a sum of 343 products has other last bits."""
    assert _run("-c", PROGRAM, VOXCONV_CPU_LEVEL="baseline") != _run("-c", PROGRAM)


@several_levels
@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_lower_levels(level: str) -> None:
    """The tests on whole numbers, where every tap shows, and of the receptive field, once more."""
    chosen = "any or field_only or small_geometry or subnormals or overflow or fft_keeps"
    files = ("test_properties.py", "test_edges.py")
    assert "passed" in _run_tests(files, chosen, VOXCONV_CPU_LEVEL=level)


WAYS = ("flat", "rows", "channels")


def test_the_ways_differ() -> None:
    """Each adds up its products in an order of its own."""
    assert len({_run("-c", PROGRAM, VOXCONV_CPU_WAY=way) for way in WAYS}) == len(WAYS)


@pytest.mark.parametrize("way", WAYS)
def test_ways(way: str) -> None:
    """The costs of a processor may never choose one of them for volumes as small as those of tests:
    the same once more, by each wherever it can do a pass."""
    files = ("test_properties.py", "test_edges.py")
    assert "passed" in _run_tests(files, "any or field_only", VOXCONV_CPU_WAY=way)


@pytest.mark.parametrize("way", WAYS)
def test_ways_have_activations(way: str) -> None:
    chosen = "cpu_kernels and direct and gelu"
    assert "passed" in _run_tests(("test_activation.py",), chosen, VOXCONV_CPU_WAY=way)


@several_levels
@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_lower_levels_have_activations(level: str) -> None:
    chosen = "cpu and (gelu or silu)"
    assert "passed" in _run_tests(("test_activation.py",), chosen, VOXCONV_CPU_LEVEL=level)
