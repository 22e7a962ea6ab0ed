"""`esparse-trt doctor`: what this machine has, what a build skips for want of the rest, and the remedy."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import onnxruntime
import psutil
import torch
from huggingface_hub import constants, get_token
from packaging.requirements import Requirement

from esparse_trt.engine import flavour, libraries, plugin
from esparse_trt.errors import EsparseError
from esparse_trt.system import package_version

Status = Literal["ok", "warning", "missing"]

_GIB = 2**30
_LEAST_MEMORY = 3 * _GIB  # what the quickstart may take
_LEAST_DISK = 1 * _GIB  # the quickstart's build folder is a fraction of this
_SHOWN = ("transformers", "onnx", "polygraphy", "datasets")
_PLAN = "`esparse-trt build RECIPE --dry-run` says what a recipe needs"


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis; `fix` is empty where there is nothing to mend."""

    name: str
    status: Status
    detail: str
    consequence: str
    fix: str = ""


def diagnose() -> list[Finding]:
    """Look at the Python packages, TensorRT, the GPU, the compilers, disk, memory and the model hub.

    Nothing is changed, and no network is used.
    """
    return [
        _python(),
        _packages(),
        _torch(),
        _onnxruntime(),
        _harness(),
        _gpu(),
        *(_tensorrt(name) for name in flavour.TITLE),
        _plugin(),
        _compilers(),
        _disk(Path.cwd()),
        _memory(psutil.virtual_memory().available),
        _hub(),
    ]


# --- Python --------------------------------------------------------------------------------------------


def _python() -> Finding:
    version = platform.python_version()
    if (3, 10) <= sys.version_info[:2] <= (3, 13):
        return Finding("Python", "ok", version, "supported")
    return Finding("Python", "warning", version, "not tested", "use Python 3.10 to 3.13")


def _packages() -> Finding:
    """Every dependency that the package declares, whether there and new enough."""
    if package_version("esparse-trt") is None:
        consequence = "the packages it needs are not checked"
        return Finding(
            "Python packages", "warning", "esparse-trt is not installed", consequence, "pip install ."
        )
    wrong = []
    for requirement in map(Requirement, metadata.requires("esparse-trt") or []):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = package_version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement} (found {version or 'none'})")
    if wrong:
        fix = "pip install --upgrade esparse-trt"
        return Finding("Python packages", "missing", "; ".join(wrong), "stages that need them fail", fix)
    shown = ", ".join(f"{name} {package_version(name)}" for name in _SHOWN)
    return Finding("Python packages", "ok", shown, "everything that is required is installed")


def _torch() -> Finding:
    if torch.cuda.is_available():
        detail = f"{torch.__version__}, {torch.cuda.device_count()} CUDA devices"
        return Finding("PyTorch", "ok", detail, "prunes on the GPU")
    detail, slow = f"{torch.__version__}, no CUDA", "prunes on the CPU, which suits small models"
    if isinstance(flavour.find_gpu(), str):
        return Finding("PyTorch", "ok", detail, slow)
    fix = "install a CUDA build of PyTorch: https://pytorch.org/get-started/locally"
    return Finding("PyTorch", "warning", f"{detail}, although there is a GPU", slow, fix)


def _onnxruntime() -> Finding:
    providers = ", ".join(p.removesuffix("ExecutionProvider") for p in onnxruntime.get_available_providers())
    return Finding(
        "ONNX Runtime", "ok", f"{onnxruntime.__version__}, {providers}", "compares dense and sparse"
    )


def _harness() -> Finding:
    version = package_version("lm-eval")
    if version is None:
        without = "not needed, but by recipes with verify.zeroshot"
        return Finding("lm-eval", "missing", "not installed", without, "pip install 'esparse-trt[eval]'")
    return Finding("lm-eval", "ok", version, "runs zero-shot tasks (verify.zeroshot)")


# --- engines -------------------------------------------------------------------------------------------


