"""Packing real exports of tiny random models: the same outputs from compressed weights."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig, Qwen2Config

from esparse_trt.artifacts import BuildDir
from esparse_trt.errors import CheckFailed
from esparse_trt.graph import es24
from esparse_trt.graph.export import export_models
from esparse_trt.graph.fold import fold
from esparse_trt.graph.graph import OnnxGraph, write_model
from esparse_trt.graph.linears import find_linear
from esparse_trt.graph.pack import pack
from esparse_trt.graph.proof import LIMIT, example_feeds, relative_l2
from esparse_trt.recipe import parse_recipe
from esparse_trt.records import ExportRecord, Reason
from esparse_trt.sparsity.pattern import Pattern, nm_mask

COMMON = dict(vocab_size=96, hidden_size=128, num_hidden_layers=1, num_attention_heads=2)
GATED = dict(**COMMON, intermediate_size=256, num_key_value_heads=1, head_dim=64)
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**GATED),
    "qwen2": Qwen2Config(**GATED, tie_word_embeddings=True),
    "opt": OPTConfig(**COMMON, ffn_dim=256, word_embed_proj_dim=128, max_position_embeddings=64),
}
READ_TOGETHER = [{"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"fc1"}]


class Build(NamedTuple):
    folder: BuildDir
    exported: ExportRecord


def make_build(root: Path, config: PretrainedConfig) -> Build:
    """A build up to and including fold; every layer that reads the residual stream is permuted."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases too
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(root / "dense")
    orders: dict[str, torch.Tensor] = {}
    shared: dict[tuple[str, int], torch.Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        parent, leaf = name.rsplit(".", 1)
        site = next((i for i, leaves in enumerate(READ_TOGETHER) if leaf in leaves), None)
        order = torch.arange(module.in_features)
        if site is not None:
            order = orders[name] = shared.setdefault((parent, site), torch.randperm(module.in_features))
        with torch.no_grad():
            module.weight[:, order] *= nm_mask(module.weight[:, order].abs(), Pattern(2, 4))
    folder = BuildDir(root)
    model.save_pretrained(folder.checkpoint)
    exported = export_models(
        root / "dense",
        folder.checkpoint,
        orders,
        dense_path=folder.dense_onnx,
        explicit_path=folder.explicit_onnx,
        dtype="float16",
        opset=20,
    )
    recipe = {
        "name": "test",
        "model": {"path": "dense"},
        "calibration": {"text": {"path": "text.txt"}},
        "export": {"dtype": "float16"},
    }
    fold(parse_recipe(recipe, base=root), folder, exported)
    return Build(folder, exported)


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Build]:
    """Builds by family, each made once; every test packs again."""

    @functools.cache
    def make(name: str) -> Build:
        return make_build(tmp_path_factory.mktemp(name), FAMILIES[name])

    return make


def packed_path(build: Build) -> Path:
    return build.folder.onnx / "packed.onnx"


def run(path: Path, feed: dict[str, NDArray]) -> dict[str, NDArray]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


