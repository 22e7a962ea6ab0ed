"""How much tokens count: against the Fisher information, and what is chosen by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from esparse_trt.errors import EsparseError
from esparse_trt.sections import PruneSection
from esparse_trt.sparsity import tokens as tokens_module
from esparse_trt.sparsity.blockwise import BlockwiseModel
from esparse_trt.sparsity.models import linear
from esparse_trt.sparsity.prune import prune_model
from esparse_trt.sparsity.tokens import token_weights

CPU = torch.device("cpu")
SITES = {
    "model.layers.0.self_attn.q_proj": ["q_proj", "k_proj", "v_proj"],
    "model.layers.1.mlp.down_proj": ["down_proj"],
}
LAYERS = {site: [f"{site.rpartition('.')[0]}.{name}" for name in names] for site, names in SITES.items()}


def test_against_the_fisher_information(make_model: Callable[..., Path]):
    """Next tokens are drawn for each of many copies of one sequence, so that their mean is close."""
    path, tokens = make_model("llama"), torch.randint(2, 320, (1, 5))
    copies = 800
    found = token_weights(BlockwiseModel(path, CPU), LAYERS, tokens.repeat(copies, 1))
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    for site, layers in LAYERS.items():
        expected = sum(fisher(model, name, tokens) for name in layers).sqrt()
        got = found[site].view(copies, -1).square().mean(0).sqrt()
        torch.testing.assert_close(got / got.mean(), expected / expected.mean(), rtol=0.05, atol=0.0)
        assert found[site].mean() == pytest.approx(1)


def fisher(model: torch.nn.Module, name: str, tokens: Tensor) -> Tensor:
    """Σ_i of the Fisher information's diagonal for the outputs i of a layer at each token: [T]."""
    layer = linear(model, name)

    def log_p(change: Tensor) -> Tensor:
        handle = layer.register_forward_hook(lambda _, inputs, output: output + change)
        found = model(tokens).logits.log_softmax(-1)
        handle.remove()
        return found

    change = torch.zeros(*tokens.shape, layer.out_features)
    slopes = torch.autograd.functional.jacobian(log_p, change)  # [1, T, V, 1, T, N]
    weight = log_p(change).exp()[..., None, None, None]
    return (weight * slopes.square()).sum((0, 1, 2, 3, 5)).detach()


def test_a_text_that_is_taken_in_parts(make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    """Whatever fits in memory at a time; the model's own streams are left alone."""
    model, windows = BlockwiseModel(make_model("qwen2"), CPU), torch.randint(2, 320, (9, 6))
    model.embed(windows, batch_size=2)
    hidden = model.hidden.clone()
    whole = token_weights(model, LAYERS, windows)
    monkeypatch.setattr(tokens_module, "_KEPT", 1)
    parts = token_weights(model, LAYERS, windows)
    assert whole.keys() == parts.keys() == LAYERS.keys()
    for site in LAYERS:
        assert whole[site].shape == (54,)
        torch.testing.assert_close(whole[site], parts[site])
    assert torch.equal(model.hidden, hidden)


@pytest.mark.parametrize("family", ["bloom", "gemma3", "opt", "opt_post_norm"])
def test_other_families(family: str, make_model: Callable[..., Path], windows: Tensor):
    model = BlockwiseModel(make_model(family), CPU)
    name = f"{model.block_name(0)}.{model.family.sites[0].linears[0]}"
    (found,) = token_weights(model, {name: [name]}, windows).values()
    assert found.shape == (windows.numel(),) and bool((found >= 0).all())


@pytest.mark.parametrize("changes", [{"permute": {"refine": {}}}, {"update": {"method": "obs"}}])
def test_what_is_chosen_by_it(changes: dict[str, object], make_model: Callable[..., Path], windows: Tensor):
    masks = {}
    for tokens in ("equal", "effect"):
        section = PruneSection.model_validate({"tokens": tokens, "device": "cpu", **changes})
        masks[tokens] = prune_model(make_model("llama"), windows, section, batch_size=2).masks
    assert masks["equal"].keys() == masks["effect"].keys()
    assert any(not torch.equal(mask, masks["effect"][name]) for name, mask in masks["equal"].items())


def test_nothing_is_weighed_where_no_error_is_measured(make_model: Callable[..., Path], windows: Tensor):
    masks = [
        prune_model(make_model("llama"), windows, PruneSection(tokens=tokens, device="cpu")).masks
        for tokens in ("equal", "effect")
    ]
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


def test_a_model_that_overflows(make_model: Callable[..., Path], windows: Tensor, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(make_model("llama"))
    model.model.norm.weight.data.fill_(torch.inf)
    model.save_pretrained(tmp_path)
    with pytest.raises(EsparseError, match="NaN or Inf in what the dense model predicts"):
        token_weights(BlockwiseModel(tmp_path, CPU), LAYERS, windows)


def test_with_one_permutation_for_the_whole_stream(make_model: Callable[..., Path], windows: Tensor):
    """Its statistics are taken without gradients, before any block is pruned."""
    permute = {"residual": "shared", "refine": {}}
    section = PruneSection.model_validate({"tokens": "effect", "permute": permute, "device": "cpu"})
    assert prune_model(make_model("llama"), windows, section, batch_size=2).permutations
