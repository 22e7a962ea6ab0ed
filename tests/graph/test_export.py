"""Export: the ONNX graphs against PyTorch, for every family, with caches, padding and permutations."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import psutil
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from esparse_trt.artifacts import BuildDir
from esparse_trt.errors import EsparseError
from esparse_trt.graph.export import export, export_models, insert_permutations, read_permutations
from esparse_trt.graph.feeds import cache_feed, example_feed, next_cache, token_feed
from esparse_trt.graph.trace import TracedGraph, trace
from esparse_trt.graph.wrapper import FAMILIES
from esparse_trt.recipe import parse_recipe
from esparse_trt.records import ExportRecord, LayerRecord, PruneRecord

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
LAYER_TYPES = ["sliding_attention", "full_attention"]
WINDOW = 6  # shorter than the prompts, so that it matters
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, layer_types=LAYER_TYPES),
    "qwen3": Qwen3Config(**SIZES),
    "gemma3_text": Gemma3TextConfig(**SIZES, sliding_window=WINDOW, layer_types=LAYER_TYPES),
    "opt": OPTConfig(
        vocab_size=320, hidden_size=64, word_embed_proj_dim=64, ffn_dim=96, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=256,
    ),
    # six heads: ALiBi's slopes are irregular where the number is no power of two
    "bloom": BloomConfig(vocab_size=320, hidden_size=96, n_layer=2, n_head=6),
}  # fmt: skip
ALONE = ("o_proj", "out_proj", "dense", "down_proj", "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h")

DOWN = "model.layers.0.mlp.down_proj"

PROMPT, PADDING = 9, [0, 3]
GENERATED = 5


@dataclass
class Case:
    """One family on disk: dense and pruned checkpoints, both ONNX files, and the PyTorch models."""

    folder: Path
    record: ExportRecord
    models: dict[str, PreTrainedModel]
    permutations: dict[str, torch.Tensor]

    def session(self, kind: str) -> ort.InferenceSession:
        return ort.InferenceSession(self.folder / f"{kind}.onnx", providers=["CPUExecutionProvider"])

    def graph(self, kind: str) -> onnx.GraphProto:
        return onnx.load(self.folder / f"{kind}.onnx").graph


def random_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Weights large enough that every part of the model shows in the logits, biases and norms included."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
            else:
                parameter.normal_(0.5, 0.3)
    return model.to(dtype)


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }


def prune(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Random permutations, shared by the layers of a site, and random 2:4 masks in the permuted order."""
    generator = torch.Generator().manual_seed(1)
    sites: dict[str, torch.Tensor] = {}
    permutations = {}
    for name, layer in linear_layers(model).items():
        parent, _, leaf = name.rpartition(".")
        site = name if leaf in ALONE else parent
        sites.setdefault(site, torch.randperm(layer.in_features, generator=generator))
        permutations[name] = order = sites[site]
        keep = torch.rand(layer.out_features, layer.in_features // 4, 4, generator=generator)
        mask = (keep.argsort(-1).argsort(-1) < 2).view_as(layer.weight)
        with torch.no_grad():
            layer.weight[:, order] = layer.weight[:, order] * mask
    return permutations


def make_case(folder: Path, config: PretrainedConfig, dtype: str = "float32") -> Case:
    models = {kind: random_model(config, getattr(torch, dtype)) for kind in ("dense", "explicit")}
    permutations = prune(models["explicit"])
    for kind, model in models.items():
        model.save_pretrained(folder / kind)
    record = export_models(
        folder / "dense",
        folder / "explicit",
        permutations,
        dense_path=folder / "dense.onnx",
        explicit_path=folder / "explicit.onnx",
        dtype=dtype,
        opset=20,
    )
    return Case(folder, record, models, permutations)


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp(request.param), CONFIGS[request.param])


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    """Relative L2."""
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def run(session: ort.InferenceSession, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def prompt(seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(5, 320, (2, PROMPT), dtype=np.int64)


def tensors(feed: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in feed.items() if "past" not in name}


# --- against PyTorch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "explicit"])
@torch.no_grad()
def test_prefill_and_decode_equal_pytorch(case: Case, kind: str) -> None:
    """Logits and caches, where there is no padding; the second call continues from the first one's cache."""
    inputs, model, session = case.record.inputs, case.models[kind], case.session(kind)
    feed = token_feed(inputs, prompt(), padding=PADDING) | cache_feed(inputs, batch=2, past=0)
    prefill = run(session, feed)
    expected = model(**tensors(feed), use_cache=True)
    for row, padding in enumerate(PADDING):
        assert distance(prefill["logits"][row, padding:], expected.logits[row, padding:]) < 1e-5
    for layer, cache in enumerate(expected.past_key_values.layers):
        kept = cache.keys.shape[2]  # transformers drops what has left the window
        for row, padding in enumerate(PADDING):
            tokens = slice(-min(kept, PROMPT - padding), None)
            for kind_, reference in (("key", cache.keys), ("value", cache.values)):
                actual = prefill[f"present.{layer}.{kind_}"][row, :, tokens]
                assert distance(actual, reference[row, :, tokens]) < 1e-5

    feed = token_feed(inputs, prompt(4)[:, :2], past=PROMPT, padding=PADDING) | next_cache(prefill)
    decode = run(session, feed)
    expected = model(**tensors(feed), past_key_values=expected.past_key_values, use_cache=True)
    assert distance(decode["logits"], expected.logits) < 1e-5
    assert decode["present.0.key"].shape[2] == PROMPT + 2


def test_greedy_generation_equals_pytorch(case: Case) -> None:
    inputs, session = case.record.inputs, case.session("explicit")
    ids = prompt()
    feed = token_feed(inputs, ids, padding=PADDING) | cache_feed(inputs, batch=2, past=0)
    settings = GenerationConfig(max_new_tokens=GENERATED, do_sample=False, pad_token_id=0)
    expected = case.models["explicit"].generate(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(feed["attention_mask"]),
        generation_config=settings,
        eos_token_id=None,
    )
    tokens = []
    for past in range(PROMPT, PROMPT + GENERATED):
        outputs = run(session, feed)
        tokens.append(outputs["logits"][:, -1].argmax(-1)[:, None])
        feed = token_feed(inputs, tokens[-1], past=past, padding=PADDING) | next_cache(outputs)
    assert np.array_equal(np.concatenate(tokens, axis=1), expected[:, PROMPT:].numpy())


def test_padding_does_not_reach_other_tokens(case: Case) -> None:
    """Also with an all-padding row: no NaN anywhere, and rows do not see each other's padding."""
    inputs, session = case.record.inputs, case.session("dense")
    ids = prompt()
    padded = run(session, token_feed(inputs, ids, padding=[PROMPT, 4]) | cache_feed(inputs, batch=2, past=0))
    alone = run(session, token_feed(inputs, ids[1:, 4:]) | cache_feed(inputs, batch=1, past=0))
    assert all(np.isfinite(value).all() for value in padded.values())
    assert distance(padded["logits"][1, 4:], alone["logits"][0]) < 1e-5


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A LLaMA in fp16, through the stage itself."""
    folder = BuildDir(tmp_path_factory.mktemp("half"))
    models = {kind: random_model(CONFIGS["llama"], torch.float16) for kind in ("dense", "explicit")}
    permutations = prune(models["explicit"])
    models["dense"].save_pretrained(folder.root / "dense")
    models["explicit"].save_pretrained(folder.checkpoint)
    save_file({name: order.clone() for name, order in permutations.items()}, folder.permutation)
    sections = {"model": {"path": "dense"}, "calibration": {"text": {"path": "unused.txt"}}}
    recipe = parse_recipe({"name": "test", **sections}, base=folder.root)
    pruned = PruneRecord.model_construct(layers=[layer_record(name) for name in permutations])
    return Case(folder.onnx, export(recipe, folder, pruned), models, permutations)


def layer_record(name: str) -> LayerRecord:
    return LayerRecord(
        name=name, site="down", block=0, shape=(64, 96), pattern="2:4", reason=None, permuted=True,
        sparsity=0.5, kept=None,
    )  # fmt: skip


def test_stage(half: Case) -> None:
    """From a recipe and the files of the prune stage to the files and the record of the contract."""
    record = half.record
    assert (record.dtype, record.opset, len(record.gathers)) == ("float16", 20, 8)
    assert {spec.dtype for spec in record.outputs} == {"float16"}
    for kind, size in record.bytes.items():
        files = [half.folder / f"{kind}.onnx{suffix}" for suffix in ("", ".data")]
        assert sum(file.stat().st_size for file in files) == size
    feed = example_feed(record.inputs, batch=2, sequence=3, past=4, vocab=320, seed=0)
    assert run(half.session("explicit"), feed)["logits"].shape == (2, 3, 320)


@pytest.mark.parametrize("kind", ["dense", "explicit"])
@torch.no_grad()
def test_float16_agrees_with_pytorch_layer_by_layer(half: Case, kind: str) -> None:
    """Every linear layer's output can be asked for by its module name, and is close to PyTorch's."""
    model = half.models[kind]
    layers = linear_layers(model)
    reference: dict[str, np.ndarray] = {}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, __, y, name=name: reference.__setitem__(name, y.numpy()))
    inputs = half.record.inputs
    feed = token_feed(inputs, prompt()) | cache_feed(inputs, batch=2, past=0)
    expected = model(**tensors(feed)).logits.numpy()

    proto = onnx.load(half.folder / f"{kind}.onnx")
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in layers)
    actual = run(ort.InferenceSession(proto.SerializeToString()), feed)
    assert actual["logits"].dtype == np.float16
    assert distance(actual["logits"], expected) < 5e-3
    assert {name: d for name in layers if (d := distance(actual[name], reference[name])) > 2e-3} == {}


# --- the graph -------------------------------------------------------------------------------------------


def test_interface(case: Case) -> None:
    config = case.models["dense"].config
    tokens = ["input_ids", "attention_mask"] + ["position_ids"] * (config.model_type != "bloom")
    cache = [f"{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
    specs = {spec.name: spec for spec in case.record.inputs}
    assert list(specs) == [*tokens, *(f"past_key_values.{name}" for name in cache)]
    assert specs["attention_mask"].shape == ["batch", "past + sequence"]
    assert specs["past_key_values.1.value"].shape[::2] == ["batch", "past"]
    outputs = {spec.name: spec for spec in case.record.outputs}
    assert list(outputs) == ["logits", *(f"present.{name}" for name in cache)]
    assert outputs["logits"].shape == ["batch", "sequence", config.vocab_size]
    assert outputs["present.0.key"].shape[2] == "past + sequence"


@pytest.mark.parametrize("kind", ["dense", "explicit"])
def test_graph_is_clean(case: Case, kind: str) -> None:
    """Nothing that TensorRT cannot take, no dangling input, a shape for every tensor, weights outside."""
    path = case.folder / f"{kind}.onnx"
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    operators = {node.op_type for node in graph.node}
    assert not operators & {"NonZero", "Loop", "If", "Scan", "ScatterND", "ScatterElements", "Trilu"}
    assert not model.functions and {opset.domain for opset in model.opset_import} == {""}
    used = {name for node in graph.node for name in node.input}
    assert {value.name for value in [*graph.input, *graph.initializer]} <= used
    known = {value.name for value in [*graph.value_info, *graph.input, *graph.output]}
    assert {name for node in graph.node for name in node.output} <= known
    assert len({node.name for node in graph.node}) == len(graph.node)
    assert path.stat().st_size < 80_000
    locations = {e.value for t in graph.initializer for e in t.external_data if e.key == "location"}
    assert locations == {f"{kind}.onnx.data"}
    assert {path.name for path in case.folder.iterdir() if path.is_file()} == {
        f"{name}.onnx{suffix}" for name in ("dense", "explicit") for suffix in ("", ".data")
    }


def test_every_linear_layer_is_traceable(case: Case) -> None:
    """Node, weight, bias and output of each layer carry its name; stored weights are those of the module."""
    graph = case.graph("dense")
    nodes = {node.name: node for node in graph.node}
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    produced = {name for node in graph.node for name in node.output}
    layers = linear_layers(case.models["dense"])
    assert layers.keys() | {"lm_head"} == case.record.linears.keys()
    for name, layer in layers.items():
        assert case.record.linears[name] == f"{name}.weight" and name in produced
        stored = numpy_helper.to_array(initializers[f"{name}.weight"])
        gemm = nodes[name].op_type == "Gemm"
        assert np.array_equal(stored if gemm else stored.T, layer.weight.detach().numpy())
        assert (layer.bias is None) == (f"{name}.bias" not in initializers)


def test_explicit_weights_are_sparse_in_memory_order(case: Case) -> None:
    """The 2:4 pattern lies along K of the stored weights, one Gather serves the layers of a site."""
    graph = case.graph("explicit")
    nodes = {node.name: node for node in graph.node}
    initializers = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for name, order in case.permutations.items():
        weight = initializers[case.record.linears[name]]
        weight = weight if nodes[name].op_type == "Gemm" else weight.T
        assert ((weight.reshape(len(weight), -1, 4) != 0).sum(-1) <= 2).all()
        gather = next(node for node in graph.node if nodes[name].input[0] in node.output)
        assert gather.op_type == "Gather" and gather.name in case.record.gathers
        assert np.array_equal(initializers[gather.input[1]], order.numpy())
        assert gather.input[1] == gather.name.replace(".permute", ".permutation")
    sites = {order.data_ptr() for order in case.permutations.values()}
    assert len(case.record.gathers) == len(sites)


@pytest.mark.parametrize("kind", ["dense", "explicit"])
def test_tensorrt_parses(case: Case, kind: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network()
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(case.folder / f"{kind}.onnx")), parser.get_error(0).desc()
    inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    assert inputs == [spec.name for spec in case.record.inputs]


# --- tied embeddings, opsets, scale ----------------------------------------------------------------------


def test_tied_embeddings_are_stored_once(case: Case) -> None:
    tied = case.models["dense"].config.tie_word_embeddings
    head = case.record.linears["lm_head"]
    assert (head == "lm_head.weight") != tied
    data = onnx.load(case.folder / "dense.onnx", load_external_data=False).graph.initializer
    shapes = [list(tensor.dims) for tensor in data]
    vocab, hidden = 320, case.models["dense"].config.hidden_size
    assert shapes.count([vocab, hidden]) + shapes.count([hidden, vocab]) == (1 if tied else 2)


@pytest.mark.parametrize("opset", [18, 22])
@torch.no_grad()
def test_a_permuted_head_is_untied_from_the_embedding(tmp_path: Path, opset: int) -> None:
    """And the oldest and newest operator set give the same results as the default."""
    model = random_model(LlamaConfig(**SIZES | {"num_hidden_layers": 1}, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    paths = {f"{kind}_path": tmp_path / f"{kind}.onnx" for kind in ("dense", "explicit")}
    record = export_models(tmp_path, tmp_path, {"lm_head": order}, **paths, dtype="float32", opset=opset)
    assert record.linears["lm_head"] == "lm_head.weight" and record.gathers == ["lm_head.permute"]
    feed = token_feed(record.inputs, prompt()) | cache_feed(record.inputs, batch=2, past=0)
    for path in paths.values():
        assert [item.version for item in onnx.load(path, load_external_data=False).opset_import] == [opset]
        logits = run(ort.InferenceSession(path), feed)["logits"]
        assert distance(logits, model(**tensors(feed)).logits) < 1e-5


@pytest.fixture(scope="module")
def huge() -> TracedGraph:
    """One layer of a 70B model, with its embedding and head."""
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=1,
        num_attention_heads=64, num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    before = psutil.Process().memory_info().rss
    traced = trace(config, dtype=torch.float16, opset=20)
    assert psutil.Process().memory_info().rss - before < 2**29  # the embedding alone would be 2 GB
    return traced


def test_tracing_makes_no_weights(huge: TracedGraph) -> None:
    initializers = huge.model.graph.initializers
    assert {name for name, value in initializers.items() if value.const_value is None} == set(huge.weights)
    constants = [value.const_value for name, value in initializers.items() if name not in huge.weights]
    assert sum(tensor.nbytes for tensor in constants if tensor is not None) < 10_000


# --- permutations and errors -----------------------------------------------------------------------------


def test_no_permutation_file_means_no_permutations(tmp_path: Path) -> None:
    assert read_permutations(tmp_path / "permutation.safetensors") == {}


def test_truncated_permutation_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "permutation.safetensors"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(EsparseError, match="cannot read the permutations"):
        read_permutations(path)


def test_the_identity_needs_no_gather(huge: TracedGraph) -> None:
    nodes = len(huge.model.graph)
    assert insert_permutations(huge, {DOWN: torch.arange(28_672)}) == ([], {})
    assert len(huge.model.graph) == nodes


@pytest.mark.parametrize(
    ("name", "order", "message"),
    [
        ("model.layers.0.mlp.nothing", torch.arange(28_672).flip(0), "no linear layer is called"),
        (DOWN, torch.arange(64).flip(0), "no permutation of the 28672 input channels"),
        (DOWN, torch.zeros(28_672, dtype=torch.int64), "no permutation of the 28672"),
        (DOWN, torch.arange(28_672.0).flip(0), "no permutation of the 28672"),
    ],
)
def test_bad_permutations(huge: TracedGraph, name: str, order: torch.Tensor, message: str) -> None:
    with pytest.raises(EsparseError, match=message):
        insert_permutations(huge, {name: order})


def test_unsupported_models_are_refused_before_tracing(tmp_path: Path) -> None:
    paths = {"dense_path": tmp_path / "dense.onnx", "explicit_path": tmp_path / "explicit.onnx"}
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    for config, message in (
        ({"model_type": "gpt2"}, "cannot export the architecture 'gpt2'"),
        (LlamaConfig(**SIZES, rope_parameters=rope).to_dict(), "rotary embedding 'dynamic'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(EsparseError, match=message):
            export_models(tmp_path, tmp_path, {}, **paths, dtype="float16", opset=20)
    assert not paths["dense_path"].exists()


def test_every_family_is_tested() -> None:
    assert CONFIGS.keys() == FAMILIES.keys()
