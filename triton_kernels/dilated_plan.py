# SPDX-License-Identifier: Apache-2.0
"""How a convolution is cut into the tiles of a matrix product: pure functions of the shapes,
without Triton.

What is called `kind` is the arithmetic of the products: "half" (bfloat16 and float16, on tensor
cores), "tf32" (float32 on tensor cores), "float32" and "float64".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .depthwise_plan import Axes, ceil_div, wasted

# Programs that fill a large GPU (132 multiprocessors) once, and the fewest steps of a part of a sum
# and the most memory for parts, where fewer tiles than that have to be cut along their sums.
PROGRAMS = 132
LEAST_STEPS = 8
SCRATCH = 64 << 20
# Positions that are added one after the other to a weight's gradient, at most if memory allows.
LONGEST_SUM = 2**16

# Most that the blocks of outputs may have beyond them, as a share.
SPARE = 0.35

# Sums of a thread for the taps of a program of grad_weight, whose sources are in registers too.
MOST_TAP_SUMS = 48
# Columns of tiles whose elements are loaded and stored one by one: each takes an address.
MOST_SINGLE = 64

# Elements of so many bytes are loaded together where they lie side by side.
VECTOR_BYTES = 16


class Config(NamedTuple):
    """A tile of the product: rows, columns, terms of a step of its sums; warps, and the stages of
    loads. `taps` are those that a program of grad_weight has a tile of sums for."""

    rows: int
    columns: int
    terms: int
    warps: int
    stages: int
    taps: int = 1

    @property
    def sums(self) -> int:
        """Of a thread."""
        return self.rows * self.columns * self.taps // (32 * self.warps)


class Kind(NamedTuple):
    """What suits an arithmetic: the least and most columns and terms of a step, the most sums of a
    thread, and by columns the (rows, warps, stages) of forward and grad_input; the terms of
    grad_weight, and its (warps, stages)."""

    columns: tuple[int, int]
    terms: tuple[int, int]
    sums: int
    tiles: dict[int, tuple[int, int, int]]
    positions: int
    weight: tuple[int, int]


# Rows: 64 for each warp group of an sm_90, 32 for each warp of the small tiles. Few stages where a
# tile is large. Without tensor cores operands are kept in registers for all terms of a step.
KINDS = {
    "half": Kind(
        columns=(16, 128),
        terms=(16, 32),
        sums=64,
        tiles={16: (128, 4, 4), 32: (128, 4, 4), 64: (128, 8, 3), 128: (128, 8, 3)},
        positions=32,
        weight=(4, 3),
    ),
    "tf32": Kind(
        columns=(16, 128),
        terms=(16, 32),
        sums=64,
        tiles={16: (128, 4, 4), 32: (128, 4, 4), 64: (128, 8, 3), 128: (128, 8, 3)},
        positions=32,
        weight=(4, 2),
    ),
    "float32": Kind(
        columns=(16, 64),
        terms=(16, 16),
        sums=32,
        tiles={16: (64, 4, 2), 32: (128, 4, 2), 64: (64, 4, 2)},
        positions=16,
        weight=(4, 2),
    ),
    "float64": Kind(
        columns=(16, 32),
        terms=(16, 16),
        sums=16,
        tiles={16: (64, 4, 2), 32: (64, 4, 2)},
        positions=16,
        weight=(4, 2),
    ),
}


class Cut(NamedTuple):
    """A tile, and the programs of a pass: `splits` of each sum."""

    config: Config
    splits: int
    grid: int


def block(n: int, least: int, most: int) -> int:
    """The largest power of two that is spare for at most SPARE of n, or else for the least."""
    sizes = [most >> i for i in range(most.bit_length()) if most >> i >= least]
    good = [size for size in sizes if wasted(n, size) <= SPARE]
    return good[0] if good else min(sizes, key=lambda size: wasted(n, size))


def positions(axes: Axes, classes: Sequence[int], batch: int) -> int:
    """Of a class of targets; those of some classes are fewer."""
    return batch * math.prod(ceil_div(a.target, n) for a, n in zip(axes, classes, strict=True))


def steps(axes: Axes, classes: Sequence[int], summed: int, terms: int) -> int:
    """Of the longest sums: taps that a target reads with, times blocks of channels."""
    taps = math.prod(
        ceil_div(a.kernel, n // math.gcd(n, a.dilation)) for a, n in zip(axes, classes, strict=True)
    )
    return taps * ceil_div(summed, terms)


def correlate(
    axes: Axes,
    classes: Sequence[int],
    batch: int,
    groups: int,
    filters: int,
    summed: int,
    kind: str,
    align: int,
) -> Cut:
    """The plan of `correlate`: `filters` channels of a group read `summed` ones; `axes` are those
    of the targets, of which each axis has so many `classes`; `align` elements are loaded at a
    time."""
    own = KINDS[kind]
    least, most = own.columns
    columns = block(filters, least, most if align > 1 else min(most, MOST_SINGLE))
    rows, warps, stages = own.tiles[columns]
    terms = block(summed, *own.terms)
    config = Config(rows, columns, terms, warps, stages)
    while config.rows > 64 and _tiles(config, axes, classes, batch, groups, filters) < PROGRAMS:
        config = config._replace(rows=config.rows // 2)
    return cut(config, axes, classes, batch, groups, filters, summed, kind)


def cut(
    config: Config,
    axes: Axes,
    classes: Sequence[int],
    batch: int,
    groups: int,
    filters: int,
    summed: int,
    kind: str,
) -> Cut:
    """The programs of `correlate` for a tile. Into how many parts a sum is cut does not depend on
    the tile, so that a sum is the same for all tiles of as many terms."""
    first = KINDS[kind].columns[1]
    largest = config._replace(rows=KINDS[kind].tiles[first][0], columns=first)
    least = _tiles(largest, axes, classes, batch, groups, filters)
    length = steps(axes, classes, summed, config.terms)
    bytes = batch * groups * filters * math.prod(axis.target for axis in axes)
    bytes *= 8 if kind == "float64" else 4
    most = min(length // LEAST_STEPS, SCRATCH // bytes)
    splits = max(min(ceil_div(PROGRAMS, least), most), 1)
    return Cut(config, splits, _tiles(config, axes, classes, batch, groups, filters) * splits)


def _tiles(
    config: Config,
    axes: Axes,
    classes: Sequence[int],
    batch: int,
    groups: int,
    filters: int,
) -> int:
    rows = ceil_div(positions(axes, classes, batch), config.rows)
    return rows * math.prod(classes) * groups * ceil_div(filters, config.columns)


def weight(axes: Axes, batch: int, groups: int, filters: int, channels: int, kind: str) -> Cut:
    """The plan of `correlate_weight`: the rows are filters, the columns channels of a tap."""
    own = KINDS[kind]
    warps, stages = own.weight
    rows, columns = (block(n, 16, min(own.columns[1], 64)) for n in (filters, channels))
    taps = math.prod(axis.kernel for axis in axes)
    config = Config(rows, columns, own.positions, warps, stages)
    fitting = [n for n in (5, 3, 2) if n * config.sums <= min(own.sums, MOST_TAP_SUMS)]
    config = config._replace(taps=next((n for n in fitting if wasted(taps, n) <= 0.1), 1))
    return weight_cut(config, axes, batch, groups, filters, channels, kind)


def weight_cut(
    config: Config, axes: Axes, batch: int, groups: int, filters: int, channels: int, kind: str
) -> Cut:
    """The programs of `correlate_weight` for a tile; the parts do not depend on it."""
    taps = math.prod(axis.kernel for axis in axes)
    weights = groups * filters * channels * taps
    least = ceil_div(weights, 64 * 64 * 4)
    cells = batch * math.prod(axis.target for axis in axes)
    wanted = max(ceil_div(4 * PROGRAMS, least), ceil_div(cells, LONGEST_SUM))
    most = min(
        ceil_div(cells, LEAST_STEPS * config.terms),
        SCRATCH // (weights * (8 if kind == "float64" else 4)),
    )
    splits = max(min(wanted, most), 1)
    blocks = ceil_div(filters, config.rows) * ceil_div(channels, config.columns)
    return Cut(config, splits, blocks * ceil_div(taps, config.taps) * groups * splits)


def variants(config: Config, kind: str) -> list[Config]:
    """A tile of the rule, and what may be quicker; all add their sums in the same order."""
    most = KINDS[kind].sums
    tried = [
        config,
        config._replace(stages=config.stages + 1),
        config._replace(stages=max(config.stages - 1, 1)),
        config._replace(warps=2 * config.warps),
        config._replace(rows=config.rows // 2),
        config._replace(rows=2 * config.rows, warps=2 * config.warps),
    ]
    return [c for c in dict.fromkeys(tried) if c.rows >= 16 and c.warps <= 8 and c.sums <= most]


def alignment(numbers: Sequence[int], itemsize: int) -> int:
    """Elements of a vector that numbers of elements are multiples of."""
    return math.gcd(VECTOR_BYTES // itemsize, *numbers)
