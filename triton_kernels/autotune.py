# SPDX-License-Identifier: Apache-2.0
"""The choice among a few tiles by timing them, once for each problem, GPU and version of Triton.

Only with VOXCONV_AUTOTUNE=1. Choices are kept in voxconv/autotune.json in the user's directory for
caches, as {"format": FORMAT, "choices": {problem: tile}}; nothing is read from or written to a file
that is anything else.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from voxconv._settings import setting

from .dilated_plan import Config

FORMAT = 1
ROUNDS = 5  # of which the quickest counts

Launch = Callable[[Config], None]


def cache_path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "voxconv" / "autotune.json"


def tuned(name: str, x: Tensor, problem: Any, tiles: Sequence[Config], launch: Launch) -> Config:
    """The tile to launch with; the first, which the rule chose, unless tuning is asked for.

    `name` and `problem` are all that the time depends on, but for the dtype of x and the GPU.
    """
    if not _wanted() or not _can_time(x):
        return tiles[0]
    key = _key(name, x, problem)
    found = choices.get(key)
    if found not in tiles:
        found = min(tiles, key=lambda tile: seconds(launch, tile))
        choices.put(key, found)
    return found


@cache
def _wanted() -> bool:
    return setting("VOXCONV_AUTOTUNE") == "1"


def _can_time(x: Tensor) -> bool:
    """Whether x is on a GPU that is not just recording what it is to do."""
    return x.is_cuda and not torch.cuda.is_current_stream_capturing()


def _key(name: str, x: Tensor, problem: Any) -> str:
    gpu = torch.cuda.get_device_name(x.device)
    return f"{gpu}; triton {triton.__version__}; {name} {x.dtype} {_plain(problem)}"


def _plain(value: Any) -> Any:
    """Nested sequences as lists, whatever they are called."""
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def seconds(launch: Launch, tile: Config) -> float:
    """Of a launch; without end if the tile is too large for the GPU."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    try:
        launch(tile)  # compiles it
        for _ in range(ROUNDS):
            start.record()
            launch(tile)
            stop.record()
            stop.synchronize()
            times.append(1e-3 * start.elapsed_time(stop))
    except TritonError:
        return float("inf")
    return min(times)


class Choices:
    """What is in the file, read when it is first needed; and what was chosen since."""

    def __init__(self) -> None:
        self._kept: dict[str, Config] | None = None
        self._writes = True

    def get(self, key: str) -> Config | None:
        if self._kept is None:
            self._kept = self._read()
        return self._kept.get(key)

    def put(self, key: str, tile: Config) -> None:
        """Keep a choice, beside those that other processes have written meanwhile."""
        self._kept = {**self._read(), **(self._kept or {}), key: tile}
        if self._writes:
            self._write({name: list(config) for name, config in self._kept.items()})

    def _read(self) -> dict[str, Config]:
        path = cache_path()
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            return {key: _config(tile) for key, tile in content["choices"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            self._complain(f"is not read: {error!r}; once it is gone, a new one is written")
            return {}

    def _write(self, choices: dict[str, list[int]]) -> None:
        path = cache_path()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=path.parent, prefix=path.name, delete=False
            ) as file:
                json.dump({"format": FORMAT, "choices": choices}, file, indent=1)
            os.replace(file.name, path)
        except OSError as error:
            self._complain(f"is not written: {error!r}")

    def _complain(self, what: str) -> None:
        if self._writes:
            warnings.warn(f"{cache_path()} {what}", RuntimeWarning, stacklevel=2)
        self._writes = False


def _config(tile: Any) -> Config:
    if len(tile) != len(Config._fields) or not all(type(n) is int for n in tile):
        raise ValueError(f"{tile!r} is no tile")
    return Config(*tile)


choices = Choices()
