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


def _bits(case: str, path: str, **settings: str) -> str:
    """A hash of the result; its last bits are those of the order of its sums."""
    program = (
        "import hashlib, torch; from cases import BY_NAME; from testing import on, ours\n"
        f"case = BY_NAME['{case}']\n"
        f"with on('{path}'): y = ours(case, *case.make()[:3])\n"
        "print(hashlib.sha256(y.numpy().tobytes()).hexdigest())"
    )
    return _run("-c", program, **settings)


@several_levels
def test_the_switch_switches() -> None:
    """Without fused multiply-add, a sum of 343 products has other last bits."""
    assert _bits("dw7", "direct", VOXCONV_CPU_LEVEL="baseline") != _bits("dw7", "direct")


@several_levels
@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_lower_levels(level: str) -> None:
    """The tests on whole numbers, where every tap shows, and of the receptive field, once more."""
    chosen = "any or field_only or small_geometry or subnormals or overflow or fft_keeps"
    files = ("test_properties.py", "test_edges.py")
    assert "passed" in _run_tests(files, chosen, VOXCONV_CPU_LEVEL=level)


WAYS = ("flat", "rows", "channels")
DILATED_WAYS = ("direct", "winograd")


def test_the_ways_differ() -> None:
    """Each adds up its products in an order of its own."""
    assert len({_bits("dw7", "direct", VOXCONV_CPU_WAY=way) for way in WAYS}) == len(WAYS)
    bits = {_bits("dense3_c30", "dilated", VOXCONV_CPU_WAY=way) for way in DILATED_WAYS}
    assert len(bits) == len(DILATED_WAYS)


@pytest.mark.parametrize("way", WAYS)
def test_ways(way: str) -> None:
    """The costs of a processor may never choose one of them for volumes as small as those of tests:
    the same once more, by each wherever it can do a pass."""
    files = ("test_properties.py", "test_edges.py")
    assert "passed" in _run_tests(files, "any or field_only", VOXCONV_CPU_WAY=way)


@pytest.mark.parametrize("way", DILATED_WAYS)
def test_dilated_ways(way: str) -> None:
    chosen = "(test_rows and (float32 or bfloat16)) or reach or same_bits"
    assert "passed" in _run_tests(("test_dilated.py",), chosen, VOXCONV_CPU_WAY=way)


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
