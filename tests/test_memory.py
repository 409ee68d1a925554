# SPDX-License-Identifier: Apache-2.0
"""The memory of large results is kept and used again, and gives way: each test in a process of its
own, because conftest turns the cache off (what is kept cannot be poisoned)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from voxconv import _ops

pytestmark = [
    pytest.mark.skipif(not _ops.has_cpu(), reason="the compiled part is missing"),
    pytest.mark.skipif(sys.platform != "linux", reason="the cache needs MADV_FREE"),
    pytest.mark.skipif(
        torch.__version__.startswith("2.10."), reason="torch 2.10 takes no memory but its own"
    ),
]

START = """
import torch, voxconv
import torch.nn.functional as F

def conv(channels, fill, memory_format=torch.contiguous_format):
    x = torch.full((1, channels, 64, 64, 64), float(fill)).to(memory_format=memory_format)
    return voxconv.depthwise_conv3d(x, torch.ones(channels, 1, 1, 1, 1))

def lazy():  # MiB that are kept
    with open("/proc/self/smaps_rollup") as f:
        (line,) = (line for line in f if line.startswith("LazyFree"))
    return int(line.split()[1]) / 1024
"""


def _run(program: str, mib: int | None = 200) -> None:
    environment = dict(os.environ)
    environment.pop("VOXCONV_CACHE_MIB", None)
    if mib is not None:
        environment["VOXCONV_CACHE_MIB"] = str(mib)
    done = subprocess.run(
        [sys.executable, "-c", START + program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("mib", [200, None])
def test_memory_is_used_again(mib: int | None) -> None:
    _run(
        """
y = conv(64, 1)
assert lazy() < 1, lazy()
where = y.data_ptr()
del y
assert lazy() > 60, lazy()
y = conv(56, 2)  # a little smaller
assert y.data_ptr() == where and lazy() < 10, lazy()
assert (y == 2).all()
""",
        mib,
    )


def test_a_view_holds_it() -> None:
    _run(
        """
y = conv(64, 1)
where, part, array = y.data_ptr(), y[0, 3], y.numpy()
del y
z = conv(64, 2)
assert z.data_ptr() != where and (part == 1).all() and (array == 1).all()
del part
assert conv(64, 3).data_ptr() != where and (array == 1).all()
del array
assert conv(64, 4).data_ptr() == where
"""
    )


def test_it_keeps_no_more_than_the_limit() -> None:
    _run(
        """
results = [conv(64, i) for i in range(5)]
results.clear()
assert 180 < lazy() < 200, lazy()
voxconv.empty_cache()
assert lazy() < 1, lazy()
conv(208, 1)  # more than the limit: not kept
assert lazy() < 1, lazy()
"""
    )


def test_small_results_and_other_sizes_get_their_own() -> None:
    _run(
        """
conv(96, 1)
kept = lazy()
small, other = conv(16, 2), conv(40, 3)
assert lazy() == kept, (lazy(), kept)
assert (small == 2).all() and (other == 3).all()
"""
    )


def test_zero_turns_it_off() -> None:
    _run("conv(64, 1)\nassert lazy() < 1, lazy()", 0)


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last_3d"])
def test_kept_memory_is_an_ordinary_tensor(layout: str) -> None:
    _run(
        f"""
for _ in range(2):
    y = conv(64, 3, torch.{layout})
    assert y.is_contiguous(memory_format=torch.{layout}) and y._base is None
    assert y.untyped_storage().nbytes() == y.numel() * 4
    z = y.clone().add_(1)
    y.add_(1)
    assert torch.equal(y, z) and torch.equal(torch.from_dlpack(y), z)
    y.share_memory_()
    assert torch.equal(y, z)
x = torch.randn(1, 32, 64, 64, 64, requires_grad=True)
w = torch.randn(32, 1, 3, 3, 3)
for _ in range(2):
    (grad,) = torch.autograd.grad(voxconv.depthwise_conv3d(x, w, padding=1).square().sum(), x)
    (want,) = torch.autograd.grad(F.conv3d(x, w, padding=1, groups=32).square().sum(), x)
    torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-3)
"""
    )


def test_threads_and_forks() -> None:
    _run(
        """
import os, threading
def work(fill):
    for _ in range(6):
        assert (conv(32, fill) == fill).all()
threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
for t in threads: t.start()
for t in threads: t.join()
kept = conv(32, 7)
del kept
torch.set_num_threads(1)
child = os.fork()
if child == 0:
    try:
        y = conv(32, 8)
        os._exit(0 if (y == 8).all() else 1)
    except BaseException:
        os._exit(2)
assert os.waitpid(child, 0)[1] == 0
assert (conv(32, 9) == 9).all()
"""
    )
