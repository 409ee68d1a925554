# SPDX-License-Identifier: Apache-2.0
"""Small problems that reach every CUDA kernel once, for compute-sanitizer; see bench/gpu.sh.

compute-sanitizer --tool racecheck python bench/gpu_smoke.py
"""

from __future__ import annotations

import torch

import _path  # noqa: F401
import testing
import voxconv
from cases import LAYOUTS, Case, select

# Beside the smoke rows: the kernels that the rules choose for larger kernels and halves.
ROWS = [
    *select("smoke"),
    *(
        Case(f"dw{k}", n=2, channels=3, size=(6, 9, 20), kernel=(k,) * 3, padding=k // 2)
        for k in (3, 5, 7, 9, 21)
    ),
    *(
        Case(
            f"dw{k}_stride{d}22",
            channels=3,
            size=(6, 9, 20),
            kernel=(k,) * 3,
            stride=(d, 2, 2),
            padding=k // 2,
        )
        for k, d in ((3, 2), (5, 2), (7, 2), (3, 1), (5, 1))
    ),
    Case("dw355", channels=3, size=(6, 9, 20), kernel=(3, 5, 5), padding=(0, 2, 2)),
]


def main() -> None:
    count = 0
    for case in ROWS:
        for dtype in (torch.float32, torch.bfloat16):
            for layout in LAYOUTS:
                tensors = case.make(dtype, layout=layout)
                tensors = type(tensors)(*(t.cuda() for t in tensors))
                with voxconv.use_backend("cuda"):
                    testing.all_passes(testing.ours, case, tensors)
                count += 1
    torch.cuda.synchronize()
    print(f"{count} problems ran")


if __name__ == "__main__":
    main()
