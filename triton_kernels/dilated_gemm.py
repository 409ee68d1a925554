# SPDX-License-Identifier: Apache-2.0
"""Convolutions as matrix products whose left matrix is never made: its tiles are gathered.

`correlate` is forward and grad_input: rows are positions of targets, columns their channels, terms
the taps times the channels that are read, taps outside. Along each axis, target t reads with tap k
the source (t * scale + shift + k * step) / divisor where that is a whole number (see AxisTaps);
targets that agree modulo the divisor are a class, and read with the same taps. A program has rows
of one class, so a stride costs no products with zeros.

`correlate_weight` is grad_weight: rows are filters, columns channels of a tap, terms positions. A
program has tiles for several taps, which share what it loads of the gradient.

Channels and positions beyond the tensors are masked, there are no padded copies. Where a sum is cut
into parts, each is stored on its own, and `add_parts` adds them in order.

Offsets are OFFSET, 32 bits where they suffice. UNIT is the axis of a tensor along which neighbours
lie side by side, and all other steps, and what decides whether a vector along it is inside, are
multiples of ALIGN: that many elements are loaded at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import activate, first_tap, source_index


@triton.jit
def multiple(x, OF: tl.constexpr):
    """x, which is a multiple of OF; the compiler knows it of the result."""
    if OF > 1:
        x = x // OF * OF
    return x


@triton.jit
def aligned(strides, UNIT: tl.constexpr, ALIGN: tl.constexpr):
    """The strides, of which all but the one along UNIT are multiples of ALIGN."""
    result = ()
    for axis in tl.static_range(5):
        if axis == UNIT:
            result += (tl.cast(1, tl.int32),)
        else:
            result += (multiple(strides[axis], ALIGN),)
    return result


@triton.jit
def class_of(r, axis):
    """How the targets r, r + divisor, ... read: the first source of target r, sources from target
    to target and from tap to tap; the first tap, and how many."""
    k, first, live = first_tap(r, axis)
    count = tl.where(live, tl.cdiv(axis[7] - k, axis[6]), 0)
    return first, axis[0], axis[6] * axis[2] // axis[3], k, count


@triton.jit
def product(a, b, sums, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    """WIDEN: in Triton's interpreter, whose bfloat16 is wrong."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION, out_dtype=sums.dtype)


