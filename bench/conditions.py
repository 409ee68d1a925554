# SPDX-License-Identifier: Apache-2.0
"""The machine and the versions that a run's figures belong to, and where they are kept."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import voxconv
from voxconv import _ops

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BUSY = 0.05  # share of the CPUs used by others from which figures are marked
AUTO = Path("auto")  # --json without a name: the device's folder


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def slug(device: str) -> str:
    """The name of the device's folder: "amd-epyc-avx512-2t", "nvidia-h200"."""
    parts = [device_name(device)]
    if not device.startswith("cuda"):
        parts += [torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()}t"]
    words = re.sub(r"\((r|tm)\)|@.*", "", " ".join(parts).lower().replace("processor", ""))
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")


class Others:
    """How much of the CPUs other processes (and other guests) used over a block: ``.share``.

    A share of 0 means that the figures are ours alone; None if the system does not tell.
    """

    share: float | None = None

    def __enter__(self) -> Others:
        self.before = _cpu_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None and (now := _cpu_seconds()) is not None:
            wall, busy, own = (b - a for a, b in zip(self.before, now, strict=True))
            share = (busy - own) / max(wall * (os.cpu_count() or 1), 1e-9)
            self.share = round(min(max(share, 0.0), 1.0), 3)


def _cpu_seconds() -> tuple[float, float, float] | None:
    """Wall clock, CPU time of everybody (stolen time too), and our own."""
    try:
        ticks = [int(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return time.monotonic(), busy, time.process_time()


def conditions(device: str = "cpu") -> dict[str, Any]:
    """Everything a reader needs to know to repeat the run, as JSON."""
    cuda = device.startswith("cuda")
    found: dict[str, Any] = {
        "device": device_name(device),
        "slug": slug(device),
        "isa": None if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "voxconv": voxconv.__version__,
        "compiled": _ops.has_cpu(),
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "commit": _git("rev-parse", "--short=12", "HEAD") or "none",
        "modified": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }
    if cuda:
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found


def _git(*args: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def one_line(found: dict[str, Any]) -> str:
    """The conditions as one sentence, for the foot of a table or a picture."""
    parts = [found["device"] + (f" ({found['isa']})" if found["isa"] else "")]
    if found["isa"]:
        parts.append(f"{found['threads']} threads")
    parts += [f"torch {found['torch']}", f"voxconv {found['voxconv']}"]
    if "cudnn" in found:
        parts.append(f"cuDNN {found['cudnn']}")
    commit = found["commit"] + (" with changes" if found["modified"] else "")
    parts += [f"commit {commit}", found["date"]]
    if (found.get("others_cpu") or 0) > BUSY:
        parts.append(f"BUSY MACHINE: others used {100 * found['others_cpu']:.0f} % of the CPUs")
    return ", ".join(parts)


def write_json(path: Path, name: str, device: str, content: dict[str, Any]) -> Path:
    """Writes ``content``; AUTO means results/<device>/<name>.json."""
    if path == AUTO:
        path = RESULTS / slug(device) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
