# SPDX-License-Identifier: Apache-2.0
"""grad_weight of kernels that are not large: the walk of depthwise_planes, for sums over volumes.

A program owns the taps of KH lines of each plane of the kernel (all of them, or one), for CHANNELS
filters, and all products of its columns with a slab of planes of x. It keeps a sum for each of its
taps and each of its lanes, and the last RING planes of grad; a plane of x is loaded once for the
targets that read it: K (LINES + K - 1) / LINES loads and K^3 multiply-adds for a cell of grad where
KH = K; K loads and K^2 multiply-adds where KH is 1, in each of K programs. A warp adds up its lanes
at the end, in a tree, and the launcher the programs.

LINES divides the lines, so that the lines of a group are all there. Where grad has no plane, x is
put to zero too: a zero times an infinity would not vanish.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import source_index
from .depthwise_planes import load_lines, place_program


@triton.jit
def add_products(
    sums,
    rows,
    grads,
    kw,
    v,
    planes,
    WHOLE: tl.constexpr,
    I_MARCH: tl.constexpr,
    KERNEL: tl.constexpr,
    MARCH: tl.constexpr,
    LINES: tl.constexpr,
    KH: tl.constexpr,
):
    """What plane I_MARCH of march v adds to the sums of taps kw. WHOLE: grad has all the planes."""
    for kh in tl.static_range(KH):
        for kd in tl.static_range(I_MARCH, KERNEL[0], MARCH[0]):
            b_sum = sums[(kd * KH + kh) * KERNEL[2] + kw]
            for i in tl.static_range(LINES):
                row = rows[kh + i * MARCH[1]]
                if not WHOLE:
                    q = v - kd // MARCH[0]
                    row = tl.where((q >= 0) & (q < planes), row, 0.0)
                b_sum = tl.fma(row, grads[kd // MARCH[0] * LINES + i], b_sum)
            new = sums[: (kd * KH + kh) * KERNEL[2] + kw]
            new += (b_sum,)
            sums = new + sums[(kd * KH + kh) * KERNEL[2] + kw + 1 :]
    return sums


@triton.jit(do_not_specialize=["slab", "slabs"])
def grad_weight_planes(
    p_grad,
    p_x,
    p_parts,
    grad_strides,
    x_strides,
    part_strides,
    grad_sizes,
    x_sizes,
    stride,
    dilation,
    before,
    lattices,
    filters,
    multiplier,
    slab,
    slabs,
    KERNEL: tl.constexpr,
    MARCH: tl.constexpr,
    MODE: tl.constexpr,
    KH: tl.constexpr,
    LINES: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """parts [programs of a block, taps, filters] from grad [n, filters, ...] and x."""
    RING: tl.constexpr = (KERNEL[0] + MARCH[0] - 1) // MARCH[0]
    ROWS: tl.constexpr = (LINES - 1) * MARCH[1] + KH
    SUM: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32

    first_kh = tl.program_id(0) % (KERNEL[1] // KH) * KH
    i_program = tl.program_id(0) // (KERNEL[1] // KH)
    r_d, o_h, o_w, m, i_block, i_rest, i_part = place_program(
        i_program, grad_sizes, lattices, filters, LINES, POSITIONS, CHANNELS, OFFSET
    )
    i_n = (i_rest // slabs).to(tl.int64)
    planes = tl.cdiv(grad_sizes[0] - r_d, lattices[0])
    first = i_rest % slabs * slab
    last = tl.minimum(first + slab, planes + RING - 1)
    o_c = i_block * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    m = m & (o_c < filters)
    from_h = o_h * stride[1] + first_kh * dilation[1] - before[1]
    from_w = o_w * stride[2] - before[2]
    p_grad = p_grad + i_n * grad_strides[0] + o_c.to(tl.int64) * grad_strides[1]
    p_x = p_x + i_n * x_strides[0] + (o_c // multiplier).to(tl.int64) * x_strides[1]

    sums = (tl.zeros((POSITIONS, CHANNELS), SUM),) * (KERNEL[0] * KH * KERNEL[2])
    grads = (tl.zeros((POSITIONS, CHANNELS), SUM),) * (RING * LINES)
    for v in range(first - (RING - 1), last):
        new = (tl.zeros((POSITIONS, CHANNELS), SUM),) * LINES
        if (v >= 0) & (v < planes):
            p_plane = p_grad + (r_d + v * lattices[0]).to(tl.int64) * grad_strides[2]
            new = load_lines(
                p_plane, o_h, o_w, 0, m, grad_sizes, grad_strides, lattices[1], LINES, 0, SUM
            )
        grads = new + grads[: (RING - 1) * LINES]
        for i_m in tl.static_range(MARCH[0]):
            i_d = r_d * stride[0] + (v * MARCH[0] + i_m) * dilation[0] - before[0]
            i_d = source_index(i_d, x_sizes[0], MODE)
            if (v >= first) & (i_d >= 0) & (i_d < x_sizes[0]):
                p_plane = p_x + i_d.to(tl.int64) * x_strides[2]
                if (v >= RING - 1) & (v < planes):
                    for kw in tl.static_range(KERNEL[2]):
                        rows = load_lines(
                            p_plane,
                            from_h,
                            from_w,
                            kw * dilation[2],
                            m,
                            x_sizes,
                            x_strides,
                            dilation[1],
                            ROWS,
                            MODE,
                            SUM,
                        )
                        sums = add_products(
                            sums,
                            rows,
                            grads,
                            kw,
                            v,
                            planes,
                            True,
                            i_m,
                            KERNEL,
                            MARCH,
                            LINES,
                            KH,
                        )
                else:
                    for kw in tl.static_range(KERNEL[2]):
                        rows = load_lines(
                            p_plane,
                            from_h,
                            from_w,
                            kw * dilation[2],
                            m,
                            x_sizes,
                            x_strides,
                            dilation[1],
                            ROWS,
                            MODE,
                            SUM,
                        )
                        sums = add_products(
                            sums,
                            rows,
                            grads,
                            kw,
                            v,
                            planes,
                            False,
                            i_m,
                            KERNEL,
                            MARCH,
                            LINES,
                            KH,
                        )

    p_parts = p_parts + i_part.to(tl.int64) * part_strides[0] + o_c * part_strides[2]
    for kd in tl.static_range(KERNEL[0]):
        for kh in tl.static_range(KH):
            for kw in tl.static_range(KERNEL[2]):
                tap = (kd * KERNEL[1] + first_kh + kh) * KERNEL[2] + kw
                b = tl.sum(sums[(kd * KH + kh) * KERNEL[2] + kw], 0, keep_dims=True)
                tl.store(p_parts + tap * part_strides[1], b, mask=o_c < filters)
