"""Layers that break naive code: dead channels, inputs that never change, empty rows, little text."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from esparse_trt.errors import EsparseError
from esparse_trt.sections import PruneSection, TextFile
from esparse_trt.sparsity.pattern import Pattern, conforming_share
from esparse_trt.sparsity.prune import prune_model
from esparse_trt.text import token_windows

DEAD = [0, 1, 2, 3, 8, 9, 10, 17]  # channels of the MLP: a whole group, most of one, one of a group


@pytest.fixture(scope="module")
def awkward(make_model, tmp_path_factory) -> Path:
    """A model whose first block has all of it."""
    path = make_model("llama")
    model = AutoModelForCausalLM.from_pretrained(path)
    block = model.model.layers[0]
    with torch.no_grad():
        block.mlp.up_proj.weight[DEAD] = 0  # down reads zeros there
        block.mlp.down_proj.weight[5] = 0  # a row that is empty before anything is pruned
        block.self_attn.o_proj.weight[:, 4:8] = 0  # groups with nothing to keep
        block.input_layernorm.weight.zero_()  # q, k and v read nothing but zeros
        model.model.layers[1].post_attention_layernorm.weight.zero_()  # gate and up too, behind pruned layers
    folder = tmp_path_factory.mktemp("awkward")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("update", [{"method": "none"}, {"method": "obs"}, {"method": "obs", "damping": 0}])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "e_sparse", "obd", "obs"])
@pytest.mark.filterwarnings("error")
def test_every_method_prunes_it(method, update, awkward, windows):
    section = PruneSection.model_validate(
        {"score": {"method": method}, "update": update, "permute": {"local": {"block": 16}}, "device": "cpu"}
    )
    pruned = prune_model(awkward, windows, section, batch_size=2)
    model = AutoModelForCausalLM.from_pretrained(awkward)
    pruned.apply(model)
    for layer in pruned.layers:
        if layer.pattern is None:
            continue
        order = pruned.permutations.get(layer.name, torch.arange(layer.shape[1]))
        groups = pruned.masks[layer.name][:, order].unflatten(1, (-1, 4)).sum(-1)
        assert (groups == 2).all(), "no row of a group loses more than its share"
        weight = model.get_submodule(layer.name).weight
        assert weight.isfinite().all() and conforming_share(weight[:, order], Pattern(2, 4)) == 1
        if layer.update:
            assert layer.update.damping >= update.get("damping", 0.01) and math.isfinite(layer.update.error)
    assert not model.model.layers[0].mlp.down_proj.weight[5].any(), "nothing comes of nothing"
    with torch.no_grad():
        assert model(windows).logits.isfinite().all()


def test_the_damping_that_a_singular_hessian_takes_is_reported(awkward, windows):
    section = PruneSection.model_validate({"update": {"method": "obs", "damping": 0}, "device": "cpu"})
    damping = {
        layer.name: layer.update.damping
        for layer in prune_model(awkward, windows, section).layers
        if layer.update
    }
    assert damping["model.layers.0.mlp.down_proj"] > 0, "eight of its channels are dead"
    assert damping["model.layers.1.self_attn.q_proj"] == 0, "it has text enough"


def test_less_text_than_one_sequence(awkward, tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    with pytest.raises(EsparseError, match="tokens; 4 samples of 64 need") as error:
        token_windows(
            TextFile(source="file", path=tmp_path / "short.txt"), AutoTokenizer.from_pretrained(awkward),
            samples=4, length=64, seed=0,
        )  # fmt: skip
    assert "longer text" in error.value.fix


def test_one_short_sequence_is_enough(awkward):
    """Nine tokens against 64 channels: every Hessian is singular."""
    section = PruneSection.model_validate(
        {"score": {"method": "obs"}, "update": {"method": "obs"}, "device": "cpu"}
    )
    pruned = prune_model(awkward, torch.randint(2, 320, (1, 9)), section)
    model = AutoModelForCausalLM.from_pretrained(awkward)
    pruned.apply(model)
    with torch.no_grad():
        assert model(torch.arange(2, 30).unsqueeze(0)).logits.isfinite().all()
