# SPDX-License-Identifier: Apache-2.0
"""The memory of large results, which voxconv keeps for the next ones."""

from __future__ import annotations

from . import _ops


def empty_cache() -> None:
    """Give the memory that voxconv keeps for later results back to the system.

    The CPU ops keep results of 32 MiB and more when the last reference to them goes, and lay the
    next ones of about their size there: fresh memory would be cleared page by page, which takes
    longer than many a convolution. They keep at most `VOXCONV_CACHE_MIB` MiB (environment, read
    once; 0 keeps nothing; by default an eighth of the machine's memory), and the system may take
    that back whenever it runs short (`MADV_FREE`; Linux, torch 2.11 or newer), though it counts as
    resident until then. Like `torch.cuda.empty_cache`, this leaves tensors in use alone.
    """
    if _ops.has_cpu():
        _ops.empty_cache()
