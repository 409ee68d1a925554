# SPDX-License-Identifier: Apache-2.0
"""One problem of the table: its geometry in the user's terms, its sizes, its tensors.

``padding`` may be an int, a triple, three pairs, "valid" or "same"; sizes are worked out here on
purpose, not imported from the package: the table is the second opinion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import torch

Triple = tuple[int, int, int]
Pairs = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
Padding: TypeAlias = "int | Triple | Pairs | str"

NCDHW = "ncdhw"
CHANNELS_LAST = "channels_last_3d"
LAYOUTS = (NCDHW, CHANNELS_LAST)
MODES = ("zeros", "replicate", "reflect", "circular")


class Tensors(NamedTuple):
    """The arguments of one problem: ``x`` [N,C,D,H,W], ``weight`` [O,C/groups,*k] (transposed
    [C,O/groups,*k]), ``bias`` [O], and ``grad`` shaped like the output."""

    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    grad: torch.Tensor


@dataclass(frozen=True)
class Case:
    """One problem. ``op`` is "depthwise", "dilated" or "transposed"; ``size`` is that of the input.

    It is depthwise, with ``multiplier`` filters of each channel, unless there are ``filters``: so
    many outputs, in ``groups``.
    """

    name: str
    op: str = "depthwise"
    n: int = 1
    channels: int = 1
    multiplier: int = 1
    filters: int = 0
    groups: int = 1
    size: Triple = (1, 1, 1)
    kernel: Triple = (3, 3, 3)
    stride: Triple = (1, 1, 1)
    padding: Padding = 0
    dilation: Triple = (1, 1, 1)
    mode: str = "zeros"
    output_padding: Triple = (0, 0, 0)
    layout: str = NCDHW
    tags: tuple[str, ...] = ()
    source: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def transposed(self) -> bool:
        return self.op == "transposed"

    @property
    def out_channels(self) -> int:
        return self.filters or self.channels * self.multiplier

    @property
    def blocks(self) -> int:
        """Groups of channels, as torch's argument has them."""
        return self.groups if self.filters else self.channels

    @property
    def pairs(self) -> int:
        """Pairs of an input and an output channel that meet."""
        return self.channels * self.out_channels // self.blocks

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def products(self) -> int:
        """That are added up for an output."""
        return self.taps * self.channels // self.blocks

    @property
    def weight_shape(self) -> tuple[int, ...]:
        if self.transposed:
            return self.channels, self.out_channels // self.blocks, *self.kernel
        return self.out_channels, self.channels // self.blocks, *self.kernel

    @property
    def span(self) -> Triple:
        """Cells from the first to the last tap, per axis."""
        kd, kh, kw = ((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilation, strict=True))
        return kd, kh, kw

    @property
    def pads(self) -> Pairs:
        """``padding`` as three (before, after) pairs."""
        if self.padding == "valid":
            return ((0, 0),) * 3
        if self.padding == "same":
            pairs = []
            for n, s, span in zip(self.size, self.stride, self.span, strict=True):
                total = max((-(-n // s) - 1) * s + span - n, 0)
                pairs.append((total // 2, total - total // 2))
            return tuple(pairs)  # type: ignore[return-value]
        if isinstance(self.padding, int):
            return ((self.padding, self.padding),) * 3
        pd, ph, pw = (p if isinstance(p, tuple) else (p, p) for p in self.padding)
        return pd, ph, pw  # type: ignore[return-value]

    @property
    def out_size(self) -> Triple:
        axes = zip(self.size, self.span, self.stride, self.pads, self.output_padding, strict=True)
        if self.transposed:
            od, oh, ow = ((n - 1) * s - a - b + span + op for n, span, s, (a, b), op in axes)
        else:
            od, oh, ow = ((n + a + b - span) // s + 1 for n, span, s, (a, b), _ in axes)
        return od, oh, ow

    @property
    def flops(self) -> int:
        """Two per tap and output (transposed: per tap and input), padding counted too."""
        cells = self.size if self.transposed else self.out_size
        return 2 * self.n * self.pairs * math.prod(cells) * self.taps

    @property
    def live_flops(self) -> int:
        """``flops`` less the taps that fall on zero padding (transposed: outside the output)."""
        if self.mode != "zeros":
            return self.flops
        small, big = (self.size, self.out_size) if self.transposed else (self.out_size, self.size)
        live = 1
        for o, n, k, s, d, (a, _) in zip(
            small, big, self.kernel, self.stride, self.dilation, self.pads, strict=True
        ):
            live *= sum(0 <= i * s - a + t * d < n for i in range(o) for t in range(k))
        return 2 * self.n * self.pairs * live

    def bytes(self, itemsize: int = 4) -> int:
        """Input, weight and output touched once: the least traffic of any one of the passes."""
        cells = self.n * (
            self.channels * math.prod(self.size) + self.out_channels * math.prod(self.out_size)
        )
        return itemsize * (cells + self.pairs * self.taps)

    def small(self) -> Case:
        """The same kind of problem, small enough for a test in float64.

        Kernel, stride, dilation, padding, mode and the parity of every axis stay; an axis shorter
        than the kernel stays shorter.
        """
        size = []
        for n, span, s in zip(self.size, self.span, self.stride, strict=True):
            least = 6 if span >= 12 else 6 + span
            size.append(n if n <= least else least + s + (n - least - s) % 2)
        d, h, w = size
        few = 5 if self.taps <= 400 else 2
        if self.filters:
            own = min(self.channels // self.groups, few), min(self.filters // self.groups, few)
            groups = min(self.groups, 2)
            channels, filters = (groups * n for n in own)
            fewer = replace(self, channels=channels, filters=filters, groups=groups)
        else:
            fewer = replace(self, channels=min(self.channels, few))
        return replace(fewer, n=min(self.n, 2), size=(d, h, w))

    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the public function for this row, beside x, weight and bias."""
        args = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        if self.transposed:
            return args | {"output_padding": self.output_padding, "groups": self.blocks}
        if self.filters:
            args["groups"] = self.groups
        return args | {"padding_mode": self.mode}

    def make(
        self, dtype: torch.dtype | None = None, seed: int = 0, layout: str | None = None
    ) -> Tensors:
        """Random tensors of this problem, weights scaled so that outputs are of order one."""
        import torch

        dtype = dtype or torch.float32
        layout = layout or self.layout
        draw = torch.float64 if dtype == torch.float64 else torch.float32
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=draw)

        def dress(t: torch.Tensor) -> torch.Tensor:
            t = t.to(dtype)
            last = layout == CHANNELS_LAST
            return t.contiguous(memory_format=torch.channels_last_3d) if last else t.contiguous()

        weight = randn(*self.weight_shape)
        return Tensors(
            dress(randn(self.n, self.channels, *self.size)),
            (weight / math.sqrt(self.products)).to(dtype),
            randn(self.out_channels).to(dtype),
            dress(randn(self.n, self.out_channels, *self.out_size)),
        )


def triple(value: int | Triple) -> Triple:
    return (value, value, value) if isinstance(value, int) else value
