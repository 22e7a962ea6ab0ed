"""Choice of layers: what pruning costs most stays dense, until a perplexity budget is met.

Sensitivity of a site: the rise of the mean negative log-likelihood when its layers alone are pruned in the
dense model. Costs do not quite add up, so their sum is scaled to the rise with everything pruned. Sites are
then left dense by descending cost per parameter until the estimate is within ln(perplexity ratio). The text
is a part of the calibration text; `verify` measures what became of it on another.
"""

from __future__ import annotations

import math
from itertools import groupby

import torch
from torch import Tensor

from esparse_trt.errors import EsparseError
from esparse_trt.model import load_model
from esparse_trt.progress import track
from esparse_trt.records import SiteCost
from esparse_trt.sections import BudgetSection
from esparse_trt.sparsity.blockwise import BlockwiseModel
from esparse_trt.sparsity.models import linear
from esparse_trt.sparsity.pruned import Pruned


def choose_layers(
    model: BlockwiseModel, pruned: Pruned, windows: Tensor, section: BudgetSection
) -> list[SiteCost]:
    """Measure what every pruned site costs, and say which of them must stay dense.

    Args:
        model: the dense model.
        pruned: masks and values of all layers, pruned as they would be without a budget.
        windows: int64 token ids [samples, length] of the calibration text.

    Raises:
        EsparseError: not even one site can be pruned within the budget.
    """
    costs, total = _measure(model, pruned, windows[: section.samples])
    dense = within_budget(costs, total, math.log(section.perplexity_ratio))
    if len(dense) == len(costs):
        raise EsparseError(
            f"pruning any site costs more than a perplexity ratio of {section.perplexity_ratio:g}",
            where="prune.budget.perplexity_ratio",
            fix="raise it, choose a pattern that keeps more, or turn on prune.update",
        )
    return [cost.model_copy(update={"dense": cost.site in dense}) for cost in costs]


def within_budget(costs: list[SiteCost], total: float, budget: float) -> set[str]:
    """Names of the sites that stay dense, so that the others are estimated to cost `budget` nats at most."""
    rest = sum(cost.nats for cost in costs)
    scale = total / rest if rest > 0 else 0.0
    dense = set()
    for cost in sorted(costs, key=lambda cost: cost.nats / cost.parameters, reverse=True):
        if scale * rest <= budget:
            break
        dense.add(cost.site)
        rest -= cost.nats
    return dense


@torch.no_grad()
def _measure(model: BlockwiseModel, pruned: Pruned, windows: Tensor) -> tuple[list[SiteCost], float]:
    """The cost of every site alone, and that of all of them together."""
    whole = load_model(model.path, model.dtype, model.device, trust_remote_code=model.trust_remote_code)

    def loss() -> float:
        batches = windows.to(model.device).split(model.batch_size)
        losses = [float(whole(input_ids=ids, labels=ids, use_cache=False).loss) * len(ids) for ids in batches]
        return sum(losses) / len(windows)

    start, costs = loss(), []
    layers = [layer for layer in pruned.layers if layer.pattern]
    sites = [list(group) for _, group in groupby(layers, key=lambda layer: (layer.block, layer.site))]
    for site in track(sites, "sensitivity", unit="site"):
        names = [layer.name for layer in site]
        weights = {name: linear(whole, name).weight for name in names}
        before = {name: weight.clone() for name, weight in weights.items()}
        Pruned(
            masks={name: pruned.masks[name] for name in names},
            values={name: pruned.values[name] for name in names if name in pruned.values},
        ).apply(whole)
        parameters = sum(layer.shape[0] * layer.shape[1] for layer in site)
        costs.append(SiteCost(site=names[0], layers=names, parameters=parameters, nats=loss() - start))
        for name, weight in weights.items():
            weight.copy_(before[name])
    pruned.apply(whole)
    return costs, loss() - start
