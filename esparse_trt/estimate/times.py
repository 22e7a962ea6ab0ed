"""How long a GEMM takes on a GPU: measured where it was, interpolated between what was, else from a roofline.

**Roofline.** y[M, N] = x[M, K] W[N, K]ᵀ in 2-byte types moves W, x and y once, and multiplies 2 M N K times
(half of that with 2:4 weights, which tensor cores that skip zeros do at twice the rate):

    t = start + max( (w N K + 2 M (K + N)) / (a · bandwidth),  2 M N K / (b · peak) )

with w = 2 bytes dense and 9/8 packed, and the stated bandwidth and peak of the GPU (`gpus.py`). `start`, a
and b were fitted to 215 cells of an H100, by least mean |ln(t / measured)|; `tests/estimate/test_times.py`
holds how far off it is over the 270 that `tables/h100.json` has. Other GPUs are assumed to reach the same
shares.

**Tables.** At a measured shape the time at M is interpolated between rows (`engine.table.times`), and beyond
the last row it grows with M, if that has `SATURATED` tokens or more. At another shape the roofline is scaled
by what it misses at the measured ones: the mean of ln(measured / roofline) at the same M over all measured
shapes, weighted by 1 / (distance² + 0.01) in (ln N, ln K).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from esparse_trt.engine.table import Launch, Row, Table, times
from esparse_trt.estimate.gpus import Gpu
from esparse_trt.graph import es24

Source = Literal["measured", "interpolated", "roofline"]
SATURATED = 1024  # tokens from which on the tensor cores are busy: twice the tokens take twice the time
_NEAR = 0.01


@dataclass(frozen=True)
class Ceiling:
    """What kernels of one kind reach: microseconds to start, shares of the stated bandwidth and peak."""

    start_us: float
    bandwidth: float
    tensor: float


DENSE = Ceiling(3.2, 0.89, 0.67)
SPARSE: dict[Launch, Ceiling] = {
    "plain": Ceiling(3.6, 0.93, 0.45),
    "programmatic": Ceiling(2.3, 0.94, 0.45),
}


@dataclass(frozen=True)
class Pair:
    """Microseconds of one GEMM, sparse and dense, and where they come from."""

    sparse: float
    dense: float
    source: Source


class Times:
    """Times of GEMMs on one GPU.

    Args:
        gpu: the GPU.
        tables: measured on it, the first that has a shape wins.
        dtype: of the weights.
        launch: how sparse kernels are launched.
    """

    def __init__(
        self, gpu: Gpu, tables: Sequence[Table] = (), dtype: str = "float16", launch: Launch = "programmatic"
    ) -> None:
        self.gpu, self.dtype, self.launch = gpu, dtype, launch
        self.rows: dict[tuple[int, int], list[Row]] = {}
        for table in tables:
            for n, k in sorted({row.key[:2] for row in table.rows.values() if row.dtype == dtype}):
                self.rows.setdefault((n, k), table.of_layer(n, k, dtype))

    def gemm(self, n: int, k: int, m: int) -> Pair:
        """Of m tokens with weights [n, k]."""
        rows = self.rows.get((n, k), [])
        if (pair := self._at(rows, m)) is not None:
            return Pair(*pair, "measured" if m <= rows[-1].m else "interpolated")
        roofline = self.roofline(n, k, m)
        correction = self._correction(n, k, m)
        if correction is None:
            return Pair(*roofline, "roofline")
        return Pair(roofline[0] * correction[0], roofline[1] * correction[1], "interpolated")

    def roofline(self, n: int, k: int, m: int) -> tuple[float, float]:
        """Sparse and dense microseconds from the stated figures of the GPU."""
        return (
            _bound(self.gpu, SPARSE[self.launch], es24.packed_bytes(n, k), self.gpu.sparse, n, k, m),
            _bound(self.gpu, DENSE, 2 * n * k, self.gpu.dense, n, k, m),
        )

    def _at(self, rows: Sequence[Row], m: int) -> tuple[float, float] | None:
        """Microseconds at a measured shape, sparse and dense; None where nothing was measured near m."""
        if not rows or m <= rows[-1].m or rows[-1].m < SATURATED:
            return times(rows, m, self.launch)
        last = rows[-1]
        return last.sparse(self.launch).us * m / last.m, last.dense.us * m / last.m

    def _correction(self, n: int, k: int, m: int) -> tuple[float, float] | None:
        """What to multiply the roofline by, sparse and dense; None where nothing was measured at m."""
        sums, weights = [0.0, 0.0], 0.0
        for (other_n, other_k), rows in self.rows.items():
            pair = self._at(rows, m)
            if pair is None:
                continue
            weight = 1 / (math.log(n / other_n) ** 2 + math.log(k / other_k) ** 2 + _NEAR)
            weights += weight
            for side, expected in enumerate(self.roofline(other_n, other_k, m)):
                sums[side] += weight * math.log(pair[side] / expected)
        if not weights:
            return None
        return math.exp(sums[0] / weights), math.exp(sums[1] / weights)


def _bound(gpu: Gpu, ceiling: Ceiling, weight_bytes: float, peak: float, n: int, k: int, m: int) -> float:
    """Microseconds; `peak` counts the operations that the dense product would take."""
    memory = (weight_bytes + 2 * m * (n + k)) / (ceiling.bandwidth * gpu.bandwidth)
    tensor = 2 * m * n * k / (ceiling.tensor * peak)
    return ceiling.start_us + 1e6 * max(memory, tensor)
