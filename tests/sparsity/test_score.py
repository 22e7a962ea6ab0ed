import math

import pytest
import torch

from esparse_trt.sections import ScoreSection
from esparse_trt.sparsity.pattern import Pattern, nm_mask
from esparse_trt.sparsity.score import (
    SCORES,
    ChannelStatistics,
    error,
    needs_hessian,
    needs_information,
    needs_statistics,
    score,
)

N, K, T, BINS, ALPHA = 5, 8, 60, 16, 3.0


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(N, K, generator=generator, dtype=torch.float64)
    x = torch.randn(T, K, generator=generator, dtype=torch.float64) * torch.arange(1, K + 1)
    return weight, x


def naive_entropy(column):
    low, high = min(column), max(column)
    counts = [0] * BINS
    for value in column:
        counts[min(int((value - low) / (high - low) * BINS), BINS - 1)] += 1
    return -sum(c / len(column) * math.log(c / len(column)) for c in counts if c)


def naive(method, weight, x, i, j):
    """One element, by the formulas of DESIGN section 4, on Python floats."""
    w = [[abs(v) for v in row] for row in weight.tolist()]
    column = [row[j] for row in x.tolist()]
    norm = math.sqrt(sum(v * v for v in column))
    if method == "magnitude":
        return w[i][j]
    if method == "wanda":
        return w[i][j] * norm
    if method == "ria":
        return (w[i][j] / sum(row[j] for row in w) + w[i][j] / sum(w[i])) * math.sqrt(norm)
    if method == "obd":
        return w[i][j] ** 2 * sum(v * v for v in column)
    if method == "obs":
        hessian = x.T @ x
        hessian += 0.01 * hessian.diagonal().mean() * torch.eye(K, dtype=x.dtype)
        return w[i][j] ** 2 / float(hessian.inverse()[j, j])
    return w[i][j] * (naive_entropy(column) + ALPHA * norm / math.sqrt(T))


@pytest.mark.parametrize("method", list(SCORES))
def test_against_a_naive_loop(layer, method):
    weight, x = layer
    entropy = torch.tensor([naive_entropy(column) for column in x.T.tolist()], dtype=torch.float64)
    statistics = ChannelStatistics(x.norm(dim=0), entropy, T, x.T @ x)
    got = score(weight, statistics, ScoreSection(method=method, alpha=ALPHA))
    assert got.dtype == torch.float64
    expected = torch.tensor(
        [[naive(method, weight, x, i, j) for j in range(K)] for i in range(N)], dtype=torch.float64
    )
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("method", ["wanda", "ria", "obd", "e_sparse", "obs"])
def test_what_each_output_sees_for_itself(layer, method):
    """A row of the scale is a scale of the inputs that this output reads; of an undamped Hessian, too."""
    weight, x = layer
    section = ScoreSection(method=method, damping=0)
    entropy, scale = torch.rand(K, dtype=torch.float64), torch.rand(N, K, dtype=torch.float64) + 0.5
    found = score(weight, ChannelStatistics(x.norm(dim=0), entropy, T, x.T @ x, scale), section)
    for i, own in enumerate(scale):
        read = x * own
        alone = score(weight, ChannelStatistics(read.norm(dim=0), entropy, T, read.T @ read), section)
        torch.testing.assert_close(found[i], alone[i])


def test_half_precision_weights_are_scored_in_float32(layer):
    weight, x = layer
    statistics = ChannelStatistics(x.norm(dim=0), None, T)
    assert score(weight.half(), statistics, ScoreSection(method="wanda")).dtype == torch.float32


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(2, 8)], ids=str)
def test_diagonal_hessian_gives_wandas_mask(layer, pattern):
    weight, x = layer
    statistics = ChannelStatistics(x.norm(dim=0), None, T)
    wanda, obd = (score(weight, statistics, ScoreSection(method=method)) for method in ("wanda", "obd"))
    assert not torch.equal(obd, wanda)
    assert torch.equal(nm_mask(obd, pattern), nm_mask(wanda, pattern))


def test_without_entropy_e_sparse_ranks_as_wanda(layer):
    weight, x = layer
    statistics = ChannelStatistics(x.norm(dim=0), None, T)
    section = ScoreSection(method="e_sparse", information="none")
    wanda = score(weight, statistics, ScoreSection(method="wanda"))
    assert torch.equal(
        nm_mask(score(weight, statistics, section), Pattern(2, 4)), nm_mask(wanda, Pattern(2, 4))
    )


def test_e_sparse_does_not_depend_on_the_number_of_tokens(layer):
    weight, x = layer
    entropy = torch.rand(K, dtype=torch.float64)
    once = score(weight, ChannelStatistics(x.norm(dim=0), entropy, T), ScoreSection())
    twice = score(weight, ChannelStatistics(torch.cat([x, x]).norm(dim=0), entropy, 2 * T), ScoreSection())
    torch.testing.assert_close(once, twice)


def test_ria_of_a_dead_row_and_column_is_zero(layer):
    weight, x = layer
    weight[2], weight[:, 3] = 0, 0
    got = score(weight, ChannelStatistics(x.norm(dim=0), None, T), ScoreSection(method="ria"))
    assert torch.isfinite(got).all() and not got[2].any() and not got[:, 3].any()


def test_what_a_score_says_of_the_error(layer):
    """Permutations are chosen by squared errors: the scores of obd and obs, the squares of the others."""
    weight, x = layer
    statistics = ChannelStatistics(x.norm(dim=0), None, T)
    wanda, obd = ScoreSection(method="wanda"), ScoreSection(method="obd")
    torch.testing.assert_close(
        error(score(weight, statistics, wanda), wanda), error(score(weight, statistics, obd), obd)
    )


def test_what_each_method_needs():
    sections = {method: ScoreSection(method=method) for method in SCORES}
    assert [m for m, s in sections.items() if not needs_statistics(s)] == ["magnitude"]
    assert [m for m, s in sections.items() if needs_information(s)] == ["e_sparse"]
    assert [m for m, s in sections.items() if needs_hessian(s)] == ["obs"]
    assert not needs_information(ScoreSection(information="none"))
