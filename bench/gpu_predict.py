# SPDX-License-Identifier: Apache-2.0
"""How long the CUDA kernels should take on an H200, reckoned without one, for docs/depthwise.md.

    python bench/gpu_predict.py            # prints the tables
    python bench/gpu_predict.py --write    # writes them into the page
    python bench/gpu_predict.py --check    # exit status 1 if the page is out of date

The launches are those of the launch rules (tests/cuda_kernels.py), registers those of
tests/cuda_resources.txt, and what a block has to do is in gpu_model.py.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch

import _path  # noqa: F401
import cuda_kernels
import cuda_resources
from cases import BY_NAME, CHANNELS_LAST, NCDHW, Case, select
from conditions import ROOT
from gpu_launches import Kernel, Pass, Work, ceil, kernel_of
from gpu_model import FAMILIES
from voxconv import _dispatch
from voxconv._geometry import PADDING_MODES, Geometry

PAGE = ROOT / "docs" / "depthwise.md"
MARKED = re.compile(r"(<!-- gpu:begin -->\n).*?(<!-- gpu:end -->)", re.S)

# An H200. The clock is the one that it is sold to boost to; fp32 and copy as a roof are what is
# measured of it at best: 67 TFLOP/s and 4.3 TB/s.
MULTIPROCESSORS, QUARTERS, CLOCK = 132, 4, 1.755e9
COPY, FMA = 4.3e12, 33.5e12
REGISTERS, SHARED, RESERVED, THREADS, BLOCKS = 65536, 228 << 10, 1 << 10, 2048, 32
PRODUCT = 1.6  # clocks of a multiprocessor for an mma m16n8k16, at 60 % of its peak
EFFICIENCY = 0.85  # of the clocks in which the busiest unit could work, those in which it does
LAUNCH = 3e-6  # seconds that a launch takes, which are in no figure
UNKNOWN_REGISTERS = 168  # of a kernel that is not in the table yet

DTYPES = (torch.float32, torch.bfloat16)
PASSES = ("forward", "grad_input", "grad_weight")
TURNED = {"forward": "grad_input", "grad_input": "forward", "grad_weight": "grad_weight"}
TARGET = 0.6
NONE = "\N{EN DASH}"


@dataclass(frozen=True)
class Launch:
    """A kernel at work on a pass."""

    of: Pass
    kernel: Kernel

    @cached_property
    def work(self) -> Work:
        """Of a block."""
        return FAMILIES[self.kernel.family](self.of, self.kernel)

    @cached_property
    def registers(self) -> int | None:
        name = self.kernel.launched.kernel.replace("Bf16", "__nv_bfloat16")
        found = RESOURCES.get(cuda_resources.Kernel(name, "sm_90a"))
        return found.registers if found else None

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor holds. Registers are given out by 8 to the threads of a
        warp."""
        warps = self.kernel.warps
        registers = warps * 32 * ceil(self.registers or UNKNOWN_REGISTERS, 8) * 8
        shared = self.kernel.launched.shared + RESERVED
        return min(REGISTERS // registers, SHARED // shared, THREADS // (32 * warps), BLOCKS)

    @property
    def bytes(self) -> int:
        """Each tensor once, and what the kernels of a pass leave for one another."""
        scratch = self.kernel.launched.scratch
        if self.kernel.family.startswith("sum_"):
            return scratch + self.of.filters * self.of.case.taps * self.of.itemsize
        return scratch + self.of.case.bytes(self.of.itemsize)

    def units(self, blocks: float) -> dict[str, float]:
        """Seconds that each unit of a multiprocessor needs for so many blocks of it. A warp is
        in one quarter; few of them leave the other quarters idle."""
        quarters = min(QUARTERS, self.kernel.warps * min(ceil(blocks, 1), self.resident))
        clocks = {
            "instructions": self.work.instructions / quarters,
            "multiply-adds": self.work.fmas / quarters,
            "shared memory": self.work.wavefronts,
            "tensor cores": self.work.products * PRODUCT * QUARTERS / quarters,
        }
        return {unit: blocks * n / CLOCK / EFFICIENCY for unit, n in clocks.items()}

    @property
    def memory(self) -> float:
        return self.bytes / COPY

    @cached_property
    def compute(self) -> float:
        """Of the multiprocessor that has the most blocks."""
        return max(self.units(ceil(self.kernel.blocks, MULTIPROCESSORS)).values())

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory)

    @property
    def limit(self) -> str:
        """What takes the time: the busiest unit, if it is as busy in all multiprocessors."""
        units = self.units(self.kernel.blocks / MULTIPROCESSORS)
        busiest = max(units, key=lambda unit: units[unit])
        if self.memory >= self.compute:
            return "memory"
        return (
            busiest if units[busiest] > 0.8 * self.compute else "blocks that do not come out even"
        )


