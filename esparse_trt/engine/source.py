"""What the sparse engine is built from: `engine.onnx` for the plugin, or `sparse.onnx`; and why.

Sparse or dense is decided for each packed GEMM, once: its weights are never stored twice. Where the tuner has
measured, a GEMM is left dense if nothing makes it faster at the optimum of the profiles; elsewhere it runs
sparse, as it takes 0.5625 of the memory. Rows of the tuner's table go into the engine as a node's `choices`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from esparse_trt.artifacts import BuildDir
from esparse_trt.engine import flavour as flavours
from esparse_trt.engine import plugin as plugins
from esparse_trt.engine.flavour import Flavour
from esparse_trt.engine.table import Device, Table, choices, decide, default_path, usable_table
from esparse_trt.errors import EsparseError
from esparse_trt.graph.pack import write_engine_model
from esparse_trt.progress import note
from esparse_trt.records import EngineLayer, ExportRecord, PackRecord, PluginRecord
from esparse_trt.sections import EngineSection

DTYPES = ("float16", "bfloat16")


@dataclass(frozen=True)
class Source:
    """The ONNX file of the sparse engine; `no_plugin` is why its layers are not in the plugin."""

    onnx: Path
    plugin: PluginRecord | None
    layers: list[EngineLayer]
    no_plugin: str | None


def choose_source(
    section: EngineSection,
    folder: BuildDir,
    exported: ExportRecord,
    packed: PackRecord | None,
    flavour: Flavour,
) -> Source:
    """Decide, and write `engine.onnx` if the plugin is used; it is then registered with the flavour.

    Raises:
        EsparseError: the recipe requires the plugin and it cannot be used; the recipe's tuning table is none.
    """
    if section.plugin == "none":
        return _without(section, folder, "the recipe sets engine.plugin: none")
    if packed is None or not packed.gemms:
        return _without(section, folder, "no layer could be packed", "the record of stage `pack` says why")
    if exported.dtype not in DTYPES:
        reason = f"its kernels are for {' and '.join(DTYPES)}, the model is {exported.dtype}"
        return _without(section, folder, reason, "set export.dtype: float16")
    path = _table_path(section)
    try:
        plugin = plugins.load(flavour, section.plugin_library)
    except EsparseError as error:
        reason = f"{error.where}: {error.what}" if error.where else error.what
        return _without(section, folder, reason, error.fix)
    table = usable_table(path, plugin.kernel_set, _device()) if path else None
    layers = _layers(section, exported, packed, table)
    chosen = {layer.name: layer.choices or "" for layer in layers if layer.sparse}
    if not chosen:
        return _without(section, folder, f"dense is faster in every layer, by {path}", layers=layers)
    note(
        f"{len(chosen)} of {len(layers)} packed GEMMs run in the plugin (kernels {plugin.kernel_set}), "
        f"{sum(map(bool, chosen.values()))} by measured choices"
    )
    write_engine_model(folder, exported, packed, chosen)
    record = PluginRecord(
        library=str(plugin.path.resolve()),
        version=plugin.version,
        layout=plugin.layout,
        kernel_set=plugin.kernel_set,
        table=str(path) if table is not None else None,
    )
    return Source(folder.engine_onnx, record, layers, None)


def _without(
    section: EngineSection,
    folder: BuildDir,
    reason: str,
    fix: str | None = None,
    layers: Sequence[EngineLayer] = (),
) -> Source:
    """The engine without the plugin, unless the recipe requires it."""
    if section.plugin == "required":
        raise EsparseError(reason, where="engine.plugin: required", fix=fix)
    note(f"the sparse engine does not use the plugin: {reason}")
    return Source(folder.sparse_onnx, None, list(layers), reason)


def _layers(
    section: EngineSection, exported: ExportRecord, packed: PackRecord, table: Table | None
) -> list[EngineLayer]:
    tokens = [profile.batch[1] * profile.sequence[1] for profile in section.profiles.values()]
    layers = []
    for gemm in packed.gemms:
        decision = decide(table, *gemm.shape, exported.dtype, tokens)
        layers.append(
            EngineLayer(
                name=gemm.name,
                sparse=decision.sparse or section.plugin == "required",
                choices=choices(table, *gemm.shape, exported.dtype),
                reason=decision.reason,
            )
        )
    return layers


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
