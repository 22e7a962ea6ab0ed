"""Swaps of input channels that lower a layer's output error itself; its weights stay as they are.

The searches of `permute` and `swap` keep what they can of the scores, which is to lose the least output error
as far as the inputs are uncorrelated and nothing was pruned before them. Here the whole error counts. With
P [N, K] what the mask of the scores prunes of W (0 where it keeps), H = Xᵀ X and E [T, N] what the layer
should put out minus what it puts out while it is dense (see `correct`), the squared error changes by

    f = ‖E + X Pᵀ‖² − ‖E‖² = ⟨P, R + M⟩,     M = Eᵀ X,     R = P H + M.

To prune the kept weight ij raises f by c_ij = 2 W_ij (R_ij − P_ij H_jj) + W_ij² H_jj, and to have kept a
pruned one lowers it by as much, all others as they are. Let t_ia rank n-th among the channels of a's group
without a in row i. With b in a's place the group keeps its n−1 best others and the better of t_ia and b,
whatever they cost, so that as far as c tells a swap of a and b lowers f by

    V[a, b] + V[b, a] − V[a, a] − V[b, b],     V[a, b] = Σ_i (c_ib where s_ib > s_it, else c_it).

Each round proposes the best of these swaps that touch disjoint groups, works out exactly what each changes
in f, and makes those that lower it, all at once if that lowers f too, else the better half. f never rises.
The search and its place after the paper's shuffles are our own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esparse_trt.sparsity.maxima import sums_of_winners
from esparse_trt.sparsity.pattern import Pattern, nm_mask, ranks
from esparse_trt.sparsity.swap import match

_NOISE = 1e-7  # gains below this share of the error are rounding


def refine(
    weight: Tensor,
    scores: Tensor,
    hessian: Tensor,
    missing: Tensor | None,
    start: Tensor,
    pattern: Pattern,
    rounds: int,
) -> Tensor:
    """Improve a permutation.

    Args:
        weight: [N, K], of all layers that read the tensor, their rows stacked.
        scores: [N, K], which the masks are chosen by.
        hessian: float32 [K, K], Xᵀ X.
        missing: float32 [N, K], M of the module docstring; None: nothing is missing.
        start: permutation [K].
        rounds: rounds of simultaneous swaps at most.

    Returns:
        a permutation [K] under which f is at most that of `start`.
    """
    search = _Search(weight.float(), scores, hessian, missing, start, pattern)
    for _ in range(rounds):
        if not search.swap():
            break
    return search.order.flatten()


class _Search:
    """State of the search.

    Attributes:
        order: [G, m], the channels of each group.
        pruned: P of the module docstring, [N, K]; channels in their original order, like all but `order`.
        slope: R of the module docstring, [N, K].
        noise: what a swap has to lower f by.
    """

    def __init__(
        self,
        weight: Tensor,
        scores: Tensor,
        hessian: Tensor,
        missing: Tensor | None,
        start: Tensor,
        pattern: Pattern,
    ) -> None:
        self.weight, self.scores, self.hessian, self.pattern = weight, scores, hessian, pattern
        self.order = start.view(-1, pattern.group).clone()
        self.pruned = torch.empty_like(weight)
        self.pruned[:, start] = self._pruned(start)
        self.slope = self.pruned @ hessian
        self.noise = _NOISE * (self.pruned * self.slope).sum(dtype=torch.float64)
        if missing is not None:
            self.slope += missing
        size = pattern.group
        swaps = torch.arange(2 * size, device=start.device).repeat(size * size, 1)
        slot = torch.arange(size * size, device=start.device)
        swaps[slot, slot // size], swaps[slot, size + slot % size] = size + slot % size, slot // size
        self.swaps = swaps  # [m·m, 2m]: slot a·m + b exchanges channel a of one group with b of the other

    def swap(self) -> bool:
        """One round; whether anything was swapped."""
        pairs, slots = self._propose()
        if not len(pairs):
            return False
        channels = self.order[pairs].flatten(1)  # [P, 2m]
        swap = self.swaps[slots]
        swapped = channels.gather(1, swap)
        after = self._pruned(swapped)
        changes = after.gather(2, swap.expand_as(after)) - self.pruned[:, channels]  # [N, P, 2m]
        slope = self.slope[:, channels]
        tiles = self.hessian[channels.unsqueeze(2), channels.unsqueeze(1)]  # [P, 2m, 2m]
        curved = torch.einsum("npi,pij->npj", changes, tiles)
        change = (changes * (2 * slope + curved)).sum((0, 2), dtype=torch.float64)
        ranked = change.argsort()
        chosen = ranked[: int((change < -self.noise).sum())]
        while len(chosen):
            step = torch.zeros_like(self.weight)
            step[:, channels[chosen].flatten()] = changes[:, chosen].flatten(1)
            moved = step @ self.hessian
            if (step * (2 * self.slope + moved)).sum(dtype=torch.float64) < 0:
                self.pruned += step
                self.slope += moved
                self.order[pairs[chosen].flatten()] = swapped[chosen].view(-1, self.pattern.group)
                return True
            chosen = chosen[: len(chosen) // 2]
        return False

    def _pruned(self, channels: Tensor) -> Tensor:
        """What is pruned of consecutive groups of these channels [..., L]: [N, ..., L]."""
        return self.weight[:, channels] * ~nm_mask(self.scores[:, channels], self.pattern)

    def _propose(self) -> tuple[Tensor, Tensor]:
        """Pairs of groups [P, 2], all different, and the slots to swap [P]."""
        size = self.pattern.group
        gains = self._gains().unflatten(0, (-1, size)).unflatten(2, (-1, size)).transpose(1, 2).flatten(2)
        gain, slots = gains.max(2)  # [G, G]
        gain.fill_diagonal_(-torch.inf)
        gain.masked_fill_(gain <= self.noise, -torch.inf)
        partner = match(gain.unsqueeze(0))[0]
        first = (partner > torch.arange(len(partner), device=partner.device)).nonzero().flatten()
        return torch.stack([first, partner[first]], dim=1), slots[first, partner[first]]

    def _gains(self) -> Tensor:
        """How much c says that each swap lowers f: [K, K], by position in the order."""
        diagonal = self.hessian.diagonal()
        costs = 2 * self.weight * (self.slope - self.pruned * diagonal) + self.weight.square() * diagonal
        slots = [x[:, self.order] for x in (self.scores, costs)]  # [N, G, m] each
        rank = torch.stack(ranks(list(slots[0].unbind(2))), dim=2)
        place = (rank < self.pattern.kept).to(rank.dtype) + (self.pattern.kept - 1)  # t's, among all m
        last = [torch.zeros_like(x) for x in slots]  # of t of the module docstring
        for j in range(self.pattern.group):
            is_last = rank[..., j : j + 1] == place
            for found, values in zip(last, slots, strict=True):
                found += is_last * values[..., j : j + 1]
        last_scores, last_costs, scores, costs = (x.flatten(1).T for x in (*last, *slots))  # [K, N] each
        values = sums_of_winners(last_scores, last_costs, scores, costs)
        own = values.diagonal()
        return values + values.T - own.unsqueeze(0) - own.unsqueeze(1)