@dataclass(frozen=True)
class Prediction:
    launches: tuple[Launch, ...]

    @property
    def of(self) -> Pass:
        return self.launches[0].of

    @property
    def roof(self) -> float:
        """Taps on padding counted, as in all figures of this page."""
        case = self.of.case
        return max(case.bytes(self.of.itemsize) / COPY, case.flops / 2 / FMA)

    @property
    def seconds(self) -> float:
        return sum(launch.seconds for launch in self.launches)

    @property
    def share(self) -> float:
        return self.roof / self.seconds

    @property
    def family(self) -> str:
        return self.launches[0].kernel.family.removeprefix("depthwise_")

    @property
    def reason(self) -> str:
        slowest = max(self.launches, key=lambda launch: launch.seconds)
        if slowest.kernel.family.startswith("sum_"):
            return "partial sums"
        return slowest.limit


_, RESOURCES = cuda_resources.read()


def by_fft(case: Case, dtype: torch.dtype) -> bool:
    """Whether _dispatch leaves it to torch.fft."""
    size = case.out_size if case.transposed else case.size
    pads = tuple(side for pair in case.pads for side in pair)
    mode = PADDING_MODES.index(case.mode)
    problem = _dispatch.Problem(
        op="depthwise_forward",
        device="cuda",
        dtype=dtype,
        x_shape=(case.n, case.channels, *size),
        weight_shape=(case.out_channels, 1, *case.kernel),
        geometry=Geometry(case.kernel, case.stride, pads, case.dilation, mode),
    )
    return _dispatch.choose(problem).kernel == "fft"


class Predictions:
    """Of rows, each made once."""

    def __init__(self) -> None:
        self.library = cuda_kernels.build()
        self.made: dict[tuple[Case, str, torch.dtype, str], Prediction | None] = {}

    def __call__(
        self, case: Case, which: str, dtype: torch.dtype, layout: str
    ) -> Prediction | None:
        """None if torch.fft does it. The pass is the row's own: forward of a transposed one is
        grad_input of a convolution."""
        key = case, which, dtype, layout
        if key not in self.made:
            self.made[key] = None if by_fft(case, dtype) else self._make(*key)
        return self.made[key]

    def _make(self, case: Case, which: str, dtype: torch.dtype, layout: str) -> Prediction:
        which = TURNED[which] if case.transposed else which
        launched = cuda_kernels.plan(self.library, case, which, dtype, layout)
        of = Pass(case, which, dtype.itemsize)
        return Prediction(tuple(Launch(of, kernel_of(one)) for one in launched))

    def suite(self, dtype: torch.dtype) -> Iterator[tuple[Case, list[Prediction | None]]]:
        for case in select("model"):
            yield case, [self(case, which, dtype, case.layout) for which in PASSES]


# Kernels that no row of the suite takes are shown at work on these.
OTHERS = (
    *(replace(case, layout=CHANNELS_LAST) for case in select("model") if case.layout == NCDHW),
    replace(BY_NAME["uxnet_dw7_48@48"], name="dw9_48@48", kernel=(9, 9, 9), padding=4),
)


def typical(predictions: Predictions) -> dict[str, dict[torch.dtype, Launch]]:
    """By kernel, its launch for the largest row that takes it, by dtype."""
    found: dict[str, dict[torch.dtype, Launch]] = defaultdict(dict)
    for cases in (select("model"), OTHERS):
        seen = set(found)
        for case in sorted(cases, key=lambda case: -case.bytes()):
            for which in PASSES:
                for dtype in DTYPES:
                    prediction = predictions(case, which, dtype, case.layout)
                    for launch in prediction.launches if prediction else ():
                        if launch.kernel.family.endswith("_any"):
                            continue
                        name = template(launch.kernel)
                        if name not in seen:
                            found[name].setdefault(dtype, launch)
    return {name: found[name] for name in sorted(found, key=order)}


def template(kernel: Kernel) -> str:
    """The kernel without its dtype; T stands for it."""
    dtype, *rest = kernel.arguments
    arguments = ", ".join(one.replace(dtype, "T") for one in rest)
    return kernel.family.removeprefix("depthwise_") + (f"<{arguments}>" if arguments else "")


