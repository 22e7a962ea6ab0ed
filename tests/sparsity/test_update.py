"""The weight update against the textbook: explicit inverses and least squares, row by row in float64."""

from itertools import combinations

import pytest
import torch

from esparse_trt.errors import EsparseError
from esparse_trt.sections import UpdateSection
from esparse_trt.sparsity.hessian import factor
from esparse_trt.sparsity.pattern import Pattern, conforming_share, nm_mask
from esparse_trt.sparsity.update import _sweep, refit, update

N, K, T = 6, 24, 100
PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(2, 8), Pattern(4, 8)]


def section(**changes):
    return UpdateSection.model_validate({"method": "obs", "damping": 0} | changes)


@pytest.fixture
def layer():
    """W, and H of correlated inputs with uneven norms."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(N, K, generator=generator, dtype=torch.float64)
    mixing = torch.randn(K, K, generator=generator, dtype=torch.float64)
    x = torch.randn(T, K, generator=generator, dtype=torch.float64) @ mixing
    x *= torch.rand(K, generator=generator, dtype=torch.float64) + 0.2
    return weight, x.T @ x


def cost(change, hessian):
    return float(change @ hessian @ change)


def remove(row, hessian, pruned, first):
    """The optimal brain surgeon: zero `pruned` and let all channels from `first` on make up for it."""
    free = list(range(first, len(row)))
    inverse = hessian[free][:, free].inverse()
    p = [c - first for c in pruned]
    multiplier = torch.linalg.solve(inverse[p][:, p], row[list(pruned)])
    result = row.clone()
    result[free] -= inverse[:, p] @ multiplier
    result[list(pruned)] = 0
    return result, float(row[list(pruned)] @ multiplier)


def naive_columns(weight, hessian, pattern):
    """SparseGPT, one row and one column at a time."""
    rows = []
    for row in weight:
        for left in range(0, K, pattern.group):
            group = range(left, left + pattern.group)
            # The saliency of channel j with those left of it fixed: w_j² / [(H_{j:,j:})⁻¹]_jj.
            saliency = {j: row[j] ** 2 / hessian[j:, j:].inverse()[0, 0] for j in group}
            pruned = sorted(group, key=lambda j: saliency[j])[: pattern.group - pattern.kept]
            for j in sorted(pruned):
                row, _ = remove(row, hessian, [j], j)
        rows.append(row)
    return torch.stack(rows)


def naive_groups(weight, hessian, pattern):
    """Of every group the cheapest of all its masks."""
    rows = []
    for row in weight:
        for left in range(0, K, pattern.group):
            group = range(left, left + pattern.group)
            tried = [remove(row, hessian, p, left) for p in combinations(group, pattern.group - pattern.kept)]
            row = min(tried, key=lambda found: found[1])[0]
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("sweep, naive", [("column", naive_columns), ("group", naive_groups)])
def test_sweeps_against_explicit_inverses(sweep, naive, pattern, layer):
    weight, hessian = layer
    got, kept = _sweep(weight, factor(hessian, 0)[0], None, pattern, section(sweep=sweep, block=8))
    torch.testing.assert_close(got, naive(weight, hessian, pattern), rtol=1e-8, atol=1e-10)
    assert torch.equal(got != 0, kept)


@pytest.mark.parametrize("mask", ["adaptive", "fixed"])
@pytest.mark.parametrize("sweep", ["column", "group"])
def test_the_block_is_only_a_matter_of_speed(sweep, mask, layer):
    weight, hessian = layer
    upper, pattern = factor(hessian, 0)[0], Pattern(2, 4)
    fixed = nm_mask(weight.abs(), pattern) if mask == "fixed" else None
    whole = _sweep(weight, upper, fixed, pattern, section(sweep=sweep, block=64))
    for block in (1, 4, 20):
        torch.testing.assert_close(
            _sweep(weight, upper, fixed, pattern, section(sweep=sweep, block=block)), whole
        )
    if fixed is not None:
        assert torch.equal(whole[1], fixed)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_fixed_mask_is_refitted_to_its_least_squares_optimum(pattern, layer):
    weight, hessian = layer
    mask = nm_mask(weight.abs() * hessian.diagonal().sqrt(), pattern)
    damping = 0.02
    shifted = hessian + damping * hessian.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    start = torch.where(mask, weight, 0)
    got = refit(weight, start, mask, hessian, damping, 4 * K)
    for i in range(N):
        s = mask[i].nonzero().flatten()
        best = torch.linalg.solve(shifted[s][:, s], shifted[s] @ weight[i])
        torch.testing.assert_close(got[i, s], best, rtol=1e-4, atol=1e-5)
    assert torch.equal(got != 0, mask)


@pytest.mark.parametrize("mask", ["adaptive", "fixed"])
@pytest.mark.parametrize("sweep", ["column", "group"])
def test_each_part_lowers_the_error(sweep, mask, layer):
    weight, hessian = (t.float() for t in layer)
    pattern = Pattern(2, 4)
    fixed = nm_mask(weight.abs(), pattern) if mask == "fixed" else None
    swept = update(weight, hessian, fixed, pattern, section(sweep=sweep, refit=0))
    refitted = update(weight, hessian, fixed, pattern, section(sweep=sweep))
    assert torch.equal(swept.mask, refitted.mask)
    assert 0 < refitted.record.error < swept.record.error < swept.record.masked_error < 1
    assert conforming_share(refitted.weight, pattern) == 1
    change, lost = weight - refitted.weight, 0.0
    for row in change.double():
        lost += cost(row, hessian.double())
    total = sum(cost(row, hessian.double()) for row in weight.double())
    assert refitted.record.error == pytest.approx(lost / total, rel=1e-4)


def test_uncorrelated_inputs_need_no_update(layer):
    weight, _ = layer
    hessian = torch.rand(K, dtype=torch.float64).add(0.1).diag()
    for sweep in ("column", "group"):
        got = update(weight.float(), hessian.float(), None, Pattern(2, 4), section(sweep=sweep))
        expected = nm_mask(weight.square() * hessian.diagonal(), Pattern(2, 4))
        assert torch.equal(got.mask, expected)
        torch.testing.assert_close(got.weight, weight.float() * expected)


@pytest.mark.parametrize("sweep", ["column", "group"])
def test_dead_and_duplicate_channels_and_little_text(sweep):
    """A singular Hessian: the damping that it takes is reported, and dead channels are the first to go."""
    weight = torch.randn(N, K)
    for tokens in (9, 200):
        x = torch.randn(tokens, K)
        x[:, [1, 2, 9]] = 0
        x[:, 5] = x[:, 4]
        for damping in (0, 0.01):
            got = update(weight, x.T @ x, None, Pattern(2, 4), section(sweep=sweep, damping=damping))
            assert got.weight.isfinite().all() and conforming_share(got.weight, Pattern(2, 4)) == 1
            assert 0 < got.record.damping < 1e-2 if damping == 0 else got.record.damping == damping
    assert not got.mask[:, [1, 2]].any(), "the group has two channels that live"


def test_a_layer_that_reads_nothing_but_zeros():
    weight = torch.randn(N, K)
    got = update(weight, torch.zeros(K, K), None, Pattern(2, 4), section())
    mask = nm_mask(weight.abs(), Pattern(2, 4))
    assert torch.equal(got.mask, mask) and torch.equal(got.weight, weight * mask)
    assert got.record.error == 0


def test_large_groups_need_the_column_sweep():
    x, weight = torch.randn(100, 32), torch.randn(N, 32)
    with pytest.raises(EsparseError, match="12870 masks") as error:
        update(weight, x.T @ x, None, Pattern(8, 16), section())
    assert "column" in error.value.fix
    got = update(weight, x.T @ x, None, Pattern(8, 16), section(sweep="column"))
    assert conforming_share(got.weight, Pattern(8, 16)) == 1
