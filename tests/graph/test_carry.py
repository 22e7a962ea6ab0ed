"""Every operator's rule, by running it: permuted operands must give the permuted result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from esparse_trt.graph.basis import Basis, Refused, change_basis
from esparse_trt.graph.carry import carry_over
from esparse_trt.graph.graph import OnnxGraph
from esparse_trt.graph.signature import Node, Slot, reduction_axis

Shape = tuple[int, ...]


def one_node(
    folder: Path,
    op: str,
    inputs: Sequence[Shape | NDArray],
    outputs: int = 1,
    *,
    domain: str = "",
    **attributes: Any,
) -> Node:
    """A graph of one node; shapes are graph inputs, arrays are initializers."""
    names = [f"x{i}" for i in range(len(inputs))]
    results = [f"y{i}" for i in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node(op, names, results, domain=domain, **attributes)],
        "test",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, value)
            for name, value in zip(names, inputs, strict=True)
            if isinstance(value, tuple)
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in results],
        [
            numpy_helper.from_array(value, name)
            for name, value in zip(names, inputs, strict=True)
            if not isinstance(value, tuple)
        ],
    )
    domains = ["", domain] if domain else [""]
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid(name, 20) for name in domains])
    onnx.save(model, folder / "node.onnx")
    loaded = OnnxGraph(folder / "node.onnx")
    return Node(loaded, loaded.model.graph.node[0])


def closure(node: Node, slot: Slot, basis: Basis) -> dict[Slot, Basis]:
    """All operands' changes of basis that follow from one."""
    bases, queue = {slot: basis}, [slot]
    while queue:
        known = queue.pop()
        for other, carried in carry_over(node, known, bases[known], {s: [b] for s, b in bases.items()}):
            if other not in bases:
                bases[other] = carried
                queue.append(other)
            assert bases[other] == carried
    return bases


def check(node: Node, bases: dict[Slot, Basis]) -> None:
    """Run the operator with and without the changes of basis."""
    random = np.random.default_rng(0)
    model = node.graph.model
    feed = {
        name: random.standard_normal(node.graph.shapes[name]).astype(np.float32) for name in node.graph.inputs
    }
    before = ReferenceEvaluator(model).run(None, feed)
    changed_model = onnx.ModelProto()
    changed_model.CopyFrom(model)
    names = {name: slot for slot, name in node.slots.items()}
    for tensor in changed_model.graph.initializer:
        if names[tensor.name] in bases:
            values = change_basis(numpy_helper.to_array(tensor), bases[names[tensor.name]])
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    changed_feed = {
        name: change_basis(v, bases[names[name]]) if names[name] in bases else v for name, v in feed.items()
    }
    after = ReferenceEvaluator(changed_model).run(None, changed_feed)
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        slot = Slot("out", i)
        expected = change_basis(old, bases[slot]) if slot in bases else old
        np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-5)


def permutation(size: int) -> NDArray[np.int64]:
    return np.random.default_rng(size).permutation(size)


def by_head(heads: int, size: int) -> NDArray[np.int64]:
    return np.stack([np.random.default_rng(h).permutation(size) for h in range(heads)])


IN0, IN1, IN2, OUT, OUT1 = (Slot("in", 0), Slot("in", 1), Slot("in", 2), Slot("out", 0), Slot("out", 1))
X = (2, 3, 4, 6)
CHANNELS = Basis(3, (), permutation(6))
BY_HEAD = Basis(3, (1,), by_head(3, 6))


def i64(*values: int) -> NDArray:
    return np.array(values, dtype=np.int64)


