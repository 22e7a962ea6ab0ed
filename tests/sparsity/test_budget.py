"""The choice of layers under a perplexity budget."""

import math

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from esparse_trt.artifacts import BuildDir
from esparse_trt.errors import EsparseError
from esparse_trt.records import SiteCost
from esparse_trt.sections import BudgetSection, PruneSection
from esparse_trt.sparsity import prune as stage
from esparse_trt.sparsity import pruner
from esparse_trt.sparsity.budget import Speed, softened_within, within_budget, within_speed
from esparse_trt.sparsity.prune import prune, prune_model
from esparse_trt.sparsity.speed import site_times


def section(**changes):
    permute = {"local": {"block": 16}, "refine": None, "attention": "fold"}
    return PruneSection.model_validate({"permute": permute, "device": "cpu"} | changes)


def cost(site, nats, parameters=100, finer=None):
    return SiteCost(
        site=site, layers=[site], parameters=parameters, kept=0.9, nats=nats, nats_4_8=finer, pattern="2:4"
    )


def budget(**changes):
    return BudgetSection.model_validate(changes)


def test_the_most_expensive_per_parameter_stay_dense():
    costs = [cost("a", 0.3), cost("b", 0.2, 50), cost("c", 0.1), cost("d", -0.01)]
    assert within_budget(costs, 1.0, 0.6) == set()
    assert within_budget(costs, 1.0, 0.4) == {"b"}
    assert within_budget(costs, 1.0, 0.2) == {"a", "b"}
    assert within_budget(costs, 1.0, 0.05) == {"a", "b", "c"}


def test_costs_are_scaled_to_what_all_cost_together():
    costs = [cost("a", 0.3), cost("b", 0.2)]
    assert within_budget(costs, 1.0, 0.3) == {"a"}
    assert within_budget(costs, 0.5, 0.3) == set()
    assert within_budget(costs, 2.0, 0.3) == {"a", "b"}


SPEED = Speed({"a": (5.0, 10.0), "b": (5.0, 10.0), "c": (10.0, 20.0), "d": (9.0, 8.0)}, others=12.0, unit="s")


def test_speed_counts_what_is_not_pruned_at_its_dense_time():
    assert SPEED.dense == 60
    assert SPEED.speedup(()) == 60 / 40  # a sparse kernel that is slower is not used
    assert SPEED.speedup({"c", "d"}) == 60 / 50
    assert SPEED.speedup({"a", "b", "c", "d"}) == 1


def test_as_many_sensitive_sites_stay_dense_as_the_speed_leaves_room_for():
    costs = [cost("a", 0.1), cost("b", 0.3), cost("c", 0.4), cost("d", 0.01)]
    assert within_speed(costs, SPEED, 1.5) == {"d"}  # pruning it gains nothing
    assert within_speed(costs, SPEED, 60 / 45) == {"b", "d"}  # the most nats for the time
    assert within_speed(costs, SPEED, 60 / 50) == {"a", "b", "d"}  # c no longer fits, a does
    assert within_speed(costs, SPEED, 60 / 55) == {"b", "c", "d"}
    assert within_speed([cost("a", -0.1), cost("b", 0.3), cost("c", 0), cost("d", 0)], SPEED, 1.01) == {"b"}
    for speedup in (1.01, 1.1, 1.2, 1.3, 1.4, 1.5):
        assert SPEED.speedup(within_speed(costs, SPEED, speedup)) >= speedup - 1e-9


def test_what_is_not_pruned_goes_to_4_8_while_the_perplexity_allows():
    costs = [cost("a", 0.3, finer=0.1), cost("b", 0.3, finer=0.05), cost("c", 0.1), cost("d", 0.2, finer=0.3)]
    unpruned = {"a", "b", "d"}
    assert softened_within(costs, unpruned, 1.0, budget(perplexity_ratio=math.exp(0.16))) == {"b"}
    assert softened_within(costs, unpruned, 1.0, budget(perplexity_ratio=math.exp(0.26))) == {"a", "b"}
    assert softened_within(costs, unpruned, 2.0, budget(perplexity_ratio=math.exp(0.26))) == set()
    assert softened_within(costs, unpruned, 1.0, budget(speedup=1.1)) == unpruned


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "perplexity_ratio, speedup or both"),
        ({"perplexity_ratio": 1.1, "gpu": "h100"}, "set one, or leave gpu out"),
    ],
)
def test_a_budget_has_something_to_meet(changes, message):
    with pytest.raises(ValidationError, match=message):
        budget(**changes)


def test_a_speed_budget_needs_kernels():
    with pytest.raises(ValidationError, match="no fast kernels for 4:8"):
        section(pattern="4:8", budget={"speedup": 1.2})


