# SPDX-License-Identifier: Apache-2.0
"""How a pass is cut into programs: pure functions of the shapes, without Triton."""

from __future__ import annotations

import math
from typing import NamedTuple

Triple = tuple[int, int, int]

# Lanes of a program, and programs that fill a large GPU (132 multiprocessors) a few times.
LANES = 128
PROGRAMS = 132 * 16

# Kernels up to so many taps along an axis are walked through by planes; what they keep in registers
# grows with the taps. Those of so many taps altogether keep their weights in registers too.
MOST_TAPS = 9
HOISTED_TAPS = 27

# Registers of a thread for sums of targets, and the cells that are added to them; for sums of taps,
# and the gradients they go with.
MOST_SUMS = 64
MOST_CELLS = 32
MOST_TAP_SUMS = 64
MOST_GRADS = 16
# Products that are added one after the other to a sum of a tap.
LONGEST_SUM = 256
BLOCK_TAPS = 16  # of a program of grad_weight_any


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def wasted(n: int, block: int) -> float:
    """The share of n cells that blocks of `block` cells have beyond them."""
    return ceil_div(n, block) * block / n - 1


class Axis(NamedTuple):
    """An axis of a correlation: target t reads source t * stride + k * dilation - before."""

    source: int
    target: int
    kernel: int
    stride: int
    dilation: int
    before: int

    @property
    def lattice(self) -> int:
        """Targets that far apart read the same planes."""
        return self.dilation // math.gcd(self.stride, self.dilation)

    @property
    def march(self) -> int:
        """Planes from one target of a lattice to the next, in dilations."""
        return self.stride // math.gcd(self.stride, self.dilation)

    @property
    def ring(self) -> int:
        """Targets of a lattice that read the same plane."""
        return ceil_div(self.kernel, self.march)

    def turned(self) -> Axis:
        """Of grad_input, from the gradient with the kernel turned round; the stride is 1."""
        reach = self.dilation * (self.kernel - 1)
        return Axis(self.target, self.source, self.kernel, 1, self.dilation, reach - self.before)

    def forward_taps(self) -> AxisTaps:
        return AxisTaps(self.stride, -self.before, self.dilation, 1, 1, 0, 1, self.kernel)

    def backward_taps(self) -> AxisTaps:
        """Of grad_input: target t reads gradient (t + before - k * dilation) / stride."""
        common = math.gcd(self.stride, self.dilation)
        every = self.stride // common
        inverse = pow(self.dilation // common, -1, every) if every > 1 else 0
        return AxisTaps(
            1, self.before, -self.dilation, self.stride, common, inverse, every, self.kernel
        )


class AxisTaps(NamedTuple):
    """Which taps a target of correlate_any reads with; see there."""

    scale: int
    shift: int
    step: int
    divisor: int
    common: int
    inverse: int
    every: int
    taps: int


Axes = tuple[Axis, Axis, Axis]


class Tile(NamedTuple):
    """Positions and channels that a program owns, and its warps."""

    positions: int
    channels: int
    warps: int


def tile(positions: int, channels: int, channels_last: bool, elements: int, lanes: int) -> Tile:
    """Cut positions x channels into tiles of up to `lanes` * `elements` cells.

    The fast axis of the layout is cut first, into the largest blocks that waste little; small
    volumes leave room for several channels. There are fewer channels than threads, or else Triton
    lays weights and cells out in different ways, and converts them one by one.
    """
    cells = lanes * elements
    if channels_last:
        c = block(channels, 4, min(16 * elements, cells // (2 * elements)))
        p = block(positions, 2 * elements, cells // c)
    else:
        p = block(positions, 8, cells)
        c = min(cells // p, 1 << (channels - 1).bit_length())
    return Tile(p, c, max(p * c // (32 * elements), 1))


def block(n: int, least: int, most: int) -> int:
    """The largest power of two that wastes little of n, or else the one that wastes least."""
    sizes = [most >> i for i in range(most.bit_length()) if most >> i >= least]
    good = [size for size in sizes if wasted(n, size) <= 0.2]
    return good[0] if good else min(sizes, key=lambda size: wasted(n, size))


class Planes(NamedTuple):
    """How correlate_planes or grad_weight_planes cut a pass into `grid` programs.

    `rows` are the lines of a plane of the kernel that a program works with.
    """

    lines: int
    tile: Tile
    slab: int
    slabs: int
    hoist: bool
    rows: int
    grid: int


class Cells(NamedTuple):
    """How correlate_any cuts a pass."""

    tile: Tile
    grid: int


class TapBlocks(NamedTuple):
    """How grad_weight_any cuts a pass: planes of grad, in chunks of each sample."""

    planes: int
    chunks: int
    grid: int


def planes(
    axes: Axes, batch: int, channels: int, summed: int, channels_last: bool, wide: bool
) -> Planes | None:
    """The plan of correlate_planes; None where a kernel is too large for it.

    `channels` are those of the target, `wide` sums take two registers.
    """
    d, h, w = axes
    if max(d.kernel, h.kernel, w.kernel) > MOST_TAPS:
        return None
    elements = 4 if channels_last else 1
    high = ceil_div(h.target, h.lattice)
    registers = elements * (2 if wide else 1)
    lines = next(
        n
        for n in (4, 2, 1)
        if n == 1
        or (
            n * d.ring * registers <= MOST_SUMS
            and ((n - 1) * h.march + h.kernel) * registers <= MOST_CELLS
            and wasted(high, n) <= 0.25
        )
    )
    own, places = _places(axes, channels, channels_last, elements, lines, LANES)
    programs = batch * places * ceil_div(channels, own.channels)
    slab, slabs = cut(ceil_div(d.target, d.lattice), 2 * d.ring, d.target, programs)
    taps = d.kernel * h.kernel * w.kernel
    hoist = summed == 1 and not channels_last and taps <= HOISTED_TAPS // (2 if wide else 1)
    return Planes(lines, own, slab, slabs, hoist, h.kernel, programs * slabs)


def weight_planes(
    axes: Axes, batch: int, filters: int, channels_last: bool, wide: bool
) -> Planes | None:
    """The plan of grad_weight_planes; None where a kernel is too large for it."""
    d, h, w = axes
    room = MOST_TAP_SUMS // (2 if wide else 1)
    vectors = (4, 2, 1) if channels_last else (1,)
    fitting = (
        (rows, elements)
        for rows in (h.kernel, 1)
        for elements in vectors
        if d.kernel * rows * w.kernel * elements <= room
    )
    rows, elements = next(fitting, (0, 0))
    if not rows:
        return None
    exact = 1 if h.target % h.lattice else h.target // h.lattice
    room = (room + MOST_GRADS // (2 if wide else 1)) // elements - d.kernel * rows * w.kernel
    lines = next(n for n in (4, 2, 1) if n == 1 or (n * d.ring <= room and exact % n == 0))
    own, places = _places(axes, filters, channels_last, elements, lines, 32)
    blocks = ceil_div(filters, own.channels) * (h.kernel // rows)
    steps = ceil_div(d.target, d.lattice) + d.ring - 1
    most = LONGEST_SUM // lines
    slab, slabs = cut(steps, 4 * d.ring, most, batch * places * blocks)
    return Planes(lines, own, slab, slabs, False, rows, batch * places * blocks * slabs)


def _places(
    axes: Axes, channels: int, channels_last: bool, elements: int, lines: int, lanes: int
) -> tuple[Tile, int]:
    """A tile, and how many of them there are on all lattices of a slab of a channel."""
    d, h, w = axes
    positions = ceil_div(ceil_div(h.target, h.lattice), lines) * w.target
    own = tile(positions, channels, channels_last, elements, lanes)
    return own, ceil_div(positions, own.positions) * h.lattice * d.lattice


def cut(length: int, least: int, most: int, programs: int) -> tuple[int, int]:
    """Pieces of a length, from `least` to `most` long, that make enough of so many programs."""
    pieces = min(ceil_div(PROGRAMS, programs), length // least)
    piece = ceil_div(length, max(pieces, ceil_div(length, most), 1))
    return piece, ceil_div(length, piece)


def cells(axes: Axes, phases: int, batch: int, channels: int, channels_last: bool) -> Cells:
    """The plan of correlate_any, with so many phases of lines."""
    d, h, w = axes
    positions = ceil_div(h.target, phases) * w.target
    own = tile(positions, channels, channels_last, 4, LANES)
    tiles = ceil_div(positions, own.positions) * phases * d.target
    return Cells(own, tiles * ceil_div(channels, own.channels) * batch)


def tap_blocks(axes: Axes, batch: int, filters: int) -> TapBlocks:
    """The plan of grad_weight_any."""
    d, h, w = axes
    taps = d.kernel * h.kernel * w.kernel
    blocks = ceil_div(taps, BLOCK_TAPS)
    most = max(LONGEST_SUM * LANES // (h.target * w.target), 1)
    planes, chunks = cut(d.target, 1, most, batch * filters * blocks)
    return TapBlocks(planes, chunks, batch * filters * blocks * chunks)
