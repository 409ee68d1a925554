# SPDX-License-Identifier: Apache-2.0
"""Times the case table: ours against torch in both layouts, and against the machine's own roof.

    python bench/run.py                                   # layers of published networks, fp32
    python bench/run.py --case uxnet --mode passes        # forward, grad_input, grad_weight apart
    python bench/run.py --tag bar --dtype bfloat16 --layout channels_last_3d
    python bench/run.py --json                            # results/<device>/suite.json

What the columns mean is in bench/README.md.
"""

from __future__ import annotations

import argparse
import fnmatch
import time
from pathlib import Path
from typing import Any

import torch

import _path  # noqa: F401
from cases import CASES, CHANNELS_LAST, LAYOUTS, Case
from conditions import AUTO, BUSY, Others, conditions, one_line, write_json
from rivals import OURS, RIVALS
from roofline import summary
from rows import UNCHECKED, Bench, Options, Row, geomean

SUITE_TAG = "model"
SUITE_MODES = ("fwd", "full")
MODES = {
    "fwd": ("fwd",),
    "bwd": ("bwd",),
    "full": ("full",),
    "passes": ("fwd", "grad_input", "grad_weight"),
}
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SHORT = {"float32": "", "float64": " fp64", "bfloat16": " bf16", "float16": " fp16"}
WIDTH = 38
LOSING = 1 / 1.05


