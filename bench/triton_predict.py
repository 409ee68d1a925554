# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels of docs/dilated.md are made of, reckoned without a GPU.

    python bench/triton_predict.py            # prints the tables
    python bench/triton_predict.py --write    # writes them into the page
    python bench/triton_predict.py --check    # exit status 1 if the page is out of date

The launches are those of the launchers, on tensors without memory. Registers and shared memory are
those of the machine code that Triton makes (tests/triton_cubins.py), which differ from version to
version: --check leaves them out, unless --compile is added.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

import _path  # noqa: F401
from cases import LAYOUTS, NCDHW, Case
from conditions import ROOT
from dense_cases import MODELS

PAGE = ROOT / "docs" / "dilated.md"
SHARES, RESOURCES = "shares", "resources"
PASSES = ("forward", "grad_input", "grad_weight")
ARCH = 90
REGISTERS, SHARED, RESERVED, BLOCKS = 65536, 228 << 10, 1 << 10, 32  # of a multiprocessor


@dataclass(frozen=True)
class Launch:
    """A matrix product: its tile, and its groups, rows, columns and terms with what is beyond the
    tensors."""

    tile: Any
    groups: int
    rows: int
    columns: int
    terms: int

    @property
    def products(self) -> int:
        return self.groups * self.rows * self.columns * self.terms

    def __str__(self) -> str:
        taps = f", {self.tile.taps} taps" if self.tile.taps > 1 else ""
        return f"{self.tile.rows} × {self.tile.columns} × {self.tile.terms}{taps}"  # noqa: RUF001


def up(n: int, block: int) -> int:
    return -(-n // block) * block


def launches(case: Case, dtype: torch.dtype, layout: str) -> dict[str, Launch]:
    """By pass, what the launchers do on a row."""
    from voxconv.triton_kernels import dilated

    import triton_cubins

    found: list[Launch] = []

    def tuned(name: str, x: Any, problem: Any, tiles: Any, launch: Any) -> Any:
        tile = tiles[0]
        axes, *_ = arguments = problem[0]
        taps = math.prod(axis.kernel for axis in axes)
        if name == "weight":
            _, batch, groups, filters, channels, _ = arguments
            cells = batch * math.prod(axis.target for axis in axes)
            columns = up(channels, tile.columns) * up(taps, tile.taps)
            made = Launch(tile, groups, up(filters, tile.rows), columns, up(cells, tile.terms))
        else:
            _, classes, batch, groups, filters, summed, _ = arguments
            rows = up(dilated.plan.positions(axes, classes, batch), tile.rows)
            # A tap belongs to one class of targets, so those of all classes are the kernel's.
            made = Launch(
                tile, groups, rows, up(filters, tile.columns), taps * up(summed, tile.terms)
            )
        found.append(made)
        return tile

    kernels = ("correlate", "correlate_weight", "add_parts")
    with (
        mock.patch.object(dilated, "tuned", tuned),
        mock.patch.multiple(dilated, **dict.fromkeys(kernels, mock.MagicMock())),
    ):
        triton_cubins.launch(case, dtype, layout)
    return dict(zip(PASSES, found, strict=True))


def share(case: Case, launch: Launch) -> float:
    """Of the products that are made, those of cells that exist."""
    return case.live_flops / 2 / launch.products


def shares_table() -> Iterator[str]:
    yield f"| bfloat16 | {' | '.join(PASSES)} |"
    yield "|---|--:|--:|--:|"
    for case in MODELS:
        by_layout = [launches(case, torch.bfloat16, layout) for layout in LAYOUTS]
        cells = []
        for which in PASSES:
            texts = [f"{one[which]}: {100 * share(case, one[which]):.0f} %" for one in by_layout]
            cells.append(" / ".join(dict.fromkeys(texts)))
        yield f"| {case} | {' | '.join(cells)} |"


def compiled() -> list[dict[str, Any]]:
    rows = [f"{case}:bfloat16:{layout}" for case in MODELS for layout in LAYOUTS]
    script = ROOT / "tests" / "triton_cubins.py"
    run = subprocess.run(
        [sys.executable, script, str(ARCH), *rows],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise SystemExit(run.stderr)
    return [json.loads(line) for line in run.stdout.splitlines()]


def resources_table() -> Iterator[str]:
    import triton

    yield f"Triton {triton.__version__}, sm_{ARCH}, bfloat16:"
    yield ""
    yield (
        "| kernel | tile | warps, stages | layout | elements loaded at a time | registers |"
        " shared memory, KB | loads ahead | blocks of a multiprocessor |"
    )
    yield "|---|---|--:|---|--:|--:|--:|---|--:|"
    lines: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for kernel in compiled():
        if kernel["kernel"] == "add_parts":
            continue
        taps = kernel.get("TAPS", "1")
        tile = f"{kernel['ROWS']} × {kernel['COLUMNS']} × {kernel['TERMS']}"  # noqa: RUF001
        key = (
            f"`{kernel['kernel']}`",
            tile + (f", {taps} taps" if taps != "1" else ""),
            f"{kernel['num_warps']}, {kernel['num_stages']}",
            NCDHW.upper() if kernel["X_UNIT"] == "4" else "NDHWC",
            kernel["ALIGN"],
        )
        lines.setdefault(key, []).append(kernel)
    for key in sorted(lines):
        alike = lines[key]
        registers = max(kernel["registers"] for kernel in alike)
        shared = max(kernel["shared"] for kernel in alike)
        blocks = min(
            REGISTERS // (up(registers, 8) * 32 * int(alike[0]["num_warps"])),
            SHARED // (shared + RESERVED),
            BLOCKS,
        )
        ahead = "yes" if all(ahead_of(kernel) for kernel in alike) else "no"
        yield f"| {' | '.join(key)} | {registers} | {shared / 1024:.1f} | {ahead} | {blocks} |"


def ahead_of(kernel: dict[str, Any]) -> bool:
    """Whether x goes to shared memory by copies that nobody waits for: those of single halves
    cannot, and of the weights alone there are few."""
    return int(kernel["ALIGN"]) > 1 and kernel["copies"] > 0


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    SHARES: shares_table,
    RESOURCES: resources_table,
}


def filled(text: str, names: list[str]) -> str:
    for name in names:
        marked = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.S)
        table = "\n".join(TABLES[name]())
        text = marked.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the tables into the page")
    parser.add_argument("--check", action="store_true", help="only say whether it is out of date")
    parser.add_argument("--compile", action="store_true", help="check registers and memory too")
    args = parser.parse_args()
    names = [SHARES] if args.check and not args.compile else [SHARES, RESOURCES]
    if not (args.check or args.write):
        print("\n\n".join("\n".join(TABLES[name]()) for name in names))
        return
    text = PAGE.read_text()
    new = filled(text, names)
    if args.write:
        PAGE.write_text(new)
        return
    print(f"{PAGE.name}: {'up to date' if new == text else 'out of date'}")
    raise SystemExit(int(new != text))


if __name__ == "__main__":
    main()
