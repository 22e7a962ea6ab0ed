"""The tuner: times every candidate on this GPU, per layer shape and number of tokens, and fills the table.

At each cell (shape, M) a sieve of a few launches leaves out the hopeless candidates. A quick pass times the
others, and the best of them once more with programmatic dependent launch. The `finalists` of either kind are
timed again against each other and against torch's dense product, for longer and at sustained clocks; the
fastest of each kind go into the table.

Every candidate is timed at every M: what one took with fewer tokens is no bound, as a tile with absent tokens
can take longer than a full one.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
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

KEEP = 1.12  # slower than the best by no more: timed again
MOST, MOST_LOADED = 3, 8  # of them; the latter from
LOADED = 65  # tokens on: a GPU that multiplies so much runs into its power limit
RETRIED = 1.25  # slower than the best by no more: timed with programmatic dependent launch too
SIEVE = 1.5  # slower than the best by more, in the sieve: hopeless
SIEVE_GRAPH_US, QUICK_GRAPH_US = 60.0, 300.0
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
    """One layer while it is tuned. To be used under `torch.cuda.stream(timing.stream())`."""

    def __init__(self, kernels: Kernels, gpu: Gpu, n: int, k: int, dtype: str, rows: int) -> None:
        self.kernels, self.gpu = kernels, gpu
        self.n, self.k, self.dtype = n, k, dtype
        self.operands = Operands(n, k, dtype, rows)

    def tune(self, m: int) -> Row | None:
        """The row for m tokens; None where no candidate runs."""
        quick = self.quick(m)
        if not quick:
            return None
        kept: dict[Launch, list[str]] = {
            "plain": finalists(m, quick),
            "programmatic": finalists(m, self.quick_programmatic(m, quick)),
        }
        contestants = {("dense", DENSE): self.dense_replay(m)}
        for launch, names in kept.items():
            for name in names:
                contestants[launch, name] = self.replay(m, name, programmatic=launch == "programmatic")
        times = timing.measure(contestants, budget_us=FINAL_BUDGET_US, warm_us=WARM_US)
        best = {kind: _fastest(times, kind) for kind in (*LAUNCHES, "dense")}
        return Row(self.n, self.k, self.dtype, m, **best)

    def quick(self, m: int) -> dict[str, float]:
        """Microseconds of every candidate that can run and is not hopeless, from a few replays."""
        problem = Problem(m, self.n, self.k, self.dtype)
        names = self.kernels.supporting(problem, self.gpu)
        names = [name for name in names if name != REFERENCE] or names
        sieved = self._passes(m, names, SIEVE_GRAPH_US, rounds=1)
        most = SIEVE * min(sieved.values(), default=0.0)
        return self._passes(m, [name for name in names if sieved[name] <= most], QUICK_GRAPH_US, rounds=3)

    def quick_programmatic(self, m: int, quick: Mapping[str, float]) -> dict[str, float]:
        """Microseconds of the best candidates of the quick pass with programmatic dependent launch."""
        most = RETRIED * min(quick.values())
        names = [name for name, us in quick.items() if us <= most]
        return self._passes(m, names, QUICK_GRAPH_US, rounds=3, programmatic=True)

    def _passes(
        self, m: int, names: Sequence[str], graph_us: float, *, rounds: int, programmatic: bool = False
    ) -> dict[str, float]:
        """Microseconds of candidates, from so many replays of each."""
        contestants = {
            name: self.replay(m, name, programmatic=programmatic, graph_us=graph_us) for name in names
        }
        times = timing.measure(contestants, budget_us=0.0, rounds=(rounds, rounds))
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


def finalists(m: int, quick: Mapping[str, float]) -> list[str]:
    """The candidates worth timing again, best first.

    The quick pass is over before the clocks fall. With few tokens they do not, and the order stays. Otherwise
    it may change, the more so between different kernels: of those that differ only in CUTLASS's order of
    tiles one is enough.

    Args:
        m: tokens.
        quick: microseconds by candidate, in the quick pass.
    """
    ranked = sorted(quick, key=lambda name: quick[name])
    close = [name for name in ranked if quick[name] <= KEEP * quick[ranked[0]]]
    if m < LOADED:
        return close[:MOST]
    kernels: dict[str, str] = {}
    for name in close:
        kernels.setdefault(re.sub(r"^(cutlass_.*)_w\d[mn]$", r"\1", name), name)
    return list(kernels.values())[:MOST_LOADED]
