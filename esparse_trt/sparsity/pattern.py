"""N:M patterns: n kept of every m consecutive input channels (the K axis of a weight [N, K])."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from esparse_trt.errors import EsparseError

_CHECK_ELEMENTS = (
    1 << 24
)  # weights looked at in one go, so that a huge or transposed array is never copied whole


class Pattern(NamedTuple):
    """`kept` of every `group` consecutive input channels stay; some texts count the pruned ones instead."""

    kept: int
    group: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "n:m".

        Raises:
            EsparseError: `text` is not n:m with 0 < n < m.
        """
        kept, _, group = text.partition(":")
        if not (kept.isdecimal() and group.isdecimal() and 0 < int(kept) < int(group)):
            raise EsparseError(
                f"{text!r} is not an N:M pattern", fix="write n:m with 0 < n < m, such as 2:4 (2 kept of 4)"
            )
        return cls(int(kept), int(group))

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"

    def check(self, channels: int, layer: str) -> None:
        """Raise an EsparseError naming the layer if the pattern does not divide its K = `channels`."""
        if channels % self.group:
            raise EsparseError(
                f"pattern {self} needs K to be a multiple of {self.group}, but this layer has K = {channels}",
                where=layer,
                fix="choose another prune.pattern, or add the layer to prune.layers.exclude",
            )


def nm_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """The mask that keeps the n highest scores of each group of m; among equals the lower channel wins.

    Args:
        scores: [..., K], without NaN.

    Returns:
        bool [..., K], exactly n of every m consecutive entries True.
    """
    masks = [rank < pattern.kept for rank in ranks(_slots(scores, pattern))]
    return torch.stack(masks, dim=-1).reshape(scores.shape)


def ranks(values: list[Tensor]) -> list[Tensor]:
    """Rank of each of m tensors of equal shape, elementwise: 0 is the highest, the first of equals.

    A comparison count instead of a sort: the same on every device, and fast for small m.
    """
    counts = []
    for j, value in enumerate(values):
        rank = torch.zeros_like(value, dtype=torch.int16)
        for i, other in enumerate(values):
            if i != j:
                rank += other >= value if i < j else other > value
        counts.append(rank)
    return counts


def group_kept(scores: Tensor, pattern: Pattern) -> Tensor:
    """Score that the best mask keeps of each group, summed over rows: [..., N, K] -> float64 [..., K/m]."""
    best = torch.stack(descending(_slots(scores, pattern))[: pattern.kept])
    return best.sum(dim=(0, -2), dtype=torch.float64)


def kept_score(scores: Tensor, pattern: Pattern) -> float:
    """Share of the total score [N, K] that the best mask keeps, in [0, 1]; 1 if there is nothing to lose."""
    total = scores.sum(dtype=torch.float64)
    return float(group_kept(scores, pattern).sum() / total) if total > 0 else 1.0


def descending(values: list[Tensor]) -> list[Tensor]:
    """Sort m tensors of equal shape elementwise, largest first, with an odd-even transposition network."""
    values = list(values)
    for step in range(len(values)):
        for i in range(step % 2, len(values) - 1, 2):
            a, b = values[i], values[i + 1]
            values[i], values[i + 1] = torch.maximum(a, b), torch.minimum(a, b)
    return values


def conforming_share(weight: Any, pattern: Pattern) -> float:
    """Share of the groups of m consecutive weights along K that have at most n nonzeros.

    Args:
        weight: numpy array or torch tensor [N, K] of any dtype and strides; −0.0 is a zero.

    Returns:
        1.0 where the weight is N:M; 0.0 where m does not divide K.
    """
    rows, channels = weight.shape
    if channels % pattern.group:
        return 0.0
    groups = rows * (channels // pattern.group)
    if not groups:
        return 1.0
    step = max(1, _CHECK_ELEMENTS // channels)
    conforming = 0
    for start in range(0, rows, step):
        nonzero = (weight[start : start + step] != 0).reshape(-1, pattern.group).sum(-1)
        conforming += int((nonzero <= pattern.kept).sum())
    return conforming / groups


def _slots(scores: Tensor, pattern: Pattern) -> list[Tensor]:
    """The m slots of every group as m tensors [..., K/m]."""
    return list(scores.unflatten(-1, (-1, pattern.group)).unbind(-1))
