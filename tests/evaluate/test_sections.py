"""Running a graph block by block gives what running it whole gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from esparse_trt.evaluate import sections
from esparse_trt.evaluate.runtimes import quiet_polygraphy
from esparse_trt.evaluate.sections import block_index, block_of, cut, run_sections

WIDTH, BLOCKS = 8, 3
LINEARS = [f"model.layers.{i}.{leaf}" for i in range(BLOCKS) for leaf in ("up", "down")] + ["lm_head"]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    """x -> x + down(relu(up(x)) · gate) three times, then a head; every block reads the same `gate`.

    Block 1 reads and writes a cache, as decoders do: `present` is a graph output that no later node reads.
    """
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) for name in LINEARS}
    nodes = [helper.make_node("Sigmoid", ["mask"], ["gate"], name="gate")]
    stream = "x"
    for i in range(BLOCKS):
        block = f"model.layers.{i}"
        nodes += [
            helper.make_node("MatMul", [stream, f"{block}.up.weight"], [f"{block}.up"], name=f"{block}.up"),
            helper.make_node("Relu", [f"{block}.up"], [f"relu_{i}"], name=f"{block}.act/relu_{i}"),
            helper.make_node("Mul", [f"relu_{i}", "gate"], [f"mul_{i}"], name=f"{block}/mul_{i}"),
            helper.make_node(
                "MatMul", [f"mul_{i}", f"{block}.down.weight"], [f"{block}.down"], name=f"{block}.down"
            ),
        ]
        if i == 1:
            nodes.append(
                helper.make_node("Concat", ["past", "relu_1"], ["present"], axis=1, name=f"{block}/present")
            )
        nodes.append(
            helper.make_node("Add", [stream, f"{block}.down"], [f"sum_{i}"], name=f"{block}/sum_{i}")
        )
        stream = f"sum_{i}"
    nodes.append(helper.make_node("MatMul", [stream, "lm_head.weight"], ["logits"], name="lm_head"))
    shape = ["batch", "sequence", WIDTH]
    floats = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name in ("x", "mask", "logits")
    }
    past = helper.make_tensor_value_info("past", TensorProto.FLOAT, ["batch", "past", WIDTH])
    present = helper.make_tensor_value_info("present", TensorProto.FLOAT, ["batch", "total", WIDTH])
    graph = helper.make_graph(
        nodes, "decoder", [floats["x"], floats["mask"], past], [floats["logits"], present],
        [numpy_helper.from_array(array, f"{name}.weight") for name, array in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path = tmp_path_factory.mktemp("decoder") / "decoder.onnx"
    onnx.save(model, path, save_as_external_data=True, location="decoder.onnx.data", size_threshold=0)
    return path


@pytest.fixture
def feed() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "x": rng.normal(size=(1, 5, WIDTH)).astype(np.float32),
        "mask": rng.normal(size=(1, 5, WIDTH)).astype(np.float32),
        "past": np.zeros((1, 0, WIDTH), np.float32),
    }


def whole(path: Path, feed: dict[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    """The named tensors from one run of the whole graph."""
    model = onnx.load(path)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(names, session.run(None, feed), strict=True))


def test_sections_compute_what_the_whole_graph_computes(decoder, feed):
    tensors = [*LINEARS[:-1], "logits", *(f"sum_{i}" for i in range(BLOCKS))]
    expected = whole(decoder, feed, tensors)
    expected["lm_head"] = expected.pop("logits")
    for i in range(BLOCKS):
        expected[f"model.layers.{i}"] = expected.pop(f"sum_{i}")
    with quiet_polygraphy():
        found = list(run_sections(decoder, feed, LINEARS))

    assert [section.block for section in found] == [f"model.layers.{i}" for i in range(BLOCKS)] + [None]
    order = [name for section in found for name in section.outputs]
    assert order == ["model.layers.0.up", "model.layers.0.down", "model.layers.0",
                     "model.layers.1.up", "model.layers.1.down", "model.layers.1",
                     "model.layers.2.up", "model.layers.2.down", "model.layers.2", "lm_head"]  # fmt: skip
    for section in found:
        for name, array in section.outputs.items():
            np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-5)


def test_a_section_carries_the_weights_of_its_own_block_only(decoder, feed, monkeypatch):
    weights = []
    build = sections._piece

    def spy(*args):
        piece = build(*args)
        weights.append({tensor.name for tensor in piece.graph.initializer})
        assert all(tensor.data_location == TensorProto.EXTERNAL for tensor in piece.graph.initializer)
        return piece

    monkeypatch.setattr(sections, "_piece", spy)
    with quiet_polygraphy():
        list(run_sections(decoder, feed, LINEARS))
    blocks = [{f"model.layers.{i}.up.weight", f"model.layers.{i}.down.weight"} for i in range(BLOCKS)]
    assert weights == [*blocks, {"lm_head.weight"}]


def test_tensors_are_put_back_in_order_before_anyone_sees_them(decoder, feed):
    """Also the residual stream, which has the order of the last linear that is added to it."""

    def undo(name, array):
        return array[..., ::-1] if name in ("model.layers.2.down", "model.layers.0.up") else array

    with quiet_polygraphy():
        stored = {
            name: array for s in run_sections(decoder, feed, LINEARS) for name, array in s.outputs.items()
        }
        found = {
            name: array
            for s in run_sections(decoder, feed, LINEARS, undo)
            for name, array in s.outputs.items()
        }
    for name, array in stored.items():
        changed = name in ("model.layers.2.down", "model.layers.2", "model.layers.0.up")
        np.testing.assert_array_equal(found[name], array[..., ::-1] if changed else array)


def test_sections_cover_every_node_once(decoder):
    graph = onnx.load(decoder, load_external_data=False).graph
    found = cut(graph, LINEARS)
    assert [s.start for s in found] == [0, *(s.stop for s in found[:-1])]
    assert found[-1].stop == len(graph.node)
    assert [s.output for s in found] == ["sum_0", "sum_1", "sum_2", None]


@pytest.mark.parametrize(
    ("module", "block", "index"),
    [
        ("model.layers.3.mlp.down_proj", "model.layers.3", 3),
        ("model.decoder.layers.11.fc1", "model.decoder.layers.11", 11),
        ("transformer.h.0", "transformer.h.0", 0),
        ("model.layers.2.mlp.experts.7.down_proj", "model.layers.2", 2),
        ("lm_head", None, None),
        ("model.decoder.project_out", None, None),
    ],
)
def test_block_of_a_module(module, block, index):
    assert (block_of(module), block_index(module)) == (block, index)
