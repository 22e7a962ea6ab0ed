"""Looking at every group of m weights along K of one stored tensor."""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from esparse_trt.sparsity.pattern import Pattern

_CHUNK = 1 << 24  # weights looked at in one go

_ML_DTYPES: dict[torch.dtype, Any] = {
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.float8_e5m2: ml_dtypes.float8_e5m2,
}


class Violation(NamedTuple):
    """The first group in memory order that has too many nonzeros."""

    row: int
    group: int
    values: list[float]

    def __str__(self) -> str:
        nonzeros = sum(value != 0 for value in self.values)
        channel = self.group * len(self.values)
        shown = ", ".join(f"{value:.4g}" for value in self.values)
        channels = f"channels {channel} to {channel + len(self.values) - 1}"
        return f"row {self.row}, group {self.group} ({channels}) has {nonzeros} nonzeros: [{shown}]"


class Examined(NamedTuple):
    """What a tensor looks like: numbers of groups, of those that conform, share of zeros, first violation."""

    groups: int
    conforming: int
    sparsity: float
    violation: Violation | None


def examine(weight: NDArray, k_axis: int, pattern: Pattern) -> Examined:
    """Count the groups with at most n nonzeros among m consecutive weights along K; −0.0 is a zero.

    Args:
        weight: 2-D, of any float or integer type, as stored.
        k_axis: which axis is K; its length must be a multiple of m.
        pattern: n:m.
    """
    kept, m = pattern
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    step = -(-rows // m) * m
    groups = conforming = zeros = 0
    violation = None
    for start in range(0, weight.shape[0], step):
        nonzero = _nonzero(weight[start : start + step])
        slots = [nonzero[j::m] if k_axis == 0 else nonzero[:, j::m] for j in range(m)]
        bad = np.add.reduce(slots, dtype=np.uint16) > kept
        groups += bad.size
        conforming += bad.size - int(bad.sum())
        zeros += nonzero.size - int(nonzero.sum())
        if violation is None and bad.any():
            i, j = (int(index) for index in np.unravel_index(bad.argmax(), bad.shape))
            row, group = (j, start // m + i) if k_axis == 0 else (start + i, j)
            values = (weight.T if k_axis == 0 else weight)[row, group * m : (group + 1) * m]
            violation = Violation(row, group, values.astype(np.float64).tolist())
    return Examined(groups, conforming, zeros / weight.size if weight.size else 0.0, violation)


def _nonzero(values: NDArray) -> NDArray[np.bool_]:
    """By bits, so that types without arithmetic are as quick as others: all but the sign bit."""
    if np.issubdtype(values.dtype, np.integer):
        return values != 0
    bits = values.view(f"u{values.dtype.itemsize}")
    return bits << 1 != 0


def as_numpy(tensor: torch.Tensor) -> NDArray:
    """A tensor as an array that shares its memory, also of the types that torch does not hand to numpy."""
    if tensor.dtype in _ML_DTYPES:
        integers = {1: torch.uint8, 2: torch.int16}[tensor.element_size()]
        return tensor.view(integers).numpy().view(_ML_DTYPES[tensor.dtype])
    return tensor.numpy()
