"""The export stage: `dense.onnx` and `explicit.onnx` from one trace.

Both have the same inputs and outputs, and the same nodes but for the permutations. `explicit.onnx` holds the
pruned weights with their input channels in permuted order, `W' = W[:, pi]`, and before them a `Gather` that
puts the activation into the same order, `x' = x[..., pi]`. Then `x' W'^T = x W^T`: correct by construction,
whatever `fold` makes of it later.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxscript import ir
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from esparse_trt import model as models
from esparse_trt.artifacts import BuildDir
from esparse_trt.errors import EsparseError
from esparse_trt.graph.feeds import read_specs
from esparse_trt.graph.trace import TracedGraph, trace
from esparse_trt.graph.weights import Checkpoint, write_model
from esparse_trt.graph.wrapper import family_of
from esparse_trt.layout import read_config
from esparse_trt.progress import note
from esparse_trt.recipe import Recipe
from esparse_trt.records import ExportRecord, PruneRecord
from esparse_trt.sections import ModelSection


def require_exportable(section: ModelSection) -> None:
    """Refuse by its configuration a model that `export` could not trace; `build` asks before pruning it.

    What is wrong with the model's files is left to pruning, which reads them all.

    Raises:
        EsparseError: the architecture cannot be exported.
    """
    try:
        config = read_config(section)
    except EsparseError:
        return
    family_of(config)


def export(recipe: Recipe, folder: BuildDir, pruned: PruneRecord) -> ExportRecord:
    """Write `dense.onnx` from the dense model and `explicit.onnx` from the pruned checkpoint.

    Raises:
        EsparseError: the architecture cannot be exported, a weight is missing or does not fit the dtype, a
            permutation does not fit its layer, or the disk is full.
    """
    record = export_models(
        models.resolve(recipe.model, folder),
        folder.checkpoint,
        read_permutations(folder.permutation),
        dense_path=folder.dense_onnx,
        explicit_path=folder.explicit_onnx,
        dtype=recipe.export.dtype,
        opset=recipe.export.opset,
    )
    lost = [layer.name for layer in pruned.layers if layer.pattern and layer.name not in record.linears]
    assert not lost, f"pruned layers without a node in the graph: {lost}"
    return record


def export_models(
    dense: Path,
    pruned: Path,
    permutations: Mapping[str, Tensor],
    *,
    dense_path: Path,
    explicit_path: Path,
    dtype: str,
    opset: int,
) -> ExportRecord:
    """Export two checkpoints of one architecture from one trace.

    Args:
        dense: Hugging Face folder of the dense model.
        pruned: the same architecture, pruned.
        permutations: module name -> order of its input channels in `explicit.onnx`, int64 `[K]`.
        dense_path: ONNX file of the dense model.
        explicit_path: ONNX file of the pruned model with explicit permutations.
        dtype: `float16` or `float32`, of weights, activations and cache.
        opset: ONNX operator set.
    """
    config = models.load_config(dense)
    family_of(config)
    architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    ties = dict(architecture._tied_weights_keys or {}) if config.tie_word_embeddings else {}
    # A pruned or permuted head is no longer the embedding, so the graph must hold both.
    heads = {parameter.removesuffix(".weight") for parameter in ties}
    config.tie_word_embeddings = bool(
        ties and models.load_config(pruned).tie_word_embeddings and heads.isdisjoint(permutations)
    )
    note(f"tracing {config.model_type}, {config.num_hidden_layers} layers")
    traced = trace(config, dtype=getattr(torch, dtype), opset=opset)

    prefix = architecture.base_model_prefix
    dense_bytes = write_model(traced, dense_path, Checkpoint(dense, prefix=prefix, tied=ties), {})
    gathers, orders = insert_permutations(traced, permutations)
    explicit_bytes = write_model(traced, explicit_path, Checkpoint(pruned, prefix=prefix, tied=ties), orders)
    inputs, outputs = read_specs(explicit_path)
    return ExportRecord(
        dtype=dtype,
        opset=opset,
        inputs=inputs,
        outputs=outputs,
        linears={module: traced.weight_of(module) for module in traced.linears},
        gathers=gathers,
        bytes={"dense": dense_bytes, "explicit": explicit_bytes},
    )


def read_permutations(path: Path) -> dict[str, Tensor]:
    """Module name -> order of its input channels; empty if nothing was permuted."""
    if not path.exists():
        return {}
    try:
        return load_file(path)
    except SafetensorError as error:
        raise EsparseError(
            f"cannot read the permutations: {error}", where=path, fix="run the build again --from prune"
        ) from error


def insert_permutations(
    traced: TracedGraph, permutations: Mapping[str, Tensor]
) -> tuple[list[str], dict[str, Tensor]]:
    """Put a `Gather` before the permuted linear layers, one for all that read a tensor in the same order.

    Args:
        traced: changed in place.
        permutations: module name -> int64 `[K]`; the identity needs no node and gets none.

    Returns:
        The names of the `Gather` nodes, and initializer name -> order of its input channels.

    Raises:
        EsparseError: a name is no linear layer of the model, or a tensor no permutation of its channels.
    """
    unknown = sorted(permutations.keys() - traced.linears.keys())
    if unknown:
        raise EsparseError(
            f"no linear layer is called {unknown[0]!r}",
            where="permutation.safetensors",
            fix="run the build again --from prune",
        )
    gathered: dict[tuple[str, bytes], ir.Value] = {}
    orders: dict[str, Tensor] = {}
    names = []
    for module, node in traced.linears.items():
        order = permutations.get(module)
        if order is None or torch.equal(order, torch.arange(len(order))):
            continue
        source = node.inputs[0]
        assert source is not None and source.shape is not None and source.name is not None
        _check_permutation(module, order, source.shape[-1])
        key = (source.name, order.numpy().tobytes())
        if key not in gathered:
            gathered[key] = _insert_gather(traced.model.graph, module, node, source, order)
            names.append(f"{module}.permute")
        node.replace_input_with(0, gathered[key])
        orders[traced.weight_of(module)] = order
    return names, orders


def _insert_gather(graph: ir.Graph, module: str, node: ir.Node, source: ir.Value, order: Tensor) -> ir.Value:
    name = f"{module}.permutation"
    indices = ir.Value(
        name=name,
        shape=ir.Shape(order.shape),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.Tensor(order.numpy(), name=name),
    )
    graph.initializers.add(indices)
    output = ir.Value(name=f"{module}.permute", shape=source.shape, type=source.type)
    gather = ir.Node(
        "",
        "Gather",
        [source, indices],
        [ir.AttrInt64("axis", -1)],
        outputs=[output],
        name=f"{module}.permute",
    )
    graph.insert_before(node, gather)
    return output


def _check_permutation(module: str, order: Tensor, channels: int | ir.SymbolicDim) -> None:
    assert isinstance(channels, int)  # only batch, sequence and past are dynamic
    if order.dtype != torch.int64 or not np.array_equal(order.sort().values, np.arange(channels)):
        raise EsparseError(
            f"{order.dtype} tensor of shape {list(order.shape)} is no permutation of the {channels} input "
            f"channels of {module}",
            where="permutation.safetensors",
            fix="run the build again --from prune",
        )
