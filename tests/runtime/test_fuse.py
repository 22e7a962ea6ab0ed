"""What is fused in a compiled layer: where permutations and additions go, and that the answers stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from esparse_trt.runtime import compile as compiling
from esparse_trt.runtime.bench import packed_twin, random_model, shuffle_channels
from esparse_trt.runtime.decode import Decoder
from esparse_trt.runtime.fuse import fuse
from esparse_trt.runtime.norm import RmsNorm, replace_norms, rms_norm

CONFIG = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=96,
)  # fmt: skip


class Backend:
    """Runs graphs as they are, or fused; remembers the operators of ours in them, by name."""

    def __init__(self, fused: bool) -> None:
        self.fused = fused
        self.graphs: list[dict[str, list[fx.Node]]] = []

    def __call__(self, graph: fx.GraphModule, _: Any) -> Any:
        if self.fused:
            fuse(graph.graph)
            graph.recompile()
        found: dict[str, list[fx.Node]] = {}
        for node in graph.graph.nodes:
            if getattr(node.target, "namespace", None) == "esparse":
                found.setdefault(node.target._opname, []).append(node)
        self.graphs.append(found)
        return graph


def logits_of(model: LlamaForCausalLM, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """After a prompt of several tokens and one step."""
    torch._dynamo.reset()
    compiled = torch.compile(compiling.run_layer, dynamic=True, fullgraph=True, backend=backend)
    monkeypatch.setattr(compiling, "_compiled", compiled)
    decoder = Decoder(model, 2, 9)
    decoder.prefill(torch.arange(3, 17).view(2, 7))
    decoder.step()
    assert decoder.logits is not None
    return decoder.logits.clone()


@pytest.fixture
def permuted() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = random_model(CONFIG, torch.bfloat16, "cpu")
    return packed_twin(model, shuffle_channels(model))


def test_permutations_go_to_who_makes_x(permuted, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fused = Backend(fused=False), Backend(fused=True)
    assert torch.equal(logits_of(permuted, plain, monkeypatch), logits_of(permuted, fused, monkeypatch))
    assert all(len(graph["permute"]) == 3 for graph in plain.graphs)  # qkv, o, gate and up
    prompt, token = fused.graphs
    for graph in (prompt, token):
        assert "permute" not in graph
        assert all(norm.args[-1] is not None for norm in graph["rms_norm"])
    orders = [gemm.args[4] for gemm in prompt["sparse_gemm"]]
    assert [order is not None for order in orders] == [False, True, False, False]  # o reads cuDNN's output
    assert all(gemm.args[4] is None for gemm in token["sparse_gemm"])
    (attention,) = token["decode_attention"]
    assert attention.args[7] is not None


def test_attention_of_one_token_rotates(permuted, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend(fused=True)
    logits_of(permuted, backend, monkeypatch)
    prompt, token = backend.graphs
    assert "decode_attention" not in prompt
    (attention,) = token["decode_attention"]
    query, keys, *_, cosine, sine = attention.args
    assert cosine is not None and sine is not None
    assert query.target == keys.target == "transpose", "the projections as they are"


def test_norms_take_the_addition_before_them(permuted, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend(fused=True)
    logits_of(permuted, backend, monkeypatch)
    for graph in backend.graphs:
        first, second = graph["rms_norm"]
        assert first.args[1] is None and second.args[1] is not None


def test_what_others_read_too_keeps_its_order() -> None:
    """The norm's output is an output of the graph as well: only the GEMM may read it permuted."""
    graph, operators = fx.Graph(), torch.ops.esparse
    names = ["x", "weight", "order", "places", "values", "metadata"]
    x, weight, order, places, values, metadata = map(graph.placeholder, names)
    y = graph.call_function(operators.rms_norm.default, (x, None, weight, 1e-6, None))
    read = graph.call_function(operators.permute.default, (y, order, places))
    gemm = graph.call_function(operators.sparse_gemm.default, (read, values, metadata, None, None, None))
    graph.output((y, gemm))
    fuse(graph)
    assert y.args[-1] is None
    assert gemm.args[0] is y and gemm.args[4] is order


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("permute", [False, True])
def test_norm_is_the_models(add: bool, permute: bool) -> None:
    torch.manual_seed(0)
    theirs = LlamaRMSNorm(96, eps=1e-5).bfloat16()
    theirs.weight.data.normal_()
    x, addend = torch.randn(2, 3, 5, 96, dtype=torch.bfloat16)
    order = torch.randperm(96).int() if permute else None
    found = rms_norm(x, addend if add else None, theirs.weight, 1e-5, order)
    expected = theirs(x + addend if add else x)
    assert torch.equal(found, expected if order is None else expected[..., order])


def test_only_norms_that_are_alike_are_replaced() -> None:
    layer = nn.ModuleDict({"llama": LlamaRMSNorm(8), "gemma": Gemma3RMSNorm(8), "layer": nn.LayerNorm(8)})
    layer["gemma"].variance_epsilon = layer["gemma"].eps
    replace_norms(layer)
    assert [type(norm) for norm in layer.values()] == [RmsNorm, Gemma3RMSNorm, nn.LayerNorm]
