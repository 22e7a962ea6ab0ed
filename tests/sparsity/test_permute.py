import pytest
import torch

from esparse_trt.sections import PermuteSection, ScoreSection
from esparse_trt.sparsity import permute
from esparse_trt.sparsity.assign import _gains
from esparse_trt.sparsity.pattern import Pattern, group_kept, kept_score
from esparse_trt.sparsity.permutation import is_identity
from esparse_trt.sparsity.score import error

PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(2, 8), Pattern(4, 8)]


def section(**changes):
    return PermuteSection.model_validate({"global": "deal"} | changes)


def test_deal_by_hand():
    means = torch.tensor([1.0, 8, 2, 7, 3, 6, 4, 5])  # ranks: channels 1, 3, 5, 7, 6, 4, 2, 0
    assert permute.deal(means.view(1, 1, 8), Pattern(2, 4)).tolist() == [[1, 5, 6, 2, 3, 7, 4, 0]]
    assert permute.sort(means.view(1, 1, 8), Pattern(2, 4)).tolist() == [[1, 3, 5, 7, 6, 4, 2, 0]]


def test_equal_scores_keep_their_order():
    assert is_identity(permute.sort(torch.ones(1, 3, 64), Pattern(2, 4))[0])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_planted_clusters_are_spread(pattern):
    """Informative channels that lie together compete for the same places; dealing gives each its own."""
    groups, m = 16, pattern.group
    planted = groups * pattern.kept  # as many informative channels as there are places
    scores = torch.rand(12, groups * m)
    scores[:, :planted] += 5
    choice = permute.choose(scores.unsqueeze(0), pattern, section(local=None))
    dealt = choice.final[0]
    informative = (dealt < planted).view(groups, m).sum(1)
    assert (informative == pattern.kept).all()
    in_place, after = kept_score(scores, pattern), kept_score(scores[:, dealt], pattern)
    by_sort = permute.choose(scores.unsqueeze(0), pattern, section(**{"global": "sort", "local": None}))
    assert after > in_place + 0.1
    assert after > kept_score(scores[:, by_sort.final[0]], pattern) + 0.1


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("start", ["deal", "sort", "none"])
def test_local_never_lowers_what_global_reached(pattern, start):
    scores = torch.rand(2, 20, 80) * torch.rand(80).exp()
    settings = section(**{"global": start, "local": {"block": 32}})
    choice = permute.choose(scores, pattern, settings)
    for i in range(2):
        assert torch.equal(choice.final[i].sort().values, torch.arange(80))
        before, after = (kept_score(scores[i][:, p[i]], pattern) for p in choice)
        assert after > before


@pytest.mark.parametrize("pattern", [*PATTERNS, Pattern(3, 4)], ids=str)
def test_assignment_never_lowers_the_kept_score_and_ends_where_no_slot_gains(pattern):
    scores = torch.rand(2, 20, 80) * torch.rand(80).exp()
    before = permute.choose(scores, pattern, section(local={"block": 16}))
    after = permute.choose(scores, pattern, section(local={"block": 16}, assign=50))
    for i in range(2):
        order = after.final[i]
        assert torch.equal(order.sort().values, torch.arange(80))
        reached = kept_score(scores[i][:, order], pattern)
        assert reached > kept_score(scores[i][:, before.final[i]], pattern)
        # No exchange of two channels in the same slot is worth anything any more.
        for a in range(0, 80 - pattern.group, pattern.group):
            swapped = order.clone()
            swapped[[a, a + pattern.group]] = order[[a + pattern.group, a]]
            assert kept_score(scores[i][:, swapped], pattern) <= reached + 1e-6


@pytest.mark.parametrize("slot", [0, 1, 3])
def test_the_gain_of_a_slot_is_what_a_group_keeps_more(slot):
    values, pattern = torch.rand(16, 9), Pattern(2, 4)
    groups = torch.randperm(16).view(4, 4)
    gains = _gains(values, groups, slot, pattern)
    for g in range(4):
        for c in range(4):
            changed = groups.clone()
            changed[g, slot] = groups[c, slot]
            kept = [group_kept(values[order[g]].T, pattern).sum() for order in (changed, groups)]
            assert float(gains[g, c]) == pytest.approx(float(kept[0] - kept[1]), abs=1e-5)


def test_a_full_width_shuffle_is_one_block():
    scores = torch.rand(1, 20, 80)
    full, wide = (
        permute.choose(scores, Pattern(2, 4), section(local={"block": b})).final for b in ("full", 80)
    )
    assert torch.equal(full, wide)


def test_the_objective_decides_what_is_kept():
    """Four channels in pairs of which one stays. Pairs {0,1}, {2,3} keep 29 of the scores and 147 of the
    squares; {0,2}, {1,3} keep 28 and 148; the third way is worse by both.
    """
    scores = torch.tensor([[[1.0, 5, 5, 1], [5, 6, 1, 4], [1, 6, 1, 3]]])
    chosen = {}
    for kept, wanted in (("score", scores), ("error", error(scores, ScoreSection(method="wanda")))):
        final = permute.choose(wanted, Pattern(1, 2), section()).final[0]
        chosen[kept] = {frozenset(pair) for pair in final.view(2, 2).tolist()}
    assert chosen["score"] == {frozenset({0, 1}), frozenset({2, 3})}
    assert chosen["error"] == {frozenset({0, 2}), frozenset({1, 3})}


def test_none_is_identity():
    choice = permute.choose(torch.rand(1, 3, 16), Pattern(2, 4), section(**{"global": "none", "local": None}))
    assert is_identity(choice.final[0])


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 2), (4, 1)])
def test_heads_keep_their_channels_and_groups_move_alike(heads, kv_heads):
    width, pattern = 16, Pattern(2, 4)
    scores = torch.rand(10, heads * width) * torch.rand(heads * width).exp()
    choice = permute.choose_heads(scores, pattern, section(), heads=heads, kv_heads=kv_heads)
    by_head = choice.final.view(heads, width) - torch.arange(heads).unsqueeze(1) * width
    assert ((by_head >= 0) & (by_head < width)).all()
    for group in by_head.view(kv_heads, heads // kv_heads, width):
        assert (group == group[0]).all()
    assert len({tuple(p) for p in by_head.tolist()}) == kv_heads
    assert kept_score(scores[:, choice.final], pattern) > kept_score(scores, pattern)


def test_a_kv_group_is_chosen_on_the_scores_of_all_its_heads():
    """The second head's scores decide where the first head's have no preference."""
    scores = torch.ones(1, 16)
    scores[0, 8:] = torch.tensor([1.0, 1, 1, 1, 9, 9, 9, 9])  # four that compete in one group
    off = section(local=None)
    choice = permute.choose_heads(scores, Pattern(2, 4), off, heads=2, kv_heads=1)
    assert kept_score(scores[:, choice.final], Pattern(2, 4)) > kept_score(scores, Pattern(2, 4))
    alone = permute.choose_heads(scores, Pattern(2, 4), off, heads=2, kv_heads=2)
    assert not torch.equal(alone.final[:8], choice.final[:8])


def test_groups_that_straddle_heads_are_left_alone():
    choice = permute.choose_heads(torch.rand(3, 24), Pattern(2, 8), section(), heads=2, kv_heads=2)
    assert is_identity(choice.final)
