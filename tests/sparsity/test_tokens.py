"""How much tokens count, and for which outputs: against the Fisher information, and what is chosen by it."""

from __future__ import annotations

import errno
import os
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
from esparse_trt.sparsity.tokens import weight_tokens

CPU = torch.device("cpu")
SITES = {
    "model.layers.0.self_attn.q_proj": ["q_proj", "k_proj", "v_proj"],
    "model.layers.1.mlp.down_proj": ["down_proj"],
}
LAYERS = {site: [f"{site.rpartition('.')[0]}.{name}" for name in names] for site, names in SITES.items()}


def test_against_the_fisher_information(make_model: Callable[..., Path]):
    """Signs are drawn for each of many copies of one sequence, so that their mean is close."""
    path, tokens = make_model("llama"), torch.randint(2, 320, (1, 5))
    copies = 800
    found = weight_tokens(BlockwiseModel(path, CPU), LAYERS, tokens.repeat(copies, 1))
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    for site, layers in LAYERS.items():
        squares = {name: fisher(model, name, tokens) for name in layers}
        expected = torch.stack([s.sum(1) for s in squares.values()]).sum(0).sqrt()
        weights = found.tokens[site]
        got = weights.view(copies, -1).square().mean(0).sqrt()
        torch.testing.assert_close(got / got.mean(), expected / expected.mean(), rtol=0.05, atol=0.0)
        assert weights.mean() == pytest.approx(1)
        x = inputs(model, site, tokens).square()
        mean = weights.view(copies, -1).mean(0) @ x / len(x)
        for name, s in squares.items():
            expected = (s.T @ x / s.sum(0).unsqueeze(1) / mean).sqrt()
            torch.testing.assert_close(found.scales[name].float(), expected, rtol=0.1, atol=0.0)


def inputs(model: torch.nn.Module, name: str, tokens: Tensor) -> Tensor:
    """What a layer reads [T, K]."""
    seen: list[Tensor] = []
    handle = linear(model, name).register_forward_hook(lambda _, read, output: seen.append(read[0]))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    return seen[0].flatten(0, -2)


def fisher(model: torch.nn.Module, name: str, tokens: Tensor) -> Tensor:
    """The Fisher information's diagonal for the outputs of a layer at each token: [T, N]."""
    layer = linear(model, name)

    def log_p(change: Tensor) -> Tensor:
        handle = layer.register_forward_hook(lambda _, inputs, output: output + change)
        found = model(tokens).logits.log_softmax(-1)
        handle.remove()
        return found

    change = torch.zeros(*tokens.shape, layer.out_features)
    slopes = torch.autograd.functional.jacobian(log_p, change)  # [1, T, V, 1, T, N]
    weight = log_p(change).exp()[..., None, None, None]
    return (weight * slopes.square()).sum((0, 1, 2, 3)).detach()


def test_a_text_that_is_taken_in_parts(make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    """Whatever fits in memory at a time, scales of the first of it; the model's streams are left alone."""
    model, windows = BlockwiseModel(make_model("qwen2"), CPU), torch.randint(2, 320, (9, 6))
    model.embed(windows, batch_size=2)
    hidden = model.hidden.clone()
    whole = weight_tokens(model, LAYERS, windows)
    monkeypatch.setattr(tokens_module, "KEPT", 1)
    parts, first = (weight_tokens(model, LAYERS, part) for part in (windows, windows[:4]))
    assert whole.tokens.keys() == parts.tokens.keys() == LAYERS.keys()
    for site, layers in LAYERS.items():
        assert whole.tokens[site].shape == (54,)
        torch.testing.assert_close(whole.tokens[site], parts.tokens[site])
        for name in layers:
            torch.testing.assert_close(first.scales[name], parts.scales[name])
            assert not torch.equal(whole.scales[name], parts.scales[name])
    assert torch.equal(model.hidden, hidden)


@pytest.mark.parametrize("family", ["bloom", "gemma3", "opt", "opt_post_norm"])
def test_other_families(family: str, make_model: Callable[..., Path], windows: Tensor):
    model = BlockwiseModel(make_model(family), CPU)
    name = f"{model.block_name(0)}.{model.family.sites[0].linears[0]}"
    found = weight_tokens(model, {name: [name]}, windows)
    assert found.tokens[name].shape == (windows.numel(),) and bool((found.tokens[name] >= 0).all())
    assert found.scales[name].shape == linear(model.model, name).weight.shape


def test_outputs_and_channels_that_are_always_zero(make_model: Callable[..., Path], tmp_path: Path):
    """They are like any other, rather than infinitely large."""
    model = AutoModelForCausalLM.from_pretrained(make_model("llama"))
    model.model.layers[0].mlp.up_proj.weight.data[3] = 0
    model.save_pretrained(tmp_path)
    gate, up, down = (f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down"))
    sites = {up: [gate, up], down: [down]}
    scales = weight_tokens(BlockwiseModel(tmp_path, CPU), sites, torch.randint(2, 320, (3, 7))).scales
    assert bool((scales[gate][3] == 1).all()), "up never lets anything of it through"
    assert bool((scales[down][:, 3] == 1).all())
    assert all(bool(s.isfinite().all()) for s in scales.values())


@pytest.mark.parametrize("changes", [{}, {"permute": {"refine": {}}}, {"update": {"method": "obs"}}])
def test_what_is_chosen_by_it(changes: dict[str, object], make_model: Callable[..., Path], windows: Tensor):
    masks = {}
    for tokens in ("equal", "effect"):
        section = PruneSection.model_validate({"tokens": tokens, "device": "cpu", **changes})
        masks[tokens] = prune_model(make_model("llama"), windows, section, batch_size=2).masks
    assert masks["equal"].keys() == masks["effect"].keys()
    assert any(not torch.equal(mask, masks["effect"][name]) for name, mask in masks["equal"].items())


def test_a_score_that_reads_no_text_weighs_nothing(make_model: Callable[..., Path], windows: Tensor):
    score = {"method": "magnitude"}
    sections = [{"tokens": tokens, "score": score, "device": "cpu"} for tokens in ("equal", "effect")]
    masks = [
        prune_model(make_model("llama"), windows, PruneSection.model_validate(section)).masks
        for section in sections
    ]
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


def test_a_model_that_overflows(make_model: Callable[..., Path], windows: Tensor, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(make_model("llama"))
    model.model.norm.weight.data.fill_(torch.inf)
    model.save_pretrained(tmp_path)
    with pytest.raises(EsparseError, match="NaN or Inf in what the dense model predicts"):
        weight_tokens(BlockwiseModel(tmp_path, CPU), LAYERS, windows)


def test_no_space_for_the_scales(make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(EsparseError, match=r"No space left on device.*\n.*TMPDIR"):
        weight_tokens(BlockwiseModel(make_model("llama"), CPU), LAYERS, torch.randint(2, 320, (2, 7)))


def test_with_one_permutation_for_the_whole_stream(make_model: Callable[..., Path], windows: Tensor):
    """Its statistics are taken without gradients, before any block is pruned."""
    permute = {"residual": "shared", "refine": {}}
    section = PruneSection.model_validate({"tokens": "effect", "permute": permute, "device": "cpu"})
    assert prune_model(make_model("llama"), windows, section, batch_size=2).permutations
