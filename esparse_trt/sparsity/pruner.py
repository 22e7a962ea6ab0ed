"""The core of one-shot pruning: decoder blocks in turn, each seeing what the pruned ones before it put out.

For every site of a block, the dense weights are scored on the inputs that the block really receives, a
permutation is chosen, and the best N:M mask under it becomes zeros in the weights, the rest of which may be
re-fitted (see `update`); then the pruned block's outputs become the inputs of the next block. Nothing is
written to disk here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from esparse_trt.records import ChannelProfile, KeptScore, LayerRecord, SiteCost, UpdateRecord
from esparse_trt.sections import PruneSection
from esparse_trt.sparsity import calibrate, permute
from esparse_trt.sparsity.blockwise import BlockwiseModel
from esparse_trt.sparsity.hessian import corrected
from esparse_trt.sparsity.layers import Layer, PlannedSite, plan_layers
from esparse_trt.sparsity.models import heads_of, linear
from esparse_trt.sparsity.pattern import Pattern, kept_score, nm_mask
from esparse_trt.sparsity.permutation import identity, inverse, is_identity
from esparse_trt.sparsity.permute import Choice
from esparse_trt.sparsity.pruned import Pruned
from esparse_trt.sparsity.recover import recover_block
from esparse_trt.sparsity.score import (
    ChannelStatistics,
    error,
    needs_hessian,
    needs_information,
    needs_statistics,
    score,
)
from esparse_trt.sparsity.update import update

_SHARED_ROWS = 1 << 15  # rows of scores, over all layers, on which the shared permutation is chosen
_PROFILE_CHANNELS = 512


class Pruner:
    """Prunes a model step by step: `for i in range(pruner.steps): pruner.step(i)`.

    `costs` are those of the sites, some of which a budget keeps dense.

    Attributes:
        model: the model; its hidden states are those that the next step reads.
        steps: number of decoder blocks, plus one if the head is pruned.
        updated: whether kept weights are re-fitted or trained.
        calibrated: whether anything needs the calibration text; the score magnitude alone does not.
        shared: the residual stream's permutations under `residual: shared`, from `choose_shared`.
    """

    def __init__(
        self,
        model: BlockwiseModel,
        windows: Tensor,
        section: PruneSection,
        batch_size: int,
        costs: Sequence[SiteCost] = (),
    ) -> None:
        self.model = model
        self.section = section
        self.pattern = Pattern.parse(section.pattern)
        dense = {
            name: f"prune.budget: its site costs {cost.nats:.4f} nats"
            for cost in costs
            if cost.dense
            for name in cost.layers
        }
        self.plan = plan_layers(model, self.pattern, section.layers, dense)
        self.steps = model.blocks + (self.plan.head is not None)
        self.shared: Choice | None = None
        self._refit = section.update.method == "obs"
        self.updated = section.update.method == "obs" or section.recover is not None
        self._recover = section.recover if section.recover and section.recover.steps else None
        self._correct = self._refit and section.update.correct > 0
        self.calibrated = needs_statistics(section.score) or self.updated
        self._collect = partial(
            calibrate.collect,
            bins=section.score.bins if needs_information(section.score) else None,
            measure=section.score.information,
            hessian=needs_hessian(section.score) or self._refit,
        )
        self._windows = windows
        self._batch_size = batch_size
        self._profiled = {0, model.blocks // 2, model.blocks - 1}
        self.restart()

    @property
    def needs_shared(self) -> bool:
        """Whether `shared` has to be set before the first step."""
        return self.section.permute.residual == "shared" and self.shared is None

    def restart(self) -> None:
        """Go back to the first block: its inputs are the embedded calibration text."""
        if self.calibrated:
            self.model.embed(self._windows, self._batch_size, follow_dense=self.section.follows_dense)

    @torch.no_grad()
    def choose_shared(self) -> Choice:
        """One permutation for the whole residual stream, from a pass of the dense model over all blocks.

        Chosen on the stacked scores of every pruned layer that reads the stream; where those have more than
        32768 rows in all, on every r-th row of each, so that memory is bounded.
        """
        sites = [
            site for block in self.plan.blocks for site in block if _reads_residual(site) and site.pruned
        ]
        rows = sum(layer.shape[0] for site in sites for layer in site.pruned)
        stride = -(-rows // _SHARED_ROWS)
        samples = []
        for index in range(self.model.blocks):
            with self.model.resident(index):
                mine = [site for site in sites if site.block == index]
                statistics = self._statistics(mine, index)
                for site in mine:
                    for scores in self._scores(site, statistics.get(site.name)).values():
                        wanted = self._wanted(scores[::stride])
                        samples.append(wanted.to("cpu", copy=True))  # lets go of the rest
                self._advance(index)
        self.restart()
        stacked = torch.cat(samples).to(self.model.device)
        choice = permute.choose(stacked.unsqueeze(0), self.pattern, self.section.permute)
        return Choice(choice.global_[0], choice.final[0])

    def step(self, index: int) -> Pruned:
        """Prune the block (after the last block: the head) and move `model.hidden` on past it."""
        if index == self.model.blocks:
            return self._prune_head()
        sites = self.plan.blocks[index]
        with self.model.resident(index):
            pruned = [site for site in sites if site.pruned]
            statistics = self._statistics(pruned, index)
            if self._correct and index:  # nothing is pruned before the first block
                self._compare(statistics, index)
            if self.model.dense is not None:
                self.model.advance(index, self.model.dense)
            result = self._prune_sites(sites, statistics, profile=index in self._profiled)
            if self._recover and result.masks:
                result.add(recover_block(self.model, index, result, self._recover))
            self._advance(index)
        return result

    def dense_layers(self) -> list[LayerRecord]:
        """Records of the layers outside the blocks that stay dense."""
        return [
            self._record(site, layer, self.model.stored(f"{layer.name}.weight"))
            for site in self.plan.outside
            for layer in site.layers
        ]

    def _prune_head(self) -> Pruned:
        site = self.plan.head
        assert site is not None
        with self.model.loaded_linear(site.name) as head:
            statistics = {}
            if self.calibrated:
                readers: dict[str, nn.Linear] = {site.name: head}
                statistics = self._collect(readers, lambda: self.model.run_final(head))
            return self._prune_sites((site,), statistics, profile=True)

    def _statistics(self, sites: Iterable[PlannedSite], index: int) -> dict[str, ChannelStatistics]:
        readers = {site.name: linear(self.model.model, site.name) for site in sites}
        if not self.calibrated or not readers:
            return {}
        return self._collect(readers, lambda: self.model.run(index))

    def _compare(self, statistics: dict[str, ChannelStatistics], index: int) -> None:
        """Add to the statistics of the block's sites how their inputs differ from the dense model's."""
        readers = {name: linear(self.model.model, name) for name in statistics}
        products = calibrate.cross_products(readers, lambda: self.model.run_pairs(index))
        for name, cross in products.items():
            statistics[name] = replace(statistics[name], cross=cross)

    def _advance(self, index: int) -> None:
        if self.model.hidden is not None and index + 1 < self.steps:  # nobody reads what the last puts out
            self.model.advance(index, self.model.hidden)

    def _scores(self, site: PlannedSite, statistics: ChannelStatistics | None) -> dict[str, Tensor]:
        return {
            layer.name: score(linear(self.model.model, layer.name).weight, statistics, self.section.score)
            for layer in site.pruned
        }

    @torch.no_grad()
    def _prune_sites(
        self, sites: Iterable[PlannedSite], statistics: dict[str, ChannelStatistics], *, profile: bool
    ) -> Pruned:
        result = Pruned()
        for site in sites:
            result.add(self._prune_site(site, statistics.get(site.name), profile))
        return result

    def _prune_site(self, site: PlannedSite, statistics: ChannelStatistics | None, profile: bool) -> Pruned:
        weights = {layer.name: linear(self.model.model, layer.name).weight for layer in site.layers}
        if not site.pruned:
            return Pruned(layers=[self._record(site, layer, weights[layer.name]) for layer in site.layers])
        scores = self._scores(site, statistics)
        stacked = torch.cat(list(scores.values()))
        choice = self._choose(site, self._wanted(stacked))
        permuted = not is_identity(choice.final)
        masks, fitted, record = self._decide(site, stacked, choice.final, statistics)
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
                kept = self._kept(self._wanted(scores[layer.name]), choice)
            result.layers.append(self._record(site, layer, weight, kept, permuted, record))
        if profile:
            entropic = self.section.score.information == "entropy"
            entropy = statistics.information if statistics and entropic else None
            result.channels.append(_profile(site, stacked, entropy, inverse(choice.final)))
        return result

    def _decide(
        self, site: PlannedSite, scores: Tensor, order: Tensor, statistics: ChannelStatistics | None
    ) -> tuple[list[Tensor], list[Tensor], UpdateRecord | None]:
        """Masks of the site's pruned layers and, where they are re-fitted, their weights; original order.

        Args:
            scores: [N, K], of all these layers.
        """
        section, back = self.section.update, inverse(order)
        rows = [layer.shape[0] for layer in site.pruned]
        mask = None
        if not self._refit or section.mask == "fixed":
            mask = nm_mask(scores[:, order], self.pattern)
        if not self._refit:
            assert mask is not None
            return list(mask[:, back].split(rows)), [], None
        assert statistics is not None and statistics.hessian is not None
        hessian, cross = statistics.hessian, statistics.cross
        weights = torch.cat([linear(self.model.model, layer.name).weight for layer in site.pruned])
        if cross is not None:
            weights = corrected(weights, hessian, cross, section.correct, section.damping, site.name)
        fitted = update(
            weights[:, order],
            hessian[order][:, order],
            mask,
            self.pattern,
            section,
            where=site.name,
        )
        return list(fitted.mask[:, back].split(rows)), list(fitted.weight[:, back].split(rows)), fitted.record

    def _wanted(self, scores: Tensor) -> Tensor:
        """What a permutation is to keep of the scores, elementwise."""
        return error(scores, self.section.score) if self.section.permute.objective == "error" else scores

    def _kept(self, wanted: Tensor, choice: Choice) -> KeptScore:
        return KeptScore(
            natural=kept_score(wanted, self.pattern),
            global_=kept_score(wanted[:, choice.global_], self.pattern),
            final=kept_score(wanted[:, choice.final], self.pattern),
        )

    def _record(
        self,
        site: PlannedSite,
        layer: Layer,
        weight: Tensor,
        kept: KeptScore | None = None,
        permuted: bool = False,
        update: UpdateRecord | None = None,
    ) -> LayerRecord:
        return LayerRecord(
            name=layer.name,
            site=site.site.name,
            block=site.block,
            shape=layer.shape,
            pattern=None if layer.reason else str(self.pattern),
            reason=layer.reason,
            permuted=permuted,
            sparsity=1 - int(weight.count_nonzero()) / weight.numel(),
            kept=kept,
            update=update if layer.reason is None else None,
        )

    def _choose(self, site: PlannedSite, stacked: Tensor) -> Choice:
        """The site's permutations [K], of all that DESIGN section 5 allows it."""
        section = self.section.permute
        if _reads_residual(site) and section.residual != "gather":
            # The head of a model that projects its stream first (OPT-350m) reads channels of its own.
            if self.shared is not None and len(self.shared.final) == site.channels:
                return Choice(*(p.to(stacked.device) for p in self.shared))
            unchanged = identity(site.channels, stacked.device)
            return Choice(unchanged, unchanged)
        if site.site.reads == "attention":
            heads, kv_heads = heads_of(self.model.config, self.model.family)
            return permute.choose_heads(stacked, self.pattern, section, heads=heads, kv_heads=kv_heads)
        choice = permute.choose(stacked.unsqueeze(0), self.pattern, section)
        return Choice(choice.global_[0], choice.final[0])


def _reads_residual(site: PlannedSite) -> bool:
    return site.site.reads == "residual"


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
