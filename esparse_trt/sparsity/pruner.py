"""The core of one-shot pruning: decoder blocks in turn, each seeing what the pruned ones before it put out.

For every site of a block, the dense weights are scored on the inputs that the block really receives, a
permutation is chosen, and the best N:M mask under it becomes zeros in the weights; then the pruned block's
outputs become the inputs of the next block. Nothing is written to disk here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from esparse_trt.records import ChannelProfile, KeptScore, LayerRecord
from esparse_trt.sections import PruneSection
from esparse_trt.sparsity import calibrate, permute
from esparse_trt.sparsity.blockwise import BlockwiseModel
from esparse_trt.sparsity.layers import Layer, PlannedSite, plan_layers
from esparse_trt.sparsity.models import heads_of, linear
from esparse_trt.sparsity.pattern import Pattern, kept_score, nm_mask
from esparse_trt.sparsity.permutation import identity, inverse, is_identity
from esparse_trt.sparsity.permute import Choice
from esparse_trt.sparsity.score import ChannelStatistics, needs_entropy, needs_statistics, score

_SHARED_ROWS = 1 << 15  # rows of scores, over all layers, on which the shared permutation is chosen
_PROFILE_CHANNELS = 512


@dataclass(frozen=True)
class Pruned:
    """What was decided: for one step (a block, or the head), or for a whole model.

    Attributes:
        masks: layer -> bool [N, K] in host memory, True where the weight is kept; original channel order.
        permutations: layer -> int64 [K] in host memory; layers that are not permuted are absent.
        layers: a record for every linear layer, dense ones too.
        channels: profiles for the report, of the first, middle and last block and of the head.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    permutations: dict[str, Tensor] = field(default_factory=dict)
    layers: list[LayerRecord] = field(default_factory=list)
    channels: list[ChannelProfile] = field(default_factory=list)

    def add(self, other: Pruned) -> None:
        """Take in what another step decided."""
        self.masks.update(other.masks)
        self.permutations.update(other.permutations)
        self.layers.extend(other.layers)
        self.channels.extend(other.channels)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Zero the pruned weights of the dense model, in place."""
        for name, mask in self.masks.items():
            weight = linear(model, name).weight
            weight.mul_(mask.to(weight.device))


class Pruner:
    """Prunes a model step by step: `for i in range(pruner.steps): pruner.step(i)`.

    Attributes:
        model: the model; its hidden states are those that the next step reads.
        steps: number of decoder blocks, plus one if the head is pruned.
        calibrated: whether the score needs the calibration text at all; magnitude does not.
        shared: the residual stream's permutations under `residual: shared`, from `choose_shared`.
    """

    def __init__(
        self, model: BlockwiseModel, windows: Tensor, section: PruneSection, batch_size: int
    ) -> None:
        self.model = model
        self.section = section
        self.pattern = Pattern.parse(section.pattern)
        self.plan = plan_layers(model, self.pattern, section.layers)
        self.steps = model.blocks + (self.plan.head is not None)
        self.shared: Choice | None = None
        self.calibrated = needs_statistics(section.score)
        self._bins = section.score.bins if needs_entropy(section.score) else None
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
            self.model.embed(self._windows, self._batch_size)

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
                        samples.append(scores[::stride].to("cpu", copy=True))  # lets go of the rest
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
            statistics = self._statistics([site for site in sites if site.pruned], index)
            result = self._prune_sites(sites, statistics, profile=index in self._profiled)
            self._advance(index)
        return result

    def dense_layers(self) -> list[LayerRecord]:
        """Records of the layers outside the blocks that stay dense."""
        return [
            self._record(site, layer, self.model.stored(f"{layer.name}.weight"), None, permuted=False)
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
                statistics = calibrate.collect(readers, lambda: self.model.run_final(head), bins=self._bins)
            return self._prune_sites((site,), statistics, profile=True)

    def _statistics(self, sites: Iterable[PlannedSite], index: int) -> dict[str, ChannelStatistics]:
        readers = {site.name: linear(self.model.model, site.name) for site in sites}
        if not self.calibrated or not readers:
            return {}
        return calibrate.collect(readers, lambda: self.model.run(index), bins=self._bins)

    def _advance(self, index: int) -> None:
        if self.calibrated and index + 1 < self.steps:  # nobody reads what the last step puts out
            for _ in self.model.run(index, store=True):
                pass

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
            dense = [
                self._record(site, layer, weights[layer.name], None, permuted=False) for layer in site.layers
            ]
            return Pruned(layers=dense)
        scores = self._scores(site, statistics)
        stacked = torch.cat(list(scores.values()))
        choice = self._choose(site, stacked)
        position = inverse(choice.final)
        permuted = not is_identity(choice.final)
        result = Pruned()
        for layer in site.layers:
            if permuted:  # all layers that read the tensor carry its permutation, dense ones too
                result.permutations[layer.name] = choice.final.cpu().clone()
            kept = None
            if layer.reason is None:
                own = scores[layer.name]
                mask = nm_mask(own[:, choice.final], self.pattern)[:, position]
                weights[layer.name].mul_(mask)
                result.masks[layer.name] = mask.cpu()
                own = permute.objective(own, self.section.permute)
                kept = KeptScore(
                    natural=kept_score(own, self.pattern),
                    global_=kept_score(own[:, choice.global_], self.pattern),
                    final=kept_score(own[:, choice.final], self.pattern),
                )
            result.layers.append(self._record(site, layer, weights[layer.name], kept, permuted=permuted))
        if profile:
            result.channels.append(_profile(site, stacked, statistics, position))
        return result

    def _record(
        self, site: PlannedSite, layer: Layer, weight: Tensor, kept: KeptScore | None, *, permuted: bool
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


def _profile(
    site: PlannedSite, stacked: Tensor, statistics: ChannelStatistics | None, position: Tensor
) -> ChannelProfile:
    count = min(site.channels, _PROFILE_CHANNELS)
    channels = torch.arange(count, device=stacked.device) * site.channels // count
    entropy = statistics.entropy if statistics else None
    return ChannelProfile(
        site=site.name,
        channels=channels.tolist(),
        entropy=None if entropy is None else entropy[channels].tolist(),
        score=stacked.mean(0, dtype=torch.float64)[channels].tolist(),
        position=position[channels].tolist(),
    )
