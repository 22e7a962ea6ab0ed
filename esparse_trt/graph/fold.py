"""The fold stage: explicit permutations become changes of basis of the weights around them.

`explicit.onnx` is correct by construction and pays a Gather for every permutation. Here each of them is
traced to all weights around it (`flood.py`): if they can take the permutation up, they are reordered and the
Gather goes; if not, it stays and `fold_plan.json` says why. The result is proved equal by running it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from numpy.typing import NDArray
from onnx import ModelProto

from esparse_trt.artifacts import BuildDir, write_atomic
from esparse_trt.graph.basis import Basis, Refused, change_basis
from esparse_trt.graph.carry import carry_over
from esparse_trt.graph.feeds import PAST, PRESENT
from esparse_trt.graph.flood import Flood, Shared, explicit_permutations, flood
from esparse_trt.graph.graph import OnnxGraph, keep, write_model
from esparse_trt.graph.plan import FoldedGroup, FoldPlan, TensorBasis
from esparse_trt.graph.proof import compare, example_feeds, outputs
from esparse_trt.graph.signature import Node, Slot, reduction_axis
from esparse_trt.progress import note
from esparse_trt.recipe import Recipe
from esparse_trt.records import ExportRecord, FoldRecord
from esparse_trt.sparsity.pattern import Pattern, conforming_share


@dataclass
class Folding:
    """The outcome for a whole graph.

    Attributes:
        floods: what was folded, in the order in which it was.
        kept: Gather node -> why it stays.
        bases: tensor -> its changes of basis, of all floods together.
    """

    floods: list[Flood] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    bases: dict[str, list[Basis]] = field(default_factory=dict)

    def reorder(self, name: str, values: NDArray) -> NDArray:
        """An initializer of the explicit graph as the folded graph needs it."""
        for basis in self.bases.get(name, []):
            values = change_basis(values, basis)
        return values


def fold(recipe: Recipe, folder: BuildDir, exported: ExportRecord) -> FoldRecord:
    """Write `sparse.onnx` and `fold_plan.json`, and prove that nothing but the cost has changed.

    Raises:
        CheckFailed: outputs before and after folding differ.
        EsparseError: a file cannot be read, or the disk is full.
    """
    graph = OnnxGraph(folder.explicit_onnx)
    folding = fold_permutations(graph, exported, Pattern.parse(recipe.prune.pattern))
    plan = make_plan(graph, folding, exported)
    model = folded_model(graph, folding)
    size = write_model(model, lambda name: folding.reorder(name, graph.read(name)), folder.sparse_onnx)
    write_atomic(folder.fold_plan, plan.model_dump_json())
    folded = sum(len(group.gathers) for group in plan.folded)
    note(f"folded {folded} of {len(exported.gathers)} permutations", folded=folded, kept=len(plan.kept))

    feeds = example_feeds(exported.inputs, int(exported.outputs[0].shape[-1]))
    logits_error = compare(outputs(folder.explicit_onnx, feeds), folder.sparse_onnx, feeds, plan)
    with _dense_permuted(graph, folding, exported, model, folder) as path:
        dense_error = compare(outputs(folder.dense_onnx, feeds), path, feeds, plan)
    return FoldRecord(
        folded=folded, kept=plan.kept, logits_error=logits_error, dense_error=dense_error, bytes=size
    )


def fold_permutations(graph: OnnxGraph, exported: ExportRecord, pattern: Pattern) -> Folding:
    """Decide for every explicit permutation, in graph order, whether and how it folds; changes nothing."""
    left = explicit_permutations(graph, exported.gathers)
    folding = Folding()
    for name in list(left):
        if name not in left or name in folding.kept:
            continue
        try:
            found = flood(graph, left, name, folding.bases)
            _check_pattern(graph, found, exported, pattern)
        except Shared as reason:
            folding.kept.update(dict.fromkeys(reason.members, str(reason)))
            continue
        except Refused as reason:
            folding.kept[name] = str(reason)
            continue
        for gone in found.gathers:
            del left[gone]
        for tensor, bases in found.bases.items():
            folding.bases.setdefault(tensor, []).extend(bases)
        folding.floods.append(found)
    return folding


def _check_pattern(graph: OnnxGraph, found: Flood, exported: ExportRecord, pattern: Pattern) -> None:
    """Refuse to break the N:M groups of a pruned layer that reads the same tensor in its original order."""
    for module, weight in exported.linears.items():
        axis = reduction_axis(graph, weight)
        basis = next((b for b in found.bases.get(weight, []) if b.axis == axis), None)
        if basis is None or axis is None:
            continue
        values = graph.read(weight)
        before, after = (v if axis == 1 else v.T for v in (values, change_basis(values, basis)))
        if conforming_share(before, pattern) == 1.0 and conforming_share(after, pattern) < 1.0:
            raise Refused(f"would break the {pattern} groups of {module}, which reads the same tensor")


def make_plan(graph: OnnxGraph, folding: Folding, exported: ExportRecord) -> FoldPlan:
    """The record of a folding for those who read the folded model."""
    public = {name for name in folding.bases if name in exported.linears or name.startswith((PAST, PRESENT))}
    return FoldPlan(
        folded=[
            FoldedGroup(
                gathers=found.gathers,
                initializers={
                    name: sorted(basis.axis for basis in bases)
                    for name, bases in found.bases.items()
                    if name in graph.initializers
                },
            )
            for found in folding.floods
        ],
        kept=folding.kept,
        tensors={name: TensorBasis.of(folding.bases[name][0]) for name in sorted(public)},
    )


def folded_model(graph: OnnxGraph, folding: Folding) -> ModelProto:
    """The graph without the superfluous Gather nodes and their indices; its weights are yet to be written."""
    gone = {name for found in folding.floods for name in found.gathers}
    model = ModelProto()
    model.CopyFrom(graph.model)
    renamed = {node.output[0]: node.input[0] for node in model.graph.node if node.name in gone}
    indices = {node.input[1] for node in model.graph.node if node.name in gone}
    keep(model.graph.node, lambda node: node.name not in gone)
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    indices -= {name for node in model.graph.node for name in node.input}
    keep(model.graph.initializer, lambda tensor: tensor.name not in indices)
    keep(model.graph.value_info, lambda value: value.name not in renamed)
    return model


@contextmanager
def _dense_permuted(
    graph: OnnxGraph, folding: Folding, exported: ExportRecord, model: ModelProto, folder: BuildDir
) -> Iterator[Path]:
    """A temporary file with the folded graph and the dense weights, permuted like the pruned ones.

    The explicit permutations only move channels, so this model must equal the original.
    """
    dense = OnnxGraph(folder.dense_onnx)
    explicit = Folding()
    for site in explicit_permutations(graph, exported.gathers).values():
        basis = Basis(len(graph.shapes[site.output]) - 1, (), site.table)
        for node in (Node(graph, consumer) for consumer in graph.consumers[site.output]):
            for slot, carried in carry_over(node, Slot("in", 0), basis, {}):
                explicit.bases[node.slots[slot]] = [carried]

    def read(name: str) -> NDArray:
        values = dense.read(name) if name in dense.initializers else graph.read(name)
        return folding.reorder(name, explicit.reorder(name, values))

    path = folder.onnx / ".dense_permuted.onnx"
    try:
        write_model(model, read, path)
        yield path
    finally:
        path.unlink(missing_ok=True)
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)