def order(name: str) -> tuple[int, str]:
    families = [family.removeprefix("depthwise_") for family in FAMILIES]
    return families.index(name.partition("<")[0]), name


def columns(values: Iterable[str]) -> str:
    """The two dtypes, as one where they agree."""
    return " / ".join(dict.fromkeys(values))


def kernels_table(predictions: Predictions) -> Iterator[str]:
    yield (
        "| kernel | row | bytes per output | multiply-adds per output | registers |"
        " shared memory, KB | blocks, warps of a multiprocessor |"
    )
    yield "|---|---|--:|--:|--:|--:|--:|"
    for name, by_dtype in typical(predictions).items():
        launches = [by_dtype[dtype] for dtype in DTYPES if dtype in by_dtype]
        cells = []
        for launch in launches:
            kernel, work = launch.kernel, launch.work
            made = 32 * (work.fmas + 64 * work.products) * kernel.blocks / launch.of.outputs
            cells.append(
                (
                    f"{launch.bytes / launch.of.outputs:.3g}",
                    f"{made:.3g}" if made else NONE,
                    str(launch.registers or "?"),
                    f"{kernel.launched.shared / 1024:.1f}",
                    f"{launch.resident}, {launch.resident * kernel.warps}",
                )
            )
        row = launches[0].of.case.name
        if not any(launch.of.case.layout == NCDHW for launch in launches):
            row += " NDHWC"
        joined = " | ".join(columns(values) for values in zip(*cells, strict=True))
        yield f"| `{name}` | {row} | {joined} |"


def cell(prediction: Prediction | None) -> str:
    if prediction is None:
        return "torch.fft"
    roof, seconds = 1e6 * prediction.roof, 1e6 * prediction.seconds
    return f"{roof:.3g} / {seconds:.3g} / {100 * prediction.share:.0f} % {prediction.family}"


def suite_table(predictions: Predictions, dtype: torch.dtype) -> Iterator[str]:
    yield f"| {str(dtype).removeprefix('torch.')} | {' | '.join(PASSES)} |"
    yield "|---|--:|--:|--:|"
    for case, found in predictions.suite(dtype):
        yield f"| {case.name} | {' | '.join(map(cell, found))} |"


def summary(predictions: Predictions) -> Iterator[str]:
    def reach(made: list[Prediction]) -> str:
        return f"{sum(p.share >= TARGET for p in made)} of {len(made)}"

    for dtype in DTYPES:
        made = [p for _, found in predictions.suite(dtype) for p in found if p]
        large = [p for p in made if p.roof >= LAUNCH]
        mean = math.exp(sum(math.log(p.share) for p in made) / len(made))
        yield (
            f"{str(dtype).removeprefix('torch.')}: {reach(made)} passes reach {100 * TARGET:.0f} %"
            f" of their roof, of those with a roof of {1e6 * LAUNCH:.0f} µs or more"
            f" {reach(large)}; the geometric mean is {100 * mean:.0f} %. What takes the time of the"
            " others, small ones in brackets:"
        )
        yield ""
        below = [p for p in made if p.share < TARGET]
        for family in dict.fromkeys(p.family for p in below):
            counts = Counter(p.reason for p in below if p.family == family)
            small = Counter(p.reason for p in below if p.family == family and p.roof < LAUNCH)
            reasons = [f"{why} {n} ({small[why]})" for why, n in counts.most_common()]
            yield f"- {family}: {', '.join(reasons)}"
        yield ""


def section() -> str:
    predictions = Predictions()
    blocks = [
        kernels_table(predictions),
        *(suite_table(predictions, dtype) for dtype in DTYPES),
        summary(predictions),
    ]
    return "\n\n".join("\n".join(block).rstrip() for block in blocks)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write the tables into the page")
    parser.add_argument("--check", action="store_true", help="only say whether it is out of date")
    args = parser.parse_args()
    text, tables = PAGE.read_text(), section()
    filled = MARKED.sub(lambda match: f"{match[1]}{tables}\n{match[2]}", text)
    if args.write:
        PAGE.write_text(filled)
    elif args.check:
        print(f"{PAGE.name}: {'up to date' if filled == text else 'out of date'}")
        raise SystemExit(int(filled != text))
    else:
        print(tables)


if __name__ == "__main__":
    main()
