"""The pack stage: `packed.onnx`, in which sparse layers are `esparse::SparseGemm` with compressed weights.

Layers of one module that read the same tensor (q/k/v, gate and up) become one GEMM, their rows one after the
other, and a Split. A permutation that stayed explicit becomes an input of the operator. What cannot be packed
stays as it is, with its reason in the record. The result is proved equal to `sparse.onnx` by running both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from esparse_trt.artifacts import BuildDir, write_atomic
from esparse_trt.errors import CheckFailed
from esparse_trt.graph import es24, sparse_gemm
from esparse_trt.graph.graph import OnnxGraph, keep, write_model
from esparse_trt.graph.linears import Group, Linear, find_groups, known_groups
from esparse_trt.graph.proof import LIMIT, example_feeds, outputs, relative_l2
from esparse_trt.progress import note
from esparse_trt.records import ExportRecord, PackedGemm, PackRecord


def pack(folder: BuildDir, exported: ExportRecord) -> PackRecord:
    """Write `packed.onnx` from `sparse.onnx`, and prove that both compute the same.

    The file is written only if at least one layer can be packed.

    Raises:
        CheckFailed: the outputs of the two files differ.
        EsparseError: a file cannot be read, or the disk is full.
    """
    graph = OnnxGraph(folder.sparse_onnx)
    groups, dense = find_groups(graph, exported)
    note(f"{len(exported.linears) - len(dense)} of {len(exported.linears)} linear layers can be packed")
    path = folder.packed_onnx
    size, logits_error = 0, None
    if groups:
        size = write_model(packed_model(graph, groups), _Weights(graph, groups).read, path)
        logits_error = _prove_equal(folder.sparse_onnx, path, exported)
    else:
        for stale in (path, path.with_name(f"{path.name}.data")):
            stale.unlink(missing_ok=True)
    return PackRecord(
        layout=es24.LAYOUT,
        gemms=[_record(group) for group in groups],
        dense=dense,
        permutations={group.gather.node.name: group.name for group in groups if group.gather},
        logits_error=logits_error,
        bytes=size,
    )


# --- the packed model ----------------------------------------------------------------------------------


def packed_model(
    graph: OnnxGraph, groups: list[Group], choices: Mapping[str, str] | None = None
) -> ModelProto:
    """The graph with the groups in the place of their linear layers; its weights are yet to be written.

    Args:
        graph: of `sparse.onnx`.
        groups: the GEMMs.
        choices: name of a group -> the plugin's kernels for it.
    """
    choices = choices or {}
    model = ModelProto()
    model.CopyFrom(graph.model)
    firsts = {group.linears[0].nodes[0].name: group for group in groups}
    gone = {node.name for group in groups for linear in group.linears for node in linear.nodes}
    gone |= {group.gather.node.name for group in groups if group.gather}
    nodes: list[NodeProto] = []
    for node in graph.model.graph.node:
        if node.name in firsts:
            group = firsts[node.name]
            nodes += _nodes(group, choices.get(group.name, ""))
        elif node.name not in gone:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    sparse_gemm.add_functions(model)

    read = {name for node in nodes for name in node.input}
    made = {name for node in nodes for name in node.output}
    new = [name for group in groups for node in _nodes(group) for name in node.input[1:]]
    keep(model.graph.initializer, lambda tensor: tensor.name in read)
    keep(model.graph.value_info, lambda value: value.name in made)
    model.graph.initializer.extend(TensorProto(name=name) for name in new if name not in graph.initializers)
    return model


def _nodes(group: Group, choices: str = "") -> list[NodeProto]:
    """The GEMM of a group, and the Split that hands every layer its channels."""
    outputs = [linear.output for linear in group.linears]
    whole = outputs[0] if len(outputs) == 1 else group.name
    gemm = sparse_gemm.make_node(
        group.name,
        group.gather.input if group.gather else group.linears[0].source,
        whole,
        shape=group.shape,
        bias=group.linears[0].bias is not None,
        permutation=group.gather is not None,
        choices=choices,
    )
    if len(outputs) == 1:
        return [gemm]
    sizes = [whole, f"{group.name}.sizes"]
    return [gemm, helper.make_node("Split", sizes, outputs, name=f"{group.name}/split", axis=-1)]


def write_engine_model(
    folder: BuildDir, exported: ExportRecord, packed: PackRecord, choices: Mapping[str, str]
) -> None:
    """Write `engine.onnx`: `packed.onnx` with the kernels for each GEMM, and the other layers as they were.

    It has no weights of its own: they are in the data file of `packed.onnx`, and in that of `sparse.onnx`
    where a layer stays dense.

    Args:
        folder: of the build.
        exported: which layers there are.
        packed: which GEMMs `packed.onnx` has.
        choices: GEMMs that are to run sparse -> the plugin's kernels; "" leaves them to its heuristic.
    """
    graph = OnnxGraph(folder.sparse_onnx)
    groups = [group for group in known_groups(graph, exported, packed) if group.name in choices]
    model = packed_model(graph, groups, choices)
    stored = {t.name: t for t in onnx.load(folder.packed_onnx, load_external_data=False).graph.initializer}
    for tensor in model.graph.initializer:
        if tensor.name in stored:
            tensor.CopyFrom(stored[tensor.name])
    write_atomic(folder.engine_onnx, model.SerializeToString())


class _Weights:
    """The initializers of the packed model, made when they are asked for."""

    def __init__(self, graph: OnnxGraph, groups: list[Group]) -> None:
        self.graph = graph
        self.groups = {f"{group.name}.values": group for group in groups}
        self.ready: dict[str, NDArray] = {}
        for group in groups:
            biases = [graph.read(linear.bias) for linear in group.linears if linear.bias]
            if biases:
                self.ready[f"{group.name}.bias"] = np.concatenate(biases)
            if group.gather:
                self.ready[f"{group.name}.permutation"] = group.gather.table.astype(np.int32)
            rows = [linear.shape[0] for linear in group.linears]
            self.ready[f"{group.name}.sizes"] = np.array(rows, dtype=np.int64)

    def read(self, name: str) -> NDArray:
        """One initializer; the metadata of a group is asked for after its values."""
        if name in self.groups:
            return self._compress(self.groups[name])
        return self.ready.pop(name) if name in self.ready else self.graph.read(name)

    def _compress(self, group: Group) -> NDArray:
        """The values of a group; its metadata, which comes with them, waits in `ready`."""
        parts = [self._compress_one(linear) for linear in group.linears]
        self.ready[f"{group.name}.metadata"] = es24.tile([places for _, places in parts], group.shape[1])
        return np.concatenate([values for values, _ in parts])

    def _compress_one(self, linear: Linear) -> tuple[NDArray, NDArray[np.uint16]]:
        stored = self.graph.read(linear.weight)
        return es24.compress(stored if linear.k_axis else stored.T, linear.module)


# --- proof and record ----------------------------------------------------------------------------------


def _prove_equal(sparse: Path, packed: Path, exported: ExportRecord) -> float:
    """Run both files on the same feeds; the largest distance of the logits."""
    feeds = example_feeds(exported.inputs, int(exported.outputs[0].shape[-1]))
    logits = 0.0
    for expected, found in zip(outputs(sparse, feeds), outputs(packed, feeds), strict=True):
        for name, value in expected.items():
            error = relative_l2(found[name], value)
            if not error <= LIMIT:
                raise CheckFailed(
                    f"packing changed {name!r} by {error:.2e} relative to what it was (limit {LIMIT:.0e})",
                    where=packed,
                    fix="please report this with the recipe",
                )
            logits = max(logits, error) if name == "logits" else logits
    return logits


def _record(group: Group) -> PackedGemm:
    rows, channels = group.shape
    return PackedGemm(
        name=group.name,
        operator=_nodes(group)[0].op_type,
        layers=[linear.module for linear in group.linears],
        shape=group.shape,
        bytes=es24.packed_bytes(rows, channels),
        dense_bytes=2 * rows * channels,
    )
