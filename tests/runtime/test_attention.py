"""The decoder's attention and cache, and its compiled layers, on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from esparse_trt.errors import EsparseError
from esparse_trt.runtime import compile as compiling
from esparse_trt.runtime.attention import Slots, attend, decode_attention
from esparse_trt.runtime.decode import Decoder, generate
from esparse_trt.runtime.load import merge

SHAPE = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 96}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2, intermediate_size=128))


def qwen3() -> PreTrainedModel:
    config = Qwen3Config(**SHAPE, num_key_value_heads=2, intermediate_size=128, head_dim=32)
    return Qwen3ForCausalLM(config)


def opt() -> PreTrainedModel:
    return OPTForCausalLM(OPTConfig(**SHAPE, ffn_dim=128, word_embed_proj_dim=64))


def bloom() -> PreTrainedModel:
    """Its attention is its own."""
    return BloomForCausalLM(BloomConfig(hidden_size=64, n_layer=3, n_head=4, vocab_size=96))


def reference(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int) -> torch.Tensor:
    """Causal attention of queries at positions from `first` on, one (batch, head) at a time."""
    batch, heads, new, size = query.shape
    output = torch.empty(batch, new, heads, size, dtype=query.dtype)
    for b in range(batch):
        for h in range(heads):
            kv = h // (heads // keys.shape[1])
            for i in range(new):
                k, v = keys[b, kv, : first + i + 1], values[b, kv, : first + i + 1]
                output[b, i, h] = (k @ query[b, h, i] * size**-0.5).softmax(0) @ v
    return output


@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("position", [0, 4, 11])
@pytest.mark.parametrize("rotated", [False, True])
def test_one_token_sees_the_cache_up_to_its_position(position: int, placed: bool, rotated: bool) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 4, 1, 8)
    keys, values = torch.randn(2, 2, 2, 12, 8)
    new = [slots[:, :, position : position + 1].clone() for slots in (keys, values)]
    angles = [None, None]
    raw = query
    if rotated:
        angle = torch.rand(1, 1, 4).repeat(1, 1, 2)
        angles = [angle.cos(), angle.sin()]
        query, keys[:, :, position : position + 1] = apply_rotary_pos_emb(query, new[0], *angles)
    expected = reference(query, keys, values, position)
    written = [slots[:, :, position].clone() for slots in (keys, values)]
    slots = [slots.index_fill(2, torch.arange(position, 12), torch.nan) for slots in (keys, values)]
    places = torch.randperm(32).int() if placed else None
    found = decode_attention(raw, *new, *slots, torch.tensor([position]), 8**-0.5, places, *angles)
    if placed:
        found = found.flatten(1)[:, places].view_as(expected)
    torch.testing.assert_close(found, expected)
    for slot, here in zip(slots, written, strict=True):
        torch.testing.assert_close(slot[:, :, position], here)
        assert slot[:, :, position + 1 :].isnan().all(), "nothing else is written"


def test_prompt_attention_is_causal_and_leaves_the_rest_of_the_cache_out() -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 4, 5, 8)
    keys, values = torch.randn(2, 2, 2, 12, 8)
    found, _ = attend(torch.nn.Module(), query, keys, values, torch.zeros(1, 1, 1, 1, dtype=torch.int64))
    torch.testing.assert_close(found, reference(query, keys, values, 0))


@pytest.mark.parametrize("deferred", [False, True])
def test_slots_are_written_at_the_position(deferred: bool) -> None:
    position = torch.tensor([0])
    slots = Slots(6, position, deferred=deferred)
    slots.lazy_initialization(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    slots.update(torch.ones(1, 1, 3, 2), 2 * torch.ones(1, 1, 3, 2), 0)
    position.fill_(4)
    keys, values = slots.update(3 * torch.ones(1, 1, 1, 2), 4 * torch.ones(1, 1, 1, 2), 0)
    if deferred:
        query, mask = torch.zeros(1, 1, 1, 2), position.view(1, 1, 1, 1)
        attend(torch.nn.Module(), query, keys, values, mask)
        keys, values = keys.slots, values.slots
    assert keys[0, 0, :, 0].tolist() == [1, 1, 1, 0, 3, 0]
    assert values[0, 0, :, 0].tolist() == [2, 2, 2, 0, 4, 0]


def test_attention_of_another_kind_is_refused() -> None:
    x = torch.zeros(1, 1, 1, 8)
    with pytest.raises(EsparseError, match="no softcap"):
        attend(torch.nn.Module(), x, x, x, torch.zeros(1, 1, 1, 1, dtype=torch.int64), softcap=30.0)


@pytest.mark.parametrize("make", [llama, qwen3, opt, bloom])
def test_generation_is_that_of_plain_forwards(make) -> None:
    torch.manual_seed(0)
    model = make().eval()
    ids = prompt = torch.randint(3, 96, (2, 5))
    before = model(prompt).logits
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generate(model, prompt, 6), ids[:, 5:])
    assert torch.equal(generate(model, prompt[:, :1], 2), generate(model, prompt[:, :1], 2))
    assert torch.equal(model(prompt).logits, before), "a plain forward is what it was"


def test_all_layers_share_one_compiled_form(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(
        compiling,
        "_compiled",
        torch.compile(compiling.run_layer, dynamic=True, fullgraph=True, backend=counter),
    )
    torch.manual_seed(0)
    model = llama().eval()
    prompts = torch.randint(3, 96, (3, 7))
    expected = [generate(model, prompts[:batch], 4) for batch in (3, 2, 1)]
    merge(model)
    compiling.compile_layers(model)
    for batch, tokens in zip((3, 2, 1), expected, strict=True):
        assert torch.equal(generate(model, prompts[:batch], 4), tokens)
    assert counter.frame_count == 4, "one sequence or more, one token or more"
    before = counter.frame_count
    Decoder(model, 2, 20).prefill(prompts[:2, :5])
    model(prompts)
    bloom_model = bloom().eval()
    compiling.compile_layers(bloom_model)
    generate(bloom_model, prompts, 2)
    assert counter.frame_count == before, "other lengths, plain forwards and BLOOM compile nothing"
