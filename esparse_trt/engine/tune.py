"""The tuner: times every candidate on this GPU, per layer shape and number of tokens, and fills the table.

At each cell (shape, M) a quick pass times the candidates that can run it, and the best of them once more
with programmatic dependent launch. Those within `KEEP` of the best of either kind are timed again against
each other and against torch's dense product, for longer and at sustained clocks; the fastest of each kind go
into the table.

M ascends, and candidates that cannot win are left out of the quick pass: no kernel gets faster with more
tokens, so t(M') ≤ t(M) for every M' ≤ M measured before; and the best at M takes no longer than M / M' times
the best at M', run over the tokens in parts. A candidate whose t(M') is above that can wait for a larger M.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from esparse_trt.engine import timing
from esparse_trt.engine.kernels import Gpu, Kernels, Problem
from esparse_trt.engine.operands import Operands
from esparse_trt.engine.table import (
    BUCKETS,
    LAUNCHES,
    Best,
    Device,
    Launch,
    Row,
    Table,
    load_table,
    why_foreign,
)
from esparse_trt.errors import EsparseError
from esparse_trt.progress import note, track
from esparse_trt.system import require_gpu

KEEP = 1.08  # slower than the best by no more: timed again
MOST = 4  # of them
RETRIED = 8  # of the best, with programmatic dependent launch
MARGIN = 1.15  # for noise, on what a candidate may take and still be in the quick pass
QUICK_GRAPH_US, QUICK_BUDGET_US = 300.0, 1.0  # the least number of rounds
FINAL_BUDGET_US, WARM_US = 30_000.0, 10_000.0
REFERENCE = "reference"  # CUDA cores: only where nothing else runs
DENSE = "torch.mm"


def this_device(kernels: Kernels) -> Device:
    """The GPU that torch uses.

    Raises:
        EsparseError: there is none, or torch was built without CUDA.
    """
    require_gpu("run it on the machine that will serve the model, with a CUDA build of torch")
    gpu = kernels.current_gpu()
    return Device(
        torch.cuda.get_device_name(), gpu.capability, gpu.multiprocessors, driver_version(),
        str(torch.version.cuda),
    )  # fmt: skip


def driver_version() -> str:
    """The NVIDIA driver's version, or "unknown"."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def open_table(path: Path, kernels: Kernels, device: Device) -> Table:
    """The table to go on with: the one at `path`, or an empty one.

    Raises:
        EsparseError: the file belongs to another GPU, or is not a table.
    """
    empty = Table(device, kernels.version, kernels.kernel_set, date.today().isoformat())
    if not path.exists():
        return empty
    table = load_table(path)
    if not table.device.same_gpu(device):
        raise EsparseError(
            f"{why_foreign(table, table.kernel_set, device)}",
            where=path,
            fix="name another file with --table",
        )
    if reason := why_foreign(table, kernels.kernel_set, device):
        note(f"{path} starts anew: {reason}", style="yellow")
        return empty
    return table


def tune(
    kernels: Kernels,
    table: Table,
    path: Path,
    shapes: Sequence[tuple[int, int]],
    dtype: str = "float16",
    tokens: Sequence[int] = BUCKETS,
) -> None:
    """Measure the cells that the table lacks and write it after each.

    Args:
        kernels: the library.
        table: is filled.
        path: of the table's file.
        shapes: [N, K] of the layers.
        dtype: float16 or bfloat16.
        tokens: the values of M.
    """
    gpu = Gpu(table.device.capability, table.device.multiprocessors)
    missing = {(n, k): [m for m in sorted(tokens) if (n, k, dtype, m) not in table.rows] for n, k in shapes}
    cells = [(n, k, m) for (n, k), ms in missing.items() for m in ms]
    with torch.cuda.stream(timing.stream()):
        layer: Layer | None = None
        for n, k, m in track(cells, "tuning", total=len(cells), unit="cell"):
            if layer is None or (layer.n, layer.k) != (n, k):
                layer = None  # the old one's memory is needed
                layer = Layer(kernels, gpu, n, k, dtype, rows=max(tokens))
            row = layer.tune(m)
            if row is not None:
                table.rows[row.key] = row
                table.date = date.today().isoformat()
                table.save(path)


