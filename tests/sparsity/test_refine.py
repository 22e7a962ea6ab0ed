"""Swaps that lower the output error, against that error computed from inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from esparse_trt.recipe import Recipe
from esparse_trt.sections import PermuteSection, PruneSection
from esparse_trt.sparsity import permute
from esparse_trt.sparsity.pattern import Pattern, nm_mask
from esparse_trt.sparsity.permutation import inverse, is_identity
from esparse_trt.sparsity.prune import prune_model
from esparse_trt.sparsity.refine import _Search, refine

PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8)]


class Layer:
    """A random layer that reads correlated inputs and does not put out all it should."""

    def __init__(self, channels: int = 48, rows: int = 20, tokens: int = 200, lacking: float = 0.5) -> None:
        mixed = torch.randn(tokens, channels // 4) @ torch.randn(channels // 4, channels)
        self.x = (mixed + torch.randn(tokens, channels)) * torch.rand(channels)
        self.weight = torch.randn(rows, channels)
        self.wanted = self.x @ self.weight.T + lacking * torch.randn(tokens, rows)
        self.scores = self.weight.abs() * self.x.norm(dim=0)
        self.hessian = self.x.T @ self.x
        self.missing = (self.wanted - self.x @ self.weight.T).T @ self.x

    def error(self, order: Tensor, pattern: Pattern) -> float:
        kept = nm_mask(self.scores[:, order], pattern)[:, inverse(order)]
        return float((self.wanted - self.x @ (self.weight * kept).T).square().sum())

    def search(self, order: Tensor, pattern: Pattern) -> _Search:
        return _Search(self.weight, self.scores, self.hessian, self.missing, order, pattern)

    def refine(self, order: Tensor, pattern: Pattern, rounds: int = 30) -> Tensor:
        return refine(self.weight, self.scores, self.hessian, self.missing, order, pattern, rounds)

    def shuffled(self, pattern: Pattern) -> Tensor:
        settings = PermuteSection.model_validate({"global": "deal", "local": {"block": "full"}})
        return permute.choose(self.scores.square().unsqueeze(0), pattern, settings).final[0]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_it_lowers_the_error_that_the_shuffles_leave(pattern: Pattern):
    layer = Layer()
    start = layer.shuffled(pattern)
    before = start.clone()
    found = layer.refine(start, pattern)
    assert torch.equal(found.sort().values, torch.arange(48))
    assert torch.equal(start, before)
    assert layer.error(found, pattern) < 0.98 * layer.error(start, pattern)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_no_round_raises_the_error(pattern: Pattern):
    layer = Layer()
    search = layer.search(layer.shuffled(pattern), pattern)
    errors = [layer.error(search.order.flatten(), pattern)]
    while search.swap():
        errors.append(layer.error(search.order.flatten(), pattern))
    assert len(errors) >= 3
    assert errors == sorted(errors, reverse=True)


def test_it_makes_up_for_what_is_missing():
    """Not knowing it, the same search ends with more error."""
    layer, pattern = Layer(lacking=3), Pattern(2, 4)
    start = layer.shuffled(pattern)
    blind = refine(layer.weight, layer.scores, layer.hessian, None, start, pattern, 30)
    assert layer.error(layer.refine(start, pattern), pattern) < layer.error(blind, pattern)


def test_the_state_follows_the_swaps():
    layer, pattern = Layer(), Pattern(2, 4)
    search = layer.search(torch.arange(48), pattern)
    for _ in range(3):
        assert search.swap()
    fresh = layer.search(search.order.flatten(), pattern)
    torch.testing.assert_close(search.pruned, fresh.pruned)
    torch.testing.assert_close(search.slope, fresh.slope, rtol=1e-4, atol=1e-3)


def test_what_a_single_swap_is_said_to_gain():
    """For uncorrelated inputs, of which nothing is missing, the proposals are exact."""
    layer, pattern = Layer(channels=16), Pattern(2, 4)
    layer.hessian = layer.hessian.diagonal().diag()
    layer.missing = torch.zeros_like(layer.weight)
    gains = layer.search(torch.arange(16), pattern)._gains()
    lost = layer.weight.square() * layer.hessian.diagonal()

    def error(order: Tensor) -> float:
        return float((lost[:, order] * ~nm_mask(layer.scores[:, order], pattern)).sum())

    order = torch.arange(16)
    for a in range(4):
        for b in range(4, 16):
            swapped = order.clone()
            swapped[a], swapped[b] = b, a
            assert float(gains[a, b]) == pytest.approx(error(order) - error(swapped), rel=1e-3, abs=1e-2)


def test_a_layer_that_reads_nothing_stays():
    still = torch.zeros(8, 8)
    found = refine(torch.randn(3, 8), torch.rand(3, 8), still, None, torch.arange(8), Pattern(2, 4), 5)
    assert is_identity(found)


@pytest.mark.parametrize(
    "changes, refined",
    [
        ({}, False),
        ({"permute": {"refine": {}}}, True),
        ({"permute": {"refine": {}, "global": "none", "local": None}}, False),  # channels are to stay
        ({"permute": {"refine": {}, "global": "none", "local": None, "assign": 1}}, True),
        ({"permute": {"refine": {}}, "score": {"method": "magnitude"}}, False),  # which takes no text
    ],
)
def test_what_is_refined(changes: dict[str, object], refined: bool):
    section = PruneSection.model_validate(changes)
    assert (section.refine is not None) == refined
    assert not section.corrects


def test_weights_that_are_refitted_make_up_for_what_was_lost_themselves():
    permute = {"refine": {"correct": 0.5}}
    section = PruneSection.model_validate({"permute": permute})
    assert section.corrects and section.follows_dense
    refitted = {"method": "obs", "correct": 0}
    assert not PruneSection.model_validate({"permute": permute, "update": refitted}).corrects


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_pruning_with_it(family: str, make_model: Callable[..., Path], windows: Tensor):
    """Layers get other permutations, and masks that are 2:4 under them; no weight changes."""
    model = make_model(family)
    before, after = (
        prune_model(model, windows, PruneSection.model_validate({"permute": {"refine": r}, "device": "cpu"}))
        for r in (None, {"rounds": 5})
    )
    assert not after.values  # the weights are those of the model
    first = [layer for layer in after.layers if layer.block == 0 and layer.reason is None]
    changed = {
        layer.site
        for layer in first
        if not torch.equal(before.permutations[layer.name], after.permutations[layer.name])
    }
    assert len(changed) >= 2
    for name in (layer.name for layer in first):
        kept = after.masks[name][:, after.permutations[name]]
        assert bool((kept.unflatten(1, (-1, 4)).sum(2) == 2).all())


def test_any_permutation_behind_attention(
    make_model: Callable[..., Path], make_recipe: Callable[..., Recipe], windows: Tensor
):
    """With a gather, channels leave their heads."""
    model = make_model("llama")
    found = {}
    for attention in ("fold", "gather"):
        settings = make_recipe(model, permute={"local": {"block": "full"}, "attention": attention}).prune
        found[attention] = prune_model(model, windows, settings).permutations[
            "model.layers.0.self_attn.o_proj"
        ]
    head = found["fold"] // 8
    assert torch.equal(head, torch.arange(32) // 8)
    assert not torch.equal(found["gather"] // 8, torch.arange(32) // 8)
