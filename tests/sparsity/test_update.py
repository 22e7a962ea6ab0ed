"""The weight update against the textbook: explicit inverses and least squares, row by row in float64."""

from itertools import combinations, pairwise

import pytest
import torch

from esparse_trt.errors import EsparseError
from esparse_trt.sections import UpdateSection
from esparse_trt.sparsity.descent import descend
from esparse_trt.sparsity.hessian import factor
from esparse_trt.sparsity.pattern import Pattern, conforming_share, nm_mask
from esparse_trt.sparsity.sweep import sweep
from esparse_trt.sparsity.update import refit, update

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


def naive_sweep(weight, hessian, pattern):
    """SparseGPT, one row and one column at a time."""
    rows = []
    for row in weight.clone():
        for left in range(0, K, pattern.group):
            group = range(left, left + pattern.group)
            # The saliency of channel j with those left of it fixed: w_j² / [(H_{j:,j:})⁻¹]_jj.
            saliency = {j: row[j] ** 2 / hessian[j:, j:].inverse()[0, 0] for j in group}
            for j in sorted(sorted(group, key=lambda j: saliency[j])[: pattern.group - pattern.kept]):
                inverse = hessian[j:, j:].inverse()
                row[j:] -= row[j].clone() / inverse[0, 0] * inverse[0]
                row[j] = 0
        rows.append(row)
    return torch.stack(rows)


def naive_descent(dense, start, hessian, pattern):
    """Of every group the best mask with its best values, all else fixed, by least squares."""
    result = start.clone()
    root = torch.linalg.cholesky(hessian).T  # v H vᵀ = ‖root vᵀ‖²
    for row, wanted in zip(result, dense, strict=True):
        for left in range(0, K, pattern.group):
            group = list(range(left, left + pattern.group))
            row[group] = 0
            missing = root @ (wanted - row)
            tried = []
            for s in combinations(group, pattern.kept):
                values = torch.linalg.lstsq(root[:, s], missing).solution
                tried.append((float((missing - root[:, s] @ values).square().sum()), s, values))
            _, s, values = min(tried, key=lambda found: found[0])
            row[list(s)] = values
    return result


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_sweep_against_explicit_inverses(pattern, layer):
    weight, hessian = layer
    got, kept = sweep(weight, factor(hessian, 0)[0], None, pattern, block=8)
    torch.testing.assert_close(got, naive_sweep(weight, hessian, pattern), rtol=1e-8, atol=1e-10)
    assert torch.equal(got != 0, kept)


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(1, 4), Pattern(2, 8)], ids=str)
def test_descent_against_least_squares_over_every_mask(pattern, layer):
    weight, hessian = layer
    start = weight * nm_mask(weight.abs(), pattern)
    got, kept = descend(weight, start, hessian, pattern, block=8, fixed=None)
    torch.testing.assert_close(got, naive_descent(weight, start, hessian, pattern), rtol=1e-6, atol=1e-8)
    assert torch.equal(got != 0, kept)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_no_pass_raises_the_error_of_a_row(pattern, fixed, layer):
    weight, hessian = layer
    mask = nm_mask(weight.abs(), pattern)
    now, errors = weight * mask, []
    for _ in range(4):
        errors.append([cost(row, hessian) for row in weight - now])
        now, kept = descend(weight, now, hessian, pattern, block=8, fixed=mask if fixed else None)
        assert conforming_share(now, pattern) == 1 and (torch.equal(kept, mask) or not fixed)
    for before, after in pairwise(errors):
        assert all(b <= a * (1 + 1e-9) for a, b in zip(before, after, strict=True))
    assert sum(errors[1]) < 0.9 * sum(errors[0])


