"""Perplexity, KL divergence and agreement against a naive float64 reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from esparse_trt.errors import CheckFailed, EsparseError
from esparse_trt.evaluate import perplexity as module
from esparse_trt.evaluate.perplexity import (
    compare_distributions,
    log_ratio,
    perplexity,
    torch_logits,
    window_nll,
)

VOCAB = 50


def random_model(seed: int, dtype: torch.dtype = torch.float32):
    """A bigram model: logits that depend on the current token alone."""
    table = (torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype)
    return lambda ids: table[ids], table.double().numpy()


def naive(table: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Log-probabilities [n, L−1, V] by the definition, one position at a time."""
    out = np.empty((*windows[:, :-1].shape, VOCAB))
    for w, t in np.ndindex(out.shape[:2]):
        p = np.exp(table[windows[w, t]])
        out[w, t] = np.log(p / p.sum())
    return out


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(0, VOCAB, (5, 17), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("chunk", [1, 3 * VOCAB, 1 << 22])
def test_against_naive_reference(windows, batch, chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", chunk)  # one position, a few, all at a time
    (dense, dense_table), (sparse, sparse_table) = random_model(0), random_model(1)
    ids = windows.numpy()
    log_p, log_q = naive(dense_table, ids), naive(sparse_table, ids)
    nll_p = [-np.mean([log_p[w, t, ids[w, t + 1]] for t in range(16)]) for w in range(5)]
    nll_q = [-np.mean([log_q[w, t, ids[w, t + 1]] for t in range(16)]) for w in range(5)]

    found = compare_distributions(windows, dense, sparse, batch=batch)

    np.testing.assert_allclose(found.dense_nll, nll_p, rtol=1e-12)
    np.testing.assert_allclose(found.sparse_nll, nll_q, rtol=1e-12)
    assert found.dense_perplexity == pytest.approx(np.exp(np.mean(nll_p)), rel=1e-12)
    assert found.sparse_perplexity == pytest.approx(np.exp(np.mean(nll_q)), rel=1e-12)
    assert found.kl_divergence == pytest.approx((np.exp(log_p) * (log_p - log_q)).sum(-1).mean(), rel=1e-12)
    assert found.top1_agreement == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).mean(), rel=1e-12)
    assert perplexity(windows, sparse, batch=batch) == pytest.approx(found.sparse_perplexity, rel=1e-12)
    np.testing.assert_allclose(window_nll(windows, dense, batch=batch), nll_p, rtol=1e-12)


def test_kl_is_of_the_dense_distribution(windows):
    """KL is not symmetric; the dense model comes first."""
    uniform = lambda ids: torch.zeros(*ids.shape, 2)  # noqa: E731
    peaked = lambda ids: torch.tensor([0.0, math.log(9)]).expand(*ids.shape, 2)  # noqa: E731
    ids = windows % 2
    assert compare_distributions(ids, uniform, peaked).kl_divergence == pytest.approx(
        0.5 * math.log(0.5 / 0.1) + 0.5 * math.log(0.5 / 0.9)
    )
    assert compare_distributions(ids, peaked, uniform).kl_divergence == pytest.approx(
        0.1 * math.log(0.1 / 0.5) + 0.9 * math.log(0.9 / 0.5)
    )


def test_a_model_against_itself(windows):
    model, _ = random_model(3, torch.float16)
    found = compare_distributions(windows, model, model)
    assert found.sparse_perplexity == found.dense_perplexity
    assert found.kl_divergence == 0.0
    assert found.top1_agreement == 1.0
    assert log_ratio(found.dense_nll, found.sparse_nll) == (0.0, 0.0)


def test_the_uniform_model_has_perplexity_of_the_vocabulary(windows):
    assert perplexity(windows, lambda ids: torch.zeros(*ids.shape, VOCAB)) == pytest.approx(VOCAB)


def test_the_first_token_and_the_last_logits_do_not_count(windows):
    model, _ = random_model(0)

    def spoiled(ids):
        logits = model(ids).clone()
        logits[:, -1] = math.nan
        return logits

    assert perplexity(windows, spoiled) == perplexity(windows, model)


# t quantiles of 97.5 %, from tables
@pytest.mark.parametrize(("n", "t"), [(4, 3.182), (6, 2.571), (11, 2.228), (31, 2.042), (121, 1.980)])
def test_log_ratio_interval_is_paired_student_t(n, t):
    rng = torch.Generator().manual_seed(n)
    dense = torch.randn(n, generator=rng).double() * 10 + 50  # windows differ far more than the models do
    noise = torch.randn(n, generator=rng).double()
    ratio, half = log_ratio(dense, dense + 0.1 + 0.01 * noise)
    assert ratio == pytest.approx(0.1 + 0.01 * noise.mean().item(), abs=1e-9)
    assert half == pytest.approx(t * 0.01 * noise.std().item() / math.sqrt(n), rel=0.01)


def test_no_interval_from_few_windows():
    assert log_ratio(torch.zeros(3), torch.ones(3)) == (1.0, None)


def test_logits_that_are_not_finite_fail_the_check(windows):
    model, _ = random_model(0)

    def broken(ids):
        logits = model(ids).clone()
        logits[:, 7, 3] = math.inf
        return logits

    with pytest.raises(CheckFailed, match="position 7") as error:
        compare_distributions(windows, model, broken)
    assert error.value.where == "sparse model"
    assert "float32" in str(error.value)


@pytest.mark.parametrize("shape", [(0, 16), (4, 1)])
def test_windows_without_a_scored_token(shape):
    with pytest.raises(EsparseError, match="at least one window"):
        perplexity(torch.zeros(shape, dtype=torch.int64), lambda ids: torch.zeros(*ids.shape, VOCAB))


def test_torch_logits_score_as_transformers_does(tiny_llama):
    """The mean loss that transformers computes is the same number."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    ids = torch.randint(0, 320, (3, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert math.log(perplexity(ids, torch_logits(model))) == pytest.approx(loss, rel=1e-6)
