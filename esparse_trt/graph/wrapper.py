"""A causal language model as a function of flat tensors, which is the form that ONNX wants.

`CausalLM` takes `input_ids`, a 2-D `attention_mask` over past and present tokens, `position_ids` where the
model has positions, and one key and one value tensor per layer; it returns the logits and the grown cache.
The 4-D additive masks are built here, in the graph, from comparisons of token indices:

    query i (cache index past + i) may see key j  if  j <= past + i, attention_mask[j] = 1 and, with a sliding
    window w, j > past + i - w; and every query may see itself.

The last clause only matters for padding: it keeps softmax away from rows of nothing but -inf, whose NaN would
spread through the cache. Attention is written out as MatMul, Add, Softmax, MatMul, which both runtimes fuse.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from esparse_trt.errors import EsparseError

ATTENTION = "esparse_plain"


@dataclass(frozen=True)
class Family:
    """What the inputs of one architecture look like.

    `mask`: `causal` for every layer the same; `window` the same with `config.sliding_window`; `typed` one
    mask per entry of `config.layer_types`; `alibi` causal plus ALiBi position biases.
    """

    mask: Literal["causal", "window", "typed", "alibi"]
    positions: bool = True


FAMILIES = {
    "llama": Family("causal"),
    "mistral": Family("window"),
    "qwen2": Family("typed"),
    "qwen3": Family("typed"),
    "gemma3_text": Family("typed"),
    "opt": Family("causal"),
    "bloom": Family("alibi", positions=False),
}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model.

    Raises:
        EsparseError: the architecture is not in the table, or its rotary embedding depends on the input.
    """
    if config.model_type not in FAMILIES:
        raise EsparseError(
            f"cannot export the architecture {config.model_type!r}",
            where="model",
            fix=f"use one of {', '.join(sorted(FAMILIES))}",
        )
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            raise EsparseError(
                f"rotary embedding {parameters['rope_type']!r} changes with the length of the input, so "
                "it is no fixed graph",
                where="model config.json: rope_parameters",
                fix="use a model whose rope_type is default, linear, llama3 or yarn",
            )
    return FAMILIES[config.model_type]


def cache_shape(config: PretrainedConfig) -> tuple[int, int]:
    """KV heads and head dimension."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


class CausalLM(nn.Module):
    """See the module docstring. `model` must have been made with `attn_implementation=ATTENTION`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.causal_lm = model
        self.family = family_of(model.config)
        if self.family.mask == "alibi":
            _use_biased_mask(model)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits `[batch, sequence, vocab]` and the present keys and values, `past` with the new tokens.

        Args:
            input_ids: int64 `[batch, sequence]`.
            attention_mask: int64 `[batch, past + sequence]`, 1 for tokens and 0 for padding.
            position_ids: int64 `[batch, sequence]`, or None for families without.
            past: key and value of layer 0, of layer 1, ...: each `[batch, kv_heads, past, head_dim]`.
        """
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        positions = {"position_ids": position_ids} if self.family.positions else {}
        output = self.causal_lm(
            input_ids=input_ids,
            attention_mask=self._masks(input_ids, attention_mask, past[0].shape[2]),
            past_key_values=cache,
            use_cache=True,
            **positions,
        )
        layers = output.past_key_values.layers
        return output.logits, [tensor for layer in layers for tensor in (layer.keys, layer.values)]

    def _masks(self, input_ids: Tensor, attention_mask: Tensor, past: int) -> Any:
        config, dtype = self.causal_lm.config, self.causal_lm.dtype
        query = torch.arange(input_ids.shape[1])[:, None] + past
        key = torch.arange(attention_mask.shape[1])[None, :]
        seen = (key <= query)[None] & (attention_mask[:, None, :] > 0) | (key == query)[None]
        zero, lowest = torch.zeros((), dtype=dtype), torch.full((), torch.finfo(dtype).min, dtype=dtype)

        def additive(window: int | None) -> Tensor:
            visible = seen if window is None else seen & (key > query - window)[None]
            return torch.where(visible, zero, lowest)[:, None]

        if self.family.mask == "window":
            return additive(config.sliding_window)
        if self.family.mask == "typed":
            windows = {"full_attention": None, "sliding_attention": config.sliding_window}
            return {kind: additive(windows[kind]) for kind in dict.fromkeys(config.layer_types)}
        if self.family.mask == "alibi":
            return additive(None) + alibi(attention_mask, config.num_attention_heads, dtype)
        return additive(None)


def plain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention for the interface of transformers: `[batch, heads, sequence, head_dim]` in,
    `[batch, sequence, heads, head_dim]` out. Queries are scaled before the product: in fp16 it may overflow.
    """
    if scaling != 1.0:
        query = query * scaling
    groups = query.shape[1] // key.shape[1]
    weights = query @ repeat_heads(key, groups).transpose(2, 3) + attention_mask
    return (weights.softmax(-1) @ repeat_heads(value, groups)).transpose(1, 2), None


def repeat_heads(tensor: Tensor, groups: int) -> Tensor:
    """Each KV head `groups` times in a row: one for each of its query heads."""
    if groups == 1:
        return tensor
    batch, heads, length, dim = tensor.shape
    return tensor[:, :, None].expand(batch, heads, groups, length, dim).reshape(batch, -1, length, dim)


AttentionInterface.register(ATTENTION, plain_attention)


# --- BLOOM -----------------------------------------------------------------------------------------------


def alibi(attention_mask: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """ALiBi biases (arXiv 2108.12409) `[batch, heads, 1, keys]`: head's slope times key's position."""
    batch, keys = attention_mask.shape
    return build_alibi_tensor(attention_mask, heads, dtype).view(batch, heads, 1, keys)


def _use_biased_mask(model: Any) -> None:
    """Make BLOOM take one 4-D mask that has the ALiBi biases in it, and attend as the other families do.

    As written in transformers it wants the 2-D mask, to build ALiBi, and folds the heads into the batch axis.
    """
    model.transformer.build_alibi_tensor = lambda mask, *_, **__: mask
    for block in model.transformer.h:
        block.self_attention.forward = MethodType(_bloom_attention, block.self_attention)


def _bloom_attention(
    self: Any, hidden_states: Tensor, residual: Tensor, attention_mask: Tensor, layer_past: Any, **_: Any
) -> tuple[Tensor, None]:
    query, key, value = self._reshape(self.query_key_value(hidden_states))
    key, value = layer_past.update(key, value, self.layer_idx)
    context, _weights = plain_attention(self, query, key, value, attention_mask, self.inv_norm_factor)
    return residual + self.dense(context.reshape(hidden_states.shape)), None