@pytest.mark.parametrize("mask", ["adaptive", "fixed"])
def test_the_block_is_only_a_matter_of_speed(mask, layer):
    weight, hessian = layer
    upper, pattern = factor(hessian, 0)[0], Pattern(2, 4)
    fixed = nm_mask(weight.abs(), pattern) if mask == "fixed" else None
    whole = sweep(weight, upper, fixed, pattern, block=64)
    improved = descend(weight, whole[0], hessian, pattern, block=64, fixed=fixed)
    for block in (4, 20):
        torch.testing.assert_close(sweep(weight, upper, fixed, pattern, block=block), whole)
        again = descend(weight, whole[0], hessian, pattern, block=block, fixed=fixed)
        torch.testing.assert_close(again, improved)
    if fixed is not None:
        assert torch.equal(whole[1], fixed) and torch.equal(improved[1], fixed)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_fixed_mask_is_refitted_to_its_least_squares_optimum(pattern, layer):
    weight, hessian = layer
    mask = nm_mask(weight.abs() * hessian.diagonal().sqrt(), pattern)
    damping = 0.02
    shifted = hessian + damping * hessian.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    start = torch.where(mask, weight, 0)
    got = refit(weight, start, mask, shifted, 4 * K)
    for i in range(N):
        s = mask[i].nonzero().flatten()
        best = torch.linalg.solve(shifted[s][:, s], shifted[s] @ weight[i])
        torch.testing.assert_close(got[i, s], best, rtol=1e-4, atol=1e-5)
    assert torch.equal(got != 0, mask)


@pytest.mark.parametrize("mask", ["adaptive", "fixed"])
def test_each_part_lowers_the_error(mask, layer):
    weight, hessian = (t.float() for t in layer)
    pattern = Pattern(2, 4)
    fixed = nm_mask(weight.abs(), pattern) if mask == "fixed" else None
    swept, descended, refitted = (
        update(weight, hessian, fixed, pattern, section(descent=descent, refit=steps))
        for descent, steps in ((0, 0), (3, 0), (3, 32))
    )
    assert torch.equal(descended.mask, refitted.mask)
    assert 0 < refitted.record.error < descended.record.error < swept.record.error
    assert swept.record.error < swept.record.masked_error < 1
    assert conforming_share(refitted.weight, pattern) == 1
    change, lost = weight - refitted.weight, 0.0
    for row in change.double():
        lost += cost(row, hessian.double())
    total = sum(cost(row, hessian.double()) for row in weight.double())
    assert refitted.record.error == pytest.approx(lost / total, rel=1e-4)


def test_uncorrelated_inputs_need_no_update(layer):
    weight, _ = layer
    hessian = torch.rand(K, dtype=torch.float64).add(0.1).diag()
    got = update(weight.float(), hessian.float(), None, Pattern(2, 4), section())
    expected = nm_mask(weight.square() * hessian.diagonal(), Pattern(2, 4))
    assert torch.equal(got.mask, expected)
    torch.testing.assert_close(got.weight, weight.float() * expected)


def test_dead_and_duplicate_channels_and_little_text():
    """A singular Hessian: the damping that it takes is reported, and dead channels are the first to go."""
    weight = torch.randn(N, K)
    for tokens in (9, 200):
        x = torch.randn(tokens, K)
        x[:, [1, 2, 9]] = 0
        x[:, 5] = x[:, 4]
        for damping in (0, 0.01):
            got = update(weight, x.T @ x, None, Pattern(2, 4), section(damping=damping))
            swept = update(weight, x.T @ x, None, Pattern(2, 4), section(damping=damping, descent=0))
            assert got.weight.isfinite().all() and conforming_share(got.weight, Pattern(2, 4)) == 1
            assert 0 < got.record.damping < 1e-2 if damping == 0 else got.record.damping == damping
    assert not swept.mask[:, [1, 2]].any(), "the group has two channels that live"


def test_inputs_that_never_change():
    """Rank one: whatever is pruned, the two kept channels of one group could make up for all of it."""
    weight, x = torch.randn(N, K), torch.rand(K).add(0.5).expand(100, K)
    got = update(weight, x.T @ x, None, Pattern(2, 4), section())
    assert got.weight.isfinite().all() and conforming_share(got.weight, Pattern(2, 4)) == 1
    assert got.record.error < 1e-3 * got.record.masked_error


def test_a_layer_that_reads_nothing_but_zeros():
    weight = torch.randn(N, K)
    got = update(weight, torch.zeros(K, K), None, Pattern(2, 4), section())
    mask = nm_mask(weight.abs(), Pattern(2, 4))
    assert torch.equal(got.mask, mask) and torch.equal(got.weight, weight * mask)
    assert got.record.error == 0


def test_large_groups_go_without_descent():
    x, weight = torch.randn(100, 32), torch.randn(N, 32)
    with pytest.raises(EsparseError, match="12870 masks") as error:
        update(weight, x.T @ x, None, Pattern(8, 16), section())
    assert "0" in error.value.fix
    got = update(weight, x.T @ x, None, Pattern(8, 16), section(descent=0))
    assert conforming_share(got.weight, Pattern(8, 16)) == 1
