"""`libesparse_trt_plugin.so`: find it, make sure that it is the right one, register it with a TensorRT.

An engine whose ONNX file has `esparse::SparseGemm` nodes needs the plugin when it is built, and in every
process that loads it. Any tool of TensorRT's can do that with the library alone; this module also checks what
such tools cannot know: that library and package belong together.

Needs numpy and Polygraphy only, like `engine.runner`.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from esparse_trt.engine import flavour as flavours
from esparse_trt.engine.flavour import INSTALL, TITLE, Flavour, installed_version
from esparse_trt.engine.libraries import BUILD, PLUGIN, find_library
from esparse_trt.engine.logs import captured, gist
from esparse_trt.errors import EsparseError

OPERATORS = ("SparseGemm", "SparseGemmBias", "SparseGemmPermute", "SparseGemmBiasPermute")
OLDEST_RTX = (1, 7)  # the first whose ONNX parser takes IPluginV3 plugins

_REBUILD = f"build the library again: {BUILD}"
_loaded: dict[Flavour, Plugin] = {}
_kept: list[Any] = []  # libraries that must stay open


class _About(ctypes.Structure):  # plugins/include/esparse/plugin.h
    _fields_ = [
        ("tensorrt_major", ctypes.c_int32),
        ("version", ctypes.c_char_p),
        ("layout", ctypes.c_char_p),
        ("kernel_set", ctypes.c_char_p),
    ]


@dataclass(frozen=True)
class Plugin:
    """A plugin library, and what it says of itself.

    Attributes:
        path: of the library.
        version: of esparse-trt that it was built from.
        layout: of the compressed weights that it reads.
        kernel_set: digest of its kernels; a tuning table is valid for one.
        tensorrt_major: of the TensorRT headers that it was compiled with.
    """

    path: Path
    version: str
    layout: str
    kernel_set: str
    tensorrt_major: int


def inspect(path: Path) -> Plugin:
    """Open a library and ask it what it is; no TensorRT is needed.

    Raises:
        EsparseError: it cannot be opened, or is no plugin of esparse-trt.
    """
    if not path.is_file():
        fix = f"name an existing one in engine.plugin_library, or none to have it found; {BUILD} makes it"
        raise EsparseError("there is no such library", where=path, fix=fix)
    try:
        library = ctypes.CDLL(str(path.resolve()))
    except OSError as error:
        raise EsparseError(f"the library cannot be loaded: {error}", where=path, fix=_REBUILD) from error
    try:
        about = library.esparse_about_plugin
    except AttributeError as error:
        raise EsparseError(
            "not a plugin library of esparse-trt: it has no function esparse_about_plugin",
            where=path,
            fix=_REBUILD,
        ) from error
    about.restype = ctypes.POINTER(_About)
    said = about().contents
    return Plugin(
        path, said.version.decode(), said.layout.decode(), said.kernel_set.decode(), said.tensorrt_major
    )


def find(library: Path | None = None, flavour: Flavour | None = None) -> Plugin:
    """The library that this package works with: the one given, or the one that is found.

    Args:
        library: its path; none: where `engine.libraries` finds it.
        flavour: the TensorRT that it must fit; none: any.

    Raises:
        EsparseError: there is none, it cannot be opened, it belongs to another version of the package, or it
            does not fit the installed version of the flavour.
    """
    from esparse_trt.graph.es24 import LAYOUT

    plugin = inspect(library if library is not None else find_library(PLUGIN))
    try:
        package = metadata.version("esparse-trt")
    except metadata.PackageNotFoundError:  # a source tree on the path: nothing to compare with
        package = plugin.version
    if plugin.version != package:
        raise EsparseError(
            f"the library is of version {plugin.version}, esparse-trt is {package}",
            where=plugin.path,
            fix=_REBUILD,
        )
    if plugin.layout != LAYOUT:
        raise EsparseError(
            f"the library reads weights in the layout {plugin.layout}, esparse-trt writes {LAYOUT}",
            where=plugin.path,
            fix=_REBUILD,
        )
    version = installed_version(flavour) if flavour else None
    if flavour and version and (reason := unfit(plugin, flavour, version)):
        raise EsparseError(reason, where=plugin.path, fix=_REBUILD)
    return plugin


def load(flavour: Flavour, library: Path | None = None) -> Plugin:
    """Register the operators with a TensorRT, so that it can build and load engines with them.

    Args:
        flavour: which TensorRT.
        library: its path; none: where `engine.libraries` finds it.

    Raises:
        EsparseError: as `find`; or another library is registered.
    """
    plugin = find(library, flavour)
    known = _loaded.get(flavour)
    if known is not None:
        if known.path.resolve() != plugin.path.resolve():
            raise EsparseError(
                f"{known.path} is registered with {TITLE[flavour]} already",
                where=plugin.path,
                fix="use one plugin library in a process",
            )
        return known
    trt = flavours.activate(flavour)
    if flavour == "tensorrt_rtx":
        _answer_for_rtx(plugin.path)
    with captured(None) as errors:
        from polygraphy.backend.trt import get_trt_logger

        get_trt_logger()  # TensorRT's own default would print
        registry = trt.get_plugin_registry()
        if not _registered(registry):
            registry.load_library(str(plugin.path.resolve()))
        if not _registered(registry):
            found = f"{TITLE[flavour]} {trt.__version__} does not take the library"
            reason = gist(errors, EsparseError(found))
            raise EsparseError(
                found if reason == found else f"{found}: {reason}", where=plugin.path, fix=_REBUILD
            )
    _loaded[flavour] = plugin
    return plugin


def unfit(plugin: Plugin, flavour: Flavour, version: str) -> str | None:
    """Why the library cannot work with a version of TensorRT; none where it can.

    TensorRT asks for plugins compiled with headers of its major version. What TensorRT-RTX shares with a
    plugin is the same in the headers of 10 and 11 but for the logger, which the library takes in both forms.
    """
    major, minor = (int(part) for part in version.split(".")[:2])
    if flavour == "tensorrt_rtx":
        if (major, minor) < OLDEST_RTX:
            oldest = ".".join(map(str, OLDEST_RTX))
            return f"TensorRT-RTX {version} takes no plugins, {oldest} does: {INSTALL[flavour]}"
        return None
    if major != plugin.tensorrt_major:
        return (
            f"the library was compiled with headers of TensorRT {plugin.tensorrt_major}, this is TensorRT "
            f"{version}"
        )
    return None


def _registered(registry: Any) -> bool:
    names = {creator.name for creator in registry.all_creators if creator.plugin_namespace == "esparse"}
    return names.issuperset(OPERATORS)


def _answer_for_rtx(library: Path) -> None:
    """Let TensorRT-RTX's ONNX parser find TensorRT-RTX.

    When it meets a plugin it opens `libtensorrt_rtx.so`, a name that the Python packages lack, and aborts the
    process if that fails. The loader takes what is already open under that name: an empty library that needs
    `libtensorrt_rtx.so.1`, which is built with the plugin.
    """
    alias = library.resolve().parent / "rtx" / "libtensorrt_rtx.so"
    try:
        _kept.append(ctypes.CDLL(str(alias)))
    except OSError as error:
        raise EsparseError(
            f"TensorRT-RTX needs {alias.name} beside the plugin library: {error}", where=alias, fix=_REBUILD
        ) from error
