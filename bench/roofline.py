# SPDX-License-Identifier: Apache-2.0
"""The two roofs of this machine, measured: how fast it copies and how fast it multiplies.

    python bench/roofline.py [--threads 2] [--dtype float32 ...]

The roof time of a problem is max(bytes / copy bandwidth, FLOPs / torch.mm rate).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from timing import Call, Timing, cuda_graph, interleaved

# The best of these is the roof. Above 32 MiB the C library maps fresh pages for every tensor, and
# faulting them in can cost more than the copy; at 24 MiB it recycles them, as for most layers.
COPY_MIB = (24, 64, 256)
MM_SIZES = (512, 768, 1024, 1536, 2048)
CUDA_COPY_BYTES = 1 << 30
CUDA_MM_SIZES = (4096, 8192)


@dataclass(frozen=True)
class Roofs:
    """``copy_gbs``: GB/s read plus written by ``x.clone()``. ``mm_gflops``: best torch.mm rate."""

    copy_gbs: float
    mm_gflops: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def roof_time(flops: float, bytes: float, roofs: Roofs) -> float:
    """Seconds no kernel that moves ``bytes`` and does ``flops`` can beat on this machine."""
    return max(bytes / (roofs.copy_gbs * 1e9), flops / (roofs.mm_gflops * 1e9))


def limited_by(flops: float, bytes: float, roofs: Roofs) -> str:
    compute = flops / roofs.mm_gflops > bytes / roofs.copy_gbs
    return "compute" if compute else "memory"


class Probes:
    """The calls that measure the roofs, ready to be timed side by side with kernels.

    Halves are accumulated in float32, so their multiply roof is the better of torch.mm in float32
    and in their own dtype.
    """

    def __init__(self, dtypes: Iterable[torch.dtype], seconds: float = 0.15) -> None:
        self.copies = self._copies(seconds)
        self.source = torch.ones(max(self.copies, key=self.copies.__getitem__) << 18)
        self.operands: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = {}
        self.sizes: dict[torch.dtype, int] = {}
        self.rates: dict[torch.dtype, float] = {}
        for dtype in dtypes:
            for one in {dtype, torch.float64 if dtype == torch.float64 else torch.float32}:
                if one not in self.rates:
                    self._best_size(one, seconds)

    def _copies(self, seconds: float) -> dict[int, float]:
        """GB/s by MiB copied."""
        calls = {str(mib): torch.ones(mib << 18).clone for mib in COPY_MIB}
        timings = interleaved(calls, seconds=seconds, memory=False)
        return {int(mib): int(mib) * 2.097152 / t.median_ms for mib, t in timings.items()}

    def _best_size(self, dtype: torch.dtype, seconds: float) -> None:
        best = 0.0
        for n in MM_SIZES:
            a, b = (torch.randn(n, n).to(dtype) for _ in range(2))
            time = interleaved(
                {"mm": lambda a=a, b=b: torch.mm(a, b)}, seconds=seconds, memory=False
            )["mm"]
            rate = 2 * n**3 / time.median_ms / 1e6
            if rate > best:
                best, self.operands[dtype], self.sizes[dtype] = rate, (a, b), n
            if rate < best / 4 or time.median_ms > 1e3:
                break
        self.rates[dtype] = best

    def mm_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype in (torch.float32, torch.float64):
            return dtype
        return max((torch.float32, dtype), key=lambda d: self.rates.get(d, 0.0))

    def calls(self, dtype: torch.dtype) -> dict[str, Call]:
        a, b = self.operands[self.mm_dtype(dtype)]
        return {"roof:copy": self.source.clone, "roof:mm": lambda: torch.mm(a, b)}

    def roofs(self, timings: Mapping[str, Timing], dtype: torch.dtype) -> Roofs:
        """The roofs out of the timings of :meth:`calls`."""
        copied = 2 * self.source.numel() * self.source.element_size()
        flops = 2 * self.sizes[self.mm_dtype(dtype)] ** 3
        return Roofs(
            copied / timings["roof:copy"].median_ms / 1e6,
            flops / timings["roof:mm"].median_ms / 1e6,
        )

    def measure(self, dtype: torch.dtype = torch.float32, seconds: float = 0.3) -> Roofs:
        return self.roofs(interleaved(self.calls(dtype), seconds=seconds, memory=False), dtype)


def cuda_roofs(dtype: torch.dtype, seconds: float = 0.3) -> Roofs:
    """The same two roofs on the GPU; float32 multiplies without TF32 unless torch allows it."""
    source = torch.ones(CUDA_COPY_BYTES // 4, device="cuda")
    copy, _ = cuda_graph(lambda _: source.clone, 2 * CUDA_COPY_BYTES, seconds=seconds)
    rates = []
    for one in {dtype, torch.float64 if dtype == torch.float64 else torch.float32}:
        for n in CUDA_MM_SIZES:
            a, b = (torch.randn(n, n, device="cuda").to(one) for _ in range(2))
            traffic = 3 * n * n * a.element_size()
            time, _ = cuda_graph(lambda _, a=a, b=b: lambda: torch.mm(a, b), traffic)
            rates.append(2 * n**3 / time.median_ms / 1e6)
    return Roofs(2 * CUDA_COPY_BYTES / copy.median_ms / 1e6, max(rates))


def summary(samples: Iterable[Roofs]) -> dict[str, Any]:
    """Median, lowest and highest of each roof over a run."""
    samples = list(samples)
    return {
        key: {
            "median": statistics.median(values),
            "lowest": min(values),
            "highest": max(values),
        }
        for key in ("copy_gbs", "mm_gflops")
        if (values := [getattr(s, key) for s in samples])
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", nargs="+", default=["float32"], help="float32 bfloat16 ...")
    parser.add_argument("--seconds", type=float, default=0.3, help="time for each measurement")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtypes = [getattr(torch, name) for name in args.dtype]
    probes = Probes(dtypes, args.seconds)
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    copies = ", ".join(f"{mib} MiB {rate:.1f}" for mib, rate in probes.copies.items())
    print(f"x.clone(), GB/s read+write: {copies}")
    for dtype in dtypes:
        roofs = probes.measure(dtype, args.seconds)
        size = probes.sizes[probes.mm_dtype(dtype)]
        print(
            f"{str(dtype).removeprefix('torch.'):9s} copy {roofs.copy_gbs:7.1f} GB/s read+write"
            f" | torch.mm {roofs.mm_gflops:7.1f} GFLOP/s"
            f" ({size}^2, {str(probes.mm_dtype(dtype)).removeprefix('torch.')})"
        )


if __name__ == "__main__":
    main()
