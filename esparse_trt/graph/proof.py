"""Proof that two ONNX files compute the same: run both in ONNX Runtime and compare what comes out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, ValueInfoProto, helper

from esparse_trt.errors import CheckFailed
from esparse_trt.graph.feeds import PAST, example_feed
from esparse_trt.graph.graph import OnnxGraph, reads, tensor_bytes
from esparse_trt.graph.plan import FoldPlan, redo, undo
from esparse_trt.records import TensorSpec

Tensors = dict[str, NDArray]

_PART_BYTES = 1 << 27

LIMITS = {"float32": 1e-5, "float16": 2e-3}  # of the relative L2 distance


def example_feeds(inputs: list[TensorSpec], vocab: int) -> list[Tensors]:
    """A prefill and a decode step with a cache, each of two rows of which one is padded."""
    shapes = [{"sequence": 8, "past": 0, "seed": 0}, {"sequence": 1, "past": 6, "seed": 1}]
    return [example_feed(inputs, batch=2, vocab=vocab, padding=[0, 2], **shape) for shape in shapes]


def outputs(path: Path, feeds: Sequence[Tensors]) -> list[Tensors]:
    """All outputs of a model for each feed.

    The graph runs in parts, one after the other, so that only the weights of one part are in memory: a CPU
    without fp16 arithmetic needs them in fp32 as well, which together is three times the size of the model.
    """
    graph = OnnxGraph(path)
    values = [dict(feed) for feed in feeds]
    nodes = list(graph.model.graph.node)
    for start, stop in _parts(graph):
        later = {name for node in nodes[stop:] for name in reads(node)} | set(graph.outputs)
        session = _session(graph, nodes[start:stop], later, values[0])
        names = [output.name for output in session.get_outputs()]
        wanted = [value.name for value in session.get_inputs()]
        for known in values:
            known.update(zip(names, session.run(names, {name: known[name] for name in wanted}), strict=True))
        del session  # before the next one takes memory
    return [{name: known[name] for name in graph.outputs} for known in values]


def _parts(graph: OnnxGraph) -> Iterator[tuple[int, int]]:
    """Ranges of nodes whose weights are about `_PART_BYTES` together."""
    start, size = 0, 0
    nodes = graph.model.graph.node
    for stop, node in enumerate(nodes, 1):
        size += sum(tensor_bytes(graph.initializers[n]) for n in set(node.input) & graph.initializers.keys())
        if size > _PART_BYTES or stop == len(nodes):
            yield start, stop
            start, size = stop, 0


def _session(
    graph: OnnxGraph, nodes: list[NodeProto], later: set[str], known: Tensors
) -> onnxruntime.InferenceSession:
    """A session of some consecutive nodes; what they read and do not make is an input."""
    used = {name for node in nodes for name in reads(node)}
    made = {name for node in nodes for name in node.output}
    model = ModelProto()
    model.CopyFrom(graph.model)
    model.graph.CopyFrom(
        helper.make_graph(
            nodes,
            "part",
            [
                helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(known[n].dtype), None)
                for n in sorted(used & known.keys())
            ],
            [ValueInfoProto(name=name) for name in sorted(made & later)],
            [tensor for name, tensor in graph.initializers.items() if name in used],
        )
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    folder = str(graph.path.parent.resolve())
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def relative_l2(value: NDArray, reference: NDArray) -> float:
    """‖value − reference‖₂ / ‖reference‖₂ in float64; 0 for two zeros."""
    a, b = value.astype(np.float64), reference.astype(np.float64)
    distance, norm = float(np.linalg.norm(a - b)), float(np.linalg.norm(b))
    return distance / norm if norm else float(distance > 0)


def compare(
    reference: Sequence[Tensors], path: Path, feeds: Sequence[Tensors], plan: FoldPlan, limit: float
) -> float:
    """Run a folded model on the same feeds and compare all outputs in the original order.

    Args:
        reference: outputs of the model before folding.
        path: the folded model.
        feeds: its inputs, the cache in original order.
        plan: the changes of basis of its cache.
        limit: of the relative L2 distance of every output.

    Returns:
        The largest distance of the logits.

    Raises:
        CheckFailed: an output is farther away than `limit`; names the output and the feed.
    """
    changed = [{name: redo(plan, name, value) for name, value in feed.items()} for feed in feeds]
    errors = []
    for feed, before, after in zip(feeds, reference, outputs(path, changed), strict=True):
        past = next(value.shape[2] for name, value in feed.items() if name.startswith(PAST))
        for name, value in before.items():
            error = relative_l2(undo(plan, name, after[name]), value)
            if not error <= limit:
                raise CheckFailed(
                    f"folding changed {name!r} by {error:.2e} relative to what it was (limit {limit:.0e}, "
                    f"{'decode with a cache' if past else 'prefill'})",
                    where=path,
                    fix="please report this with the recipe; `prune.permute` set to none avoids it",
                )
            errors += [error] if name == "logits" else []
    return max(errors)
