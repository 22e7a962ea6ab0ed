"""Choosing permutations of input channels that make N:M pruning lose less (DESIGN section 5).

A permutation is chosen to raise the *kept score*: what the best N:M mask of the permuted scores keeps. By
default it is the output error that the scores stand for (`score.error`) that is kept: the squares of
|W_ij|·‖X_j‖₂, of which the pruned ones sum to the layer's squared output error, as far as its inputs are
uncorrelated. Keeping much of the plain scores may still mean losing a few large ones. `objective: score` is
the paper's. Squaring changes no mask, only permutations.

Global naive shuffle. Channels are ranked by descending mean score and dealt out: with G = K/m groups, rank r
goes to group r mod G, slot r div G, so that every group holds one channel of each rank band. (`sort` lays the
ranked channels out contiguously, which makes groups of equals; it exists for the ablation.)

Local block shuffle. Greedy swaps of channels inside blocks of consecutive positions: see `swap`.

Linear assignment. One slot of all groups at a time is given out anew: see `assign`.

What is kept after these may be traded for less output error: see `refine`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from esparse_trt.sections import PermuteSection
from esparse_trt.sparsity.assign import assign
from esparse_trt.sparsity.pattern import Pattern
from esparse_trt.sparsity.permutation import by_head, identity
from esparse_trt.sparsity.swap import local_shuffle


class Choice(NamedTuple):
    """Permutations [..., K] after the global shuffle alone, and after all searches."""

    global_: Tensor
    final: Tensor


def choose(scores: Tensor, pattern: Pattern, section: PermuteSection) -> Choice:
    """Choose a permutation for each of B independent problems.

    Args:
        scores: [B, N, K], what is to be kept of every weight of all layers that read the tensor, their rows
            stacked; K a multiple of m.

    Returns:
        permutations [B, K].
    """
    start = final = _GLOBAL[section.global_](scores, pattern)
    if section.local is not None:
        width = scores.shape[-1] if section.local.block == "full" else section.local.block
        block = max(1, width // pattern.group) * pattern.group
        final = local_shuffle(scores, pattern, start, block=block, rounds=section.local.rounds)
    if section.assign:
        final = assign(scores, pattern, final, section.assign)
    return Choice(start, final)


def choose_heads(
    scores: Tensor, pattern: Pattern, section: PermuteSection, *, heads: int, kv_heads: int
) -> Choice:
    """Choose π [K] for a layer [N, K = heads·D] that reads attention output, one permutation per KV head.

    Nothing leaves its head. The channels c of all query heads of a KV head come from the same value channel
    and move together, so their scores are stacked. Identity where groups of m straddle heads.
    """
    rows, channels = scores.shape
    width = channels // heads
    if width % pattern.group:
        unchanged = identity(channels, scores.device)
        return Choice(unchanged, unchanged)
    stacked = scores.view(rows, kv_heads, heads // kv_heads, width).permute(1, 2, 0, 3).flatten(1, 2)
    choice = choose(stacked, pattern, section)
    return Choice(by_head(choice.global_, heads), by_head(choice.final, heads))


def none(scores: Tensor, pattern: Pattern) -> Tensor:
    """Identity for each problem."""
    return identity(scores.shape[-1], scores.device).repeat(len(scores), 1)


def sort(scores: Tensor, pattern: Pattern) -> Tensor:
    """Channels by descending mean score; among equals the lower channel first."""
    return scores.mean(1, dtype=torch.float64).argsort(dim=-1, descending=True, stable=True)


def deal(scores: Tensor, pattern: Pattern) -> Tensor:
    """Rank r goes to group r mod G, slot r div G."""
    return sort(scores, pattern).unflatten(-1, (pattern.group, -1)).transpose(-1, -2).flatten(-2)


_GLOBAL = {"deal": deal, "sort": sort, "none": none}
