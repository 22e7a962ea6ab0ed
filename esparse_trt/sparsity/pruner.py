"""The core of one-shot pruning: decoder blocks in turn, each seeing what the pruned ones before it put out.

All sites of a block are pruned by what they read in the dense block. Only where they are to make up for what
is lost before them (see `correct`) are they pruned in turn too, each by what it reads behind the others. Then
the block may be trained (see `recover`), and its outputs become the inputs of the next block. Nothing is
written to disk here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from esparse_trt.records import LayerChoice, LayerRecord
from esparse_trt.sections import PruneSection
from esparse_trt.sparsity import calibrate, correct, permute
from esparse_trt.sparsity.blockwise import BlockwiseModel
from esparse_trt.sparsity.effect import effects
from esparse_trt.sparsity.layers import PlannedSite, plan_layers
from esparse_trt.sparsity.models import linear
from esparse_trt.sparsity.pattern import Pattern
from esparse_trt.sparsity.permute import Choice
from esparse_trt.sparsity.pruned import Pruned
from esparse_trt.sparsity.recover import recover_block
from esparse_trt.sparsity.score import (
    ChannelStatistics,
    needs_hessian,
    needs_information,
    needs_statistics,
)
from esparse_trt.sparsity.site import SitePruner, reads_residual
from esparse_trt.sparsity.tokens import Weighting, weight_tokens

_SHARED_ROWS = 1 << 15  # rows of scores, over all layers, on which the shared permutation is chosen


class Pruner:
    """Prunes a model step by step: `for i in range(pruner.steps): pruner.step(i)`.

    `choice` says which sites a budget keeps dense, or prunes to another pattern.

    Attributes:
        model: the model; its hidden states are those that the next step reads.
        steps: number of decoder blocks, plus one if the head is pruned.
        updated: whether kept weights are re-fitted or trained.
        calibrated: whether anything needs the calibration text; the score magnitude alone does not.
        shared: the residual stream's permutations under `residual: shared`, from `choose_shared`.
        windows: the calibration text.
        weighting: how much its tokens count for the sites in the blocks, found once when it is asked for.
    """

    def __init__(
        self,
        model: BlockwiseModel,
        windows: Tensor,
        section: PruneSection,
        batch_size: int,
        choice: LayerChoice | None = None,
    ) -> None:
        self.model = model
        self.section = section
        self.pattern = Pattern.parse(section.pattern)
        sites = [(name, site) for site in (choice.sites if choice else []) for name in site.layers]
        self.plan = plan_layers(
            model,
            self.pattern,
            section.layers,
            dense={name: site.reason or "" for name, site in sites if site.pattern is None},
            patterns={name: Pattern.parse(site.pattern) for name, site in sites if site.pattern},
        )
        self.steps = model.blocks + (self.plan.head is not None)
        self.shared: Choice | None = None
        self._sites = SitePruner(model, section)
        self._refit = section.update.method == "obs"
        self.updated = self._refit or section.recover is not None
        self._recover = section.recover if section.recover and section.recover.steps else None
        self._correct = section.corrects
        self.calibrated = needs_statistics(section.score) or self.updated
        self._hessian = needs_hessian(section.score) or self._refit or section.refine is not None
        self._collect = partial(
            calibrate.collect,
            bins=section.score.bins if needs_information(section.score) else None,
            measure=section.score.information,
            hessian=self._hessian,
        )
        self.windows = windows
        self._batch_size = batch_size
        self.weighting = cache(self._weigh)
        self._profiled = {0, model.blocks // 2, model.blocks - 1}
        self.restart()

    @property
    def needs_shared(self) -> bool:
        """Whether `shared` has to be set before the first step."""
        return self.section.permute.residual == "shared" and self.shared is None

    def like(self, section: PruneSection | None = None, choice: LayerChoice | None = None) -> Pruner:
        """One that prunes this model on this text otherwise, all of it or what a budget chose."""
        other = Pruner(self.model, self.windows, section or self.section, self._batch_size, choice)
        other.weighting = self.weighting
        return other

    def _weigh(self) -> Weighting:
        if self.section.tokens == "equal" or not self.calibrated:
            return Weighting({}, {})
        pruned = [site for block in self.plan.blocks for site in block if site.pruned]
        layers = {site.name: [layer.name for layer in site.pruned] for site in pruned}
        return weight_tokens(self.model, layers, self.windows)

    def restart(self) -> None:
        """Go back to the first block: its inputs are the embedded calibration text."""
        if self.calibrated:
            self.model.embed(self.windows, self._batch_size, follow_dense=self.section.follows_dense)

    @torch.no_grad()
    def choose_shared(self) -> Choice:
        """One permutation for the whole residual stream, from a pass of the dense model over all blocks.

        Chosen on the stacked scores of every pruned layer that reads the stream; where those have more than
        32768 rows in all, on every r-th row of each, so that memory is bounded.
        """
        sites = [site for block in self.plan.blocks for site in block if reads_residual(site) and site.pruned]
        rows = sum(layer.shape[0] for site in sites for layer in site.pruned)
        stride = -(-rows // _SHARED_ROWS)
        samples = []
        for index in range(self.model.blocks):
            with self.model.resident(index):
                mine = [site for site in sites if site.block == index]
                statistics = self._statistics(mine, index)
                for site in mine:
                    for scores in self._sites.scores(site, statistics.get(site.name)).values():
                        wanted = self._sites.wanted(scores[::stride])
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
        with self.model.resident(index):
            dense = self._dense_weights(index)
            result = self._prune_block(index, dense)
            if self.model.dense is not None:
                with self.model.with_weights(dense):
                    self.model.advance(index, self.model.dense)
            if self._recover and result.masks:
                result.add(recover_block(self.model, index, result, self._recover))
            self._advance(index)
        return result

    def dense_layers(self) -> list[LayerRecord]:
        """Records of the layers outside the blocks that stay dense."""
        return [
            self._sites.record(site, layer, self.model.stored(f"{layer.name}.weight"))
            for site in self.plan.outside
            for layer in site.layers
        ]

    def _prune_block(self, index: int, dense: dict[str, Tensor]) -> Pruned:
        sites = self.plan.blocks[index]
        writers = [site.name for site in sites if not reads_residual(site)]
        if not self._refit or not self._correct or not correct.adds_up(self.model, index, writers):
            writers = []
        pruned = [layer.name for site in sites for layer in site.pruned]
        rows = effects(self.model, index, pruned) if self.section.weighs_rows else {}
        ordinary = correct.ordinary_tokens(self.model, index) if self._correct else None
        result = Pruned()
        for together in [[site] for site in sites] if self._correct else [sites]:
            statistics = self._statistics([site for site in together if site.pruned], index)
            for site in together:
                missing = None
                if ordinary is not None and site.pruned:
                    counts = ordinary.float() * self.weighting().tokens.get(site.name, 1)
                    missing = correct.missing(self.model, index, site, writers, dense, counts)
                found = self._sites.prune(
                    site,
                    statistics.get(site.name),
                    missing=missing,
                    effects=rows,
                    shared=self.shared,
                    profile=index in self._profiled,
                )
                result.add(found)
        return result

    def _prune_head(self) -> Pruned:
        site = self.plan.head
        assert site is not None
        with self.model.loaded_linear(site.name) as head:
            statistics = {}
            if self.calibrated:
                readers: dict[str, nn.Linear] = {site.name: head}
                statistics = self._collect(readers, lambda: self.model.run_final(head))
            return self._sites.prune(site, statistics.get(site.name), shared=self.shared, profile=True)

    def _dense_weights(self, index: int) -> dict[str, Tensor]:
        """Copies of the weights of a resident block's layers, where the dense model is followed."""
        if self.model.dense is None:
            return {}
        names = [layer.name for site in self.plan.blocks[index] for layer in site.layers]
        return {name: linear(self.model.model, name).weight.detach().clone() for name in names}

    def _statistics(self, sites: Iterable[PlannedSite], index: int) -> dict[str, ChannelStatistics]:
        layers = {site.name: [layer.name for layer in site.pruned] for site in sites}
        if not self.calibrated or not layers:
            return {}
        readers = {site: linear(self.model.model, site) for site in layers}
        last = next(iter(readers)) if len(readers) == 1 else None
        weights, scales = self.weighting()
        found = self._collect(readers, lambda: self.model.run(index, last), weights=weights)
        for site in weights.keys() & found.keys():
            scale = torch.cat([scales[name] for name in layers[site]])
            found[site] = replace(found[site], scale=scale.to(self.model.device, torch.float32))
        return found

    def _advance(self, index: int) -> None:
        if self.model.hidden is not None and index + 1 < self.steps:  # nobody reads what the last puts out
            self.model.advance(index, self.model.hidden)
