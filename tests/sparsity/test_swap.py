import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esparse_trt.sparsity.maxima import sums_of_maxima
from esparse_trt.sparsity.pattern import Pattern, group_kept
from esparse_trt.sparsity.swap import SwapBlocks, local_shuffle, match

PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(3, 4), Pattern(2, 8), Pattern(4, 8)]


def kept(scores, order, pattern):
    return float(group_kept(scores[:, order], pattern).sum())


def all_gains(blocks):
    """[B, L, L], by positions in the present order."""
    count, groups, _ = blocks.order.shape
    everything = torch.arange(count * groups)
    gains = blocks.gains(everything // groups, everything % groups)
    return gains.view(count, gains.shape[2], gains.shape[2])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_gains_are_what_swapping_gains(pattern, ties):
    generator = torch.Generator().manual_seed(5)
    channels = 4 * pattern.group
    scores = torch.rand(7, channels, generator=generator, dtype=torch.float64)
    if ties:
        scores = (scores * 3).round()
    blocks = SwapBlocks(scores.T.unsqueeze(0).contiguous(), pattern)
    gains = all_gains(blocks)[0]
    identity = torch.arange(channels)
    before = kept(scores, identity, pattern)
    for a in range(channels):
        for b in range(channels):
            if a // pattern.group != b // pattern.group:
                swapped = identity.clone()
                swapped[a], swapped[b] = b, a
                assert float(gains[a, b]) == pytest.approx(kept(scores, swapped, pattern) - before, abs=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_gains_stay_right_after_swaps(pattern):
    """Only the rows of changed groups are recomputed: nothing else may go stale."""
    generator = torch.Generator().manual_seed(6)
    scores = torch.rand(2, 6 * pattern.group, 9, generator=generator, dtype=torch.float64)
    blocks = SwapBlocks(scores, pattern)
    blocks.run(3)
    assert not torch.equal(blocks.order.flatten(1)[0], torch.arange(scores.shape[1]))
    moved = torch.take_along_dim(scores, blocks.order.flatten(1).unsqueeze(2), dim=1)
    fresh = SwapBlocks(moved, pattern)
    torch.testing.assert_close(all_gains(blocks), all_gains(fresh), rtol=0, atol=1e-12)
    torch.testing.assert_close(blocks.kept, fresh.kept)
    torch.testing.assert_close(blocks.gain, fresh.gain, rtol=0, atol=1e-12)


@given(st.sampled_from(PATTERNS), st.integers(2, 9), st.integers(1, 12), st.integers(0, 10**6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_swaps_never_lower_the_kept_score(pattern, groups, rows, seed, ties):
    scores = torch.rand(1, rows, groups * pattern.group, generator=torch.Generator().manual_seed(seed))
    if ties:
        scores = (scores * 4).floor()
    start = torch.randperm(scores.shape[2], generator=torch.Generator().manual_seed(seed)).unsqueeze(0)
    block = max(2, groups // 2) * pattern.group
    reached = kept(scores[0], start[0], pattern)
    for rounds in (1, 2, 50):
        order = local_shuffle(scores, pattern, start, block=block, rounds=rounds)
        assert torch.equal(order.sort(dim=1).values, torch.arange(scores.shape[2]).unsqueeze(0))
        now = kept(scores[0], order[0], pattern)
        assert now >= reached
        reached = now


def test_swaps_are_checked_before_they_are_made(monkeypatch):
    """However wrong the gains are that a swap was chosen by, none that loses is made."""
    generator = torch.Generator().manual_seed(2)

    def noisy(a, b):
        exact = sums_of_maxima(a, b)
        return exact + exact.mean() * 0.02 * torch.randn(exact.shape, generator=generator)

    monkeypatch.setattr("esparse_trt.sparsity.swap.sums_of_maxima", noisy)
    pattern, start = Pattern(2, 4), torch.arange(64).unsqueeze(0)
    scores = torch.rand(1, 30, 64, generator=generator)
    reached = [kept(scores[0], start[0], pattern)]
    for rounds in range(1, 12):
        generator.manual_seed(2)
        order = local_shuffle(scores, pattern, start, block=64, rounds=rounds)
        reached.append(kept(scores[0], order[0], pattern))
    assert reached == sorted(reached) and reached[-1] > reached[0]


def test_it_ends_where_no_single_swap_gains():
    pattern = Pattern(2, 4)
    scores = torch.rand(1, 8, 32, dtype=torch.float64)
    order = local_shuffle(scores, pattern, torch.arange(32).unsqueeze(0), block=32, rounds=200)
    final = SwapBlocks(scores[0][:, order[0]].T.unsqueeze(0).contiguous(), pattern)
    gains = all_gains(final)[0].view(8, 4, 8, 4).amax(dim=(1, 3))
    assert gains[~torch.eye(8, dtype=torch.bool)].max() <= 1e-6 * 2 * final.kept.max()


def test_swaps_stay_inside_blocks_and_the_last_block_is_shorter():
    pattern, start = Pattern(2, 4), torch.randperm(40).unsqueeze(0)
    scores = torch.rand(1, 30, 40) * torch.rand(40).exp()
    order = local_shuffle(scores, pattern, start, block=16, rounds=100)
    assert not torch.equal(order, start)
    for low, high in ((0, 16), (16, 32), (32, 40)):
        assert set(order[0, low:high].tolist()) == set(start[0, low:high].tolist())


@pytest.mark.parametrize("stack", [1, 2000, 1 << 26])
def test_the_result_does_not_depend_on_how_blocks_are_batched(monkeypatch, stack):
    scores = torch.rand(3, 20, 72, generator=torch.Generator().manual_seed(1))
    start = torch.arange(72).repeat(3, 1)
    expected = torch.cat(
        [local_shuffle(s.unsqueeze(0), Pattern(2, 4), start[:1], block=32, rounds=50) for s in scores]
    )
    monkeypatch.setattr("esparse_trt.sparsity.swap._STACK_ELEMENTS", stack)
    assert torch.equal(local_shuffle(scores, Pattern(2, 4), start, block=32, rounds=50), expected)


def naive_match(gain):
    groups, partner = len(gain), [-1] * len(gain)
    while True:
        free = [g for g in range(groups) if partner[g] < 0]
        pairs = [(gain[a][b], -a, -b) for a in free for b in free if a < b and gain[a][b] > -float("inf")]
        if not pairs:
            return partner
        _, a, b = max(pairs)
        partner[-a], partner[-b] = -b, -a


@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 10**6))
@settings(deadline=None)
def test_matching_is_greedy(groups, levels, seed):
    """Also with many equal gains, where the lower groups win."""
    gain = torch.randint(0, levels, (groups, groups), generator=torch.Generator().manual_seed(seed)).double()
    gain = torch.maximum(gain, gain.T)
    gain[gain == 0] = -torch.inf
    gain.fill_diagonal_(-torch.inf)
    assert match(gain.unsqueeze(0))[0].tolist() == naive_match(gain.tolist())
