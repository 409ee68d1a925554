# SPDX-License-Identifier: Apache-2.0
"""`python -m voxconv`: the environment report and the demo, on volumes made here."""

from __future__ import annotations

import gzip
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import voxconv
from voxconv import __main__ as cli
from voxconv import _demo_network, _ops, demo

# Of the extra "test"; a machine without a network may lack them.
nibabel = pytest.importorskip("nibabel")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


def _ball(shape: tuple[int, ...] = (18, 16, 14)) -> torch.Tensor:
    """A bright ball with a dark core on a dark ground, axes as in a NIfTI file."""
    axes = [torch.linspace(-1, 1, n) for n in shape[:3]]
    radius = sum(a**2 for a in torch.meshgrid(*axes, indexing="ij")) ** 0.5
    ball = 100.0 * (radius < 0.9) - 40.0 * (radius < 0.4)
    return ball.reshape(*shape[:3], *[1] * (len(shape) - 3)).expand(shape).contiguous()


def _save(path: Path, volume: torch.Tensor) -> Path:
    image = nibabel.Nifti1Image(volume.numpy(), torch.eye(4).numpy())
    nibabel.save(image, path)
    return path


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return _save(tmp_path / "scan.nii.gz", _ball())


class TestReport:
    def test_rows(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([]) == 0
        text = capsys.readouterr().out
        assert voxconv.__version__ in text
        assert torch.__version__ in text
        assert f"{torch.get_num_threads()} used by torch" in text
        assert ("loaded" if _ops.has_cpu() else "not in use") in text
        names = [line.split("  ")[0] for line in text.splitlines()]
        for name in ("compiled part", "SIMD", "CPU", "GPU", "Triton", "Python", "optional"):
            assert name in names
        assert f"nibabel {nibabel.__version__}" in text

    def test_says_why_the_compiled_part_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_ops, "_missing", "lost in the post")
        assert "through torch: lost in the post" in cli.report()

    def test_shows_settings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("VOXCONV_CPU_LEVEL", "baseline")
        assert "VOXCONV_CPU_LEVEL=baseline" in dict(cli.environment())["settings"]

    def test_survives_a_broken_part(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken() -> bool:
            raise RuntimeError("driver on holiday")

        monkeypatch.setattr(torch.cuda, "is_available", broken)
        assert "unknown (RuntimeError: driver on holiday)" in cli.report()

    @pytest.mark.parametrize(
        ("flags", "level"),
        [
            ("avx512f avx512bw avx512cd avx512dq avx512vl avx2", "x86-64-v4"),
            ("avx2 bmi1 bmi2 f16c fma abm movbe", "x86-64-v3"),
            ("sse2", "x86-64 baseline"),
        ],
    )
    def test_simd_level(self, monkeypatch: pytest.MonkeyPatch, flags: str, level: str) -> None:
        monkeypatch.setattr(cli, "_cpuinfo", lambda key: flags)
        assert dict(cli.environment())["SIMD"].startswith(f"{level}, torch uses")

    def test_simd_level_that_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cli, "_cpuinfo", lambda key: "avx2 bmi1 bmi2 f16c fma abm movbe")
        for asked, level in (("baseline", "x86-64 baseline"), ("x86-64-v4", "x86-64-v3")):
            monkeypatch.setenv("VOXCONV_CPU_LEVEL", asked)
            assert dict(cli.environment())["SIMD"].startswith(level)

    def test_a_reader_that_stops(self) -> None:
        command = f"{sys.executable} -m voxconv | true"
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert "Traceback" not in done.stderr

    def test_as_a_program(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "voxconv"], capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith("voxconv ")


