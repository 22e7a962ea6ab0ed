"""Sums over winners, which every permutation search is made of, for all pairs of rows.

Sums of maxima are Σ_k max(a_pk, b_lk); where what counts is not what wins, Σ_k of what the one that wins is
worth. On a GPU kernels of one line (`maxima_kernel`) do it. Elsewhere max(x, y) = (x + y + |x − y|) / 2 makes
the first an L1 distance, which torch computes with vector instructions.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

_CACHED_COLUMNS = 256  # of two blocks of rows, which then stay in a core's cache
_CACHED_WINNERS = 1 << 18  # worths that are summed in one go


def sums_of_maxima(a: Tensor, b: Tensor) -> Tensor:
    """Σ_k max(a_pk, b_lk) [P, L] of the rows of [P, N] and [L, N]."""
    if a.is_cuda and a.dtype == b.dtype == torch.float32 and find_spec("triton"):
        from esparse_trt.sparsity import maxima_kernel  # imports Triton, which CPU builds of torch lack

        return maxima_kernel.sums_of_maxima(a, b)
    return (a.sum(1, keepdim=True) + b.sum(1) + _l1_distance(a, b)) / 2


def sums_of_winners(a: Tensor, worth_a: Tensor, b: Tensor, worth_b: Tensor) -> Tensor:
    """Σ_k (worth_b_lk where b_lk > a_pk, else worth_a_pk) [P, L] of rows [P, N] and [L, N]."""
    if a.is_cuda and a.dtype == b.dtype == torch.float32 and find_spec("triton"):
        from esparse_trt.sparsity import maxima_kernel

        return maxima_kernel.sums_of_winners(a, worth_a, b, worth_b)
    sums = worth_a.sum(1, keepdim=True).repeat(1, len(b))
    parts = (x.contiguous().split(_CACHED_COLUMNS, 1) for x in (a, worth_a, b, worth_b))
    for x, worth_x, y, worth_y in zip(*parts, strict=True):
        rows = max(1, _CACHED_WINNERS // y.numel())
        wins = y.new_empty(rows, *y.shape)  # 0 or 1: as bool they would be turned into numbers, slowly
        for p in range(0, len(x), rows):
            mine, other = x[p : p + rows].unsqueeze(1), worth_x[p : p + rows].unsqueeze(1)
            won = torch.gt(y, mine, out=wins[: len(mine)]).mul_(worth_y - other)
            sums[p : p + rows] += won.sum(2)
    return sums


def _l1_distance(a: Tensor, b: Tensor) -> Tensor:
    """L1 distances [P, L].

    A CPU sums over slices of the columns: torch walks whole rows for every pair, and those of 10 000 columns
    come from memory each time (*measured*: slices are 1.4 to 2.9 times as fast at N = 9728).
    """
    if a.device.type != "cpu":
        return torch.cdist(a, b, p=1.0)
    distance = a.new_zeros(len(a), len(b))
    for x, y in zip(a.split(_CACHED_COLUMNS, 1), b.split(_CACHED_COLUMNS, 1), strict=True):
        distance += torch.cdist(x, y, p=1.0)
    return distance
