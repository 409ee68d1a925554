# SPDX-License-Identifier: Apache-2.0
"""Measures one row: check it, time everybody in turns, and work out the figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import _path  # noqa: F401
import testing
import voxconv
from cases import Case
from conditions import Others
from rivals import (
    OURS,
    RESULTS,
    RIVALS,
    SWEEPS,
    TORCH_LAYOUTS,
    Contestant,
    Problem,
    make_call,
    predicted_seconds,
    results,
)
from roofline import Probes, Roofs, cuda_roofs, roof_time
from timing import Timing, cuda_graph, interleaved, touch_memory

Row = dict[str, Any]
UNCHECKED = "not checked"


@dataclass(frozen=True)
class Options:
    """``seconds`` goes to each measurement; calls longer than ``cap`` seconds are left out."""

    seconds: float = 0.25
    cap: float = 30.0
    check: bool = True
    rivals: tuple[str, ...] = tuple(RIVALS)
    backend: str | None = None
    device: str = "cpu"


@dataclass
class Bench:
    """A run: its options, its roof probes, and the checks made so far."""

    options: Options
    dtypes: Iterable[torch.dtype]
    roofs: list[Roofs] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._checks: dict[tuple[Case, torch.dtype, str], str | None] = {}
        self.cuda = self.options.device.startswith("cuda")
        if self.cuda:
            torch.backends.cudnn.benchmark = True
            self._cuda_roofs = {dtype: cuda_roofs(dtype) for dtype in self.dtypes}
        else:
            touch_memory(4096)
            self.probes = Probes(self.dtypes)

    def failure(self, case: Case, dtype: torch.dtype, layout: str) -> str | None:
        """Why ours is wrong on the row made small, forward and gradients, against float64 torch."""
        key = (case, dtype, layout)
        if key not in self._checks:
            self._checks[key] = _check(case.small(), dtype, layout, self.options.device)
            _complain(self._checks[key])
        return self._checks[key]

    def rows(
        self,
        case: Case,
        modes: Iterable[str],
        dtype: torch.dtype,
        layout: str,
        rivals: tuple[str, ...] | None = None,
    ) -> Iterator[Row]:
        """One row of figures for each mode; ``rivals`` in place of the options' own."""
        problem = Problem(case, dtype, self.options.device)
        names = self.options.rivals if rivals is None else rivals
        for mode in modes:
            with voxconv.use_backend(self.options.backend):
                yield self._row(problem, mode, layout, names)

    def _row(self, problem: Problem, mode: str, layout: str, rivals: tuple[str, ...]) -> Row:
        case, dtype = problem.case, problem.dtype
        failed = self.failure(case, dtype, layout) if self.options.check else UNCHECKED
        times: dict[str, Any] = {}
        runners: list[Contestant] = []
        for who in (OURS, *(RIVALS[name] for name in rivals)):
            if who is OURS and failed not in (None, UNCHECKED):
                reason = {"wrong": failed}
            else:
                reason = self._left_out(who, case, dtype, mode, layout)
            if reason is None:
                runners.append(who)
            else:
                times[who.name] = reason
        with Others() as others:
            timings, firsts, roofs = self._time(runners, problem, mode, layout)
        times |= {who.name: timings[who.name].as_dict() for who in runners}
        if failed is None:
            failed = _disagreement(case, dtype, mode, firsts)
            _complain(failed)
        self.roofs.append(roofs)
        row = _describe(case, mode, dtype, layout)
        row |= {"kernel": kernel_of(problem, mode, layout), "check": failed or "ok"}
        row |= {"roofs": roofs.as_dict(), "roof_ms": roof_ms(case, mode, dtype, roofs)}
        row["roof_live_ms"] = roof_ms(case, mode, dtype, roofs, live=True)
        row["times"] = {name: times[name] for name in (OURS.name, *rivals)}
        row["others_cpu"] = others.share
        row["speedup"] = {} if failed else speedups(row["times"])
        return row

    def _left_out(
        self, who: Contestant, case: Case, dtype: torch.dtype, mode: str, layout: str
    ) -> dict[str, Any] | None:
        reason = who.refuses(case, dtype, self.options.device)
        if reason is not None:
            return {"refused": reason}
        if self.cuda:
            return None
        seconds = predicted_seconds(who, case, dtype, mode, layout, self.options.cap)
        if seconds > self.options.cap:
            return {"capped": True, "cap_s": self.options.cap, "predicted_s": round(seconds, 1)}
        return None

    def _time(
        self, runners: list[Contestant], problem: Problem, mode: str, layout: str
    ) -> tuple[dict[str, Timing], dict[str, Any], Roofs]:
        seconds = self.options.seconds
        firsts: dict[str, Any] = {}
        if not self.cuda:
            calls = {who.name: make_call(who, problem, mode, layout) for who in runners}
            calls |= self.probes.calls(problem.dtype)
            sizes = 3 * problem.case.bytes(problem.dtype.itemsize) / 2**20
            timings = interleaved(calls, seconds=seconds, touch_mb=sizes, first=firsts)
            return timings, firsts, self.probes.roofs(timings, problem.dtype)
        timings = {}
        least = problem.case.bytes(problem.dtype.itemsize) * SWEEPS[mode]
        for who in runners:

            def make(seed: int, who: Contestant = who) -> Any:
                again = Problem(problem.case, problem.dtype, problem.device, seed)
                return make_call(who, again, mode, layout)

            timings[who.name], firsts[who.name] = cuda_graph(make, least, seconds=seconds)
        return timings, firsts, self._cuda_roofs[problem.dtype]


