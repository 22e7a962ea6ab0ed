"""The Hessian H = Xᵀ X [K, K] of a layer's squared output error, damped and factored.

Of inputs X [T, K], a change ΔW [N, K] of the weight costs ‖ΔW Xᵀ‖² = tr(ΔW H ΔWᵀ): one H for every row and
for every layer that reads X. What is factored is H + δ·mean(diag H)·I. The damping δ keeps a singular H (dead
or duplicate channels, fewer tokens than channels) invertible; where float32 still cannot factor it, δ is
raised tenfold until it can.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esparse_trt.errors import EsparseError

_LEAST_DAMPING = 1e-6  # what a damping of 0 is raised to first, about the rounding of float32
_MOST_DAMPING = 10.0  # H is then all but diagonal: it fails for another reason


def factor(hessian: Tensor, damping: float, where: str = "hessian") -> tuple[Tensor, float]:
    """The upper triangular U [K, K] with H⁻¹ = Uᵀ U, and the damping δ that it took.

    Row j of U beyond the diagonal says how channels right of j make up for a change of j, once those left of
    it are fixed: what the column sweep of SparseGPT (arXiv 2301.00774) walks along.

    Raises:
        EsparseError: no damping helps, so H is not a Hessian at all.
    """
    # H = R Rᵀ with R upper is the ordinary factorisation of H with both axes reversed; then U = R⁻¹. One
    # factorisation, and no inverse that would have to be factored again.
    while damping <= _MOST_DAMPING:
        lower, failed = torch.linalg.cholesky_ex(damped(hessian, damping).flip(0, 1))
        if not failed:
            eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
            upper = torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1)
            if bool(upper.isfinite().all()):
                return upper, damping
        damping = max(10 * damping, _LEAST_DAMPING)
    raise EsparseError(
        f"the Hessian of {len(hessian)} channels is not positive semidefinite at any damping",
        where=where,
        fix="see whether the dense model overflows on the calibration text, or add the layer to "
        "prune.layers.exclude",
    )


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H + δ·mean(diag H)·I; δ·I where no input ever was anything but 0, so that any weight is as good."""
    scale = hessian.diagonal().mean()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return hessian + torch.diag((damping * scale).expand(len(hessian)))


def curvature(hessian: Tensor, damping: float) -> Tensor:
    """1 / [H⁻¹]_jj [K]: what removing a weight of 1 costs once all others of its row have adapted."""
    upper, _ = factor(hessian, damping)
    return upper.square().sum(0).reciprocal()
