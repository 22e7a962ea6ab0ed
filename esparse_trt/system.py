"""Facts about the machine that a build records: versions, hardware, memory."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
from importlib import metadata
from pathlib import Path

import torch

from esparse_trt.errors import EsparseError

_PACKAGES = (
    "torch", "transformers", "onnx", "onnxruntime", "onnx-graphsurgeon", "polygraphy", "tensorrt",
    "tensorrt-rtx-cu13",
)  # fmt: skip


def require_gpu(fix: str) -> None:
    """See that torch has a GPU to measure.

    Args:
        fix: what the error tells to do.

    Raises:
        EsparseError: there is none, or torch was built without CUDA.
    """
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else f"; torch {torch.__version__} is built without CUDA"
        raise EsparseError(f"this measures an NVIDIA GPU, and torch finds none{built}", fix=fix)


def environment() -> dict[str, str]:
    """Versions of everything that shapes a build, and the machine it ran on."""
    facts = {
        "esparse-trt": package_version("esparse-trt") or "source tree",
        "python": platform.python_version(),
    }
    facts |= {name: found for name in _PACKAGES if (found := package_version(name))}
    facts["platform"] = platform.platform()
    facts["cpu"] = f"{_cpu_model()}, {os.cpu_count()} logical cores"
    facts["gpu"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return facts


def package_version(name: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def reset_peak_rss() -> None:
    """Start a new measurement of `peak_rss_bytes`, where the kernel allows it (Linux)."""
    with contextlib.suppress(OSError):  # then the peak is that of the whole process: an upper bound
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss_bytes() -> int:
    """Largest resident set since `reset_peak_rss`, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
