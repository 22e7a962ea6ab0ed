"""How long the linear layers of a decode step take, for a speed budget.

A step with one sequence reads every weight once and does little else, so by default a layer's time is the
bytes of its weight, 2 a parameter dense and 9/16 of that packed. With the name of a GPU it is microseconds
there, as `estimate` has them: measured, or from a roofline.
"""

from __future__ import annotations

from collections.abc import Callable

from esparse_trt.graph import es24

SiteTimes = Callable[[int, int], tuple[float, float]]  # N, K of the layers of a site -> sparse, dense


def site_times(gpu: str | None) -> tuple[SiteTimes, str]:
    """The times of 2:4 and dense weights, and what they are of.

    Raises:
        EsparseError: `estimate` knows no such GPU.
    """
    if gpu is None:
        return _bytes, "bytes of weights"
    from esparse_trt.estimate.gpus import gpu_of
    from esparse_trt.estimate.predict import find_tables
    from esparse_trt.estimate.times import Times

    device = gpu_of(gpu)
    times = Times(device, [known.table for known in find_tables(device)])

    def at_one_token(n: int, k: int) -> tuple[float, float]:
        pair = times.gemm(n, k, 1)
        return (pair.sparse, pair.dense) if es24.why_not(n, k, es24.DTYPES[0]) is None else (pair.dense,) * 2

    return at_one_token, f"one token on an {device.title}, in microseconds"


def _bytes(n: int, k: int) -> tuple[float, float]:
    dense = 2 * n * k
    return (dense if es24.why_not(n, k, es24.DTYPES[0]) else es24.packed_bytes(n, k)), dense
