"""The verify stage on real exports of a tiny model: agreement, corruption that is caught, gate, self test."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from polygraphy.comparator import RunResults
from polygraphy.json import load_json
from transformers import AutoModelForCausalLM

from esparse_trt.artifacts import BuildDir
from esparse_trt.errors import CheckFailed, EsparseError
from esparse_trt.evaluate.compare import check_fidelity, check_gate, verify
from esparse_trt.evaluate.perplexity import compare_distributions, torch_logits
from esparse_trt.evaluate.verify_record import VerifyRecord
from esparse_trt.graph.export import export
from esparse_trt.graph.fold import fold
from esparse_trt.model import load_tokenizer
from esparse_trt.recipe import Recipe, load_recipe, parse_recipe
from esparse_trt.records import EngineRecord, ExportRecord, PruneRecord
from esparse_trt.sections import TextSelf
from esparse_trt.sparsity.prune import prune
from esparse_trt.text import evaluation_windows

NO_ENGINES = EngineRecord(
    flavour=None, version=None, skipped="no TensorRT is installed", dense=None, sparse=None, profiles={},
    runnable=False, not_runnable="there is no engine",
)  # fmt: skip
Built = tuple[Recipe, BuildDir, PruneRecord, ExportRecord]


def change(recipe: Recipe, **sections) -> Recipe:
    """The recipe with other values in some sections: `verify={"layers": False}`."""
    updated = {name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()}
    return recipe.model_copy(update=updated)


def run(built: Built, **verify_section) -> VerifyRecord:
    recipe, folder, pruned, exported = built
    return verify(change(recipe, verify=verify_section), folder, pruned, exported, NO_ENGINES)


@pytest.fixture(scope="module")
def fp32(tmp_path_factory, tiny_recipe) -> Built:
    recipe = load_recipe(tiny_recipe)
    folder = BuildDir(tmp_path_factory.mktemp("fp32"))
    pruned = prune(recipe, folder)
    exported = export(recipe, folder, pruned)
    fold(recipe, folder, exported)
    return recipe, folder, pruned, exported


@pytest.fixture(scope="module")
def verified(fp32) -> VerifyRecord:
    return run(fp32)


def copy(built: Built, root: Path) -> Built:
    """The same build in a folder of its own, to be spoiled."""
    shutil.copytree(built[1].root, root / "copy")
    return built[0], BuildDir(root / "copy"), built[2], built[3]


# --- fp32 ------------------------------------------------------------------------------------------------


def test_the_toolchain_changes_nothing(fp32, verified):
    assert [(check.a, check.b) for check in verified.fidelity] == [
        ("PyTorch dense", "ONNX Runtime dense.onnx"),
        ("PyTorch sparse", "ONNX Runtime sparse.onnx"),
    ]
    for check in verified.fidelity:
        assert check.passed and check.first_divergence is None
        assert 0 < check.logits.relative_l2 < 1e-5
        names = {item.name for item in check.layers}
        assert names == {*fp32[3].linears, "model.layers.0", "model.layers.1"}
        assert all(item.relative_l2 < 1e-5 for item in check.layers)
    check_fidelity(verified)


def test_what_pruning_changed(fp32, verified):
    """Layers in execution order; errors are those of the two checkpoints in PyTorch."""
    recipe, folder, _, _ = fp32
    assert [item.name for item in verified.layers] == [item.name for item in verified.fidelity[0].layers]
    assert [item.block for item in verified.layers] == [0] * 8 + [1] * 8 + [None]
    dense = AutoModelForCausalLM.from_pretrained(recipe.model.path).eval()
    sparse = AutoModelForCausalLM.from_pretrained(folder.checkpoint).eval()
    ids = windows_of(recipe)[:1, :-1]
    for name in (
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1",
        "lm_head",
    ):
        a, b = (output_of(model, name, ids) for model in (dense, sparse))
        found = next(item for item in verified.layers if item.name == name)
        assert found.relative_l2 == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-3)
        assert found.max_abs == pytest.approx(float((b - a).abs().max()), rel=1e-3)
        assert found.cosine == pytest.approx(
            float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)), rel=1e-4
        )


def windows_of(recipe: Recipe) -> torch.Tensor:
    section = recipe.verify
    tokenizer = load_tokenizer(recipe.model.path)
    return evaluation_windows(section.text, tokenizer, length=section.length, samples=section.samples)


def output_of(model, name: str, ids: torch.Tensor) -> torch.Tensor:
    kept = {}
    handle = model.get_submodule(name).register_forward_hook(lambda m, args, out: kept.update(out=out))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return kept["out"]


def test_outputs_of_prefill_and_decode(verified):
    cache = [f"present.{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    steps = [(item.name, item.step) for item in verified.outputs]
    assert steps == [("logits", "prefill"), *((name, "prefill") for name in cache), ("logits", "decode")]
    by_name = {item.name: item for item in verified.outputs if item.step == "prefill"}
    layers = {item.name: item for item in verified.layers}
    for i in range(
        2
    ):  # the cached values are v_proj's outputs split into heads, in the order of the checkpoint
        assert by_name[f"present.{i}.value"].relative_l2 == pytest.approx(
            layers[f"model.layers.{i}.self_attn.v_proj"].relative_l2, rel=1e-5
        )
    assert by_name["logits"].relative_l2 == pytest.approx(layers["lm_head"].relative_l2, rel=1e-5)


def test_task_level_is_that_of_pytorch(fp32, verified):
    recipe, folder, _, _ = fp32
    dense = AutoModelForCausalLM.from_pretrained(recipe.model.path).eval()
    sparse = AutoModelForCausalLM.from_pretrained(folder.checkpoint).eval()
    windows = windows_of(recipe)
    expected = compare_distributions(windows, torch_logits(dense), torch_logits(sparse), batch=4)
    task = verified.task
    assert task.dense_perplexity == pytest.approx(expected.dense_perplexity, rel=1e-5)
    assert task.sparse_perplexity == pytest.approx(expected.sparse_perplexity, rel=1e-5)
    assert task.kl_divergence == pytest.approx(expected.kl_divergence, rel=1e-3)
    assert task.top1_agreement == pytest.approx(expected.top1_agreement, abs=0.01)
    assert task.ratio == task.sparse_perplexity / task.dense_perplexity
    assert task.tokens == windows.shape[0] * (windows.shape[1] - 1)
    assert 0 < task.ln_ratio_ci95 < 0.1
    assert f"{len(windows)} consecutive windows of {windows.shape[1]} tokens" in task.protocol
    assert "BOS" in task.protocol and task.dtype == "float32"


def test_the_record_survives_json(verified):
    assert VerifyRecord.model_validate_json(verified.model_dump_json()) == verified
    assert verified.engines_skipped == "no TensorRT is installed"
    assert verified.feed == "the start of the evaluation text: prefill of 31 tokens, then 1 decode step"


def test_polygraphy_reads_what_was_saved(fp32, verified):
    folder = fp32[1]
    (feed,) = load_json(str(folder.polygraphy / "inputs.json"))
    assert feed["input_ids"].shape == (1, 31) and feed["past_key_values.0.key"].shape == (1, 2, 0, 16)
    results = RunResults.load(str(folder.polygraphy / "outputs.json"))
    a, b = (results[name][0]["logits"] for name in ("dense.onnx", "sparse.onnx"))
    reported = next(item for item in verified.outputs if item.name == "logits")
    assert np.linalg.norm(b - a) / np.linalg.norm(a) == pytest.approx(reported.relative_l2, rel=1e-4)


def test_dense_against_itself(fp32, tmp_path):
    """Ratio 1, KL 0, agreement 1, and no error anywhere."""
    recipe, folder, pruned, exported = copy(fp32, tmp_path)
    for path in (folder.checkpoint, folder.sparse_onnx, folder.sparse_onnx.with_name("sparse.onnx.data")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(recipe.model.path, folder.checkpoint)
    model = onnx.load(folder.dense_onnx)
    onnx.save(model, folder.sparse_onnx, save_as_external_data=True, location="sparse.onnx.data")
    folder.fold_plan.write_text('{"folded": [], "kept": {}, "tensors": {}}')
    record = run((recipe, folder, pruned, exported))
    assert (record.task.ratio, record.task.kl_divergence, record.task.top1_agreement) == (1.0, 0.0, 1.0)
    assert record.task.ln_ratio_ci95 == 0
    assert all(
        item.max_abs == 0 and item.cosine == pytest.approx(1) for item in record.outputs + record.layers
    )
    check_fidelity(record)


# --- what must be caught ---------------------------------------------------------------------------------


def swap_input_channels(path: Path, tensor_name: str, a: int, b: int) -> None:
    """Swap two rows of a [K, N] weight in the external data of an ONNX file."""
    graph = onnx.load(path, load_external_data=False).graph
    tensor = next(t for t in graph.initializer if t.name == tensor_name)
    place = {item.key: item.value for item in tensor.external_data}
    data = np.memmap(
        path.with_name(place["location"]), dtype=onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type),
        mode="r+", offset=int(place.get("offset", 0)), shape=tuple(tensor.dims),
    )  # fmt: skip
    assert not np.array_equal(data[a], data[b])
    data[[a, b]] = data[[b, a]]
    data.flush()


@pytest.mark.parametrize("module", ["model.layers.1.mlp.down_proj", "model.layers.0.self_attn.o_proj"])
def test_two_swapped_channels_of_one_weight_are_caught_and_named(fp32, tmp_path, module):
    built = copy(fp32, tmp_path)
    swap_input_channels(built[1].sparse_onnx, built[3].linears[module], 3, 4)
    record = run(built, text=None, layers=False)
    assert [check.passed for check in record.fidelity] == [True, False]
    assert record.fidelity[1].first_divergence == module
    with pytest.raises(
        CheckFailed, match=r"PyTorch sparse and ONNX Runtime sparse\.onnx diverge here first"
    ) as error:
        check_fidelity(record)
    assert error.value.where == module


def test_a_wrong_fold_plan_is_caught(fp32, tmp_path):
    """Without the change of basis that it records, v_proj's outputs are in another order."""
    built = copy(fp32, tmp_path)
    built[1].fold_plan.write_text('{"folded": [], "kept": {}, "tensors": {}}')
    record = run(built, text=None, layers=False)
    assert record.fidelity[1].first_divergence == "model.layers.0.self_attn.v_proj"


