# SPDX-License-Identifier: Apache-2.0
"""The picture of a suite: a bar for ours and for each torch layout, a mark for the roof."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from conditions import one_line
from rows import Row, median

SERIES = (
    ("conv3d", "F.conv3d, NCDHW", "#c3c9d3"),
    ("conv3d_cl", "F.conv3d, channels_last_3d", "#8a94a6"),
    ("ours", "voxconv", "#1f6fd6"),
)
X = "\N{MULTIPLICATION SIGN}"
INK = "#2b3240"
BAR = 0.27


def times_text(ratio: float) -> str:
    """A speed-up to two figures or so: "0.97x", "3.1x", "24x"."""
    return f"{ratio:.{0 if ratio >= 20 else 1 if ratio >= 2 else 2}f}{X}"


def draw(
    panels: list[tuple[str, list[Row]]],
    label: Callable[[Row], str],
    content: dict[str, Any],
    path: Path,
) -> Path:
    """Draws one panel for each (title, rows) and saves it; the same JSON gives the same file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "svg.hashsalt": "voxconv",
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": "#b8bec9",
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
    }
    with plt.rc_context(style):
        height = 1.3 + 0.5 * sum(len(rows) for _, rows in panels) + 0.6 * len(panels)
        figure, axes = plt.subplots(
            len(panels),
            1,
            figsize=(8.6, height),
            height_ratios=[max(len(rows), 1) for _, rows in panels],
            layout="constrained",
            squeeze=False,
        )
        for axis, (title, rows) in zip(axes[:, 0], panels, strict=True):
            _panel(axis, title, rows, label)
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles[::-1], names[::-1], loc="outside upper left", ncols=4, frameon=False)
        figure.supxlabel(_foot(content), fontsize=7, color="#6b7280", x=0.01, ha="left")
        figure.savefig(path, facecolor="white", metadata={"Date": None})
        plt.close(figure)
    return path


def _panel(axis: Any, title: str, rows: list[Row], label: Callable[[Row], str]) -> None:
    known = [row["roof_ms"] for row in rows]
    known += [t for row in rows for name, _, _ in SERIES if (t := median(row["times"], name))]
    left, right = (min(known) / 1.6, max(known) * 2.2) if known else (0.1, 10)
    axis.set_xscale("log")
    axis.set_xlim(left, right)
    for place, row in enumerate(rows):
        for series, (name, title_of, colour) in enumerate(SERIES):
            time = median(row["times"], name)
            y = place + (1 - series) * BAR
            named = {"label": title_of} if place == 0 else {}
            axis.barh(y, (time or left) - left, BAR * 0.92, left, color=colour, **named)
            axis.text((time or left) * 1.04, y, _text(row, name), va="center", fontsize=6.5)
        axis.plot(
            [row["roof_ms"]] * 2,
            [place - 1.6 * BAR, place + 1.6 * BAR],
            color=INK,
            linewidth=1.4,
            solid_capstyle="butt",
            **({"label": "roof measured in the run"} if place == 0 else {}),
        )
    axis.set_yticks(range(len(rows)), [label(row) for row in rows])
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="x", color="#eceff3", zorder=0)
    axis.set_axisbelow(True)
    axis.set_title(
        f"{title}, milliseconds (log scale, shorter is better)", loc="left", fontsize=9.5
    )


def _text(row: Row, name: str) -> str:
    time = median(row["times"], name)
    if time is None:
        return next(iter(row["times"][name]))
    ms = f"{time:.0f}" if time >= 100 else f"{time:.3g}"
    best = row["speedup"].get("best")
    return f"{ms}   {times_text(best)}" if name == "ours" and best else ms


def _foot(content: dict[str, Any]) -> str:
    roofs = content["roofs"]
    return (
        f"{one_line(content['conditions'])}\n"
        f"median of interleaved repeats, allocation included; {X}: speed-up over the better torch"
        f" layout\nroof: the longer of bytes at {roofs['copy_gbs']['median']:.0f} GB/s (x.clone())"
        f" and FLOPs at {roofs['mm_gflops']['median']:.0f} GFLOP/s (torch.mm)"
    )