def add_common(parser: argparse.ArgumentParser) -> None:
    """The options that every script here has."""
    default = Options()
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument(
        "--seconds", type=float, default=default.seconds, help="time for each measurement"
    )
    parser.add_argument(
        "--cap", type=float, default=default.cap, help="leave out calls that take longer, seconds"
    )
    parser.add_argument(
        "--json", nargs="?", type=Path, const=AUTO, help="file; results/<device>/ if not named"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--op", choices=("depthwise", "dilated", "transposed"))
    parser.add_argument("--case", nargs="+", help="names, parts of names or patterns")
    parser.add_argument("--tag", nargs="+", help=f"rows with any of these tags ({SUITE_TAG})")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=SUITE_MODES)
    parser.add_argument("--dtype", nargs="+", choices=(*DTYPES, "model"), default=["float32"])
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, help="of our tensors")
    parser.add_argument("--backend", choices=("cpu", "cuda", "triton", "torch"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rivals", nargs="*", choices=tuple(RIVALS), default=tuple(RIVALS))
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="no speed-up is printed for a row that was not checked",
    )
    add_common(parser)
    return parser.parse_args()


def select(args: argparse.Namespace) -> list[Case]:
    tags = set(args.tag or ([] if args.case else [SUITE_TAG]))
    found = []
    for case in CASES:
        if (args.op and case.op != args.op) or (tags and not tags & set(case.tags)):
            continue
        names = args.case or ["*"]
        if any(part in case.name or fnmatch.fnmatch(case.name, part) for part in names):
            found.append(case)
    return found


def dtype_of(name: str, case: Case) -> torch.dtype:
    if name != "model":
        return DTYPES[name]
    if "bf16" in case.tags:
        return torch.bfloat16
    return torch.float16 if "fp16" in case.tags else torch.float32


class Table:
    """Prints rows as they come, one line each."""

    def __init__(self, rivals: tuple[str, ...]) -> None:
        self.rivals = rivals
        heads = [f"{name:>10s}" for name in ("ours ms", *(f"{r} ms" for r in rivals))]
        ratios = [f"{'x ' + r:>11s}" for r in rivals]
        print(
            f"{'case':{WIDTH}s} {'mode':11s} |{' '.join(heads)} |{' '.join(ratios)} |"
            " GFLOP/s   GB/s % roof |  MB ours  torch | kernel"
        )

    def row(self, row: Row) -> None:
        times = row["times"]
        ours = times[OURS.name].get("median_ms")
        cells = [f"{_time(times[name]):>10s}" for name in (OURS.name, *self.rivals)]
        ratios = [f"{_ratio(row, rival):>11s}" for rival in self.rivals]
        rates = " " * 22
        if ours:
            gflops, gbs = row["flops"] / ours / 1e6, row["bytes"] / ours / 1e6
            rates = f"{gflops:8.1f} {gbs:6.1f} {100 * row['roof_ms'] / ours:6.0f}"
        memory = f"{_mb(times[OURS.name]):>8s} {_mb(*(times[r] for r in self.rivals)):>6s}"
        print(
            f"{label(row):{WIDTH}s} {row['mode']:11s} |{' '.join(cells)} |{' '.join(ratios)} |"
            f"{rates} | {memory} | {row['kernel']}{_busy(row)}",
            flush=True,
        )

    def foot(self, rows: list[Row]) -> None:
        for mode in dict.fromkeys(row["mode"] for row in rows):
            means = []
            for rival in (*self.rivals, "best"):
                mean, used, total = geomean(rows, mode, rival)
                if used:
                    means.append(f"{mean:.2f} x {rival} ({used} of {total} rows)")
            losing = [row for row in rows if row["mode"] == mode and _loses(row)]
            print(
                f"geometric mean, {mode}: {', '.join(means) or 'no rival timed'}"
                f"; over 5 % slower than the better torch layout: {len(losing)}"
            )


def label(row: Row) -> str:
    return row["case"] + SHORT[row["dtype"]] + (" cl" if row["layout"] == CHANNELS_LAST else "")


def _loses(row: Row) -> bool:
    return row["speedup"].get("best", 1.0) < LOSING


def _busy(row: Row) -> str:
    share = row["others_cpu"] or 0.0
    return f"  BUSY: others used {100 * share:.0f} % of the CPUs" if share > BUSY else ""


def _time(time: dict[str, Any]) -> str:
    if "median_ms" not in time:
        return next(iter(time))
    ms = time["median_ms"]
    single = "'" if time["repeats"] == 1 else ""
    return (f"{ms:.0f}" if ms >= 1000 else f"{ms:.1f}" if ms >= 100 else f"{ms:.3g}") + single


def _ratio(row: Row, rival: str) -> str:
    if row["check"] != "ok":
        return "unchecked" if row["check"] == UNCHECKED else "WRONG"
    ratio = row["speedup"].get(rival)
    if ratio is None:
        return "-"
    return f"{ratio:.2f}" + (" <" if ratio < LOSING else "")


def _mb(*times: dict[str, Any]) -> str:
    known = [t["peak_mb"] for t in times if t.get("peak_mb") is not None]
    return f"{min(known):.0f}" if known else "-"


def suite(bench: Bench, table: Table, cases: list[Case]) -> list[Row]:
    """The default rows: what the geometric means of the README are about."""
    found = []
    for case in cases:
        for row in bench.rows(case, SUITE_MODES, torch.float32, case.layout):
            table.row(row)
            found.append(row)
    return found


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    cases = select(args)
    if not cases:
        raise SystemExit("no row of tests/cases.py fits")
    where = conditions(args.device)
    started = time.monotonic()
    options = Options(
        args.seconds, args.cap, args.check, tuple(args.rivals), args.backend, args.device
    )
    jobs = [
        (case, dtype_of(name, case), layout)
        for case in cases
        for name in args.dtype
        for layout in args.layout or [case.layout]
    ]
    bench = Bench(options, {dtype for _, dtype, _ in jobs})
    modes = [mode for name in args.mode for mode in MODES[name]]
    table, rows = Table(options.rivals), []
    with Others() as others:
        for case, dtype, layout in jobs:
            for row in bench.rows(case, dict.fromkeys(modes), dtype, layout):
                table.row(row)
                rows.append(row)
    where["others_cpu"] = others.share
    table.foot(rows)
    roofs = summary(bench.roofs)
    print(f"roofs of this run: {_roofs(roofs)}")
    print(f"{one_line(where)}; {time.monotonic() - started:.0f} s")
    if args.json:
        content = {"conditions": where, "roofs": roofs, "rows": rows}
        print(f"wrote {write_json(args.json, 'suite', args.device, content)}")
    if any(row["check"] not in ("ok", UNCHECKED) for row in rows):
        raise SystemExit(1)


def _roofs(roofs: dict[str, Any]) -> str:
    copy, mm = roofs["copy_gbs"], roofs["mm_gflops"]
    return (
        f"copy {copy['median']:.1f} GB/s ({copy['lowest']:.1f}-{copy['highest']:.1f}), "
        f"torch.mm {mm['median']:.0f} GFLOP/s ({mm['lowest']:.0f}-{mm['highest']:.0f})"
    )


if __name__ == "__main__":
    main()
