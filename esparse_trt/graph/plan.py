"""`fold_plan.json`: what became of every explicit permutation, and which tensors changed basis for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from esparse_trt.errors import EsparseError
from esparse_trt.graph.basis import Basis, change_basis
from esparse_trt.records import Record


class TensorBasis(Record):
    """`t'[.., c, ..] = t[.., table[c], ..]` along `axis`; the table may depend on the index in other axes."""

    axis: int
    by: list[int] = Field(description="axes that the table depends on, such as the KV head; usually empty")
    table: list[Any] = Field(description="integers, nested once for each of `by`")

    @classmethod
    def of(cls, basis: Basis) -> TensorBasis:
        """The JSON form of a change of basis."""
        return cls(axis=basis.axis, by=list(basis.by), table=basis.table.tolist())

    def basis(self) -> Basis:
        """The change of basis itself."""
        return Basis(self.axis, tuple(self.by), np.asarray(self.table, dtype=np.int64))


class FoldedGroup(Record):
    """Explicit permutations that vanished together, and the initializers that took them up."""

    gathers: list[str]
    initializers: dict[str, list[int]] = Field(description="initializer -> its permuted axes")


class FoldPlan(Record):
    """What `fold` did: everything needed to read a tensor of `sparse.onnx` in the original channel order."""

    folded: list[FoldedGroup]
    kept: dict[str, str] = Field(description="Gather node -> why it stays: what its permutation does")
    tensors: dict[str, TensorBasis] = Field(
        description="cache inputs and outputs, and outputs of linear layers, that changed basis"
    )


def load_plan(path: Path) -> FoldPlan:
    """Read `fold_plan.json`.

    Raises:
        EsparseError: the file is missing or does not fit.
    """
    try:
        return FoldPlan.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise EsparseError(
            f"cannot read the fold plan: {error}", where=path, fix="run the build again --from fold"
        ) from error


def undo(plan: FoldPlan, name: str, array: NDArray) -> NDArray:
    """A tensor of `sparse.onnx` in the original channel order; unchanged if its basis is the original one."""
    changed = plan.tensors.get(name)
    return change_basis(array, changed.basis().inverse()) if changed else array


def redo(plan: FoldPlan, name: str, array: NDArray) -> NDArray:
    """A tensor in the original channel order as `sparse.onnx` has it: what its cache inputs must be fed."""
    changed = plan.tensors.get(name)
    return change_basis(array, changed.basis()) if changed else array
