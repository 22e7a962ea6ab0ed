"""Sparse or dense, decided for each layer once and as a whole: no weight is ever stored twice.

A recipe's `traffic` says what the model will serve: batches of requests, each of which prefills
batch · prompt tokens once and then decodes `generated` times with one token a sequence. A layer's GEMM
therefore runs, for each entry with weight w,

    w             times at M = batch · prompt
    w · generated times at M = batch

and a layer runs sparse if that takes less time in all, by the tuner's table:

    Σ count(M) · sparse_us(M)  <  Σ count(M) · dense_us(M).

A layer that was not measured at one of these M runs sparse: it takes 0.5625 of the memory, and the library's
heuristic has a kernel for it. Where dense is faster at some M although the whole is not, the choice says so.

The TensorRT engine and the PyTorch runtime both decide by `choose`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from esparse_trt.engine.table import TUNE, Launch, Row, Table, choices, times
from esparse_trt.records import EngineLayer, Kernel, Reason
from esparse_trt.sections import SparseGemm, Traffic

Counts = Mapping[int, float]  # number of tokens M -> how often a layer multiplies that many
TimesAt = Callable[[int], tuple[float, float] | None]  # M -> microseconds sparse and dense, where known


@dataclass(frozen=True)
class Layer:
    """A GEMM with 2:4 weights [N, K] that can be packed."""

    name: str
    shape: tuple[int, int]


@dataclass(frozen=True)
class Verdict:
    """What the table says about one layer under a traffic.

    Attributes:
        code: faster, mixed, dense_faster or not_measured.
        reason: the same for people, with the figures.
        speedup: dense over sparse time of the whole traffic; None where not measured.
        dense_faster_at: M at which dense is faster, of all that were looked at.
    """

    code: Reason
    reason: str
    speedup: float | None
    dense_faster_at: tuple[int, ...]

    @property
    def sparse(self) -> bool:
        """Whether the layer should run sparse."""
        return self.speedup is None or self.speedup > 1


def counts(traffic: Iterable[Traffic]) -> dict[int, float]:
    """How often a layer runs at each number of tokens, ascending."""
    found: dict[int, float] = {}
    for entry in traffic:
        for m, count in ((entry.batch * entry.prompt, 1), (entry.batch, entry.generated)):
            if count:
                found[m] = found.get(m, 0.0) + entry.weight * count
    return dict(sorted(found.items()))


def choose(
    layers: Iterable[Layer],
    table: Table | None,
    traffic: Sequence[Traffic],
    *,
    dtype: str = "float16",
    launch: Launch = "plain",
    wish: SparseGemm = "auto",
    native: bool = False,
) -> list[EngineLayer]:
    """Decide for each layer.

    Args:
        layers: the packed GEMMs.
        table: of the tuner; None: nothing was measured.
        traffic: of the recipe.
        dtype: of the weights.
        launch: how the caller launches our kernels.
        wish: `engine.sparse_gemm` of the recipe; all but auto decide for every layer.
        native: whether layers outside of the plugin may use TensorRT's own kernels for 2:4 weights, which it
            times against its dense ones.
    """
    other: Kernel = "native" if native and wish != "dense" else "dense"
    chosen = []
    for layer in layers:
        verdict = judge_rows(table.of_layer(*layer.shape, dtype) if table else [], counts(traffic), launch)
        code, reason, kernel = verdict.code, verdict.reason, other
        if wish == "plugin" or (wish == "auto" and verdict.sparse):
            kernel = "plugin"
        if wish != "auto":
            measured = "" if verdict.speedup is None else f"; {reason}"
            code, reason = Reason.asked, f"the recipe sets engine.sparse_gemm: {wish}{measured}"
        chosen.append(
            EngineLayer(
                name=layer.name,
                kernel=kernel,
                code=code,
                reason=reason,
                speedup=verdict.speedup,
                dense_faster_at=list(verdict.dense_faster_at),
                choices=choices(table, *layer.shape, dtype, launch) if kernel == "plugin" else None,
            )
        )
    return chosen


def judge_rows(rows: Sequence[Row], wanted: Counts, launch: Launch = "plain") -> Verdict:
    """What a layer's rows of the table (ascending) say about a traffic."""
    return judge(wanted, lambda m: times(rows, m, launch), also=(row.m for row in rows))


def judge(wanted: Counts, at: TimesAt, also: Iterable[int] = ()) -> Verdict:
    """Whether a layer saves time over a traffic.

    Args:
        wanted: how often it runs at each number of tokens.
        at: its times.
        also: other numbers of tokens at which dense may be faster.
    """
    found = {m: at(m) for m in wanted}
    if missing := [str(m) for m, pair in found.items() if pair is None]:
        return Verdict(
            Reason.not_measured, f"not measured at M = {', '.join(missing)}; {TUNE}", None, ()
        )  # fmt: skip
    pairs = {m: pair for m, pair in found.items() if pair is not None}
    ours, dense = (sum(wanted[m] * pair[side] for m, pair in pairs.items()) for side in (0, 1))
    text = "; ".join(
        f"M = {m}: {sparse:.1f} us sparse, {other:.1f} us dense (x{other / sparse:.2f})"
        for m, (sparse, other) in pairs.items()
    )
    looked = {m: at(m) for m in also} | pairs
    slower = tuple(m for m, pair in sorted(looked.items()) if pair is not None and pair[0] >= pair[1])
    speedup = dense / ours
    wins = [sparse < other for sparse, other in pairs.values()]
    if all(wins):
        return Verdict(Reason.faster, f"sparse is faster: {text}", speedup, slower)
    if not any(wins):
        return Verdict(Reason.dense_faster, f"nothing is faster than dense: {text}", speedup, slower)
    which = "sparse" if speedup > 1 else "dense"
    return Verdict(Reason.mixed, f"{which} is faster over the whole traffic: {text}", speedup, slower)
