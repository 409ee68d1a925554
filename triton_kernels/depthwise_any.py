# SPDX-License-Identifier: Apache-2.0
"""The passes for any geometry, where depthwise_planes cannot run or does not pay.

Along each axis, target t reads with tap k the source (t * scale + shift + k * step) / divisor, if
that is a whole number. Forward: scale is the stride, shift -before, step the dilation, divisor 1.
grad_input: 1, before, -dilation, and the stride. Which taps divide evenly depends on
t modulo the divisor, the phase: every = divisor / gcd(divisor, dilation)-th tap, from the first
that solves k * dilation = t + before modulo the divisor, or none.

Every product costs a load of the source, from the first cache, and a share of a load of a weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import activate, first_tap, source_index


@triton.jit
def correlate_any(
    p_x,
    p_weight,
    p_bias,
    p_y,
    x_strides,
    y_strides,
    x_sizes,
    y_sizes,
    d_axis,
    h_axis,
    w_axis,
    channels,
    share,
    SUMMED: tl.constexpr,
    MODE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PHASES: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Channel c of y reads SUMMED channels of x, from c * SUMMED / share on, with a filter each:
    weight [SUMMED, blocks, taps, CHANNELS].

    A program owns POSITIONS columns of the lines of one phase of a plane, for CHANNELS channels of
    a sample. PHASES: columns differ in the taps they read with.
    """
    SUM: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32

    lines = tl.cdiv(y_sizes[1], h_axis[3])
    tiles = tl.cdiv(tl.cast(lines, OFFSET) * y_sizes[2], POSITIONS).to(tl.int32)
    i_program = tl.program_id(0)
    o_p = (i_program % tiles).to(OFFSET) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    i_program = i_program // tiles
    r_h = i_program % h_axis[3]
    i_program = i_program // h_axis[3]
    t_d = i_program % y_sizes[0]
    i_program = i_program // y_sizes[0]
    blocks = tl.cdiv(channels, CHANNELS)
    i_block = i_program % blocks
    i_n = (i_program // blocks).to(tl.int64)

    o_line = o_p // y_sizes[2]
    o_w = o_p - o_line * y_sizes[2]
    o_h = r_h + o_line * h_axis[3]
    o_block = tl.arange(0, CHANNELS)[None, :]
    o_c = i_block * CHANNELS + o_block
    m = (o_h < y_sizes[1]) & (o_c < channels)

    taps_d, taps_h, taps_w = d_axis[7], h_axis[7], w_axis[7]
    k_d, from_d, live_d = first_tap(t_d, d_axis)
    k_h, _, live_h = first_tap(r_h, h_axis)
    from_h = (o_h * h_axis[0] + h_axis[1] + k_h * h_axis[2]) // h_axis[3]
    if PHASES:
        k_w, from_w, live_w = first_tap(o_w, w_axis)
        m_w = m & live_w
    else:
        k_w, m_w = 0, m
        from_w = o_w * w_axis[0] + w_axis[1]
    step_d = d_axis[6] * d_axis[2] // d_axis[3]
    step_h = h_axis[6] * h_axis[2] // h_axis[3]
    step_w = w_axis[6] * w_axis[2] // w_axis[3]
    count_d = tl.where(live_d, tl.cdiv(taps_d - k_d, d_axis[6]), 0)
    count_h = tl.where(live_h, tl.cdiv(taps_h - k_h, h_axis[6]), 0)
    count_w = tl.cdiv(taps_w, w_axis[6])

    taps = tl.cast(taps_d, tl.int64) * taps_h * taps_w * CHANNELS
    p_x = p_x + i_n * x_strides[0]
    p_weight = p_weight + i_block * taps + o_block
    sums = tl.zeros((POSITIONS, CHANNELS), SUM)
    for i in range(SUMMED):
        i_c = ((o_c * SUMMED + i) // share).to(tl.int64)
        p_filter = p_weight + i * blocks * taps
        for j_d in range(count_d):
            i_d = source_index(from_d + j_d * step_d, x_sizes[0], MODE)
            if (i_d >= 0) & (i_d < x_sizes[0]):
                p_plane = p_x + i_c * x_strides[1] + tl.cast(i_d, tl.int64) * x_strides[2]
                for j_h in range(count_h):
                    i_h = source_index(from_h + j_h * step_h, x_sizes[1], MODE)
                    m_h = m_w & (i_h >= 0) & (i_h < x_sizes[1])
                    p_line = p_plane + i_h * x_strides[3]
                    i_row = (k_d + j_d * d_axis[6]) * taps_h + k_h + j_h * h_axis[6]
                    p_taps = p_filter + tl.cast(i_row, tl.int64) * taps_w * CHANNELS
                    line = tl.zeros((POSITIONS, CHANNELS), SUM)
                    for j_w in range(count_w):
                        o_k = k_w + j_w * w_axis[6]
                        i_w = source_index(from_w + j_w * step_w, x_sizes[2], MODE)
                        m_x = m_h & (i_w >= 0) & (i_w < x_sizes[2])
                        if PHASES:
                            m_x = m_x & (o_k < taps_w)
                            b_w = tl.load(p_taps + o_k * CHANNELS, mask=m_x, other=0.0)
                        else:
                            b_w = tl.load(p_taps + o_k * CHANNELS)
                        b_x = tl.load(p_line + i_w * x_strides[4], mask=m_x, other=0.0)
                        line = tl.fma(b_x.to(SUM), b_w.to(SUM), line)
                    sums += line

    if p_bias is not None:
        sums += tl.load(p_bias + o_c, mask=o_c < channels, other=0.0).to(SUM)
    p_y = p_y + i_n * y_strides[0] + o_c.to(tl.int64) * y_strides[1]
    p_y = p_y + tl.cast(t_d, tl.int64) * y_strides[2] + o_h * y_strides[3] + o_w * y_strides[4]
    b_y = activate(sums, ACTIVATION).to(p_y.dtype.element_ty)
    tl.store(p_y, b_y, mask=m)


@triton.jit
def grad_weight_any(
    p_grad,
    p_x,
    p_parts,
    grad_strides,
    x_strides,
    part_strides,
    grad_sizes,
    x_sizes,
    kernel,
    stride,
    dilation,
    before,
    filters,
    multiplier,
    planes,
    chunks,
    MODE: tl.constexpr,
    TAPS: tl.constexpr,
    POSITIONS: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """parts [n * chunks, taps, filters]: what `planes` planes of a sample add to the gradient.

    A program owns TAPS taps of a filter, and a sum for each of them in each of its lanes, which are
    along the positions; a cell of grad is loaded once for all. Where a tap has no plane, no cell of
    grad is below its limit.
    """
    SUM: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32
    taps = kernel[0] * kernel[1] * kernel[2]
    blocks = tl.cdiv(taps, TAPS)
    i_program = tl.program_id(0)
    first_k = i_program % blocks * TAPS
    i_program = i_program // blocks
    i_f = i_program % filters
    i_part = (i_program // filters).to(tl.int64)
    i_n = i_part // chunks
    first = (i_part % chunks).to(tl.int32) * planes
    last = tl.minimum(first + planes, grad_sizes[0])

    p_grad = p_grad + i_n * grad_strides[0] + i_f.to(tl.int64) * grad_strides[1]
    p_x = p_x + i_n * x_strides[0] + (i_f // multiplier).to(tl.int64) * x_strides[1]
    cells = tl.cast(grad_sizes[1], OFFSET) * grad_sizes[2]

    from_d, from_h, from_w = (), (), ()
    for i in tl.static_range(TAPS):
        k = first_k + i
        from_d += (k // (kernel[1] * kernel[2]) * dilation[0] - before[0],)
        from_h += (k // kernel[2] % kernel[1] * dilation[1] - before[1],)
        from_w += (k % kernel[2] * dilation[2] - before[2],)
    sums = (tl.zeros((POSITIONS,), SUM),) * TAPS
    for d in range(first, last):
        p_from = p_grad + tl.cast(d, tl.int64) * grad_strides[2]
        p_planes, limits = (), ()
        for i in tl.static_range(TAPS):
            i_d = source_index(from_d[i] + d * stride[0], x_sizes[0], MODE)
            live = (first_k + i < taps) & (i_d >= 0) & (i_d < x_sizes[0])
            limits += (tl.where(live, cells, 0),)
            p_planes += (p_x + tl.cast(i_d, tl.int64) * x_strides[2],)
        for o in range(0, cells, POSITIONS):
            o_p = o + tl.arange(0, POSITIONS)
            o_h = o_p // grad_sizes[2]
            o_w = o_p - o_h * grad_sizes[2]
            p = p_from + o_h * grad_strides[3] + o_w * grad_strides[4]
            b_grad = tl.load(p, mask=o_p < cells, other=0.0).to(SUM)
            new = ()
            for i in tl.static_range(TAPS):
                i_h = source_index(from_h[i] + o_h * stride[1], x_sizes[1], MODE)
                i_w = source_index(from_w[i] + o_w * stride[2], x_sizes[2], MODE)
                m = (i_h >= 0) & (i_h < x_sizes[1]) & (i_w >= 0) & (i_w < x_sizes[2])
                p = p_planes[i] + i_h * x_strides[3] + i_w * x_strides[4]
                b_x = tl.load(p, mask=m & (o_p < limits[i]), other=0.0).to(SUM)
                new += (tl.fma(b_x, b_grad, sums[i]),)
            sums = new
    p_parts = p_parts + i_part * part_strides[0] + i_f * part_strides[2]
    for i in tl.static_range(TAPS):
        k = first_k + i
        if k < taps:
            tl.store(p_parts + k * part_strides[1], tl.sum(sums[i], 0))
