"""How far one array lies from another: the figures of a `Comparison`."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from esparse_trt.errors import CheckFailed, EsparseError
from esparse_trt.evaluate.verify_record import Comparison

_CHUNK = 1 << 20  # elements converted to float64 at a time


def compare_arrays(
    name: str,
    a: np.ndarray,
    b: np.ndarray,
    *,
    block: int | None = None,
    step: Literal["prefill", "decode"] = "prefill",
    sides: tuple[str, str] = ("a", "b"),
) -> Comparison:
    """Compare array `b` with the reference `a`, of the same shape, in float64.

    With d = b − a over all elements: max and mean of |d|; max and mean of |d| / |a| over the elements where
    a ≠ 0 (Polygraphy's definition, without its 2e-16 in place of zero, which drowns the rest); relative L2
    norm ‖d‖₂ / ‖a‖₂ (1 if only a is 0, 0 if both are); cosine a·b / (‖a‖₂ ‖b‖₂) (1 if both are 0).

    Raises:
        EsparseError: the shapes differ.
        CheckFailed: an element of either is NaN or Inf, so that the figures would mean nothing; says on
            which of the `sides`.
    """
    if a.shape != b.shape:
        raise EsparseError(f"shapes {list(a.shape)} and {list(b.shape)} cannot be compared", where=name)
    a, b = a.reshape(-1), b.reshape(-1)
    max_abs = sum_abs = max_rel = sum_rel = dd = aa = bb = ab = 0.0
    nonzero = 0
    for start in range(0, a.size, _CHUNK):
        x = a[start : start + _CHUNK].astype(np.float64)
        y = b[start : start + _CHUNK].astype(np.float64)
        with np.errstate(invalid="ignore"):  # Inf - Inf, reported below
            d = y - x
        if not np.isfinite(d).all():
            _raise_not_finite(name, x, y, sides)
        error, size = np.abs(d), np.abs(x)
        max_abs, sum_abs = max(max_abs, float(error.max())), sum_abs + float(error.sum())
        relative = error[size > 0] / size[size > 0]
        if relative.size:
            max_rel, sum_rel = max(max_rel, float(relative.max())), sum_rel + float(relative.sum())
            nonzero += relative.size
        dd, ab = dd + float(d @ d), ab + float(x @ y)
        aa, bb = aa + float(x @ x), bb + float(y @ y)
    return Comparison(
        name=name,
        block=block,
        step=step,
        max_abs=max_abs,
        mean_abs=sum_abs / max(a.size, 1),
        max_rel=max_rel,
        mean_rel=sum_rel / max(nonzero, 1),
        relative_l2=math.sqrt(dd / (aa or bb or 1.0)),
        cosine=_cosine(aa, bb, ab),
    )


def _cosine(aa: float, bb: float, ab: float) -> float:
    if aa == 0 or bb == 0:
        return 1.0 if aa == bb else 0.0
    return max(-1.0, min(1.0, ab / math.sqrt(aa) / math.sqrt(bb)))


def _raise_not_finite(name: str, x: np.ndarray, y: np.ndarray, sides: tuple[str, str]) -> None:
    bad = [side for side, values in zip(sides, (x, y), strict=True) if not np.isfinite(values).all()]
    raise CheckFailed(
        f"NaN or Inf in this tensor in {' and '.join(bad)}",
        where=name,
        fix="activations overflow the export type: set export.dtype to float32",
    )
