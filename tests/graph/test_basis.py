"""The algebra of changes of basis, against numpy on random arrays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from esparse_trt.graph.basis import (
    Basis,
    Refused,
    change_basis,
    make_basis,
    narrow,
    reshape_basis,
    widen,
)


def random_basis(shape: tuple[int, ...], axis: int, by: tuple[int, ...], seed: int = 0) -> Basis:
    random = np.random.default_rng(seed)
    table = random.permuted(
        np.broadcast_to(np.arange(shape[axis]), [shape[b] for b in by] + [shape[axis]]), axis=-1
    )
    return Basis(axis, by, table)


def some(shape: tuple[int, ...]) -> NDArray:
    return np.random.default_rng(1).standard_normal(shape)


def test_means_what_it_says() -> None:
    basis = random_basis((3, 2, 5), axis=2, by=(1,))
    array = some((3, 2, 5))
    changed = change_basis(array, basis)
    for i in range(3):
        for head in range(2):
            for channel in range(5):
                assert changed[i, head, channel] == array[i, head, basis.table[head, channel]]


@given(st.permutations(range(4)), st.integers(1, 3), st.integers(0, 99))
def test_inverse_undoes(axes: list[int], dependencies: int, seed: int) -> None:
    shape = (2, 3, 4, 5)
    by = tuple(sorted(axes[1 : 1 + dependencies]))
    basis = random_basis(shape, axes[0], by, seed)
    array = some(shape)
    np.testing.assert_array_equal(change_basis(change_basis(array, basis), basis.inverse()), array)


def test_canonical_form() -> None:
    table = np.array([[1, 0, 2], [2, 1, 0]])
    basis = make_basis(3, (2, 1), np.broadcast_to(table[:, None], (2, 4, 3)))
    assert basis == Basis(3, (2,), table)
    assert make_basis(0, (1,), np.broadcast_to(np.arange(3), (2, 3))) is None


@pytest.mark.parametrize(
    ("source", "target", "axis", "by"),
    [
        ((2, 3, 20), (2, 3, 4, 5), 2, ()),  # split into heads: block-diagonal tables only, see below
        ((2, 3, 4, 5), (2, 3, 20), 3, (2,)),
        ((2, 3, 4, 5), (6, 20), 3, (2,)),
        ((6, 20), (2, 3, 20), 1, ()),
        ((2, 4, 2, 5), (2, 8, 5), 3, (1,)),  # repeated KV heads
        ((2, 8, 5), (2, 4, 2, 5), 2, (1,)),
        ((2, 3, 4, 3, 5), (2, 3, 60), 4, (2, 3)),  # fused qkv
        ((2, 4, 7, 5), (8, 7, 5), 3, (1,)),  # batch and heads merged
        ((2, 1, 6), (2, 6), 2, ()),
        ((2, 6), (1, 2, 1, 6), 1, ()),
        ((2, 4, 3, 5), (2, 60), 1, ()),  # whole heads
    ],
)
def test_reshape_commutes(
    source: tuple[int, ...], target: tuple[int, ...], axis: int, by: tuple[int, ...]
) -> None:
    basis = random_basis(source, axis, by)
    if source == (2, 3, 20):
        heads = random_basis((4, 5), axis=1, by=(0,))
        basis = Basis(2, (), (heads.table + 5 * np.arange(4)[:, None]).reshape(-1))
    carried = reshape_basis(basis, source, target)
    array = some(source)
    assert carried is not None
    expected = change_basis(array, basis).reshape(target)
    np.testing.assert_array_equal(change_basis(array.reshape(target), carried), expected)
    assert reshape_basis(carried, target, source) == make_basis(basis.axis, basis.by, basis.table)


@pytest.mark.parametrize("order", [("batch", 4), ("4*batch",)])
def test_reshape_with_a_merged_batch_is_periodic(order: tuple[str | int, ...]) -> None:
    """Heads merged with a batch of unknown size (BLOOM): the table repeats with the number of heads."""
    split, merged = ("batch", 4, "sequence", 5), ("4*batch", "sequence", 5)
    by_head = random_basis((3, 4, 7, 5), axis=3, by=(1,))
    periodic = Basis(2, (0,), by_head.table)
    assert reshape_basis(by_head, split, merged) == periodic
    assert reshape_basis(periodic, merged, split) == by_head
    array = some((3, 4, 7, 5))
    expected = change_basis(array, by_head).reshape(12, 7, 5)
    np.testing.assert_array_equal(change_basis(array.reshape(12, 7, 5), periodic), expected)


@pytest.mark.parametrize(
    ("basis", "source", "target", "reason"),
    [
        (random_basis((2, 20), 1, ()), (2, 20), (2, 4, 5), "moves channels across the axes"),
        (random_basis((3, 4, 5), 1, (0,)), ("b", 4, 5), ("5*b", 4), "unknown size"),
        (random_basis((3, 4, 5), 2, (1,)), ("b", 4, 5), (4, "b", 5), "cuts differently"),
    ],
)
def test_reshape_refuses(basis: Basis, source: tuple, target: tuple, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        reshape_basis(basis, source, target)


@pytest.mark.parametrize(
    ("axis", "by", "squeezed"),
    [(3, (1,), False), (1, (), False), (3, (1, 2), False), (2, (), False), (3, (1,), True), (1, (), True)],
)
def test_part_of_a_whole(axis: int, by: tuple[int, ...], squeezed: bool) -> None:
    """Permuting one part of axis 2 and nothing else, and getting it back from the whole."""
    start, stop = (4, 5) if squeezed else (2, 5)
    shape = (2, 3, 6, 4)
    whole = some(shape)
    part = whole[:, :, start] if squeezed else whole[:, :, start:stop]
    position = {a: a - (a > 2) for a in range(4)} if squeezed else dict(enumerate(range(4)))
    basis = random_basis(part.shape, position[axis], tuple(position[b] for b in by))
    widened = widen(basis, 2, start, stop, 6, squeezed=squeezed)
    assert widened is not None
    expected = whole.copy()
    changed = change_basis(part, basis)
    expected[:, :, start:stop] = changed[:, :, None] if squeezed else changed
    np.testing.assert_array_equal(change_basis(whole, widened), expected)
    assert narrow(widened, 2, start, stop, squeezed=squeezed) == basis
    assert narrow(widened, 2, 0, 1, squeezed=squeezed) is None


def test_narrow_refuses_what_crosses_the_cut() -> None:
    with pytest.raises(Refused, match="into or out of the part"):
        narrow(Basis(0, (), np.array([0, 2, 1, 3])), 0, 0, 2, squeezed=False)