@triton.jit(do_not_specialize=["batch", "groups", "splits"])
def correlate(
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
    batch,
    groups,
    channels,
    filters,
    splits,
    part,
    MODE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
    X_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """y [n, groups * filters, ...] from x [n, groups * channels, ...] and weight [groups, taps,
    channels, filters], zeros up to whole blocks. Parts of the sums are `part` elements apart."""
    SUM: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32

    x_steps = aligned(x_strides, X_UNIT, ALIGN)
    y_steps = aligned(y_strides, Y_UNIT, ALIGN)
    x_width, y_width = x_sizes[2], y_sizes[2]
    if X_UNIT == 4:
        x_width, y_width = multiple(x_width, ALIGN), multiple(y_width, ALIGN)
    if X_UNIT == 1:
        channels = multiple(channels, ALIGN)
    if Y_UNIT == 1:
        filters = multiple(filters, ALIGN)

    i_program = tl.program_id(0)
    blocks = tl.cdiv(filters, COLUMNS)
    i_block = i_program % blocks
    i_program = i_program // blocks
    i_group = i_program % groups
    i_program = i_program // groups
    r_w = i_program % w_axis[3]
    i_program = i_program // w_axis[3]
    r_h = i_program % h_axis[3]
    i_program = i_program // h_axis[3]
    r_d = i_program % d_axis[3]
    i_program = i_program // d_axis[3]
    i_split = i_program % splits
    i_tile = i_program // splits

    o_row = i_tile.to(OFFSET) * ROWS + tl.arange(0, ROWS)[:, None]
    width = tl.cdiv(y_width, w_axis[3])
    height = tl.cdiv(y_sizes[1], h_axis[3])
    depth = tl.cdiv(y_sizes[0], d_axis[3])
    i_line = o_row // width
    i_plane = i_line // height
    i_n = i_plane // depth
    q_w = (o_row - i_line * width).to(tl.int32)
    q_h = (i_line - i_plane * height).to(tl.int32)
    q_d = (i_plane - i_n * depth).to(tl.int32)
    t_d, t_h, t_w = r_d + q_d * d_axis[3], r_h + q_h * h_axis[3], r_w + q_w * w_axis[3]
    m_row = (i_n < batch) & (t_d < y_sizes[0]) & (t_h < y_sizes[1]) & (t_w < y_width)

    first_d, scale_d, jump_d, k_d, count_d = class_of(r_d, d_axis)
    first_h, scale_h, jump_h, k_h, count_h = class_of(r_h, h_axis)
    first_w, scale_w, jump_w, k_w, count_w = class_of(r_w, w_axis)
    if X_UNIT == 4:
        first_w, jump_w = multiple(first_w, ALIGN), multiple(jump_w, ALIGN)
    from_d = first_d + q_d * scale_d
    from_h = first_h + q_h * scale_h
    from_w = first_w + q_w * scale_w
    o_n = i_n.to(OFFSET) * x_steps[0]
    o_from = o_n + from_d.to(OFFSET) * x_steps[2]
    o_from += from_h.to(OFFSET) * x_steps[3] + from_w.to(OFFSET) * x_steps[4]

    o_term = tl.arange(0, TERMS)[None, :]
    o_column = i_block * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    term_blocks = tl.cdiv(channels, TERMS)
    taps_h, taps_w = h_axis[7], w_axis[7]
    matrix = term_blocks * TERMS * blocks * COLUMNS
    all_taps = tl.cast(d_axis[7], tl.int64) * taps_h * taps_w
    p_x = p_x + i_group.to(tl.int64) * channels * x_steps[1]
    p_weight = p_weight + i_group * all_taps * matrix
    o_weight = tl.arange(0, TERMS)[:, None] * (blocks * COLUMNS) + o_column

    steps = count_d * count_h * count_w * term_blocks
    start = tl.cast(steps, tl.int64) * i_split // splits
    stop = tl.cast(steps, tl.int64) * (i_split + 1) // splits
    i_step = start.to(tl.int32)
    i_term = i_step % tl.maximum(term_blocks, 1)
    j_w = i_step // tl.maximum(term_blocks, 1)
    j_h = j_w // tl.maximum(count_w, 1)
    j_d = j_h // tl.maximum(count_h, 1)
    j_w = j_w - j_h * count_w
    j_h = j_h - j_d * count_h

    sums = tl.zeros((ROWS, COLUMNS), SUM)
    for _ in range((stop - start).to(tl.int32)):
        i_d = from_d + j_d * jump_d
        i_h = from_h + j_h * jump_h
        i_w = from_w + j_w * jump_w
        if MODE:
            i_d = source_index(i_d, x_sizes[0], MODE)
            i_h = source_index(i_h, x_sizes[1], MODE)
            i_w = source_index(i_w, x_width, MODE)
            o_x = o_n + i_d.to(OFFSET) * x_steps[2]
            o_x += i_h.to(OFFSET) * x_steps[3] + i_w.to(OFFSET) * x_steps[4]
        else:
            o_tap = tl.cast(j_d * jump_d, OFFSET) * x_steps[2]
            o_tap += tl.cast(j_h * jump_h, OFFSET) * x_steps[3]
            o_x = o_from + (o_tap + tl.cast(j_w * jump_w, OFFSET) * x_steps[4])
        m = m_row & (i_d >= 0) & (i_d < x_sizes[0]) & (i_h >= 0) & (i_h < x_sizes[1])
        m = m & (i_w >= 0) & (i_w < x_width)
        o_channel = i_term * TERMS + o_term
        p = p_x + (o_x + o_channel.to(OFFSET) * x_steps[1])
        b_x = tl.load(p, mask=m & (o_channel < channels), other=0.0)

        tap = (k_d + j_d * d_axis[6]) * taps_h + k_h + j_h * h_axis[6]
        tap = tap * taps_w + k_w + j_w * w_axis[6]
        p = p_weight + tl.cast(tap, tl.int64) * matrix + i_term * (TERMS * blocks * COLUMNS)
        b_weight = tl.load(p + o_weight)
        sums = product(b_x, b_weight, sums, WIDEN, PRECISION)

        # The next step, without a division.
        i_term += 1
        next_w = i_term == term_blocks
        i_term = tl.where(next_w, 0, i_term)
        j_w += next_w.to(tl.int32)
        next_h = j_w == count_w
        j_w = tl.where(next_h, 0, j_w)
        j_h += next_h.to(tl.int32)
        next_d = j_h == count_h
        j_h = tl.where(next_d, 0, j_h)
        j_d += next_d.to(tl.int32)

    m_column = o_column < filters
    o_column = i_group * filters + o_column
    if p_bias is not None:
        sums += tl.load(p_bias + o_column, mask=m_column, other=0.0).to(SUM)
    o_y = i_n.to(OFFSET) * y_steps[0] + t_d.to(OFFSET) * y_steps[2]
    o_y += t_h.to(OFFSET) * y_steps[3] + t_w.to(OFFSET) * y_steps[4]
    p = p_y + i_split.to(tl.int64) * part + (o_y + o_column.to(OFFSET) * y_steps[1])
    b_y = activate(sums, ACTIVATION).to(p_y.dtype.element_ty)
    tl.store(p, b_y, mask=m_row & m_column)


@triton.jit(do_not_specialize=["batch", "groups", "splits"])
def correlate_weight(
    p_grad,
    p_x,
    p_y,
    grad_strides,
    x_strides,
    grad_sizes,
    x_sizes,
    kernel,
    stride,
    dilation,
    before,
    batch,
    groups,
    filters,
    channels,
    splits,
    part,
    MODE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TERMS: tl.constexpr,
    TAPS: tl.constexpr,
    GRAD_UNIT: tl.constexpr,
    X_UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """y [groups * filters, channels, taps] from grad [n, groups * filters, ...] and
    x [n, groups * channels, ...]. Parts of the sums are `part` elements apart."""
    SUM: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32

    grad_steps = aligned(grad_strides, GRAD_UNIT, ALIGN)
    x_steps = aligned(x_strides, X_UNIT, ALIGN)
    x_width, width = x_sizes[2], grad_sizes[2]
    if X_UNIT == 4:
        x_width, width = multiple(x_width, ALIGN), multiple(width, ALIGN)
    if X_UNIT == 1:
        channels = multiple(channels, ALIGN)
    if GRAD_UNIT == 1:
        filters = multiple(filters, ALIGN)

    taps = kernel[0] * kernel[1] * kernel[2]
    i_program = tl.program_id(0)
    first_k = i_program % tl.cdiv(taps, TAPS) * TAPS
    i_program = i_program // tl.cdiv(taps, TAPS)
    i_column = i_program % tl.cdiv(channels, COLUMNS)
    i_program = i_program // tl.cdiv(channels, COLUMNS)
    i_row = i_program % tl.cdiv(filters, ROWS)
    i_program = i_program // tl.cdiv(filters, ROWS)
    i_group = i_program % groups
    i_split = i_program // groups

    from_d, from_h, from_w = (), (), ()
    for i in tl.static_range(TAPS):
        k = first_k + i
        from_d += (k // (kernel[1] * kernel[2]) * dilation[0] - before[0],)
        from_h += (k // kernel[2] % kernel[1] * dilation[1] - before[1],)
        shift = k % kernel[2] * dilation[2] - before[2]
        from_w += (multiple(shift, ALIGN) if X_UNIT == 4 else shift,)

    o_row = i_row * ROWS + tl.arange(0, ROWS)[:, None]
    o_column = i_column * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    m_row, m_column = o_row < filters, o_column < channels
    o_filter = (i_group * filters + o_row).to(OFFSET) * grad_steps[1]
    o_channel = (i_group * channels + o_column).to(OFFSET) * x_steps[1]

    cells = tl.cast(batch, OFFSET) * grad_sizes[0] * grad_sizes[1] * width
    steps = tl.cdiv(cells, TERMS)
    start = tl.cast(steps, tl.int64) * i_split // splits
    stop = tl.cast(steps, tl.int64) * (i_split + 1) // splits
    o_first = start.to(OFFSET) * TERMS
    limits = ()
    for i in tl.static_range(TAPS):
        limits += (tl.where(first_k + i < taps, cells, 0),)

    sums = (tl.zeros((ROWS, COLUMNS), SUM),) * TAPS
    for i_step in range((stop - start).to(tl.int32)):
        o_cell = o_first + tl.cast(i_step, OFFSET) * TERMS + tl.arange(0, TERMS)
        i_line = o_cell // width
        i_plane = i_line // grad_sizes[1]
        i_n = i_plane // grad_sizes[0]
        t_w = (o_cell - i_line * width).to(tl.int32)
        t_h = (i_line - i_plane * grad_sizes[1]).to(tl.int32)
        t_d = (i_plane - i_n * grad_sizes[0]).to(tl.int32)
        o_grad = i_n * grad_steps[0] + t_d.to(OFFSET) * grad_steps[2]
        o_grad += t_h.to(OFFSET) * grad_steps[3] + t_w.to(OFFSET) * grad_steps[4]
        p = p_grad + (o_grad[None, :] + o_filter)
        b_grad = tl.load(p, mask=(o_cell < cells)[None, :] & m_row, other=0.0)
        from_n = i_n * x_steps[0]
        new = ()
        for i in tl.static_range(TAPS):
            i_d = source_index(t_d * stride[0] + from_d[i], x_sizes[0], MODE)
            i_h = source_index(t_h * stride[1] + from_h[i], x_sizes[1], MODE)
            i_w = source_index(t_w * stride[2] + from_w[i], x_width, MODE)
            m = (o_cell < limits[i]) & (i_d >= 0) & (i_d < x_sizes[0])
            m = m & (i_h >= 0) & (i_h < x_sizes[1]) & (i_w >= 0) & (i_w < x_width)
            o_x = from_n + i_d.to(OFFSET) * x_steps[2]
            o_x += i_h.to(OFFSET) * x_steps[3] + i_w.to(OFFSET) * x_steps[4]
            p = p_x + (o_x[:, None] + o_channel)
            b_x = tl.load(p, mask=m[:, None] & m_column, other=0.0)
            new += (product(b_grad, b_x, sums[i], WIDEN, PRECISION),)
        sums = new

    o_y = (i_group * filters + o_row).to(tl.int64) * channels + o_column
    p = p_y + i_split.to(tl.int64) * part + o_y * taps + first_k
    for i in tl.static_range(TAPS):
        if first_k + i < taps:
            tl.store(p + i, sums[i].to(p_y.dtype.element_ty), mask=m_row & m_column)


@triton.jit(do_not_specialize=["splits"])
def add_parts(
    p_parts,
    p_bias,
    p_y,
    elements,
    inner,
    channels,
    splits,
    ACTIVATION: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """y, as it lies in memory, from its parts, in order; neighbours `inner` elements apart are of
    neighbouring channels."""
    o = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    m = o < elements
    sums = tl.load(p_parts + o, mask=m, other=0.0)
    for i in range(1, splits):
        sums += tl.load(p_parts + tl.cast(i, tl.int64) * elements + o, mask=m, other=0.0)
    if p_bias is not None:
        sums += tl.load(p_bias + o // inner % channels, mask=m, other=0.0).to(sums.dtype)
    tl.store(p_y + o, activate(sums, ACTIVATION).to(p_y.dtype.element_ty), mask=m)
