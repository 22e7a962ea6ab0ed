"""Permutation algebra: int64 tensors π [K] with x' = x[..., π] and W' = W[:, π].

Position p of the permuted order holds channel π[p].
"""

from __future__ import annotations

import torch
from torch import Tensor


def identity(channels: int, device: torch.device | None = None) -> Tensor:
    """The permutation that leaves everything in place."""
    return torch.arange(channels, device=device)


def is_identity(permutation: Tensor) -> bool:
    """Whether nothing moves."""
    return bool((permutation == identity(len(permutation), permutation.device)).all())


def inverse(permutation: Tensor) -> Tensor:
    """π⁻¹ with x[..., π][..., π⁻¹] = x; its entry c is the position of channel c under π."""
    return torch.argsort(permutation)


def compose(first: Tensor, second: Tensor) -> Tensor:
    """The permutation that applies `first`, then `second`: x[..., first][..., second]; batched [..., K]."""
    return first.gather(-1, second)


def by_head(permutations: Tensor, heads: int) -> Tensor:
    """One permutation per KV head [G, D] -> π over all query heads [heads·D], equal within a KV group."""
    groups, width = permutations.shape
    shared = permutations.repeat_interleave(heads // groups, dim=0)
    return (shared + torch.arange(heads, device=shared.device).unsqueeze(1) * width).flatten()
