"""How important each weight is: one function per method, listed in `SCORES`.

With W [N, K] and calibration inputs X [T, K], a score is a non-negative matrix [N, K]; N:M pruning keeps the
highest scores of each group along K:

    magnitude   |W_ij|
    wanda       |W_ij| · ‖X_j‖₂                                                     (arXiv 2306.11695)
    ria         (|W_ij| / Σ_i |W_ij| + |W_ij| / Σ_j |W_ij|) · ‖X_j‖₂^½              (ICLR 2024, Plug-and-Play)
    e_sparse    |W_ij| · (IR_j + α · RMS_j)                                         (arXiv 2310.15929)
    obd         W_ij² · ‖X_j‖₂²: the Hessian's diagonal alone, so Wanda's mask      (LeCun et al. 1989)
    obs         W_ij² / [H⁻¹]_jj, H = Xᵀ X damped: see `hessian`                    (arXiv 2301.00774)

E-Sparse adds the information richness IR_j = −Σ_b p_bj ln p_bj, the entropy of channel j's histogram, to its
amplitude. ‖X_j‖₂ grows with √T and the entropy does not, so the amplitude here is RMS_j = ‖X_j‖₂ / √T: the
balance does not depend on how much text was read. The defaults of α and of the number of bins are our own.
Other measures of information may take the entropy's place, see `calibrate`. Where tokens are weighted, each
output i has norms of its own, S_ij ‖X_j‖₂, and weights S_ij W_ij in front of H: see `tokens`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from esparse_trt.sections import ScoreSection
from esparse_trt.sparsity.hessian import curvature


@dataclass(frozen=True)
class ChannelStatistics:
    """What the scores know of a layer's inputs X [T, K]."""

    norm: Tensor  # [K], ‖X_j‖₂
    information: (
        Tensor | None
    )  # [K], as `score.information` measures it; None where the method does not use it
    tokens: int  # T
    hessian: Tensor | None = None  # float32 [K, K], Xᵀ X; None where nothing uses it
    scale: Tensor | None = None  # [N, K], S of `tokens`: how much larger inputs are where outputs count

    def of_rows(self, start: int, end: int) -> ChannelStatistics:
        """The same for outputs start, ..., end − 1."""
        return self if self.scale is None else replace(self, scale=self.scale[start:end])

    def scaled(self, weight: Tensor) -> Tensor:
        """W ∘ S: the weights [N, K] of a layer that reads X as each output sees it."""
        return weight if self.scale is None else weight * self.scale

    def unscaled(self, weight: Tensor) -> Tensor:
        """What `scaled` turns into this."""
        return weight if self.scale is None else weight / self.scale

    @property
    def norms(self) -> Tensor:
        """‖X_j‖₂ as each output sees it: [N, K], or [K] where all see the same."""
        return self.norm if self.scale is None else self.norm * self.scale


ScoreFunction = Callable[[Tensor, ChannelStatistics, ScoreSection], Tensor]


def score(weight: Tensor, statistics: ChannelStatistics | None, section: ScoreSection) -> Tensor:
    """Score a weight [N, K] with the recipe's method; float32, or float64 where the weight is.

    Args:
        statistics: of the layer's inputs; None only where `needs_statistics` is false.
    """
    weight = weight if weight.dtype == torch.float64 else weight.float()
    return SCORES[section.method](weight, statistics, section)  # type: ignore[arg-type]


def needs_statistics(section: ScoreSection) -> bool:
    """Whether the method looks at calibration inputs at all."""
    return section.method != "magnitude"


def needs_information(section: ScoreSection) -> bool:
    """Whether the method needs histograms, and with them a second pass over the inputs."""
    return section.method == "e_sparse" and section.information != "none"


def needs_hessian(section: ScoreSection) -> bool:
    """Whether the method needs Xᵀ X."""
    return section.method == "obs"


def error(scores: Tensor, section: ScoreSection) -> Tensor:
    """What pruning a weight costs in squared output error, by a score: its square, or it is that already."""
    return scores if section.method in ("obd", "obs") else scores.square()


def magnitude(weight: Tensor, statistics: ChannelStatistics, section: ScoreSection) -> Tensor:
    """|W_ij|."""
    return weight.abs()


def wanda(weight: Tensor, statistics: ChannelStatistics, section: ScoreSection) -> Tensor:
    """|W_ij| · ‖X_j‖₂."""
    return weight.abs() * statistics.norms.to(weight.dtype)


def ria(weight: Tensor, statistics: ChannelStatistics, section: ScoreSection) -> Tensor:
    """Relative importance and activations: the share of row and column, times ‖X_j‖₂^½."""
    size = weight.abs()
    tiny = torch.finfo(size.dtype).tiny  # a row or column of zeros has importance 0, not 0/0
    columns, rows = size.sum(0).clamp_min(tiny), size.sum(1, keepdim=True).clamp_min(tiny)
    return (size / columns + size / rows) * statistics.norms.to(size.dtype).sqrt()


def e_sparse(weight: Tensor, statistics: ChannelStatistics, section: ScoreSection) -> Tensor:
    """|W_ij| · (IR_j + α · RMS_j); without the information it ranks as Wanda does."""
    channel = section.alpha * statistics.norms / statistics.tokens**0.5
    if needs_information(section):
        assert statistics.information is not None
        channel = channel + statistics.information
    return weight.abs() * channel.to(weight.dtype)


def obd(weight: Tensor, statistics: ChannelStatistics, section: ScoreSection) -> Tensor:
    """W_ij² · ‖X_j‖₂²."""
    return wanda(weight, statistics, section).square()


def obs(weight: Tensor, statistics: ChannelStatistics, section: ScoreSection) -> Tensor:
    """W_ij² / [H⁻¹]_jj."""
    assert statistics.hessian is not None
    seen = statistics.scaled(weight)
    return seen.square() * curvature(statistics.hessian, section.damping).to(seen.dtype)


SCORES: dict[str, ScoreFunction] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "ria": ria,
    "e_sparse": e_sparse,
    "obd": obd,
    "obs": obs,
}
