"""Tiny random models of every supported family."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from esparse_trt.recipe import Recipe, parse_recipe

_COMMON = {
    "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
_GQA = {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 256}
_OPT = {"ffn_dim": 64, "max_position_embeddings": 256}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_COMMON, **_GQA),
    "mistral": lambda: MistralConfig(**_COMMON, **_GQA, sliding_window=16),
    "qwen2": lambda: Qwen2Config(**_COMMON, **_GQA, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_COMMON, **_GQA, head_dim=16),
    # Two sliding layers, then a full one: the blocks are called with different masks and rotary embeddings.
    "gemma3": lambda: Gemma3TextConfig(
        **{**_COMMON, "num_hidden_layers": 3}, **_GQA, head_dim=16, sliding_window=16,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    ),
    "opt": lambda: OPTConfig(**{**_COMMON, "pad_token_id": 1}, **_OPT, word_embed_proj_dim=32),
    # As OPT-350m: the norm comes after, and the residual stream is projected from and to the embeddings.
    "opt_post_norm": lambda: OPTConfig(
        **{**_COMMON, "pad_token_id": 1}, **_OPT, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
    "bloom": lambda: BloomConfig(**_COMMON, n_head=4, n_layer=2),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread_and_seed() -> None:
    """These models are so small that a second thread only waits; random inputs are the same in every run."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Callable[..., Path]:
    """`make_model(family, dtype)`: a folder with a random model of that family and a tokenizer."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def make(family: str, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
        if (family, dtype) in made and not changes:
            return made[family, dtype]
        folder = tmp_path_factory.mktemp(family)
        config = FAMILIES[family]()
        config.update(changes)
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                # Strong enough that what a block puts out matters to the next one; uneven over channels.
                if parameter.dim() == 2:
                    parameter.normal_(std=0.15).mul_(torch.rand(parameter.shape[1]) * 2)
        model.to(dtype).save_pretrained(folder)
        for file in tiny_llama.glob("tokenizer*"):
            shutil.copy(file, folder)
        if not changes:
            made[family, dtype] = folder
        return folder

    return make


@pytest.fixture
def make_recipe(sample_text: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """`make_recipe(model, **prune)`: a recipe with little calibration text and the given prune section.

    Permutations are chosen by the scores alone, and fold where they can, but for tests that say otherwise.
    """

    def make(model: Path, **prune: object) -> Recipe:
        section = {"permute": {"local": {"block": 16}}, "device": "cpu"} | prune
        section["permute"] = {"refine": None, "attention": "fold", "rows": "equal"} | section["permute"]
        text = {"text": {"path": str(sample_text)}, "samples": 5, "length": 40, "batch_size": 2}
        data = {"name": "test", "model": {"path": str(model)}, "calibration": text, "prune": section}
        return parse_recipe(data, base=tmp_path)

    return make


@pytest.fixture(scope="session")
def windows() -> torch.Tensor:
    """Random calibration tokens, longer than the sliding windows."""
    return torch.randint(2, 320, (5, 40), generator=torch.Generator().manual_seed(3))
