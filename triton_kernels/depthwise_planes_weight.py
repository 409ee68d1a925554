# SPDX-License-Identifier: Apache-2.0
"""grad_weight of kernels that are not large: the walk of depthwise_planes, for sums over volumes.

A program owns the taps of OWN_KH lines of each plane of the kernel (all of them, or one), for
CHANNELS filters, and all products of its columns with a slab of planes of x. It keeps a sum for
each of its taps and each of its lanes, and the last RING planes of grad; a plane of x is loaded
once for the targets that read it: K (LINES + K - 1) / LINES loads and K^3 multiply-adds for a cell
of grad where OWN_KH = K; K loads and K^2 multiply-adds where OWN_KH is 1, in each of K programs. A
warp adds up its lanes at the end, in a tree, and the launcher the programs.

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
    KD: tl.constexpr,
    KW: tl.constexpr,
    MARCH_D: tl.constexpr,
    MARCH_H: tl.constexpr,
    LINES: tl.constexpr,
    OWN_KH: tl.constexpr,
):
    """What plane I_MARCH of march v adds to the sums of taps kw. WHOLE: grad has all the planes."""
    for kh in tl.static_range(OWN_KH):
        for kd in tl.static_range(I_MARCH, KD, MARCH_D):
            b_sum = sums[(kd * OWN_KH + kh) * KW + kw]
            for i in tl.static_range(LINES):
                row = rows[kh + i * MARCH_H]
                if not WHOLE:
                    q = v - kd // MARCH_D
                    row = tl.where((q >= 0) & (q < planes), row, 0.0)
                b_sum = tl.fma(row, grads[kd // MARCH_D * LINES + i], b_sum)
            new = sums[: (kd * OWN_KH + kh) * KW + kw]
            new += (b_sum,)
            sums = new + sums[(kd * OWN_KH + kh) * KW + kw + 1 :]
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
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    MARCH_D: tl.constexpr,
    MARCH_H: tl.constexpr,
    MODE: tl.constexpr,
    OWN_KH: tl.constexpr,
    LINES: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """parts [programs of a block, taps, filters] from grad [n, filters, ...] and x."""
    RING: tl.constexpr = (KD + MARCH_D - 1) // MARCH_D
    ROWS: tl.constexpr = (LINES - 1) * MARCH_H + OWN_KH
    SUM: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32

    first_kh = tl.program_id(0) % (KH // OWN_KH) * OWN_KH
    i_program = tl.program_id(0) // (KH // OWN_KH)
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

    sums = (tl.zeros((POSITIONS, CHANNELS), SUM),) * (KD * OWN_KH * KW)
    grads = (tl.zeros((POSITIONS, CHANNELS), SUM),) * (RING * LINES)
    for v in range(first - (RING - 1), last):
        new = (tl.zeros((POSITIONS, CHANNELS), SUM),) * LINES
        if (v >= 0) & (v < planes):
            p_plane = p_grad + (r_d + v * lattices[0]).to(tl.int64) * grad_strides[2]
            new = load_lines(
                p_plane, o_h, o_w, 0, m, grad_sizes, grad_strides, lattices[1], LINES, 0, SUM
            )
        grads = new + grads[: (RING - 1) * LINES]
        for i_m in tl.static_range(MARCH_D):
            i_d = r_d * stride[0] + (v * MARCH_D + i_m) * dilation[0] - before[0]
            i_d = source_index(i_d, x_sizes[0], MODE)
            if (v >= first) & (i_d >= 0) & (i_d < x_sizes[0]):
                p_plane = p_x + i_d.to(tl.int64) * x_strides[2]
                if (v >= RING - 1) & (v < planes):
                    for kw in tl.static_range(KW):
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
                            KD,
                            KW,
                            MARCH_D,
                            MARCH_H,
                            LINES,
                            OWN_KH,
                        )
                else:
                    for kw in tl.static_range(KW):
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
                            KD,
                            KW,
                            MARCH_D,
                            MARCH_H,
                            LINES,
                            OWN_KH,
                        )

    p_parts = p_parts + i_part.to(tl.int64) * part_strides[0] + o_c * part_strides[2]
    for kd in tl.static_range(KD):
        for kh in tl.static_range(OWN_KH):
            for kw in tl.static_range(KW):
                tap = (kd * KH + first_kh + kh) * KW + kw
                b = tl.sum(sums[(kd * OWN_KH + kh) * KW + kw], 0, keep_dims=True)
                tl.store(p_parts + tap * part_strides[1], b, mask=o_c < filters)
