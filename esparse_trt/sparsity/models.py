"""Model families as data: where the decoder blocks are and which linear layers read the same tensor.

To support another family, add a row to `FAMILIES`; nothing else in the package knows architectures.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PretrainedConfig

from esparse_trt.errors import EsparseError

Reads = Literal["residual", "attention", "mlp"]


@dataclass(frozen=True)
class Site:
    """Linear layers of a block that read the same tensor, so that they share one permutation.

    Attributes:
        name: of the site: qkv, o, gate_up, fc1, down, fc2.
        linears: module paths inside the block.
        reads: the (normed) residual stream, the attention output, or the inside of the MLP; DESIGN section 5
            says which permutations each allows.
        activation: of gate and up, path of the module act whose act(gate) · up the next site reads.
    """

    name: str
    linears: tuple[str, ...]
    reads: Reads
    activation: str | None = None


@dataclass(frozen=True)
class Family:
    """One module tree.

    Attributes:
        model_types: values of `model_type` in config.json that have this tree.
        blocks: path of the list of decoder blocks.
        sites: of each block, in the order in which data flows.
        final: paths of the modules between the last block and the head; those that are None are skipped.
        kv_heads: config field with the number of key/value heads.
        block_returns: what a block's forward returns: hidden states, or a tuple that begins with them.
        head: path of the language-model head.
        heads: config field with the number of query heads.
    """

    model_types: tuple[str, ...]
    blocks: str
    sites: tuple[Site, ...]
    final: tuple[str, ...]
    kv_heads: str
    block_returns: Literal["tensor", "tuple"] = "tensor"
    head: str = "lm_head"
    heads: str = "num_attention_heads"


FAMILIES: tuple[Family, ...] = (
    Family(
        model_types=("llama", "mistral", "qwen2", "qwen3", "gemma3_text"),
        blocks="model.layers",
        sites=(
            Site("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "residual"),
            Site("o", ("self_attn.o_proj",), "attention"),
            Site("gate_up", ("mlp.gate_proj", "mlp.up_proj"), "residual", "mlp.act_fn"),
            Site("down", ("mlp.down_proj",), "mlp"),
        ),
        final=("model.norm",),
        kv_heads="num_key_value_heads",
    ),
    Family(
        model_types=("opt",),
        blocks="model.decoder.layers",
        sites=(
            Site("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "residual"),
            Site("o", ("self_attn.out_proj",), "attention"),
            Site("fc1", ("fc1",), "residual"),
            Site("fc2", ("fc2",), "mlp"),
        ),
        final=("model.decoder.final_layer_norm", "model.decoder.project_out"),
        kv_heads="num_attention_heads",
    ),
    Family(
        model_types=("bloom",),
        blocks="transformer.h",
        sites=(
            Site("qkv", ("self_attention.query_key_value",), "residual"),
            Site("o", ("self_attention.dense",), "attention"),
            Site("fc1", ("mlp.dense_h_to_4h",), "residual"),
            Site("fc2", ("mlp.dense_4h_to_h",), "mlp"),
        ),
        final=("transformer.ln_f",),
        kv_heads="num_attention_heads",
        block_returns="tuple",
    ),
)


def family_of(config: PretrainedConfig) -> Family:
    """The row of a model's family.

    Raises:
        EsparseError: unsupported architecture, with the list of what is supported.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    supported = ", ".join(sorted(t for family in FAMILIES for t in family.model_types))
    raise EsparseError(
        f"model type {config.model_type!r} is not supported",
        where=config.name_or_path or "config.json",
        fix=f"use one of {supported}, or add its row to esparse_trt/sparsity/models.py",
    )


def heads_of(config: PretrainedConfig, family: Family) -> tuple[int, int]:
    """Numbers of query heads and of key/value heads."""
    return getattr(config, family.heads), getattr(config, family.kv_heads)


def linear(module: nn.Module, path: str) -> nn.Linear:
    """The linear layer at `path`.

    Raises:
        EsparseError: there is none, or it is another kind of layer.
    """
    try:
        layer = module.get_submodule(path)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Linear):
        raise EsparseError(
            f"expected a linear layer, found {type(layer).__name__}",
            where=path,
            fix="use the model's plain, unquantised checkpoint with this version of transformers",
        )
    return layer


def stored_name(parameter: str, stored: Collection[str], base: str) -> str:
    """Name under which a checkpoint stores a parameter: with or without the base model's prefix.

    Checkpoints saved from the bare decoder lack it (BLOOM's `h.0...` for `transformer.h.0...`).

    Args:
        parameter: name in the model, such as `transformer.h.0.mlp.dense_h_to_4h.weight`.
        stored: the names in the checkpoint.
        base: `base_model_prefix` of the model class.

    Raises:
        EsparseError: it is stored under neither name.
    """
    for name in (parameter, parameter.removeprefix(f"{base}."), f"{base}.{parameter}"):
        if name in stored:
            return name
    raise EsparseError(
        "the checkpoint has no such tensor",
        where=parameter,
        fix="config.json and the weights belong to different models: download both again",
    )
