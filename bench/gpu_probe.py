# SPDX-License-Identifier: Apache-2.0
"""What a GPU reaches, and what lives beside what on it.

    python bench/gpu_probe.py [--json]           # results/<device>/probe.json

Copy bandwidth, matrix products by torch, mma.sync by itself, cuDNN's depthwise convolution in both
layouts, and whether the static CUDA runtime of voxconv works beside torch's.
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import _path  # noqa: F401
import voxconv
from conditions import AUTO, conditions, one_line, write_json
from roofline import cuda_roofs
from timing import cuda_graph
from voxconv import _ops

SHAPE, KERNEL = (2, 32, 128, 128, 128), 3
FORMATS = {"ncdhw": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}


def mma_tflops() -> float | str:
    """TFLOP/s of mma.sync m16n8k16 with bf16; the reason if it cannot be measured."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return "no nvcc"
    source = Path(__file__).with_suffix(".cu")
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "probe.so"
        flags = ["-O3", "-shared", "-Xcompiler=-fPIC", f"-arch=sm_{major}{minor}"]
        done = subprocess.run(
            [nvcc, *flags, str(source), "-o", str(library)], capture_output=True, text=True
        )
        if done.returncode != 0:
            return done.stderr.strip()
        loaded = ctypes.CDLL(str(library))
    loaded.mma_rate.restype = ctypes.c_double
    return float(loaded.mma_rate())


def cudnn_depthwise(dtype: torch.dtype, layout: str) -> float:
    """Milliseconds of F.conv3d on a large depthwise layer."""
    torch.backends.cudnn.benchmark = True

    def make(_: int) -> Any:
        x = torch.randn(SHAPE, device="cuda", dtype=dtype).to(memory_format=FORMATS[layout])
        weight = torch.randn(SHAPE[1], 1, *(KERNEL,) * 3, device="cuda", dtype=dtype)
        return lambda: F.conv3d(x, weight, padding=KERNEL // 2, groups=SHAPE[1])

    timing, _ = cuda_graph(make, 2 * dtype.itemsize * torch.Size(SHAPE).numel(), seconds=0.2)
    return timing.median_ms


def both_runtimes() -> str:
    """Our kernels and torch's in turns, on memory of torch's allocator."""
    if not _ops.cuda_build():
        return "voxconv is built without CUDA"
    x, weight = torch.randn(1, 2, 5, 6, 7), torch.randn(2, 1, 3, 3, 3)
    with voxconv.use_backend("cuda"):
        y = voxconv.depthwise_conv3d(x.cuda() * 2, weight.cuda(), padding=1) / 2
    error = (y.cpu() - F.conv3d(x, weight, padding=1, groups=2)).abs().max().item()
    return f"works, largest difference {error:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", nargs="?", type=Path, const=AUTO)
    args = parser.parse_args()
    found: dict[str, Any] = {"conditions": conditions("cuda"), "runtimes": both_runtimes()}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        found[f"roofs {name}"] = cuda_roofs(dtype).as_dict()
        for layout in FORMATS:
            found[f"cudnn dw3 {name} {layout} ms"] = cudnn_depthwise(dtype, layout)
    found["mma.sync TFLOP/s"] = mma_tflops()
    for key, value in found.items():
        print(f"{key}: {one_line(value) if key == 'conditions' else value}")
    if args.json:
        print(f"wrote {write_json(args.json, 'probe', 'cuda', found)}")


if __name__ == "__main__":
    main()