def f32(*shape: int) -> NDArray:
    return np.random.default_rng(7).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "slot", "basis", "changed"),
    [
        ("Add", [X, f32(6)], {}, IN0, CHANNELS, {IN0, IN1, OUT}),
        ("Add", [X, f32(6)], {}, IN1, Basis(0, (), permutation(6)), {IN0, IN1, OUT}),
        ("Mul", [X, f32(3, 1, 6)], {}, OUT, BY_HEAD, {IN0, IN1, OUT}),
        ("Mul", [X, (2, 1, 4, 1)], {}, IN0, BY_HEAD, {IN0, OUT}),
        ("Sigmoid", [X], {}, IN0, BY_HEAD, {IN0, OUT}),
        ("Softmax", [X], {"axis": -1}, IN0, BY_HEAD, {IN0, OUT}),
        ("Pow", [X, np.float32(2)], {}, IN0, CHANNELS, {IN0, OUT}),
        ("ReduceMean", [X, i64(-1)], {}, IN0, BY_HEAD, {IN0}),
        ("ReduceMean", [X, i64(2)], {"keepdims": 0}, IN0, BY_HEAD, {IN0, OUT}),
        ("ReduceSum", [X], {}, IN0, CHANNELS, {IN0}),
        ("LayerNormalization", [X, f32(6), f32(6)], {}, IN0, CHANNELS, {IN0, IN1, IN2, OUT}),
        ("MatMul", [X, f32(6, 8)], {}, IN0, CHANNELS, {IN0, IN1}),
        ("MatMul", [X, f32(6, 8)], {}, OUT, Basis(3, (), permutation(8)), {IN1, OUT}),
        ("MatMul", [X, f32(6, 8)], {}, IN0, Basis(2, (1,), by_head(3, 4)), {IN0, OUT}),
        ("MatMul", [(2, 3, 4, 5), (2, 3, 5, 6)], {}, IN1, BY_HEAD, {IN1, OUT}),
        ("MatMul", [(2, 3, 4, 5), (2, 3, 5, 6)], {}, IN1, Basis(1, (), permutation(3)), {IN0, IN1, OUT}),
        ("Gemm", [(4, 6), f32(8, 6), f32(8)], {"transB": 1}, IN0, Basis(1, (), permutation(6)), {IN0, IN1}),
        (
            "Gemm",
            [(4, 6), f32(8, 6), f32(8)],
            {"transB": 1},
            OUT,
            Basis(1, (), permutation(8)),
            {IN1, IN2, OUT},
        ),
        ("Transpose", [X], {"perm": [0, 2, 1, 3]}, IN0, BY_HEAD, {IN0, OUT}),
        ("Transpose", [(4, 6)], {}, OUT, Basis(0, (), permutation(6)), {IN0, OUT}),
        ("Reshape", [X, i64(2, 12, 6)], {}, IN0, BY_HEAD, {IN0, OUT}),
        ("Unsqueeze", [X, i64(1)], {}, IN0, BY_HEAD, {IN0, OUT}),
        ("Squeeze", [(2, 1, 6), i64(1)], {}, IN0, Basis(2, (), permutation(6)), {IN0, OUT}),
        ("Expand", [(2, 3, 1, 6), i64(2, 3, 4, 6)], {}, IN0, BY_HEAD, {IN0, OUT}),
        ("Tile", [(2, 3, 1, 6), i64(1, 1, 4, 1)], {}, OUT, BY_HEAD, {IN0, OUT}),
        ("Gather", [f32(10, 6), i64(1, 4, 1)], {}, OUT, Basis(1, (), permutation(6)), {IN0, OUT}),
        ("Gather", [(2, 3, 4, 6), np.int64(2)], {"axis": 2}, OUT, Basis(2, (1,), by_head(3, 6)), {IN0, OUT}),
        ("Gather", [(2, 3, 4, 6), np.int64(2)], {"axis": 2}, IN0, BY_HEAD, {IN0, OUT}),
        ("Concat", [X, X], {"axis": 2}, IN1, BY_HEAD, {IN0, IN1, OUT}),
        ("Concat", [X, X], {"axis": 3}, IN1, BY_HEAD, {IN1, OUT}),
        ("Split", [X, i64(2, 4)], {"axis": 3, "outputs": 2}, OUT1, Basis(3, (), permutation(4)), {IN0, OUT1}),
        ("Split", [X, i64(2, 2)], {"axis": 2, "outputs": 2}, IN0, BY_HEAD, {IN0, OUT, OUT1}),
        ("Slice", [X, i64(2), i64(5), i64(3)], {}, OUT, Basis(3, (), permutation(3)), {IN0, OUT}),
        ("Slice", [X, i64(1), i64(2**62), i64(2)], {}, IN0, CHANNELS, {IN0, OUT}),
        ("Shape", [X], {}, IN0, CHANNELS, {IN0}),
    ],
)  # fmt: skip
def test_permuted_operands_give_the_permuted_result(
    op: str,
    inputs: list,
    attributes: dict,
    slot: Slot,
    basis: Basis,
    changed: set[Slot],
    tmp_path: Path,
) -> None:
    node = one_node(tmp_path, op, inputs, **attributes)
    bases = closure(node, slot, basis)
    assert set(bases) == changed
    check(node, bases)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "slot", "basis", "reason"),
    [
        ("Softmax", [X], {"axis": 1}, IN0, BY_HEAD, "treats alike"),
        ("LayerNormalization", [X, f32(6)], {}, IN0, BY_HEAD, "treats alike"),
        ("ReduceMean", [X, i64(1)], {}, IN0, BY_HEAD, "treats alike"),
        ("MatMul", [X, f32(6, 8)], {}, IN0, BY_HEAD, "treats alike"),
        ("Expand", [(2, 1, 4, 6), i64(2, 3, 4, 6)], {}, OUT, BY_HEAD, "treats alike"),
        ("Slice", [X, i64(0), i64(3), i64(3)], {}, IN0, CHANNELS, "into or out of the part"),
        ("Concat", [X, X], {"axis": 3}, OUT, Basis(3, (), permutation(12)), "into or out of the part"),
        ("Tile", [X, i64(1, 1, 1, 2)], {}, IN0, CHANNELS, "order matters"),
        ("Gather", [f32(10, 6), i64(1, 4, 1)], {}, IN0, Basis(0, (), permutation(10)), "order matters"),
        ("CumSum", [X, np.int64(2)], {}, IN0, CHANNELS, "CumSum, which has no rule"),
        ("Relu", [X], {"domain": "custom"}, IN0, CHANNELS, "no rule"),
    ],
)
def test_refuses(
    op: str, inputs: list, attributes: dict, slot: Slot, basis: Basis, reason: str, tmp_path: Path
) -> None:
    node = one_node(tmp_path, op, inputs, **attributes)
    with pytest.raises(Refused, match=reason):
        closure(node, slot, basis)


def test_the_axis_that_is_summed_over(tmp_path: Path) -> None:
    assert reduction_axis(one_node(tmp_path, "MatMul", [X, f32(6, 6)]).graph, "x1") == 0
    assert reduction_axis(one_node(tmp_path, "MatMul", [f32(6, 6), (6, 4)]).graph, "x0") == 1
    assert reduction_axis(one_node(tmp_path, "Gemm", [(4, 6), f32(6, 6)]).graph, "x1") == 0
    assert reduction_axis(one_node(tmp_path, "Gemm", [(4, 6), f32(6, 6)], transB=1).graph, "x1") == 1
    assert reduction_axis(one_node(tmp_path, "Gather", [f32(6, 6), i64(1)]).graph, "x0") is None
