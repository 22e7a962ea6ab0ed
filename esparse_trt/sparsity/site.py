"""Pruning one site: the layers that read the same tensor, given statistics of what they read.

The dense weights are scored, a permutation is chosen, and the best N:M mask under it becomes zeros in the
weights, the rest of which may be corrected and re-fitted (see `correct` and `update`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from esparse_trt.records import ChannelProfile, KeptScore, LayerRecord, UpdateRecord
from esparse_trt.sections import PruneSection
from esparse_trt.sparsity import permute
from esparse_trt.sparsity.blockwise import BlockwiseModel
from esparse_trt.sparsity.correct import corrected
from esparse_trt.sparsity.layers import Layer, PlannedSite
from esparse_trt.sparsity.models import heads_of, linear
from esparse_trt.sparsity.pattern import Pattern, kept_score, nm_mask
from esparse_trt.sparsity.permutation import identity, inverse, is_identity
from esparse_trt.sparsity.permute import Choice
from esparse_trt.sparsity.pruned import Pruned
from esparse_trt.sparsity.refine import refine
from esparse_trt.sparsity.score import ChannelStatistics, error, score
from esparse_trt.sparsity.update import update

_PROFILE_CHANNELS = 512
_NONE: Mapping[str, Tensor] = MappingProxyType({})


class SitePruner:
    """How the sites of a model are pruned."""

    def __init__(self, model: BlockwiseModel, section: PruneSection) -> None:
        self.model = model
        self.section = section

    @torch.no_grad()
    def prune(
        self,
        site: PlannedSite,
        statistics: ChannelStatistics | None,
        *,
        missing: Tensor | None = None,
        effects: Mapping[str, Tensor] = _NONE,
        shared: Choice | None = None,
        profile: bool = False,
    ) -> Pruned:
        """Prune the site's layers in place.

        Args:
            site: with its weights on the device, dense.
            statistics: of what it reads; None where nothing needs them.
            missing: what its pruned layers fail to put out, see `correct`; None: nothing.
            effects: how much the outputs of its pruned layers count, see `effect`; empty: all the same.
            shared: the residual stream's permutations under `residual: shared`.
            profile: whether to keep a profile of its channels for the report.
        """
        weights = {layer.name: linear(self.model.model, layer.name).weight for layer in site.layers}
        if not site.pruned:
            return Pruned(layers=[self.record(site, layer, weights[layer.name]) for layer in site.layers])
        scores = self.scores(site, statistics)
        stacked = torch.cat(list(scores.values()))
        rows = torch.cat([effects[layer.name] for layer in site.pruned]) if effects else None
        choice = self._choose(site, stacked, statistics, missing, rows, shared)
        permuted = not is_identity(choice.final)
        masks, fitted, record = self._decide(site, stacked, choice.final, statistics, missing)
        result = Pruned()
        for layer in site.layers:
            weight, kept = weights[layer.name], None
            if permuted:  # all layers that read the tensor carry its permutation, dense ones too
                result.permutations[layer.name] = choice.final.cpu().clone()
            if layer.reason is None:
                mask = masks.pop(0)
                result.masks[layer.name] = mask.cpu()
                if fitted:
                    weight.copy_(fitted.pop(0).to(self.model.stored_dtype))  # what the checkpoint will hold
                    result.values[layer.name] = weight[mask].to("cpu", self.model.stored_dtype)
                weight.mul_(mask)
                kept = _kept(self.wanted(scores[layer.name]), choice, site.pattern)
            result.layers.append(self.record(site, layer, weight, kept, permuted, record))
        if profile:
            entropic = self.section.score.information == "entropy"
            entropy = statistics.information if statistics and entropic else None
            result.channels.append(_profile(site, stacked, entropy, inverse(choice.final)))
        return result

    def scores(self, site: PlannedSite, statistics: ChannelStatistics | None) -> dict[str, Tensor]:
        """Scores [N, K] of each pruned layer."""
        start, scores = 0, {}
        for layer in site.pruned:
            end = start + layer.shape[0]
            mine = statistics and statistics.of_rows(start, end)
            scores[layer.name] = score(linear(self.model.model, layer.name).weight, mine, self.section.score)
            start = end
        return scores

    def wanted(self, scores: Tensor) -> Tensor:
        """What a permutation is to keep of the scores, elementwise."""
        return error(scores, self.section.score) if self.section.permute.objective == "error" else scores

    def record(
        self,
        site: PlannedSite,
        layer: Layer,
        weight: Tensor,
        kept: KeptScore | None = None,
        permuted: bool = False,
        update: UpdateRecord | None = None,
    ) -> LayerRecord:
        """What the report says of a layer."""
        return LayerRecord(
            name=layer.name,
            site=site.site.name,
            block=site.block,
            shape=layer.shape,
            pattern=None if layer.reason else str(site.pattern),
            reason=layer.reason,
            permuted=permuted,
            sparsity=1 - int(weight.count_nonzero()) / weight.numel(),
            kept=kept,
            update=update if layer.reason is None else None,
        )

    def _choose(
        self,
        site: PlannedSite,
        scores: Tensor,
        statistics: ChannelStatistics | None,
        missing: Tensor | None,
        rows: Tensor | None,
        shared: Choice | None,
    ) -> Choice:
        """The site's permutations [K], of all that DESIGN section 5 allows it.

        Args:
            scores: [N, K], of all its pruned layers.
            rows: [N], how much each row counts.
        """
        section = self.section.permute
        count = scores.new_ones(len(scores), 1) if rows is None else rows.unsqueeze(1)
        wanted = self.wanted(scores) * count
        if reads_residual(site) and section.residual != "gather":
            # The head of a model that projects its stream first (OPT-350m) reads channels of its own.
            if shared is not None and len(shared.final) == site.channels:
                return Choice(*(p.to(scores.device) for p in shared))
            unchanged = identity(site.channels, scores.device)
            return Choice(unchanged, unchanged)
        if site.site.reads == "attention" and section.attention == "fold":
            heads, kv_heads = heads_of(self.model.config, self.model.family)
            return permute.choose_heads(wanted, site.pattern, section, heads=heads, kv_heads=kv_heads)
        start, final = (found[0] for found in permute.choose(wanted.unsqueeze(0), site.pattern, section))
        if (settings := self.section.refine) is not None:
            assert statistics is not None and statistics.hessian is not None
            root = count.sqrt()  # of what counts in a squared error
            weight, lacking = statistics.scaled(self._weights(site)) * root, None
            if missing is not None and self.section.update.method == "none":
                lacking = settings.correct * missing * root
            final = refine(weight, scores, statistics.hessian, lacking, final, site.pattern, settings.rounds)
        return Choice(start, final)

    def _weights(self, site: PlannedSite) -> Tensor:
        """The weights [N, K] of its pruned layers, stacked."""
        return torch.cat([linear(self.model.model, layer.name).weight for layer in site.pruned])

    def _decide(
        self,
        site: PlannedSite,
        scores: Tensor,
        order: Tensor,
        statistics: ChannelStatistics | None,
        missing: Tensor | None,
    ) -> tuple[list[Tensor], list[Tensor], UpdateRecord | None]:
        """Masks of the site's pruned layers and, where they are re-fitted, their weights; original order.

        Args:
            scores: [N, K], of all these layers.
        """
        section, back = self.section.update, inverse(order)
        rows = [layer.shape[0] for layer in site.pruned]
        mask = None
        if section.method == "none" or section.mask == "fixed":
            mask = nm_mask(scores[:, order], site.pattern)
        if section.method == "none":
            assert mask is not None
            return list(mask[:, back].split(rows)), [], None
        assert statistics is not None and statistics.hessian is not None
        hessian = statistics.hessian
        weights = self._weights(site)
        if missing is not None and section.correct:
            weights = corrected(weights, hessian, missing, section.correct, section.damping, site.name)
        weights = statistics.scaled(weights)[:, order]
        fitted = update(weights, hessian[order][:, order], mask, site.pattern, section, where=site.name)
        values = statistics.unscaled(fitted.weight[:, back])
        return list(fitted.mask[:, back].split(rows)), list(values.split(rows)), fitted.record


def reads_residual(site: PlannedSite) -> bool:
    """Whether the site reads the (normed) residual stream."""
    return site.site.reads == "residual"


def _kept(wanted: Tensor, choice: Choice, pattern: Pattern) -> KeptScore:
    return KeptScore(
        natural=kept_score(wanted, pattern),
        global_=kept_score(wanted[:, choice.global_], pattern),
        final=kept_score(wanted[:, choice.final], pattern),
    )


def _profile(site: PlannedSite, stacked: Tensor, entropy: Tensor | None, position: Tensor) -> ChannelProfile:
    count = min(site.channels, _PROFILE_CHANNELS)
    channels = torch.arange(count, device=stacked.device) * site.channels // count
    return ChannelProfile(
        site=site.name,
        channels=channels.tolist(),
        entropy=None if entropy is None else entropy[channels].tolist(),
        score=stacked.mean(0, dtype=torch.float64)[channels].tolist(),
        position=position[channels].tolist(),
    )
