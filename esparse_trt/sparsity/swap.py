"""Local block shuffle: swaps of input channels inside blocks, while they raise the kept score.

Inside blocks of consecutive positions, pairs of channels from different groups of m are swapped. Let
v_1 ≥ v_2 ≥ … be the sorted scores of row i in the group g of channel a. Without a, the n−1 largest sum to
Σ_{k≤n} v_k − max(s_ia, v_n), and the n-th largest is t_ia = v_{n+1} if s_ia ≥ v_n, else v_n. With b in a's
place the group therefore keeps

    C[a, b] = kept(g) − D[a] + M[a, b],     D[a] = Σ_i max(s_ia, v_n),     M[a, b] = Σ_i max(t_ia, s_ib),

and swapping a and b gains M[a, b] + M[b, a] − D[a] − D[b]. A channel keeps its scores wherever it goes, so a
swap changes only those rows of M that belong to the two groups, and the gains of swaps with these groups.
Each round takes the best swaps that touch disjoint groups and checks each of them in float64 before accepting
it, so the kept score never falls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esparse_trt.sparsity.maxima import sums_of_maxima
from esparse_trt.sparsity.pattern import Pattern, descending
from esparse_trt.sparsity.permutation import compose

_STACK_ELEMENTS = 1 << 26  # scores of the blocks that are swapped in one batch (256 MiB in float32)
_GAINS = 1 << 25  # gains that are computed at a time (256 MiB in float64)
_UNSEEN = 4  # steps of the matching before the host asks whether they found anything, and waits for the GPU
_NOISE = 1e-6  # gains below this share of what two groups keep are rounding, not gains


def local_shuffle(scores: Tensor, pattern: Pattern, start: Tensor, *, block: int, rounds: int) -> Tensor:
    """Improve permutations by swaps inside blocks of positions.

    Args:
        scores: [B, N, K], B independent problems.
        start: permutations [B, K] to start from.
        block: channels per block, a multiple of m; the last block takes what is left.
        rounds: rounds of simultaneous swaps at most.

    Returns:
        permutations [B, K] whose kept score is at least that of `start`.
    """
    problems, rows, _ = scores.shape
    size = max(1, _STACK_ELEMENTS // (rows * block))
    parts = []
    for positions in _equal_blocks(start, block):  # [B, blocks, width]
        members = positions.flatten(0, 1)  # the channels of each block
        problem = torch.arange(problems, device=start.device).repeat_interleave(positions.shape[1])
        swapped = []
        for p, local in zip(problem.split(size), members.split(size), strict=True):
            blocks = SwapBlocks(scores[p.unsqueeze(1), :, local], pattern)
            blocks.run(rounds)
            swapped.append(compose(local, blocks.order.flatten(1)))
        parts.append(torch.cat(swapped).view(problems, -1))
    return torch.cat(parts, dim=1)


def _equal_blocks(start: Tensor, block: int) -> list[Tensor]:
    """Cut [B, K] into [B, K div block, block] and, where channels are left, [B, 1, K mod block]."""
    whole = start.shape[1] - start.shape[1] % block
    parts = [start[:, :whole].unflatten(1, (-1, block)), start[:, whole:].unsqueeze(1)]
    return [part for part in parts if part.numel()]


class SwapBlocks:
    """State of the greedy swaps in B blocks of L channels in G = L/m groups; a row of scores per channel.

    Attributes:
        scores: [B, L, N].
        order: [B, G, m], the channels of each group.
        kept: float64 [B, G], the score that each group keeps, summed over the N rows.
        lost: float64 [B, L], D of the module docstring.
        matrix: [B, L, L], M of the module docstring, indexed by channel.
        gain: float64 [B, G, G], the best gain of a swap between two groups, −inf where there is none.
        slots: [B, G, G], the slots a·m + b whose channels that swap exchanges.
    """

    def __init__(self, scores: Tensor, pattern: Pattern) -> None:
        blocks, channels, _ = scores.shape
        groups = channels // pattern.group
        self.pattern = pattern
        self.scores = scores
        self.order = torch.arange(channels, device=scores.device).view(groups, -1).repeat(blocks, 1, 1)
        self.kept = scores.new_empty(blocks, groups, dtype=torch.float64)
        self.lost = scores.new_empty(blocks, channels, dtype=torch.float64)
        self.matrix = scores.new_empty(blocks, channels, channels)
        self.gain = scores.new_empty(blocks, groups, groups, dtype=torch.float64)
        self.slots = torch.empty(blocks, groups, groups, dtype=torch.int16, device=scores.device)
        everything = torch.arange(blocks * groups, device=scores.device)
        self._refresh(everything // groups, everything % groups)

    def run(self, rounds: int) -> None:
        """Swap until nothing gains, or for `rounds` rounds."""
        before = self.kept.sum(1)
        active = torch.arange(len(self.order), device=self.order.device)  # blocks that changed last round
        for _ in range(rounds):
            block, group = self._swap_best(active)
            if not len(block):
                break
            self._refresh(block, group)
            active = block.unique()
        assert bool((self.kept.sum(1) >= before * (1 - 1e-12)).all()), "a local swap lowered the kept score"

    def gains(self, block: Tensor, group: Tensor) -> Tensor:
        """What swapping channels of Q groups with others of their blocks adds to the kept score.

        Returns:
            float64 [Q, m, L]: slot of the group, and position in the block's present order; meaningless for
            channels of the same group.
        """
        own = self.order[block, group].unsqueeze(2)
        others = self.order[block].flatten(1).unsqueeze(1)
        block = block.view(-1, 1, 1)
        there, back = self.matrix[block, own, others], self.matrix[block, others, own]
        return (there.double() + back) - (self.lost[block, own] + self.lost[block, others])

    def _swap_best(self, active: Tensor) -> tuple[Tensor, Tensor]:
        """Swap the best disjoint pairs of the active blocks; returns (block, group) of all changed groups."""
        partner = match(self.gain[active])
        index, first = (partner > torch.arange(partner.shape[1], device=partner.device)).nonzero(
            as_tuple=True
        )
        second, block = partner[index, first], active[index]
        slot = self.slots[block, first, second].long()
        pair = torch.stack([first, second], dim=1)  # [P, 2]
        chosen = torch.stack([slot // self.pattern.group, slot % self.pattern.group], dim=1)  # [P, 2]
        swapped = self.order[block.unsqueeze(1), pair]  # [P, 2, m]
        here = swapped.gather(2, chosen.unsqueeze(2))
        swapped.scatter_(2, chosen.unsqueeze(2), here.flip(1))
        values = self.scores[block.view(-1, 1, 1), swapped]  # [P, 2, m, N]
        best = torch.stack(descending(list(values.unbind(2)))[: self.pattern.kept])
        after = best.sum(dim=(0, 2, 3), dtype=torch.float64)
        accepted = after > self.kept[block.unsqueeze(1), pair].sum(1)
        rejected, (first, second) = block[~accepted], pair[~accepted].T
        self.gain[rejected, first, second] = self.gain[rejected, second, first] = -torch.inf
        block, pair = block[accepted], pair[accepted]
        self.order[block.unsqueeze(1), pair] = swapped[accepted]
        return block.repeat_interleave(2), pair.flatten()

    def _refresh(self, block: Tensor, group: Tensor) -> None:
        """Recompute what depends on the given groups; `block` ascending."""
        n = self.pattern.kept
        channels = self.order[block, group]  # [Q, m]
        values = self.scores[block.unsqueeze(1), channels]  # [Q, m, N]
        ranked = descending(list(values.unbind(1)))
        self.kept[block, group] = torch.stack(ranked[:n]).sum(dim=(0, 2), dtype=torch.float64)
        last, following = ranked[n - 1].unsqueeze(1), ranked[n].unsqueeze(1)
        self.lost[block.unsqueeze(1), channels] = torch.maximum(values, last).sum(-1, dtype=torch.float64)
        rest = torch.where(values >= last, following, last)  # t of the module docstring
        for b, rows, where in self._by_block(block, rest, channels):
            self.matrix[b, where] = sums_of_maxima(rows, self.scores[b])
        size = max(1, _GAINS // (self.pattern.group * self.matrix.shape[2]))
        for b, g in zip(block.split(size), group.split(size), strict=True):
            self._rate(b, g)

    def _rate(self, block: Tensor, group: Tensor) -> None:
        """Find the best swaps of the given groups with all others."""
        m = self.pattern.group
        pairs = self.gains(block, group).unflatten(2, (-1, m)).transpose(1, 2).flatten(2)  # [Q, G, m·m]
        gain, slots = pairs.max(dim=2)
        noise = _NOISE * (self.kept[block, group].unsqueeze(1) + self.kept[block])
        gain.masked_fill_(gain <= noise, -torch.inf)
        gain[torch.arange(len(group), device=group.device), group] = -torch.inf  # not with itself
        self.gain[block, group] = self.gain[block, :, group] = gain
        self.slots[block, group] = slots.short()
        self.slots[block, :, group] = (slots % m * m + slots // m).short()

    def _by_block(self, block: Tensor, rest: Tensor, channels: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """Split [Q, m, N] and [Q, m] by block, flattened to channels."""
        counts = torch.bincount(block, minlength=len(self.order)).tolist()
        split = zip(counts, rest.split(counts), channels.split(counts), strict=True)
        return [(b, t.flatten(0, 1), c.flatten()) for b, (count, t, c) in enumerate(split) if count]


def match(gain: Tensor) -> Tensor:
    """Greedy matching: the pair with the highest gain, then the highest among the other groups, and so on.

    Pairs that are each other's best are taken together, which gives the same result in few steps.

    Args:
        gain: [A, G, G], symmetric, −inf where two groups must not be paired.

    Returns:
        int64 [A, G], the partner of each group, −1 for none; among equal gains the lower groups win.
    """
    gain = gain.clone()
    here = torch.arange(gain.shape[1], device=gain.device)
    partner = torch.full(gain.shape[:2], -1, device=gain.device)
    found = True
    while found:
        for _ in range(_UNSEEN):
            best, choice = gain.max(dim=2)
            mutual = (choice.gather(1, choice) == here) & (best > -torch.inf)
            partner = torch.where(mutual, choice, partner)
            gain.masked_fill_(mutual.unsqueeze(1) | mutual.unsqueeze(2), -torch.inf)
        found = bool(mutual.any())
    return partner
