"""What outputs do to what a block puts out, against its Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from esparse_trt.sections import PruneSection
from esparse_trt.sparsity.blockwise import BlockwiseModel
from esparse_trt.sparsity.effect import effects
from esparse_trt.sparsity.models import linear
from esparse_trt.sparsity.prune import prune_model

LAYERS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
NAMES = [f"model.layers.0.{layer}" for layer in LAYERS]


@pytest.fixture
def model(make_model: Callable[..., Path]) -> BlockwiseModel:
    return BlockwiseModel(make_model("llama"), torch.device("cpu"))


def test_against_the_jacobian(model: BlockwiseModel):
    """Signs are drawn for each of many copies of one sequence, so that their mean is close."""
    tokens = torch.randint(2, 320, (1, 6))
    model.embed(tokens.repeat(600, 1), 600)
    with model.resident(0):
        found = effects(model, 0, NAMES)
        model.embed(tokens, 1)
        hidden = model.hidden
        for name in NAMES:
            expected = jacobian(model, name, hidden)
            torch.testing.assert_close(
                found[name] / found[name].mean(), expected / expected.mean(), rtol=0.1, atol=0.02
            )


def jacobian(model: BlockwiseModel, name: str, hidden: Tensor) -> Tensor:
    """The root of the summed squares of ∂ŷ/∂y_ti over all elements of ŷ and all tokens t: [N]."""
    layer = linear(model.model, name)

    def normed(change: Tensor) -> Tensor:
        handle = layer.register_forward_hook(lambda _, inputs, output: output + change)
        y = model.forward(0, hidden)
        handle.remove()
        return y / y.detach().norm(dim=-1, keepdim=True)

    change = torch.zeros(*hidden.shape[:2], layer.out_features)
    matrix = torch.autograd.functional.jacobian(normed, change)
    return matrix.square().sum((0, 1, 2, 3, 4)).sqrt()


def test_what_reaches_nothing_has_no_effect(model: BlockwiseModel, windows: Tensor):
    model.embed(windows, 2)
    with model.resident(0):
        with torch.no_grad():
            linear(model.model, NAMES[4]).weight[:, 7] = 0  # down reads nothing of channel 7
        found = effects(model, 0, NAMES)
    up, down = found[NAMES[3]], found[NAMES[4]]
    assert up[7] == 0 and (up[8:] > 0).all()
    torch.testing.assert_close(down, down[0].expand_as(down))  # the stream takes all of them up alike
    assert not any(handle for name in NAMES for handle in linear(model.model, name)._forward_hooks)


def test_permutations_are_chosen_by_it(make_model: Callable[..., Path], windows: Tensor):
    """Those of layers whose outputs differ in effect change; those of `down` do not."""
    chosen = {}
    for rows in ("equal", "effect"):
        permute = {"rows": rows, "refine": None}
        settings = PruneSection.model_validate({"tokens": "equal", "permute": permute, "device": "cpu"})
        chosen[rows] = prune_model(make_model("llama"), windows, settings).permutations
    q, down = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
    assert not torch.equal(chosen["equal"][q], chosen["effect"][q])
    assert torch.equal(chosen["equal"][down], chosen["effect"][down])


@pytest.mark.parametrize(
    "changes, weighs",
    [
        ({}, True),
        ({"permute": {"rows": "equal"}}, False),
        ({"permute": {"global": "none", "local": None}}, False),
        ({"score": {"method": "magnitude"}}, False),  # which takes no calibration text
    ],
)
def test_when_outputs_are_weighted(changes: dict[str, object], weighs: bool):
    assert PruneSection.model_validate(changes).weighs_rows == weighs
