"""Weight update: the kept weights are re-fitted so that the layer's outputs change least (OBS).

For W [N, K] and H = Xᵀ X the error of a pruned Ŵ is tr((W−Ŵ) H (W−Ŵ)ᵀ), row by row. Let A = H⁻¹ over the
channels that are still free: those of the current group of m and all to its right. With H⁻¹ = Uᵀ U (see
`hessian`), A = U_fᵀ U_f of the rows and columns f of U. Pruning the channels P of the group in a row w costs
w_P (A_PP)⁻¹ w_Pᵀ, and with λ = w_P (A_PP)⁻¹ the update w ← w − λ A_P,: makes up for it as well as the free
weights can. In terms of e = λ U_gPᵀ, g the group, that is w ← w − e U_g,:, so that a whole block of groups is
handed on to the columns right of it by one product (the lazy updates of SparseGPT, arXiv 2301.00774).

`sweep: group` takes P as a whole: it tries all C(m, n) masks of a group with their exact cost, and the
group's own kept weights adapt too. `sweep: column` is SparseGPT: the mask by (w_j / U_jj)², then one column
after the other, each making up only to its right.

A sweep never looks back. `refit` then runs preconditioned conjugate gradients over all kept weights of a
row at once, with the mask fixed (as ALPS does, arXiv 2406.07831), towards their least-squares optimum.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from esparse_trt.errors import EsparseError
from esparse_trt.records import UpdateRecord
from esparse_trt.sections import UpdateSection
from esparse_trt.sparsity.hessian import factor
from esparse_trt.sparsity.pattern import Pattern, nm_mask

_MOST_CHOICES = 256  # masks of a group that are tried one by one: all patterns up to 4:8, and 2:16
_SOLVED = 1e-10  # of the residual's squared norm: rows below it are left alone
_CHOICE_ELEMENTS = 1 << 26  # costs (rows times masks) that exist at a time


class Updated(NamedTuple):
    """A re-fitted weight, in the order of channels it was given in."""

    weight: Tensor  # float32 [N, K], zero where pruned
    mask: Tensor  # bool [N, K], True where kept
    record: UpdateRecord


def update(
    weight: Tensor,
    hessian: Tensor,
    mask: Tensor | None,
    pattern: Pattern,
    section: UpdateSection,
    *,
    where: str = "prune.update",
) -> Updated:
    """Prune a weight and re-fit what is left of it.

    Args:
        weight: [N, K] with channels in the order that the pattern groups; rows of several layers that read
            the same tensor may be stacked, as they share H.
        hessian: float32 [K, K], Xᵀ X in the same order.
        mask: what to keep; None: chosen group by group from the weights as updated so far.
        where: name of the site in errors.
    """
    dense = weight.float()
    upper, damping = factor(hessian, section.damping, where)
    fitted, kept = _sweep(dense, upper, mask, pattern, section)
    fitted = refit(dense, fitted, kept, hessian, damping, section.refit)
    record = UpdateRecord(
        damping=damping,
        masked_error=_error(dense, dense * kept, hessian),
        error=_error(dense, fitted, hessian),
    )
    return Updated(fitted, kept, record)


def _sweep(
    dense: Tensor, upper: Tensor, mask: Tensor | None, pattern: Pattern, section: UpdateSection
) -> tuple[Tensor, Tensor]:
    """The sweep over all columns; returns the updated weight and what it kept of it."""
    weight, kept = dense.clone(), torch.empty_like(dense, dtype=torch.bool)
    width = max(1, section.block // pattern.group) * pattern.group
    solve = _Columns(upper, pattern) if section.sweep == "column" else _Groups(upper, pattern)
    for start in range(0, weight.shape[1], width):
        stop = min(start + width, weight.shape[1])
        errors = weight.new_empty(len(weight), stop - start)
        for left in range(start, stop, pattern.group):
            group = slice(left, left + pattern.group)
            wanted = None if mask is None else mask[:, group]
            kept[:, group], error = solve(weight[:, group], group, wanted)
            weight[:, left:stop] -= error @ upper[group, left:stop]
            errors[:, left - start : left - start + pattern.group] = error
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return weight.mul_(kept), kept  # pruned weights have become rounding errors


class _Columns:
    """One group as SparseGPT has it: e_j = (w_j − Σ_{i<j} e_i U_ij) / U_jj of pruned columns, in turn."""

    def __init__(self, upper: Tensor, pattern: Pattern) -> None:
        self.upper = upper
        self.pattern = pattern

    def __call__(self, weight: Tensor, group: slice, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        upper = self.upper[group, group]
        if mask is None:
            mask = nm_mask((weight / upper.diagonal()).square(), self.pattern)
        error = torch.zeros_like(weight)
        for j in range(self.pattern.group):
            now = weight[:, j] - error[:, :j] @ upper[:j, j]
            error[:, j] = torch.where(mask[:, j], 0, now / upper[j, j])
        return mask, error


class _Groups:
    """One group as a whole: the cheapest of its C(m, n) masks, and λ = w_P (A_PP)⁻¹ of the pruned P."""

    def __init__(self, upper: Tensor, pattern: Pattern) -> None:
        count = math.comb(pattern.group, pattern.kept)
        if count > _MOST_CHOICES:
            raise EsparseError(
                f"a group of {pattern} has {count} masks, too many to try each",
                where="prune.update.sweep",
                fix="set it to column, or choose a pattern with smaller groups",
            )
        kept = torch.tensor(list(combinations(range(pattern.group), pattern.kept)), device=upper.device)
        self.kept = torch.zeros(count, pattern.group, dtype=torch.bool, device=upper.device)
        self.kept.scatter_(1, kept, True)
        self.pattern = pattern
        self.upper = upper
        # U of each group [G, m, m], and (A_PP)⁻¹ of each group and mask [G, C, m, m], zero outside of P.
        tiles = upper.unflatten(0, (-1, pattern.group)).unflatten(2, (-1, pattern.group))
        self.tiles = tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        free = (self.tiles.mT @ self.tiles).unsqueeze(1)
        both = ~self.kept.unsqueeze(1) & ~self.kept.unsqueeze(2)
        eye = torch.eye(pattern.group, dtype=upper.dtype, device=upper.device)
        self.inverse = torch.linalg.inv_ex(torch.where(both, free, eye))[0] * both

    def __call__(self, weight: Tensor, group: slice, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        index = group.start // self.pattern.group
        inverse = self.inverse[index]
        choice = self._cheapest(weight, inverse) if mask is None else self._number(mask)
        multiplier = (weight.unsqueeze(1) @ inverse[choice]).squeeze(1)
        return self.kept[choice], multiplier @ self.tiles[index].mT

    def _cheapest(self, weight: Tensor, inverse: Tensor) -> Tensor:
        """The mask [N] with the least w_P (A_PP)⁻¹ w_Pᵀ."""
        costs = inverse.flatten(1).T
        rows = weight.split(max(1, _CHOICE_ELEMENTS // costs.shape[1]))
        return torch.cat([((w.unsqueeze(2) * w.unsqueeze(1)).flatten(1) @ costs).argmin(1) for w in rows])

    def _number(self, mask: Tensor) -> Tensor:
        """Which of the masks the rows [N, m] have: the one that agrees most."""
        return (mask.to(self.upper.dtype) @ self.kept.to(self.upper.dtype).T).argmax(1)


def refit(dense: Tensor, start: Tensor, kept: Tensor, hessian: Tensor, damping: float, steps: int) -> Tensor:
    """Minimise the damped error of every row over its kept weights, by conjugate gradients from `start`.

    The system of a row is H restricted to its kept channels; rows differ in which, so all are solved at once
    by masking products with H. The preconditioner is the diagonal.
    """
    diagonal = hessian.diagonal()
    shift = damping * diagonal.mean()
    precondition = kept / (diagonal + shift).clamp_min(torch.finfo(hessian.dtype).tiny)
    weight = start.clone()
    change = dense - weight
    residual = (change @ hessian + shift * change) * kept
    direction = residual * precondition
    size = (residual * direction).sum(1, keepdim=True)
    solved = _SOLVED * size
    for _ in range(steps):
        if not bool((size > solved).any()):
            break
        image = (direction @ hessian + shift * direction) * kept
        curved = (direction * image).sum(1, keepdim=True)
        length = torch.where((size > solved) & (curved > 0), size / curved, 0)
        weight += length * direction
        residual -= length * image
        scaled = residual * precondition
        before, size = size, (residual * scaled).sum(1, keepdim=True)
        direction = scaled + torch.where(before > 0, size / before, 0) * direction
    return weight


def _error(dense: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    """‖(W−Ŵ) Xᵀ‖² / ‖W Xᵀ‖²; 0 where the dense layer puts out nothing."""
    change = dense - pruned
    lost = ((change @ hessian) * change).sum(dtype=torch.float64)
    total = ((dense @ hessian) * dense).sum(dtype=torch.float64)
    return float(lost / total) if total > 0 else 0.0
