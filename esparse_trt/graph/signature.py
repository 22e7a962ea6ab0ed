"""How a change of basis of one tensor of an operator carries over to the others: a table of signatures.

Most operators commute with permutations of most of their axes, and an einsum-like signature says all there is to
know: `MatMul` is `bik, bkj -> bij`. If the axis with label `k` of one operand is permuted, then so must be every
axis with that label, and nothing else changes; a label that no output has is contracted and absorbs the
permutation. `OPAQUE` marks axes where order matters (the axis of a Concat), None those of size 1 that are
broadcast. Two kinds of operators need more than labels: Reshape, and those that cut an axis into parts (Split,
Slice, Concat, Gather at one index). An operator that is not in the table refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np
from onnx import NodeProto

from esparse_trt.graph.basis import Basis, Refused, Shape, make_basis, narrow, reshape_basis, widen
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
    """Softmax and norms: elementwise, but through a statistic (sum, mean, ..) that lacks the normalized axes."""
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


_ELEMENTWISE = """Abs Add And Cast CastLike Ceil Clip Cos Div Elu Equal Erf Exp Floor Gelu Greater GreaterOrEqual
HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg Not Or
Pow Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub Sum Swish Tanh ThresholdedRelu Where
Xor""".split()
_REDUCTIONS = "L1 L2 LogSum LogSumExp Max Mean Min Prod Sum SumSquare".split()

_SIGNATURES: dict[str, Callable[[Node], Signature]] = {
    **dict.fromkeys(_ELEMENTWISE, _broadcast),
    **dict.fromkeys((f"Reduce{name}" for name in _REDUCTIONS), _reduce),
    **dict.fromkeys(("Softmax", "LogSoftmax", "LayerNormalization", "RMSNormalization"), _normalization),
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


# --- operators that cut an axis ------------------------------------------------------------------------


class Cut(NamedTuple):
    """A tensor and the parts [start, stop) of one of its axes; Gather at one index also drops the axis."""

    whole: Slot
    axis: int
    parts: dict[Slot, tuple[int, int]]
    squeezed: bool = False


def _split(node: Node) -> Cut | None:
    axis = node.attribute("axis", 0) % len(node.shape(IN))
    return _consecutive(node, IN, axis, [slot for slot in node.slots if slot.side == "out"])


def _concat(node: Node) -> Cut | None:
    axis = node.attribute("axis", 0) % len(node.shape(OUT))
    return _consecutive(node, OUT, axis, [slot for slot in node.slots if slot.side == "in"])


def _consecutive(node: Node, whole: Slot, axis: int, slots: list[Slot]) -> Cut | None:
    parts, start = {}, 0
    for slot in slots:
        size = node.shape(slot)[axis]
        if not isinstance(size, int):
            return None
        parts[slot] = (start, start + size)
        start += size
    return Cut(whole, axis, parts)


def _slice(node: Node) -> Cut | None:
    shape = node.shape(IN)
    axes = node.integers(3, "axes")
    if axes is None or len(axes) != 1 or node.integers(4, "steps") not in (None, [1]):
        return None
    axis = axes[0] % len(shape)
    size, starts, stops = shape[axis], _known(node, 1), _known(node, 2)
    if not isinstance(size, int) or starts is None or stops is None:
        return None
    start, stop, _ = slice(starts, stops).indices(size)
    return Cut(IN, axis, {OUT: (start, stop)})


def _known(node: Node, index: int) -> int | None:
    value = node.graph.constant(node.slots[Slot("in", index)])
    return None if value is None else int(value.reshape(-1)[0])


def _select(node: Node) -> Cut | None:
    axis = node.attribute("axis", 0) % len(node.shape(IN))
    size, index = node.shape(IN)[axis], _known(node, 1)
    if index is None or node.shape(Slot("in", 1)) or not isinstance(size, int):
        return None
    start = index % size
    return Cut(IN, axis, {OUT: (start, start + 1)}, squeezed=True)


_CUTS: dict[str, Callable[[Node], Cut | None]] = {
    "Split": _split,
    "Concat": _concat,
    "Slice": _slice,
    "Gather": _select,
}

# --- the rule ------------------------------------------------------------------------------------------


def carry_over(node: Node, slot: Slot, basis: Basis) -> Iterator[tuple[Slot, Basis]]:
    """What the other operands of a node must become if one operand changes basis.

    Yields:
        Operands and their changes of basis; those not mentioned stay as they are.

    Raises:
        Refused: the operator has no such form.
    """
    op = node.proto.op_type
    if node.proto.domain not in ("", "ai.onnx") or not (op in _SIGNATURES or op == "Reshape"):
        raise Refused(f"reaches the operator {op}, which has no rule")
    if op == "Reshape":
        yield from _carry_reshape(node, slot, basis)
        return
    cut = _CUTS[op](node) if op in _CUTS else None
    # Joined parts may also be permuted all alike, which is simpler: the keys of a cache and of the new tokens.
    if cut and (slot == cut.whole or slot in cut.parts) and not (op == "Concat" and not _touches(basis, cut)):
        yield from _carry_cut(cut, node, slot, basis)
    else:
        yield from _carry_labels(node, slot, basis)


def _touches(basis: Basis, cut: Cut) -> bool:
    return cut.axis in (basis.axis, *basis.by)


def _carry_reshape(node: Node, slot: Slot, basis: Basis) -> Iterator[tuple[Slot, Basis]]:
    if slot not in (IN, OUT):
        raise Refused("reaches the shape that a Reshape is given")
    other = OUT if slot == IN else IN
    carried = reshape_basis(basis, node.shape(slot), node.shape(other))
    if carried:
        yield other, carried


def _carry_cut(cut: Cut, node: Node, slot: Slot, basis: Basis) -> Iterator[tuple[Slot, Basis]]:
    if slot == cut.whole:
        for part, (start, stop) in cut.parts.items():
            carried = narrow(basis, cut.axis, start, stop, squeezed=cut.squeezed)
            if carried:
                yield part, carried
        return
    start, stop = cut.parts[slot]
    size = node.shape(cut.whole)[cut.axis]
    assert isinstance(size, int)
    carried = widen(basis, cut.axis, start, stop, size, squeezed=cut.squeezed)
    if carried:
        yield cut.whole, carried


def _carry_labels(node: Node, slot: Slot, basis: Basis) -> Iterator[tuple[Slot, Basis]]:
    signature = _SIGNATURES[node.proto.op_type](node)
    if slot not in signature:
        raise Refused(f"reaches a parameter of {node.proto.op_type}")
    label, *by = (signature[slot][axis] for axis in (basis.axis, *basis.by))
    if label in (None, OPAQUE):
        raise Refused(f"reaches {node.proto.op_type} along the axis in which the order matters")
    for other, labels in signature.items():
        if other == slot or label not in labels:
            continue
        if not set(by) <= set(labels) - {OPAQUE, None}:
            raise Refused(f"differs between entries that {node.proto.op_type} treats alike")
        carried = make_basis(labels.index(label), [labels.index(b) for b in by], basis.table)
        if carried and other in node.slots:
            yield other, carried


def reduction_axis(graph: OnnxGraph, weight: str) -> int | None:
    """The K axis of a weight: the one that the MatMul or Gemm that reads it sums over.

    Args:
        graph: the graph.
        weight: a 2-D tensor; Casts and Transposes between it and its reader are looked through.

    Returns:
        0 or 1; None if nothing multiplies by it, or its readers disagree.
    """
    axes = set()
    for proto in graph.consumers.get(weight, []):
        node = Node(graph, proto)
        if proto.op_type in ("MatMul", "Gemm"):
            signature = _SIGNATURES[proto.op_type](node)
            axes |= {signature[slot].index("k") for slot, name in node.slots.items() if name == weight}
        elif proto.op_type in ("Cast", "Identity", "Transpose"):
            inner = reduction_axis(graph, proto.output[0])
            if inner is not None:
                axes.add(_SIGNATURES[proto.op_type](node)[OUT][inner])
    (axis,) = axes if len(axes) == 1 else (None,)
    return axis if isinstance(axis, int) else None
