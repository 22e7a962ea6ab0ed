"""Changes of basis of tensors: the algebra that folding rests on.

A permutation that stands in a graph as `y = Gather(x, π, axis)` costs nothing if `x` is *computed* in
permuted order. Then every tensor that `x` is tied to changes basis: `t'[.., c, ..] = t[.., π[c], ..]`.
Behind a split into heads the table depends on the head, `t'[h, c] = t[h, π_h[c]]`, and in a fused qkv
projection also on which of q, k, v it is. `Basis` is exactly this: one axis that is permuted, a table that
may depend on other axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Dim = int | str | None  # a size, the name of a symbolic size, or unknown
Shape = tuple[Dim, ...]
Table = NDArray[np.int64]


class Refused(Exception):
    """A change of basis cannot pass; the message completes the sentence "it stays, because it ..."."""


@dataclass(frozen=True, eq=False)
class Basis:
    """`t'[i] = t[i with i[axis] replaced by table[i[by[0]], .., i[by[-1]], i[axis]]]`.

    Attributes:
        axis: the permuted axis.
        by: the axes that the table depends on, ascending, never containing `axis`.
        table: int64, one axis for each of `by`, then the permuted one; every row is a permutation. Along a
            `by` axis of symbolic size (batch x heads merged) it repeats with its own length as period.
    """

    axis: int
    by: tuple[int, ...]
    table: Table

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Basis)
            and (self.axis, self.by) == (other.axis, other.by)
            and np.array_equal(self.table, other.table)
        )

    __hash__ = None  # type: ignore[assignment]

    def inverse(self) -> Basis:
        """The change of basis that undoes this one."""
        return Basis(self.axis, self.by, np.argsort(self.table, axis=-1))


def make_basis(axis: int, by: Sequence[int], table: Table) -> Basis | None:
    """The basis in canonical form: `by` ascending and without axes the table does not vary along.

    Returns:
        None for the identity.
    """
    order = sorted(range(len(by)), key=lambda i: by[i])
    table = np.transpose(table, (*order, table.ndim - 1))
    kept: list[int] = []
    for axis_by in sorted(by):
        first: Table = np.take(table, 0, axis=len(kept))
        if np.array_equal(table, np.broadcast_to(np.expand_dims(first, len(kept)), table.shape)):
            table = first
        else:
            kept.append(axis_by)
    if np.array_equal(table, np.broadcast_to(np.arange(table.shape[-1]), table.shape)):
        return None
    return Basis(axis, tuple(kept), np.ascontiguousarray(table))


def change_basis(array: NDArray, basis: Basis) -> NDArray:
    """Apply a change of basis to an array: `array'[.., c, ..] = array[.., table[.., c], ..]`."""
    if not basis.by:
        return np.take(array, basis.table, axis=basis.axis)
    table = basis.table
    for position, axis in enumerate(basis.by):  # batch x heads merged: the table repeats
        if array.shape[axis] != table.shape[position]:
            repeats = [1] * table.ndim
            repeats[position] = array.shape[axis] // table.shape[position]
            table = np.tile(table, repeats)
    axes = (*basis.by, basis.axis)
    index = np.transpose(table, np.argsort(axes))
    shape = [1] * array.ndim
    for axis in axes:
        shape[axis] = array.shape[axis]
    return np.take_along_axis(array, index.reshape(shape), axis=basis.axis)


# --- reshape -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Block:
    """Neighbouring axes that a reshape turns into neighbouring axes of the same total size."""

    source: tuple[int, ...]
    target: tuple[int, ...]


def _blocks(source: Shape, target: Shape) -> list[_Block]:
    """Match axes from the right. What lies left of the first mismatch of symbolic sizes is one block."""
    blocks = []
    i, j = len(source), len(target)
    while i and j:
        if source[i - 1] == target[j - 1] and source[i - 1] is not None:
            lower_i, lower_j = i - 1, j - 1
        elif source[i - 1] == 1:
            lower_i, lower_j = i - 1, j
        elif target[j - 1] == 1:
            lower_i, lower_j = i, j - 1
        else:
            found = _equal_products(source[:i], target[:j])
            if found is None:
                break
            lower_i, lower_j = i - found[0], j - found[1]
        blocks.append(_Block(tuple(range(lower_i, i)), tuple(range(lower_j, j))))
        i, j = lower_i, lower_j
    return [*blocks, _Block(tuple(range(i)), tuple(range(j)))] if i or j else blocks


def _equal_products(source: Shape, target: Shape) -> tuple[int, int] | None:
    """How many trailing axes of each have the same product, or None if an unknown size comes first."""
    shapes, counts, products = (source, target), [0, 0], [1, 1]
    while 0 in counts or products[0] != products[1]:
        side = counts.index(0) if 0 in counts else int(products[0] > products[1])
        counts[side] += 1
        size = shapes[side][-counts[side]] if counts[side] <= len(shapes[side]) else None
        if not isinstance(size, int):
            return None
        products[side] *= size
    return counts[0], counts[1]


def reshape_basis(basis: Basis, source: Shape, target: Shape) -> Basis | None:
    """The same change of basis after `Reshape` from `source` to `target`; the inverse with both exchanged.

    A permutation of a merged heads x channels axis that maps every head to itself becomes one permutation per
    head; the head axis may be merged with a symbolic batch axis to its left.

    Raises:
        Refused: in the new shape the permutation would move entries along more than one axis.
    """
    blocks = _blocks(source, target)
    block = next(b for b in blocks if basis.axis in b.source)
    sizes = dict(zip((*basis.by, basis.axis), basis.table.shape, strict=True))
    if not all(isinstance(source[a], int) for a in block.source):
        raise Refused("is reshaped together with an axis of unknown size")
    # Lay the table out over all axes of the blocks it touches: [those of other blocks.., of this block..].
    others = [b for b in blocks if b is not block and set(b.source) & set(basis.by)]
    parts = [_periodic_axes(b, source, target, sizes) for b in others]
    outer = [axis for axes, _, _ in parts for axis in axes]
    inner = list(block.source)
    extent = {a: sizes[a] if a in sizes else _size(source, a) for a in (*outer, *inner)}
    full = _spread(basis, [*outer, *inner], extent)
    # Within the block: flat position -> flat position, and back to digits in the target's axes.
    digits = list(np.indices(full.shape)[len(outer) :])
    digits[inner.index(basis.axis)] = full
    flat = np.ravel_multi_index(tuple(digits), [extent[a] for a in inner])
    target_dims = [_size(target, axis) for axis in block.target]
    shape = [size for _, _, new in parts for size in new] + target_dims
    moved = np.unravel_index(flat.reshape(shape), target_dims)
    still = np.indices(shape)[len(shape) - len(target_dims) :]
    changed = [k for k in range(len(target_dims)) if not np.array_equal(moved[k], still[k])]
    if len(changed) != 1:
        raise Refused(f"moves channels across the axes that the reshape to {_show(target)} separates")
    main = changed[0]
    axes = [axis for _, new, _ in parts for axis in new] + list(block.target)
    position = len(axes) - len(target_dims) + main
    table = np.moveaxis(moved[main], position, -1)
    return make_basis(axes[position], [a for k, a in enumerate(axes) if k != position], table)


def _periodic_axes(
    block: _Block, source: Shape, target: Shape, sizes: dict[int, int]
) -> tuple[list[int], list[int], list[int]]:
    """Source axes, target axes and target sizes over which a table that depends on `block` is laid out.

    In a block with symbolic sizes only the static axes at its right end can carry the table, or the last
    axis itself, along which the table is periodic.
    """
    old, new = _static_suffix(block.source, source), _static_suffix(block.target, target)
    touched = [axis for axis in block.source if axis in sizes]
    if not set(touched) <= set(old):
        if touched != [block.source[-1]]:
            raise Refused("depends on an axis of unknown size that is reshaped")
        old = touched
    period = math.prod(sizes[a] if a in sizes else _size(source, a) for a in old)
    if not new and len(block.target) == 1:
        return old, [block.target[0]], [period]
    new_sizes = [_size(target, axis) for axis in new]
    if math.prod(new_sizes) != period:
        raise Refused(f"depends on an axis that the reshape to {_show(target)} cuts differently")
    return old, new, new_sizes


def _size(shape: Shape, axis: int) -> int:
    size = shape[axis]
    assert isinstance(size, int)
    return size


def _static_suffix(axes: Sequence[int], shape: Shape) -> list[int]:
    suffix: list[int] = []
    for axis in reversed(axes):
        if not isinstance(shape[axis], int):
            break
        suffix.insert(0, axis)
    return suffix


def _spread(basis: Basis, axes: list[int], extent: dict[int, int]) -> Table:
    """The table repeated along the axes it does not depend on, with its axes in the order of `axes`."""
    own = [axis for axis in axes if axis in (*basis.by, basis.axis)]
    order = [(*basis.by, basis.axis).index(axis) for axis in own]
    table = np.transpose(basis.table, order)
    shape = [extent[axis] if axis in own else 1 for axis in axes]
    return np.broadcast_to(table.reshape(shape), [extent[axis] for axis in axes])


def _show(shape: Shape) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


# --- parts of an axis ----------------------------------------------------------------------------------


def widen(basis: Basis, axis: int, start: int, stop: int, size: int, *, squeezed: bool) -> Basis | None:
    """The basis of a whole tensor of which the part `[start, stop)` of `axis` has the given one.

    Args:
        basis: of the part; if `squeezed`, the part lacks `axis`.
        axis: the axis of the whole that is cut.
        start: first index of the part.
        stop: one past its last index.
        size: length of `axis` in the whole.
        squeezed: whether the part lacks the axis, as with Gather at one index.
    """
    if squeezed:
        basis = Basis(
            basis.axis + (basis.axis >= axis), tuple(b + (b >= axis) for b in basis.by), basis.table
        )
    if basis.axis == axis:
        whole = np.broadcast_to(np.arange(size), (*basis.table.shape[:-1], size)).copy()
        whole[..., start:stop] = start + basis.table
        return make_basis(axis, basis.by, whole)
    if axis in basis.by:
        table = np.moveaxis(basis.table, basis.by.index(axis), 0)
    else:
        table = np.broadcast_to(basis.table, (stop - start, *basis.table.shape))
    whole = np.broadcast_to(np.arange(table.shape[-1]), (size, *table.shape[1:])).copy()
    whole[start:stop] = table
    return make_basis(basis.axis, (axis, *(b for b in basis.by if b != axis)), whole)


def narrow(basis: Basis, axis: int, start: int, stop: int, *, squeezed: bool) -> Basis | None:
    """The basis of the part `[start, stop)` of `axis` of a tensor that has the given one.

    Raises:
        Refused: the permutation moves entries into or out of the part.
    """
    if basis.axis == axis:
        table = basis.table[..., start:stop] - start
        if table.size and (table.min() < 0 or table.max() >= stop - start):
            raise Refused(f"moves channels into or out of the part [{start}, {stop}) that is cut out")
        return make_basis(axis, basis.by, table) if not squeezed else None
    by, table = list(basis.by), basis.table
    if axis in by:
        position = by.index(axis)
        table = table.take(range(start, stop), axis=position)
        if squeezed:
            table = np.take(table, 0, axis=position)
            by.remove(axis)
    shift = (lambda a: a - (a > axis)) if squeezed else (lambda a: a)
    return make_basis(shift(basis.axis), [shift(b) for b in by], table)
