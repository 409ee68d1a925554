# SPDX-License-Identifier: Apache-2.0
"""What a block of each CUDA kernel has to do, for gpu_predict.py: a function for each family.

They take a pass and its launch, as the launch rule of the family's .cuh chose it, and work back
how large a slab or tile is. Multiply-adds, loads from shared memory and products of the tensor
cores are those of the source; all instructions of a warp are counted in the machine code (sm_90a)
of the inner loops, and what lies around these is rounded: copies, bounds, stores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from gpu_launches import Kernel, Pass, Work, ceil

STEP = 30  # instructions of a warp for a step of a walk: barrier, which plane, where it lies


def walk(p: Pass, slab: int) -> tuple[int, int]:
    """Planes of the source that a slab of the target reads, and pairs of these two that meet."""
    KD, dilation = p.case.kernel[0], p.case.dilation[0]
    planes = min(p.case.stride[0] * (slab - 1) + KD, ceil(p.source[0], dilation))
    return planes, min(slab * KD, ceil(p.live(0), dilation))


def copies(p: Pass, k: Kernel, pitch: int, lines: int, offset: int, steps: int = 1) -> int:
    """bytes_of_copy of source_tile.cuh: copies of a thread for a tile of a plane."""
    cells = 16 // p.itemsize
    while cells > 1 and (steps > 1 or p.source[2] % cells or offset % cells):
        cells //= 2
    return ceil(pitch * lines / cells, k.launched.block[0] * k.launched.block[1])


def fold(sums: int, rounds: int, groups: int, threads: int) -> float:
    """Instructions of fold_sums (sum_partials.cuh), threads of a group: 12 for 4 sums."""
    return rounds * ceil(groups * sums / rounds, 32) * ceil(threads, 4) * 12


def planes(p: Pass, k: Kernel) -> Work:
    _, K, SD, S = map(k.number, range(1, 5))
    step = p.case.dilation
    wide, high, deep = k.launched.block
    lines = 1 if K > 7 else 2 if K > 5 or S > 1 else 4
    tile_w, tile_h = 4 * wide, lines * high
    own = [ceil(size, by) for size, by in zip(p.target, step, strict=True)]
    tiles = ceil(own[2], tile_w) * ceil(own[1], tile_h) * math.prod(step)
    slab = ceil(own[0], k.blocks // (tiles * ceil(p.targets, deep)))
    steps, pairs = walk(p, slab)
    # A row of vectors lies in front of the first cell that is read.
    cells = 16 // p.itemsize
    pitch = ceil(cells - K // 2 + S * (tile_w - 1) + K, cells) * cells
    plane = pitch * (S * (tile_h - 1) + K)
    offset = math.gcd(S * tile_w, p.before(2) - K // 2)
    copied = copies(p, k, pitch, plane // pitch, offset, step[2])
    # Vectors of the source that are read.
    read = (S * (lines - 1) + K) * ceil((cells - K // 2) % 4 + 3 * S + K, 4)
    taps = pairs * K * ceil(K, 4)  # vectors, by all lanes at once
    fmas = pairs * lines * 4 * K * K
    moved = 4 * lines * ceil(k.number(1), SD) / SD
    each = read + 16 * copied + moved + STEP + (4 * read if p.halves else 0)
    copied = deep * plane * p.itemsize / 128 / k.warps
    wavefronts = taps + steps * (read * (2 * S if p.halves else 4) + copied)
    return Work(fmas + taps + steps * each + slab * 10 * lines, fmas, wavefronts).times(k.warps)


def planes_up(p: Pass, k: Kernel) -> Work:
    KD, K, SD = map(k.number, range(1, 4))
    wide, high, deep = k.launched.block
    lines, back, second = 2 if K == 3 else 1, K // 2, K // 2 % 2
    before = [p.case.pads[i][0] for i in range(3)]
    pairs_d, pairs_h = (
        (before[i] + p.target[i] - 1) // step - before[i] // step + 1
        for i, step in enumerate((SD, 2))
    )
    tiles = ceil(p.target[2], 8 * wide) * ceil(pairs_h, lines * high)
    slab = ceil(pairs_d, k.blocks // (tiles * ceil(p.targets, deep)))
    steps = min(slab + (KD - 1) // SD, p.source[0])
    pairs = min(slab * KD, p.live(0))  # of a plane of the source and one of the target
    cells = 16 // p.itemsize
    window = (K - 1 - second) // 2 + 4 + second
    lead = (cells + (K // 2 - second) // 2 - (K - 1 - second) // 2) % cells
    pitch = ceil(lead + 4 * (wide - 1) + window, cells) * cells
    plane = pitch * (lines * high + back)
    copied = copies(p, k, pitch, lines * high + back, math.gcd(4 * wide, (before[2] - K // 2) // 2))
    read = (lines + back) * ceil(lead % 4 + window, 4)
    taps = pairs * lines * K * ceil(K, 4)
    fmas = pairs * lines * 4 * K * K
    each = read + 16 * copied + KD * 16 * lines + STEP + (4 * read if p.halves else 0)
    copied = deep * plane * p.itemsize / 128 / k.warps
    wavefronts = taps + steps * (read * (2 if p.halves else 4) + copied)
    issued = fmas + taps + steps * each + slab * SD * 40 * lines
    return Work(issued, fmas, wavefronts).times(k.warps)


class Phases(NamedTuple):
    """PhasedAxis of depthwise_lines_plan.h: how many there are; of each, where it begins to read
    and with how many taps."""

    step: int
    stride: int
    source_step: int
    phases: list[tuple[int, int]]

    @property
    def mean(self) -> float:
        return sum(taps for _, taps in self.phases) / self.step

    @property
    def most(self) -> int:
        return max(taps for _, taps in self.phases)


def phases(p: Pass, i: int) -> Phases:
    K, stride, dilation = p.case.kernel[i], p.case.stride[i], p.case.dilation[i]
    before, turn = p.case.pads[i][0], stride // math.gcd(stride, dilation)
    if not p.backwards:
        step = turn * dilation // stride
        return Phases(step, turn, dilation, [(stride * o - before, K) for o in range(step)])
    found = []
    for o in range(turn * dilation):
        first = next((f for f in range(turn) if (o + before - f * dilation) % stride == 0), K)
        taps = ceil(max(K - first, 0), turn)
        found.append(((o + before - (first + turn * (taps - 1)) * dilation) // stride, taps))
    return Phases(turn * dilation, 1, turn * dilation // stride, found)


def runs(taps: int) -> list[int]:
    """How cut_runs cuts taps."""
    found = []
    while taps:
        found.append(taps if taps <= 5 or taps == 7 else 4)
        taps -= found[-1]
    return found


def lines(p: Pass, k: Kernel) -> Work:
    d, h, w = (phases(p, i) for i in range(3))
    wide, high, _ = k.launched.block
    own_phases = k.number(1)
    own_planes = 2 if own_phases > 2 else 4
    filters = p.case.multiplier if p.backwards and not p.case.transposed else 1
    steps = filters * min(d.stride * (own_planes - 1) + d.mean, p.source[0])
    rows = filters * min(own_planes * d.mean, p.live(0) / d.step) * 2 * h.mean  # of taps
    read = steps * (h.stride + h.mean)  # lines of the source
    begins, fmas, issued, wavefronts, last = set(), 0.0, 0.0, 0.0, 0
    for begin, taps in w.phases[:own_phases]:
        for first in range(min(w.stride, taps)):
            begins.add(begin + w.source_step * first)
            taps_of_line = ceil(taps - first, w.stride)
            last = max(last, taps_of_line)
            for n in runs(taps_of_line):
                fmas += rows * 4 * n
                issued += rows * (4 * n + ceil(n, 4) + 1.5) + 30 * read
                wavefronts += rows * ceil(n, 4) + read * 4 * ceil(n + 3, 4)
    # share_columns: turns of the threads, each of some lines; 20 instructions for one.
    columns, copied = len(begins) * (4 * wide + last - 1), h.stride * (2 * high - 1) + h.most
    turns = min(
        t * (2 + ceil(copied, wide * high // ceil(columns, t)))
        for t in range(1, columns + 1)
        if ceil(columns, t) <= wide * high
    )
    issued += steps * (20 * turns + STEP) + 8 * own_planes * own_phases * 8
    wavefronts += steps * columns * copied / (wide * high)
    return Work(issued, fmas, wavefronts).times(k.warps)


def channels_of_block(p: Pass) -> int:
    """share_channels of channels_last_tile.cuh."""
    channels = p.case.channels
    size = channels * p.itemsize
    unit = next(b for b in (16, 4, p.itemsize) if size % b == 0) // p.itemsize
    return ceil(ceil(channels, ceil(channels, 16)), unit) * unit


def channels_walk(p: Pass, k: Kernel, cells: int, tall: int) -> tuple[int, int]:
    own = channels_of_block(p)
    tiles = ceil(p.target[2], cells // own) * ceil(p.target[1], tall)
    slabs = k.blocks // (p.case.n * ceil(p.case.channels, own) * tiles)
    return walk(p, ceil(p.target[0], slabs))


# Multiply-adds, wavefronts and all instructions of a warp for a plane of the source, by K and P.
CHANNELS = {
    (3, 8): (216, 30, 473),
    (3, 16): (432, 54, 789),
    (5, 8): (1000, 200, 1374),
    (5, 16): (2000, 240, 2525),
    (7, 8): (2744, 462, 3239),
}


def channels_last(p: Pass, k: Kernel) -> Work:
    fmas, wavefronts, issued = CHANNELS[k.number(1), k.number(2)]
    steps, _ = channels_walk(p, k, 128, k.number(2))
    return Work(issued, fmas, wavefronts).times(steps * k.warps)


# The same for a plane of x, by K.
CHANNELS_WEIGHT = {3: (432, 102, 834), 5: (1000, 100, 1430), 7: (784, 134, 1115)}


def channels_last_weight(p: Pass, k: Kernel) -> Work:
    K = k.number(1)
    fmas, wavefronts, issued = CHANNELS_WEIGHT[K]
    steps, pairs = channels_walk(p, k, 64 if K > 5 else 128, 8 if K == 5 else 16)
    whole = pairs / K  # planes that meet all taps
    work = Work(whole * fmas + steps * (issued - fmas), whole * fmas, steps * wavefronts)
    return work.times(k.warps)


# Multiply-adds of a warp for a patch, and all instructions but copies, for float and for halves.
SLABS = {3: (432, 560, 620), 5: (400, 530, 610), 7: (784, 890, 1040)}


def slabs(p: Pass, k: Kernel) -> Work:
    K = k.number(1)
    groups = 1 if K == 3 else K  # of threads, one for each kd
    wide, high, deep = k.launched.block
    patches = ceil(p.target[2], 4), ceil(p.target[1], 4)
    tiles = ceil(patches[0], wide) * ceil(patches[1], high)
    parts = k.blocks // (tiles * ceil(p.targets, deep // groups))
    steps, pairs = walk(p, ceil(p.target[0], parts))
    # Copies, by fours where lines allow it.
    fours = k.arguments[2].startswith("Four")
    pitch = 4 * wide + 8 + (12 if p.target[2] % 4 else 0)
    plane, threads = (4 * high + K - 1) * pitch, wide * high * groups
    copies = ceil(plane / (4 if fours else 1), threads)
    fmas, issued = SLABS[K][0], SLABS[K][2 if p.halves else 1]
    meets = pairs / K
    around = (steps if K == 3 else meets) * (issued - fmas + (0 if fours else 60))
    loads = 3 * (K + 3) * (2 if p.halves else 4)
    work = Work(
        meets * fmas + around + steps * (8 * copies + STEP),
        meets * fmas,
        (steps if K == 3 else meets) * loads + steps * plane * p.itemsize / 128 / ceil(threads, 32),
    ).times(k.warps)
    folded = deep // groups * fold(K**3 // groups, K, groups, wide * high)
    return work._replace(instructions=work.instructions + folded)


def weight_lines(p: Pass, k: Kernel) -> Work:
    Q, W = k.number(1), k.number(2)
    columns, high, groups = k.launched.block
    case = p.case
    plane, row = (1, 0) if case.kernel[1] == 1 else (0, 1)
    common = math.gcd(case.stride[row], case.dilation[row])
    tap_stride, row_stride = case.stride[row] // common, case.dilation[row] // common
    chunks = ceil(case.kernel[plane], groups) * min(tap_stride, case.kernel[row])
    chunks *= ceil(ceil(case.kernel[row], tap_stride), Q) * ceil(case.kernel[2], W)
    class_rows = ceil(p.out[row], row_stride)
    row_tiles = ceil(class_rows, 16 * high)
    rows = ceil(class_rows, row_tiles * high)
    tiles = ceil(p.out[2], columns) * row_tiles * row_stride
    parts = k.blocks // (chunks * tiles * case.n * p.filters)
    slab = ceil(p.out[plane], parts)
    stride, dilation = case.stride[plane], case.dilation[plane]
    by = stride if groups == 1 else math.gcd(stride, dilation)
    steps = min((slab - 1) * stride + (groups - 1) * dilation, p.x[plane] - 1) // by + 1
    meets = min(slab, p.live(plane) / case.kernel[plane])
    # A row: the multiply-adds, W loads and as much again for what is not there, the cell of grad.
    pitch = (columns - 1) * case.stride[2] + (W - 1) * case.dilation[2] + 1
    x_rows = rows * high + Q - 1
    copies = ceil(x_rows * pitch, columns * high * groups)
    loads = (rows + Q - 1) * W
    work = Work(
        meets * (rows * (Q * W + 7 + 1.7 * W) + loads) + steps * (10 * copies + STEP),
        meets * rows * Q * W,
        meets * (loads * min(case.stride[2], 2) + rows) + steps * copies,
    ).times(k.warps)
    folded = fold(Q * W, Q, groups, columns * high)
    return work._replace(instructions=work.instructions + folded)


def toeplitz(p: Pass, k: Kernel) -> Work:
    S, J, G = (k.number(i) for i in (1, 2, 3))
    walks, (KD, KH, _) = k.arguments[4] == "true", p.case.kernel
    pieces, pairs = J + 2 * S - 1, 16 * S + 6
    units, halves = ceil(p.target[2], 8 * J), ceil(p.target[1], 8)
    for wide in range(1, min(units, k.warps) + 1):  # which of the cuts it was
        for high in range(1, 2 * k.warps + 1):
            groups, rows = 2 - (high % 2 == 0), high * 8 + KH - 1
            pitch = 8 * ((wide * J + 2 * S - 1) | 1)
            taps = ceil(4 * pieces + (G if walks else G + 1) * KH * pairs, 4) * 4
            shared = 4 * (taps + groups * rows * pitch)
            if wide * high * groups == 2 * k.warps and shared == k.launched.shared:
                break
        else:
            continue
        break
    blocks_d = k.blocks // (p.targets * ceil(units, wide) * ceil(halves, high))
    slab = ceil(p.target[0], blocks_d * groups)
    steps = min(p.source[0] + (groups - 1) * slab, slab + KD - 1)
    _, met = walk(p, slab)
    live = min(KH, p.source[1] + (8 if groups == 2 else 16) - 1)  # lines of taps
    copied = min(rows, p.source[1]) * min(pitch // 8, ceil(p.source[2] + 7, 8)) * groups
    aligned = p.source[2] % 8 == 0
    # A warp: products, the pairs of taps for them, pieces of lines; for a plane that is done its
    # stores and the moves of all sums; for 32 copies of 16 bytes one instruction each.
    issued = live * (met * (J * S + 2 * S + 3) + steps * (pieces + 12)) + steps * 2 * STEP
    issued += slab * (24 * J + 4 * J * G)
    issued += steps * copied * (1 if aligned else 3) / k.warps
    issued += 20 * KD * KH * pairs / (32 * k.warps)
    wavefronts = live * (met * 2 * S + steps * 2 * pieces) + steps * copied / 8 / k.warps
    return Work(issued, 0, wavefronts, live * met * J * S).times(k.warps)


def hankel(p: Pass, k: Kernel) -> Work:
    QW, (KD, KH, _) = k.number(1), p.case.kernel
    groups_h = ceil(KH, 7)
    taps_h, units = ceil(KH, groups_h), (12 if QW < 3 else 8) // groups_h
    columns = ceil(p.out[2], 16)
    blocks_w = ceil(columns, min(units, 4))
    wide = ceil(columns, blocks_w)
    segments = k.warps // (groups_h * wide)
    kept = min(KD, 8) + 1  # planes of the gradient
    for blocks_h in range(1, p.out[1] + 1):
        rows = ceil(p.out[1], 2 * blocks_h * segments) * 2
        grad_lines, x_lines = segments * rows, segments * rows + (groups_h - 1) * taps_h + 6
        shared = 32 + 2 * kept * ((grad_lines * wide * 2) | 1) * 8
        shared += 8 * x_lines * (wide * 16 + QW * 8)
        if shared == k.launched.shared:
            break
    slab = ceil(p.x[0], k.blocks // (p.targets * ceil(KD, 8) * blocks_h * blocks_w))
    # Two lines: products, pairs of two lines of x, two loads of pieces, and some for the loop.
    products = QW * (taps_h + 1)
    lines_of_two = ceil(rows, 2)
    each = lines_of_two * (products + 2 * (QW + 1) + 2 + 8) + 6 * (QW + 1) + 2 * STEP
    copies = 1.5 * x_lines * (wide * 2 + QW) + grad_lines * wide * 2  # by 32 of 16 bytes
    if p.x[2] % 8:
        copies *= 3
    wavefronts = lines_of_two * (2 * (QW + 1) + 4) + 6 * (QW + 1)
    wavefronts += (2 * x_lines * (wide * 2 + QW) + grad_lines * wide * 2) / 8 / k.warps
    work = Work(each + copies / k.warps, 0, wavefronts, lines_of_two * products)
    return work.times(slab * k.warps)


def partials(p: Pass, k: Kernel) -> Work:
    """Some threads share out the partial sums of a result."""
    parts = k.launched.scratch / 4 / (p.filters * p.case.taps)
    own = ceil(parts, k.launched.block[1])
    return Work(10 * own + 60, 0, own).times(k.warps)


FAMILIES: dict[str, Callable[[Pass, Kernel], Work]] = {
    "depthwise_planes": planes,
    "depthwise_planes_up": planes_up,
    "depthwise_lines": lines,
    "depthwise_channels_last": channels_last,
    "depthwise_toeplitz": toeplitz,
    "depthwise_weight_slabs": slabs,
    "depthwise_weight_lines": weight_lines,
    "depthwise_channels_last_weight": channels_last_weight,
    "depthwise_hankel": hankel,
    "sum_partials": partials,
    "sum_hankel": partials,
}
