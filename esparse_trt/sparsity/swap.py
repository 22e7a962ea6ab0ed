"""Local block shuffle: swaps of input channels inside blocks, while they raise the kept score.

Inside blocks of consecutive positions, pairs of channels from different groups of m are swapped. Let
v_1 ≥ v_2 ≥ … be the sorted scores of row i in the group g of channel a. Without a, the n−1 largest sum to
Σ_{k≤n} v_k − max(s_ia, v_n), and the n-th largest is t_ia = v_{n+1} if s_ia ≥ v_n, else v_n. With b in a's
place the group therefore keeps

    C[a, b] = kept(g) − D[a] + M[a, b],     D[a] = Σ_i max(s_ia, v_n),     M[a, b] = Σ_i max(t_ia, s_ib),

and swapping a and b gains M[a, b] + M[b, a] − D[a] − D[b]. As max(t, s) = (t + s + |t − s|) / 2, M is made of
L1 distances. Only the rows of M that belong to a changed group change with a swap, since a channel keeps its
scores wherever it goes. Each round takes the best swaps that touch disjoint groups and checks each of them
in float64 before accepting it, so the kept score never falls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esparse_trt.sparsity.pattern import Pattern, descending
from esparse_trt.sparsity.permutation import compose

_STACK_ELEMENTS = 1 << 26  # scores of the blocks that are swapped in one batch (256 MiB in float32)
_CACHED_COLUMNS = 256  # of two blocks of scores, which then stay in a core's cache
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
    """

    def __init__(self, scores: Tensor, pattern: Pattern) -> None:
        blocks, channels, _ = scores.shape
        groups = channels // pattern.group
        self.pattern = pattern
        self.scores = scores
        self.total = scores.sum(-1)
        self.order = torch.arange(channels, device=scores.device).view(groups, -1).repeat(blocks, 1, 1)
        self.kept = scores.new_empty(blocks, groups, dtype=torch.float64)
        self.lost = scores.new_empty(blocks, channels, dtype=torch.float64)
        self.matrix = scores.new_empty(blocks, channels, channels)
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

    def gains(self, active: Tensor) -> Tensor:
        """What swapping channels a and b would add to the kept score: float64 [A, L, L]; symmetric.

        Meaningless for channels of the same group.
        """
        matrix, lost = self.matrix[active].double(), self.lost[active]
        return (matrix + matrix.mT) - (lost.unsqueeze(1) + lost.unsqueeze(2))

    def _swap_best(self, active: Tensor) -> tuple[Tensor, Tensor]:
        """Swap the best disjoint pairs of the active blocks; returns (block, group) of all changed groups."""
        gain, slots = self._best_by_group(active)
        partner = match(gain)
        index, first = (partner > torch.arange(partner.shape[1], device=partner.device)).nonzero(
            as_tuple=True
        )
        second, block = partner[index, first], active[index]
        slot = slots[index, first, second]
        pair = torch.stack([first, second], dim=1)  # [P, 2]
        chosen = torch.stack([slot // self.pattern.group, slot % self.pattern.group], dim=1)  # [P, 2]
        swapped = self.order[block.unsqueeze(1), pair]  # [P, 2, m]
        here = swapped.gather(2, chosen.unsqueeze(2))
        swapped.scatter_(2, chosen.unsqueeze(2), here.flip(1))
        values = self.scores[block.view(-1, 1, 1), swapped]  # [P, 2, m, N]
        best = torch.stack(descending(list(values.unbind(2)))[: self.pattern.kept])
        after = best.sum(dim=(0, 2, 3), dtype=torch.float64)
        accepted = after > self.kept[block.unsqueeze(1), pair].sum(1)
        block, pair = block[accepted], pair[accepted]
        self.order[block.unsqueeze(1), pair] = swapped[accepted]
        return block.repeat_interleave(2), pair.flatten()

    def _best_by_group(self, active: Tensor) -> tuple[Tensor, Tensor]:
        """Best gain between two groups [A, G, G], −inf where there is none, and its slots a·m + b."""
        order = self.order[active].flatten(1)
        by_position = torch.take_along_dim(self.gains(active), order.unsqueeze(2), dim=1)
        by_position = torch.take_along_dim(by_position, order.unsqueeze(1), dim=2)
        m = self.pattern.group
        pairs = by_position.unflatten(2, (-1, m)).unflatten(1, (-1, m)).transpose(2, 3).flatten(3)
        gain, slots = pairs.max(dim=3)
        kept = self.kept[active]
        worthwhile = gain > _NOISE * (kept.unsqueeze(1) + kept.unsqueeze(2))
        worthwhile &= ~torch.eye(gain.shape[1], dtype=torch.bool, device=gain.device)
        return gain.where(worthwhile, gain.new_tensor(-torch.inf)), slots

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
            distance = l1_distance(rows, self.scores[b])
            self.matrix[b, where] = (rows.sum(-1, keepdim=True) + self.total[b] + distance) / 2

    def _by_block(self, block: Tensor, rest: Tensor, channels: Tensor) -> list[tuple[int, Tensor, Tensor]]:
        """Split [Q, m, N] and [Q, m] by block, flattened to channels."""
        counts = torch.bincount(block, minlength=len(self.order)).tolist()
        split = zip(counts, rest.split(counts), channels.split(counts), strict=True)
        return [(b, t.flatten(0, 1), c.flatten()) for b, (count, t, c) in enumerate(split) if count]


def l1_distance(a: Tensor, b: Tensor) -> Tensor:
    """L1 distances [P, L] between the rows of [P, N] and [L, N].

    A CPU sums over slices of the columns: torch walks whole rows for every pair, and those of 10 000 columns
    come from memory each time (*measured*: slices are 1.4 to 2.9 times as fast at N = 9728).
    """
    if a.device.type != "cpu":
        return torch.cdist(a, b, p=1.0)
    distance = a.new_zeros(len(a), len(b))
    for x, y in zip(a.split(_CACHED_COLUMNS, 1), b.split(_CACHED_COLUMNS, 1), strict=True):
        distance += torch.cdist(x, y, p=1.0)
    return distance


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
    while True:
        best, choice = gain.max(dim=2)
        mutual = (choice.gather(1, choice) == here) & (best > -torch.inf)
        if not mutual.any():
            return partner
        partner = torch.where(mutual, choice, partner)
        gain.masked_fill_(mutual.unsqueeze(1) | mutual.unsqueeze(2), -torch.inf)