def _check(case: Case, dtype: torch.dtype, layout: str, device: str) -> str | None:
    made = case.make(dtype, layout=layout)
    exact = testing.all_passes(testing.by_torch, case, type(made)(*(t.double() for t in made)))
    try:
        got = testing.all_passes(testing.ours, case, type(made)(*(t.to(device) for t in made)))
        for which, value in got.items():
            testing.assert_accurate(
                f"{case} {which}", value.cpu(), exact[which], taps=testing.summands(case, which)
            )
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        return str(error).split("\n")[0]
    return None


def _complain(failure: str | None) -> None:
    if failure is not None:
        print(f"WRONG: {failure}", flush=True)


def _disagreement(
    case: Case, dtype: torch.dtype, mode: str, firsts: Mapping[str, Any]
) -> str | None:
    """Whether what was timed differs from torch's result at full size, roundings aside."""
    theirs = next((firsts[name] for name in TORCH_LAYOUTS if name in firsts), None)
    if theirs is None or OURS.name not in firsts:
        return None
    ours, theirs = results(mode, firsts[OURS.name]), results(mode, theirs)
    for which in RESULTS[mode]:
        apart = testing.rms(ours[which].double() - theirs[which].double())
        error = apart / testing.rms(theirs[which])
        sums = math.sqrt(testing.summands(case, which))
        allowed = 8 * testing.accumulation_eps(dtype) * sums + 16 * torch.finfo(dtype).eps
        if not error <= allowed:
            return f"{case} {which}: {error:.2g} away from torch, allowed {allowed:.2g}"
    return None


def _describe(case: Case, mode: str, dtype: torch.dtype, layout: str) -> Row:
    sweeps = SWEEPS[mode]
    return {
        "case": case.name,
        "op": case.op,
        "source": case.source,
        "tags": case.tags,
        "mode": mode,
        "dtype": testing.dtype_id(dtype),
        "layout": layout,
        "shape": [case.n, case.channels, *case.size],
        "multiplier": case.multiplier,
        "out_channels": case.out_channels,
        "groups": case.blocks,
        "kernel_size": case.kernel,
        "stride": case.stride,
        "dilation": case.dilation,
        "flops": sweeps * case.flops,
        "live_flops": sweeps * case.live_flops,
        "bytes": sweeps * case.bytes(dtype.itemsize),
    }


def kernel_of(problem: Problem, mode: str, layout: str) -> str:
    """What the dispatcher picked for the passes of a mode: "cpu direct", "cpu direct/fft"."""
    case, t = problem.case, problem.tensors(layout)
    kwargs = case.kwargs()
    if case.transposed:
        kwargs |= {"transposed": True}
    else:
        kwargs |= {"groups": case.blocks}
    passes = voxconv.explain(t.x, t.weight, t.bias, **kwargs).passes
    chosen = [getattr(passes, name) for name in RESULTS[mode] if name != "grad_bias"]
    kernels = "/".join(dict.fromkeys(choice.kernel for choice in chosen))
    return f"{'/'.join(dict.fromkeys(choice.backend for choice in chosen))} {kernels}"


def roof_ms(
    case: Case, mode: str, dtype: torch.dtype, roofs: Roofs, *, live: bool = False
) -> float:
    """The roof time of each pass of a mode, added up; ``live`` leaves out taps on padding."""
    flops = case.live_flops if live else case.flops
    return 1e3 * SWEEPS[mode] * roof_time(flops, case.bytes(dtype.itemsize), roofs)


def median(times: Mapping[str, Any], name: str) -> float | None:
    return times.get(name, {}).get("median_ms")


def speedups(times: Mapping[str, Any]) -> dict[str, float]:
    """Rival's time over ours, for each rival and for the better of torch's layouts ("best")."""
    ours = median(times, OURS.name)
    if ours is None:
        return {}
    found = {name: t / ours for name in times if name != OURS.name and (t := median(times, name))}
    layouts = [found[name] for name in TORCH_LAYOUTS if name in found]
    return found | ({"best": min(layouts)} if layouts else {})


def geomean(
    rows: Iterable[Row], mode: str, rival: str, roof: bool = False
) -> tuple[float, int, int]:
    """Geometric mean of the speed-ups, how many rows are in it, and how many there are.

    With ``roof``, of the speed-ups if every row reached its roof (an FFT may be above it).
    """
    rows = [row for row in rows if row["mode"] == mode]
    used = [row for row in rows if rival in row["speedup"]]
    logs = [math.log(row["speedup"][rival]) for row in used]
    if roof:
        logs = [
            log + max(0.0, math.log(row["times"]["ours"]["median_ms"] / row["roof_ms"]))
            for log, row in zip(logs, used, strict=True)
        ]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan, len(logs), len(rows)
