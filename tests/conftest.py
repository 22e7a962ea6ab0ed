"""Fixtures shared by all tests: tiny models made on the spot, so that no test needs a network."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from esparse_trt import progress

TEXT = (
    "The quick brown fox jumps over the lazy dog. Pruning removes weights that matter little; a permutation "
    "moves channels so that the ones that matter are not forced to compete. Numbers: 0 1 2 3 4 5 6 7 8 9.\n"
) * 40


@pytest.fixture(autouse=True)
def as_a_library(monkeypatch) -> None:
    """Progress is silent at first, and what a test makes of it ends with the test."""
    monkeypatch.setattr(progress, "_mode", "silent")


def make_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `TEXT`, with <s> and </s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA on disk: 2 layers, hidden 64, 4 heads, 2 KV heads, fp32."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sample_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small English text file."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, sample_text: Path) -> Path:
    """A recipe that prunes `tiny_llama` to 2:4 in fp32 within seconds and builds no engine."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    text = {"source": "file", "path": str(sample_text)}
    recipe = {
        "model": {"path": str(tiny_llama)},
        "calibration": {"text": text, "samples": 8, "length": 32, "batch_size": 4},
        "prune": {"pattern": "2:4", "permute": {"local": {"block": 32}, "attention": "fold"}},
        "export": {"dtype": "float32"},
        "engine": {"flavour": "none"},
        "verify": {"text": text, "length": 32, "samples": 8},
    }
    path.write_text(yaml.safe_dump(recipe))
    return path
