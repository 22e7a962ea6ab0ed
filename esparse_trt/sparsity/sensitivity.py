"""What pruning a site costs: the rise of the mean negative log-likelihood when its layers alone are pruned.

The text is a part of the calibration text, and everything else is dense. `budget` decides by it; what became
of it on another text is measured by `verify`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import groupby

import torch
from torch import Tensor

from esparse_trt.model import load_model
from esparse_trt.progress import track
from esparse_trt.records import LayerRecord, SiteCost
from esparse_trt.sparsity.blockwise import BlockwiseModel
from esparse_trt.sparsity.models import linear
from esparse_trt.sparsity.pruned import Pruned


def pruned_sites(layers: Sequence[LayerRecord]) -> list[list[LayerRecord]]:
    """The pruned layers, by the tensor that they read."""
    pruned = [layer for layer in layers if layer.pattern]
    return [list(group) for _, group in groupby(pruned, key=lambda layer: (layer.block, layer.site))]


class Sensitivity:
    """The dense model, and what pruning parts of it does to its loss on windows [samples, length]."""

    def __init__(self, model: BlockwiseModel, windows: Tensor) -> None:
        self.whole = load_model(
            model.path, model.dtype, model.device, trust_remote_code=model.trust_remote_code
        )
        self.batches = windows.to(model.device).split(model.batch_size)
        self.dense = self.loss()

    @torch.no_grad()
    def loss(self) -> float:
        """Mean negative log-likelihood, nats."""
        whole = self.whole
        losses = [
            float(whole(input_ids=ids, labels=ids, use_cache=False).loss) * len(ids) for ids in self.batches
        ]
        return sum(losses) / sum(map(len, self.batches))

    def costs(self, pruned: Pruned, only: Collection[str] | None = None) -> list[SiteCost]:
        """The cost of every site alone, or of those whose first layers are named."""
        sites = [site for site in pruned_sites(pruned.layers) if only is None or site[0].name in only]
        return [self._cost(site, pruned) for site in track(sites, "sensitivity", unit="site")]

    def total(self, pruned: Pruned) -> float:
        """The cost of all sites together."""
        return self._rise(list(pruned.masks), pruned)

    def _cost(self, site: Sequence[LayerRecord], pruned: Pruned) -> SiteCost:
        sizes = {layer.name: layer.shape[0] * layer.shape[1] for layer in site}
        kept = sum(sizes[layer.name] * layer.kept.final for layer in site if layer.kept)
        return SiteCost(
            site=site[0].name,
            layers=list(sizes),
            parameters=sum(sizes.values()),
            kept=kept / sum(sizes.values()),
            nats=self._rise(list(sizes), pruned),
            pattern=site[0].pattern,
        )

    @torch.no_grad()
    def _rise(self, names: Sequence[str], pruned: Pruned) -> float:
        """What pruning these layers adds to the loss; the model is dense again afterwards."""
        weights = {name: linear(self.whole, name).weight for name in names}
        before = {name: weight.to("cpu", copy=True) for name, weight in weights.items()}
        Pruned(
            masks={name: pruned.masks[name] for name in names},
            values={name: pruned.values[name] for name in names if name in pruned.values},
        ).apply(self.whole)
        rise = self.loss() - self.dense
        for name, weight in weights.items():
            weight.copy_(before[name])
        return rise
