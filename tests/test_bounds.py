# SPDX-License-Identifier: Apache-2.0
"""Kernels read and write nothing outside their tensors: these end where no memory is mapped."""

from __future__ import annotations

import ctypes
import mmap
import sys

import pytest
import torch

from cases import Case, Tensors
from testing import DTYPES, all_passes, bitwise_equal, dtype_id, on, ours

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="guard pages are made with mmap")

PAGE = mmap.PAGESIZE
PROT_NONE = 0
LIBC = ctypes.CDLL(None)
CASES = [
    Case("plain", channels=2, size=(9, 6, 19), padding=1),
    Case("dw7", channels=2, size=(4, 8, 8), kernel=(7, 7, 7), padding=3),
    Case("even", channels=2, size=(5, 6, 7), kernel=(2, 4, 6), padding="same"),
    Case("line", channels=1, size=(1, 1, 5), padding=1),
    Case("valid", channels=2, size=(4, 5, 17), padding="valid"),
    Case("circular", channels=2, size=(4, 5, 17), padding=1, mode="circular"),
    Case("stride2", channels=2, size=(5, 7, 33), stride=(2, 2, 2), padding=1),
    Case("stride2_even", channels=2, size=(6, 8, 36), stride=(1, 2, 2), padding=1),
    Case("wide_padding", size=(4, 98, 1), kernel=(1, 1, 1), stride=(1, 1, 2), padding=(0, 0, 48)),
    Case("stride3", channels=2, size=(7, 9, 31), kernel=(5, 5, 5), stride=(2, 3, 3), padding=2),
    Case("dilation2", channels=2, size=(8, 9, 20), dilation=(2, 2, 2), padding=2),
    Case("wide", channels=1, size=(6, 6, 300), kernel=(5, 5, 5), padding=2),
]


def _fenced(tensor: torch.Tensor, at_end: bool) -> torch.Tensor:
    """The tensor in memory of its own, with none behind its last (or before its first) byte."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for fence in (start, start + (pages + 1) * PAGE):
        assert LIBC.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(PAGE), PROT_NONE) == 0
    offset = PAGE + (pages * PAGE - size if at_end else 0)
    inside = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return inside.view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_stays_inside(case: Case, dtype: torch.dtype, at_end: bool) -> None:
    made = case.make(dtype)
    with on("direct"):
        expected = all_passes(ours, case, made)
        got = all_passes(ours, case, Tensors(*(_fenced(t, at_end) for t in made)))
    for which, value in expected.items():
        assert bitwise_equal(got[which], value), which
