"""The layers that are measured: what the pack stage makes of well-known models, [N, K].

Layers that read the same tensor are one GEMM: q, k and v; gate and up.
"""

from __future__ import annotations

from typing import NamedTuple


class Model(NamedTuple):
    """Sizes that make a decoder block's linear layers."""

    hidden: int
    inner: int
    key_value: int  # key/value heads times head size


MODELS = {
    "LLaMA-7B": Model(4096, 11008, 4096),
    "LLaMA-13B": Model(5120, 13824, 5120),
    "LLaMA-2-70B": Model(8192, 28672, 1024),
    "Llama-3-8B": Model(4096, 14336, 1024),
    "Llama-3-70B": Model(8192, 28672, 1024),
    "Qwen2.5-0.5B": Model(896, 4864, 128),
    "Qwen2.5-1.5B": Model(1536, 8960, 256),
    "Qwen2.5-7B": Model(3584, 18944, 512),
}

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def layers(model: Model) -> dict[str, tuple[int, int]]:
    """[N, K] of a block's GEMMs by name."""
    return {
        "qkv": (model.hidden + 2 * model.key_value, model.hidden),
        "o": (model.hidden, model.hidden),
        "gate_up": (2 * model.inner, model.hidden),
        "down": (model.hidden, model.inner),
    }


def names() -> dict[tuple[int, int], list[str]]:
    """[N, K] -> the layers that have it, "LLaMA-7B o", in the order of the models."""
    found: dict[tuple[int, int], list[str]] = {}
    for model, sizes in MODELS.items():
        for layer, shape in layers(sizes).items():
            found.setdefault(shape, []).append(f"{model} {layer}")
    return found
