"""Sums of maxima, which every permutation search is made of: Σ_k max(a_pk, b_lk) for all rows p and l.

On a GPU a kernel of one line (`maxima_kernel`) does it. Elsewhere max(x, y) = (x + y + |x − y|) / 2 makes it
an L1 distance, which torch computes with vector instructions.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

_CACHED_COLUMNS = 256  # of two blocks of rows, which then stay in a core's cache


def sums_of_maxima(a: Tensor, b: Tensor) -> Tensor:
    """Σ_k max(a_pk, b_lk) [P, L] of the rows of [P, N] and [L, N]."""
    if a.is_cuda and a.dtype == b.dtype == torch.float32 and find_spec("triton"):
        from esparse_trt.sparsity import maxima_kernel  # imports Triton, which CPU builds of torch lack

        return maxima_kernel.sums_of_maxima(a, b)
    return (a.sum(1, keepdim=True) + b.sum(1) + _l1_distance(a, b)) / 2


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
