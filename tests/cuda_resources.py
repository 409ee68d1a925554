# SPDX-License-Identifier: Apache-2.0
"""What every CUDA kernel of the compiled part takes of a GPU, as ptxas settled it.

    python tests/cuda_resources.py --write     # after `make cuda`: writes cuda_resources.txt anew

The table is checked in, so that a change of a kernel which costs registers, or spills, shows
in the diff; test_cuda_build.py compares.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_suffix(".txt")
HEAD = "# registers of a thread and bytes of its stack (spills too), by kernel and architecture"


class Kernel(NamedTuple):
    name: str
    architecture: str


class Resources(NamedTuple):
    registers: int
    stack: int


def cuobjdump() -> str | None:
    """The tool: of the CUDA toolkit, or the one that Triton brings."""
    triton = find_spec("triton")
    folders = [] if triton is None else list(triton.submodule_search_locations or [])
    carried = [str(Path(f) / "backends" / "nvidia" / "bin" / "cuobjdump") for f in folders]
    return next(filter(None, map(shutil.which, ("cuobjdump", *carried))), None)


def measure(library: Path) -> dict[Kernel, Resources]:
    """The resources of all kernels in a library."""
    tool = cuobjdump()
    assert tool, "no cuobjdump: install triton"
    listing = subprocess.run(
        [tool, "-res-usage", str(library)], capture_output=True, text=True, check=True
    ).stdout
    plain = subprocess.run(
        ["c++filt"], input=listing, capture_output=True, text=True, check=True
    ).stdout
    found: dict[Kernel, Resources] = {}
    architecture = name = ""
    for line in plain.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r" Function (?:void )?(?:voxconv::device::)?(.*?)\(", line):
            name = match[1].replace("voxconv::device::", "")
        elif match := re.match(r"  REG:(\d+) STACK:(\d+)", line):
            found[Kernel(name, architecture)] = Resources(int(match[1]), int(match[2]))
    return found


def read() -> tuple[str, dict[Kernel, Resources]]:
    """The compiler that the table is of, and the table."""
    compiler, table = "", {}
    for line in TABLE.read_text().splitlines():
        if line.startswith("# nvcc"):
            compiler = line[2:]
        elif not line.startswith("#"):
            registers, stack, architecture, name = line.split(maxsplit=3)
            table[Kernel(name, architecture)] = Resources(int(registers), int(stack))
    return compiler, table


def write(compiler: str, found: dict[Kernel, Resources]) -> None:
    lines = [HEAD, f"# {compiler}", "# registers, stack, architecture, kernel"]
    for kernel, (registers, stack) in sorted(found.items()):
        lines.append(f"{registers:4d} {stack:4d}  {kernel.architecture:7s} {kernel.name}")
    TABLE.write_text("\n".join(lines) + "\n")


def main() -> None:
    from voxconv import _C, _ops

    build = _ops.cuda_build()
    if build is None or not _C.__file__:
        raise SystemExit("the compiled part has no CUDA: `make cuda` first")
    compiler = build.partition(" ")[2]
    found = measure(Path(_C.__file__))
    if "--write" in sys.argv[1:]:
        write(compiler, found)
    print(f"{compiler}: {len(found)} kernels")


if __name__ == "__main__":
    main()