EXPECTED = {
    "llama": {
        "self_attn.q_proj+k_proj+v_proj": ("SparseGemmPermute", (256, 128)),
        "self_attn.o_proj": ("SparseGemm", (128, 128)),
        "mlp.gate_proj+up_proj": ("SparseGemmPermute", (512, 128)),
        "mlp.down_proj": ("SparseGemm", (128, 256)),
    },
    "qwen2": {
        "self_attn.q_proj+k_proj+v_proj": ("SparseGemmBiasPermute", (256, 128)),
        "self_attn.o_proj": ("SparseGemm", (128, 128)),
        "mlp.gate_proj+up_proj": ("SparseGemmPermute", (512, 128)),
        "mlp.down_proj": ("SparseGemm", (128, 256)),
    },
    "opt": {
        "self_attn.q_proj+k_proj+v_proj": ("SparseGemmBiasPermute", (384, 128)),
        "self_attn.out_proj": ("SparseGemmBias", (128, 128)),
        "fc1": ("SparseGemmBiasPermute", (256, 128)),
        "fc2": ("SparseGemmBias", (128, 256)),
    },
}


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_model_computes_the_same(builds: Any, name: str) -> None:
    build = builds(name)
    record = pack(build.folder, build.exported)
    path = packed_path(build)
    onnx.checker.check_model(path, full_check=True)
    for feed in example_feeds(build.exported.inputs, 96):
        before, after = run(build.folder.sparse_onnx, feed), run(path, feed)
        assert before.keys() == after.keys()
        assert all(relative_l2(after[key], before[key]) <= 2e-3 for key in before)
    assert record.logits_error is not None
    assert record.logits_error <= LIMIT
    assert record.bytes == sum(file.stat().st_size for file in build.folder.onnx.glob("packed.onnx*"))
    assert not list(build.folder.onnx.glob(".*")), "temporary files were left behind"


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_of_the_packed_model(builds: Any, name: str) -> None:
    build = builds(name)
    record = pack(build.folder, build.exported)
    prefix = "model.decoder.layers.0." if name == "opt" else "model.layers.0."
    found = {gemm.name.removeprefix(prefix): (gemm.operator, gemm.shape) for gemm in record.gemms}
    graph = OnnxGraph(packed_path(build))
    nodes = list(graph.model.graph.node)
    assert set(found) == set(EXPECTED[name])
    assert found == EXPECTED[name]
    assert {n.name: n.op_type for n in nodes if n.domain == "esparse"} == {
        gemm.name: gemm.operator for gemm in record.gemms
    }
    assert list(record.dense) == ["lm_head"]
    assert len(record.permutations) == 2
    assert not [n.name for n in nodes if n.name.endswith(".permute")]
    made = {tensor for n in nodes for tensor in n.output}
    assert made >= build.exported.linears.keys() - {"lm_head"}, "layer outputs lost their names"
    known = {v.name for v in graph.model.graph.value_info}
    assert known <= made, "shapes of tensors that are gone"


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_decompress_bit_for_bit_and_are_smaller(builds: Any, name: str) -> None:
    build = builds(name)
    record = pack(build.folder, build.exported)
    sparse, packed = OnnxGraph(build.folder.sparse_onnx), OnnxGraph(packed_path(build))
    for gemm in record.gemms:
        values, metadata = packed.read(f"{gemm.name}.values"), packed.read(f"{gemm.name}.metadata")
        weight = es24.unpack(es24.Packed(values, metadata))
        expected = np.concatenate([stored_weight(sparse, build, layer) for layer in gemm.layers])
        assert weight.shape == gemm.shape == expected.shape
        assert np.array_equal(weight.view(np.uint16), np.where(expected == 0, 0, expected.view(np.uint16)))
        assert values.nbytes + metadata.nbytes == gemm.bytes == 0.5625 * gemm.dense_bytes
        assert gemm.dense_bytes == expected.nbytes
    gone = {build.exported.linears[layer] for gemm in record.gemms for layer in gemm.layers}
    assert not gone & packed.initializers.keys()


def stored_weight(graph: OnnxGraph, build: Build, layer: str) -> NDArray:
    """`[N, K]`"""
    linear = find_linear(graph, layer, build.exported.linears[layer])
    values = graph.read(linear.weight)
    return np.ascontiguousarray(values if linear.k_axis else values.T)


def test_the_reference_implementation_runs_it(builds: Any) -> None:
    build = builds("llama")
    pack(build.folder, build.exported)
    feed = example_feeds(build.exported.inputs, 96)[1]
    model = ReferenceEvaluator(str(packed_path(build)))
    logits = model.run(["logits"], feed)[0]
    assert relative_l2(logits, run(build.folder.sparse_onnx, feed)["logits"]) <= 1e-2  # sums in fp16


def changed_build(build: Build, root: Path, model: onnx.ModelProto, weights: dict[str, NDArray]) -> Build:
    """A copy of a build whose `sparse.onnx` has another graph or other weights."""
    graph = OnnxGraph(build.folder.sparse_onnx)
    folder = BuildDir(root)
    write_model(
        model, lambda name: weights[name] if name in weights else graph.read(name), folder.sparse_onnx
    )
    return Build(folder, build.exported)


