"""What the sparse engine is built from; and real engines with the plugin, by TensorRT-RTX on the CPU."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import helper, numpy_helper
from transformers import LlamaConfig, LlamaForCausalLM

from esparse_trt.artifacts import BuildDir
from esparse_trt.engine import libraries, plugin, source
from esparse_trt.engine import table as tables
from esparse_trt.engine.build import build_engines, engine_bytes
from esparse_trt.engine.plugin import Plugin
from esparse_trt.engine.shapes import input_ranges
from esparse_trt.engine.source import choose_source
from esparse_trt.engine.table import Best, Device, Row, Table
from esparse_trt.errors import EsparseError
from esparse_trt.graph.proof import LIMIT, example_feeds, outputs, relative_l2
from esparse_trt.pipeline import build
from esparse_trt.recipe import load_recipe, parse_recipe
from esparse_trt.records import ExportRecord, PackRecord

try:
    import tensorrt_rtx as rtx
except ImportError:
    rtx = None

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
PROFILES = {
    "prefill": {"batch": [1, 1, 2], "sequence": [1, 16, 64], "past": [0, 0, 0]},
    "decode": {"batch": [1, 2, 2], "sequence": [1, 1, 1], "past": [1, 16, 64]},
}
DEVICE = Device("NVIDIA H100 80GB HBM3", 90, 132, "", "13.0")


def make_recipe(**changes):
    data = {
        "name": "tiny",
        "model": {"path": "model"},
        "calibration": {"text": {"source": "file", "path": "text.txt"}},
        "traffic": [{"batch": 2, "prompt": 16, "generated": 16}],
        "engine": {"profiles": PROFILES, "flavour": "tensorrt_rtx", "dense": False, **changes},
    }
    return parse_recipe(data, base=Path.cwd())


@pytest.fixture(scope="module")
def packed(tiny_llama, sample_text, tmp_path_factory):
    """A build up to the pack stage of a LLaMA whose layers can be packed."""
    model = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(model)
    for file in tiny_llama.glob("*token*"):
        (model / file.name).write_bytes(file.read_bytes())
    text = {"source": "file", "path": str(sample_text)}
    recipe = parse_recipe(
        {
            "name": "packable",
            "model": {"path": str(model)},
            "calibration": {"text": text, "samples": 4, "length": 32},
            "prune": {"permute": {"local": {"block": 32}}},
        },
        base=model,
    )
    folder = BuildDir(tmp_path_factory.mktemp("build"))
    manifest = build(recipe, folder.root, last="pack")
    return folder, manifest.record("export", ExportRecord), manifest.record("pack", PackRecord)


@pytest.fixture
def no_library(monkeypatch, tmp_path):
    monkeypatch.setenv(libraries.VARIABLE, str(tmp_path))


@pytest.fixture
def fake_plugin(monkeypatch):
    """A plugin that loads anywhere, and no GPU."""
    found = Plugin(Path("/lib/libesparse_trt_plugin.so"), "0.1.0", "es24-v1", "0123456789ab", 10)
    monkeypatch.setattr(plugin, "load", lambda flavour, library: found)
    monkeypatch.setattr(source.flavours, "find_gpu", lambda: "no NVIDIA driver")
    return found


def choose(built, **changes):
    folder, exported, record = built
    return choose_source(make_recipe(**changes), folder, exported, record, "tensorrt_rtx")


# --- which file -----------------------------------------------------------------------------------------


def test_without_a_library_the_engine_is_built_from_sparse_onnx_and_says_why(packed, no_library):
    chosen = choose(packed)
    assert chosen.onnx == packed[0].sparse_onnx
    assert chosen.plugin is None
    assert {(layer.kernel, layer.code.value) for layer in chosen.layers} == {("native", "no_plugin")}
    assert f"{libraries.PLUGIN} was not found" in chosen.no_plugin


def test_a_required_plugin_that_is_not_there_is_an_error(packed, no_library):
    with pytest.raises(EsparseError, match="was not found") as error:
        choose(packed, sparse_gemm="plugin")
    assert error.value.where == "engine.sparse_gemm: plugin"
    assert "cmake" in error.value.fix


def test_the_recipe_can_do_without(packed, fake_plugin):
    for wish in ("native", "dense"):
        chosen = choose(packed, sparse_gemm=wish)
        assert chosen.no_plugin == f"the recipe sets engine.sparse_gemm: {wish}"
        assert {(layer.kernel, layer.code.value) for layer in chosen.layers} == {(wish, "asked")}


def test_float32_has_no_kernels(packed, fake_plugin):
    folder, exported, record = packed
    exported = exported.model_copy(update={"dtype": "float32"})
    chosen = choose((folder, exported, record))
    assert chosen.no_plugin == "its kernels are for float16 and bfloat16, the model is float32"


def test_nothing_packed_means_no_plugin(packed, fake_plugin):
    folder, exported, record = packed
    for nothing in (None, record.model_copy(update={"gemms": []})):
        assert choose((folder, exported, nothing)).no_plugin == "no layer could be packed"


# --- engine.onnx ----------------------------------------------------------------------------------------


def table_of(record: PackRecord, tmp_path: Path, slow: str = "") -> Path:
    """A table in which sparse is twice as fast, but for the GEMM called `slow`."""
    rows = []
    for gemm in record.gemms:
        for m in (1, 16, 64):
            ours = Best(f"decode_{m}", *[20.0 if gemm.name == slow else 5.0] * 3)
            dense = Best("torch.mm", 10.0, 10.0, 10.0)
            rows.append(Row(*gemm.shape, "float16", m, ours, ours, dense))
    path = tmp_path / "table.json"
    Table(DEVICE, "0.1.0", "0123456789ab", "2026-11-22", {row.key: row for row in rows}).save(path)
    return path


def operators(folder: BuildDir) -> dict[str, str]:
    """Name of each SparseGemm of engine.onnx -> its choices."""
    graph = onnx.load(folder.engine_onnx, load_external_data=False).graph
    nodes = [node for node in graph.node if node.domain == "esparse"]
    return {node.name: next(a.s.decode() for a in node.attribute if a.name == "choices") for node in nodes}


def assert_computes_the_same(folder: BuildDir, exported: ExportRecord) -> None:
    feeds = example_feeds(exported.inputs, int(exported.outputs[0].shape[-1]))
    for want, got in zip(outputs(folder.sparse_onnx, feeds), outputs(folder.engine_onnx, feeds), strict=True):
        assert all(relative_l2(got[name], value) <= LIMIT for name, value in want.items())


def test_without_a_table_every_gemm_runs_sparse_by_the_heuristic(packed, fake_plugin):
    folder, exported, record = packed
    chosen = choose(packed)
    assert chosen.onnx == folder.engine_onnx
    assert (chosen.no_plugin, chosen.plugin.kernel_set, chosen.plugin.table) == (None, "0123456789ab", None)
    assert operators(folder) == {gemm.name: "" for gemm in record.gemms}
    assert {(layer.kernel, layer.code.value) for layer in chosen.layers} == {("plugin", "not_measured")}
    assert_computes_the_same(folder, exported)


def test_the_tuner_s_rows_become_choices(packed, fake_plugin, tmp_path):
    folder, _, record = packed
    path = table_of(record, tmp_path)
    chosen = choose(packed, table=str(path))
    assert chosen.plugin.table == str(path)
    assert operators(folder) == {gemm.name: "1=decode_1,16=decode_16,64=decode_64" for gemm in record.gemms}
    assert all("sparse is faster: M = 2: 5.0 us" in layer.reason for layer in chosen.layers)


def test_a_layer_that_nothing_makes_faster_stays_dense_and_its_weights_are_there_once(
    packed, fake_plugin, tmp_path
):
    folder, exported, record = packed
    slow = next(gemm for gemm in record.gemms if "gate_proj" in gemm.name)
    chosen = choose(packed, table=str(table_of(record, tmp_path, slow.name)))
    assert slow.name not in operators(folder) and len(operators(folder)) == len(record.gemms) - 1
    (layer,) = (layer for layer in chosen.layers if layer.name == slow.name)
    assert (layer.kernel, layer.code.value) == ("native", "dense_faster")
    assert layer.dense_faster_at == [1, 2, 16, 32, 64] and layer.speedup == 0.5
    names = {t.name for t in onnx.load(folder.engine_onnx, load_external_data=False).graph.initializer}
    assert f"{slow.name}.values" not in names
    assert all((exported.linears[module] in names) == (module in slow.layers) for module in exported.linears
               if module != "lm_head")  # fmt: skip
    assert_computes_the_same(folder, exported)
    asked = choose(packed, table=str(tmp_path / "table.json"), sparse_gemm="plugin")
    assert {(layer.kernel, layer.code.value) for layer in asked.layers} == {("plugin", "asked")}


def test_where_dense_is_always_faster_the_plugin_is_not_used(packed, fake_plugin, tmp_path):
    _, _, record = packed
    path = table_of(record, tmp_path)
    table = source.usable_table(path, "0123456789ab", None)
    slow, fast = Best("x", 20, 20, 20), Best("torch.mm", 10, 10, 10)
    table.rows = {key: Row(*key, slow, slow, fast) for key in table.rows}
    table.save(path)
    chosen = choose(packed, table=str(path))
    assert "dense is faster in every layer" in chosen.no_plugin
    assert {layer.kernel for layer in chosen.layers} == {"native"}


def test_a_table_of_other_kernels_is_left_alone(packed, fake_plugin, tmp_path, monkeypatch):
    folder, _, record = packed
    notes: list[str] = []
    monkeypatch.setattr(tables, "note", lambda text, **_: notes.append(text))
    path = table_of(record, tmp_path)
    path.write_text(path.read_text().replace("0123456789ab", "ffffffffffff"))
    assert choose(packed, table=str(path)).plugin.table is None
    assert set(operators(folder).values()) == {""}
    assert any("measured with the kernels ffffffffffff" in text for text in notes)


def test_a_table_that_is_not_there_is_an_error(packed, fake_plugin, tmp_path):
    with pytest.raises(EsparseError, match="no such file") as error:
        choose(packed, table=str(tmp_path / "none.json"))
    assert error.value.where.startswith("engine.table")


# --- real engines ---------------------------------------------------------------------------------------


@pytest.fixture
def library():
    if rtx is None:
        pytest.skip("TensorRT-RTX is not installed")
    try:
        return libraries.find_library(libraries.PLUGIN)
    except EsparseError as error:
        pytest.skip(error.what)


def occurrences(plan: bytes, onnx_file: Path) -> dict[str, int]:
    """How often the middle of each packed weight occurs in an engine."""
    found = {}
    for tensor in onnx.load(onnx_file).graph.initializer:
        if tensor.name.endswith((".values", ".metadata")):
            data = numpy_helper.to_array(tensor).tobytes()
            found[tensor.name] = plan.count(data[len(data) // 2 :][:64])
    return found


def test_an_engine_with_the_plugin(packed, library):
    folder, exported, record = packed
    recipe = make_recipe(sparse_gemm="plugin", plugin_library=str(library))
    built = build_engines(recipe, folder, exported, record)
    engine = built.sparse
    assert (engine.onnx, built.no_plugin) == ("onnx/engine.onnx", None)
    assert set(engine.onnx_sha256) == {"onnx/engine.onnx", "onnx/packed.onnx.data"}
    assert engine.plugin.library == str(library.resolve())
    assert engine.plugin.kernel_set == plugin.inspect(library).kernel_set
    assert [layer.name for layer in engine.layers] == [gemm.name for gemm in record.gemms]
    plan = folder.sparse_plan.read_bytes()
    assert b"es24-v1" in plan and engine.plugin.kernel_set.encode() in plan
    assert set(occurrences(plan, folder.engine_onnx).values()) == {1}, "weights are stored once"


@pytest.mark.parametrize(
    ("attribute", "value", "what"),
    [
        ("layout", "es24-v2", "layout is 'es24-v2', this library knows 'es24-v1'"),  # while parsing
        ("choices", "4", "choices: '4' is not bound=name"),
        ("out_features", 512, r"must be \[out_features, in_features / 2\] = \[512, 64\]"),  # while building
    ],
)
def test_a_fault_that_only_the_plugin_sees_comes_out_in_its_words(packed, library, attribute, value, what):
    folder, exported, record = packed
    asked = make_recipe(sparse_gemm="plugin", plugin_library=str(library))
    section = asked.engine
    choose_source(asked, folder, exported, record, "tensorrt_rtx")
    model = onnx.load(folder.engine_onnx, load_external_data=False)
    node = next(node for node in model.graph.node if node.domain == "esparse")
    next(a for a in node.attribute if a.name == attribute).CopyFrom(helper.make_attribute(attribute, value))
    spoiled = folder.onnx / "spoiled.onnx"
    onnx.save(model, spoiled)
    profiles = {name: input_ranges(exported.inputs, p) for name, p in section.profiles.items()}
    log = folder.engine / "spoiled.log"
    with pytest.raises(EsparseError, match=what):
        engine_bytes(
            spoiled, "tensorrt_rtx", profiles, sparse_weights=True, log=log, timing_cache=log.with_name("c")
        )


def test_the_quickstart_model_s_engine(library, tmp_path):
    """Its recipe with less calibration: the weights are others, the engine is built in the same way."""
    recipe = load_recipe(QUICKSTART)
    small = recipe.calibration.model_copy(update={"samples": 2, "length": 64})
    score = recipe.prune.score.model_copy(update={"method": "magnitude"})
    prune = recipe.prune.model_copy(update={"score": score})
    engine = recipe.engine.model_copy(update={"sparse_gemm": "plugin", "dense": False})
    engine = engine.model_copy(update={"flavour": "tensorrt_rtx", "plugin_library": library})
    recipe = recipe.model_copy(update={"calibration": small, "prune": prune, "engine": engine})
    manifest = build(recipe, tmp_path, last="engine")
    record = manifest.stages["engine"].record["sparse"]
    layers = 6 * 4  # blocks; q+k+v, o, gate+up, down
    assert len(record["layers"]) == layers and all(layer["kernel"] == "plugin" for layer in record["layers"])
    folder = BuildDir(tmp_path)
    counts = occurrences(folder.sparse_plan.read_bytes(), folder.engine_onnx)
    assert len(counts) == 2 * layers and set(counts.values()) == {1}
