"""A finished build as a Hugging Face model whose sparse layers hold only packed weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from esparse_trt.artifacts import BuildDir, load_manifest
from esparse_trt.engine.kernels import ACTIVATIONS
from esparse_trt.errors import EsparseError
from esparse_trt.model import load_model
from esparse_trt.progress import note, track
from esparse_trt.recipe import parse_recipe
from esparse_trt.records import PruneRecord
from esparse_trt.runtime.choice import packed_layers
from esparse_trt.runtime.compile import compile_layers
from esparse_trt.runtime.linear import GatedMlp, Merged, SparseLinear
from esparse_trt.runtime.ops import gated, tuned_table
from esparse_trt.runtime.packing import interleave, why_not
from esparse_trt.sparsity.models import Family, Site, family_of, heads_of, linear


def load(
    folder: Path | str,
    *,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """Load the pruned model of a build folder with packed weights.

    Args:
        folder: of a build whose prune stage has finished.
        dtype: fp16 or bf16, of weights and activations.
        device: default: the GPU if there is one, else the CPU (slow: weights are decompressed at every call).

    Returns:
        The model in evaluation mode. Layers that cannot be packed stay `nn.Linear`, and so do those that the
        tuner's table of this GPU says are slower packed (`engine.choice`).

    Raises:
        EsparseError: no such build, another dtype, or a pattern that has no packed form (only 2:4 has one).
    """
    build = BuildDir(folder)
    manifest = load_manifest(build)
    if manifest is None:
        raise EsparseError("no build.json there", where=folder, fix="give the folder of a build")
    if dtype not in (torch.float16, torch.bfloat16):
        raise EsparseError(f"packed weights are fp16 or bf16, not {dtype}", fix="pass dtype=torch.float16")
    pruned = manifest.record("prune", PruneRecord)
    packable = {layer.name for layer in pruned.layers if layer.pattern == "2:4"}
    if not packable:
        patterns = sorted({layer.pattern or "dense" for layer in pruned.layers})
        raise EsparseError(
            f"no layer of this build is 2:4 (found: {', '.join(patterns)})",
            where=folder,
            fix="set prune.pattern: '2:4'",
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = load_model(build.checkpoint, dtype)
    recipe = parse_recipe(manifest.recipe, base=build.root, where=build.manifest)
    table = tuned_table() if torch.device(device).type == "cuda" else None
    sparse = packed_layers(model, packable, recipe, table, dtype)
    pack_model(model, load_file(build.permutation), sparse, device)
    model.to(device)
    if model.device.type == "cuda":
        compile_layers(model)
    return model


@torch.no_grad()
def pack_model(
    model: PreTrainedModel, permutations: dict[str, Tensor], packable: set[str], device: torch.device | str
) -> None:
    """Make one GEMM of every site of a model, in place: packed where its layers are 2:4, else dense.

    A packed GEMM of gate and up applies the activation, too, if the kernels have it.

    Args:
        model: in the original channel order, with its zeros in place.
        permutations: layer -> int64 [K] under which its weight is 2:4.
        packable: the names of the 2:4 layers. A site is packed if all its layers are.
        device: where packed layers go, one site at a time.
    """
    family = family_of(model.config)
    for index, block in enumerate(track(_blocks(model), "packing")):
        names = {path: f"{family.blocks}.{index}.{path}" for site in family.sites for path in site.linears}
        orders = {path: permutations[name] for path, name in names.items() if name in permutations}
        _fold(model, family, block, orders)
        for site in family.sites:
            layers = [linear(block, path) for path in site.linears]
            packed = None
            if all(names[path] in packable for path in site.linears):
                order, activation = orders.get(site.linears[0]), _activation(block, site)
                packed = _packed(layers, order, activation, site.name, device)
            _replace(block, site, packed or _concatenated(layers))


@torch.no_grad()
def merge(model: PreTrainedModel) -> None:
    """Make one GEMM of dense layers that read the same tensor, in place: the packed model's fair peer."""
    for block in _blocks(model):
        for site in family_of(model.config).sites:
            _replace(block, site, _concatenated([linear(block, path) for path in site.linears]))


