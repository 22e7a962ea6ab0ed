"""Training of the kept weights: what it may change, what it must reach, and that it resumes."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from esparse_trt.artifacts import BuildDir
from esparse_trt.errors import EsparseError
from esparse_trt.sections import PruneSection
from esparse_trt.sparsity.pattern import Pattern, conforming_share
from esparse_trt.sparsity.prune import distill_model, prune, prune_model
from esparse_trt.sparsity.recover import _batches

BLOCKS = {"steps": 20, "learning_rate": 2e-3}
WHOLE = {"steps": 0, "distill": {"steps": 20, "learning_rate": 2e-3, "batch_size": 2}}


def section(**changes):
    return PruneSection.model_validate({"permute": {"local": {"block": 16}}, "device": "cpu"} | changes)


def recovered(path, windows, section, **options):
    """Pruned and trained as the section says, the whole model too."""
    pruned = prune_model(path, windows, section, **options)
    whole = section.recover and section.recover.distill
    return distill_model(path, pruned, windows, section) if whole else pruned


def relative_error(got, wanted):
    return float(((got - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())


def last_hidden(model, windows):
    with torch.no_grad():
        return model(windows, output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("update", ["none", "obs"])
def test_blocks_come_closer_to_the_dense_models(update, make_model, windows):
    path = make_model("llama")
    dense = AutoModelForCausalLM.from_pretrained(path)
    errors = []
    for recover in (None, BLOCKS):
        pruned = prune_model(path, windows, section(update={"method": update}, recover=recover), batch_size=2)
        sparse = AutoModelForCausalLM.from_pretrained(path)
        pruned.apply(sparse)
        errors.append(relative_error(last_hidden(sparse, windows), last_hidden(dense, windows)))
    assert errors[1] < 0.7 * errors[0]
    assert [record.block for record in pruned.recovered] == [0, 1]
    assert all(record.after < record.before and record.steps == 20 for record in pruned.recovered)


def test_distilling_comes_closer_to_the_dense_distributions(make_model, windows):
    path = make_model("qwen2")
    dense = AutoModelForCausalLM.from_pretrained(path)
    divergence = []
    for recover in (None, WHOLE):
        pruned = recovered(path, windows, section(recover=recover), batch_size=2)
        sparse = AutoModelForCausalLM.from_pretrained(path)
        pruned.apply(sparse)
        with torch.no_grad():
            p, q = (model(windows).logits.log_softmax(-1) for model in (dense, sparse))
        divergence.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert divergence[1] < 0.7 * divergence[0]
    (record,) = pruned.recovered
    assert record.block is None and record.steps == 20 and record.after < record.before


def test_distilling_stops_in_time(make_model, windows):
    recover = {"steps": 0, "distill": {"steps": 1000, "seconds": 1e-6}}
    (record,) = recovered(make_model("llama"), windows, section(recover=recover)).recovered
    assert record.steps == 1


def test_distilling_on_a_text_of_its_own(make_model, make_recipe, sample_text, tmp_path):
    """Other text, other weights; the record names the text, and a text that is too short is an error."""
    found = []
    for name, text in {"same": {}, "other": {"text": {"path": "other.txt"}, "samples": 3}}.items():
        (tmp_path / "other.txt").write_text(sample_text.read_text()[::-1])
        recover = {"steps": 0, "distill": {**WHOLE["distill"], "steps": 3, **text}}
        record = prune(make_recipe(make_model("llama"), recover=recover), BuildDir(tmp_path / name))
        weights = load_file(tmp_path / name / "checkpoint" / "model.safetensors")
        found.append((record.training_sha256, weights["model.layers.0.mlp.down_proj.weight"]))
    assert found[0][0] is None and len(found[1][0]) == 64
    assert not torch.equal(found[0][1], found[1][1])
    recover["distill"]["samples"] = 10_000
    with pytest.raises(EsparseError, match="tokens; 10000 samples of 40 need") as error:
        prune(make_recipe(make_model("llama"), recover=recover), BuildDir(tmp_path / "short"))
    assert "prune.recover.distill.samples: " in error.value.fix


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recover", [BLOCKS, WHOLE], ids=["blocks", "whole"])
def test_zeros_stay_zero_and_nothing_else_is_trained(recover, dtype, make_model, make_recipe, tmp_path):
    path, folder = make_model("llama", dtype), BuildDir(tmp_path / "build")
    record = prune(make_recipe(path, recover=recover, layers={"exclude": ["*.k_proj", "lm_head"]}), folder)
    before, after = (load_file(p / "model.safetensors") for p in (path, folder.checkpoint))
    permutations = load_file(folder.permutation)
    pruned = {f"{layer.name}.weight": layer for layer in record.layers if layer.pattern}
    for name, tensor in after.items():
        assert tensor.dtype == dtype
        if name not in pruned:
            assert torch.equal(tensor, before[name]), name
            continue
        layer = pruned[name]
        assert conforming_share(tensor[:, permutations[layer.name]], Pattern(2, 4)) == 1
        assert layer.sparsity == pytest.approx(0.5, abs=1e-3)
        assert (tensor[tensor != 0] != before[name][tensor != 0]).double().mean() > 0.5
    assert len(record.recovered) == (2 if recover is BLOCKS else 1)


def test_a_block_with_nothing_pruned_is_not_trained(make_model, windows):
    only_last = section(recover=BLOCKS, layers={"include": ["model.layers.1.*"]})
    assert [r.block for r in prune_model(make_model("llama"), windows, only_last).recovered] == [1]


@pytest.mark.parametrize("recover", [BLOCKS, WHOLE], ids=["blocks", "whole"])
def test_training_that_diverges(recover, make_model, windows):
    wild = {**recover, "learning_rate": 1e30}
    if "distill" in wild:
        wild["distill"] = {**wild["distill"], "learning_rate": 1e30}
    with pytest.raises(EsparseError, match="diverged") as error:
        recovered(make_model("llama"), windows, section(recover=wild))
    assert "learning_rate" in error.value.fix


def test_every_sample_is_seen_equally_often():
    batches = list(_batches(7, 3, 14, seed=0))
    seen = torch.cat(batches)
    assert {len(rows) for rows in batches} == {3}
    assert (torch.bincount(seen) == 6).all()
    assert not torch.equal(seen[:7], seen[7:14]), "in a new order each time"