def _gpu() -> Finding:
    gpu = flavour.find_gpu()
    if isinstance(gpu, str):
        return Finding("NVIDIA GPU", "missing", gpu, "engines are built, not run; everything else works")
    major, minor = gpu.capability
    detail = f"{gpu.name}, compute capability {major}.{minor}, {gpu.memory_gib:.0f} GiB, CUDA {gpu.cuda}"
    if gpu.capability < (8, 0):
        return Finding("NVIDIA GPU", "warning", detail, "no sparse tensor cores: 2:4 weights are no faster")
    return Finding("NVIDIA GPU", "ok", detail, "engines are run")


def _tensorrt(name: flavour.Flavour) -> Finding:
    title, chosen = flavour.TITLE[name], flavour.choose("auto").flavour
    reason = flavour.unusable(name)
    if reason is None:
        role = "builds the engines" if chosen == name else "can build engines: set engine.flavour"
        return Finding(title, "ok", flavour.installed_version(name) or "", role)
    if chosen is not None:
        consequence = f"not needed: {flavour.TITLE[chosen]} builds the engines"
        if name == "tensorrt":
            consequence += ", but Triton is given the ONNX model, as it loads engines of TensorRT proper only"
    else:
        consequence = "no engines are built; Triton is given the ONNX model"
    status: Status = "missing" if _absent(name) else "warning"
    detail = "not installed" if status == "missing" else reason
    return Finding(title, status, detail, consequence, flavour.INSTALL[name])


def _absent(name: flavour.Flavour) -> bool:
    try:
        return flavour.installed_version(name) is None
    except EsparseError:
        return False


def _plugin() -> Finding:
    """The library, and whether it fits the TensorRT that builds the engines."""
    name, without = "Sparse-GEMM plugin", "sparse engines keep their zeros in memory and are hardly faster"
    try:
        found = plugin.find()
    except EsparseError as error:
        detail = f"{error.where}: {error.what}" if error.where else error.what
        return Finding(name, "missing", detail, without, error.fix or "")
    detail = f"{found.path}, kernels {found.kernel_set}, compiled for TensorRT {found.tensorrt_major}"
    chosen = flavour.choose("auto")
    if chosen.flavour is None or chosen.version is None:
        return Finding(name, "ok", detail, "waits for a TensorRT")
    if reason := plugin.unfit(found, chosen.flavour, chosen.version):
        return Finding(name, "warning", reason, without, f"build it again: {libraries.BUILD}")
    return Finding(name, "ok", detail, "runs packed layers in sparse engines")


def _compilers() -> Finding:
    """The tools that compile `plugins/`."""
    found = {tool: shutil.which(tool) for tool in ("nvcc", "cmake", "c++")}
    absent = [tool for tool, path in found.items() if path is None]
    if not absent:
        return Finding("compilers", "ok", ", ".join(found), "the kernels in plugins/ can be compiled")
    consequence = "the kernels in plugins/ are not compiled; builds of recipes do not need them"
    fix = "install the CUDA toolkit (nvcc), CMake and a C++ compiler"
    return Finding("compilers", "missing", f"no {', no '.join(absent)}", consequence, fix)


# --- resources -----------------------------------------------------------------------------------------


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    detail = f"{free / _GIB:.1f} GiB free in {folder}"
    if not os.access(folder, os.W_OK):
        return Finding("disk", "warning", f"{folder} is not writable", "builds here fail", "use --out")
    if free < _LEAST_DISK:
        return Finding("disk", "warning", detail, "even small builds may fail", "free space, or use --out")
    return Finding("disk", "ok", detail, _PLAN)


def _memory(available: int) -> Finding:
    detail = f"{available / _GIB:.1f} GiB available"
    if available < _LEAST_MEMORY:
        return Finding("memory", "warning", detail, "the quickstart wants 3 GiB", "close other programs")
    return Finding("memory", "ok", detail, _PLAN)


def _hub() -> Finding:
    if constants.HF_HUB_OFFLINE:
        consequence = "models and data sets of the hub come from its local cache only"
        return Finding(
            "Hugging Face hub", "warning", "HF_HUB_OFFLINE is set", consequence, "unset HF_HUB_OFFLINE"
        )
    if get_token() is None:
        consequence = "gated models, such as Llama 3, are refused"
        return Finding("Hugging Face hub", "warning", "not logged in", consequence, "hf auth login")
    return Finding("Hugging Face hub", "ok", "logged in", "gated models open once their licence is accepted")
