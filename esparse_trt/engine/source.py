"""What the sparse engine is built from: `engine.onnx` for the plugin, or `sparse.onnx`; and why.

`engine.choice` decides for each packed GEMM by the tuner's table and the recipe's traffic. Rows of the table
go into the engine as a node's `choices`. What stays out of the plugin is left to TensorRT's own kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from esparse_trt.artifacts import BuildDir
from esparse_trt.engine import flavour as flavours
from esparse_trt.engine import plugin as plugins
from esparse_trt.engine.choice import Layer, choose
from esparse_trt.engine.flavour import Flavour
from esparse_trt.engine.table import Device, default_path, load_table, usable_table
from esparse_trt.errors import EsparseError
from esparse_trt.graph.pack import write_engine_model
from esparse_trt.progress import note
from esparse_trt.recipe import Recipe
from esparse_trt.records import EngineLayer, ExportRecord, PackRecord, PluginRecord, Reason
from esparse_trt.sections import EngineSection

DTYPES = ("float16", "bfloat16")
_USE_HALF = "set export.dtype: float16"


@dataclass(frozen=True)
class Source:
    """The ONNX file of the sparse engine; `no_plugin` is why its layers are not in the plugin."""

    onnx: Path
    plugin: PluginRecord | None
    layers: list[EngineLayer]
    no_plugin: str | None


def require_usable(recipe: Recipe) -> flavours.Choice:
    """Refuse what the recipe names and this machine lacks: `build` asks before the hours of pruning.

    Returns:
        which TensorRT will build the engines.

    Raises:
        EsparseError: the TensorRT, the plugin or the tuning table that the recipe asks for cannot be used.
    """
    section = recipe.engine
    choice = flavours.choose(section.flavour)
    if choice.flavour is None or section.sparse_gemm in ("native", "dense"):
        return choice
    if recipe.export.dtype not in DTYPES:
        _insist(section, _no_kernels(recipe.export.dtype), _USE_HALF)
    table = _table_path(section)
    if table is not None and table.is_file():
        load_table(table)
    try:
        plugins.find(section.plugin_library, choice.flavour)
    except EsparseError as error:
        if section.plugin_library is not None:
            raise
        _insist(section, _in_words(error), error.fix)
    return choice


def choose_source(
    recipe: Recipe,
    folder: BuildDir,
    exported: ExportRecord,
    packed: PackRecord | None,
    flavour: Flavour,
) -> Source:
    """Decide, and write `engine.onnx` if the plugin is used; it is then registered with the flavour.

    Raises:
        EsparseError: as `require_usable`; or the recipe asks for the plugin and no layer could be packed.
    """
    section = recipe.engine
    layers = [Layer(gemm.name, gemm.shape) for gemm in packed.gemms] if packed else []
    if section.sparse_gemm in ("native", "dense"):
        chosen = choose(layers, None, recipe.traffic, wish=section.sparse_gemm, native=True)
        return Source(
            folder.sparse_onnx, None, chosen, f"the recipe sets engine.sparse_gemm: {section.sparse_gemm}"
        )
    if packed is None or not layers:
        return _without(section, folder, "no layer could be packed", "the record of stage `pack` says why")
    if exported.dtype not in DTYPES:
        return _without(section, folder, _no_kernels(exported.dtype), _USE_HALF, layers)
    path = _table_path(section)
    try:
        plugin = plugins.load(flavour, section.plugin_library)
    except EsparseError as error:
        if section.plugin_library is not None:
            raise
        return _without(section, folder, _in_words(error), error.fix, layers)
    table = usable_table(path, plugin.kernel_set, _device()) if path else None
    chosen = choose(
        layers, table, recipe.traffic, dtype=exported.dtype, wish=section.sparse_gemm, native=True
    )  # fmt: skip
    ours = {layer.name: layer.choices or "" for layer in chosen if layer.kernel == "plugin"}
    if not ours:
        reason = f"dense is faster in every layer, by {path}"
        note(f"the sparse engine does not use the plugin: {reason}")
        return Source(folder.sparse_onnx, None, chosen, reason)
    note(
        f"{len(ours)} of {len(layers)} packed GEMMs run in the plugin (kernels {plugin.kernel_set}), "
        f"{sum(map(bool, ours.values()))} by measured choices"
    )
    write_engine_model(folder, exported, packed, ours)
    record = PluginRecord(
        library=str(plugin.path.resolve()),
        version=plugin.version,
        layout=plugin.layout,
        kernel_set=plugin.kernel_set,
        table=str(path) if table is not None else None,
    )
    return Source(folder.engine_onnx, record, chosen, None)


def _no_kernels(dtype: str) -> str:
    return f"its kernels are for {' and '.join(DTYPES)}, the model is {dtype}"


def _in_words(error: EsparseError) -> str:
    return f"{error.where}: {error.what}" if error.where else error.what


def _insist(section: EngineSection, reason: str, fix: str | None) -> None:
    """Raise why the plugin cannot be used if the recipe asks for it."""
    if section.sparse_gemm == "plugin":
        raise EsparseError(reason, where="engine.sparse_gemm: plugin", fix=fix)


def _without(
    section: EngineSection, folder: BuildDir, reason: str, fix: str | None, layers: list[Layer] | None = None
) -> Source:
    """The engine without the plugin, unless the recipe asks for it."""
    _insist(section, reason, fix)
    note(f"the sparse engine does not use the plugin: {reason}")
    left = [
        EngineLayer(name=layer.name, kernel="native", code=Reason.no_plugin, reason=reason)
        for layer in layers or []
    ]
    return Source(folder.sparse_onnx, None, left, reason)


def _table_path(section: EngineSection) -> Path | None:
    """The recipe's table, or that of this machine's GPU; none on a machine without one."""
    if section.table is not None:
        if not section.table.is_file():
            raise EsparseError(
                "there is no such file", where=f"engine.table: {section.table}",
                fix="run `esparse-trt tune`, or leave the table out: the library has a heuristic",
            )  # fmt: skip
        return section.table
    gpu = flavours.find_gpu()
    return None if isinstance(gpu, str) else default_path(gpu.name)


def _device() -> Device | None:
    gpu = flavours.find_gpu()
    if isinstance(gpu, str):
        return None
    major, minor = gpu.capability
    return Device(gpu.name, 10 * major + minor, gpu.multiprocessors, driver="", cuda=gpu.cuda)
