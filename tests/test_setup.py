"""What the package's build does about the CUDA kernels, without compiling any."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def build(tmp_path, wish):
    """Copy the package as `pip install .` does, with nothing on PATH."""
    environment = {**os.environ, "PATH": str(tmp_path), "ESPARSE_BUILD_PLUGINS": wish}
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("wish", ["auto", "0"])
def test_without_nvcc_the_package_is_built_without_kernels(tmp_path, wish):
    result = build(tmp_path, wish)
    assert result.returncode == 0, result.stderr
    assert ("no nvcc and cmake on PATH: the CUDA kernels are not built" in result.stderr) == (wish == "auto")
    assert (tmp_path / "lib/esparse_trt/cli.py").is_file()
    assert (tmp_path / "lib/esparse_trt/engine/tables/h100.json").is_file()
    assert not (tmp_path / "lib/esparse_trt/lib").exists()


@pytest.mark.parametrize(
    ("wish", "message"), [("1", "nvcc and cmake cannot be found on PATH"), ("yes", "must be auto, 0 or 1")]
)
def test_wishes_that_cannot_be_met_stop_the_build(tmp_path, wish, message):
    result = build(tmp_path, wish)
    assert result.returncode != 0
    assert message in result.stderr
