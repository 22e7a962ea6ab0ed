"""Builds the CUDA kernels into the package, as esparse_trt/lib/*.so, where nvcc is found.

ESPARSE_BUILD_PLUGINS: `auto` (the default) builds them when nvcc and cmake are on PATH, `1` insists, `0`
never does. CMAKE_ARGS: more arguments for cmake, such as -DTENSORRT_INCLUDE_DIR=... for the TensorRT plugin.

An editable install never builds them: the package finds what `cmake --build build` leaves in the source tree.
"""

import os
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build"


@cache
def plugins_wanted() -> bool:
    """Whether this build includes the kernels; says why when it does not."""
    wish = os.environ.get("ESPARSE_BUILD_PLUGINS", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"ESPARSE_BUILD_PLUGINS is {wish!r}, must be auto, 0 or 1")
    missing = [tool for tool in ("nvcc", "cmake") if shutil.which(tool) is None]
    if wish == "1" and missing:
        raise SystemExit(f"ESPARSE_BUILD_PLUGINS is 1, but {' and '.join(missing)} cannot be found on PATH")
    if wish == "auto" and missing:
        print(f"esparse: no {' and '.join(missing)} on PATH: the CUDA kernels are not built", file=sys.stderr)
    return wish != "0" and not missing


def build_plugins(package: Path) -> None:
    """Compile `plugins/` and install its libraries below `package`."""
    # pip hides installed packages through PYTHONPATH; cmake asks Python for pip and for CUTLASS's headers.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    arguments = shlex.split(os.environ.get("CMAKE_ARGS", ""))
    for command in (
        ["cmake", "-S", ROOT, "-B", BUILD, *generator, f"-DPython3_EXECUTABLE={sys.executable}", *arguments],
        ["cmake", "--build", BUILD],
        ["cmake", "--install", BUILD, "--prefix", package, "--strip"],
    ):
        subprocess.run(list(map(str, command)), check=True, env=environment)


class BuildPy(build_py):
    """Copies the package, then adds the libraries."""

    def run(self) -> None:  # noqa: D102
        super().run()
        if not self.editable_mode and plugins_wanted():
            build_plugins(Path(self.build_lib).resolve() / "esparse_trt")


class PlatformDistribution(Distribution):
    """With libraries it is for one platform."""

    def has_ext_modules(self) -> bool:  # noqa: D102
        return plugins_wanted()


class BdistWheel(bdist_wheel):
    """The libraries do not know Python: with them a wheel is still for every version of it."""

    def get_tag(self) -> tuple[str, str, str]:  # noqa: D102
        return ("py3", "none", super().get_tag()[2])


setup(distclass=PlatformDistribution, cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
