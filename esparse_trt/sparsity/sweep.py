"""SparseGPT (arXiv 2301.00774): pruning as a sweep over the columns, each made up for by those right of it.

For W [N, K] and H = Xᵀ X the error of a pruned Ŵ is tr((W−Ŵ) H (W−Ŵ)ᵀ), row by row. With H⁻¹ = Uᵀ U (see
`hessian`), removing w_j while all columns left of j are fixed costs (w_j / U_jj)², by which a group's mask is
chosen, and the update w ← w − e_j U_j,: with e_j = w_j / U_jj makes up for it as well as the columns right of
j can. A whole block of columns is handed on to the rest by one product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esparse_trt.sparsity.pattern import Pattern
from esparse_trt.sparsity.replay import replay


def sweep(
    dense: Tensor, upper: Tensor, mask: Tensor | None, pattern: Pattern, *, block: int
) -> tuple[Tensor, Tensor]:
    """Prune a weight and update what is kept of it.

    Args:
        dense: [N, K].
        upper: U [K, K].
        mask: what to keep; None: chosen group by group from the weights as updated so far.
        block: columns, a multiple of m, whose errors are handed on at a time.

    Returns:
        the updated weight [N, K], zero where pruned, and what it keeps, bool [N, K].
    """
    weight, kept = dense.clone(), torch.empty_like(dense, dtype=torch.bool)
    for start in range(0, weight.shape[1], block):
        now, right = slice(start, start + block), slice(start + block, None)
        wanted = None if mask is None else mask[:, now]
        kept[:, now], errors = replay(_columns, weight[:, now], upper[now, now], wanted, pattern=pattern)
        weight[:, now] -= errors @ upper[now, now]
        weight[:, right] -= errors @ upper[now, right]
    return weight.mul_(kept), kept  # pruned weights have become rounding errors


def _columns(
    weight: Tensor, upper: Tensor, mask: Tensor | None, *, pattern: Pattern
) -> tuple[Tensor, Tensor]:
    """One block: what is kept, bool [N, B], and e, which is 0 there, [N, B].

    Args:
        weight: [N, B], as updated by all blocks before.
        upper: [B, B], the block's tile of U.
        mask: bool [N, B] or None, as in `sweep`.
    """
    error = torch.zeros_like(weight)
    dropped = torch.empty_like(weight, dtype=torch.bool) if mask is None else ~mask
    scale = upper.diagonal().reciprocal()
    lower = torch.ones(pattern.group, pattern.group, dtype=torch.bool, device=weight.device).tril(-1)
    for left in range(0, weight.shape[1], pattern.group):
        group = slice(left, left + pattern.group)
        now = torch.addmm(weight[:, group], error[:, :left], upper[:left, group], alpha=-1)
        if mask is None:
            mine, other = (saliency := (now * scale[group]).square()).unsqueeze(2), saliency.unsqueeze(1)
            rank = torch.where(lower, other >= mine, other > mine).sum(2)  # as in `nm_mask`, in few launches
            torch.ge(rank, pattern.kept, out=dropped[:, group])
        for j in range(left, left + pattern.group):
            torch.mul(now[:, j - left] * dropped[:, j], scale[j], out=error[:, j])
            now.addr_(error[:, j], upper[j, group], alpha=-1)
    return ~dropped, error
