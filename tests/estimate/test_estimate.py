"""The whole estimate: sizes by hand, the sum of a step by hand, its findings, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig, OPTConfig
from typer.testing import CliRunner

from esparse_trt.cli import app
from esparse_trt.estimate.ask import ask
from esparse_trt.estimate.gpus import gpu_of
from esparse_trt.estimate.predict import Subject, estimate, find_tables
from esparse_trt.estimate.steps import RUNTIME, Dimensions
from esparse_trt.layout import empty_model, gemms
from esparse_trt.records import Reason
from esparse_trt.runtime.shapes import config_of
from esparse_trt.sections import EngineSection, LayerSelection, PruneSection, Traffic

RECIPES = Path(__file__).parents[2] / "recipes"
H100 = gpu_of("h100")
DEFAULT = (Traffic(),)
SHAPES = {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)}


@pytest.fixture(autouse=True)
def no_tuner_table(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def of(config, gpu=H100, traffic=DEFAULT, prune=None, engine=None, dtype="float16"):
    subject = Subject("model", config, prune or PruneSection(), engine or EngineSection(), dtype)
    return estimate(subject, gpu, find_tables(gpu), list(traffic))


@pytest.fixture(scope="module")
def llama_7b():
    return config_of("llama-7b")


# --- layers and sizes --------------------------------------------------------------------------------------


def test_the_sizes_of_llama_7b(llama_7b):
    """6.738 B parameters; the figures of memory are those of a run on an H100, less 512 bytes of buffers."""
    sizes = of(llama_7b).sizes
    assert sizes.parameters == 6_738_415_616
    assert sizes.pruned == sizes.packed == 32 * sum(n * k for n, k in SHAPES.values()) == 6_476_005_376
    assert sizes.dense_memory == 13_476_831_744 - 512
    assert sizes.sparse_memory == 7_810_327_040 - 512
    assert sizes.packed_onnx == sizes.sparse_engine == sizes.sparse_memory
    assert sizes.checkpoint == sizes.dense_onnx == sizes.sparse_onnx == sizes.dense_memory


def test_tensorrt_rtx_copies_what_it_multiplies_itself_for_every_profile(llama_7b):
    engine = EngineSection(flavour="tensorrt_rtx")
    sizes = of(llama_7b, engine=engine).sizes
    head = 2 * 32000 * 4096
    assert sizes.dense_engine == sizes.dense_memory + 2 * sizes.pruned + head
    assert sizes.sparse_engine == sizes.sparse_memory + head


def test_the_gemms_of_llama_7b(llama_7b):
    sites = {site.site: site for site in of(llama_7b).sites}
    assert {name: site.shape for name, site in sites.items() if name in SHAPES} == SHAPES
    assert all(sites[name].count == 32 and sites[name].kernel == "plugin" for name in SHAPES)
    assert sites["qkv"].layers == "q_proj+k_proj+v_proj"
    head = sites["lm_head"]
    assert (head.count, head.kernel, head.code, head.times) == (1, "dense", Reason.not_selected, [])


def found(config, prune=None, dtype="float16"):
    return gemms(config, empty_model(config), prune or PruneSection(), dtype)


def small(**changes):
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2)
    return LlamaConfig(**{**sizes, "num_key_value_heads": 1, "vocab_size": 320, **changes})


@pytest.mark.parametrize(
    ("prune", "dtype", "code", "words"),
    [
        (PruneSection(pattern="4:8"), "float16", Reason.not_2_4, "4:8 has no kernels"),
        (PruneSection(), "float32", Reason.not_eligible_dtype, "float16 or bfloat16, not float32"),
        (
            PruneSection(layers=LayerSelection(include=["nothing"])),
            "float16",
            Reason.not_selected,
            "leaves it out",
        ),
    ],
)
def test_why_a_layer_cannot_run_sparse(prune, dtype, code, words):
    for gemm in found(small(), prune, dtype):
        if gemm.site != "lm_head":
            assert gemm.stays.code == code and words in gemm.stays.reason


def test_a_shape_that_the_layout_cannot_hold_stays_dense():
    stays = {gemm.site: gemm.stays for gemm in found(small(hidden_size=112, head_dim=56))}
    assert stays["qkv"].code == Reason.not_eligible_shape
    assert "K = 112 is not a multiple of 32" in stays["qkv"].reason
    assert stays["down"] is None


def test_a_head_that_is_the_embedding_stays_dense_even_if_selected():
    everything = PruneSection(layers=LayerSelection(exclude=[]))
    (tied,) = (gemm for gemm in found(small(tie_word_embeddings=True), everything) if gemm.site == "lm_head")
    assert tied.stays.code == Reason.not_plain
    (own,) = (gemm for gemm in found(small(tie_word_embeddings=False), everything) if gemm.site == "lm_head")
    assert own.stays is None


def test_another_family_and_its_biases():
    opt = OPTConfig(
        hidden_size=128, ffn_dim=256, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=128
    )
    first = {gemm.site: gemm for gemm in reversed(found(opt))}
    assert {"k_proj", "q_proj", "v_proj"} == {name.rpartition(".")[2] for name in first["qkv"].layers}
    assert first["qkv"].shape == (384, 128) and first["qkv"].bias
    assert first["fc2"].name == "model.decoder.layers.0.fc2" and first["fc2"].shape == (128, 256)


# --- steps -------------------------------------------------------------------------------------------------


def test_a_decode_step_by_hand(llama_7b):
    """Every GEMM of the reference at M = 1, the head from the interpolation, 576 tokens of cache."""
    (cell,) = of(llama_7b, traffic=[Traffic(batch=1, prompt=512, generated=128)]).cells
    (known,) = find_tables(H100)
    rows = [known.table.rows[(*shape, "float16", 1)] for shape in SHAPES.values()]
    assert cell.decode.dense.gemm == pytest.approx(32e-3 * sum(row.dense.us for row in rows))
    assert cell.decode.sparse.gemm == pytest.approx(32e-3 * sum(row.programmatic.us for row in rows))
    assert cell.decode.dense.head == cell.decode.sparse.head == pytest.approx(0.095, rel=0.1)  # 262 MB
    cache = 2 * 2 * 4096 * 32 * 576
    read = 1e3 * cache / (RUNTIME.attention_bandwidth * 3.35e12)
    assert cell.decode.dense.attention == cell.decode.sparse.attention == pytest.approx(read)
    assert cell.decode.dense.other == pytest.approx((RUNTIME.step_us + 32 * RUNTIME.block_us) / 1e3)
    hidden = 32e-3 * 4 * RUNTIME.overlap_us  # four packed GEMMs a block
    assert cell.decode.sparse.other == pytest.approx(cell.decode.dense.other - hidden)
    assert cell.cache_bytes == 2 * 2 * 4096 * 32 * 640


def test_a_prefill_by_hand(llama_7b):
    (cell,) = of(llama_7b, traffic=[Traffic(batch=1, prompt=4096)]).cells
    multiplied = 4 * 4096 * (4096**2 / 2) * 32 / (RUNTIME.attention_tensor * 989.4e12)
    assert cell.prefill.sparse.attention == pytest.approx(1e3 * multiplied)
    glue = 8 * 4096 + 2 * 4096 + 4 * 4096
    ms_per_channel = 1e3 * 2 * 4096 / (RUNTIME.activation_bandwidth * 3.35e12)
    for side, more in ((cell.prefill.dense, 3 * 11008), (cell.prefill.sparse, 2 * 4096)):
        activations = 32 * (glue + more) * ms_per_channel
        assert side.other == pytest.approx(RUNTIME.step_us / 1e3 + activations)


def test_grouped_query_attention_reads_less():
    dimensions = Dimensions.of(config_of("llama-3-8b"), 32, 14336)
    assert (dimensions.queries, dimensions.keys) == (4096, 1024)
    assert dimensions.cache_bytes(1) == 2 * 2 * 1024 * 32


@pytest.mark.parametrize("gpu", ["h100", "a100", "rtx4090"])
def test_longer_and_larger_never_takes_less_time(llama_7b, gpu):
    traffic = [Traffic(batch=b, prompt=p) for b, p in ((1, 128), (1, 512), (16, 512), (16, 2048), (64, 2048))]
    cells = of(llama_7b, gpu_of(gpu), traffic).cells
    for phase in ("prefill", "decode"):
        for side in ("dense", "sparse"):
            times = [getattr(getattr(cell, phase), side).total for cell in cells]
            assert times == sorted(times)


def test_the_gain_of_decoding_fades_with_the_cache(llama_7b):
    short, long = of(llama_7b, traffic=[Traffic(batch=64, prompt=p) for p in (128, 8192)]).cells
    assert short.decode.speedup > long.decode.speedup > 1


# --- findings ----------------------------------------------------------------------------------------------


def test_it_says_that_sparsity_pays(llama_7b):
    assert of(llama_7b).findings[0].startswith("Sparsity pays: 1.")


def test_it_says_where_dense_is_faster():
    """Qwen2.5-0.5B, had its down projection been half as fast as dense from 512 tokens on."""
    known = find_tables(H100)
    rows = known[-1].table.rows
    for key, row in rows.items():
        if (row.n, row.k) == (896, 4864) and row.m >= 512:
            rows[key] = replace(row, dense=replace(row.dense, us=row.programmatic.us / 2))
    subject = Subject("model", config_of("qwen2.5-0.5b"), PruneSection(), EngineSection(), "float16")
    result = estimate(subject, H100, known, [Traffic(batch=1024, prompt=1, generated=64)])
    down = next(site for site in result.sites if site.site == "down")
    assert (down.kernel, down.code) == ("dense", Reason.dense_faster)
    assert 1024 in down.dense_faster_at and 1 not in down.dense_faster_at
    assert any(line.startswith("down [896, 4864] stays dense: nothing is faster") for line in result.findings)
    gate_up = next(site for site in result.sites if site.site == "gate_up")
    assert gate_up.kernel == "plugin"
    assert result.sizes.sparse_memory > result.sizes.packed_onnx  # the dense layers are not packed


def test_it_says_that_nothing_can_run_sparse(llama_7b):
    result = of(llama_7b, prune=PruneSection(pattern="4:8"))
    assert result.findings[0].startswith("Sparsity cannot pay: no layer runs sparse (4:8 has no kernels")
    assert result.speedup == 1.0
    assert result.sizes.packed == 0


def test_it_says_what_does_not_fit(llama_7b):
    (both, one, none) = of(
        llama_7b, gpu_of("l4"), traffic=[Traffic(batch=b, prompt=512) for b in (1, 40, 64)]
    ).cells
    assert both.fits == {"dense": True, "sparse": True}
    assert one.fits == {"dense": False, "sparse": True}
    assert none.fits == {"dense": False, "sparse": False}


def test_it_says_that_nothing_was_measured(llama_7b):
    result = of(llama_7b, gpu_of("b200"))
    assert [line.partition(":")[0] for line in result.sources] == ["roofline"]
    assert result.findings[0].startswith("By a roofline, sparsity would pay: 1.")
    assert any("no sparse kernels for it" in line for line in result.findings)


def test_small_models_live_in_the_cache():
    assert of(small()).findings[0].startswith("Not known whether sparsity pays in time: all weights fit into")


def test_a_recipe_may_ask_for_dense(llama_7b):
    result = of(llama_7b, engine=EngineSection(sparse_gemm="dense"))
    assert {site.kernel for site in result.sites} == {"dense"}
    assert result.speedup == 1.0


# --- the command -------------------------------------------------------------------------------------------


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["estimate", *arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_the_command_prints_tables_and_the_verdict_last():
    output = run("--shape", "llama-7b", "--gpu", "h100")
    assert "12288 x 4096" in output and "q_proj" not in output
    assert "the reference table that esparse-trt ships (NVIDIA H100 80GB HBM3" in output
    assert output.strip().splitlines()[-1].startswith("Sparsity pays")


def test_the_command_as_json():
    arguments = ("--shape", "llama-3-8b", "--gpu", "a100", "--batch", "1,64", "--prompt", "2048", "--json")
    facts = json.loads(run(*arguments))
    assert [(cell["batch"], cell["prompt"]) for cell in facts["cells"]] == [(1, 2048), (64, 2048)]
    assert {time["source"] for site in facts["sites"] for time in site["times"]} == {"roofline"}


def test_a_recipe_brings_its_traffic():
    result = ask(RECIPES / "quickstart.yaml", gpu="h100")
    assert result.model == "quickstart" and len(result.cells) == 2
    assert {site.count for site in result.sites} == {1, 6}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "give a recipe or --shape"),
        ((str(RECIPES / "quickstart.yaml"), "--shape", "llama-7b"), "exclude each other"),
        (("--shape", "llama-8b"), "no model shape is called 'llama-8b'"),
        (("--shape", "llama-7b", "--gpu", "h101"), "no GPU is called 'h101'"),
        (("--shape", "llama-7b", "--gpu", "h100", "--batch", "0"), "--batch"),
        (("--shape", "llama-7b", "--table", "nowhere.json"), "nowhere.json"),
        (("nowhere.yaml",), "nowhere.yaml"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, words):
    output = run(*arguments, code=2)
    assert words in " ".join(output.split()) and "Traceback" not in output
