"""Engines from ONNX files, through Polygraphy, with either flavour of TensorRT.

Networks are strongly typed: precision was decided at export. The sparse engine runs packed layers in our
plugin where that can be used (`engine.source`); the others get SPARSE_WEIGHTS, which allows (not forces)
TensorRT's own kernels for 2:4 weights. The dense engine is built without either, to compare with.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx as onnx_format
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from esparse_trt.artifacts import BuildDir, sha256_file, write_atomic
from esparse_trt.engine import flavour as flavours
from esparse_trt.engine.flavour import Flavour
from esparse_trt.engine.logs import captured, gist
from esparse_trt.engine.runner import EngineRunner
from esparse_trt.engine.shapes import Range, input_ranges
from esparse_trt.engine.source import Source, choose_source
from esparse_trt.errors import EsparseError
from esparse_trt.progress import note
from esparse_trt.recipe import Recipe
from esparse_trt.records import EngineFile, EngineRecord, ExportRecord, PackRecord
from esparse_trt.sections import EngineSection

Profiles = Mapping[str, Mapping[str, Range]]


def build_engines(
    recipe: Recipe, folder: BuildDir, exported: ExportRecord, packed: PackRecord | None = None
) -> EngineRecord:
    """Build `engine/dense.plan` and `engine/sparse.plan` from the ONNX files of the build.

    The profiles of the record are in the order of the engine's profile indices. Without a usable TensorRT the
    record says what to install and the rest of the build goes on.

    Args:
        recipe: its engine section.
        folder: of the build.
        exported: the inputs and the linear layers.
        packed: what `packed.onnx` holds; none: there is no such file.

    Raises:
        EsparseError: the flavour or the plugin that the recipe asks for cannot be used here; TensorRT refused
            the model.
    """
    section = recipe.engine
    choice = flavours.choose(section.flavour)
    if choice.flavour is None:
        note(f"engines skipped: {choice.skipped}")
        return EngineRecord(
            flavour=None, version=None, skipped=choice.skipped, dense=None, sparse=None, profiles={},
            runnable=False, not_runnable="there is no engine",
        )  # fmt: skip
    profiles = {name: input_ranges(exported.inputs, profile) for name, profile in section.profiles.items()}
    source = choose_source(recipe, folder, exported, packed, choice.flavour)
    dense = None
    if section.dense:
        plain = Source(folder.dense_onnx, None, [], None)
        dense = _build_one(folder, plain, folder.dense_plan, profiles, section, choice, False)
    native = section.sparse_gemm != "dense"
    sparse = _build_one(folder, source, folder.sparse_plan, profiles, section, choice, native)
    not_runnable = why_not_runnable(folder.sparse_plan, choice.flavour, section)
    if not_runnable:
        note(f"engines are not run here: {not_runnable}")
    return EngineRecord(
        flavour=choice.flavour,
        version=choice.version,
        skipped=None,
        dense=dense,
        sparse=sparse,
        no_plugin=source.no_plugin,
        profiles={
            name: {tensor: asdict(shapes) for tensor, shapes in ranges.items()}
            for name, ranges in profiles.items()
        },
        runnable=not_runnable is None,
        not_runnable=not_runnable,
    )


def _build_one(
    folder: BuildDir,
    source: Source,
    plan: Path,
    profiles: Profiles,
    section: EngineSection,
    choice: flavours.Choice,
    sparse_weights: bool,
) -> EngineFile:
    assert choice.flavour is not None
    note(f"building {plan.name} with {flavours.TITLE[choice.flavour]} {choice.version}")
    digests = {str(file.relative_to(folder.root)): sha256_file(file) for file in _files(source.onnx)}
    start = time.monotonic()
    engine = engine_bytes(
        source.onnx, choice.flavour, profiles,
        sparse_weights=sparse_weights,
        workspace_mib=section.workspace_mib,
        compute_capabilities=section.compute_capabilities,
        timing_cache=plan.with_name("timing.cache"),
        log=plan.with_name(f"build_{plan.stem}.log"),
    )  # fmt: skip
    write_atomic(plan, engine)
    return EngineFile(
        file=str(plan.relative_to(folder.root)),
        bytes=plan.stat().st_size,
        seconds=round(time.monotonic() - start, 3),
        onnx=str(source.onnx.relative_to(folder.root)),
        onnx_sha256=digests,
        sparse_weights=sparse_weights,
        plugin=source.plugin,
        layers=source.layers,
    )


def _files(onnx: Path) -> list[Path]:
    """An ONNX file and those of its data files that are there."""
    try:
        graph = onnx_format.load(onnx, load_external_data=False).graph
    except DecodeError:  # TensorRT's parser has the words for it
        return [onnx]
    names = {ExternalDataInfo(t).location for t in graph.initializer if uses_external_data(t)}
    return [onnx, *(path for name in sorted(names) if (path := onnx.with_name(name)).exists())]


def engine_bytes(
    onnx: Path,
    flavour: Flavour,
    profiles: Profiles,
    *,
    sparse_weights: bool,
    log: Path,
    timing_cache: Path,
    workspace_mib: int | None = None,
    compute_capabilities: list[str] | None = None,
) -> Any:
    """Parse an ONNX file and build the serialised engine, returned as TensorRT's own buffer.

    Args:
        onnx: the file; external data is looked for beside it.
        flavour: which TensorRT.
        profiles: name -> input -> range of shapes; their order gives the profile indices.
        sparse_weights: set the builder flag SPARSE_WEIGHTS.
        log: where TensorRT's messages go.
        timing_cache: measured kernel timings, read if there and written back (TensorRT proper only:
            TensorRT-RTX measures nothing while it builds).
        workspace_mib: limit of the scratch memory that a layer may use.
        compute_capabilities: the GPUs to build for, such as "8.9" (TensorRT-RTX only).

    Raises:
        EsparseError: the file cannot be parsed or the engine cannot be built; carries TensorRT's own message.
    """
    trt = flavours.activate(flavour)
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath
    from polygraphy.exception import PolygraphyException

    step = "parse"
    with captured(log) as errors:
        try:
            network = NetworkFromOnnxPath(str(onnx), strongly_typed=True)()
            step = "build an engine from"
            config = config_loader(
                trt, profiles, sparse_weights, workspace_mib, compute_capabilities, timing_cache
            )
            cache = str(timing_cache) if flavour == "tensorrt" else None
            return EngineBytesFromNetwork(network, config=config, save_timing_cache=cache)()
        except PolygraphyException as error:
            raise EsparseError(
                f"{flavours.TITLE[flavour]} {trt.__version__} cannot {step} it: {gist(errors, error)}",
                where=onnx,
                fix=f"{log} has the whole story; engine.flavour: none builds everything but the engines",
            ) from error


def config_loader(
    trt: Any,
    profiles: Profiles,
    sparse_weights: bool,
    workspace_mib: int | None,
    compute_capabilities: list[str] | None,
    timing_cache: Path,
) -> Any:
    """Polygraphy's loader of the builder configuration; the flavours differ only in what one alone has.

    TF32 is off: an fp32 export is meant to be compared at fp32 precision.
    """
    from polygraphy.backend.trt import CreateConfig, PostprocessConfig, Profile

    trt_profiles = []
    for ranges in profiles.values():
        trt_profile = Profile()
        for name, shapes in ranges.items():
            trt_profile.add(name, min=shapes.min, opt=shapes.opt, max=shapes.max)
        trt_profiles.append(trt_profile)
    common: dict[str, Any] = {"profiles": trt_profiles, "sparse_weights": sparse_weights}
    if workspace_mib is not None:
        common["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: workspace_mib << 20}
    if trt.__name__ == "tensorrt":
        cache = str(timing_cache) if timing_cache.exists() else None
        return CreateConfig(tf32=False, load_timing_cache=cache, **common)
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    targets = [
        (int(major), int(minor)) for major, minor in (c.split(".") for c in compute_capabilities or [])
    ]
    loader = CreateConfigRTX(compute_capabilities=targets or None, **common)
    return PostprocessConfig(loader, lambda builder, network, config: config.clear_flag(trt.BuilderFlag.TF32))


def why_not_runnable(plan: Path, flavour: Flavour, section: EngineSection) -> str | None:
    """Load the engine on this machine's GPU and run its smallest shape once; the reason if that fails."""
    if section.run == "never":
        return "the recipe sets engine.run: never"
    try:
        with EngineRunner(plan, flavour) as runner:
            runner(runner.smallest_feed())
    except EsparseError as error:
        return error.what
    return None
