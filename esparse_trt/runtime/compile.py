"""The glue between the GEMMs as few kernels: torch.compile of one decoder layer, shared by all layers.

Norms, rotary embedding, cache update, activation and residual adds are two dozen small kernels a layer in
eager mode, each as long as a launch: with attention 68 us a layer of a LLaMA-7B (H100, batch 1, context 512).
Of one token, two norms, the attention and an addition are left (`fuse`). A plain forward stays eager.

The compiled kernels are launched programmatically, as the GEMMs and the attention are: each may begin while
the one before it runs, and waits for it before it reads or writes. A GEMM's weights do not depend on it, so
that they are on their way before the norm or the activation that makes x has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel

from esparse_trt.runtime.attention import SlotCache
from esparse_trt.runtime.fuse import fuse
from esparse_trt.runtime.norm import replace_norms
from esparse_trt.sparsity.models import family_of

_VARIANTS = 64  # compiled forms of one layer: {1, more} sequences x {1, more} tokens, for every kind of layer


def compile_layers(model: PreTrainedModel) -> None:
    """Let the Decoder run compiled layers, in place; the first prefill and the first step compile them."""
    blocks: Any = model.get_submodule(family_of(model.config).blocks)
    for index, layer in enumerate(blocks):
        replace_norms(layer)
        layer.forward = partial(_forward, layer, index)
    inside = set(blocks.modules())
    for module in model.modules():
        if module not in inside and type(module).__name__.endswith(("RMSNorm", "RotaryEmbedding")):
            module.compile(dynamic=True)


def run_layer(layer: nn.Module, args: tuple[Tensor, ...], options: dict[str, Any]) -> Any:
    """The forward of a layer: what is compiled."""
    return type(layer).forward(layer, *args, **options)


def inductor(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """The backend: inductor, its kernels launched programmatically if its version and the GPU can do so."""
    from torch._inductor.codegen.triton import TritonKernel
    from torch._inductor.compile_fx import compile_fx

    fuse(graph.graph)
    graph.recompile()
    if not hasattr(TritonKernel, "_filter_pdl"):
        return compile_fx(graph, inputs)
    config: Any = torch.compiler.config  # the tag sets these kernels apart in inductor's cache
    with mock.patch.object(TritonKernel, "_filter_pdl", wait_first), config.patch(cache_key_tag="wait first"):
        return compile_fx(graph, inputs, config_patches={"triton.enable_pdl": True})


def wait_first(kernel: Any, code: Any) -> None:
    """Let a kernel wait at its top, and the next one begin there, too: in place of inductor's own placing.

    Inductor lets a kernel read, before it waits, all but what the one just before it wrote. That is right if
    that one lets its successor begin after its own wait; ours do so earlier, which is the point of them. And
    inductor lets the next kernel begin after the loads, which hides a launch but not a GEMM's first reads.

    Args:
        kernel: a `TritonKernel`.
        code: its body, an `IndentedBuffer`.
    """
    if kernel._enable_pdl_codegen():
        places = kernel.GDC_LAUNCH, kernel.GDC_WAIT
        code._lines = [*places, *(line for line in code._lines if str(line).strip() not in places)]


_compiled = torch.compile(run_layer, backend=inductor, dynamic=True, fullgraph=True)


def _forward(layer: nn.Module, index: int, *args: Any, **options: Any) -> Any:
    """A layer's forward. The compiled one gets its own part of the cache, and so does not know its index."""
    cache = options.get("past_key_values")
    if not isinstance(cache, SlotCache):
        return run_layer(layer, args, options)
    options["past_key_values"] = cache.layers[index]
    with torch._dynamo.config.patch(recompile_limit=_VARIANTS):
        return _compiled(layer, args, options)