def _blocks(model: PreTrainedModel) -> nn.ModuleList:
    blocks = model.get_submodule(family_of(model.config).blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def _activation(block: nn.Module, site: Site) -> str | None:
    """The kernels' name of what a site applies to gate and up, found by its values; None if they lack it."""
    if site.activation is None or linear(block, site.linears[0]).out_features % 8:
        return None
    module, probe = block.get_submodule(site.activation), torch.linspace(-8, 8, 257, dtype=torch.float64)
    for name in filter(None, ACTIVATIONS):
        if torch.allclose(module(probe), gated(name, probe), rtol=0, atol=1e-6):
            return name
    return None


def _packed(
    layers: Sequence[nn.Linear],
    order: Tensor | None,
    activation: str | None,
    name: str,
    device: torch.device | str,
) -> SparseLinear | None:
    """The layers as one packed GEMM, if the layout holds it."""
    weight = _joined([layer.weight.data for layer in layers], activation).to(device)
    if order is not None:
        weight = weight[:, order.to(device)]
    if reason := why_not(weight):
        note(f"{name} stays dense: {reason}")
        return None
    biases: list[Tensor] = [layer.bias.data for layer in layers if layer.bias is not None]
    bias = _joined(biases, activation) if biases else None
    return SparseLinear.pack(weight, bias, order, activation, name=name).to(device)


def _joined(parts: Sequence[Tensor], activation: str | None) -> Tensor:
    """Weights or biases of the layers of one packed GEMM."""
    return interleave(*parts) if activation else torch.cat(list(parts))


def _concatenated(layers: Sequence[nn.Linear]) -> nn.Linear:
    """The layers as one dense GEMM."""
    if len(layers) == 1:
        return layers[0]
    biased = layers[0].bias is not None
    merged = nn.Linear(layers[0].in_features, 1, bias=biased, device="meta")
    merged.out_features = sum(layer.out_features for layer in layers)
    merged.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    if biased:
        merged.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    return merged


def _replace(block: nn.Module, site: Site, gemm: nn.Module) -> None:
    """Put one GEMM in the place of a site's layers."""
    if isinstance(gemm, SparseLinear) and gemm.activation:
        path = site.linears[0].rpartition(".")[0]
        block.set_submodule(path, GatedMlp(gemm, block.get_submodule(f"{path}.down_proj")))
        return
    if len(site.linears) == 1:
        block.set_submodule(site.linears[0], gemm)
        return
    members = Merged(gemm, [linear(block, path).out_features for path in site.linears]).members()
    for path, member in zip(site.linears, members, strict=True):
        block.set_submodule(path, member)


# --- permutations that cost nothing ----------------------------------------------------------------------


def _fold(model: PreTrainedModel, family: Family, block: nn.Module, orders: dict[str, Tensor]) -> None:
    """Move the permutations of `o` and `down` into the rows of the layers that make their inputs.

    What is folded leaves `orders` empty for that layer and gets its columns permuted here. The rest is
    written in its reader's order where it is made (`runtime.fuse`), or read through the kernel's permutation.
    """
    for before, site in zip(family.sites, family.sites[1:], strict=False):
        path = site.linears[0]
        if site.reads == "residual" or path not in orders:
            continue
        order = orders[path]
        if site.reads == "mlp":
            sources = {source: order for source in before.linears}
        else:
            rows = _value_rows(order, *heads_of(model.config, family))
            if rows is None or len(before.linears) != 3:
                continue
            sources = {before.linears[2]: rows}
        for source, rows in sources.items():
            layer = linear(block, source)
            layer.weight.copy_(layer.weight[rows])
            if layer.bias is not None:
                layer.bias.copy_(layer.bias[rows])
        layer = linear(block, path)
        layer.weight.copy_(layer.weight[:, order])
        del orders[path]


def _value_rows(order: Tensor, heads: int, kv_heads: int) -> Tensor | None:
    """The order of v's rows that gives attention outputs in `order`; None if no such order exists.

    Args:
        order: int64 [heads · head_dim].

    Returns:
        int64 [kv_heads · head_dim], if `order` maps every head to itself, all heads of a KV head alike.
    """
    size = len(order) // heads
    inside = order.view(heads, size) - torch.arange(heads)[:, None] * size
    by_kv_head = inside.view(kv_heads, heads // kv_heads, size)
    alike = (by_kv_head == by_kv_head[:, :1]).all() and inside.min() >= 0 and inside.max() < size
    if not alike:
        return None
    return (by_kv_head[:, 0] + torch.arange(kv_heads)[:, None] * size).flatten()