class TestArguments:
    @pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"]])
    def test_help(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 0
        text = capsys.readouterr().out
        words = ["demo"] if len(arguments) == 1 else ["--volume", "--threads", "--size", "--out"]
        for word in words:
            assert word in text

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["dmeo"], "dmeo"),
            (["demo", "--size", "big"], "'big' is not a whole number"),
            (["demo", "--threads", "0"], "0 is not positive"),
            (["demo", "--steps", "-1"], "-1 is not positive"),
            (["demo", "--out"], "--out"),
        ],
    )
    def test_bad_arguments(
        self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


class TestDemo:
    def test_on_a_small_volume(
        self, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "picture.png"
        arguments = ["--volume", str(scan), "--out", str(out), "--size", "16", "--threads", "1"]
        code = cli.main(["demo", *arguments, "--steps", "1"])
        text = capsys.readouterr().out
        assert code == 0
        assert "block 16 x 16 x 16 voxels" in text
        assert "of 68 3-D convolutions swapped" in text
        assert "1 threads" in text
        for word in ("voxconv, channels_last_3d", "peak memory", "gradients", "Medians"):
            assert word in text
        assert out.read_bytes().startswith(b"\x89PNG")

    def test_reports_a_disagreement(
        self,
        scan: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        x = torch.ones(1, 3, 16, 16, 16)
        runs = [
            demo.Run(name, x * value, {"w": torch.ones(1)}, 1.0, 1.0, 2.0, None)
            for name, value in (("torch", 1.0), ("voxconv", 1.1))
        ]
        none = voxconv.convert(torch.nn.ReLU())
        monkeypatch.setattr(demo, "compare", lambda *_, **__: (runs, none))
        code = cli.main(["demo", "--volume", str(scan), "--out", str(tmp_path / "a.png")])
        assert code == 1
        assert "please report" in capsys.readouterr().out

    def _fails(self, capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> str:
        """The message: one line, exit code 2, and no traceback."""
        out = [] if "--out" in arguments else ["--out", str(tmp_path / "out.png")]
        assert cli.main(["demo", *arguments, *out]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = captured.err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("voxconv demo: ")
        return lines[0]

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("absent.nii.gz", None),
            ("noise.nii.gz", b"\x00\x01\x02" * 500),
            ("empty.nii", b""),
            ("broken.nii.gz", gzip.compress(b"not a header" * 100)),
            ("notes.txt", b"hello"),
        ],
    )
    def test_unreadable_volume(
        self,
        name: str,
        content: bytes | None,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        assert f"cannot read {path}" in self._fails(capsys, tmp_path, "--volume", str(path))

    def test_truncated_volume(
        self, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        scan.write_bytes(scan.read_bytes()[:-200])
        assert f"cannot read {scan}" in self._fails(capsys, tmp_path, "--volume", str(scan))

    def test_a_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "a folder" in self._fails(capsys, tmp_path, "--volume", str(tmp_path))

    def test_an_empty_series(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = _save(tmp_path / "none.nii", torch.zeros(8, 8, 8, 0))
        assert "(8, 8, 8, 0)" in self._fails(capsys, tmp_path, "--volume", str(path))

    def test_complex_voxels(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = _save(tmp_path / "complex.nii", torch.rand(8, 8, 8, dtype=torch.complex64))
        assert "complex64" in self._fails(capsys, tmp_path, "--volume", str(path))

    def test_colours(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "colours.nii"
        voxels = torch.zeros(8, 8, 8, 3, dtype=torch.uint8).numpy()
        voxels = voxels.view([("R", "u1"), ("G", "u1"), ("B", "u1")])[..., 0]
        nibabel.save(nibabel.Nifti1Image(voxels, torch.eye(4).numpy()), path)
        assert "not real numbers" in self._fails(capsys, tmp_path, "--volume", str(path))

    def test_no_contrast(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = _save(tmp_path / "flat.nii", torch.full((8, 8, 8), 3.0))
        assert "same value, 3" in self._fails(capsys, tmp_path, "--volume", str(path))

    def test_flat_image(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = _save(tmp_path / "slice.nii", torch.rand(8, 8))
        assert "(8, 8)" in self._fails(capsys, tmp_path, "--volume", str(path))

    def test_too_small(
        self, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        message = self._fails(capsys, tmp_path, "--volume", str(scan), "--size", "8")
        assert "at least 16, got 8" in message

    @pytest.mark.parametrize("out", ["nowhere/demo.png", "demo.txt", "demo"])
    def test_bad_out(self, out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / out
        assert f"cannot write {path}" in self._fails(capsys, tmp_path, "--out", str(path))

    def test_out_is_a_folder(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "demo.png").mkdir()
        assert "a folder" in self._fails(capsys, tmp_path, "--out", str(tmp_path / "demo.png"))

    @pytest.mark.parametrize("package", ["nibabel", "matplotlib", "tqdm"])
    def test_missing_package(
        self,
        package: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setitem(sys.modules, package, None)
        message = self._fails(capsys, tmp_path)
        assert f"needs {package}" in message
        assert "pip install 'voxconv[demo]'" in message


class TestVolume:
    def test_axes_and_values(self, scan: Path) -> None:
        volume = demo.load_volume(scan)
        assert volume.shape == (14, 16, 18)
        torch.testing.assert_close(volume, _ball().permute(2, 1, 0))

    def test_flipped_axes_are_put_right(self, tmp_path: Path) -> None:
        affine = torch.diag(torch.tensor([-1.0, 1.0, 1.0, 1.0])).numpy()
        ramp = torch.arange(10.0)[:, None, None].expand(10, 8, 8)
        path = tmp_path / "flipped.nii"
        nibabel.save(nibabel.Nifti1Image(ramp.numpy(), affine), path)
        assert torch.equal(demo.load_volume(path)[0, 0], torch.arange(9.0, -1.0, -1.0))

    @pytest.mark.parametrize("shape", [(9, 8, 7, 2), (9, 8, 7, 1, 3)])
    def test_first_of_several(self, shape: tuple[int, ...], tmp_path: Path) -> None:
        volumes = _ball(shape).clone()
        volumes[..., 1:] = 0
        path = _save(tmp_path / "series.nii.gz", volumes)
        torch.testing.assert_close(demo.load_volume(path), _ball((9, 8, 7)).permute(2, 1, 0))

    def test_holes_are_filled(self, tmp_path: Path) -> None:
        volume = _ball()
        volume[0, 0, 0], volume[1, 0, 0] = torch.nan, torch.inf
        loaded = demo.load_volume(_save(tmp_path / "holes.nii", volume))
        torch.testing.assert_close(loaded, _ball().permute(2, 1, 0))

    @pytest.mark.parametrize("scale", [1e36, 1e300])
    def test_voxels_of_any_size(self, scale: float, tmp_path: Path) -> None:
        volume = demo.load_volume(_save(tmp_path / "huge.nii", _ball().double() * scale))
        block, _ = demo.prepare(volume, 64)
        usual, _ = demo.prepare(_ball().permute(2, 1, 0), 64)
        torch.testing.assert_close(block, usual, atol=1e-5, rtol=1e-5)

    def test_no_axis_is_too_short(self) -> None:
        volume = torch.zeros(20, 20, 20)
        volume[9, 9, 9] = 1
        block, labels = demo.prepare(volume, 64)
        assert block.shape[2:] == labels.shape[1:] == (16, 16, 16)
        assert block.isfinite().all()

    def test_the_scan_of_nibabel(self) -> None:
        block, labels = demo.prepare(demo.load_volume(None), 96)
        assert block.shape[2:] == labels.shape[1:]
        assert min(block.shape[2:]) >= 24
        assert max(block.shape) <= 96

    @pytest.mark.parametrize("size", [16, 20, 64])
    def test_prepare(self, size: int) -> None:
        volume = torch.full((40, 50, 20), -1000.0)
        volume[6:32, 5:45, 3:18] = torch.rand(26, 40, 15) * 100
        block, labels = demo.prepare(volume, size)
        expected = [-(-min(n, size) // 8) * 8 for n in (26, 40, 15)]
        assert list(block.shape) == [1, 1, *expected]
        assert list(labels.shape) == [1, *expected]
        head = block[labels[:, None] > 0]
        assert abs(head.mean()) < 0.1
        assert abs(head.std() - 1) < 0.1
        darker, brighter = (labels == 1).sum(), (labels == 2).sum()
        assert abs(int(darker) - int(brighter)) <= 1
        assert block.abs().max() <= 5


class TestNetwork:
    @pytest.fixture(autouse=True)
    def _no_monai(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "monai.networks.nets", None)

    def test_ours(self) -> None:
        model, name = _demo_network.build_network()
        assert "of our own" in name
        x = torch.randn(1, 1, 16, 8, 8)
        assert model(x).shape == (1, _demo_network.CLASSES, 16, 8, 8)
        again, _ = _demo_network.build_network()
        assert torch.equal(model(x), again(x))

    def test_monai_is_preferred(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: dict[str, Any] = {}

        def mednext(**arguments: Any) -> torch.nn.Module:
            asked.update(arguments)
            return torch.nn.ReLU()

        nets = types.SimpleNamespace(MedNeXt=mednext)
        monkeypatch.setitem(sys.modules, "monai", types.ModuleType("monai"))
        monkeypatch.setitem(sys.modules, "monai.networks", types.ModuleType("networks"))
        monkeypatch.setitem(sys.modules, "monai.networks.nets", nets)
        model, name = _demo_network.build_network()
        assert isinstance(model, torch.nn.ReLU)
        assert "MONAI" in name
        assert asked["kernel_size"] == _demo_network.KERNEL


def test_peak_growth_sees_what_is_freed_again() -> None:
    size = 100 * 2**20
    grown = demo.peak_growth(lambda: torch.ones(size // 4).sum())
    assert grown is None or 0.9 * size < grown < 1.5 * size


def test_measure_restores_the_weights() -> None:
    model = torch.nn.Conv3d(1, 3, 1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ticks: list[int] = []
    run = demo.measure(
        "x",
        model,
        torch.randn(1, 1, 4, 4, 4),
        torch.zeros(1, 4, 4, 4, dtype=torch.long),
        steps=4,
        tick=lambda: ticks.append(1),
    )
    assert len(ticks) == 2 + demo.FORWARDS + 4
    assert run.forward > 0
    assert run.step > 0
    assert set(run.gradients) == {"weight", "bias"}
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert demo.difference(run, run) == (0, 0)