def test_nan_names_the_first_layer(fp32, tmp_path):
    built = copy(fp32, tmp_path)
    graph = onnx.load(built[1].sparse_onnx, load_external_data=False).graph
    weight = built[3].linears["model.layers.1.mlp.up_proj"]
    place = {i.key: i.value for t in graph.initializer if t.name == weight for i in t.external_data}
    with built[1].sparse_onnx.with_name(place["location"]).open("r+b") as file:
        file.seek(int(place["offset"]))
        file.write(np.float32(np.nan).tobytes())
    with pytest.raises(CheckFailed, match=r"sparse\.onnx") as error:
        run(built, text=None)
    assert error.value.where == "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(("gate", "passed"), [(0.5, False), (100.0, True), (None, None)])
def test_gate(fp32, gate, passed):
    record = run(fp32, max_perplexity_ratio=gate, layers=False, samples=4)
    assert (record.gate, record.gate_passed) == (gate, passed)
    if passed is False:
        with pytest.raises(CheckFailed, match=r"a ratio of \d\.\d{3}; the gate is 0\.5"):
            check_gate(record)
    else:
        check_gate(record)


# --- other texts and types -------------------------------------------------------------------------------


def test_without_an_evaluation_text(fp32):
    record = run(fp32, text=None, layers=False)
    assert record.task is None and "verify.text" in record.task_skipped
    assert record.layers == [] and record.gate_passed is None
    assert record.feed.startswith("a window of the calibration text: prefill of 31 tokens")


