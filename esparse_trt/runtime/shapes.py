"""Shapes of well-known models, to measure and estimate without their weights."""

from __future__ import annotations

from transformers import LlamaConfig

from esparse_trt.errors import EsparseError

# hidden, intermediate, layers, query heads, key/value heads, vocabulary; from the models' config.json
_SHAPES = {
    "llama-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama-13b": (5120, 13824, 40, 40, 40, 32000),
    "llama-70b": (8192, 28672, 80, 64, 8, 32000),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 152064),
}
NAMES = tuple(_SHAPES)


def config_of(name: str) -> LlamaConfig:
    """A LLaMA-style configuration of that shape; biases and norms, which cost nothing, are LLaMA's.

    Raises:
        EsparseError: no such name.
    """
    if name not in _SHAPES:
        raise EsparseError(f"no model shape is called {name!r}", fix=f"use one of {', '.join(NAMES)}")
    hidden, intermediate, layers, heads, kv_heads, vocabulary = _SHAPES[name]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=16384,
        tie_word_embeddings=False,
    )
