"""Choice of layers: what pruning costs most stays dense, so that a perplexity or a speed budget is met.

Sites cost what `sensitivity` measures. Costs do not quite add up, so their sum is scaled to the rise with
everything pruned.

- `perplexity_ratio`: sites are left dense by descending cost per parameter until the estimate is within
  ln(perplexity ratio). A `speedup` beside it is a check: what is left must be that fast.
- `speedup` alone: sites are left dense by descending cost per time that they would save, as many as the time
  of all linear layers leaves room for.
- `sensitive: 4:8`: of the sites that are not pruned, those go to 4:8, by ascending cost per parameter, whose
  cost at 4:8 still fits a perplexity budget; without one, all of them do. It takes as long as dense.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from esparse_trt.errors import EsparseError
from esparse_trt.records import LayerChoice, LayerRecord, SiteCost
from esparse_trt.sections import BudgetSection, PruneSection
from esparse_trt.sparsity.blockwise import BlockwiseModel
from esparse_trt.sparsity.pruned import Pruned
from esparse_trt.sparsity.sensitivity import Sensitivity, pruned_sites
from esparse_trt.sparsity.speed import site_times


@dataclass(frozen=True)
class Speed:
    """Time of the linear layers: of each site, sparse and dense, and of those that are never pruned."""

    sites: Mapping[str, tuple[float, float]]
    others: float
    unit: str

    @property
    def dense(self) -> float:
        """Time with nothing pruned."""
        return self.others + sum(dense for _, dense in self.sites.values())

    def saved(self, site: str) -> float:
        """What the sparse kernels save at a site; never negative, as it would run dense."""
        sparse, dense = self.sites[site]
        return max(dense - sparse, 0.0)

    def speedup(self, unpruned: Collection[str]) -> float:
        """Dense / sparse time when these sites are not 2:4."""
        saved = sum(self.saved(site) for site in self.sites if site not in unpruned)
        return self.dense / (self.dense - saved)


def choose_layers(
    model: BlockwiseModel,
    pruned: Pruned,
    finer: Pruned | None,
    others: Sequence[LayerRecord],
    windows: Tensor,
    section: PruneSection,
) -> LayerChoice:
    """Measure what every pruned site costs, and decide what becomes of it.

    Args:
        model: the dense model.
        pruned: masks and values of all layers, pruned as they would be without a budget.
        finer: the same at 4:8, where `budget.sensitive` asks for it.
        others: linear layers that are not in `pruned`.
        windows: int64 token ids [samples, length] of the calibration text.

    Raises:
        EsparseError: the budget cannot be met.
    """
    budget = section.budget
    assert budget is not None
    speed = _speed(pruned.layers, others, budget)
    sensitivity = Sensitivity(model, windows[: budget.samples])
    costs, total = sensitivity.costs(pruned), sensitivity.total(pruned)
    scale = _scale(costs, total)
    unpruned = _unpruned(costs, scale, speed, budget)
    if finer is not None:
        wanted = [cost.site for cost in costs if cost.site in unpruned]
        at_finer = {cost.site: cost.nats for cost in sensitivity.costs(finer, wanted)}
        costs = [cost.model_copy(update={"nats_4_8": at_finer.get(cost.site)}) for cost in costs]
    softened = softened_within(costs, unpruned, scale, budget)
    left = sum(cost.nats for cost in costs if cost.site not in unpruned)
    left += sum(cost.nats_4_8 or 0.0 for cost in costs if cost.site in softened)
    return LayerChoice(
        ln_ratio=scale * left,
        speedup=speed.speedup(unpruned) if speed else None,
        speed_of=speed.unit if speed else None,
        sites=[_decided(cost, unpruned, softened, speed, budget) for cost in costs],
    )


def _scale(costs: Sequence[SiteCost], total: float) -> float:
    """What to multiply costs by, so that all of them together are the total."""
    rest = sum(cost.nats for cost in costs)
    return total / rest if rest > 0 else 0.0


def within_budget(costs: Sequence[SiteCost], scale: float, budget: float) -> set[str]:
    """Names of the sites that stay dense, so that the others are estimated to cost `budget` nats at most."""
    rest = sum(cost.nats for cost in costs)
    dense = set()
    for cost in sorted(costs, key=lambda cost: cost.nats / cost.parameters, reverse=True):
        if scale * rest <= budget:
            break
        dense.add(cost.site)
        rest -= cost.nats
    return dense


def within_speed(costs: Sequence[SiteCost], speed: Speed, speedup: float) -> set[str]:
    """Names of the sites that may stay dense, most nats for the time first, at this speed-up."""
    dense: set[str] = set()
    room = speed.dense / speedup - speed.dense / speed.speedup(dense)
    for cost in sorted(
        costs, key=lambda cost: cost.nats / max(speed.saved(cost.site), 1e-9 * speed.dense), reverse=True
    ):
        if cost.nats > 0 and speed.saved(cost.site) <= room:
            dense.add(cost.site)
            room -= speed.saved(cost.site)
    return dense


def softened_within(
    costs: Sequence[SiteCost], unpruned: Collection[str], scale: float, budget: BudgetSection
) -> set[str]:
    """Those of the unpruned sites that go to 4:8."""
    candidates = [cost for cost in costs if cost.site in unpruned and cost.nats_4_8 is not None]
    if budget.perplexity_ratio is None:
        return {cost.site for cost in candidates}
    room = math.log(budget.perplexity_ratio)
    room -= scale * sum(cost.nats for cost in costs if cost.site not in unpruned)
    chosen = set()
    for cost in sorted(candidates, key=lambda cost: (cost.nats_4_8 or 0.0) / cost.parameters):
        nats = scale * (cost.nats_4_8 or 0.0)
        if nats <= room:
            chosen.add(cost.site)
            room -= nats
    return chosen


def _unpruned(
    costs: Sequence[SiteCost], scale: float, speed: Speed | None, budget: BudgetSection
) -> set[str]:
    """Names of the sites that are not pruned to the recipe's pattern."""
    if speed is not None and budget.speedup and speed.speedup(()) < budget.speedup:
        raise EsparseError(
            f"with everything pruned the linear layers are {speed.speedup(()):.3f} times as fast, not "
            f"{budget.speedup:g} ({speed.unit})",
            where="prune.budget.speedup",
            fix="lower it, or prune more layers",
        )
    if budget.perplexity_ratio is None:
        assert speed is not None and budget.speedup is not None
        return within_speed(costs, speed, budget.speedup)
    dense = within_budget(costs, scale, math.log(budget.perplexity_ratio))
    if len(dense) == len(costs):
        raise EsparseError(
            f"pruning any site costs more than a perplexity ratio of {budget.perplexity_ratio:g}",
            where="prune.budget.perplexity_ratio",
            fix="raise it, choose a pattern that keeps more, or turn on prune.update",
        )
    if speed is not None and budget.speedup and speed.speedup(dense) < budget.speedup:
        raise EsparseError(
            f"a perplexity ratio of {budget.perplexity_ratio:g} leaves {len(dense)} of {len(costs)} sites "
            f"dense: linear layers are then {speed.speedup(dense):.3f} times as fast, not {budget.speedup:g}",
            where="prune.budget",
            fix="raise the one or lower the other, or turn on prune.update",
        )
    return dense


def _decided(
    cost: SiteCost,
    unpruned: Collection[str],
    softened: Collection[str],
    speed: Speed | None,
    budget: BudgetSection,
) -> SiteCost:
    changes: dict[str, object] = {"gain": speed.saved(cost.site) / speed.dense if speed else None}
    if cost.site in unpruned:
        reason = f"prune.budget: its site costs {cost.nats:.4f} nats"
        if cost.site in softened:
            reason += f", {cost.nats_4_8:.4f} at {budget.sensitive}"
        changes |= {"pattern": budget.sensitive if cost.site in softened else None, "reason": reason}
    return cost.model_copy(update=changes)


def _speed(
    pruned: Sequence[LayerRecord], others: Sequence[LayerRecord], budget: BudgetSection
) -> Speed | None:
    """The times that a speed budget is about."""
    if budget.speedup is None:
        return None
    times, unit = site_times(budget.gpu)
    sites = {}
    for site in pruned_sites(pruned):
        rows, channels = sum(layer.shape[0] for layer in site), site[0].shape[1]
        sites[site[0].name] = times(rows, channels)
    dense = [layer for layer in (*pruned, *others) if not layer.pattern]
    return Speed(sites, sum(times(*layer.shape)[1] for layer in dense), unit)
