"""Weight update: the kept weights are re-fitted so that the layer's outputs change least.

SparseGPT's sweep (see `sweep`) chooses a mask and makes up for what it prunes, but never looks back. Passes
of block coordinate descent (see `descent`) then improve mask and values, group by group. `refit` at last runs
preconditioned conjugate gradients over all kept weights of a row at once, with the mask fixed (as ALPS does,
arXiv 2406.07831), towards their least-squares optimum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from esparse_trt.records import UpdateRecord
from esparse_trt.sections import UpdateSection
from esparse_trt.sparsity.descent import descend
from esparse_trt.sparsity.hessian import damped, factor
from esparse_trt.sparsity.pattern import Pattern
from esparse_trt.sparsity.sweep import sweep

_SOLVED = 1e-10  # of the residual's squared norm: rows below it are left alone


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
    block = max(1, section.block // pattern.group) * pattern.group
    upper, damping = factor(hessian, section.damping, where)
    fitted, kept = sweep(dense, upper, mask, pattern, block=block)
    quadratic = damped(hessian, damping)
    for _ in range(section.descent):
        fitted, kept = descend(dense, fitted, quadratic, pattern, block=block, fixed=mask)
    fitted = refit(dense, fitted, kept, quadratic, section.refit)
    record = UpdateRecord(
        damping=damping,
        masked_error=_error(dense, dense * kept, hessian),
        error=_error(dense, fitted, hessian),
    )
    return Updated(fitted, kept, record)


def refit(dense: Tensor, start: Tensor, kept: Tensor, hessian: Tensor, steps: int) -> Tensor:
    """Minimise the error of every row over its kept weights, by conjugate gradients from `start`.

    The system of a row is H restricted to its kept channels; rows differ in which, so all are solved at once
    by masking products with H. The preconditioner is the diagonal.

    Args:
        dense: [N, K].
        start: [N, K], zero where not `kept`.
        hessian: [K, K], damped.
    """
    precondition = kept / hessian.diagonal().clamp_min(torch.finfo(hessian.dtype).tiny)
    weight = start.clone()
    change = dense - weight
    residual = (change @ hessian) * kept
    direction = residual * precondition
    size = (residual * direction).sum(1, keepdim=True)
    solved = _SOLVED * size
    for _ in range(steps):
        if not bool((size > solved).any()):
            break
        image = (direction @ hessian) * kept
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
