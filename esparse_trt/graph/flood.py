"""Finding everything that must change basis together so that one explicit permutation can go.

Starting at the input of a Gather(π), the change of basis π is carried over every operator that touches the
tensor, to its producer and its consumers alike, until it is absorbed: by the weights on either side.
Initializers are tensors like any other here, so one that is shared with a distant part of the graph (a tied
embedding) either takes that part along or makes it refuse. Explicit permutations are where the flood stops:
x' = x[b] and y' = y[c] turn y = x[g] into y' = x'[b⁻¹[g[c]]], and the Gather vanishes if that is the
identity.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from onnx import NodeProto

from esparse_trt.graph.basis import Basis, Refused, Table
from esparse_trt.graph.carry import carry_over
from esparse_trt.graph.feeds import PAST, PRESENT
from esparse_trt.graph.graph import OnnxGraph, attribute
from esparse_trt.graph.signature import Node


@dataclass(frozen=True)
class Permutation:
    """An explicit permutation: `output = input[.., table]` along the last axis."""

    node: NodeProto
    table: Table

    @property
    def input(self) -> str:
        """The tensor in original order."""
        return self.node.input[0]

    @property
    def output(self) -> str:
        """The tensor in permuted order."""
        return self.node.output[0]


class Shared(Refused):
    """Different permutations read tensors that change basis together, so that none of them can fold.

    Attributes:
        members: the Gather nodes that do, in graph order; the same whichever of them one starts from.
    """

    def __init__(self, members: list[str]) -> None:
        self.members = members
        others = len(members) - 1
        super().__init__(
            f"reads a tensor that changes basis together with those of {others} other "
            f"permutation{'s' if others > 1 else ''}, not all of them the same (from {members[0]} to "
            f"{members[-1]}): they would remain in another form"
        )


@dataclass
class Flood:
    """The changes of basis that make some explicit permutations superfluous.

    Attributes:
        gathers: names of the Gather nodes that vanish.
        bases: tensor -> its changes of basis, on different axes.
    """

    gathers: list[str] = field(default_factory=list)
    bases: dict[str, list[Basis]] = field(default_factory=dict)


def explicit_permutations(graph: OnnxGraph, names: list[str]) -> dict[str, Permutation]:
    """The named Gather nodes in graph order."""
    found = {}
    for node in graph.model.graph.node:
        if node.op_type == "Gather" and node.name in names:
            table = graph.constant(node.input[1])
            rank = len(graph.shapes[node.input[0]])
            assert table is not None and attribute(node, "axis", 0) % rank == rank - 1, node.name
            found[node.name] = Permutation(node, table.astype(np.int64))
    return found


def flood(
    graph: OnnxGraph, permutations: dict[str, Permutation], start: str, done: dict[str, list[Basis]]
) -> Flood:
    """Fold the permutation `start`, and with it all that become superfluous with it.

    Args:
        graph: the graph with its explicit permutations.
        permutations: all that are still in it, by node name.
        start: the one to fold.
        done: tensor -> the changes of basis of what was folded before.

    Raises:
        Shared: other permutations would remain, only in another form.
        Refused: it cannot be folded for another reason.
    """
    spread = _Spread(graph, permutations, done)
    site = permutations[start]
    rank = len(graph.shapes[site.input])
    spread.assign(site.input, Basis(rank - 1, (), site.table), f"{start!r}")
    spread.run()
    _check_cache(graph, spread.bases)
    gone: list[str] = []
    left: list[str] = []
    for name, other in permutations.items():
        if other.input in spread.bases or other.output in spread.bases:
            (gone if _vanishes(graph, other, spread.bases) else left).append(name)
    if left:
        raise Shared([name for name in permutations if permutations[name].input in spread.bases])
    return Flood(gone, {tensor: list(by_axis.values()) for tensor, by_axis in spread.bases.items()})


class _Spread:
    """The state of one flood: changes of basis by tensor and axis, and what is yet to be visited."""

    def __init__(
        self, graph: OnnxGraph, permutations: dict[str, Permutation], done: dict[str, list[Basis]]
    ) -> None:
        self.graph, self.done = graph, done
        self.barriers = {site.node.name for site in permutations.values()}
        self.bases: dict[str, dict[int, Basis]] = {}
        self.queue: deque[tuple[str, Basis]] = deque()

    def assign(self, tensor: str, basis: Basis, where: str) -> None:
        """Note that a tensor changes basis, or check that it does so already."""
        known = self.bases.setdefault(tensor, {})
        if basis.axis in known:
            if known[basis.axis] != basis:
                raise Refused(f"would need {tensor!r} in two different orders (at {where})")
            return
        others = [*known.values(), *self.done.get(tensor, [])]
        if any(o.axis == basis.axis or o.axis in basis.by or basis.axis in o.by for o in others):
            raise Refused(f"would need {tensor!r} in two different orders (at {where})")
        self._check_free(tensor, basis)
        known[basis.axis] = basis
        self.queue.append((tensor, basis))

    def _check_free(self, tensor: str, basis: Basis) -> None:
        graph = self.graph
        if tensor in graph.outputs and not tensor.startswith(PRESENT):
            raise Refused(f"reaches the output {tensor!r} of the model")
        if tensor in graph.inputs and not tensor.startswith(PAST):
            raise Refused(f"reaches the input {tensor!r} of the model")
        size = graph.shapes[tensor][basis.axis]
        if size != basis.table.shape[-1]:
            raise Refused(f"reaches {tensor!r}, the size of which is not known")

    def run(self) -> None:
        """Carry every change of basis over all operators around its tensor."""
        while self.queue:
            tensor, basis = self.queue.popleft()
            for node in self._around(tensor):
                self._visit(node, tensor, basis)

    def _around(self, tensor: str) -> Iterator[NodeProto]:
        producer = self.graph.producers.get(tensor)
        nodes = [*([producer] if producer else []), *self.graph.consumers.get(tensor, [])]
        return (node for node in nodes if node.name not in self.barriers)

    def _visit(self, proto: NodeProto, tensor: str, basis: Basis) -> None:
        node = Node(self.graph, proto)
        where = f"{proto.op_type} {proto.name!r}"
        try:
            slots = [slot for slot, name in node.slots.items() if name == tensor]
            if not slots:
                raise Refused(f"is read inside the operator {proto.op_type}")
            known = {slot: self.bases.get(name, {}).values() for slot, name in node.slots.items()}
            carried = [item for slot in slots for item in carry_over(node, slot, basis, known)]
        except Refused as reason:
            raise Refused(f"{reason} (at {where})") from None
        for slot, other in carried:
            self.assign(node.slots[slot], other, where)


def _check_cache(graph: OnnxGraph, bases: dict[str, dict[int, Basis]]) -> None:
    """What a step leaves in the cache, the next step reads: both must be in the same basis."""
    for name in graph.outputs:
        past = PAST + name.removeprefix(PRESENT)
        if name.startswith(PRESENT) and past in graph.inputs and bases.get(name) != bases.get(past):
            raise Refused(f"would leave {name!r} and {past!r} in different orders")


def _vanishes(graph: OnnxGraph, site: Permutation, bases: dict[str, dict[int, Basis]]) -> bool:
    """Whether b⁻¹[g[c]] is the identity, where b and c are the new bases of input and output."""
    axis = len(graph.shapes[site.input]) - 1
    before, after = (bases.get(name, {}) for name in (site.input, site.output))
    if set(before) | set(after) != {axis} or any(b.by for b in (*before.values(), *after.values())):
        return False
    identity = np.arange(len(site.table))
    c = after[axis].table if axis in after else identity
    b = before[axis].table if axis in before else identity
    return np.array_equal(site.table[c], b)
