# SPDX-License-Identifier: Apache-2.0
"""Writes the figures of bench/results into the README, the docs and a picture.

    python bench/report.py            # README.md, docs/*.md, results/<device>/suite.svg
    python bench/report.py --check    # changes nothing; exit status 1 if a table is out of date

A table goes between two lines of a page, and no figure in it is typed by hand:

    <!-- bench:begin -->       or  <!-- bench:begin full -->  or another name of BLOCKS
    <!-- bench:end -->
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from conditions import RESULTS, ROOT, one_line
from picture import X, draw, times_text
from rows import Row, geomean, median

MARKED = re.compile(r"(<!-- bench:begin ?(\w*) -->\n).*?(<!-- bench:end -->)", re.S)
MODES = {"fwd": "forward", "full": "forward + backward"}

# What the README and the picture show: one layer of each kind, plus the row that does worst.
PICKED = (
    "uxnet_dw7_48@48",
    "mednext_dw5_64@64",
    "mednext_dw3_128@32",
    "mednext_up3_64@64",
    "repux_dw21_96@24",
    "lka_dilation3_dw7_32@32",
    "x3d_dw3_54@16x56x56",
    "segformer_dw3_128@32",
)

NONE = "\N{EN DASH}"
Content = dict[str, Any]


def load(name: str) -> list[tuple[Path, Content]]:
    """results/<device>/<name>.json of every device, with its path."""
    return [(path, json.loads(path.read_text())) for path in sorted(RESULTS.glob(f"*/{name}.json"))]


def picked(rows: list[Row], mode: str) -> list[Row]:
    """The rows of a short table: the picked layers, then the one with the least gain."""
    rows = [row for row in rows if row["mode"] == mode]
    found = [row for name in PICKED for row in rows if row["case"] == name]
    judged = [row for row in rows if "best" in row["speedup"]]
    worst = min(judged, key=lambda row: row["speedup"]["best"], default=None)
    return found if worst is None or worst in found else [*found, worst]


def layer(row: Row) -> str:
    """A row in a reader's words: "3D UX-Net, 7³, 48 x 48³"."""
    batch, channels, *size = row["shape"]
    parts = [row["source"].split(",")[0] or row["case"], _cube(row["kernel_size"])]
    if row["op"] == "transposed":
        parts[-1] += " transposed"
    uneven = [key for key in ("stride", "dilation") if set(row[key]) != {1}]
    parts += [f"{key} {_cube(row[key]).rstrip('³')}" for key in uneven]
    parts.append((f"{batch} {X} " if batch > 1 else "") + f"{channels} {X} {_cube(size)}")
    dtype = "" if row["dtype"] == "float32" else f", {row['dtype']}"
    return ", ".join(parts) + dtype + (", NDHWC" if row["layout"] != "ncdhw" else "")


def _cube(sizes: list[int]) -> str:
    return f"{sizes[0]}³" if len(set(sizes)) == 1 else X.join(map(str, sizes))


def _ms(times: Content) -> str:
    ms = times.get("median_ms")
    if ms is None:
        return f"not run (cap {times['cap_s']:.0f} s)" if "capped" in times else next(iter(times))
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def _times(ratio: float | None) -> str:
    if ratio is None or math.isnan(ratio):
        return NONE
    return times_text(ratio)


def _row(row: Row) -> str:
    times, speedup = row["times"], row["speedup"]
    ours = median(times, "ours")
    share = f"{100 * row['roof_ms'] / ours:.0f} %" if ours else NONE
    cells = [_ms(times[name]) for name in ("ours", "conv3d", "conv3d_cl")]
    cells += [_times(speedup.get("conv3d")), _times(speedup.get("best")), share]
    return f"| {layer(row)} | {' | '.join(cells)} |"


def _table(rows: list[Row], everything: list[Row], mode: str) -> Iterator[str]:
    yield (
        f"| {MODES.get(mode, mode)} | voxconv, ms | `F.conv3d` NCDHW, ms |"
        " `F.conv3d` channels_last_3d, ms | speed-up | over the better | of the roof |"
    )
    yield "|---|--:|--:|--:|--:|--:|--:|"
    yield from map(_row, rows)
    first, used, total = geomean(everything, mode, "conv3d")
    best, used_best, _ = geomean(everything, mode, "best")
    counted = f"{used_best} of {total}" if used_best < total else f"all {total}"
    less = f" ({used} for NCDHW)" if used < used_best else ""
    yield (
        f"| **geometric mean of {counted} layers**{less} | | | |"
        f" **{_times(first)}** | **{_times(best)}** | |"
    )
    first, *_ = geomean(everything, mode, "conv3d", roof=True)
    best, *_ = geomean(everything, mode, "best", roof=True)
    yield f"| the same if every layer reached its roof | | | | {_times(first)} | {_times(best)} | |"


