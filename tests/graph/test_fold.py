"""Folding real exports of tiny random models of every family: no Gather is left where none is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from esparse_trt.errors import CheckFailed
from esparse_trt.graph.certify import certify
from esparse_trt.graph.fold import Folding, fold
from esparse_trt.graph.plan import load_plan, redo, undo
from esparse_trt.graph.proof import LIMIT, example_feeds, outputs, relative_l2

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8  # of the families in conftest.py
RESIDUAL = ("q_proj", "k_proj", "v_proj", "query_key_value", "gate_proj", "up_proj", "fc1", "dense_h_to_4h")
NAMES = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "opt", "bloom"]


def permutation_nodes(path: Path) -> list[str]:
    """Names of the explicit permutations in a file."""
    return [
        n.name for n in onnx.load(path, load_external_data=False).graph.node if n.name.endswith(".permute")
    ]


def logits(path: Path, feed: dict[str, NDArray]) -> NDArray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["logits"], feed)[0]


def is_residual(gather: str) -> bool:
    return gather.removesuffix(".permute").rsplit(".", 1)[-1] in RESIDUAL


@pytest.mark.parametrize("residual", ["gather", "shared", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_no_gather_is_left_where_none_is_needed(families: Any, name: str, residual: str) -> None:
    build = families(name).build(residual)
    record = fold(build.recipe, build.folder, build.exported)
    expected = [gather for gather in build.exported.gathers if residual == "gather" and is_residual(gather)]
    assert permutation_nodes(build.folder.sparse_onnx) == expected == list(record.kept)
    assert record.folded == len(build.exported.gathers) - len(expected) > 0
    assert record.logits_error <= LIMIT
    assert record.dense_error <= LIMIT
    plan = load_plan(build.folder.fold_plan)
    for feed in example_feeds(build.exported.inputs, 96):  # and the files as they are, in fp32
        changed = {name: redo(plan, name, value) for name, value in feed.items()}
        before, after = logits(build.folder.explicit_onnx, feed), logits(build.folder.sparse_onnx, changed)
        assert relative_l2(after, before) <= 1e-5
    assert record.bytes == sum(file.stat().st_size for file in build.folder.onnx.glob("sparse.onnx*"))
    assert not list(build.folder.onnx.glob(".*")), "temporary files were left behind"
    assert certify(build.recipe, build.folder, build.pruned, build.exported).tensors


def test_layer_outputs_in_original_order(families: Any) -> None:
    """The plan undoes the basis of every linear layer's output, as the comparison by layer needs it."""
    build = families("llama").build("shared")
    fold(build.recipe, build.folder, build.exported)
    plan = load_plan(build.folder.fold_plan)
    layers = [name for name in build.exported.linears if name != "lm_head"]
    feed = example_feeds(build.exported.inputs, 96)[1]
    explicit = outputs(with_outputs(build.folder.explicit_onnx, layers), [feed])[0]
    changed = {name: redo(plan, name, value) for name, value in feed.items()}
    sparse = outputs(with_outputs(build.folder.sparse_onnx, layers), [changed])[0]
    for name in layers:
        np.testing.assert_allclose(undo(plan, name, sparse[name]), explicit[name], atol=1e-5)
    moved = [name for name in layers if not np.allclose(sparse[name], explicit[name], atol=1e-5)]
    assert {name.rsplit(".", 1)[-1] for name in moved} == {
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert plan.tensors["past_key_values.0.value"] == plan.tensors["present.0.value"]
    assert np.shape(plan.tensors["past_key_values.0.value"].table) == (KV_HEADS, HEAD_DIM)
    assert "past_key_values.0.key" not in plan.tensors


def with_outputs(path: Path, names: list[str]) -> Path:
    model = onnx.load(path, load_external_data=False)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    target = path.with_name(f"outputs_{path.name}")
    onnx.save(model, target)
    return target


def test_float16(families: Any) -> None:
    build = families("opt", "float16").build("gather")
    record = fold(build.recipe, build.folder, build.exported)
    assert record.logits_error <= LIMIT
    assert record.dense_error <= LIMIT
    assert len(record.kept) == 4


def test_a_permutation_that_mixes_heads_stays(families: Any) -> None:
    orders = families("llama").permutations("none")
    mixing = torch.randperm(32, generator=torch.Generator().manual_seed(5))
    orders["model.layers.0.self_attn.o_proj"] = mixing
    build = families("llama").build("mixing", orders)
    record = fold(build.recipe, build.folder, build.exported)
    assert list(record.kept) == ["model.layers.0.self_attn.o_proj.permute"]
    assert "moves channels across" in record.kept["model.layers.0.self_attn.o_proj.permute"]
    assert permutation_nodes(build.folder.sparse_onnx) == list(record.kept)


def test_query_heads_of_one_kv_head_must_agree(families: Any) -> None:
    orders = families("llama").permutations("none")
    per_head = [torch.randperm(HEAD_DIM, generator=torch.Generator().manual_seed(h)) for h in range(HEADS)]
    orders["model.layers.1.self_attn.o_proj"] = torch.cat([o + h * HEAD_DIM for h, o in enumerate(per_head)])
    build = families("llama").build("disagree", orders)
    record = fold(build.recipe, build.folder, build.exported)
    assert list(record.kept) == ["model.layers.1.self_attn.o_proj.permute"]
    assert "Expand treats alike" in record.kept["model.layers.1.self_attn.o_proj.permute"]


def test_a_residual_permutation_must_not_break_other_layers(families: Any) -> None:
    """One site alone could take the whole residual stream along, but the others were pruned in its order."""
    order = torch.arange(31, -1, -1).roll(1)
    only = {f"model.layers.0.mlp.{name}_proj": order for name in ("gate", "up")}
    build = families("llama").build("one_site", only)
    record = fold(build.recipe, build.folder, build.exported)
    assert "would break the 2:4 groups" in record.kept["model.layers.0.mlp.gate_proj.permute"]


def test_a_wrong_fold_is_noticed(families: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """If an initializer were forgotten, the proof would fail and say which output is wrong."""
    build = families("llama").build("none")
    reorder = Folding.reorder

    def forget(self: Folding, name: str, values: Any) -> Any:
        return values if name == "model.layers.0.mlp.up_proj.weight" else reorder(self, name, values)

    monkeypatch.setattr(Folding, "reorder", forget)
    with pytest.raises(CheckFailed, match="folding changed 'logits'"):
        fold(build.recipe, build.folder, build.exported)
    assert not list(build.folder.onnx.glob(".*"))