def test_times_are_bytes_of_weights_or_those_of_a_gpu():
    times, unit = site_times(None)
    assert unit == "bytes of weights" and times(256, 512) == (2 * 256 * 512 * 9 // 16, 2 * 256 * 512)
    assert times(30, 512)[0] == times(30, 512)[1]  # no kernel for that shape
    times, unit = site_times("h100")
    sparse, dense = times(22016, 4096)
    assert "H100" in unit and 1.2 < dense / sparse < 2.5 and 50 < dense < 100  # 180 MB at 3.35 TB/s
    assert times(22015, 4096)[0] == times(22015, 4096)[1]
    with pytest.raises(EsparseError, match="no GPU is called"):
        site_times("h1000")


def test_a_cost_is_measured_with_everything_else_dense(make_model, windows):
    path = make_model("llama")
    found = prune_model(
        path, windows, section(tokens="equal", budget={"perplexity_ratio": 1e6}), batch_size=2
    )
    whole = prune_model(path, windows, section(tokens="equal"), batch_size=2)
    sites = found.choice.sites
    assert all(site.pattern == "2:4" and site.reason is None for site in sites) and len(sites) == 8
    assert all(torch.equal(found.masks[name], whole.masks[name]) for name in whole.masks)
    site = sites[2]
    assert site.layers == [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")]
    assert site.parameters == 2 * 32 * 64
    kept = [layer.kept.final for layer in whole.layers if layer.name in site.layers]
    assert site.kept == pytest.approx(sum(kept) / 2)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        before = float(model(windows, labels=windows).loss)
        for name in site.layers:
            model.get_submodule(name).weight.mul_(whole.masks[name])
        assert site.nats == pytest.approx(float(model(windows, labels=windows).loss) - before, abs=1e-5)
        for name, mask in whole.masks.items():
            model.get_submodule(name).weight.mul_(mask)
        total = float(model(windows, labels=windows).loss) - before
    assert found.choice.ln_ratio == pytest.approx(total, abs=1e-5)


def written_by(path):
    """Text that the model writes itself, cold: anything that changes the model raises its perplexity."""
    model, ids = AutoModelForCausalLM.from_pretrained(path), torch.arange(2, 18).unsqueeze(1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(31):
            p = (model(ids).logits[:, -1] / 0.5).softmax(-1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], dim=1)
    return ids


@pytest.fixture(scope="module")
def wide(make_model):
    """Large enough for the packed layout: metadata of smaller layers is mostly padding."""
    return make_model("llama", hidden_size=128, intermediate_size=256, head_dim=32)


@pytest.fixture(scope="module")
def own_text(make_model):
    return written_by(make_model("llama"))


@pytest.fixture(scope="module")
def wide_text(wide):
    return written_by(wide)


@pytest.mark.parametrize("update", ["none", "obs"])
def test_the_budget_decides_how_much_is_pruned(update, make_model, own_text):
    path, settings, kept = make_model("llama"), {"update": {"method": update}}, []
    everything = prune_model(path, own_text, section(**settings, budget={"perplexity_ratio": 1e6}))
    total = everything.choice.ln_ratio
    assert total > 0.05 and all(site.pattern for site in everything.choice.sites)
    for share in (0.3, 0.7):
        wanted = {"perplexity_ratio": math.exp(share * total)}
        pruned = prune_model(path, own_text, section(**settings, budget=wanted))
        assert pruned.choice.ln_ratio <= share * total
        dense = {name: site for site in pruned.choice.sites if not site.pattern for name in site.layers}
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
    assert record.choice is not None and math.isfinite(record.choice.ln_ratio)


def test_tokens_are_weighted_once(wide, wide_text, monkeypatch):
    """For the costs at both patterns, and for what the budget makes of them."""
    calls, weigh = [], pruner.weight_tokens
    monkeypatch.setattr(pruner, "weight_tokens", lambda *given: calls.append(given) or weigh(*given))
    budget = {"speedup": 1.3, "sensitive": "4:8"}
    prune_model(wide, wide_text, section(budget=budget, tokens="effect"))
    assert len(calls) == 1


def test_a_speed_budget_prunes_enough(wide, wide_text):
    everything = prune_model(wide, wide_text, section(budget={"speedup": 1.01}))
    faster = prune_model(wide, wide_text, section(budget={"speedup": 1.3}))
    assert everything.choice.speed_of == "bytes of weights"
    assert 1.01 <= everything.choice.speedup < 1.3 <= faster.choice.speedup
    assert everything.masks.keys() < faster.masks.keys()
    assert sum(site.gain for site in faster.choice.sites) == pytest.approx(
        1 - 1 / faster.choice.speedup + sum(site.gain for site in faster.choice.sites if not site.pattern)
    )
    with pytest.raises(EsparseError, match="with everything pruned the linear layers are") as error:
        prune_model(wide, wide_text, section(budget={"speedup": 1.77}))
    assert error.value.where == "prune.budget.speedup"


def test_both_budgets_may_be_too_much(wide, wide_text):
    whole = prune_model(wide, wide_text, section(budget={"perplexity_ratio": 1e6, "speedup": 1.2}))
    assert whole.choice.speedup > 1.2
    tight = {
        "perplexity_ratio": math.exp(0.3 * whole.choice.ln_ratio),
        "speedup": whole.choice.speedup - 0.01,
    }
    with pytest.raises(EsparseError, match="sites dense") as error:
        prune_model(wide, wide_text, section(budget=tight))
    assert error.value.where == "prune.budget"


def test_sensitive_layers_at_4_8(wide, wide_text):
    found = prune_model(wide, wide_text, section(budget={"speedup": 1.3, "sensitive": "4:8"}))
    finer = {name: site for site in found.choice.sites if site.pattern == "4:8" for name in site.layers}
    assert finer and all(site.nats_4_8 < site.nats for site in finer.values())
    for layer in found.layers:
        if layer.name not in found.masks:
            continue
        assert layer.pattern == ("4:8" if layer.name in finer else "2:4")
        group, order = int(layer.pattern[2]), found.permutations.get(layer.name, torch.arange(layer.shape[1]))
        groups = found.masks[layer.name][:, order].unflatten(1, (-1, group)).sum(2)
        assert (groups == group // 2).all()
