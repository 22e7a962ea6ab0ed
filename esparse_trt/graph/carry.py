"""How a change of basis of one operand of an operator carries over to the others.

Labels (`signature.py`) are enough for most operators. Reshape needs to know how axes are merged and cut apart
(`basis.py`), and so do the operators that cut one axis into parts: Split, Slice, Concat, Gather at one index.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

from esparse_trt.graph.basis import Basis, Refused, make_basis, narrow, reshape_basis, widen
from esparse_trt.graph.signature import IN, OPAQUE, OUT, Node, Signature, Slot, signature


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


def carry_over(
    node: Node, slot: Slot, basis: Basis, known: Mapping[Slot, Collection[Basis]]
) -> Iterator[tuple[Slot, Basis]]:
    """What the other operands of a node must become if one operand changes basis.

    Args:
        node: the operator.
        slot: the operand that changes.
        basis: its change.
        known: the changes of its operands so far; a part may follow from them in more than one way.

    Yields:
        Operands and their changes of basis; those not mentioned stay as they are.

    Raises:
        Refused: the operator has no such form.
    """
    op = node.proto.op_type
    if op == "Reshape" and not node.proto.domain:
        yield from _carry_reshape(node, slot, basis)
        return
    labels = signature(node)
    cut = _CUTS[op](node) if op in _CUTS else None
    # Parts that are joined may also be permuted all alike: the cached values and those of the new tokens.
    if cut and (slot == cut.whole or slot in cut.parts) and (op != "Concat" or _touches(basis, cut)):
        yield from _carry_cut(cut, node, slot, basis, known.get(cut.whole, ()))
    else:
        yield from _carry_labels(labels, node, slot, basis)


def _touches(basis: Basis, cut: Cut) -> bool:
    return cut.axis in (basis.axis, *basis.by)


def _carry_reshape(node: Node, slot: Slot, basis: Basis) -> Iterator[tuple[Slot, Basis]]:
    if slot not in (IN, OUT):
        raise Refused("reaches the shape that a Reshape is given")
    other = OUT if slot == IN else IN
    carried = reshape_basis(basis, node.shape(slot), node.shape(other))
    if carried:
        yield other, carried


def _carry_cut(
    cut: Cut, node: Node, slot: Slot, basis: Basis, whole: Collection[Basis]
) -> Iterator[tuple[Slot, Basis]]:
    if slot == cut.whole:
        for part, (start, stop) in cut.parts.items():
            carried = narrow(basis, cut.axis, start, stop, squeezed=cut.squeezed)
            if carried:
                yield part, carried
        return
    start, stop = cut.parts[slot]
    if any(narrow(known, cut.axis, start, stop, squeezed=cut.squeezed) == basis for known in whole):
        return
    # Leave the other parts alone: of a fused qkv projection, only v.
    size = node.shape(cut.whole)[cut.axis]
    assert isinstance(size, int)
    carried = widen(basis, cut.axis, start, stop, size, squeezed=cut.squeezed)
    if carried:
        yield cut.whole, carried


def _carry_labels(signature: Signature, node: Node, slot: Slot, basis: Basis) -> Iterator[tuple[Slot, Basis]]:
    op = node.proto.op_type
    if slot not in signature:
        raise Refused(f"reaches a parameter of {op}")
    label, *by = (signature[slot][axis] for axis in (basis.axis, *basis.by))
    if label in (None, OPAQUE):
        raise Refused(f"reaches an axis of {op} along which the order matters")
    for other, labels in signature.items():
        if other == slot or label not in labels:
            continue
        if not set(by) <= set(labels) - {OPAQUE, None}:
            raise Refused(f"differs between entries that {op} treats alike")
        carried = make_basis(labels.index(label), [labels.index(b) for b in by], basis.table)
        if carried and other in node.slots:
            yield other, carried
