"""What stands in the way of folding, on graphs built by hand."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from esparse_trt.graph.fold import Folding, fold_permutations, folded_model
from esparse_trt.graph.graph import OnnxGraph, write_model
from esparse_trt.records import ExportRecord
from esparse_trt.sparsity.pattern import Pattern

random = np.random.default_rng(0)
WEIGHTS = {
    "w0": random.standard_normal((6, 8)),
    "w1": random.standard_normal((8, 8)),
    "w2": random.standard_normal((8, 8)),
    "scale": random.standard_normal(8),
}
PI = {"a": random.permutation(8), "b": random.permutation(8), "halves": np.array([1, 0, 3, 2, 6, 7, 4, 5])}


def node(op: str, inputs: str, output: str, **attributes: object) -> NodeProto:
    return helper.make_node(op, inputs.split(), output.split(), name=output, **attributes)


def permute(tensor: str, which: str, output: str) -> NodeProto:
    return node("Gather", f"{tensor} pi_{which}", output, axis=-1)


def folding_of(folder: Path, nodes: list[NodeProto], *outputs: str) -> tuple[OnnxGraph, Folding]:
    """Fold, write the folded model, and check that it computes the same."""
    initializers = {**WEIGHTS, **{f"pi_{key}": value for key, value in PI.items()}}
    used = {name for item in nodes for name in item.input}
    tensors = [
        numpy_helper.from_array(value.astype(np.int64 if value.dtype == np.int64 else np.float32), name)
        for name, value in initializers.items()
        if name in used
    ]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 6])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs or ("y",)],
        tensors,
    )
    path = folder / "explicit.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    loaded = OnnxGraph(path)
    gathers = [item.name for item in nodes if item.op_type == "Gather"]
    exported = ExportRecord(
        dtype="float32",
        opset=20,
        inputs=[],
        outputs=[],
        linears={name: name for name in WEIGHTS if name.startswith("w") and name in used},
        gathers=gathers,
        bytes={},
    )
    folding = fold_permutations(loaded, exported, Pattern(2, 4))
    folded = folder / "folded.onnx"
    write_model(folded_model(loaded, folding), lambda name: folding.reorder(name, loaded.read(name)), folded)
    x = np.random.default_rng(1).standard_normal((3, 6)).astype(np.float32)
    before, after = (onnxruntime.InferenceSession(p).run(None, {"x": x}) for p in (path, folded))
    for old, new in zip(before, after, strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-5)
    left = [n.name for n in onnx.load(folded).graph.node if n.op_type == "Gather"]
    assert left == list(folding.kept)
    return loaded, folding


def test_folds_into_the_rows_before(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x w0", "h"),
        node("Add", "h scale", "s"),
        node("Relu", "s", "r"),
        permute("r", "a", "p"),
        node("MatMul", "p w1", "y"),
    ]
    graph, folding = folding_of(tmp_path, nodes)
    assert not folding.kept
    assert {name for name in folding.bases if name in graph.initializers} == {"w0", "scale"}
    np.testing.assert_array_equal(folding.bases["w0"][0].table, PI["a"])
    folded = onnx.load(tmp_path / "folded.onnx", load_external_data=False)
    assert "pi_a" not in {tensor.name for tensor in folded.graph.initializer}


def test_equal_permutations_of_one_tensor_go_together(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x w0", "h"),
        permute("h", "a", "p"),
        node("Relu", "h", "r"),
        permute("r", "a", "q"),
        node("MatMul", "p w1", "u"),
        node("MatMul", "q w2", "v"),
        node("Add", "u v", "y"),
    ]
    _, folding = folding_of(tmp_path, nodes)
    assert [found.gathers for found in folding.floods] == [["p", "q"]]


def test_different_permutations_of_one_tensor_stay(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x w0", "h"),
        permute("h", "a", "p"),
        permute("h", "b", "q"),
        node("MatMul", "p w1", "u"),
        node("MatMul", "q w2", "v"),
        node("Add", "u v", "y"),
    ]
    _, folding = folding_of(tmp_path, nodes)
    assert all("1 other permutation, not all of them the same" in reason for reason in folding.kept.values())
    assert len(folding.kept) == 2


def test_reading_layers_take_it_up_along_k(tmp_path: Path) -> None:
    """A dense layer that reads the same tensor unpermuted is no obstacle."""
    nodes = [
        node("MatMul", "x w0", "h"),
        permute("h", "a", "p"),
        node("MatMul", "p w1", "u"),
        node("MatMul", "h w2", "v"),
        node("Add", "u v", "y"),
    ]
    _, folding = folding_of(tmp_path, nodes)
    assert (folding.bases["w0"][0].axis, folding.bases["w2"][0].axis) == (1, 0)


@pytest.mark.parametrize(
    ("nodes", "outputs", "reason"),
    [
        (
            [node("MatMul", "x w0", "h"), node("CumSum", "h one", "c"), permute("c", "a", "p")],
            ("y",),
            "reaches the operator CumSum",
        ),
        ([node("MatMul", "x w0", "h"), permute("h", "a", "p")], ("y", "h"), "output 'h' of the model"),
        (
            [
                node("MatMul", "x w0", "h"),
                node("Split", "h", "left right", axis=-1, num_outputs=2),
                node("Concat", "right left", "swapped", axis=-1),
                node("Add", "h swapped", "k"),
                permute("k", "halves", "p"),
            ],
            ("y",),
            "would need .* in two different orders",
        ),
        (
            [
                node("MatMul", "x w0", "h"),
                node("Add", "h scale", "k"),
                permute("k", "a", "p"),
                node("ReduceSum", "scale", "total", keepdims=0),
                node("CumSum", "scale one", "far"),
            ],
            ("y", "far"),
            "reaches the operator CumSum",
        ),
    ],
    ids=["unknown operator", "graph output", "two orders", "shared initializer"],
)
def test_stays_with_a_reason(
    nodes: list[NodeProto], outputs: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    one = helper.make_node("Constant", [], ["one"], value=numpy_helper.from_array(np.int64(0)))
    everything = [one, *nodes, node("MatMul", "p w1", "y")]
    _, folding = folding_of(tmp_path, everything, *outputs)
    (why,) = folding.kept.values()
    assert re.search(reason, why)


def test_a_read_inside_control_flow_is_seen(tmp_path: Path) -> None:
    branches = {}
    for key in ("then_branch", "else_branch"):
        out = helper.make_tensor_value_info(f"{key}_out", TensorProto.FLOAT, None)
        branches[key] = helper.make_graph([node("Relu", "h", f"{key}_out")], key, [], [out])
    yes = helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.bool_(True)))
    nodes = [
        yes,
        node("MatMul", "x w0", "h"),
        permute("h", "a", "p"),
        node("MatMul", "p w1", "y"),
        helper.make_node("If", ["yes"], ["z"], name="branch", **branches),
    ]
    _, folding = folding_of(tmp_path, nodes, "y", "z")
    assert "read inside the operator If" in folding.kept["p"]


def test_values_and_shapes_survive_writing(tmp_path: Path) -> None:
    """Scalars stay scalars, also those kept inside the model; large tensors are aligned to pages."""
    tensors: dict[str, NDArray] = {
        "scalar": np.array(2, dtype=np.int64),
        "row": np.arange(8, dtype=np.float16),
        "big": random.standard_normal((64, 33)).astype(np.float16),
        "other": random.standard_normal((64, 65)).astype(np.float32),
    }
    graph = helper.make_graph(
        [node("Identity", "scalar", "y")],
        "test",
        [],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [])],
        [numpy_helper.from_array(np.zeros_like(value), name) for name, value in tensors.items()],
    )
    path = tmp_path / "model.onnx"
    size = write_model(helper.make_model(graph), tensors.__getitem__, path)
    loaded = OnnxGraph(path)
    for name, value in tensors.items():
        np.testing.assert_array_equal(loaded.read(name), value)
        assert loaded.read(name).shape == value.shape
        for entry in loaded.initializers[name].external_data:
            assert entry.key != "offset" or int(entry.value) % 4096 == 0
    assert size == sum(file.stat().st_size for file in tmp_path.iterdir())
