"""Which linear layers are pruned, decided before any work begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType

from torch import nn

from esparse_trt.errors import EsparseError
from esparse_trt.sections import LayerSelection
from esparse_trt.sparsity.blockwise import BlockwiseModel
from esparse_trt.sparsity.models import Site, linear
from esparse_trt.sparsity.pattern import Pattern


@dataclass(frozen=True)
class Layer:
    """A linear layer [N, K]; `reason` says why it stays dense, None if it is pruned."""

    name: str
    shape: tuple[int, int]
    reason: str | None


@dataclass(frozen=True)
class PlannedSite:
    """A site of one block (`block` None: outside the blocks) with its layers, and what they are pruned to."""

    site: Site
    block: int | None
    layers: tuple[Layer, ...]
    pattern: Pattern

    @property
    def name(self) -> str:
        """Module name of the site's first layer."""
        return self.layers[0].name

    @property
    def channels(self) -> int:
        """K, the channels of the tensor that the site reads."""
        return self.layers[0].shape[1]

    @property
    def pruned(self) -> tuple[Layer, ...]:
        """The layers that are pruned."""
        return tuple(layer for layer in self.layers if layer.reason is None)


@dataclass(frozen=True)
class Plan:
    """Every linear layer of the model."""

    blocks: tuple[tuple[PlannedSite, ...], ...]
    head: PlannedSite | None  # None: the model has none, or it is not pruned
    outside: tuple[PlannedSite, ...]  # layers outside the blocks that stay dense


def plan_layers(
    model: BlockwiseModel,
    pattern: Pattern,
    selection: LayerSelection,
    dense: Mapping[str, str] = MappingProxyType({}),
    patterns: Mapping[str, Pattern] = MappingProxyType({}),
) -> Plan:
    """Find the model's linear layers and decide which are pruned.

    Args:
        dense: layers that are not pruned although they are selected, each with the reason.
        patterns: of the sites that are pruned to another one, by the names of their layers.

    Raises:
        EsparseError: nothing is selected, or the pattern does not divide K of a selected layer.
    """
    blocks = tuple(
        tuple(
            _plan_site(model, site, index, pattern, selection, dense, patterns) for site in model.family.sites
        )
        for index in range(model.blocks)
    )
    known = {layer.name for block in blocks for site in block for layer in site.layers}
    outside = [
        _plan_outside(model, name, module, patterns.get(name, pattern), selection, dense)
        for name, module in model.model.named_modules()
        if isinstance(module, nn.Linear) and name not in known
    ]
    head = next((site for site in outside if site.pruned), None)
    plan = Plan(blocks, head, tuple(site for site in outside if site is not head))
    pruned = [(site.pattern, layer) for site in _sites(plan) for layer in site.pruned]
    for its_pattern, layer in pruned:
        its_pattern.check(layer.shape[1], layer.name)
    if not pruned:
        raise EsparseError(
            f"include {selection.include} and exclude {selection.exclude} leave no linear layer to prune",
            where="prune.layers",
            fix=f"layers are named like {blocks[0][0].name}",
        )
    return plan


def _sites(plan: Plan) -> list[PlannedSite]:
    sites = [site for block in plan.blocks for site in block]
    return [*sites, plan.head] if plan.head else sites


def _plan_site(
    model: BlockwiseModel,
    site: Site,
    index: int,
    pattern: Pattern,
    selection: LayerSelection,
    dense: Mapping[str, str],
    patterns: Mapping[str, Pattern],
) -> PlannedSite:
    layers = []
    for path in site.linears:
        name = f"{model.block_name(index)}.{path}"
        weight = linear(model.model, name).weight
        layers.append(Layer(name, (weight.shape[0], weight.shape[1]), _reason(name, selection, dense)))
    own = next((patterns[layer.name] for layer in layers if layer.name in patterns), pattern)
    return PlannedSite(site, index, tuple(layers), own)


def _plan_outside(
    model: BlockwiseModel,
    name: str,
    module: nn.Linear,
    pattern: Pattern,
    selection: LayerSelection,
    dense: Mapping[str, str],
) -> PlannedSite:
    reason = _reason(name, selection, dense)
    if name != model.family.head:
        reason = "outside the decoder blocks"
    elif reason is None and model.config.tie_word_embeddings:
        reason = "shares its weight with the embeddings, which are never pruned"
    layer = Layer(name, (module.out_features, module.in_features), reason)
    return PlannedSite(Site(name.rpartition(".")[2], (name,), "residual"), None, (layer,), pattern)


def _reason(name: str, selection: LayerSelection, dense: Mapping[str, str]) -> str | None:
    """Why a layer is not pruned, None if it is."""
    for glob in selection.exclude:
        if fnmatchcase(name, glob):
            return f"prune.layers.exclude has {glob!r}"
    if not any(fnmatchcase(name, glob) for glob in selection.include):
        return "prune.layers.include does not match it"
    return dense.get(name)
