"""Which TensorRT is at hand, and how Polygraphy is pointed at it.

Two flavours share one API (DESIGN section 10): `tensorrt`, which needs a GPU to build, and `tensorrt_rtx`
(TensorRT for RTX), which builds on any machine and compiles its kernels when the engine is loaded. Everything
that differs between them is decided here and in `build.config_loader`.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

from esparse_trt.errors import EsparseError

Flavour = Literal["tensorrt", "tensorrt_rtx"]

OLDEST: dict[Flavour, tuple[int, int]] = {"tensorrt": (10, 13), "tensorrt_rtx": (1, 6)}
TITLE: dict[Flavour, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
INSTALL: dict[Flavour, str] = {
    "tensorrt": "pip install 'esparse-trt[tensorrt]'",
    "tensorrt_rtx": "pip install 'esparse-trt[rtx]'",
}
NEITHER = (
    f"no TensorRT is installed: {INSTALL['tensorrt_rtx']} builds engines on any machine, "
    f"{INSTALL['tensorrt']} on one with an NVIDIA GPU"
)

# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR and CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT of cuda.h
_ATTRIBUTES = (75, 76, 16)


@dataclass(frozen=True)
class Gpu:
    """The first NVIDIA GPU of this machine; `cuda` is the newest CUDA version that its driver supports."""

    name: str
    capability: tuple[int, int]
    memory_gib: float
    cuda: str
    multiprocessors: int = 0


@dataclass(frozen=True)
class Choice:
    """The flavour that builds the engines, or why none does."""

    flavour: Flavour | None
    version: str | None
    skipped: str | None


@cache
def find_gpu() -> Gpu | str:
    """The GPU, or the reason why there is none, asked from the driver itself (no CUDA toolkit needed)."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver: libcuda.so.1 cannot be loaded"
    if status := driver.cuInit(0):
        return f"no usable NVIDIA GPU: cuInit returned CUDA error {status}"
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    if count.value == 0:
        return "no NVIDIA GPU is visible (is CUDA_VISIBLE_DEVICES set?)"
    device, version, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(128)
    driver.cuDeviceGet(ctypes.byref(device), 0)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    driver.cuDriverGetVersion(ctypes.byref(version))
    facts = []
    for attribute in _ATTRIBUTES:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        facts.append(value.value)
    major, minor, multiprocessors = facts
    cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Gpu(name.value.decode(), (major, minor), memory.value / 2**30, cuda, multiprocessors)


def installed_version(flavour: Flavour) -> str | None:
    """The version of the flavour's Python module; none when it is not installed.

    Raises:
        EsparseError: it is installed but cannot be imported.
    """
    if find_spec(flavour) is None:
        return None
    try:
        return str(importlib.import_module(flavour).__version__)
    except (ImportError, OSError, AttributeError) as error:
        raise EsparseError(
            f"{TITLE[flavour]} is installed but cannot be imported: {error}",
            where=f"Python module {flavour}",
            fix=f"reinstall it: {INSTALL[flavour]}",
        ) from error


def unusable(flavour: Flavour) -> str | None:
    """Why the flavour cannot build engines on this machine; none when it can."""
    try:
        version = installed_version(flavour)
    except EsparseError as error:
        return error.what
    if version is None:
        return f"{TITLE[flavour]} is not installed: {INSTALL[flavour]}"
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < OLDEST[flavour]:
        oldest = ".".join(map(str, OLDEST[flavour]))
        return f"{TITLE[flavour]} {version} is older than {oldest}: {INSTALL[flavour]}"
    gpu = find_gpu()
    if flavour == "tensorrt" and isinstance(gpu, str):
        return f"TensorRT {version} builds engines only on a machine with a GPU ({gpu})"
    return None


def choose(asked: Literal["auto", "tensorrt", "tensorrt_rtx", "none"]) -> Choice:
    """The flavour for `engine.flavour` of a recipe; `auto` prefers TensorRT proper.

    Raises:
        EsparseError: a flavour asked for by name cannot be used here.
    """
    if asked == "none":
        return Choice(None, None, "the recipe sets engine.flavour: none")
    order: tuple[Flavour, ...] = ("tensorrt", "tensorrt_rtx") if asked == "auto" else (asked,)
    reasons = {}
    for flavour in order:
        reason = unusable(flavour)
        if reason is None:
            return Choice(flavour, installed_version(flavour), None)
        reasons[flavour] = reason
    if asked != "auto":
        raise EsparseError(
            reasons[asked],
            where=f"engine.flavour: {asked}",
            fix="install it, or set engine.flavour to auto (takes what is there) or none (builds no engine)",
        )
    if all(find_spec(flavour) is None for flavour in order):
        return Choice(None, None, NEITHER)
    return Choice(None, None, "; ".join(reasons.values()))


def activate(flavour: Flavour) -> ModuleType:
    """Point Polygraphy at the flavour and return its module (`tensorrt` or `tensorrt_rtx`).

    Polygraphy decides between the two when it is first imported, by an environment variable; another stage
    may have imported it already, so its modules that hold a lazily imported TensorRT get the right one.
    """
    rtx = flavour == "tensorrt_rtx"
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1" if rtx else "0"
    import polygraphy.backend.trt.util as trt_util
    from polygraphy import config
    from polygraphy.mod.trt_importer import lazy_import_trt

    if rtx != config.USE_TENSORRT_RTX:
        config.USE_TENSORRT_RTX = rtx
        trt_util.TRT_LOGGER = None  # an object of the other flavour
        for name, module in list(sys.modules.items()):
            held = getattr(module, "trt", None) if name.partition(".")[0] == "polygraphy" else None
            if held is not None and not isinstance(held, ModuleType):  # polygraphy.backend.trt is a module
                module.trt = lazy_import_trt()  # type: ignore[attr-defined]
    return importlib.import_module(flavour)
