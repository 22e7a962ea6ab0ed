"""Linear-assignment refinement of a permutation, as in RIA (ICLR 2024, Plug-and-Play).

One slot of every group at a time: its G channels are taken out and given back to the G groups so that the
kept score is highest. What group g keeps with channel c in the free slot is

    Σ_i (sum of the n−1 largest of the others + max(n-th largest of the others, s_ic)),

so that the kept score is a sum of entries of a matrix [G, G], one a row and column: a linear assignment,
solved exactly. The present order is one of those compared, so the kept score never falls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esparse_trt.sparsity.maxima import sums_of_maxima
from esparse_trt.sparsity.pattern import Pattern, descending


def assign(scores: Tensor, pattern: Pattern, start: Tensor, rounds: int) -> Tensor:
    """Improve permutations by reassigning each of the m slots in turn.

    Args:
        scores: [B, N, K], B independent problems.
        start: permutations [B, K] to start from.
        rounds: passes over all slots at most; ends when one changes nothing.

    Returns:
        permutations [B, K] whose kept score is at least that of `start`.
    """
    from scipy.optimize import linear_sum_assignment  # slow to import, and nothing else needs it

    improved = []
    for values, order in zip(scores.mT, start, strict=True):  # [K, N], [K]
        groups = order.view(-1, pattern.group).clone()
        for _ in range(rounds):
            before = groups.clone()
            for slot in range(pattern.group):
                gain = _gains(values, groups, slot, pattern)
                gain -= gain.mean(0)  # changes no optimum, and the solver ends 10 to 20 times as fast
                taken = torch.from_numpy(linear_sum_assignment(gain.cpu().numpy(), maximize=True)[1])
                groups[:, slot] = groups[:, slot][taken.to(groups.device)]
            if torch.equal(groups, before):
                break
        improved.append(groups.flatten())
    return torch.stack(improved)


def _gains(values: Tensor, groups: Tensor, slot: int, pattern: Pattern) -> Tensor:
    """What group g would keep more with the channel that group c has in the slot: float64 [G, G].

    Differences to the present order keep rounding away from the large sums that all have in common.
    """
    others = [values[groups[:, k]] for k in range(pattern.group) if k != slot]
    last = descending(others)[pattern.kept - 1]  # the n-th largest of the others, [G, N]
    channel = values[groups[:, slot]]
    kept = sums_of_maxima(last, channel).double()
    return kept - kept.diagonal().unsqueeze(1)
