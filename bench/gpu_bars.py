# SPDX-License-Identifier: Apache-2.0
"""The speeds this project promises on a GPU, measured and judged in one run; see bench/gpu.sh.

    python bench/gpu_bars.py --json         # results/<device>/bars.json and suite.json
    python bench/gpu_bars.py --only dw7     # the bars with this word in their name

The roofs are measured in the run: a copy, and multiply-adds of float32 by torch.mm without TF32
("FMA"), for halves too: what their kernels could reach without tensor cores.
The exit status is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from typing import Any

import torch

import _path  # noqa: F401
from cases import BY_NAME, NCDHW, select
from conditions import AUTO, conditions, one_line, write_json
from rivals import OURS
from roofline import Roofs, cuda_roofs
from rows import Bench, Options, Row, geomean, roof_ms
from run import LOSING, SUITE_TAG, Table, suite

F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Bar:
    """A promise: on each row, roof time over our time is at least ``least``."""

    name: str
    rows: tuple[str, ...]
    dtype: torch.dtype
    mode: str
    least: float


DW3, DW5, DW7 = ("mednext_dw3_32@128",), ("mednext_dw5_32@128",), ("mednext_dw7_32@128",)
UX7 = ("uxnet_dw7_48@48",)
BARS = (
    Bar("dw3 fp32 forward, share of roof", DW3, F32, "fwd", 0.75),
    Bar("dw3 bf16 forward, share of roof", DW3, BF16, "fwd", 0.75),
    Bar("dw5, dw7 fp32 forward, share of roof", DW5 + DW7 + UX7, F32, "fwd", 0.60),
    Bar("dw7 bf16 forward, over the FMA roof", DW7 + UX7, BF16, "fwd", 1.0),
    Bar("dw21 bf16 forward, over the FMA roof", ("repux_dw21_48@48",), BF16, "fwd", 3.0),
    Bar("fp32 grad_weight, share of roof", DW3 + DW5 + DW7, F32, "grad_weight", 0.50),
    Bar("bf16 grad_weight, share of roof", DW3 + DW5 + DW7, BF16, "grad_weight", 0.50),
)
SUITE_BARS = (  # name, mode, least of the geometric mean over the better torch layout
    ("suite forward, geomean x better layout", "fwd", 5.0),
    ("suite fwd+bwd, geomean x better layout", "full", 10.0),
)


def judge(bench: Bench, bar: Bar, fma: Roofs) -> dict[str, Any]:
    """The bar with its figures, the worst of them, and whether it holds."""
    figures = {}
    for name in bar.rows:
        row = next(bench.rows(BY_NAME[name], (bar.mode,), bar.dtype, NCDHW, ()))
        ours = row["times"][OURS.name].get("median_ms", math.nan)
        right = row["check"] == "ok"
        roof = roof_ms(BY_NAME[name], bar.mode, bar.dtype, fma)
        figures[name] = roof / ours if right else math.nan
    return verdict(bar.name, bar.least, figures)


def verdict(name: str, least: float, figures: dict[str, float]) -> dict[str, Any]:
    worst = min(figures, key=lambda key: (not math.isnan(figures[key]), figures[key]))
    return {
        "name": name,
        "threshold": least,
        "measured": None if math.isnan(figures[worst]) else figures[worst],
        "worst": worst,
        "holds": figures[worst] >= least,
        "figures": figures,
    }


def judge_suite(rows: list[Row]) -> list[dict[str, Any]]:
    found = []
    for name, mode, least in SUITE_BARS:
        mean, used, total = geomean(rows, mode, "best")
        right = all(row["check"] == "ok" for row in rows)
        found.append(verdict(name, least, {f"{used} of {total} rows": mean if right else math.nan}))
    ratios = {f"{row['case']} {row['mode']}": row["speedup"].get("best", math.nan) for row in rows}
    return [*found, verdict("suite, slowest row x better layout", LOSING, ratios)]


def line(found: dict[str, Any]) -> str:
    measured = "unknown" if found["measured"] is None else f"{found['measured']:.3g}"
    return (
        f"{'pass' if found['holds'] else 'MISS'}  {found['name']:42s} {measured:>7s}"
        f" >= {found['threshold']:.3g}   {found['worst']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[""], help="words in the bars' names")
    parser.add_argument("--seconds", type=float, default=0.05, help="for each measurement")
    parser.add_argument("--backend", choices=("cuda", "triton"), help="force one of ours")
    parser.add_argument("--json", action="store_true", help="keep the figures in results/<device>/")
    args = parser.parse_args()
    where, started = conditions("cuda"), time.monotonic()
    bench = Bench(Options(args.seconds, backend=args.backend, device="cuda"), (F32, BF16))
    fma = cuda_roofs(F32)
    print(f"copy {fma.copy_gbs:.0f} GB/s, FMA {fma.mm_gflops:.0f} GFLOP/s", flush=True)
    found, rows = [], []
    for bar in BARS:
        if any(word in bar.name for word in args.only):
            found.append(judge(bench, bar, fma))
            print(line(found[-1]), flush=True)
    if any(word in "suite" for word in args.only):
        table = Table(bench.options.rivals)
        rows = suite(bench, table, select(SUITE_TAG))
        table.foot(rows)
        found += judge_suite(rows)
    print("\n" + "\n".join(map(line, found)))
    print(f"{sum(f['holds'] for f in found)} of {len(found)} bars hold")
    print(f"{one_line(where)}; {time.monotonic() - started:.0f} s")
    if args.json:
        content = {"conditions": where, "roofs": fma.as_dict()}
        print(f"wrote {write_json(AUTO, 'bars', 'cuda', content | {'bars': found})}")
        if rows:
            print(f"wrote {write_json(AUTO, 'suite', 'cuda', content | {'rows': rows})}")
    if not all(f["holds"] for f in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
