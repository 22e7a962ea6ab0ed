"""The model on tensors: the engine or the ONNX file, its data and its plugin, and their configuration."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from esparse_trt.artifacts import BuildDir
from esparse_trt.deploy.render import copy_template, render
from esparse_trt.errors import EsparseError
from esparse_trt.recipe import Recipe
from esparse_trt.records import EngineRecord, ExportRecord, TensorSpec

DTYPES = {"float16": "TYPE_FP16", "float32": "TYPE_FP32", "int64": "TYPE_INT64", "int32": "TYPE_INT32"}


def write_network(
    recipe: Recipe,
    folder: BuildDir,
    exported: ExportRecord,
    target: Path,
    backend: str,
    limit: int,
    plugin: str | None,
) -> None:
    """Write one model of the repository.

    Args:
        recipe: its deploy section, and the profiles of the engine.
        folder: of the build.
        exported: inputs and outputs.
        target: folder of the model.
        backend: tensorrt, onnxruntime or python.
        limit: the largest batch of a request.
        plugin: file name of the library that the engine needs, if it does.

    Raises:
        EsparseError: the first dimension of an input or output is not the batch.
    """
    version = target / "1"
    version.mkdir(parents=True, exist_ok=True)
    if backend == "tensorrt":
        _link(folder.sparse_plan, version / "model.plan")
    else:
        copy_onnx(folder.sparse_onnx, version / "model.onnx")
    if backend == "python":
        copy_template("network_model.py", version / "model.py")
    config = render(
        "config.pbtxt.j2", name=target.name, backend=backend, limit=limit, instances=recipe.deploy.instances,
        profiles=list(recipe.engine.profiles), inputs=_tensors(exported.inputs),
        outputs=_tensors(exported.outputs), plugin=plugin,
    )  # fmt: skip
    (target / "config.pbtxt").write_text(config, encoding="utf-8")


def copy_plugin(engines: EngineRecord, target: Path) -> str | None:
    """Copy the library that the engine needs; its file name, or none.

    Raises:
        EsparseError: the library is no longer there.
    """
    if engines.sparse is None or engines.sparse.plugin is None:
        return None
    library = Path(engines.sparse.plugin.library)
    target.mkdir(parents=True)
    try:
        shutil.copyfile(library, target / library.name)
    except OSError as error:
        raise EsparseError(
            f"the plugin that the engine was built with cannot be copied: {error.strerror or error}",
            where=library,
            fix="put it back, or build the engine again: --from engine",
        ) from error
    return library.name


def _tensors(specs: list[TensorSpec]) -> list[dict[str, Any]]:
    """Names, Triton types and dimensions without the batch; dynamic ones are -1."""
    for spec in specs:
        if not spec.shape or spec.shape[0] != "batch":
            raise EsparseError(
                f"the first dimension of `{spec.name}` {spec.shape} is not the batch, as Triton needs it",
                where="sparse.onnx",
                fix="run the build again --from export",
            )
    return [
        {
            "name": spec.name,
            "type": DTYPES[spec.dtype],
            "dims": [size if isinstance(size, int) else -1 for size in spec.shape[1:]],
        }
        for spec in specs
    ]


def copy_onnx(source: Path, target: Path) -> None:
    """Copy an ONNX file and the data files it names, which keep their names.

    Copies, not hard links: onnx refuses to load data from a file with more than one link, and would refuse
    the original too.
    """
    graph = onnx.load(source, load_external_data=False).graph
    names = {ExternalDataInfo(t).location for t in graph.initializer if uses_external_data(t)}
    shutil.copyfile(source, target)
    for name in names:
        shutil.copyfile(source.with_name(name), target.with_name(name))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)
