# SPDX-License-Identifier: Apache-2.0
"""Every test starts from the same seed, with all fresh memory poisoned and the threads restored."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator

import pytest
import torch

import cuda_kernels
from testing import MALLOC_FILL


def _poison_torch() -> None:
    """ATen fills every empty tensor with NaN (integers: their maximum), whoever asks for it.

    The switch lives in ``aten::empty`` and its kin, so tensors that compiled code allocates through
    the dispatcher are filled like those of ``torch.empty``.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def _poison_malloc() -> None:
    """glibc fills what malloc returns with ``MALLOC_FILL``: scratch that is no tensor shows too."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_perturb = -6
        mallopt(m_perturb, ~MALLOC_FILL & 0xFF)


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before torch imports Triton, which reads it once
_poison_torch()
_poison_malloc()
os.environ["VOXCONV_CACHE_MIB"] = "0"  # results in memory that is used again would hold old results


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sweeps are for those who ask for them (-m sweep), the rest of a GPU where there is one."""
    left_out = set() if "sweep" in config.getoption("-m") else {"sweep"}
    if not torch.cuda.is_available():
        left_out.add("gpu")
    gone = [item for item in items if left_out & {mark.name for mark in item.iter_markers()}]
    if gone:
        config.hook.pytest_deselected(items=gone)
        kept = set(items) - set(gone)
        items[:] = [item for item in items if item in kept]


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """Seed before; threads, poison and default dtype as they were, after."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
    _poison_torch()


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request: pytest.FixtureRequest) -> int:
    """Runs the test with one and with two intra-op threads."""
    torch.set_num_threads(request.param)
    return request.param


@pytest.fixture
def at_threads() -> Callable[[int, Callable[[], object]], object]:
    """``at_threads(n, call)`` runs ``call`` with ``n`` intra-op threads."""

    def run(count: int, call: Callable[[], object]) -> object:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            return call()
        finally:
            torch.set_num_threads(before)

    return run


@pytest.fixture(scope="session")
def kernels() -> ctypes.CDLL:
    """The CUDA kernels, for the CPU."""
    return cuda_kernels.build()
