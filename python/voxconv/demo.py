# SPDX-License-Identifier: Apache-2.0
"""The main job on a real volume: a MedNeXt-like network before and after `voxconv.convert`.

`python -m voxconv demo` loads an MRI scan, times a forward pass and a training step with torch's
layers in both of torch's layouts and with voxconv's, compares outputs and gradients, and saves a
picture. Nothing but the class of the depthwise layers differs between the runs.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._demo_network import MULTIPLE, build_network
from .convert import ConvertReport, convert
from .memory import empty_cache

FORWARDS = 3
ENOUGH = 10.0  # seconds
TOLERANCE = 1e-3
SMALLEST = 2 * MULTIPLE  # voxels of an axis: batch norm of one voxel has no variance
HUGE = 1e15  # voxels beyond that are scaled: their squares are sums in float32
PICTURES = (".png", ".pdf", ".svg", ".jpg")


NOTES = """\
Medians of up to {forwards} forward passes and {steps} training steps (forward, loss, backward,
AdamW), no more than {enough:g} s of each, after one untimed run of each. Peak memory: growth of
the resident memory of the process during the untimed training step. Off by: largest difference
from the first line, relative to the largest value. Layers that were not swapped are torch's in
all four runs."""


class DemoError(Exception):
    """Something the user can mend; its text is one line."""


def _need(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise DemoError(
            f"the demo needs {name} ({error}); install it with: pip install 'voxconv[demo]'"
        ) from None


def load_volume(path: Path | None) -> Tensor:
    """Read a scan as a float32 tensor [D, H, W], axes from inferior, posterior and left.

    Args:
        path: any 3-D or 4-D image that nibabel reads (of 4-D the first volume is taken); None
            takes the brain scan that comes with nibabel.

    Raises:
        DemoError: no such file, not a volume, damaged, or without contrast.
    """
    nibabel = _need("nibabel")
    if path is None:
        path = Path(nibabel.__file__).parent / "tests" / "data" / "example4d.nii.gz"
        if not path.is_file():
            raise DemoError("this nibabel came without its example scan; give one with --volume")
    if path.is_dir():
        raise DemoError(f"cannot read {path}: it is a folder")
    if not path.is_file():
        raise DemoError(f"cannot read {path}: no such file")
    try:
        image = nibabel.load(path)
        if not isinstance(image, nibabel.spatialimages.SpatialImage):
            raise DemoError(f"cannot read {path}: not a volume but a {type(image).__name__}")
        if image.get_data_dtype().kind not in "biuf":
            raise DemoError(
                f"cannot read {path}: its voxels are {image.get_data_dtype()}, not real numbers"
            )
        if len(image.shape) > 3 and 0 not in image.shape:
            image = image.slicer[(slice(None), slice(None), slice(None)) + (0,) * _extra(image)]
        if len(image.shape) != 3 or 0 in image.shape:
            raise DemoError(f"cannot read {path}: need a 3-D volume, its shape is {image.shape}")
        array = nibabel.as_closest_canonical(image).get_fdata()
    except DemoError:
        raise
    except Exception as error:  # nibabel and zlib raise many kinds for a damaged file
        text = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DemoError(f"cannot read {path}: {text}") from None
    volume = torch.from_numpy(array.transpose(2, 1, 0).copy())
    volume = torch.nan_to_num(volume, nan=0.0, posinf=0.0, neginf=0.0)
    peak = volume.abs().max()
    volume = (volume / peak if peak > HUGE else volume).float()
    if volume.max() == volume.min():
        raise DemoError(f"cannot read {path}: every voxel has the same value, {volume.max():g}")
    return volume


def _extra(image: Any) -> int:
    return len(image.shape) - 3


def prepare(volume: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cut out the head and normalise it.

    Args:
        volume: [D, H, W].
        size: the most voxels along an axis.

    Returns:
        The network's input [1, 1, D, H, W] with zero mean and unit variance over the head, every
        axis a multiple of 8 voxels and no less than 16, and a stand-in for labels, [1, D, H, W]:
        background, and the darker and the brighter half of the head.
    """
    sample = volume.flatten()[:: max(1, volume.numel() // 1_000_000)]
    low, high = torch.quantile(sample, torch.tensor([0.01, 0.99])).tolist()
    inside = volume > low + 0.1 * (high - low)
    if not inside.any():
        inside = volume > volume.min()
    for axis in range(3):
        other = [a for a in range(3) if a != axis]
        hits = torch.nonzero(inside.any(other[1]).any(other[0]))[:, 0]
        first, last = int(hits[0]), int(hits[-1]) + 1
        cut = max(0, last - first - size)
        start, length = first + cut // 2, last - first - cut
        volume, inside = volume.narrow(axis, start, length), inside.narrow(axis, start, length)
    pads = [
        n for edge in reversed(volume.shape) for n in (0, max(-edge % MULTIPLE, SMALLEST - edge))
    ]
    volume = F.pad(volume, pads, value=float(volume.min()))
    inside = F.pad(inside, pads)
    head = volume[inside] if inside.any() else volume.flatten()
    labels = inside.long() + (inside & (volume > head.median())).long()
    scan = (volume - head.mean()) / head.std(correction=0).clamp_min(1e-6)
    return scan.clamp(-5, 5)[None, None].contiguous(), labels[None]


@dataclass
class Run:
    """What one variant of the network took and gave."""

    name: str
    output: Tensor = field(repr=False)
    gradients: dict[str, Tensor] = field(repr=False)
    loss: float
    forward: float
    step: float
    memory: int | None


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(key)


def peak_growth(work: Callable[[], Any]) -> int | None:
    """Run `work` and return by how many bytes the resident memory of the process grew at its peak.

    Counts everything, scratch space of libraries included. None where the system cannot tell
    (only Linux lets a process reset its high-water mark).
    """
    empty_cache()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier work freed must not hide the growth
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
    except (OSError, AttributeError):
        work()
        return None
    work()
    return max(0, _resident("VmHWM") - before)


def measure(
    name: str,
    model: nn.Module,
    scan: Tensor,
    labels: Tensor,
    *,
    steps: int,
    tick: Callable[[], Any],
) -> Run:
    """Time the network; afterwards its weights are what they were.

    The first forward pass and the first step are not timed: they give the output, the gradients
    and the peak memory of a step. Repeats end early once they have taken `ENOUGH` seconds.
    """
    start = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []

    def forward() -> Tensor:
        with torch.inference_mode():
            return model(scan)  # type: ignore[no-any-return]

    def step() -> None:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(scan), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    def timed(work: Callable[[], Any], repeats: int) -> float:
        seconds: list[float] = []
        for _ in range(repeats):
            tick()
            if sum(seconds) < ENOUGH:
                began = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - began)
        return statistics.median(seconds)

    output = forward().contiguous()
    tick()
    memory = peak_growth(step)
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    tick()
    forward_time, step_time = timed(forward, FORWARDS), timed(step, steps)
    model.load_state_dict(start)
    optimizer.zero_grad()
    return Run(name, output, gradients, losses[0], forward_time, step_time, memory)


def difference(run: Run, base: Run) -> tuple[float, float]:
    """The largest difference of outputs and of gradients, each relative to the largest value."""
    output = (run.output - base.output).abs().max() / base.output.abs().max()
    gap = max(float((run.gradients[k] - g).abs().max()) for k, g in base.gradients.items())
    top = max(float(g.abs().max()) for g in base.gradients.values())
    return float(output), gap / top


def compare(
    scan: Tensor, labels: Tensor, model: nn.Module, *, steps: int
) -> tuple[list[Run], ConvertReport]:
    """Measure torch's layers in both layouts, then voxconv's, with one progress bar."""
    runs: list[Run] = []
    report: ConvertReport | None = None
    layouts = {"": torch.contiguous_format, ", channels_last_3d": torch.channels_last_3d}
    total = 2 * len(layouts) * (2 + FORWARDS + steps)
    with _need("tqdm").tqdm(total=total, unit="run", leave=False) as bar:
        for layers in ("torch", "voxconv"):
            if layers == "voxconv":
                report = convert(model)
            for suffix, layout in layouts.items():
                model.to(memory_format=layout)  # type: ignore[call-overload]
                bar.set_description(layers + suffix)
                x = scan.contiguous(memory_format=layout)
                tick = bar.update
                runs.append(measure(layers + suffix, model, x, labels, steps=steps, tick=tick))
    assert report is not None
    return runs, report


def table(runs: list[Run]) -> str:
    """A line for each run; ratios and differences against the first."""

    def cell(seconds: float, base: float) -> str:
        text = f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"
        return f"{text:>8} {base / seconds:5.1f}x"

    base = runs[0]
    lines = [
        f"{'':25}{'forward':>15}{'training step':>17}{'peak memory':>14}"
        f"{'output off by':>16}{'gradients by':>14}"
    ]
    for run in runs:
        memory = "unknown" if run.memory is None else f"{run.memory / 2**20:.0f} MiB"
        forward, step = cell(run.forward, base.forward), cell(run.step, base.step)
        output, gradient = difference(run, base)
        lines.append(
            f"{run.name:25}{forward}  {step}  {memory:>12}  {output:>14.1e}{gradient:>14.1e}"
        )
    return "\n".join(lines)


def draw(path: Path, scan: Tensor, runs: list[Run]) -> None:
    """Save the picture: a slice, two outputs, their difference, the times."""
    _need("matplotlib")
    figure_class = importlib.import_module("matplotlib.figure").Figure
    base, ours = (run for run in runs if run.name in ("torch", "voxconv"))
    level = scan.shape[2] // 2
    before, after = base.output[0, 0, level], ours.output[0, 0, level]
    error = (after - before).abs()
    low, high = torch.quantile(before, torch.tensor([0.005, 0.995])).tolist()

    figure = figure_class(figsize=(12, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 2))
    axes = top.subplots(1, 4)
    images: tuple[tuple[str, Tensor, dict[str, Any]], ...] = (
        (f"scan, slice {level}", scan[0, 0, level], {"cmap": "gray"}),
        ("output with torch", before, {"vmin": low, "vmax": high}),
        ("output with voxconv", after, {"vmin": low, "vmax": high}),
        ("absolute difference", error, {"cmap": "magma"}),
    )
    for axis, (title, image, style) in zip(axes, images, strict=True):
        shown = axis.imshow(image.numpy(), origin="lower", **style)
        axis.set_title(title)
        axis.set_axis_off()
        top.colorbar(shown, ax=axis, shrink=0.8)
    colours = ["#d1495b" if run.name.startswith("voxconv") else "#9a9a9a" for run in runs]
    for axis, what in zip(bottom.subplots(1, 2), ("forward", "step"), strict=True):
        seconds = [getattr(run, what) for run in runs]
        bars = axis.barh([run.name for run in runs], seconds, color=colours)
        axis.bar_label(bars, [f" {s:.3g} s, {seconds[0] / s:.1f}x" for s in seconds])
        axis.set_title("forward pass" if what == "forward" else "training step")
        axis.set_xlabel("seconds")
        axis.invert_yaxis()
        axis.margins(x=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _check_out(path: Path) -> None:
    if path.suffix.lower() not in PICTURES:
        raise DemoError(f"cannot write {path}: its name must end in {', '.join(PICTURES)}")
    if path.is_dir():
        raise DemoError(f"cannot write {path}: it is a folder")
    if path.exists() and not os.access(path, os.W_OK):
        raise DemoError(f"cannot write {path}: it is write-protected")
    folder = path.resolve().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise DemoError(f"cannot write {path}: no folder {folder} to write into")


def run_demo(*, volume: Path | None, out: Path, size: int, threads: int | None, steps: int) -> int:
    """Run the demo and print its tables.

    Args:
        volume: a scan, or None for the one that comes with nibabel.
        out: where the picture goes.
        size: the most voxels along an axis, at least 16.
        threads: CPU threads, or None for torch's choice.
        steps: timed training steps of each variant.

    Returns:
        0, or 1 if voxconv's results are not torch's.

    Raises:
        DemoError: something the user can mend.
    """
    if size < SMALLEST:
        raise DemoError(f"--size must be at least {SMALLEST}, got {size}")
    for package in ("tqdm", "matplotlib"):
        _need(package)
    _check_out(out)
    scan, labels = prepare(load_volume(volume), size)
    if threads is not None:
        torch.set_num_threads(threads)
    model, name = build_network()

    print(f"scan     {volume or 'example4d.nii.gz of nibabel'}, block {_shape(scan)} voxels")
    print(f"network  {name}, float32, batch 1")
    print(f"machine  {torch.get_num_threads()} threads, torch {torch.__version__}")
    runs, report = compare(scan, labels, model, steps=steps)
    print(f"\n{report}\n\n{table(runs)}\n")
    print(NOTES.format(forwards=FORWARDS, steps=steps, enough=ENOUGH))
    draw(out, scan, runs)
    print(f"picture  {out}")
    by_name = {run.name: run for run in runs}
    if not max(difference(by_name["voxconv"], by_name["torch"])) < TOLERANCE:
        print(f"the results differ by more than {TOLERANCE:g}: please report this")
        return 1
    return 0


def _shape(scan: Tensor) -> str:
    return " x ".join(map(str, scan.shape[2:]))
