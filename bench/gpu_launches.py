# SPDX-License-Identifier: Apache-2.0
"""A pass and its launches, for gpu_model.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import _path  # noqa: F401
from cases import Case, Triple
from cuda_kernels import Launched


def ceil(a: float, b: float) -> int:
    return -int(-a // b)


class Work(NamedTuple):
    """Of the warps of a block: what a multiprocessor issues, and what its units have to do."""

    instructions: float
    fmas: float = 0
    wavefronts: float = 0
    products: float = 0

    def times(self, n: float) -> Work:
        return Work(*(n * part for part in self))


@dataclass(frozen=True)
class Pass:
    """A pass of a convolution: a row of the table, a transposed one turned round."""

    case: Case
    which: str
    itemsize: int

    @property
    def halves(self) -> bool:
        return self.itemsize == 2

    @property
    def x(self) -> Triple:
        return self.case.out_size if self.case.transposed else self.case.size

    @property
    def out(self) -> Triple:
        return self.case.size if self.case.transposed else self.case.out_size

    @property
    def backwards(self) -> bool:
        return self.which == "grad_input"

    @property
    def source(self) -> Triple:
        return self.out if self.backwards else self.x

    @property
    def target(self) -> Triple:
        """Of the target; of grad_weight, the gradient of the output."""
        return self.x if self.backwards else self.out

    @property
    def filters(self) -> int:
        return self.case.out_channels

    @property
    def targets(self) -> int:
        """Samples times channels of the target."""
        few = self.backwards and not self.case.transposed
        return self.case.n * (self.case.channels if few else self.filters)

    @property
    def outputs(self) -> int:
        return self.targets * math.prod(self.target)

    def before(self, i: int) -> int:
        """Destination o reads from cell o - before on, of stride 1."""
        before = self.case.pads[i][0]
        return self.case.span[i] - 1 - before if self.backwards else before

    def live(self, i: int) -> int:
        """Pairs of an output and a tap along an axis that meet a cell."""
        stride, dilation = self.case.stride[i], self.case.dilation[i]
        first = [o * stride - self.case.pads[i][0] for o in range(self.out[i])]
        reads = (f + k * dilation for f in first for k in range(self.case.kernel[i]))
        return sum(0 <= cell < self.x[i] for cell in reads)


class Kernel(NamedTuple):
    """A launch, its name taken apart."""

    family: str
    arguments: tuple[str, ...]
    launched: Launched

    @property
    def blocks(self) -> int:
        return self.launched.grid[0]

    @property
    def warps(self) -> int:
        return ceil(math.prod(self.launched.block), 32)

    def number(self, i: int) -> int:
        return int(self.arguments[i])


def kernel_of(launched: Launched) -> Kernel:
    family, _, rest = launched.kernel.partition("<")
    return Kernel(family, tuple(map(str.strip, rest.removesuffix(">").split(", "))), launched)
