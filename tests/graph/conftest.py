"""Build folders of tiny random models of every family, up to and including the export stage."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from esparse_trt.artifacts import BuildDir
from esparse_trt.graph.export import insert_permutations
from esparse_trt.graph.feeds import read_specs
from esparse_trt.graph.trace import trace
from esparse_trt.graph.weights import Checkpoint, write_model
from esparse_trt.recipe import Recipe, parse_recipe
from esparse_trt.records import ExportRecord, LayerRecord, PruneRecord
from esparse_trt.sparsity.pattern import Pattern, nm_mask

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
COMMON = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=HEADS)
GATED = dict(**COMMON, intermediate_size=48, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM)
ONE_LAYER = {**GATED, "num_hidden_layers": 1}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**GATED),
    "mistral": MistralConfig(**ONE_LAYER, sliding_window=5),
    "qwen2": Qwen2Config(**ONE_LAYER),
    "qwen3": Qwen3Config(**ONE_LAYER),
    "gemma3": Gemma3TextConfig(
        **GATED,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=8,
    ),
    "opt": OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
    "bloom": BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=HEADS),
}
ATTENTION_OUTPUT = ("o_proj", "out_proj", "dense")
MLP_OUTPUT = ("down_proj", "fc2", "dense_4h_to_h")


def permutations(model: PreTrainedModel, residual: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random permutations as the prune stage makes them; layers that read the same tensor share one."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    kv_heads = getattr(config, "num_key_value_heads", None) or HEADS
    shared = torch.randperm(config.hidden_size, generator=generator)
    found: dict[str, torch.Tensor] = {}
    by_site: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        parent, leaf = name.rsplit(".", 1)
        if leaf in ATTENTION_OUTPUT:
            per_head = [torch.randperm(HEAD_DIM, generator=generator) for _ in range(kv_heads)]
            found[name] = torch.cat([per_head[h * kv_heads // HEADS] + h * HEAD_DIM for h in range(HEADS)])
        elif leaf in MLP_OUTPUT:
            found[name] = torch.randperm(module.in_features, generator=generator)
        elif residual == "shared":
            found[name] = shared
        elif residual == "gather":
            found[name] = by_site.setdefault(parent, torch.randperm(module.in_features, generator=generator))
    return found


class Family:
    """A tiny random model, traced once; `build` makes build folders up to and including the export stage."""

    def __init__(self, config: PretrainedConfig, root: Path, dtype: str = "float32") -> None:
        torch.manual_seed(0)
        self.root, self.dtype = root, dtype
        self.model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():  # biases and norms too, so that forgetting one shows
                parameter.add_(torch.randn_like(parameter) * 0.1)
        self.model.save_pretrained(root / "dense")
        self.traced = trace(config, dtype=getattr(torch, dtype), opset=20)

    def permutations(self, residual: str) -> dict[str, torch.Tensor]:
        """Random permutations of a residual mode."""
        return permutations(self.model, residual)

    def build(self, name: str, orders: dict[str, torch.Tensor] | None = None) -> SimpleNamespace:
        """A build with random permutations in residual mode `name`, or the given ones."""
        folder = BuildDir(self.root / name)
        orders = permutations(self.model, name) if orders is None else orders
        pruned, layers = copy.deepcopy(self.model), []
        with torch.no_grad():
            for module_name, module in pruned.named_modules():
                if isinstance(module, nn.Linear) and module_name != "lm_head":
                    order = orders.get(module_name, torch.arange(module.in_features))
                    mask = nm_mask(module.weight[:, order].abs(), Pattern(2, 4))
                    module.weight[:, order] = module.weight[:, order] * mask
                    layers.append(layer_record(module_name, module, module_name in orders))
        pruned.save_pretrained(folder.checkpoint)
        save_file({key: order.clone() for key, order in orders.items()}, folder.permutation)
        return SimpleNamespace(
            folder=folder,
            exported=self._export(folder, orders),
            recipe=make_recipe(self.root, self.dtype),
            pruned=prune_record(self.model, layers),
        )

    def _export(self, folder: BuildDir, orders: dict[str, torch.Tensor]) -> ExportRecord:
        """What `export_models` does, with the trace of an earlier call."""
        dense = write_model(self.traced, folder.dense_onnx, self._checkpoint(self.root / "dense"), {})
        gathers, weights = insert_permutations(self.traced, orders)
        explicit = write_model(
            self.traced, folder.explicit_onnx, self._checkpoint(folder.checkpoint), weights
        )
        inputs, outputs = read_specs(folder.explicit_onnx)
        linears = {module: self.traced.weight_of(module) for module in self.traced.linears}
        graph = self.traced.model.graph
        for node in self.traced.linears.values():
            gather = node.inputs[0].producer()
            if gather is not None and gather.name in gathers:
                node.replace_input_with(0, gather.inputs[0])
        for gather in [node for node in graph if node.name in gathers]:
            del graph.initializers[gather.inputs[1].name]
            graph.remove(gather)
        return ExportRecord(
            dtype=self.dtype,
            opset=20,
            inputs=inputs,
            outputs=outputs,
            linears=linears,
            gathers=gathers,
            bytes={"dense": dense, "explicit": explicit},
        )

    def _checkpoint(self, folder: Path) -> Checkpoint:
        ties = dict(self.model._tied_weights_keys or {}) if self.model.config.tie_word_embeddings else {}
        return Checkpoint(folder, prefix=self.model.base_model_prefix, tied=ties)


def layer_record(name: str, module: nn.Linear, permuted: bool) -> LayerRecord:
    shape = (module.out_features, module.in_features)
    return LayerRecord(
        name=name,
        site="",
        block=0,
        shape=shape,
        pattern="2:4",
        reason=None,
        permuted=permuted,
        sparsity=0.5,
        kept=None,
    )


def prune_record(model: PreTrainedModel, layers: list[LayerRecord]) -> PruneRecord:
    return PruneRecord(
        model_type=model.config.model_type,
        parameters=0,
        pruned_parameters=0,
        dtype="float32",
        source_sha256="",
        calibration_sha256="",
        calibration_tokens=0,
        device="cpu",
        layers=layers,
        channels=[],
    )


def make_recipe(root: Path, dtype: str = "float32") -> Recipe:
    data = {
        "name": "test",
        "model": {"path": "dense"},
        "calibration": {"text": {"path": "text.txt"}},
        "export": {"dtype": dtype},
    }
    return parse_recipe(data, base=root)


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Family]:
    """Families by name, each traced once."""

    @functools.cache
    def make(name: str, dtype: str = "float32") -> Family:
        return Family(FAMILIES[name], tmp_path_factory.mktemp(name), dtype)

    return make
