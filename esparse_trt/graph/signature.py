"""What operators do to the axes of their operands: a table of einsum-like signatures.

Most operators commute with permutations of most of their axes, and labels on the axes say all there is to
know: `MatMul` is `bmk, bkn -> bmn`. If an axis with label `k` is permuted in one operand, then every axis
with that label must be, and nothing else changes; a label that no output has is contracted and absorbs the
permutation. `OPAQUE` marks axes in which the order matters (that of a Concat), None axes of size 1 that are
broadcast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from onnx import NodeProto

from esparse_trt.graph.basis import Refused, Shape
from esparse_trt.graph.graph import OnnxGraph, attribute

OPAQUE = "order matters"
Label = str | int | None
Labels = tuple[Label, ...]


class Slot(NamedTuple):
    """One operand of a node, or an inner tensor that constrains them."""

    side: Literal["in", "out", "inner"]
    number: int


class Node:
    """A node with the shapes and constants that its signature depends on."""

    def __init__(self, graph: OnnxGraph, proto: NodeProto) -> None:
        self.graph, self.proto = graph, proto
        self.slots = {Slot("in", i): name for i, name in enumerate(proto.input) if name}
        self.slots |= {Slot("out", i): name for i, name in enumerate(proto.output) if name}

    def shape(self, slot: Slot) -> Shape:
        """The operand's shape; refuses where the rank is unknown."""
        shape = self.graph.shapes.get(self.slots[slot])
        if shape is None:
            raise Refused(f"reaches {self.slots[slot]!r}, the rank of which is unknown")
        return shape

    def attribute(self, name: str, default: int) -> int:
        """An integer attribute."""
        return int(attribute(self.proto, name, default))

    def integers(self, index: int, name: str) -> list[int] | None:
        """A list of integers given as input `index` or, in older opsets, as an attribute; None if absent."""
        if Slot("in", index) in self.slots:
            value = self.graph.constant(self.slots[Slot("in", index)])
            if value is None:
                raise Refused(f"reaches {self.proto.op_type} with computed {name}")
            return [int(i) for i in np.atleast_1d(value)]
        value = attribute(self.proto, name, None)
        return None if value is None else [int(i) for i in value]


IN, OUT = Slot("in", 0), Slot("out", 0)
Signature = dict[Slot, Labels]

# --- signatures ----------------------------------------------------------------------------------------


def _broadcast(node: Node, *slots: Slot) -> Signature:
    """Axes are matched from the right; an operand's axis of size 1 does not take part."""
    slots = slots or tuple(node.slots)
    shapes = {slot: node.shape(slot) for slot in slots}
    rank = max(len(shape) for shape in shapes.values())
    sizes = [{shape[i - rank] for shape in shapes.values() if len(shape) >= rank - i} for i in range(rank)]
    return {
        slot: tuple(
            None if size == 1 and sizes[axis] != {1} else axis
            for axis, size in enumerate(shape, rank - len(shape))
        )
        for slot, shape in shapes.items()
    }


def _matmul(node: Node) -> Signature:
    a, b, out = Slot("in", 0), Slot("in", 1), OUT
    shapes = {slot: node.shape(slot) for slot in (a, b, out)}
    if len(shapes[a]) < 2 or len(shapes[b]) < 2:
        raise Refused("reaches a MatMul with a vector")
    rank = len(shapes[out])
    batch = {
        slot: tuple(
            None if size == 1 and shapes[out][axis] != 1 else axis
            for axis, size in enumerate(shape[:-2], rank - len(shape))
        )
        for slot, shape in shapes.items()
    }
    return {a: (*batch[a], "m", "k"), b: (*batch[b], "k", "n"), out: (*batch[out], "m", "n")}


def _gemm(node: Node) -> Signature:
    signature: Signature = {
        Slot("in", 0): ("k", "m") if node.attribute("transA", 0) else ("m", "k"),
        Slot("in", 1): ("n", "k") if node.attribute("transB", 0) else ("k", "n"),
        OUT: ("m", "n"),
    }
    if (bias := Slot("in", 2)) in node.slots:
        shape = node.shape(bias)
        labels = ("m", "n")[2 - len(shape) :]
        signature[bias] = tuple(
            None if size == 1 else label for label, size in zip(labels, shape, strict=True)
        )
    return signature


def _reduce(node: Node) -> Signature:
    rank = len(node.shape(IN))
    axes = node.integers(1, "axes")
    if not axes and not node.attribute("noop_with_empty_axes", 0):
        axes = list(range(rank))
    reduced = {axis % rank for axis in axes or []}
    keep = node.attribute("keepdims", 1)
    out = [None if axis in reduced else axis for axis in range(rank) if keep or axis not in reduced]
    return {IN: tuple(range(rank)), OUT: tuple(out)}


def _normalization(node: Node) -> Signature:
    """Softmax and norms: elementwise, but through a statistic (sum, mean) that lacks the normalized axes."""
    if any(slot.side == "out" and slot.number for slot in node.slots):
        raise Refused("reaches a normalization with more than one output")
    rank = len(node.shape(OUT))
    axis = node.attribute("axis", -1) % rank
    whole_tail = node.proto.op_type.endswith("Normalization")
    statistic = [label for label in range(rank) if (label < axis if whole_tail else label != axis)]
    return {**_broadcast(node), Slot("inner", 0): tuple(statistic)}


