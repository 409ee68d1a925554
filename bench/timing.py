# SPDX-License-Identifier: Apache-2.0
"""How a call is timed, and how its peak memory is read."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

import voxconv

Call = Callable[[], Any]

TURN = 0.05  # seconds a contestant keeps the machine before the next one has its turn
WARM = 0.5  # calls quicker than that, in seconds, are made once untimed when a turn begins
SLOW = 2.0  # a first call this long, in seconds, is the measurement
TURN_CALLS = 100
SLOW_ON_GPU = 0.1  # seconds


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call takes; ``peak_mb`` is the memory it needs beyond what was there."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int
    peak_mb: float | None = None

    @classmethod
    def of(cls, seconds: list[float], peak_mb: float | None = None) -> Timing:
        ordered = sorted(seconds)
        p20, median, p80 = (1e3 * _quantile(ordered, q) for q in (0.2, 0.5, 0.8))
        return cls(median, p20, p80, len(ordered), peak_mb)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _quantile(ordered: list[float], q: float) -> float:
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def touch_memory(mb: float) -> None:
    """Write to that much memory, or half of what is free, and give it back.

    The host of a virtual machine backs a page when it is first written to, and may take it back
    seconds after it is freed; backing it takes several times as long as a page fault. Once done,
    the system hands out the same pages again.
    """
    with contextlib.suppress(ValueError, OSError, AttributeError):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 21
        torch.ones(int(min(mb, free)) << 20, dtype=torch.uint8)


class Peak:
    """Peak memory over a block, less what was held at its start: ``.mb``, None if not known.

    CPU: the resident set's high-water mark, which Linux lets a process reset. It sees torch's
    tensors, oneDNN's scratch and C++ vectors alike, to about 0.3 MB. Free heap pages and voxconv's
    cache are handed back first, so a block cannot hide in them. CUDA: the caching allocator's own
    peak.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.cuda = device.startswith("cuda")
        self.mb: float | None = None

    def __enter__(self) -> Peak:
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
            return self
        voxconv.empty_cache()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        self.before = math.nan
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as f:
            f.write("5")
            f.flush()
            self.before = _high_water_mb()
        return self

    def __exit__(self, *_: object) -> None:
        now = torch.cuda.max_memory_allocated() / 2**20 if self.cuda else _high_water_mb()
        self.mb = None if math.isnan(now - self.before) else max(now - self.before, 0.0)


def _high_water_mb() -> float:
    with contextlib.suppress(OSError), open("/proc/self/status") as f:
        for line in f:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return math.nan


class _Series:
    """One contestant: first calls, then as many timed turns as its budget allows."""

    def __init__(self, call: Call, seconds: float, most: int, memory: bool) -> None:
        self.call, self.samples = call, []
        with Peak() as peak:
            took, self.first = _timed(call)
        if took < SLOW:
            if memory:
                with Peak() as peak:
                    took, _ = _timed(call)
            self.estimate = min(took, *(_timed(call)[0] for _ in range(3 if took < 0.05 else 1)))
        else:
            self.estimate = took
            self.samples.append(took)
        self.peak_mb = peak.mb if memory else None
        least = 3 if self.estimate < 1 else 1
        self.want = max(least, min(most, int(seconds / self.estimate)))

    def turn(self) -> None:
        """A few calls in a row; the first of them only warms the caches up again."""
        touch_memory(self.peak_mb or 0)
        if self.estimate < WARM:
            self.call()
        for _ in range(max(1, min(TURN_CALLS, int(TURN / self.estimate)))):
            start = time.perf_counter()
            self.call()
            self.samples.append(time.perf_counter() - start)


def _timed(call: Call) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def interleaved(
    calls: Mapping[str, Call],
    *,
    seconds: float = 0.3,
    most: int = 2000,
    memory: bool = True,
    touch_mb: float = 0,
    first: dict[str, Any] | None = None,
) -> dict[str, Timing]:
    """Times CPU calls against each other: they take turns, so that drift hits all alike.

    Every call allocates its results and frees them within its own time. A call is made at least
    three times after the warm-up, then for ``seconds`` or ``most`` times; one that takes over a
    second is made once more, and one that takes over two seconds is not repeated.

    Args:
        calls: what to time, by name.
        seconds: time given to each.
        most: repeats after which a quick call has been timed enough.
        memory: whether to read the peak memory too (one more call each).
        touch_mb: what to touch before a first call (:func:`touch_memory`); later turns touch as
            much as the call needs, where ``memory`` is read.
        first: if given, receives the result of each one's first call.

    Returns:
        The Timing of each name.
    """
    with _no_gc():
        series = {}
        for name, call in calls.items():
            touch_memory(touch_mb)
            series[name] = _Series(call, seconds, most, memory)
            if first is not None:
                first[name] = series[name].first
            series[name].first = None
        order = list(series.values())
        while waiting := [s for s in order if len(s.samples) < s.want]:
            for s in waiting:
                s.turn()
            order.reverse()
    return {name: Timing.of(s.samples, s.peak_mb) for name, s in series.items()}


@contextlib.contextmanager
def _no_gc() -> Iterator[None]:
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _on_gpu(call: Call) -> float:
    """Seconds between two events around a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def cuda_graph(
    make: Callable[[int], Call], bytes_per_call: int, *, seconds: float = 0.3
) -> tuple[Timing, Any]:
    """Times a call on the GPU alone: replays of a CUDA graph over buffers larger than the L2.

    One that takes longer than SLOW_ON_GPU is made once more, and not captured.

    Args:
        make: the call on its own buffers, from a seed. Calls are made and captured on one stream,
            so that a backward whose forward ran in ``make`` is captured too.
        bytes_per_call: least traffic of one call; decides how many buffer sets are rotated.
        seconds: time given to the replays.

    Returns:
        The Timing of one call, and the result of the first.
    """
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    sets = max(2, math.ceil(3 * l2 / max(bytes_per_call, 1)))
    sets = min(sets, max(2, int(torch.cuda.mem_get_info()[0] / (8 * max(bytes_per_call, 1)))))
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        calls = [make(seed) for seed in range(sets)]
        with Peak("cuda") as peak:
            first = calls[0]()
        again = _on_gpu(calls[-1])
        if again > SLOW_ON_GPU:
            return Timing.of([again], peak.mb), first
        for call in calls * 2:
            call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            results = [call() for call in calls]
        samples: list[float] = []
        deadline = time.perf_counter() + seconds
        while len(samples) < 5 or time.perf_counter() < deadline:
            samples.append(_on_gpu(graph.replay) / sets)
        del results
    return Timing.of(samples[2:], peak.mb), first