def summary(page: Path) -> Iterator[str]:
    """The README's block, of the newest run: picture, a short table for each mode, conditions."""
    newest = max(load("suite"), key=lambda found: found[1]["conditions"]["date"], default=None)
    for path, content in [newest] if newest else []:
        rows = content["rows"]
        shown = _link(path.with_suffix(".svg"), page)
        yield f"![Depthwise layers on {content['conditions']['device']}]({shown})"
        for mode in modes(rows):
            yield ""
            yield from _table(picked(rows, mode), rows, mode)
        yield ""
        yield foot(path, content, page)


def full(page: Path, name: str = "suite") -> Iterator[str]:
    """Every row that was measured."""
    for path, content in load(name):
        rows = content["rows"]
        for mode in modes(rows):
            yield from _table([row for row in rows if row["mode"] == mode], rows, mode)
            yield ""
        yield foot(path, content, page)


def bars(page: Path, name: str = "bars") -> Iterator[str]:
    """The promised speeds and what was measured."""
    for path, content in load(name):
        yield "| promised | at least / most | measured | worst row | holds |"
        yield "|---|--:|--:|---|---|"
        for bar in content["bars"]:
            sign = "≥" if bar["at_least"] else "≤"
            measured = "no figure" if bar["measured"] is None else f"{bar['measured']:.3g}"
            yield (
                f"| {bar['name']} | {sign} {bar['threshold']:.3g} | {measured} |"
                f" {bar['worst']} | {'yes' if bar['holds'] else '**no**'} |"
            )
        yield ""
        yield foot(path, content, page)


BLOCKS: dict[str, Callable[[Path], Iterator[str]]] = {
    "": summary,
    "summary": summary,
    "full": full,
    "bars": bars,
    "dense_full": partial(full, name="dense_suite"),
    "dense_bars": partial(bars, name="dense_bars"),
}


def foot(path: Path, content: Content, page: Path) -> str:
    """The conditions under a table, with the roofs and where the raw figures are."""
    where, roofs = content["conditions"], content["roofs"]
    parts = [one_line(where)]
    if roofs:
        parts.append(
            "roof measured beside each layer, in the middle"
            f" {roofs['copy_gbs']['median']:.0f} GB/s copied,"
            f" {roofs['mm_gflops']['median']:.0f} GFLOP/s in torch.mm"
        )
    return (
        f"<sub>{'; '.join(parts)}; [every figure]({_link(path, page)}), `{where['command']}`</sub>"
    )


def modes(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["mode"] for row in rows))


def _link(target: Path, page: Path) -> str:
    return Path(os.path.relpath(target, page.parent)).as_posix()


def fill(page: Path) -> str | None:
    """The page with its blocks written anew; None if it has none, or nothing was measured."""

    def block(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        lines = "\n".join(BLOCKS[name](page.resolve()))
        return f"{begin}{lines}\n{end}" if lines else match[0]

    text = page.read_text()
    filled = MARKED.sub(block, text)
    return filled if MARKED.search(text) else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", type=Path, help="README.md and docs/*.md if not named")
    parser.add_argument("--check", action="store_true", help="only say what is out of date")
    parser.add_argument("--no-picture", action="store_true")
    args = parser.parse_args()
    stale = False
    for page in args.pages or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        filled = fill(page) if page.exists() else None
        if filled is None:
            continue
        changed = filled != page.read_text()
        stale |= changed
        if changed and not args.check:
            page.write_text(filled)
        print(f"{page.name}: {'out of date' if changed and args.check else 'up to date'}")
    if args.check:
        raise SystemExit(int(stale))
    for path, content in [] if args.no_picture else load("suite"):
        rows = content["rows"]
        panels = [(MODES.get(mode, mode), picked(rows, mode)) for mode in modes(rows)]
        print(f"drew {draw(panels, layer, content, path.with_suffix('.svg'))}")


if __name__ == "__main__":
    main()