def _transpose(node: Node) -> Signature:
    rank = len(node.shape(IN))
    return {
        IN: tuple(range(rank)),
        OUT: tuple(attribute(node.proto, "perm", list(reversed(range(rank))))),
    }


def _unsqueeze(node: Node) -> Signature:
    rank = len(node.shape(OUT))
    new = {axis % rank for axis in node.integers(1, "axes") or []}
    out = tuple(None if axis in new else axis for axis in range(rank))
    return {IN: tuple(axis for axis in out if axis is not None), OUT: out}


def _squeeze(node: Node) -> Signature:
    shape = node.shape(IN)
    axes = node.integers(1, "axes")
    gone = {a % len(shape) for a in axes} if axes else {a for a, size in enumerate(shape) if size == 1}
    labels = tuple(None if axis in gone else axis for axis in range(len(shape)))
    return {IN: labels, OUT: tuple(axis for axis in labels if axis is not None)}


def _expand(node: Node) -> Signature:
    return _broadcast(node, IN, OUT)


def _tile(node: Node) -> Signature:
    source, target = node.shape(IN), node.shape(OUT)
    labels: list[Label] = [
        axis if a == b and a is not None else None if a == 1 else OPAQUE
        for axis, (a, b) in enumerate(zip(source, target, strict=True))
    ]
    out = tuple(axis if label is None else label for axis, label in enumerate(labels))
    return {IN: tuple(labels), OUT: out}


def _gather(node: Node) -> Signature:
    """Embedding look-up; Gather at one index is in `_PARTS`."""
    data, indices = node.shape(IN), node.shape(Slot("in", 1))
    axis = node.attribute("axis", 0) % len(data)
    rows: Labels = tuple(f"i{k}" for k in range(len(indices)))
    labels: Labels = tuple(OPAQUE if k == axis else k for k in range(len(data)))
    return {IN: labels, Slot("in", 1): rows, OUT: (*labels[:axis], *rows, *labels[axis + 1 :])}


def _along_axis(default: int) -> Callable[[Node], Signature]:
    """Operators that run along one axis and leave the others alone."""

    def signature(node: Node) -> Signature:
        rank = len(node.shape(OUT))
        axis = node.attribute("axis", default) % rank
        labels: Labels = tuple(OPAQUE if k == axis else k for k in range(rank))
        return {slot: labels for slot in node.slots if len(node.shape(slot)) == rank}

    return signature


def _slice_signature(node: Node) -> Signature:
    rank = len(node.shape(IN))
    cut = {axis % rank for axis in node.integers(3, "axes") or range(rank)}
    labels: Labels = tuple(OPAQUE if axis in cut else axis for axis in range(rank))
    return {IN: labels, OUT: labels}


def _shape_only(node: Node) -> Signature:
    return {IN: tuple(range(len(node.shape(IN))))}


_ELEMENTWISE = (
    "Abs Add And Cast CastLike Ceil Clip Cos Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual "
    "HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg "
    "Not Or Pow Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub Sum Swish Tanh "
    "ThresholdedRelu Where Xor"
)
_REDUCTIONS = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare"
_NORMALIZATIONS = "Softmax LogSoftmax LayerNormalization RMSNormalization"

_SIGNATURES: dict[str, Callable[[Node], Signature]] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _broadcast),
    **{f"Reduce{name}": _reduce for name in _REDUCTIONS.split()},
    **dict.fromkeys(_NORMALIZATIONS.split(), _normalization),
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Expand": _expand,
    "Tile": _tile,
    "Gather": _gather,
    "Concat": _along_axis(0),
    "Split": _along_axis(0),
    "Slice": _slice_signature,
    "Shape": _shape_only,
    "Size": _shape_only,
}


def signature(node: Node) -> Signature:
    """The labels of the operands that have any; operands left out, such as axes and shapes, are parameters.

    Raises:
        Refused: the operator is not in the table, or the shapes do not say enough.
    """
    if node.proto.domain not in ("", "ai.onnx") or node.proto.op_type not in _SIGNATURES:
        raise Refused(f"reaches the operator {node.proto.op_type}, which has no rule")
    return _SIGNATURES[node.proto.op_type](node)


def reduction_axis(graph: OnnxGraph, weight: str) -> int | None:
    """The K axis of a weight: the one that the MatMul or Gemm that reads it sums over.

    Args:
        graph: the graph.
        weight: a 2-D tensor; Casts and Transposes between it and its reader are looked through.

    Returns:
        0 or 1; None if nothing multiplies by it, or its readers disagree.
    """
    axes: set[int | None] = set()
    for proto in graph.consumers.get(weight, []):
        node = Node(graph, proto)
        if proto.op_type in ("MatMul", "Gemm"):
            labels = [signature(node).get(slot, ()) for slot, name in node.slots.items() if name == weight]
            axes |= {found.index("k") if "k" in found else None for found in labels}
        elif proto.op_type in ("Cast", "Identity", "Transpose"):
            inner = reduction_axis(graph, proto.output[0])
            if inner is not None:
                labels_in, labels_out = (signature(node)[slot] for slot in (IN, OUT))
                axes.add(labels_in.index(labels_out[inner]))
    return axes.pop() if len(axes) == 1 else None
