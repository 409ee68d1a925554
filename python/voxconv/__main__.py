# SPDX-License-Identifier: Apache-2.0
"""`python -m voxconv`: a report on the environment, or the demo."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import torch

from . import __version__, _ops
from ._settings import CPU_LEVELS, setting

OPTIONAL = ("numpy", "nibabel", "matplotlib", "tqdm", "monai", "scipy", "hypothesis", "pytest")

# What each x86-64 level asks of a CPU, as /proc/cpuinfo names it; the kernels are built for all.
SIMD_LEVELS = {
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "x86-64-v3": {"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"},
    "baseline": set(),
}


def environment() -> list[tuple[str, str]]:
    """What an issue report needs, as (name, value) rows; never raises."""
    rows: list[tuple[str, Callable[[], str]]] = [
        ("voxconv", lambda: f"{__version__} in {Path(__file__).resolve().parent}"),
        ("compiled part", _compiled),
        ("SIMD", _simd),
        ("torch", _torch),
        ("threads", lambda: f"{torch.get_num_threads()} used by torch, {os.cpu_count()} CPUs"),
        ("settings", _settings),
        ("CPU", _cpu_name),
        ("GPU", _gpu),
        ("Triton", lambda: _version("triton")),
        ("Python", lambda: f"{platform.python_version()} on {platform.platform()}"),
        ("optional", lambda: ", ".join(f"{name} {_version(name)}" for name in OPTIONAL)),
    ]
    report = []
    for name, value in rows:
        try:
            text = value()
        except Exception as error:  # a broken part of the environment is a finding, not a failure
            text = f"unknown ({type(error).__name__}: {error})"
        report.append((name, text))
    return report


def _compiled() -> str:
    reason = _ops.missing_reason()
    if reason is not None:
        return f"not in use, everything runs through torch: {reason}"
    spec = importlib.util.find_spec("voxconv._C")
    name = Path(spec.origin).name if spec and spec.origin else "voxconv._C"
    cuda = _ops.cuda_build()
    return f"loaded, {name}, {f'CUDA for sm {cuda}' if cuda else 'built without CUDA'}"


def _cpuinfo(key: str) -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None


def _simd() -> str:
    torchs = f"torch uses {torch.backends.cpu.get_cpu_capability()}"
    flags = _cpuinfo("flags")
    if flags is None:
        return torchs
    have = set(flags.split())
    usable = [name for name in CPU_LEVELS if SIMD_LEVELS[name] <= have]
    wanted = setting("VOXCONV_CPU_LEVEL")
    level = wanted if wanted in usable else usable[0]
    return f"{level.replace('baseline', 'x86-64 baseline')}, {torchs}"


def _settings() -> str:
    names = [n for n in os.environ if n.startswith(("VOXCONV_", "OMP_", "MKL_", "KMP_"))]
    return ", ".join(f"{name}={os.environ[name]}" for name in sorted(names)) or "none"


def _cpu_name() -> str:
    return f"{_cpuinfo('model name') or platform.processor() or 'unknown'} ({platform.machine()})"


def _torch() -> str:
    build = "debug" if torch.version.debug else "release"
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    mkldnn = "oneDNN" if torch.backends.mkldnn.is_available() else "no oneDNN"
    return f"{torch.__version__}, {build}, {cuda}, {mkldnn}"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    names = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.append(f"{torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return f"{', '.join(names)}; cuDNN {torch.backends.cudnn.version()}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def report() -> str:
    """The environment as text."""
    rows = environment()
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m voxconv",
        description="Without a command: print what voxconv runs on, the first thing to paste in "
        "an issue.",
    )
    commands = parser.add_subparsers(dest="command", metavar="command")
    demo = commands.add_parser(
        "demo",
        help="a MedNeXt-like network on a real MRI scan, before and after voxconv.convert",
        description="Time a forward pass and a training step of a MedNeXt-like network on a real "
        "MRI scan, with torch's layers and with voxconv's; print times, errors, peak memory and "
        "the layers that were swapped; save a picture. Needs: pip install 'voxconv[demo]'.",
    )
    demo.add_argument(
        "--volume",
        type=Path,
        metavar="FILE",
        help="a 3-D or 4-D scan that nibabel reads, such as scan.nii.gz; without it the brain "
        "scan that comes with nibabel",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("demo.png"),
        metavar="FILE",
        help="where the picture goes (%(default)s)",
    )
    demo.add_argument(
        "--size",
        type=_positive,
        default=96,
        metavar="N",
        help="the most voxels along an axis of the block cut from the scan; time and memory grow "
        "with its cube (%(default)s)",
    )
    demo.add_argument(
        "--threads", type=_positive, metavar="N", help="CPU threads; without it torch's choice"
    )
    demo.add_argument(
        "--steps",
        type=_positive,
        default=3,
        metavar="N",
        help="timed training steps of each variant, fewer where they are slow; the median counts "
        "(%(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0; 1 if the demo's results disagree; 2 for something the user can mend.
    """
    arguments = _parser().parse_args(argv)
    if arguments.command is None:
        try:
            print(report(), flush=True)
        except BrokenPipeError:  # whoever reads it has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    from .demo import DemoError, run_demo

    try:
        return run_demo(
            volume=arguments.volume,
            out=arguments.out,
            size=arguments.size,
            threads=arguments.threads,
            steps=arguments.steps,
        )
    except DemoError as error:
        print(f"voxconv demo: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
