# SPDX-License-Identifier: Apache-2.0
"""Builds voxconv._C: one stable-ABI library, CPU always, CUDA too where there is an nvcc.

VOXCONV_CUDA=0/1 leaves CUDA out / insists on it; VOXCONV_CUDA_ARCH (default below) lists
the architectures to build for, with +PTX where PTX is to be kept for later ones.
VOXCONV_BUILD=0 leaves the library out altogether: voxconv then runs everything through torch.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup
from torch.utils import cpp_extension

CUDA = os.environ.get("VOXCONV_CUDA", "")
ARCH = os.environ.get("VOXCONV_CUDA_ARCH", "80;90a;100+PTX").replace(".", "").split(";")


def files(*patterns: str) -> list[str]:
    return sorted(path.as_posix() for p in patterns for path in Path("csrc").glob(p))


def toolkit_root() -> str | None:
    """Root of the CUDA toolkit. nvcc itself is asked: the one on PATH may be a wrapper script."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    if home or nvcc is None:
        return home
    dry = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True)
    here = re.search(r"_HERE_=(\S+)", dry.stderr.decode())
    return str(Path(here[1]).parent if here else Path(nvcc).resolve().parent.parent)


def gencode() -> list[str]:
    pairs = [(a, "sm") for a in ARCH] + [(a, "compute") for a in ARCH if a.endswith("+PTX")]
    pairs = [(a.removesuffix("+PTX"), code) for a, code in pairs]
    return [f"-gencode=arch=compute_{a},code={code}_{a}" for a, code in pairs]


class Build(cpp_extension.BuildExtension):
    def build_extensions(self) -> None:
        # With a CPU-only torch, ninja does not see the headers of .cu files.
        newest = max(Path(header).stat().st_mtime for header in HEADERS)
        for built in Path(self.build_temp).glob("**/cuda/*.o"):
            if built.stat().st_mtime < newest:
                built.unlink()
        super().build_extensions()


HEADERS = files("**/*.h", "**/*.inc", "**/*.cuh")
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")  # free-threaded Python has no stable ABI
macros = [("TORCH_TARGET_VERSION", "0x020a000000000000")]  # torch 2.10
macros += [("Py_LIMITED_API", "0x030A0000")] if ABI3 else []  # spelt as torch spells it
quiet = ["-fvisibility=hidden", f"-ffile-prefix-map={Path.cwd()}/="]  # no build paths inside
flags = {"cxx": ["-O3", "-std=c++17", "-ffp-contract=fast", "-g0", *quiet]}
# Last on the line, so that libtorch stays needed: torch's CUDA symbols are reached through it.
link = ["-Wl,--no-as-needed", "-ltorch"] if sys.platform == "linux" else []
options = {"extra_link_args": link}

sources = files("**/*.cpp")
cuda_sources = files("cuda/*.cu") if CUDA != "0" else []
cuda_home = toolkit_root() if cuda_sources else None
if cuda_home:
    sources += cuda_sources
    cpp_extension.CUDA_HOME = cuda_home  # a CPU-only torch leaves it None and refuses .cu
    macros += [("USE_CUDA", None)]
    flags["nvcc"] = ["-O3", "-std=c++17", "-Xfatbin=-compress-all", *gencode()]
    flags["nvcc"] += [f"-Xcompiler={flag}" for flag in quiet]
    flags["nvcc"] += [f'-DVOXCONV_CUDA_ARCH="{";".join(ARCH)}"']
    options |= {"include_dirs": [f"{cuda_home}/include"], "library_dirs": [f"{cuda_home}/lib64"]}
    options["libraries"] = ["cudart_static", "rt", "dl", "pthread"]  # shared pins a CUDA major
elif CUDA == "1" and cuda_sources:
    raise SystemExit("VOXCONV_CUDA=1 but there is no nvcc: put it on PATH or set CUDA_HOME")

options |= {"define_macros": macros, "extra_compile_args": flags, "py_limited_api": ABI3}
extension = cpp_extension.CppExtension("voxconv._C", sources, depends=HEADERS, **options)
setup(
    packages=[*find_packages("python"), "voxconv.triton_kernels"],
    package_dir={"": "python", "voxconv.triton_kernels": "triton_kernels"},
    package_data={"voxconv": ["py.typed"]},
    ext_modules=[extension] if os.environ.get("VOXCONV_BUILD") != "0" else [],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ABI3 else {},
)
