"""The glue between the GEMMs as few kernels: torch.compile of one decoder layer, shared by all layers.

Norms, rotary embedding, cache update, activation and residual adds are two dozen small kernels a layer in
eager mode, each as long as a launch: with attention 68 us a layer of a LLaMA-7B (H100, batch 1, context 512),
and 20 us compiled and with the decoder's attention. A plain forward of the model stays eager.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from esparse_trt.runtime.attention import SlotCache
from esparse_trt.sparsity.models import family_of

_VARIANTS = 64  # compiled forms of one layer: {1, more} sequences x {1, more} tokens, for every kind of layer


def compile_layers(model: PreTrainedModel) -> None:
    """Let the Decoder run compiled layers, in place; the first prefill and the first step compile them."""
    blocks: Any = model.get_submodule(family_of(model.config).blocks)
    for index, layer in enumerate(blocks):
        layer.forward = partial(_forward, layer, index)
    for module in model.modules():
        if type(module).__name__.endswith(("RMSNorm", "RotaryEmbedding")):
            module.compile(dynamic=True)


def run_layer(layer: nn.Module, args: tuple[Tensor, ...], options: dict[str, Any]) -> Any:
    """The forward of a layer: what is compiled."""
    return type(layer).forward(layer, *args, **options)


_compiled = torch.compile(run_layer, dynamic=True, fullgraph=True)


def _forward(layer: nn.Module, index: int, *args: Any, **options: Any) -> Any:
    """A layer's forward. The compiled one gets its own part of the cache, and so does not know its index."""
    cache = options.get("past_key_values")
    if not isinstance(cache, SlotCache):
        return run_layer(layer, args, options)
    options["past_key_values"] = cache.layers[index]
    with torch._dynamo.config.patch(recompile_limit=_VARIANTS):
        return _compiled(layer, args, options)
