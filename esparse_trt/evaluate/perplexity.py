"""Perplexity, KL divergence and top-1 agreement over token windows, for any runtime that gives logits.

The protocol: the text is cut into consecutive windows of equal length that do not overlap, each beginning
with BOS where the tokenizer has one. A window is run from an empty cache, and every token after its first is
scored given all tokens before it in the window:

    nll_w = −1/(L−1) · Σ_{t=1}^{L−1} ln p(x_t | x_0 … x_{t−1}),    perplexity = exp(mean_w nll_w)

Probabilities are computed in float64 from the logits as the runtime gave them. As the windows are of equal
length, the mean over windows is the mean over tokens.

A runtime is a function `LogitsFn`: token ids [B, L] (int64, on the CPU) -> logits [B, L, V] (any float dtype,
any device).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor
from transformers import PreTrainedModel

from esparse_trt.errors import CheckFailed, EsparseError
from esparse_trt.progress import track

LogitsFn = Callable[[Tensor], Tensor]

# Elements of the log-probabilities that exist at a time, in float64: 8 MiB on the CPU, 128 MiB on a GPU.
_CHUNK = 1 << 20
_CHUNK_GPU = 1 << 24


@dataclass(frozen=True)
class Distributions:
    """How the next-token distributions of two models differ on the same windows."""

    dense_nll: Tensor  # [n] float64, mean over the window's scored tokens, nats
    sparse_nll: Tensor  # [n]
    kl_divergence: float  # mean over positions of KL(dense ‖ sparse), nats
    top1_agreement: float  # share of positions whose most probable token is the same

    @property
    def dense_perplexity(self) -> float:
        """exp of the mean negative log-likelihood of the dense model."""
        return _exp_mean(self.dense_nll)

    @property
    def sparse_perplexity(self) -> float:
        """exp of the mean negative log-likelihood of the sparse model."""
        return _exp_mean(self.sparse_nll)


def perplexity(windows: Tensor, logits_fn: LogitsFn, *, batch: int = 1, what: str = "perplexity") -> float:
    """Perplexity of a model on windows [n, L] of token ids.

    Args:
        windows: int64 [n, L], L >= 2; see the module docstring.
        logits_fn: the model.
        batch: windows run at a time.
        what: name of the work in the progress display and in errors.

    Raises:
        CheckFailed: the model's logits are not finite.
    """
    return _exp_mean(window_nll(windows, logits_fn, batch=batch, what=what))


def window_nll(windows: Tensor, logits_fn: LogitsFn, *, batch: int = 1, what: str = "perplexity") -> Tensor:
    """Mean negative log-likelihood of each window's scored tokens, nats: float64 [n]."""
    total = torch.zeros(len(windows), dtype=torch.float64)
    for now, ids in _batches(windows, batch, what):
        for rows, log_p in _log_softmax(_checked(logits_fn(ids), ids, what)):
            total[now] -= _picked(log_p, ids, rows)
    return total / (windows.shape[1] - 1)


def compare_distributions(
    windows: Tensor, dense_fn: LogitsFn, sparse_fn: LogitsFn, *, batch: int = 1
) -> Distributions:
    """Run both models over the windows [n, L] once and compare their next-token distributions.

    All figures are taken at the L − 1 scored positions of each window. KL(p ‖ q) = Σ_v p_v (ln p_v − ln q_v)
    with p the dense model: what the sparse model loses on the text the dense model would have written.

    Raises:
        CheckFailed: logits are not finite; names the model.
    """
    dense_nll, sparse_nll = torch.zeros(2, len(windows), dtype=torch.float64)
    kl = agree = 0.0
    for now, ids in _batches(windows, batch, "dense and sparse on the evaluation text"):
        dense = _checked(dense_fn(ids), ids, "dense model")
        sparse = _checked(sparse_fn(ids), ids, "sparse model").to(dense.device)
        for (rows, log_p), (_, log_q) in zip(_log_softmax(dense), _log_softmax(sparse), strict=True):
            dense_nll[now] -= _picked(log_p, ids, rows)
            sparse_nll[now] -= _picked(log_q, ids, rows)
            agree += (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()
            kl += (log_p.exp() * (log_p - log_q)).sum().item()
    scored = windows.shape[1] - 1
    return Distributions(
        dense_nll=dense_nll / scored,
        sparse_nll=sparse_nll / scored,
        kl_divergence=max(
            kl / (len(windows) * scored), 0.0
        ),  # where the two are equal, rounding may leave −1e-17
        top1_agreement=agree / (len(windows) * scored),
    )


def log_ratio(dense_nll: Tensor, sparse_nll: Tensor) -> tuple[float, float | None]:
    """ln(sparse perplexity / dense perplexity) and the half width of its 95 % confidence interval.

    Student's t on the differences [n] of the windows' mean negative log-likelihoods: paired, so that what
    makes a window hard for both models cancels. Windows are taken as independent. The t quantile is the
    expansion in 1/ν of Abramowitz and Stegun 26.7.5, within 1 % for ν >= 3; None below 4 windows.
    """
    difference = sparse_nll.double() - dense_nll.double()
    n = len(difference)
    if n < 4:
        return difference.mean().item(), None
    z, v = NormalDist().inv_cdf(0.975), n - 1
    quantile = (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )
    return difference.mean().item(), quantile * difference.std().item() / math.sqrt(n)


def torch_logits(model: PreTrainedModel) -> LogitsFn:
    """The logits function of a PyTorch model, on the device it lies on."""

    @torch.inference_mode()
    def logits(ids: Tensor) -> Tensor:
        return model(input_ids=ids.to(model.device), use_cache=False).logits

    return logits


# --- pieces ----------------------------------------------------------------------------------------------


def _batches(windows: Tensor, batch: int, what: str) -> Iterator[tuple[slice, Tensor]]:
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.shape[1] < 2:
        raise EsparseError(
            f"windows of shape {list(windows.shape)}: at least one window of at least 2 tokens is needed",
            where=what,
            fix="give a longer evaluation text or a smaller verify.length",
        )
    for start in track(range(0, len(windows), batch), what, unit="batch"):
        now = slice(start, start + batch)
        yield now, windows[now]


def _checked(logits: Tensor, ids: Tensor, what: str) -> Tensor:
    """Logits of the scored positions [B, L−1, V]; raises where they are not finite."""
    logits = logits[:, :-1]
    if not bool(torch.isfinite(logits).all()):
        position = int((~torch.isfinite(logits)).any(-1)[0].int().argmax())
        raise CheckFailed(
            f"logits are NaN or Inf, first at position {position} of a window of {ids.shape[1]} tokens",
            where=what,
            fix="the activations overflow the export type: set export.dtype to float32",
        )
    return logits


def _log_softmax(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """float64 log-probabilities, some positions at a time so that a large vocabulary fits in memory."""
    batch, length, vocab = logits.shape
    step = max(1, (_CHUNK if logits.device.type == "cpu" else _CHUNK_GPU) // (batch * vocab))
    for start in range(0, length, step):
        rows = slice(start, min(start + step, length))
        yield rows, torch.log_softmax(logits[:, rows].double(), dim=-1)


def _picked(log_p: Tensor, ids: Tensor, rows: slice) -> Tensor:
    """Log-probabilities of the tokens that follow the positions `rows`, summed: [B], on the CPU."""
    targets = ids[:, rows.start + 1 : rows.stop + 1].to(log_p.device)
    return log_p.gather(-1, targets.unsqueeze(-1)).sum(dim=(1, 2)).cpu()


def _exp_mean(nll: Tensor) -> float:
    mean = nll.mean().item()
    return math.exp(mean) if mean < 700 else math.inf
