# SPDX-License-Identifier: Apache-2.0
"""The speeds this project promises on the CPU, as a table, measured and judged in one run.

    python bench/bars.py                    # everything, about half an hour
    python bench/bars.py --only dilation    # the bars with this word in their name
    python bench/bars.py --json             # results/<device>/bars.json, suite.json and so on

The exit status is 1 if a bar is missed, or if other processes kept the machine busy.
Kernel rows are timed one pass at a time, with their tensors in three places: which pages a tensor
got moves a time by up to 1.8x. The median counts.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import _path  # noqa: F401
import testing
import voxconv
from cases import BY_NAME, CHANNELS_LAST, NCDHW, select
from conditions import AUTO, BUSY, Others, conditions, one_line, write_json
from promises import BARS, DILATED, SUITES, Bar
from rivals import OURS, TORCH_LAYOUTS, Problem, make_call
from roofline import summary
from rows import Bench, Options, Row, geomean
from run import Table, add_common, suite
from timing import interleaved


class Figure(NamedTuple):
    """A number and what it belongs to; NaN if the row was wrong or torch left out (--cap)."""

    label: str
    value: float


class Lab:
    """Measures what the metrics ask for; a suite only once."""

    def __init__(self, options: Options) -> None:
        self.bench = Bench(options, testing.DTYPES)
        self.suites: dict[str, list[Row]] = {}  # by tag

    @contextlib.contextmanager
    def having(self, **changes: Any) -> Iterator[Options]:
        """Measures with other options inside, which it yields."""
        before = self.bench.options
        self.bench.options = replace(before, **changes)
        try:
            yield self.bench.options
        finally:
            self.bench.options = before

    def suite(self, tag: str) -> list[Row]:
        if tag not in self.suites:
            table = Table(self.bench.options.rivals)
            self.suites[tag] = suite(self.bench, table, select(tag))
            table.foot(self.suites[tag])
        return self.suites[tag]

    def row(
        self, name: str, mode: str, rivals: tuple[str, ...], dtype: torch.dtype = torch.float32
    ) -> Row:
        case = BY_NAME[name]
        return next(self.bench.rows(case, (mode,), dtype, NCDHW, rivals))

    def times(self, mode: str, variants: Sequence[tuple[str, torch.dtype, str]]) -> list[float]:
        """Our median on each (case, dtype, layout), timed side by side; NaN if any is wrong."""
        calls = {}
        for i, (name, dtype, layout) in enumerate(variants):
            problem = Problem(BY_NAME[name], dtype)
            if self.bench.failure(problem.case, dtype, layout):
                return [math.nan] * len(variants)
            calls[str(i)] = make_call(OURS, problem, mode, layout)
        found = interleaved(calls, seconds=self.bench.options.seconds, memory=False)
        return [timing.median_ms for timing in found.values()]


def _roof(lab: Lab, bar: Bar, name: str, mode: str) -> list[Figure]:
    row = lab.row(name, mode, ())
    ok = row["check"] == "ok"
    share = row["roof_ms"] / row["times"][OURS.name]["median_ms"] if ok else math.nan
    return [Figure(f"{name} {mode}", share)]


def _speedup(lab: Lab, bar: Bar, name: str, mode: str) -> list[Figure]:
    """However long the rival takes: --cap is for the suite, where it leaves out a row of many."""
    with lab.having(cap=math.inf) as options:
        row = lab.row(name, mode, options.rivals, bar.dtype)
    return [Figure(f"{name} {mode}", row["speedup"].get(bar.rival, math.nan))]


def _emulated(lab: Lab, bar: Bar, name: str, mode: str) -> list[Figure]:
    """Ours and torch as on a processor whose oneDNN has no convolution of the type."""
    with torch.backends.mkldnn.flags(enabled=False), lab.having(backend="cpu"):
        return _speedup(lab, bar, name, mode)


def _memory(lab: Lab, bar: Bar, name: str, mode: str) -> list[Figure]:
    """What a call takes beyond its result."""
    row = lab.row(name, mode, (), bar.dtype)
    case = BY_NAME[name]
    result = case.n * case.out_channels * math.prod(case.out_size) * bar.dtype.itemsize
    peak = row["times"][OURS.name]["peak_mb"] if row["check"] == "ok" else math.nan
    return [Figure(f"{name} {mode}", peak - result / 2**20)]


def _layout(lab: Lab, bar: Bar, name: str, mode: str) -> list[Figure]:
    last, first = lab.times(mode, [(name, torch.float32, lay) for lay in (CHANNELS_LAST, NCDHW)])
    return [Figure(f"{name} {mode}", last / first)]


def _dtype(lab: Lab, bar: Bar, name: str, mode: str) -> list[Figure]:
    dtypes = (getattr(torch, bar.metric), torch.float32)
    half, full = lab.times(mode, [(name, dtype, NCDHW) for dtype in dtypes])
    return [Figure(f"{name} {mode}", half / full)]


def _dilation(lab: Lab, bar: Bar, name: str, mode: str) -> list[Figure]:
    names = (name, *DILATED[name])
    base, *others = lab.times(mode, [(n, torch.float32, NCDHW) for n in names])
    return [Figure(f"{other} {mode}", t / base) for other, t in zip(names[1:], others, strict=True)]


def _suite(lab: Lab, bar: Bar) -> list[Figure]:
    (mode,) = bar.modes
    mean, used, total = geomean(lab.suite(bar.tag), mode, bar.rival)
    right = all(row["check"] == "ok" for row in lab.suite(bar.tag))
    return [Figure(f"{used} of {total} rows {mode}", mean if right else math.nan)]


def _slowest(lab: Lab, bar: Bar) -> list[Figure]:
    return [
        Figure(f"{row['case']} {row['mode']}", row["speedup"].get(bar.rival, math.nan))
        for row in lab.suite(bar.tag)
        if any("median_ms" in row["times"][name] for name in TORCH_LAYOUTS)
    ]


def _overhead(lab: Lab, bar: Bar) -> list[Figure]:
    x, weight, bias = (
        torch.randn(shape, requires_grad=True) for shape in ((1, 8, 8, 8, 8), (8, 1, 3, 3, 3), (8,))
    )
    calls = {
        "F.conv3d": lambda: F.conv3d(x, weight, bias, 1, 1, 1, 8),
        "conv3d": lambda: voxconv.conv3d(x, weight, bias, 1, 1, 1, 8),
        "depthwise_conv3d": lambda: voxconv.depthwise_conv3d(x, weight, bias, 1, 1, 1),
    }
    found = interleaved(calls, seconds=max(lab.bench.options.seconds, 0.3), memory=False)
    base = found.pop("F.conv3d").median_ms
    return [Figure(f"{name} 1x8x8^3", 1e3 * (t.median_ms - base)) for name, t in found.items()]


PerRow = Callable[[Lab, Bar, str, str], list[Figure]]
PER_ROW: dict[str, PerRow] = {
    "roof": _roof,
    "speedup": _speedup,
    "emulated": _emulated,
    "layout": _layout,
    "bfloat16": _dtype,
    "float16": _dtype,
    "dilation": _dilation,
    "memory": _memory,
}
WHOLE: dict[str, Callable[[Lab, Bar], list[Figure]]] = {
    "suite": _suite,
    "slowest": _slowest,
    "overhead": _overhead,
}
AT_LEAST = ("roof", "speedup", "emulated", "suite", "slowest")
ONE_PLACE = ("speedup", "emulated", "memory")  # far from its threshold, and the rival takes seconds
PLACES = 3
BALLAST = 8 << 20  # elements that are held, so that the next tensors get other pages


def in_places(measure: Callable[[], list[Figure]], places: int) -> list[Figure]:
    """The median of each figure over tensors in that many places; NaN if any is."""
    held, runs = [], []
    for _ in range(places):
        held.append(torch.ones(BALLAST))
        runs.append(measure())
    labels = (figure.label for figure in runs[0])
    values = (
        math.nan if any(map(math.isnan, found)) else statistics.median(found)
        for found in zip(*([figure.value for figure in run] for run in runs), strict=True)
    )
    return [Figure(*pair) for pair in zip(labels, values, strict=True)]


def judge(lab: Lab, bar: Bar) -> dict[str, Any]:
    """Measures a bar: all its figures, the worst of them, and whether it holds."""
    if bar.metric in WHOLE:
        figures = WHOLE[bar.metric](lab, bar)
    else:
        measure, figures = PER_ROW[bar.metric], []
        places = 1 if bar.metric in ONE_PLACE else PLACES
        with lab.having(seconds=lab.bench.options.seconds / places):
            for name in bar.rows:
                for mode in bar.modes:
                    figures += in_places(partial(measure, lab, bar, name, mode), places)
    at_least = bar.metric in AT_LEAST
    wrong = [f for f in figures if math.isnan(f.value)]
    pick = min if at_least else max
    worst = wrong[0] if wrong else pick(figures, key=lambda f: f.value)
    holds = not wrong and (
        worst.value >= bar.threshold if at_least else worst.value <= bar.threshold
    )
    return {
        "name": bar.name,
        "metric": bar.metric,
        "threshold": bar.threshold,
        "at_least": at_least,
        "measured": None if wrong else worst.value,
        "worst": worst.label,
        "holds": holds,
        "figures": [{"label": f.label, "value": None if f in wrong else f.value} for f in figures],
    }


def line(verdict: dict[str, Any]) -> str:
    measured = verdict["measured"]
    return (
        f"{'pass' if verdict['holds'] else 'MISS'}  {verdict['name']:42s}"
        f" {'unknown' if measured is None else f'{measured:.3g}':>7s}"
        f" {'>=' if verdict['at_least'] else '<='} {verdict['threshold']:.3g}"
        f"   {verdict['worst']}"
    )


def announce(verdict: dict[str, Any], verbose: bool) -> None:
    print(line(verdict), flush=True)
    for figure in verdict["figures"] if verbose else []:
        value = math.nan if figure["value"] is None else figure["value"]
        print(f"      {value:8.3g}  {figure['label']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[""], help="words in the bars' names")
    parser.add_argument("--verbose", action="store_true", help="print every figure")
    add_common(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where, started = conditions(), time.monotonic()
    lab = Lab(Options(args.seconds, args.cap))
    verdicts: dict[str, list[dict[str, Any]]] = {}
    with Others() as others:
        for name, bars in BARS.items():
            for bar in bars:
                if any(word in bar.name for word in args.only):
                    verdict = judge(lab, bar)
                    verdicts.setdefault(name, []).append(verdict)
                    announce(verdict, args.verbose)
    where["others_cpu"] = others.share
    judged = [verdict for found in verdicts.values() for verdict in found]
    print("\n" + "\n".join(map(line, judged)))
    busy = (others.share or 0.0) > BUSY
    void = "; not valid, the machine was busy" if busy else ""
    print(f"{sum(v['holds'] for v in judged)} of {len(judged)} bars hold{void}")
    print(f"{one_line(where)}; {time.monotonic() - started:.0f} s")
    if args.json:
        content = {"conditions": where, "roofs": summary(lab.bench.roofs)}
        files = {name: {"bars": found} for name, found in verdicts.items()}
        files |= {SUITES[tag]: {"rows": rows} for tag, rows in lab.suites.items()}
        for name, figures in files.items():
            path = AUTO if args.json == AUTO else args.json.with_stem(f"{args.json.stem}_{name}")
            print(f"wrote {write_json(path, name, 'cpu', content | figures)}")
    if busy or not all(v["holds"] for v in judged):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
