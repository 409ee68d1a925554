# SPDX-License-Identifier: Apache-2.0
"""The figures of docs/depthwise.md that are reckoned, not measured (bench/gpu_predict.py)."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cuda_kernels import ROOT

sys.path.append(str(ROOT / "bench"))
import gpu_predict

SCRIPT = ROOT / "bench" / "gpu_predict.py"


@pytest.fixture(scope="module")
def predictions() -> gpu_predict.Predictions:
    return gpu_predict.Predictions()


def test_page_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}python bench/gpu_predict.py --write"


@pytest.mark.parametrize("dtype", gpu_predict.DTYPES, ids=str)
def test_nothing_beats_its_roof(dtype: torch.dtype, predictions: gpu_predict.Predictions) -> None:
    """That of the memory, and without tensor cores that of multiply-adds on cells that exist."""
    for case, found in predictions.suite(dtype):
        for made in filter(None, found):
            assert made.seconds >= case.bytes(dtype.itemsize) / gpu_predict.COPY, case
            if not any(launch.work.products for launch in made.launches):
                assert made.seconds >= case.live_flops / 2 / gpu_predict.FMA, case


@pytest.mark.parametrize("dtype", gpu_predict.DTYPES, ids=str)
def test_blocks_do_all_the_work(dtype: torch.dtype, predictions: gpu_predict.Predictions) -> None:
    """Multiply-adds of all blocks are those of the pass and not many times as many, so tiles and
    slabs are those of the launch."""
    for case, found in predictions.suite(dtype):
        for made in filter(None, found):
            launch = made.launches[0]
            done = 32 * (launch.work.fmas + 64 * launch.work.products) * launch.kernel.blocks
            assert done >= 0.999 * case.live_flops / 2, (case, made.of.which)


def test_all_families_are_known(predictions: gpu_predict.Predictions) -> None:
    assert all(
        launch.work
        for launches in gpu_predict.typical(predictions).values()
        for launch in launches.values()
    )
