import torch
from hypothesis import given
from hypothesis import strategies as st

from esparse_trt.sparsity.permutation import by_head, compose, identity, inverse, is_identity

permutations = st.integers(1, 40).flatmap(lambda n: st.permutations(range(n)))


@given(permutations)
def test_inverse(order):
    pi, x = torch.tensor(order), torch.rand(len(order))
    assert torch.equal(x[pi][inverse(pi)], x)
    assert torch.equal(x[inverse(pi)][pi], x)
    assert is_identity(compose(pi, inverse(pi)))


@given(permutations, st.randoms())
def test_compose(order, random):
    other = random.sample(order, len(order))
    first, second, x = torch.tensor(order), torch.tensor(other), torch.rand(len(order))
    both = compose(first, second)
    assert torch.equal(x[both], x[first][second])
    assert torch.equal(inverse(both), compose(inverse(second), inverse(first)))


@given(permutations)
def test_a_permuted_layer_computes_the_same(order):
    pi = torch.tensor(order)
    x, w = torch.rand(3, len(order), dtype=torch.float64), torch.rand(2, len(order), dtype=torch.float64)
    torch.testing.assert_close(x[:, pi] @ w[:, pi].T, x @ w.T)


def test_is_identity():
    assert is_identity(identity(5))
    assert not is_identity(torch.tensor([0, 2, 1]))


def test_by_head_repeats_a_kv_heads_permutation():
    per_head = torch.tensor([[1, 0, 2], [2, 1, 0]])
    assert by_head(per_head, 4).tolist() == [1, 0, 2, 4, 3, 5, 8, 7, 6, 11, 10, 9]
