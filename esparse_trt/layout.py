"""What a model consists of, read from its configuration alone: no weight is loaded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from esparse_trt import gguf
from esparse_trt.graph import es24
from esparse_trt.model import download, load_config
from esparse_trt.records import Reason, StaysDense
from esparse_trt.sections import LayerSelection, ModelSection, PruneSection
from esparse_trt.sparsity.models import family_of

Shape = tuple[int, int]  # [N, K]
PATTERN = "2:4"  # the only one that has kernels


@dataclass(frozen=True)
class Gemm:
    """A matrix product of the model: linear layers of one module that read the same tensor.

    Attributes:
        site: qkv, o, gate_up, down ..., or the head's path.
        layers: module names, in the order of their rows.
        shape: [N, K] of all together.
        bias: whether they have one.
        stays: why it cannot be packed; None: it can.
    """

    site: str
    layers: tuple[str, ...]
    shape: Shape
    bias: bool
    stays: StaysDense | None = None

    @property
    def name(self) -> str:
        """The modules' common parent and their own names: `model.layers.0.mlp.gate_proj+up_proj`."""
        first, *others = self.layers
        return "+".join([first, *(layer.rpartition(".")[2] for layer in others)])

    @property
    def parameters(self) -> int:
        """Weights, without biases."""
        return self.shape[0] * self.shape[1]

    @property
    def packed_bytes(self) -> int:
        """Bytes of values and metadata."""
        return es24.packed_bytes(*self.shape)


def read_config(section: ModelSection) -> PretrainedConfig:
    """The configuration of a supported model; of a hub model only config.json is downloaded, if it must be.

    Raises:
        EsparseError: it cannot be read, or its family is not supported.
    """
    if section.path is not None and section.path.suffix == ".gguf":
        config = gguf.read_config(section.path)
    else:
        path = section.path or download(section, ["config.json"])
        config = load_config(path, trust_remote_code=section.trust_remote_code)
    family_of(config)
    return config


def empty_model(config: PretrainedConfig) -> nn.Module:
    """The modules, without memory for weights."""
    loader: Any = AutoModelForCausalLM
    with torch.device("meta"):
        return loader.from_config(config)


def selected_linears(model: nn.Module, selection: LayerSelection) -> dict[str, nn.Linear]:
    """The linear layers that the globs select."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(fnmatchcase(name, glob) for glob in selection.include)
        and not any(fnmatchcase(name, glob) for glob in selection.exclude)
    }


def gemms(config: PretrainedConfig, model: nn.Module, prune: PruneSection, dtype: str) -> list[Gemm]:
    """Every linear layer of the model, in the GEMMs that the pack stage makes, in model order.

    Args:
        config: of the model.
        model: its modules, with or without weights.
        prune: of the recipe: what is pruned, and how.
        dtype: of the exported weights.
    """
    selected = selected_linears(model, prune.layers)
    family = family_of(config)
    sites = {linear: site.name for site in family.sites for linear in site.linears}
    shared = _shared_weights(model)
    groups: dict[tuple[Any, ...], list[tuple[str, nn.Linear]]] = defaultdict(list)
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        site = next((site for end, site in sites.items() if name.endswith(f".{end}")), name)
        stays = _why_dense(linear, name in selected, id(linear.weight) in shared, prune.pattern, dtype)
        key = (site, name.rpartition(".")[0], linear.bias is not None, stays and (stays.code, stays.reason))
        groups[key].append((name, linear))
    return [
        _merged(site, members, stays and StaysDense(code=stays[0], reason=stays[1]))
        for (site, _, _, stays), members in groups.items()
    ]


def _merged(site: str, members: list[tuple[str, nn.Linear]], stays: StaysDense | None) -> Gemm:
    first = members[0][1]
    rows = sum(linear.out_features for _, linear in members)
    names = tuple(name for name, _ in members)
    return Gemm(site, names, (rows, first.in_features), first.bias is not None, stays)


def _why_dense(
    linear: nn.Linear, selected: bool, shared: bool, pattern: str, dtype: str
) -> StaysDense | None:
    """Why a layer cannot run sparse."""
    if not selected:
        return StaysDense(code=Reason.not_selected, reason="the recipe's prune.layers leaves it out")
    if shared:
        return StaysDense(code=Reason.not_plain, reason="its weight is the embedding's too")
    if pattern != PATTERN:
        return StaysDense(code=Reason.not_2_4, reason=f"{pattern} has no kernels, only {PATTERN} does")
    known = {str(kind): kind for kind in es24.DTYPES}
    if dtype not in known:
        reason = f"{es24.LAYOUT} holds {' or '.join(known)}, not {dtype}"
        return StaysDense(code=Reason.not_eligible_dtype, reason=reason)
    misfit = es24.why_not(linear.out_features, linear.in_features, known[dtype])
    return StaysDense(code=Reason.not_eligible_shape, reason=misfit) if misfit else None


def _shared_weights(model: nn.Module) -> set[int]:
    """Identities of weights that embeddings hold."""
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def by_shape(found: Iterable[Gemm]) -> dict[Shape, list[str]]:
    """[N, K] -> names of the GEMMs that have it."""
    shapes: dict[Shape, list[str]] = {}
    for gemm in found:
        shapes.setdefault(gemm.shape, []).append(gemm.name)
    return shapes
