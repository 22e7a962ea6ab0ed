"""Proof that two ONNX files compute the same: run both in ONNX Runtime and compare what comes out.

They run in float64, whatever their own type is: a reordering changes the order of sums, and some models
amplify what that rounds. *Measured* on Qwen2.5-Coder-0.5B with random tokens: in fp16 a fold moves the logits
by 5e-3 (and fp16 itself by 5e-2), in fp32 it moves a cache output by 2e-5, in float64 by 8e-14. So one limit
serves every type and model, and no mistake passes as rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from esparse_trt.errors import CheckFailed
from esparse_trt.graph.feeds import PAST, example_feed
from esparse_trt.graph.graph import OnnxGraph, reads, tensor_bytes
from esparse_trt.graph.plan import FoldPlan, redo, undo
from esparse_trt.records import TensorSpec

Tensors = dict[str, NDArray]

LIMIT = 1e-9  # of the relative L2 distance of two models that are the same

_PART_BYTES = 1 << 24  # of weights as they are stored
_NARROW = (TensorProto.FLOAT16, TensorProto.FLOAT)
_NO_FLOAT64 = ("Erf", "Gelu")  # elementwise operators that ONNX Runtime has no float64 kernels for


def example_feeds(inputs: list[TensorSpec], vocab: int) -> list[Tensors]:
    """A prefill and a decode step with a cache, each of two rows of which one is padded."""
    shapes = [{"sequence": 8, "past": 0, "seed": 0}, {"sequence": 1, "past": 6, "seed": 1}]
    return [example_feed(inputs, batch=2, vocab=vocab, padding=[0, 2], **shape) for shape in shapes]


def outputs(path: Path, feeds: Sequence[Tensors]) -> list[Tensors]:
    """All outputs of a model for each feed, computed in float64.

    The graph runs in parts, one after the other, so that only the weights of one part are in memory.
    """
    graph = OnnxGraph(path)
    values = [{name: _widen(array) for name, array in feed.items()} for feed in feeds]
    nodes = list(graph.model.graph.node)
    for start, stop in _parts(graph):
        part = nodes[start:stop]
        later = {name for node in nodes[stop:] for name in reads(node)} | set(graph.outputs)
        used = {name for node in part for name in reads(node)} & graph.initializers.keys()
        weights = {
            name: _widen(graph.read(name)) for name in used if graph.initializers[name].data_type in _NARROW
        }
        session = _session(graph, part, later, values[0] | weights)
        names = [output.name for output in session.get_outputs()]
        wanted = [value.name for value in session.get_inputs()]
        for known in values:
            given = known | weights
            known.update(zip(names, session.run(names, {name: given[name] for name in wanted}), strict=True))
        del session, weights, given  # before the next part takes memory
    return [{name: known[name] for name in graph.outputs} for known in values]


def _widen(array: NDArray) -> NDArray:
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _parts(graph: OnnxGraph) -> Iterator[tuple[int, int]]:
    """Ranges of nodes whose weights are at most `_PART_BYTES` together, or a single larger one."""
    start, size = 0, 0
    nodes = graph.model.graph.node
    for position, node in enumerate(nodes):
        own = sum(tensor_bytes(graph.initializers[n]) for n in set(node.input) & graph.initializers.keys())
        if size and size + own > _PART_BYTES:
            yield start, position
            start, size = position, 0
        size += own
    yield start, len(nodes)


def _session(
    graph: OnnxGraph, nodes: list[NodeProto], later: set[str], given: Tensors
) -> onnxruntime.InferenceSession:
    """A session of some consecutive nodes in float64; what they read and do not make is an input."""
    used = {name for node in nodes for name in reads(node)}
    made = {name for node in nodes for name in node.output}
    model = ModelProto()
    model.CopyFrom(graph.model)
    model.graph.CopyFrom(
        helper.make_graph(
            [wide for node in nodes for wide in _in_float64(node)],
            "part",
            [
                helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(given[n].dtype), None)
                for n in sorted(used & given.keys())
            ],
            [ValueInfoProto(name=name) for name in sorted(made & later)],
            [tensor for name, tensor in graph.initializers.items() if name in used - given.keys()],
        )
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False  # which keeps what it has once held
    folder = str(graph.path.parent.resolve())
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _in_float64(node: NodeProto) -> list[NodeProto]:
    """The node for float64 inputs; one that has no kernel for them keeps fp32, between two casts."""
    wide = NodeProto()
    wide.CopyFrom(node)
    for item in wide.attribute:
        if node.op_type == "Cast" and item.name == "to" and item.i in _NARROW:
            item.i = TensorProto.DOUBLE
        elif item.type == AttributeProto.TENSOR and item.t.data_type in _NARROW:
            item.t.CopyFrom(numpy_helper.from_array(_widen(numpy_helper.to_array(item.t))))
    if node.op_type not in _NO_FLOAT64:
        return [wide]
    before, after = f"{node.output[0]}/before", f"{node.output[0]}/after"
    wide.input[0], wide.output[0] = before, after
    return [
        helper.make_node("Cast", [node.input[0]], [before], to=TensorProto.FLOAT),
        wide,
        helper.make_node("Cast", [after], [node.output[0]], to=TensorProto.DOUBLE),
    ]


def relative_l2(value: NDArray, reference: NDArray) -> float:
    """‖value − reference‖₂ / ‖reference‖₂ in float64; 0 for two zeros."""
    a, b = value.astype(np.float64), reference.astype(np.float64)
    distance, norm = float(np.linalg.norm(a - b)), float(np.linalg.norm(b))
    return distance / norm if norm else float(distance > 0)


def compare(reference: Sequence[Tensors], path: Path, feeds: Sequence[Tensors], plan: FoldPlan) -> float:
    """Run a folded model on the same feeds and compare all outputs in the original order.

    Args:
        reference: outputs of the model before folding.
        path: the folded model.
        feeds: its inputs, the cache in original order.
        plan: the changes of basis of its cache.

    Returns:
        The largest distance of the logits.

    Raises:
        CheckFailed: an output is farther away than `LIMIT`; names the output and the feed.
    """
    changed = [{name: redo(plan, name, value) for name, value in feed.items()} for feed in feeds]
    errors = []
    for feed, before, after in zip(feeds, reference, outputs(path, changed), strict=True):
        past = next(value.shape[2] for name, value in feed.items() if name.startswith(PAST))
        for name, value in before.items():
            error = relative_l2(undo(plan, name, after[name]), value)
            if not error <= LIMIT:
                raise CheckFailed(
                    f"folding changed {name!r} by {error:.2e} relative to what it was (limit {LIMIT:.0e}, "
                    f"{'decode with a cache' if past else 'prefill'})",
                    where=path,
                    fix="please report this with the recipe; `prune.permute` set to none avoids it",
                )
            errors += [error] if name == "logits" else []
    return max(errors)
