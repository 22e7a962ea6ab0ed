"""The linear layers of a graph that can be packed, and which of them become one GEMM."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto, helper

from esparse_trt.graph import es24, sparse_gemm
from esparse_trt.graph.flood import Permutation, explicit_permutations
from esparse_trt.graph.graph import OnnxGraph, attribute
from esparse_trt.graph.groups import examine
from esparse_trt.progress import track
from esparse_trt.records import ExportRecord, PackRecord, Reason, StaysDense
from esparse_trt.sparsity.pattern import Pattern


class NotPacked(Exception):
    """A layer stays as it is; the message says why."""

    def __init__(self, reason: str, code: Reason = Reason.not_plain) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class Linear:
    """A linear layer of the graph: `output = source · weightᵀ + bias`.

    Attributes:
        module: its name.
        weight: initializer, `[N, K]` or `[K, N]`.
        k_axis: which axis of the weight is K.
        shape: `(N, K)`.
        source: the tensor that it reads.
        bias: initializer `[N]`, if any.
        output: the tensor that it makes.
        nodes: the MatMul, and the Add of its bias; or the Gemm.
    """

    module: str
    weight: str
    k_axis: int
    shape: tuple[int, int]
    source: str
    bias: str | None
    output: str
    nodes: tuple[NodeProto, ...]


@dataclass(frozen=True)
class Group:
    """Linear layers that become one GEMM; `gather` is the permutation of their input that it takes up."""

    linears: list[Linear]
    gather: Permutation | None

    @property
    def name(self) -> str:
        """The modules' common parent and their own names: `model.layers.0.mlp.gate_proj+up_proj`."""
        first, *others = (linear.module for linear in self.linears)
        return "+".join([first, *(module.rpartition(".")[2] for module in others)])

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)` of the whole."""
        return sum(linear.shape[0] for linear in self.linears), self.linears[0].shape[1]


def find_groups(graph: OnnxGraph, exported: ExportRecord) -> tuple[list[Group], dict[str, StaysDense]]:
    """The layers that can be packed, in the groups in which they are; of the others, module -> reason.

    Grouping stops at the parent module: experts may all read one tensor, and one GEMM of them all would need
    memory for all their weights at once.
    """
    members: dict[tuple[str, str, bool], list[Linear]] = {}
    dense: dict[str, StaysDense] = {}
    for module, weight in track(list(exported.linears.items()), "check weights", unit="layer"):
        try:
            linear = find_linear(graph, module, weight)
            _check_weight(graph, linear)
        except NotPacked as reason:
            dense[module] = StaysDense(code=reason.code, reason=str(reason))
            continue
        key = (linear.source, module.rpartition(".")[0], linear.bias is not None)
        members.setdefault(key, []).append(linear)
    return _groups(graph, exported, list(members.values())), dense


def known_groups(graph: OnnxGraph, exported: ExportRecord, packed: PackRecord) -> list[Group]:
    """The groups that were packed, without a look at their weights."""
    members = [
        [find_linear(graph, module, exported.linears[module]) for module in gemm.layers]
        for gemm in packed.gemms
    ]
    return _groups(graph, exported, members)


def _groups(graph: OnnxGraph, exported: ExportRecord, members: list[list[Linear]]) -> list[Group]:
    gathers = {site.output: site for site in explicit_permutations(graph, exported.gathers).values()}
    return [Group(linears, _absorbed(graph, linears, gathers)) for linears in members]


def find_linear(graph: OnnxGraph, module: str, weight: str) -> Linear:
    """The linear layer that multiplies by an initializer.

    Raises:
        NotPacked: the weight has other readers, or its reader is not a plain linear layer.
    """
    readers = graph.consumers.get(weight, [])
    if weight not in graph.initializers or len(readers) != 1:
        raise NotPacked(f"its weight {weight!r} is shared with other nodes")
    (node,) = readers
    gemm = node.op_type == "Gemm"
    options = tuple(attribute(node, *option) for option in (("alpha", 1.0), ("beta", 1.0), ("transA", 0)))
    if node.op_type not in ("MatMul", "Gemm") or node.input[1] != weight or options != (1.0, 1.0, 0):
        raise NotPacked(f"{node.op_type} {node.name!r} is not a plain linear layer")
    k_axis = 1 if gemm and attribute(node, "transB", 0) else 0
    dims = graph.initializers[weight].dims
    shape = (dims[1 - k_axis], dims[k_axis])
    nodes: tuple[NodeProto, ...] = (node,)
    bias = None
    if gemm and len(node.input) > 2 and node.input[2]:
        bias = node.input[2]
        if not _is_bias(graph, bias, shape[0]):
            raise NotPacked(f"Gemm {node.name!r} adds {bias!r}, which is not a bias per output channel")
    elif add := _bias_add(graph, node.output[0], shape[0]):
        nodes, bias = (node, add), next(name for name in add.input if name != node.output[0])
    return Linear(module, weight, k_axis, shape, node.input[0], bias, nodes[-1].output[0], nodes)


def _bias_add(graph: OnnxGraph, product: str, rows: int) -> NodeProto | None:
    """The Add of a bias to a product that nothing else reads."""
    readers = graph.consumers.get(product, [])
    if len(readers) == 1 and readers[0].op_type == "Add" and product not in graph.outputs:
        others = [name for name in readers[0].input if name != product]
        if len(others) == 1 and _is_bias(graph, others[0], rows):
            return readers[0]
    return None


def _is_bias(graph: OnnxGraph, name: str, rows: int) -> bool:
    return name in graph.initializers and list(graph.initializers[name].dims) == [rows]


def _check_weight(graph: OnnxGraph, linear: Linear) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(graph.initializers[linear.weight].data_type)
    if reason := es24.why_not(*linear.shape, dtype):
        fits = dtype in es24.DTYPES
        raise NotPacked(reason, Reason.not_eligible_shape if fits else Reason.not_eligible_dtype)
    found = examine(graph.read(linear.weight), linear.k_axis, Pattern.parse(sparse_gemm.PATTERN))
    if found.violation:
        raise NotPacked(f"its weight is not {sparse_gemm.PATTERN}: {found.violation}", Reason.not_2_4)


def _absorbed(graph: OnnxGraph, linears: list[Linear], gathers: dict[str, Permutation]) -> Permutation | None:
    """The permutation of the layers' input, unless others need its result anyway."""
    source = linears[0].source
    readers = {node.name for node in graph.consumers[source]}
    ours = {linear.nodes[0].name for linear in linears}
    return gathers.get(source) if readers == ours and source not in graph.outputs else None
