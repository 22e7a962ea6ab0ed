"""The tuner's table: which kernel is the fastest at each shape and number of tokens, on one GPU.

A table is valid for one GPU and one set of kernels, which it names; it is not used for others. Row M serves
every number of tokens above the previous row's up to M; above the last row the heuristic decides.

What is not in a table is left to the library's static heuristic: the kernels are the same, the choice is less
good.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from esparse_trt.errors import EsparseError
from esparse_trt.progress import note

SCHEMA = 1
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096, 8192)
TUNE = "run `esparse-trt tune RECIPE` on the GPU that will run the engine"

Key = tuple[int, int, str, int]  # n, k, dtype, m


@dataclass(frozen=True)
class Device:
    """The GPU that was measured on; driver and CUDA version are for the record."""

    name: str
    capability: int
    multiprocessors: int
    driver: str
    cuda: str

    def same_gpu(self, other: Device) -> bool:
        """Whether timings of the one hold for the other."""
        mine = (self.name, self.capability, self.multiprocessors)
        return mine == (other.name, other.capability, other.multiprocessors)


@dataclass(frozen=True)
class Row:
    """The fastest candidate for m tokens, in microseconds per GEMM; and torch's dense product then."""

    n: int
    k: int
    dtype: str
    m: int
    candidate: str
    us: float
    p10: float
    p90: float
    dense_us: float
    dense_p10: float
    dense_p90: float

    @property
    def key(self) -> Key:
        """What the row is found by."""
        return self.n, self.k, self.dtype, self.m

    @property
    def speedup(self) -> float:
        """Over dense."""
        return self.dense_us / self.us


@dataclass
class Table:
    """Rows of one GPU and one set of kernels."""

    device: Device
    version: str
    kernel_set: str
    rows: dict[Key, Row] = field(default_factory=dict)

    def of_layer(self, n: int, k: int, dtype: str) -> list[Row]:
        """The rows of a layer in ascending order of tokens."""
        return [row for key, row in sorted(self.rows.items()) if key[:3] == (n, k, dtype)]

    def save(self, path: Path) -> None:
        """Write the file under another name, then rename it into place."""
        content = {
            "schema": SCHEMA,
            "device": asdict(self.device),
            "version": self.version,
            "kernel_set": self.kernel_set,
            "rows": [asdict(row) for _, row in sorted(self.rows.items())],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(content, indent=1))
        temporary.replace(path)


def default_path(gpu_name: str) -> Path:
    """Where the table of a GPU lies unless the user says otherwise: in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    slug = re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")
    return Path(base) / "esparse-trt" / "tune" / f"{slug}.json"


def load_table(path: Path) -> Table:
    """Read a table.

    Raises:
        EsparseError: the file is not there, or not such a table.
    """
    fix = "run `esparse-trt tune` again, or name another file"
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if content["schema"] != SCHEMA:
            raise EsparseError(
                f"a table of schema {content['schema']}; this version reads schema {SCHEMA}",
                where=path,
                fix=fix,
            )
        rows = [Row(**row) for row in content["rows"]]
        device = Device(**content["device"])
        table = Table(device, content["version"], content["kernel_set"], {row.key: row for row in rows})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EsparseError(f"not a tuning table: {error!r}", where=path, fix=fix) from error
    return table


def why_foreign(table: Table, kernel_set: str, device: Device | None) -> str | None:
    """Why a table does not hold for these kernels on this GPU (None: not known); None if it does."""
    if table.kernel_set != kernel_set:
        return (
            f"it was measured with the kernels {table.kernel_set} (version {table.version}), "
            f"the library has {kernel_set}"
        )
    if device is not None and not table.device.same_gpu(device):
        return (
            f"it was measured on {table.device.name} with {table.device.multiprocessors} multiprocessors, "
            f"this GPU is {device.name} with {device.multiprocessors}"
        )
    return None


def usable_table(path: Path, kernel_set: str, device: Device | None) -> Table | None:
    """The table at `path` if it holds for these kernels and this GPU; otherwise a warning, and None.

    Raises:
        EsparseError: there is a file, but it is not a table.
    """
    if not path.is_file():
        note(f"no tuning table at {path}: kernels are chosen by the static heuristic; {TUNE}")
        return None
    table = load_table(path)
    if reason := why_foreign(table, kernel_set, device):
        note(
            f"{path} is not used: {reason}. Kernels are chosen by the static heuristic; {TUNE}",
            style="yellow",
        )
        return None
    return table


# --- what it is used for -----------------------------------------------------------------------------------


def choices(table: Table | None, n: int, k: int, dtype: str) -> str | None:
    """The plugin's field "1=name,2=name,..." for a layer, ascending; None where nothing was measured."""
    rows = table.of_layer(n, k, dtype) if table else []
    return ",".join(f"{row.m}={row.candidate}" for row in rows) or None


@dataclass(frozen=True)
class Decision:
    """Sparse or dense for one layer, once: weights are never stored twice.

    Attributes:
        sparse: whether it runs sparse.
        code: faster, sparse wins at every number of tokens; mixed, at some of them, and the geometric mean of
            the ratios decides; dense_faster, at none; not_measured, no row serves one of them.
        reason: the same for people, with the figures.
    """

    sparse: bool
    code: Literal["faster", "mixed", "dense_faster", "not_measured"]
    reason: str


def decide(table: Table | None, n: int, k: int, dtype: str, tokens: Iterable[int]) -> Decision:
    """Whether a layer should run sparse at these numbers of tokens, those of the recipe's profiles.

    A layer that was not measured runs sparse: it is smaller, and the static heuristic has a kernel for it.
    """
    rows = table.of_layer(n, k, dtype) if table else []
    served = {m: _serving(rows, m) for m in sorted(set(tokens))}
    if missing := [str(m) for m, row in served.items() if row is None]:
        what = f"[{n}, {k}] was not measured at M = {', '.join(missing)}; {TUNE}"
        return Decision(True, "not_measured", what)
    found = {m: row for m, row in served.items() if row is not None}
    text = "; ".join(
        f"M = {m}: {row.us:.1f} us sparse, {row.dense_us:.1f} us dense (x{row.speedup:.2f})"
        for m, row in found.items()
    )
    speedups = [row.speedup for row in found.values()]
    if min(speedups) > 1:
        return Decision(True, "faster", f"sparse is faster: {text}")
    if max(speedups) <= 1:
        return Decision(False, "dense_faster", f"nothing is faster than dense: {text}")
    sparse = math.prod(speedups) > 1
    return Decision(sparse, "mixed", f"{'sparse' if sparse else 'dense'} is faster in the mean: {text}")


def _serving(rows: list[Row], m: int) -> Row | None:
    """The row that speaks for m tokens: the next one above; above all buckets the last."""
    above = next((row for row in rows if row.m >= m), None)
    return above or (rows[-1] if rows and rows[-1].m >= BUCKETS[-1] else None)
