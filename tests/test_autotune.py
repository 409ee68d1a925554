# SPDX-License-Identifier: Apache-2.0
"""VOXCONV_AUTOTUNE=1: tiles of Triton kernels are timed once, and the choice is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from triton.errors import TritonError
from voxconv.triton_kernels import autotune
from voxconv.triton_kernels.dilated_plan import Config

TILES = [Config(64, 16, 16, warps, 2) for warps in (4, 2, 8)]


@pytest.fixture
def tuning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Config]]:
    """As on a GPU where 2 warps are the quickest; the tiles that were timed."""
    timed: list[Config] = []

    def seconds(launch: Callable[[Config], None], tile: Config) -> float:
        timed.append(tile)
        return {4: 3.0, 2: 1.0, 8: 2.0}[tile.warps]

    monkeypatch.setenv("VOXCONV_AUTOTUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(autotune, "seconds", seconds)
    monkeypatch.setattr(autotune, "choices", autotune.Choices())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    autotune._wanted.cache_clear()
    yield timed
    autotune._wanted.cache_clear()


GPU = SimpleNamespace(is_cuda=True, device="cuda:0", dtype=torch.float32)


def _tuned(problem: Any = ((1, 2), "half"), tiles: list[Config] = TILES) -> Config:
    return autotune.tuned("correlate", GPU, problem, tiles, lambda tile: None)  # type: ignore[arg-type]


def test_the_quickest_tile_is_kept(tuning: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    assert _tuned() == TILES[1]
    assert tuning == TILES
    assert _tuned() == TILES[1]
    monkeypatch.setattr(autotune, "choices", autotune.Choices())  # as in another process
    assert _tuned() == TILES[1]
    assert tuning == TILES, "kept choices are not timed again"
    _tuned(((1, 3), "half"))
    assert tuning == TILES * 2
    content = json.loads(autotune.cache_path().read_text())
    assert content["format"] == autotune.FORMAT
    assert len(content["choices"]) == 2
    assert all("a GPU" in key and "triton" in key for key in content["choices"])
    assert [path.name for path in autotune.cache_path().parent.iterdir()] == ["autotune.json"]


def test_a_kept_tile_that_is_no_choice_is_timed_again(tuning: list[Config]) -> None:
    assert _tuned() == TILES[1]
    assert _tuned(tiles=[TILES[0], TILES[2]]) == TILES[2]


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "null", '{"format": 0, "choices": {}}', '{"format": 1, "choices": {"a": [1, 2]}}'],
)
def test_another_file_is_left_alone(text: str, tuning: list[Config]) -> None:
    path = autotune.cache_path()
    path.parent.mkdir()
    path.write_text(text)
    with pytest.warns(RuntimeWarning, match=r"autotune\.json is not read") as told:
        found = [_tuned(), _tuned(((1, 3), "half"))]
    assert found == [TILES[1]] * 2
    assert len(told) == 1
    assert path.read_text() == text


def test_a_file_that_cannot_be_written_is_told_once(
    tuning: list[Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="is not") as told:
        assert _tuned() == _tuned() == TILES[1]
    assert len(told) == 1
    assert tuning == TILES


@pytest.mark.parametrize("why", ["not asked for", "capturing", "no GPU"])
def test_nothing_is_timed(why: str, tuning: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "not asked for":
        monkeypatch.setenv("VOXCONV_AUTOTUNE", "0")
    elif why == "capturing":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    else:
        monkeypatch.setattr(GPU, "is_cuda", False)
    assert _tuned() == TILES[0]
    assert not tuning
    assert not autotune.cache_path().exists()


def test_tiles_are_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Config] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        record = synchronize = lambda self: None

        def elapsed_time(self, stop: Any) -> float:
            return 10.0 - len(launched)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert autotune.seconds(launched.append, TILES[0]) == pytest.approx(
        1e-3 * (10 - 1 - autotune.ROUNDS)
    )
    assert launched == TILES[:1] * (1 + autotune.ROUNDS)

    def too_large(tile: Config) -> None:
        raise TritonError("out of resource")

    assert autotune.seconds(too_large, TILES[0]) == float("inf")
