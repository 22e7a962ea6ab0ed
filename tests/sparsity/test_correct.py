"""What a layer fails to put out behind pruned ones, and the regression that makes up for part of it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from esparse_trt.sections import LayerSelection, PruneSection
from esparse_trt.sparsity.blockwise import BlockwiseModel
from esparse_trt.sparsity.correct import adds_up, corrected, missing, ordinary_tokens
from esparse_trt.sparsity.layers import plan_layers
from esparse_trt.sparsity.models import linear
from esparse_trt.sparsity.pattern import Pattern
from esparse_trt.sparsity.prune import prune_model
from esparse_trt.sparsity.site import reads_residual

CPU = torch.device("cpu")


def test_correction_is_a_regression_of_what_is_missing():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    lacking = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 6, generator=generator)
    none, half, whole = (corrected(weight, x.T @ x, lacking.T @ x, share, 0, "site") for share in (0, 0.5, 1))
    best = torch.linalg.lstsq(x, x @ weight.double().T + lacking).solution.T
    torch.testing.assert_close(whole, best)
    torch.testing.assert_close(none, weight.double())
    torch.testing.assert_close(half, (none + whole) / 2)


@torch.no_grad()
def watch(model, windows, names):
    """What layers of block 1 read and put out, and what the block reads, as rows."""
    seen, handles = {}, []
    for name in names:
        hook = lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)})  # noqa: E731
        handles.append(model.get_submodule(name).register_forward_hook(hook))
    hook = lambda _, args, kwargs: seen.update(h=(args[0], args[0]))  # noqa: E731
    handles.append(model.model.layers[1].register_forward_pre_hook(hook, with_kwargs=True))
    model(windows)
    for handle in handles:
        handle.remove()
    return {name: tuple(t.flatten(0, 1) for t in pair) for name, pair in seen.items()}


@pytest.mark.parametrize("number", range(4), ids=["qkv", "o", "gate_up", "down"])
@torch.no_grad()
def test_what_is_missing_behind_pruned_layers(number, make_model, windows):
    """Against the streams of two ordinary models; block 0 and the sites before this one have lost weights."""
    path = make_model("llama")
    dense, sparse = (AutoModelForCausalLM.from_pretrained(path) for _ in range(2))
    model = BlockwiseModel(path, CPU)
    plan = plan_layers(model, Pattern(2, 4), LayerSelection())
    first, second = plan.blocks

    def prune(site):
        for layer in site.layers:
            keep = torch.rand(layer.shape) < 0.5
            for whole in (model.model, sparse):
                linear(whole, layer.name).weight.mul_(keep)

    model.embed(windows, batch_size=2, follow_dense=True)
    with model.resident(0):
        model.advance(0, model.dense)
        for site in first:
            prune(site)
        model.advance(0, model.hidden)
    site, writers = second[number], [s.name for s in second if not reads_residual(s)]
    names = [layer.name for s in second for layer in s.layers]
    with model.resident(1):
        weights = {name: linear(model.model, name).weight.clone() for name in names}
        for before in second[:number]:
            prune(before)
        every = torch.ones(windows.numel(), dtype=torch.bool)
        got = missing(model, 1, site, writers, weights, every)
        some = torch.rand(windows.numel()) < 0.5
        got_of_some = missing(model, 1, site, writers, weights, some)
        assert torch.equal(linear(model.model, writers[0]).weight, linear(sparse, writers[0]).weight)

    streams = []
    for whole in (dense, sparse):
        seen = watch(whole, windows, names)
        outputs = torch.cat([seen[layer.name][1] for layer in site.layers], dim=1)
        added = {"o": ["h"], "down": ["h", writers[0]]}.get(site.site.name, [])
        streams.append(outputs + sum(seen[name][1] for name in added))
    lacking, inputs = streams[0] - streams[1], seen[site.name][0]
    torch.testing.assert_close(got, lacking.T @ inputs, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(got_of_some, lacking[some].T @ inputs[some], rtol=1e-4, atol=1e-3)


def test_massive_activations_are_not_made_up_for(make_model, windows):
    model = BlockwiseModel(make_model("llama"), CPU)
    model.embed(windows, batch_size=2, follow_dense=True)
    with model.resident(0):
        assert ordinary_tokens(model, 0).all()
        model.dense[:, 0] *= 100
        assert torch.equal(ordinary_tokens(model, 0).view_as(windows).sum(0) == 0, torch.arange(40) == 0)


@pytest.mark.parametrize(
    "family, adds",
    [
        ("llama", True),
        ("qwen3", True),
        ("opt", True),
        ("bloom", True),
        ("gemma3", False),
        ("opt_post_norm", False),
    ],
)
def test_whether_a_block_adds_its_layers_outputs_to_the_stream(family, adds, make_model, windows):
    model = BlockwiseModel(make_model(family), CPU)
    plan = plan_layers(model, Pattern(2, 4), LayerSelection())
    model.embed(windows, batch_size=2)
    with model.resident(0):
        writers = [site.name for site in plan.blocks[0] if not reads_residual(site)]
        assert adds_up(model, 0, writers) is adds


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt_post_norm", "bloom"])
def test_correction_brings_the_outputs_closer(family, make_model, windows):
    path = make_model(family)
    dense = AutoModelForCausalLM.from_pretrained(path)
    errors = []
    for share in (0, 0.5):
        section = PruneSection.model_validate(
            {
                "device": "cpu",
                "permute": {"local": {"block": 16}},
                "update": {"method": "obs", "correct": share},
            }
        )
        sparse = AutoModelForCausalLM.from_pretrained(path)
        prune_model(path, windows, section, batch_size=2).apply(sparse)
        with torch.no_grad():
            errors.append(float((sparse(windows).logits - dense(windows).logits).square().mean()))
    assert errors[1] < errors[0]
