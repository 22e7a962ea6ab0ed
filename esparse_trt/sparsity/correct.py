"""Correction: before it is pruned, a layer is re-fitted to make up for what was lost before it.

The layer reads X [T, K] where it has D in the dense model. Let E [T, N] be what it should put out minus what
it does. Then W is replaced by W' = W + share · Eᵀ X H⁻¹ with H = Xᵀ X damped: the regression of E on X, part
of the way, as all of it fits noise too. Layers differ in what they should put out:

    q, k, v, gate, up   what they do in the dense model: E = D Wᵀ − X Wᵀ, as in asymmetric calibration (GPTAQ,
                        arXiv 2504.02692, there for quantisation)
    o, down             what the residual stream lacks behind them. With h the stream in front of the block,
                        E = (h_D + D Wᵀ) − (h_X + X Wᵀ), and for `down` with o's outputs added to both

The share and the stream's part are our own. Where the stream does not take up the outputs as they are, as
with norms behind them (Gemma 3), every layer is of the first kind. So it is where weights are to stay as they
are, which leaves making up to the permutation (see `refine`).

Tokens with massive activations (arXiv 2402.17762; in Qwen2.5 the first of a window) are left out of E: most
of what the stream lacks is theirs, and no later layer can restore it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from esparse_trt.sparsity.blockwise import BlockwiseModel
from esparse_trt.sparsity.hessian import factor
from esparse_trt.sparsity.layers import PlannedSite
from esparse_trt.sparsity.trace import watched

_MASSIVE = 4.0  # times the median norm
_ADDS_UP = 1e-2  # share of a token's output that the parts may miss, in float16


def corrected(
    weight: Tensor, hessian: Tensor, missing: Tensor, share: float, damping: float, where: str
) -> Tensor:
    """W' of the module docstring: float32 [N, K].

    Args:
        weight: [N, K].
        hessian: Xᵀ X [K, K].
        missing: Eᵀ X [N, K].
    """
    upper, _ = factor(hessian, damping, where)
    return weight.to(hessian.dtype) + share * (missing @ upper.mT @ upper)


@torch.no_grad()
def missing(
    model: BlockwiseModel,
    index: int,
    site: PlannedSite,
    writers: Sequence[str],
    dense: Mapping[str, Tensor],
    counts: Tensor,
) -> Tensor:
    """Eᵀ X of a site's pruned layers, stacked: float32 [N, K].

    Args:
        index: a resident block whose sites before this one are pruned.
        writers: the block's layers that the residual stream takes up, in order.
        dense: the block's weights in the dense model.
        counts: float32 [T], how much each token counts: 0 where `ordinary_tokens` says that it does not.
    """
    pruned = [layer.name for layer in site.pruned]
    before = list(writers[: writers.index(site.name) + 1]) if site.name in writers else []
    start = 0
    sums = torch.zeros(sum(layer.shape[0] for layer in site.pruned), site.channels, device=model.device)

    def outputs(hidden: Tensor) -> Tensor:
        """What the pruned layers put out, or the stream behind them, side by side: [T, N]."""
        seen.clear()
        model.reach(index, hidden, pruned[-1])
        if before:
            return torch.stack([_rows(hidden), *(_rows(seen[name][1]) for name in before)]).sum(0)
        return torch.cat([_rows(seen[name][1]) for name in pruned], dim=1)

    with watched(model, [*pruned, *before]) as seen:
        for wanted, hidden in model.pairs():
            with model.with_weights(dense):
                lacking = outputs(wanted)
            lacking -= outputs(hidden)
            lacking *= counts[start : start + len(lacking)].unsqueeze(1)
            start += len(lacking)
            sums.addmm_(lacking.T, _rows(seen[pruned[0]][0]))
    return sums


@torch.no_grad()
def ordinary_tokens(model: BlockwiseModel, index: int) -> Tensor:
    """Which tokens of the dense model the resident block puts out nothing massive for: bool [T]."""
    assert model.dense is not None
    outputs = (model.forward(index, x.to(model.device)) for x in model.dense.split(model.batch_size))
    sizes = torch.cat([_rows(output).norm(dim=1) for output in outputs])
    return sizes <= _MASSIVE * sizes.median()


@torch.no_grad()
def adds_up(model: BlockwiseModel, index: int, writers: Sequence[str]) -> bool:
    """Whether a resident block puts out what it reads plus the outputs of these layers."""
    assert model.hidden is not None
    hidden = model.hidden[: min(model.batch_size, len(model.hidden))].to(model.device)
    with watched(model, writers) as seen:
        output = _rows(model.forward(index, hidden))
    parts = torch.stack([_rows(hidden), *(_rows(seen[name][1]) for name in writers)]).sum(0)
    differs = (output - parts).norm(dim=1) / output.norm(dim=1)
    return bool(differs.mean() <= _ADDS_UP)


def _rows(x: Tensor) -> Tensor:
    """[..., C] -> float32 [T, C]."""
    return x.flatten(0, -2).float()
