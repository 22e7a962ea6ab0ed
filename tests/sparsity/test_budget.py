"""The choice of layers under a perplexity budget."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from esparse_trt.artifacts import BuildDir
from esparse_trt.errors import EsparseError
from esparse_trt.records import SiteCost
from esparse_trt.sections import PruneSection
from esparse_trt.sparsity import prune as stage
from esparse_trt.sparsity.budget import within_budget
from esparse_trt.sparsity.prune import prune, prune_model


def section(**changes):
    return PruneSection.model_validate({"permute": {"local": {"block": 16}}, "device": "cpu"} | changes)


def cost(site, nats, parameters=100):
    return SiteCost(site=site, layers=[site], parameters=parameters, nats=nats)


def test_the_most_expensive_per_parameter_stay_dense():
    costs = [cost("a", 0.3), cost("b", 0.2, 50), cost("c", 0.1), cost("d", -0.01)]
    assert within_budget(costs, 0.59, 0.6) == set()
    assert within_budget(costs, 0.59, 0.4) == {"b"}
    assert within_budget(costs, 0.59, 0.2) == {"a", "b"}
    assert within_budget(costs, 0.59, 0.05) == {"a", "b", "c"}


def test_costs_are_scaled_to_what_all_cost_together():
    costs = [cost("a", 0.3), cost("b", 0.2)]
    assert within_budget(costs, 0.5, 0.3) == {"a"}
    assert within_budget(costs, 0.25, 0.3) == set()
    assert within_budget(costs, 1.0, 0.3) == {"a", "b"}


def test_a_cost_is_measured_with_everything_else_dense(make_model, windows):
    path = make_model("llama")
    found = prune_model(path, windows, section(budget={"perplexity_ratio": 1e6}), batch_size=2)
    whole = prune_model(path, windows, section(), batch_size=2)
    assert not any(cost.dense for cost in found.costs) and len(found.costs) == 8
    assert all(torch.equal(found.masks[name], whole.masks[name]) for name in whole.masks)
    site = found.costs[2]
    assert site.layers == [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")]
    assert site.parameters == 2 * 32 * 64
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        before = float(model(windows, labels=windows).loss)
        for name in site.layers:
            model.get_submodule(name).weight.mul_(whole.masks[name])
        assert site.nats == pytest.approx(float(model(windows, labels=windows).loss) - before, abs=1e-5)


@pytest.fixture(scope="module")
def own_text(make_model):
    """Text that the model writes itself, cold: anything that changes the model raises its perplexity."""
    model, ids = AutoModelForCausalLM.from_pretrained(make_model("llama")), torch.arange(2, 18).unsqueeze(1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(31):
            p = (model(ids).logits[:, -1] / 0.5).softmax(-1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)
    return ids


@pytest.mark.parametrize("update", ["none", "obs"])
def test_the_budget_decides_how_much_is_pruned(update, make_model, own_text):
    path, settings, kept = make_model("llama"), {"update": {"method": update}}, []
    everything = prune_model(path, own_text, section(**settings, budget={"perplexity_ratio": 1e6}))
    total = sum(cost.nats for cost in everything.costs)
    assert total > 0.05 and not any(cost.dense for cost in everything.costs)
    for share in (0.3, 0.7):
        budget = {"perplexity_ratio": math.exp(share * total)}
        pruned = prune_model(path, own_text, section(**settings, budget=budget))
        dense = {name: cost for cost in pruned.costs if cost.dense for name in cost.layers}
        assert 0 < len(dense) < 14 and pruned.masks.keys() == everything.masks.keys() - dense.keys()
        for layer in pruned.layers:
            if layer.name in dense:
                assert layer.pattern is None and f"{dense[layer.name].nats:.4f} nats" in layer.reason
        kept.append(dense.keys())
    assert kept[0] > kept[1]


def test_a_budget_that_no_layer_meets(make_model, own_text):
    with pytest.raises(EsparseError, match="pruning any site costs more") as error:
        prune_model(make_model("llama"), own_text, section(budget={"perplexity_ratio": 1 + 1e-9}))
    assert error.value.where == "prune.budget.perplexity_ratio"


def test_costs_are_measured_once(make_model, make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe(make_model("llama"), budget={"perplexity_ratio": 1.05, "samples": 2})
    whole, stopped = BuildDir(tmp_path / "whole"), BuildDir(tmp_path / "stopped")
    record = prune(recipe, whole)
    monkeypatch.setattr(stage, "_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prune(recipe, stopped)
    monkeypatch.undo()
    monkeypatch.setattr(stage, "choose_layers", None)
    assert prune(recipe, stopped) == record
    assert math.isfinite(sum(cost.nats for cost in record.costs))
