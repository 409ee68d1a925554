# SPDX-License-Identifier: Apache-2.0
"""The passes of kernels that are not large, for a source that is walked through plane by plane.

What is computed is target[t] = sum over taps k of weight[k] source[t * stride + k * dilation -
before] along each axis: the forward pass, and grad_input where the stride is 1, of the gradient
with the kernel turned round. With g = gcd(stride, dilation), targets that are `lattice` =
dilation / g apart read planes that are `dilation` apart; the planes of one lattice are numbered,
target q reads planes q * march + k, march = stride / g, and a program owns one lattice along D and
one along H.

A program owns POSITIONS columns (of several lines, whatever the width) times LINES neighbours on
the lattice along H, for CHANNELS channels of one sample, and walks along D through a slab. It keeps
the sums of the targets that still wait for planes, RING = kernel / march of them, and loads a plane
of the source once for all of them: with K taps along each axis, K (LINES + K - 1) / LINES loads and
K^3 multiply-adds for a target, and K^3 / (LINES * elements of a thread) loads of weights, which few
taps keep in registers. Loads meet the first cache; memory is read (1 + K / lines of the programs
that run at a time) times. NCDHW: lanes along W, one element a thread. channels_last: lanes along C,
four neighbours a thread.

Offsets from one plane of one channel are OFFSET, 32 bits where they suffice; all others are 64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import activate, source_index


@triton.jit
def place_program(
    i_program,
    y_sizes,
    lattices,
    channels,
    LINES: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """What a program owns: a lattice along D, first lines, columns and their mask, a block of
    channels; the rest of its number; and the number that it has among those of its block."""
    groups = tl.cdiv(tl.cdiv(y_sizes[1], lattices[1]), LINES)
    tiles = tl.cdiv(tl.cast(groups, OFFSET) * y_sizes[2], POSITIONS).to(tl.int32)
    places = tiles * lattices[1] * lattices[0]
    i_place = i_program % places
    i_program = i_program // places
    blocks = tl.cdiv(channels, CHANNELS)
    i_block = i_program % blocks
    i_rest = i_program // blocks

    o_p = (i_place % tiles).to(OFFSET) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    o_g = o_p // y_sizes[2]
    o_w = o_p - o_g * y_sizes[2]
    o_h = i_place // tiles % lattices[1] + o_g * (LINES * lattices[1])
    r_d = i_place // tiles // lattices[1]
    return r_d, o_h, o_w, o_h < y_sizes[1], i_block, i_rest, i_rest * places + i_place


@triton.jit
def load_lines(
    p_plane,
    o_h,
    o_w,
    shift,
    m,
    sizes,
    strides,
    step,
    COUNT: tl.constexpr,
    MODE: tl.constexpr,
    SUM: tl.constexpr,
):
    """Cells o_w + shift of COUNT lines of a plane, o_h and what lies `step` further each; a shift
    that is not None is added last, so that a constant becomes part of the instruction."""
    i_w = o_w if shift is None else o_w + shift
    if MODE:
        i_w = source_index(i_w, sizes[2], MODE)
    m = m & (i_w >= 0) & (i_w < sizes[2])
    lines = ()
    for i in tl.static_range(COUNT):
        i_h = o_h + i * step
        if MODE:
            i_h = source_index(i_h, sizes[1], MODE)
        if MODE or shift is None:
            p = p_plane + i_h * strides[3] + i_w * strides[4]
        else:
            p = p_plane + tl.cast(shift, o_w.dtype) * strides[4]
            p += i_h * strides[3] + o_w * strides[4]
        m_h = (i_h >= 0) & (i_h < sizes[1])
        lines += (tl.load(p, mask=m & m_h, other=0.0).to(SUM),)
    return lines


@triton.jit
def add_column(
    sums,
    rows,
    weights,
    p_taps,
    kw,
    I_MARCH: tl.constexpr,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    MARCH_D: tl.constexpr,
    MARCH_H: tl.constexpr,
    LINES: tl.constexpr,
    CHANNELS: tl.constexpr,
    SUM: tl.constexpr,
):
    """What the taps kw of plane I_MARCH of a march add to the sums of RING times LINES targets."""
    for kh in tl.static_range(KH):
        for kd in tl.static_range(I_MARCH, KD, MARCH_D):
            if len(weights):
                b_w = weights[(kd * KH + kh) * KW + kw]
            else:
                b_w = tl.load(p_taps + (kd * KH + kh) * KW * CHANNELS).to(SUM)
            new = sums[: kd // MARCH_D * LINES]
            for i in tl.static_range(LINES):
                row = rows[kh + i * MARCH_H]
                new += (tl.fma(row, b_w, sums[kd // MARCH_D * LINES + i]),)
            sums = new + sums[(kd // MARCH_D + 1) * LINES :]
    return sums


@triton.jit(do_not_specialize=["slab", "slabs"])
def correlate_planes(
    p_x,
    p_weight,
    p_bias,
    p_y,
    x_strides,
    y_strides,
    x_sizes,
    y_sizes,
    stride,
    dilation,
    before,
    lattices,
    channels,
    share,
    slab,
    slabs,
    SUMMED: tl.constexpr,
    KD: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    MARCH_D: tl.constexpr,
    MARCH_H: tl.constexpr,
    MODE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LINES: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    HOIST: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Channel c of y reads SUMMED channels of x, from c * SUMMED / share on, with a filter each:
    weight [SUMMED, blocks, taps, CHANNELS]. HOIST: weights stay in registers."""
    TAPS: tl.constexpr = KD * KH * KW
    RING: tl.constexpr = (KD + MARCH_D - 1) // MARCH_D
    ROWS: tl.constexpr = (LINES - 1) * MARCH_H + KH
    SUM: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32

    r_d, o_h, o_w, m, i_block, i_rest, _ = place_program(
        tl.program_id(0), y_sizes, lattices, channels, LINES, POSITIONS, CHANNELS, OFFSET
    )
    i_n = (i_rest // slabs).to(tl.int64)
    first = i_rest % slabs * slab
    last = tl.minimum(first + slab, tl.cdiv(y_sizes[0] - r_d, lattices[0]))
    o_block = tl.arange(0, CHANNELS)[None, :]
    o_c = i_block * CHANNELS + o_block
    m = m & (o_c < channels)
    from_h = o_h * stride[1] - before[1]
    from_w = o_w * stride[2] - before[2]
    p_x = p_x + i_n * x_strides[0]
    p_y = p_y + i_n * y_strides[0] + o_c.to(tl.int64) * y_strides[1]
    p_y = p_y + o_h * y_strides[3] + o_w * y_strides[4]
    p_weight = p_weight + i_block.to(tl.int64) * (TAPS * CHANNELS) + o_block
    filters = tl.cast(tl.cdiv(channels, CHANNELS), tl.int64) * (TAPS * CHANNELS)

    weights = ()
    if HOIST:
        for tap in tl.static_range(TAPS):
            weights += (tl.load(p_weight + tap * CHANNELS).to(SUM),)
    b_bias = tl.zeros((1, CHANNELS), SUM)
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_c, mask=o_c < channels, other=0.0).to(SUM)

    zeros = (tl.zeros((POSITIONS, CHANNELS), SUM),) * LINES
    sums = zeros * RING
    for v in range(first, last + RING - 1):
        for i_m in tl.static_range(MARCH_D):
            i_d = r_d * stride[0] + (v * MARCH_D + i_m) * dilation[0] - before[0]
            i_d = source_index(i_d, x_sizes[0], MODE)
            if (i_d >= 0) & (i_d < x_sizes[0]):
                for i in range(SUMMED):
                    i_c = ((o_c * SUMMED + i) // share).to(tl.int64)
                    p_plane = p_x + i_c * x_strides[1] + i_d.to(tl.int64) * x_strides[2]
                    p_taps = p_weight + i * filters
                    if HOIST:
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
                            sums = add_column(
                                sums,
                                rows,
                                weights,
                                p_taps,
                                kw,
                                i_m,
                                KD,
                                KH,
                                KW,
                                MARCH_D,
                                MARCH_H,
                                LINES,
                                CHANNELS,
                                SUM,
                            )
                    else:
                        for kw in range(KW):
                            rows = load_lines(
                                p_plane,
                                from_h,
                                from_w + kw * dilation[2],
                                None,
                                m,
                                x_sizes,
                                x_strides,
                                dilation[1],
                                ROWS,
                                MODE,
                                SUM,
                            )
                            sums = add_column(
                                sums,
                                rows,
                                weights,
                                p_taps + kw * CHANNELS,
                                kw,
                                i_m,
                                KD,
                                KH,
                                KW,
                                MARCH_D,
                                MARCH_H,
                                LINES,
                                CHANNELS,
                                SUM,
                            )
        if v >= first + RING - 1:
            t_d = (r_d + (v - (RING - 1)) * lattices[0]).to(tl.int64)
            for i in tl.static_range(LINES):
                b_y = activate(sums[(RING - 1) * LINES + i] + b_bias, ACTIVATION)
                p = p_y + t_d * y_strides[2] + (i * lattices[1]) * y_strides[3]
                m_y = m & (o_h + i * lattices[1] < y_sizes[1])
                tl.store(p, b_y.to(p_y.dtype.element_ty), mask=m_y)
        sums = zeros + sums[: (RING - 1) * LINES]
