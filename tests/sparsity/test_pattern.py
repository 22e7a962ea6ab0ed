import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from esparse_trt.errors import EsparseError
from esparse_trt.sparsity.pattern import Pattern, conforming_share, descending, kept_score, nm_mask

PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(3, 4), Pattern(2, 8), Pattern(4, 8), Pattern(1, 2)]


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "10:16"])
def test_parse_round_trips(text):
    assert str(Pattern.parse(text)) == text


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "2", "2:4:8", "a:b", "", "-1:4", "2 : 4"])
def test_parse_refuses(text):
    with pytest.raises(EsparseError, match="not an N:M pattern"):
        Pattern.parse(text)


def test_check_names_layer_k_and_m():
    with pytest.raises(EsparseError) as error:
        Pattern(2, 8).check(100, "model.layers.3.mlp.down_proj")
    text = str(error.value)
    assert "model.layers.3.mlp.down_proj" in text and "100" in text and "2:8" in text and "exclude" in text


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_mask_keeps_the_n_largest_of_each_group(pattern):
    scores = torch.rand(5, 6 * pattern.group)
    mask = nm_mask(scores, pattern)
    for row, kept in zip(scores.view(-1, pattern.group), mask.view(-1, pattern.group), strict=True):
        assert kept.sum() == pattern.kept
        assert row[kept].min() > row[~kept].max()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_ties_go_to_the_lower_channel(pattern):
    mask = nm_mask(torch.ones(2, pattern.group), pattern)
    assert mask.tolist() == [[True] * pattern.kept + [False] * (pattern.group - pattern.kept)] * 2
    assert nm_mask(torch.tensor([[1.0, 3.0, 1.0, 3.0, 3.0, 0.0, 3.0, 3.0]]), Pattern(2, 4)).tolist() == [
        [False, True, False, True, True, False, True, False]
    ]


def test_mask_works_on_a_batch():
    scores = torch.rand(3, 4, 16)
    batched = nm_mask(scores, Pattern(2, 8))
    assert all(torch.equal(batched[i], nm_mask(scores[i], Pattern(2, 8))) for i in range(3))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_kept_score_is_what_the_mask_keeps(pattern):
    scores = torch.rand(7, 5 * pattern.group, dtype=torch.float64)
    share = float((scores * nm_mask(scores, pattern)).sum() / scores.sum())
    assert kept_score(scores, pattern) == pytest.approx(share, rel=1e-12)


def test_kept_score_of_nothing():
    assert kept_score(torch.zeros(2, 4), Pattern(2, 4)) == 1.0


@given(st.lists(st.lists(st.floats(-9, 9), min_size=3, max_size=3), min_size=1, max_size=9))
def test_descending_sorts(rows):
    values = torch.tensor(rows)
    assert torch.equal(torch.stack(descending(list(values))), values.sort(dim=0, descending=True).values)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, torch.bfloat16, torch.float16])
def test_conforming_share(dtype):
    dense = np.ones((4, 16), np.float32)
    dense[:, ::2] = -0.0  # a negative zero is a zero
    dense[0, 0] = 1  # three nonzeros in one group of four
    weight = torch.tensor(dense, dtype=dtype) if isinstance(dtype, torch.dtype) else dense.astype(dtype)
    assert conforming_share(weight, Pattern(2, 4)) == 15 / 16
    assert conforming_share(weight, Pattern(1, 4)) == 0
    assert conforming_share(weight, Pattern(3, 4)) == 1
    assert conforming_share(weight, Pattern(2, 5)) == 0, "the pattern does not divide K"


def test_conforming_share_looks_along_k_only(monkeypatch):
    monkeypatch.setattr("esparse_trt.sparsity.pattern._CHECK_ELEMENTS", 20)  # several pieces
    weight = np.zeros((8, 8))
    weight[::2] = 1  # 2:4 along N, dense along K
    assert conforming_share(weight, Pattern(2, 4)) == 0.5
    assert conforming_share(weight.T, Pattern(2, 4)) == 1
