# SPDX-License-Identifier: Apache-2.0
"""What is shipped: one abi3 wheel with everything in it, which also works without its library."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import voxconv
from voxconv import _ops

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "voxconv/_C.abi3.so"

pytestmark = [
    pytest.mark.xdist_group("packaging"),  # the builds share one build directory
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree"),
]


def _python(*arguments: object, **environment: str) -> str:
    """Run a fresh interpreter in the source tree and return what it prints."""
    run = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this tree; objects that `make build` left are linked again, not compiled again."""
    out = tmp_path_factory.mktemp("wheel")
    build = ("build", "--build-lib", out / "lib")
    pack = ("bdist_wheel", "--skip-build", "--dist-dir", out, "--bdist-dir", out / "bdist")
    cuda = _ops.cuda_build()  # what `make build` compiled for
    same = {"VOXCONV_CUDA_ARCH": cuda.partition(" ")[0]} if cuda else {"VOXCONV_CUDA": "0"}
    _python("setup.py", "-q", *build, *pack, **same)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that holds what the wheel would put into site-packages."""
    out = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(out)
    return out


@pytest.mark.slow
def test_wheel_is_for_every_python(wheel: Path, unpacked: Path) -> None:
    name, version, python, abi, _platform = wheel.stem.split("-")
    assert (name, version) == ("voxconv", voxconv.__version__)
    assert (python, abi) == ("cp310", "abi3")
    (info,) = unpacked.glob("*.dist-info/WHEEL")
    assert Parser().parsestr(info.read_text())["Tag"].startswith("cp310-abi3-")


@pytest.mark.slow
def test_wheel_contents(unpacked: Path) -> None:
    found = {p.relative_to(unpacked).as_posix() for p in unpacked.rglob("*") if p.is_file()}
    python, triton = ROOT / "python", ROOT / "triton_kernels"
    wanted = {p.relative_to(python).as_posix() for p in (python / "voxconv").rglob("*.py")}
    wanted |= {f"voxconv/triton_kernels/{p.relative_to(triton)}" for p in triton.rglob("*.py")}
    wanted |= {"voxconv/py.typed", LIBRARY}
    package = {name for name in found if not name.split("/")[0].endswith(".dist-info")}
    assert package == wanted
    assert any(name.endswith("licenses/LICENSE") for name in found - package)


@pytest.mark.slow
def test_wheel_metadata(unpacked: Path) -> None:
    (path,) = unpacked.glob("*.dist-info/METADATA")
    metadata = Parser().parsestr(path.read_text())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    requires = [r for r in metadata.get_all("Requires-Dist") if "extra ==" not in r]
    assert sorted(requires) == ["numpy", "torch>=2.10"]


@pytest.mark.slow
def test_library_tells_nothing_of_the_build_machine(unpacked: Path) -> None:
    assert str(ROOT).encode() not in (unpacked / LIBRARY).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")
def test_library_is_abi_stable(unpacked: Path) -> None:
    pytest.importorskip("torch_abi_audit")
    audit = Path(sys.executable).with_name("torch-abi-audit")
    run = subprocess.run(
        [audit, "--check", "both", unpacked / "voxconv"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2.10" in run.stdout, run.stdout


def test_sdist_can_be_built_from(tmp_path: Path) -> None:
    _python("setup.py", "-q", "sdist", "-d", tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        found = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    wanted = {"setup.py", "pyproject.toml", "README.md", "LICENSE", "python/voxconv/py.typed"}
    sources = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "triton_kernels").rglob("*.py")]
    wanted |= {path.relative_to(ROOT).as_posix() for path in sources}
    assert wanted <= found
    assert not [name for name in found if name.endswith(".so")]


def test_version_is_that_of_pyproject() -> None:
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert voxconv.__version__ == version, "installed before the last change of version"


PROBE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import voxconv
import torch, voxconv.triton_kernels
x = torch.randn(1, 4, 5, 6, 7, requires_grad=True)
w = torch.randn(4, 1, 3, 3, 3, requires_grad=True)
b = torch.randn(4, requires_grad=True)
ours = voxconv.conv3d(x, w, b, padding=1, groups=4)
theirs = torch.nn.functional.conv3d(x, w, b, padding=1, groups=4)
torch.testing.assert_close(ours, theirs)
g = torch.randn_like(ours)
for a, e in zip(torch.autograd.grad(ours, (x, w, b), g), torch.autograd.grad(theirs, (x, w, b), g)):
    torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
print(voxconv.__file__)
print(voxconv.explain(x, w, b, padding=1, groups=4).backend)
print(sum(issubclass(warning.category, RuntimeWarning) for warning in caught))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "backend", "warned"),
    [("whole", "cpu", 0), ("missing", "torch", 1), ("broken", "torch", 1)],
)
def test_works_with_and_without_library(
    library: str, backend: str, warned: int, unpacked: Path, tmp_path: Path
) -> None:
    shutil.copytree(unpacked / "voxconv", tmp_path / "voxconv")
    path = tmp_path / LIBRARY
    if library == "missing":
        path.unlink()
    elif library == "broken":
        path.write_bytes(b"not a library")
    # Without site, because an editable installation would find the library that is not there.
    search = os.pathsep.join([str(tmp_path), *sys.path])
    out = _python("-S", "-c", PROBE, PYTHONPATH=search, VOXCONV_DISABLE_COMPILED="")
    where, used, warnings = out.split()
    assert Path(where).is_relative_to(tmp_path)
    assert (used, int(warnings)) == (backend, warned)