def test_without_any_text(fp32):
    """Calibration on the model's own text leaves none on disk: random tokens serve for comparing graphs."""
    recipe = change(fp32[0], calibration={"text": TextSelf(source="self")})
    record = run((recipe, *fp32[1:]), text=None, layers=False)
    assert record.feed.startswith("random tokens: prefill of 63 tokens")
    check_fidelity(record)


def test_a_gate_needs_a_text(fp32):
    data = fp32[0].canonical()
    data["verify"] |= {"text": None, "max_perplexity_ratio": 1.5}
    with pytest.raises(EsparseError, match=r"verify\.text"):
        parse_recipe(data, base=Path())


def test_fp16(fp32, tmp_path):
    recipe, folder, pruned, _ = copy(fp32, tmp_path)
    recipe = change(recipe, export={"dtype": "float16"})
    exported = export(recipe, folder, pruned)
    fold(recipe, folder, exported)
    record = run((recipe, folder, pruned, exported))
    check_fidelity(record)
    for check in record.fidelity:
        assert 1e-5 < check.logits.relative_l2 < 2e-3  # fp16 indeed, and well inside the limit
        assert all(item.relative_l2 < 1e-3 for item in check.layers)
    assert record.task.dtype == "float16"

    module = "model.layers.1.self_attn.k_proj"
    swap_input_channels(folder.sparse_onnx, exported.linears[module], 8, 9)
    record = run((recipe, folder, pruned, exported), text=None, layers=False)
    assert record.fidelity[1].first_divergence == module
