# SPDX-License-Identifier: Apache-2.0
"""The CUDA part of the compiled library, as far as a machine without a GPU can tell."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cuda_resources
from voxconv import _ops

pytestmark = pytest.mark.skipif(_ops.cuda_build() is None, reason="built without CUDA: no nvcc")

FOR_ANYTHING = "_any<"  # the kernels for any geometry: they may take what they need


@pytest.fixture(scope="module")
def found() -> dict[cuda_resources.Kernel, cuda_resources.Resources]:
    from voxconv import _C

    return cuda_resources.measure(Path(_C.__file__))


def test_the_ops_have_kernels_for_cuda() -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in _ops._COMPILED["CUDA"]:
        assert has(f"voxconv::{name}", "CUDA")


def test_resources_are_those_of_the_table(
    found: dict[cuda_resources.Kernel, cuda_resources.Resources],
) -> None:
    compiler, table = cuda_resources.read()
    architectures = {kernel.architecture for kernel in found}
    assert architectures
    if compiler != (_ops.cuda_build() or "").partition(" ")[2]:
        pytest.skip(f"the table is of {compiler}")
    expected = {k: v for k, v in table.items() if k.architecture in architectures}
    assert found == expected, "python tests/cuda_resources.py --write"


def test_nothing_spills(found: dict[cuda_resources.Kernel, cuda_resources.Resources]) -> None:
    assert [k for k, r in found.items() if r.stack and FOR_ANYTHING not in k.name] == []
