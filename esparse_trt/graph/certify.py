"""The certify stage: what the recipe made sparse is N:M along K in memory order, in every file that holds it.

The checkpoint keeps the original channel order, so its weights are looked at as `W[:, π]`. In an ONNX file K
is the axis that the MatMul or Gemm sums over, found from the node that reads the weight: a tensor that is
sparse along N only does not pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from esparse_trt.artifacts import BuildDir, load_manifest, sha256_file, write_atomic
from esparse_trt.checkpoint import weight_files
from esparse_trt.errors import CheckFailed, EsparseError
from esparse_trt.graph.certify_file import WeightRow, certify_file, require_conforming, table
from esparse_trt.graph.graph import OnnxGraph
from esparse_trt.graph.groups import as_numpy, examine
from esparse_trt.graph.signature import reduction_axis
from esparse_trt.graph.weights import Checkpoint
from esparse_trt.model import load_config
from esparse_trt.progress import track
from esparse_trt.recipe import Recipe, parse_recipe
from esparse_trt.records import (
    CertifiedTensor,
    CertifyRecord,
    EngineRecord,
    ExportRecord,
    LayerRecord,
    PruneRecord,
)
from esparse_trt.sparsity.pattern import Pattern

__all__ = ["WeightRow", "certify", "certify_build", "certify_file", "require_conforming", "table"]


class _Weight(NamedTuple):
    """A stored weight of a pruned layer."""

    where: Path
    name: str
    values: NDArray
    k_axis: int
    layer: LayerRecord


def certify(recipe: Recipe, folder: BuildDir, pruned: PruneRecord, exported: ExportRecord) -> CertifyRecord:
    """Check the checkpoint, `explicit.onnx` and `sparse.onnx`, and write `certificate.json`.

    Raises:
        CheckFailed: a tensor is missing or not N:M; names file, tensor, row and group with its values.
        EsparseError: a file cannot be read.
    """
    record = _certificate(recipe, folder, pruned, exported)
    write_atomic(folder.certificate, record.model_dump_json(indent=1))
    return record


def certify_build(path: Path) -> CertifyRecord:
    """Check a finished build again, and that nothing changed since: the files are what the engine was given.

    Raises:
        CheckFailed: as `certify`; or a file is not the one that was certified, or the engine was built from.
        EsparseError: not a build folder, or its stages up to certify have not run.
    """
    folder = BuildDir(path)
    manifest = load_manifest(folder)
    if manifest is None:
        raise EsparseError("no build.json there", where=path, fix="give the folder of a build")
    certified = manifest.record("certify", CertifyRecord)
    record = _certificate(
        parse_recipe(manifest.recipe, base=folder.root, where=folder.manifest),
        folder,
        manifest.record("prune", PruneRecord),
        manifest.record("export", ExportRecord),
    )
    _require_same(record.sha256, certified.sha256, folder, "was certified")
    if "engine" in manifest.stages:
        engine = manifest.record("engine", EngineRecord).sparse
        if engine:
            _require_same(record.sha256, engine.onnx_sha256, folder, f"{engine.file} was built from")
    return record


def _require_same(now: dict[str, str], then: dict[str, str], folder: BuildDir, what: str) -> None:
    for file, digest in then.items():
        if now.get(file) != digest:
            raise CheckFailed(
                f"this is not the file that {what}: its SHA-256 is {now.get(file)}, then it was {digest}",
                where=folder.root / file,
                fix="run `esparse-trt build` again --from export",
            )


def _certificate(
    recipe: Recipe, folder: BuildDir, pruned: PruneRecord, exported: ExportRecord
) -> CertifyRecord:
    layers = [layer for layer in pruned.layers if layer.pattern]
    onnx_files = (folder.explicit_onnx, folder.sparse_onnx)
    weights = (
        weight
        for source in (
            _checkpoint_weights(folder, layers),
            *(_onnx_weights(path, layers, exported) for path in onnx_files),
        )
        for weight in source
    )
    total = len(layers) * (1 + len(onnx_files))
    tensors = [_check(weight, folder) for weight in track(weights, "certify", total=total, unit="tensor")]
    files = [*weight_files(folder.checkpoint), folder.permutation]
    for path in (*onnx_files, folder.packed_onnx):  # the packed layout can hold nothing but 2:4
        files += [path, path.with_name(f"{path.name}.data")]
    return CertifyRecord(
        pattern=recipe.prune.pattern,
        tensors=tensors,
        sha256={str(file.relative_to(folder.root)): sha256_file(file) for file in files if file.exists()},
    )


def _checkpoint_weights(folder: BuildDir, layers: list[LayerRecord]) -> Iterator[_Weight]:
    """The checkpoint's weights with their channels in the order in which they were pruned."""
    config = load_config(folder.checkpoint)
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    tied = dict(architecture._tied_weights_keys or {}) if config.tie_word_embeddings else {}
    checkpoint = Checkpoint(folder.checkpoint, prefix=architecture.base_model_prefix, tied=tied)
    orders = load_file(folder.permutation) if folder.permutation.exists() else {}
    for layer in layers:
        name = f"{layer.name}.weight"
        try:
            values = as_numpy(checkpoint.read(name))
        except EsparseError as error:
            raise CheckFailed(error.what, where=error.where, fix=error.fix) from error
        _check_shape(folder.checkpoint, name, values.shape, layer.shape)
        if layer.name in orders:
            values = np.take(values, orders[layer.name].numpy(), axis=1)
        yield _Weight(folder.checkpoint, name, values, 1, layer)


def _onnx_weights(path: Path, layers: list[LayerRecord], exported: ExportRecord) -> Iterator[_Weight]:
    """The weights of an ONNX file as stored."""
    graph = OnnxGraph(path)
    for layer in layers:
        name = exported.linears.get(layer.name, f"{layer.name}.weight")
        if name not in graph.initializers:
            raise CheckFailed(
                f"the file has no tensor {name!r}, which holds the pruned layer {layer.name}",
                where=path,
                fix="run the build again --from export",
            )
        k_axis = reduction_axis(graph, name)
        if k_axis is None:
            raise CheckFailed(
                f"no MatMul or Gemm multiplies by {name!r}, so its K axis is unknown",
                where=path,
                fix="run the build again --from export",
            )
        values = graph.read(name)
        _check_shape(path, name, values.shape, layer.shape if k_axis == 1 else layer.shape[::-1])
        yield _Weight(path, name, values, k_axis, layer)


def _check_shape(path: Path, name: str, actual: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if actual != expected:
        raise CheckFailed(
            f"tensor {name!r} has shape {list(actual)}, but the layer that was pruned needs {list(expected)}",
            where=path,
            fix="run the build again --from export",
        )


def _check(weight: _Weight, folder: BuildDir) -> CertifiedTensor:
    """The certificate of one weight."""
    assert weight.layer.pattern is not None
    pattern = Pattern.parse(weight.layer.pattern)
    pattern.check(weight.values.shape[weight.k_axis], weight.layer.name)
    found = examine(weight.values, weight.k_axis, pattern)
    if found.violation:
        raise CheckFailed(
            f"tensor {weight.name!r} is not {pattern} along K: {found.violation}",
            where=weight.where,
            fix="the file was changed after pruning, or by the toolchain: run the build again --from prune",
        )
    return CertifiedTensor(
        where=str(weight.where.relative_to(folder.root)),
        name=weight.name,
        shape=list(weight.values.shape),
        pattern=str(pattern),
        groups=found.groups,
        sparsity=found.sparsity,
    )
