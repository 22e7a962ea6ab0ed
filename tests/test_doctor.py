"""The diagnosis follows the machine: what is missing is named, with what follows from it and the remedy."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import torch

from esparse_trt import doctor
from esparse_trt.engine import flavour, libraries, plugin

GPU = flavour.Gpu("NVIDIA Test", (9, 0), 80.0, "13.0")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Pretend: a machine with this GPU (or the reason why there is none) and these TensorRT versions."""

    def pretend(gpu: flavour.Gpu | str, **versions: str) -> None:
        monkeypatch.setattr(flavour, "find_gpu", lambda: gpu)
        monkeypatch.setattr(flavour, "installed_version", versions.get)
        monkeypatch.setattr(flavour, "find_spec", versions.get)

    return pretend


def finding(name: str) -> doctor.Finding:
    (found,) = (one for one in doctor.diagnose() if one.name == name)
    return found


def test_this_machine_is_diagnosed_without_network_or_failure() -> None:
    findings = doctor.diagnose()
    names = [one.name for one in findings]
    assert len(names) == len(set(names))
    assert {"Python", "Python packages", "PyTorch", "NVIDIA GPU", "TensorRT", "TensorRT-RTX", "disk"} <= set(
        names
    )
    assert all(one.detail and one.consequence for one in findings)
    assert finding("Python packages").status == "ok"


def test_the_harness_of_zero_shot_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "package_version", lambda name: "0.4.9" if name == "lm-eval" else None)
    assert (finding("lm-eval").status, finding("lm-eval").detail) == ("ok", "0.4.9")
    monkeypatch.setattr(doctor, "package_version", lambda name: None)
    assert finding("lm-eval").status == "missing" and "[eval]" in finding("lm-eval").fix


def test_rtx_alone_builds_the_engines_but_triton_gets_the_onnx_model(machine) -> None:
    machine("no driver", tensorrt_rtx="1.7.1.116")
    assert (
        finding("TensorRT-RTX").status == "ok" and finding("TensorRT-RTX").consequence == "builds the engines"
    )
    proper = finding("TensorRT")
    assert (proper.status, proper.detail) == ("missing", "not installed")
    assert "not needed: TensorRT-RTX" in proper.consequence and "Triton" in proper.consequence
    assert finding("NVIDIA GPU").detail == "no driver"


def test_without_any_tensorrt_each_is_named_with_its_command(machine) -> None:
    machine("no driver")
    for name, extra in (("TensorRT", "tensorrt"), ("TensorRT-RTX", "rtx")):
        assert finding(name).status == "missing"
        assert "no engines are built" in finding(name).consequence
        assert finding(name).fix == f"pip install 'esparse-trt[{extra}]'"


def test_tensorrt_proper_on_a_gpu_comes_first(machine) -> None:
    machine(GPU, tensorrt="10.14.1", tensorrt_rtx="1.7.1")
    assert finding("TensorRT").consequence == "builds the engines"
    assert finding("TensorRT-RTX").consequence == "can build engines: set engine.flavour"
    assert "NVIDIA Test, compute capability 9.0, 80 GiB" in finding("NVIDIA GPU").detail


def test_tensorrt_that_cannot_be_used_is_a_warning_that_says_why(machine) -> None:
    machine("no driver", tensorrt="10.14.1")
    assert (
        finding("TensorRT").status == "warning"
        and "only on a machine with a GPU" in finding("TensorRT").detail
    )
    machine(GPU, tensorrt="8.6.1")
    assert finding("TensorRT").status == "warning" and "older than 10.13" in finding("TensorRT").detail


def test_a_gpu_without_sparse_tensor_cores_or_that_torch_does_not_see(machine, monkeypatch) -> None:
    machine(flavour.Gpu("NVIDIA Old", (7, 5), 16.0, "13.0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert finding("NVIDIA GPU").status == "warning" and "no faster" in finding("NVIDIA GPU").consequence
    assert finding("PyTorch").status == "warning" and "CUDA build" in finding("PyTorch").fix


def test_outdated_and_absent_packages_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch>=999", "not-there>=1", "numpy>=1", "not-asked-for; extra == 'eval'"]
    monkeypatch.setattr(metadata, "requires", lambda _: wanted)
    found = finding("Python packages")
    assert found.status == "missing" and "pip install" in found.fix
    assert (
        f"torch>=999 (found {torch.__version__})" in found.detail
        and "not-there>=1 (found none)" in found.detail
    )
    assert "numpy" not in found.detail and "not-asked-for" not in found.detail


PLUGIN = plugin.Plugin(Path("lib.so"), "0.1.0", "es24-v1", "0123456789ab", 10)


def test_a_plugin_library_that_is_not_there_is_named_with_its_remedy(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(libraries.VARIABLE, str(tmp_path))
    found = finding("Sparse-GEMM plugin")
    assert found.status == "missing" and f"not found in {tmp_path}" in found.detail
    assert "cmake" in found.fix


def test_the_plugin_library_must_fit_the_tensorrt_that_builds(machine, monkeypatch) -> None:
    monkeypatch.setattr(plugin, "find", lambda: PLUGIN)
    machine(GPU, tensorrt="10.14.1")
    found = finding("Sparse-GEMM plugin")
    assert (found.status, found.consequence) == ("ok", "runs packed layers in sparse engines")
    assert "kernels 0123456789ab" in found.detail
    machine(GPU, tensorrt="11.1.0")
    found = finding("Sparse-GEMM plugin")
    assert found.status == "warning" and "headers of TensorRT 10, this is TensorRT 11.1.0" in found.detail


def test_missing_compilers_do_not_matter_to_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda tool: None if tool == "nvcc" else f"/usr/bin/{tool}")
    found = finding("compilers")
    assert (found.status, found.detail) == ("missing", "no nvcc")
    assert "builds of recipes do not need them" in found.consequence


def test_little_memory_and_disk_are_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._memory(2 * 2**30).status == "warning"
    assert doctor._memory(8 * 2**30).status == "ok"
    usage = doctor.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    assert doctor._disk(tmp_path).status == "warning"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage._replace(free=2**40))
    assert doctor._disk(tmp_path).status == "ok"
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert "not writable" in doctor._disk(tmp_path).detail


@pytest.mark.parametrize(
    ("offline", "token", "status", "detail"),
    [
        (True, "t", "warning", "HF_HUB_OFFLINE"),
        (False, None, "warning", "not logged in"),
        (False, "t", "ok", "logged in"),
    ],
)
def test_the_hub(monkeypatch, offline: bool, token: str | None, status: str, detail: str) -> None:
    monkeypatch.setattr(doctor.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(doctor, "get_token", lambda: token)
    found = finding("Hugging Face hub")
    assert found.status == status and detail in found.detail
