"""Which layers the runtime packs: the table and the recipe decide, whole sites at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from esparse_trt.engine.table import Best, Device, Row, Table
from esparse_trt.recipe import parse_recipe
from esparse_trt.runtime import choice
from esparse_trt.runtime.choice import packed_layers

QKV, OUT, GATE_UP, DOWN = (256, 128), (128, 128), (512, 128), (128, 256)


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=96,
    )  # fmt: skip
    return LlamaForCausalLM(config).half()


def table(slow: tuple[int, int]) -> Table:
    """Measured at M = 1: packed is twice as fast but for one shape; launched plainly it never is."""
    rows = []
    for shape in (QKV, OUT, GATE_UP, DOWN):
        ours = 20.0 if shape == slow else 5.0
        plain, chained, dense = (Best("kernel", us, us, us) for us in (30.0, ours, 10.0))
        rows.append(Row(*shape, "float16", 1, plain, chained, dense))
    return Table(Device("GPU", 90, 132, "", ""), "0.1.0", "abc", "2026-11-22", {row.key: row for row in rows})


def packed(model, known, changes=None, without=()):
    """Last parts of the names that are packed in the first block."""
    data = {
        "name": "a", "model": {"path": "m"}, "calibration": {"text": {"path": "t"}},
        "traffic": [{"batch": 1, "prompt": 1}], **(changes or {}),
    }  # fmt: skip
    names = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    packable = {name for name in names if not any(part in name for part in ("lm_head", *without))}
    recipe = parse_recipe(data, base=Path())
    found = packed_layers(model, packable, recipe, known, torch.float16)
    return {name.rpartition(".")[2] for name in found if ".0." in name}


ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_without_a_table_all_that_can_be_is_packed(model):
    assert packed(model, None) == ALL


@pytest.mark.parametrize(
    ("slow", "dense"),
    [(OUT, {"o_proj"}), (QKV, {"q_proj", "k_proj", "v_proj"}), (GATE_UP, {"gate_proj", "up_proj"})],
)
def test_a_site_that_is_slower_packed_stays_dense_as_a_whole_and_is_said(model, monkeypatch, slow, dense):
    said = []
    monkeypatch.setattr(choice, "note", lambda text, **facts: said.append((text, facts["code"])))
    assert packed(model, table(slow)) == ALL - dense
    assert len(said) == 2  # a line for each block
    assert all(
        "stays dense: nothing is faster than dense" in text and code == "dense_faster" for text, code in said
    )


@pytest.mark.parametrize(
    ("wish", "expected"), [("plugin", ALL), ("dense", set()), ("native", ALL - {"o_proj"})]
)
def test_a_recipe_may_ask(model, wish, expected):
    assert packed(model, table(OUT), {"engine": {"sparse_gemm": wish}}) == expected


def test_a_layer_that_is_not_2_4_keeps_its_site_dense(model):
    assert packed(model, None, without=("k_proj",)) == ALL - {"q_proj", "k_proj", "v_proj"}
