# SPDX-License-Identifier: Apache-2.0
"""The geometry of a 3-D convolution: one canonical form, checked once.

User arguments (an int, a tuple, pairs, a word) become plain tuples in `triple`, `paddings` and
`mode_index`; together with the sizes of one call they become a `Geometry`, the only form that the
functions, ops and kernels below ever see. Everything here also works on `torch.SymInt`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import torch

Triple: TypeAlias = tuple[int, int, int]
Sextuple: TypeAlias = tuple[int, int, int, int, int, int]
IntOrTriple: TypeAlias = int | Sequence[int]
PaddingLike: TypeAlias = str | int | Sequence[int] | Sequence[Sequence[int]]

PADDING_MODES = ("zeros", "replicate", "reflect", "circular")
AXES = ("depth", "height", "width")

_LIMIT = 2**31  # kernels count the cells of one axis in 32 bits

_MODE_INDEX = {name: index for index, name in enumerate(PADDING_MODES)}


class Geometry(NamedTuple):
    """A convolution without its tensors; hashable, all ints.

    `padding` is (d_before, d_after, h_before, h_after, w_before, w_after), all >= 0; `mode` is an
    index into `PADDING_MODES`.
    """

    kernel: Triple
    stride: Triple
    padding: Sextuple
    dilation: Triple
    mode: int

    def out_size(self, size: Triple) -> Triple:
        """The spatial size of the output for an input of spatial size `size`."""
        (kd, kh, kw), (sd, sh, sw), (ad, bd, ah, bh, aw, bw), (ld, lh, lw), _ = self
        d, h, w = size
        return (
            (d + ad + bd - ld * (kd - 1) - 1) // sd + 1,
            (h + ah + bh - lh * (kh - 1) - 1) // sh + 1,
            (w + aw + bw - lw * (kw - 1) - 1) // sw + 1,
        )


def integer(value: Any, name: str) -> int:
    """Any integer that is not a bool, as an int (or SymInt); TypeError otherwise."""
    if type(value) is int:
        return value
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    boolean = isinstance(value, torch.Tensor) and value.dtype == torch.bool
    if not boolean and not isinstance(value, (bool, float)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be made of integers, got {value!r} of type {_type(value)}")


def _type(value: Any) -> str:
    return type(value).__name__


def is_sequence(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether it is a sequence of anything but letters or bytes."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def triple(value: IntOrTriple, name: str) -> Triple:
    """Turn an int or a sequence of one or three into a 3-tuple of ints.

    Raises:
        TypeError: something is not an integer (a bool is not).
        ValueError: the sequence has not one or three elements.
    """
    if type(value) is int:
        return (value, value, value)
    if type(value) is tuple and len(value) == 3:
        d, h, w = value
        if type(d) is int and type(h) is int and type(w) is int:
            return (d, h, w)
    if not is_sequence(value):
        one = integer(value, name)
        return (one, one, one)
    if len(value) == 1:
        value = (value[0],) * 3
    if len(value) != 3:
        raise ValueError(f"{name} must be an int or have 1 or 3 elements, got {value!r}")
    return (integer(value[0], name), integer(value[1], name), integer(value[2], name))


def paddings(value: PaddingLike) -> Sextuple | str:
    """Turn a user's padding into (d, d, h, h, w, w) or leave it as "valid" or "same".

    Raises:
        TypeError: something is neither an integer nor a word.
        ValueError: an unknown word, or neither three numbers nor three (before, after) pairs.
    """
    if type(value) is int:
        return (value,) * 6
    if isinstance(value, str):
        if value not in ("valid", "same"):
            raise ValueError(f'padding must be "valid", "same" or numbers, got {value!r}')
        return value
    if isinstance(value, Sequence) and len(value) == 3 and isinstance(value[0], Sequence):
        pairs = [_pair(pair, value) for pair in value]
        return (*pairs[0], *pairs[1], *pairs[2])
    if is_sequence(value) and len(value) not in (1, 3):
        raise ValueError(
            f"padding must be an int, 1 or 3 ints or 3 (before, after) pairs, got {value!r}"
        )
    d, h, w = triple(value, "padding")  # type: ignore[arg-type]
    return (d, d, h, h, w, w)


def _pair(pair: Any, padding: Any) -> tuple[int, int]:
    if not is_sequence(pair) or len(pair) != 2:
        raise ValueError(f"padding must be 3 (before, after) pairs, got {padding!r}")
    return integer(pair[0], "padding"), integer(pair[1], "padding")


def mode_index(padding_mode: str) -> int:
    """The index of a padding mode in `PADDING_MODES`; ValueError for an unknown one."""
    index = _MODE_INDEX.get(padding_mode) if isinstance(padding_mode, str) else None
    if index is None:
        raise ValueError(f"padding_mode must be one of {PADDING_MODES}, got {padding_mode!r}")
    return index


def _same_padding(size: Triple, kernel: Triple, stride: Triple, dilation: Triple) -> Sextuple:
    """TensorFlow's rule: ceil(size / stride) outputs, the odd cell after."""
    pads: list[int] = []
    for n, k, s, dil in zip(size, kernel, stride, dilation, strict=True):
        total = torch.sym_max((-(-n // s) - 1) * s + dil * (k - 1) + 1 - n, 0)
        pads += (total // 2, total - total // 2)
    return tuple(pads)  # type: ignore[return-value]


def _check_numbers(kernel: Triple, stride: Triple, dilation: Triple) -> None:
    for name, values in (("kernel size", kernel), ("stride", stride), ("dilation", dilation)):
        if not (values[0] > 0 and values[1] > 0 and values[2] > 0):
            raise ValueError(f"{name} must be positive, got {values}")


def _check_padding(padding: Sextuple) -> None:
    for pad in padding:
        if pad < 0:
            raise ValueError(f"padding must not be negative, got {pairs(padding)}")


def _check_limits(size: Triple, geometry: Geometry, out: Triple) -> None:
    """Refuse numbers that the kernels cannot count; sizes that are symbols are let through."""
    kernel, stride, padding, dilation, _ = geometry
    padded = tuple(
        n + before + after for n, (before, after) in zip(size, pairs(padding), strict=True)
    )
    for name, values in (
        ("stride", stride),
        ("dilation", dilation),
        ("the padded size of the input", padded),
        ("the span of the kernel", span(kernel, dilation)),
        ("the size of the output", out),
    ):
        if any(isinstance(value, int) and value >= _LIMIT for value in values):
            raise ValueError(f"{name} must be below 2**31 along every axis, got {tuple(values)}")


def pairs(padding: Sextuple) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """The padding as three (before, after) pairs."""
    ad, bd, ah, bh, aw, bw = padding
    return (ad, bd), (ah, bh), (aw, bw)


def resolve(
    size: Triple,
    kernel: Triple,
    stride: Triple,
    padding: Sextuple | str,
    dilation: Triple,
    mode: int,
) -> Geometry:
    """Check the parsed arguments of one call against its sizes.

    Raises:
        ValueError: a value out of range, or an output that would be empty.
    """
    _check_numbers(kernel, stride, dilation)
    if padding == "valid":
        padding = (0, 0, 0, 0, 0, 0)
    elif padding == "same":
        padding = _same_padding(size, kernel, stride, dilation)
    assert not isinstance(padding, str)
    _check_padding(padding)
    if mode:
        name = PADDING_MODES[mode]
        for axis, n, pad in zip(AXES, size, pairs(padding), strict=True):
            for cells in pad:
                if (name == "reflect" and cells >= n) or (name == "circular" and cells > n):
                    bound = "smaller than" if name == "reflect" else "at most"
                    raise ValueError(
                        f"{name} padding must be {bound} the axis it pads, got padding {pad} "
                        f"on {axis} of size {n} (input size {tuple(size)})"
                    )
    geometry = Geometry(kernel, stride, padding, dilation, mode)
    for n in size:
        if n < 1:
            raise ValueError(f"input has an empty axis: spatial size {tuple(size)}")
    for out in geometry.out_size(size):
        if out < 1:
            raise ValueError(
                f"the output would be empty: input size {tuple(size)}, padding {pairs(padding)}, "
                f"kernel {kernel} with dilation {dilation} spans {span(kernel, dilation)}"
            )
    _check_limits(size, geometry, geometry.out_size(size))
    return geometry


def span(kernel: Triple, dilation: Triple) -> Triple:
    """The number of input cells from the first to the last tap of each axis."""
    (kd, kh, kw), (ld, lh, lw) = kernel, dilation
    return (ld * (kd - 1) + 1, lh * (kh - 1) + 1, lw * (kw - 1) + 1)


def check_output_padding(output_padding: Triple, stride: Triple, dilation: Triple) -> None:
    """ValueError unless it is, on each axis, from 0 to below the stride or the dilation."""
    for extra, s, dil in zip(output_padding, stride, dilation, strict=True):
        if extra < 0 or (extra >= s and extra >= dil):
            raise ValueError(
                "output_padding must not be negative and be smaller than stride or dilation, got "
                f"output_padding {output_padding}, stride {stride}, dilation {dilation}"
            )


def resolve_transposed(
    size: Triple,
    kernel: Triple,
    stride: Triple,
    padding: Sextuple | str,
    output_padding: Triple,
    dilation: Triple,
) -> tuple[Geometry, Triple]:
    """Check a transposed convolution; return the geometry it transposes and its output size.

    The geometry takes the output size back to the input size, except that `output_padding`
    beyond the stride (which torch allows up to the dilation) needs `output_padding // stride`
    more input cells.

    Raises:
        ValueError: a value out of range, a word as padding, or an output that would be empty.
    """
    _check_numbers(kernel, stride, dilation)
    if isinstance(padding, str):
        raise ValueError(f"padding {padding!r} has no meaning for a transposed convolution")
    _check_padding(padding)
    check_output_padding(output_padding, stride, dilation)
    out: list[int] = []
    for n, width, s, (before, after), extra in zip(
        size, span(kernel, dilation), stride, pairs(padding), output_padding, strict=True
    ):
        if n < 1:
            raise ValueError(f"input has an empty axis: spatial size {tuple(size)}")
        out.append((n - 1) * s - before - after + width + extra)
    for n in out:
        if n < 1:
            raise ValueError(
                f"the output would be empty: input size {tuple(size)}, kernel {kernel}, stride "
                f"{stride}, padding {pairs(padding)}, dilation {dilation}, output_padding "
                f"{output_padding} give {tuple(out)}"
            )
    geometry = Geometry(kernel, stride, padding, dilation, 0)
    _check_limits((out[0], out[1], out[2]), geometry, size)
    return geometry, (out[0], out[1], out[2])


def canonicalise(
    size: Triple,
    kernel: Triple,
    stride: IntOrTriple = 1,
    padding: PaddingLike = 0,
    dilation: IntOrTriple = 1,
    padding_mode: str = "zeros",
) -> Geometry:
    """Turn the arguments of a convolution over a volume of `size` into a checked `Geometry`."""
    return resolve(
        size,
        kernel,
        triple(stride, "stride"),
        paddings(padding),
        triple(dilation, "dilation"),
        mode_index(padding_mode),
    )