class Layer:
    """One layer while it is tuned, M ascending. To be used under `torch.cuda.stream(timing.stream())`."""

    def __init__(self, kernels: Kernels, gpu: Gpu, n: int, k: int, dtype: str, rows: int) -> None:
        self.kernels, self.gpu = kernels, gpu
        self.n, self.k, self.dtype = n, k, dtype
        self.operands = Operands(n, k, dtype, rows)
        self._least: dict[str, float] = {}  # microseconds at the largest M measured so far
        self._best = (0, math.inf)  # that M, and the best candidate's microseconds there

    def tune(self, m: int) -> Row | None:
        """The row for m tokens; None where no candidate runs."""
        quick = self.quick(m)
        if not quick:
            return None
        kept: dict[Launch, list[str]] = {
            "plain": shortlist(quick),
            "programmatic": shortlist(self.quick_programmatic(m, sorted(quick, key=quick.__getitem__))),
        }
        contestants = {("dense", DENSE): self.dense_replay(m)}
        for launch, names in kept.items():
            for name in names:
                contestants[launch, name] = self.replay(m, name, programmatic=launch == "programmatic")
        times = timing.measure(contestants, budget_us=FINAL_BUDGET_US, warm_us=WARM_US)
        best = {kind: _fastest(times, kind) for kind in (*LAUNCHES, "dense")}
        return Row(self.n, self.k, self.dtype, m, **best)

    def quick(self, m: int) -> dict[str, float]:
        """Microseconds of every candidate that can run and may be the best, from a few replays."""
        problem = Problem(m, self.n, self.k, self.dtype)
        names = self.kernels.supporting(problem, self.gpu)
        names = [name for name in names if name != REFERENCE] or names
        last, best = self._best
        most = MARGIN * best * m / last if last else math.inf
        names = [name for name in names if self._least.get(name, 0.0) <= most] or names
        contestants = {name: self.replay(m, name, graph_us=QUICK_GRAPH_US) for name in names}
        times = timing.measure(contestants, budget_us=QUICK_BUDGET_US, rounds=(3, 3))
        quick = {name: time.us for name, time in times.items()}
        self._least |= quick
        self._best = (m, min(quick.values(), default=math.inf))
        return quick

    def quick_programmatic(self, m: int, ranked: Sequence[str]) -> dict[str, float]:
        """Microseconds of the best candidates of the quick pass with programmatic dependent launch."""
        contestants = {
            name: self.replay(m, name, programmatic=True, graph_us=QUICK_GRAPH_US)
            for name in ranked[:RETRIED]
        }
        times = timing.measure(contestants, budget_us=QUICK_BUDGET_US, rounds=(3, 3))
        return {name: time.us for name, time in times.items()}

    def replay(
        self, m: int, candidate: str, *, programmatic: bool = False, graph_us: float = timing.GRAPH_US
    ) -> timing.Replay:
        """A graph of one of our kernels."""
        launch = self.operands.run_sparse(self.kernels, m, candidate, programmatic=programmatic)
        return self.operands.replay(m, launch, len(self.operands.sparse), graph_us=graph_us)

    def dense_replay(self, m: int) -> timing.Replay:
        """A graph of torch's dense product."""
        copies = len(self.operands.dense)
        return self.operands.replay(m, self.operands.run_dense(m), copies, graph_us=timing.GRAPH_US)


def _fastest(times: dict[tuple[str, str], timing.Timing], kind: str) -> Best:
    us, name = min((time.us, name) for (found, name), time in times.items() if found == kind)
    time = times[kind, name]
    return Best(name, *(round(value, 3) for value in (us, time.p10, time.p90)))


def shortlist(quick: dict[str, float]) -> list[str]:
    """The candidates worth timing again, best first."""
    ranked = sorted(quick, key=lambda name: quick[name])
    return [name for name in ranked[:MOST] if quick[name] <= KEEP * quick[ranked[0]]]
