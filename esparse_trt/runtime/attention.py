"""Attention over a static KV cache whose length lives on the GPU: one captured step serves all lengths.

`Slots` is one layer's cache, `attend` the attention function of transformers' `AttentionInterface` that goes
with it: causal attention over the prompt (prefill starts from an empty cache), and for one new token a kernel
that splits the filled part of the cache over the GPU and appends the token to it. What the Decoder does not
run (a plain forward) takes PyTorch's scaled-dot-product attention as before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedConfig, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from esparse_trt.errors import EsparseError
from esparse_trt.sparsity.models import family_of, heads_of

NAME = "esparse_static"  # value of `attn_implementation`
PREFILL_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
_NOT_HERE = ("softcap", "s_aux", "position_bias")  # what some models add to attention


class Appended(NamedTuple):
    """Keys or values of one token, [batch, kv heads, 1, head_dim], which attention is to write into slots."""

    slots: Tensor
    new: Tensor


class Slots(StaticLayer):
    """Keys and values [batch, kv heads, max_length, head_dim] of one layer, written at a shared position.

    Args:
        position: int64 [1], where the next token goes.
        deferred: leave it to `attend` to write what one token appends.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, max_length: int, position: Tensor, *, deferred: bool) -> None:
        super().__init__(max_cache_len=max_length)
        self.position = position
        self.deferred = deferred

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Store keys and values [batch, kv heads, new, head_dim]: one at the position, several from 0 on.

        Returns:
            The cache's keys and values; of one token, if it is deferred, an `Appended` of each.
        """
        new = key_states.shape[2]
        if new == 1 and self.deferred:
            return Appended(self.keys, key_states), Appended(self.values, value_states)
        for slots, states in ((self.keys, key_states), (self.values, value_states)):
            if new == 1:
                slots.index_copy_(2, self.position, states)
            else:
                slots[:, :, :new].copy_(states)
        return self.keys, self.values

    def get_seq_length(self) -> Tensor:  # type: ignore[override]
        """For models that make masks of their own: the number of tokens before the new ones."""
        return self.position


class SlotCache(Cache):
    """The `Slots` of all layers of a model.

    Args:
        config: of the model.
        batch: number of sequences.
        max_length: positions of each.
        position: int64 [1] on the model's device, where the next token goes.
        dtype: of keys and values.
        deferred: the model's attention is `attend`, which writes what one token appends.

    Raises:
        EsparseError: a layer has sliding-window attention.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        batch: int,
        max_length: int,
        position: Tensor,
        dtype: torch.dtype,
        *,
        deferred: bool,
    ) -> None:
        sliding = StaticCache(config=config, max_cache_len=max_length).is_sliding
        if any(sliding):
            raise EsparseError(
                f"{sum(sliding)} of {len(sliding)} layers have sliding-window attention, which is not here",
                where=f"model type {config.model_type}",
                fix="use the model's own generate()",
            )
        slots = [Slots(max_length, position, deferred=deferred) for _ in sliding]
        super().__init__(layers=list(slots))
        heads, kv_heads = heads_of(config, family_of(config))
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.early_initialization(batch, kv_heads, size, dtype, position.device)
        for layer in slots:
            for tensor in (layer.keys, layer.values):
                torch._dynamo.mark_static(tensor, [1, 3])  # compiled layers know the heads and their size


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor | Appended,
    value: Tensor | Appended,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function.

    Args:
        query: [batch, heads, new, head_dim].
        key: [batch, kv heads, length, head_dim]; with the Decoder, what `Slots.update` returns.
        value: likewise.
        attention_mask: int64 [1, 1, 1, 1], the first new token's position, if the Decoder calls; else a mask.

    Returns:
        [batch, new, heads, head_dim], and no attention weights.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        assert isinstance(key, Tensor) and isinstance(value, Tensor)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    if unknown := [name for name in _NOT_HERE if options.get(name) is not None]:
        raise EsparseError(f"this attention has no {', '.join(unknown)}", fix="use the model's generate()")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, Appended) and isinstance(value, Appended):
        position = attention_mask.view(1)
        slots = key.slots, value.slots
        return decode_attention(query, key.new, value.new, *slots, position, scaling, None, None, None), None
    assert isinstance(key, Tensor) and isinstance(value, Tensor)
    new = query.shape[2]
    with sdpa_kernel(PREFILL_BACKENDS, set_priority=True):
        output = F.scaled_dot_product_attention(
            query,
            key[:, :, :new],
            value[:, :, :new],
            is_causal=True,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return output.transpose(1, 2), None


@torch.library.custom_op("esparse::decode_attention", mutates_args=("keys", "values"), device_types="cuda")
def decode_attention(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    scaling: float,
    places: Tensor | None,
    cosine: Tensor | None,
    sine: Tensor | None,
) -> Tensor:
    """Attention of one new token over the tokens before it and itself; it is appended to the cache.

    Args:
        query: [batch, heads, 1, head_dim].
        new_keys: [batch, kv heads, 1, head_dim], of the token.
        new_values: likewise.
        keys: [batch, kv heads, max_length, head_dim], contiguous, filled up to `position`, which is written.
        values: likewise.
        position: int64 [1]. The kernel just before must not be the one that writes it or the filled cache: it
            may still run while they are read.
        scaling: of query · key.
        places: int32 [heads · head_dim] or None: where in a token's output each channel goes.
        cosine: [head_dim] in any shape, of the rotation that query and new keys still need; None: of none.
        sine: likewise.

    Returns:
        [batch, 1, heads, head_dim].
    """
    from esparse_trt.runtime.flash_decode import flash_decode  # imports triton: only where a GPU is

    return flash_decode(query, new_keys, new_values, keys, values, position, scaling, places, cosine, sine)


@decode_attention.register_kernel("cpu")
def _(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    scaling: float,
    places: Tensor | None,
    cosine: Tensor | None,
    sine: Tensor | None,
) -> Tensor:
    if cosine is not None and sine is not None:
        query, new_keys = (_rotate(x, cosine.view(-1), sine.view(-1)) for x in (query, new_keys))
    keys.index_copy_(2, position, new_keys)
    values.index_copy_(2, position, new_values)
    length, repeats = int(position) + 1, query.shape[1] // keys.shape[1]
    k, v = (t[:, :, :length].repeat_interleave(repeats, dim=1) for t in (keys, values))
    output = F.scaled_dot_product_attention(query, k, v, scale=scaling).transpose(1, 2).contiguous()
    if places is None:
        return output
    rows = output.flatten(1)
    return rows.index_copy(1, places.long(), rows).view_as(output)


@decode_attention.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    batch, heads, new, size = query.shape
    return query.new_empty(batch, new, heads, size)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