def test_a_dense_layer_among_sparse_ones(builds: Any, tmp_path: Path) -> None:
    """What is not 2:4 stays, and so does the permutation of the tensor that it reads."""
    build = builds("qwen2")
    graph = OnnxGraph(build.folder.sparse_onnx)
    full = {name: np.ones_like(graph.read(name)) for name in graph.initializers if "v_proj.weight" in name}
    record = pack(*changed_build(build, tmp_path, graph.model, full))
    operators = {gemm.name.rsplit(".", 1)[-1]: gemm.operator for gemm in record.gemms}
    assert operators["q_proj+k_proj"] == "SparseGemmBias"
    assert operators["gate_proj+up_proj"] == "SparseGemmPermute"
    assert "its weight is not 2:4: row 0, group 0" in record.dense["model.layers.0.self_attn.v_proj"].reason
    assert "is shared with other nodes" in record.dense["lm_head"].reason  # tied to the embedding
    kept = [n.name for n in OnnxGraph(tmp_path / "onnx" / "packed.onnx").model.graph.node]
    assert set(build.exported.gathers) - record.permutations.keys() == set(build.exported.gathers) & set(kept)
    assert list(record.permutations.values()) == ["model.layers.0.mlp.gate_proj+up_proj"]


def test_other_uses_of_a_weight(builds: Any, tmp_path: Path) -> None:
    """A scaled Gemm and a weight that something else reads are not plain linear layers."""
    build = builds("opt")
    model = OnnxGraph(build.folder.sparse_onnx).model
    nodes = {node.name.rpartition(".")[2]: node for node in model.graph.node}
    next(item for item in nodes["fc1"].attribute if item.name == "alpha").f = 0.5
    model.graph.node.append(onnx.helper.make_node("Identity", [nodes["q_proj"].input[1]], ["as_it_is"]))
    record = pack(*changed_build(build, tmp_path, model, {}))
    reasons = {layer.rpartition(".")[2]: dense.reason for layer, dense in record.dense.items()}
    assert "Gemm 'model.decoder.layers.0.fc1' is not a plain linear layer" in reasons["fc1"]
    assert "is shared with other nodes" in reasons["q_proj"]
    assert {"k_proj+v_proj", "fc2"} <= {gemm.name.rpartition(".")[2] for gemm in record.gemms}


def test_fp32_is_not_packed(families: Any) -> None:
    """Nothing is written then, and an earlier file goes."""
    build = families("llama").build("gather")
    fold(build.recipe, build.folder, build.exported)
    stale = [build.folder.onnx / "packed.onnx", build.folder.onnx / "packed.onnx.data"]
    for path in stale:
        path.write_bytes(b"of an earlier build")
    record = pack(build.folder, build.exported)
    assert record.gemms == []
    assert (record.bytes, record.logits_error) == (0, None)
    assert record.dense.keys() == build.exported.linears.keys()
    assert {(dense.code, dense.reason) for dense in record.dense.values()} == {
        (Reason.not_eligible_dtype, "es24-v1 holds float16 or bfloat16, not float32")
    }
    assert not any(path.exists() for path in stale)


def test_wrong_weights_are_noticed(builds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    build = builds("llama")
    tile = es24.tile
    monkeypatch.setattr(es24, "tile", lambda places, channels: tile(places, channels)[..., ::-1, :].copy())
    with pytest.raises(CheckFailed, match="packing changed 'logits'"):
        pack(build.folder, build.exported)


def test_one_dense_weight_in_memory_at_a_time(builds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    build = builds("llama")
    alive: list[weakref.ref[Any]] = []
    read = OnnxGraph.read

    def counted(self: OnnxGraph, name: str) -> NDArray:
        assert not [ref for ref in alive if ref() is not None], f"before {name}"
        values = read(self, name)
        if values.ndim == 2:
            alive.append(weakref.ref(values))
        return values

    monkeypatch.setattr(OnnxGraph, "read", counted)
    pack(build.folder, build.exported)
    assert len(alive) > 7
