"""The tuner's table: which kernel is the fastest at each shape and number of tokens, on one GPU.

A table is valid for one GPU and one set of kernels, which it names; it is not used for others. Row M serves
every number of tokens above the previous row's up to M; above the last row the heuristic decides.

Each row has the best kernel for either way of launching: `plain`, one after the other, as TensorRT runs our
plugin, and `programmatic`, with programmatic dependent launch, as the PyTorch runtime does: a kernel then
fetches its first weights while the one before it ends, and another candidate may be the fastest.

What is not in a table is left to the library's static heuristic: the kernels are the same, the choice is less
good. For some GPUs this package ships a table of well-known layers (`tables/`, from plugins/bench): where the
user has none, the PyTorch runtime takes its choices and `estimate` its times.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from esparse_trt.artifacts import write_atomic
from esparse_trt.errors import EsparseError
from esparse_trt.progress import note

SCHEMA = 2
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096, 8192)
TUNE = "run `esparse-trt tune RECIPE` on the GPU that will run the engine"

Key = tuple[int, int, str, int]  # n, k, dtype, m
Launch = Literal["plain", "programmatic"]
LAUNCHES: tuple[Launch, ...] = ("plain", "programmatic")


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
class Best:
    """The fastest kernel of a kind: microseconds per GEMM, median with 10th and 90th percentile."""

    kernel: str
    us: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Row:
    """What runs fastest for m tokens: our kernels by way of launching, and the dense product."""

    n: int
    k: int
    dtype: str
    m: int
    plain: Best
    programmatic: Best
    dense: Best

    @property
    def key(self) -> Key:
        """What the row is found by."""
        return self.n, self.k, self.dtype, self.m

    def sparse(self, launch: Launch) -> Best:
        """Our fastest kernel, launched that way."""
        return self.programmatic if launch == "programmatic" else self.plain

    def speedup(self, launch: Launch = "plain") -> float:
        """Over dense."""
        return self.dense.us / self.sparse(launch).us


@dataclass
class Table:
    """Rows of one GPU and one set of kernels, measured up to a day (ISO 8601)."""

    device: Device
    version: str
    kernel_set: str
    date: str
    rows: dict[Key, Row] = field(default_factory=dict)

    def of_layer(self, n: int, k: int, dtype: str) -> list[Row]:
        """The rows of a layer in ascending order of tokens."""
        return [row for key, row in sorted(self.rows.items()) if key[:3] == (n, k, dtype)]

    def save(self, path: Path) -> None:
        """Write the file."""
        content = {
            "schema": SCHEMA,
            "device": asdict(self.device),
            "version": self.version,
            "kernel_set": self.kernel_set,
            "date": self.date,
            "rows": [asdict(row) for _, row in sorted(self.rows.items())],
        }
        write_atomic(path, json.dumps(content, indent=1))


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
        rows = [_row(row) for row in content["rows"]]
        device = Device(**content["device"])
        known = content["version"], content["kernel_set"], content["date"]
        table = Table(device, *known, {row.key: row for row in rows})
    except OSError as error:
        raise EsparseError(f"cannot read the table: {error.strerror}", where=path, fix=fix) from error
    except KeyError as error:
        raise EsparseError(f"not a tuning table: it has no {error}", where=path, fix=fix) from error
    except (ValueError, TypeError) as error:
        raise EsparseError(f"not a tuning table: {error}", where=path, fix=fix) from error
    return table


def _row(content: dict[str, Any]) -> Row:
    best = {name: Best(**content[name]) for name in (*LAUNCHES, "dense")}
    return Row(**{**content, **best})


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
        note(
            f"no tuning table at {path}: kernels are chosen by shipped times or the static heuristic; {TUNE}"
        )
        return None
    table = load_table(path)
    if reason := why_foreign(table, kernel_set, device):
        note(
            f"{path} is not used: {reason}. Shipped times or the static heuristic choose; {TUNE}",
            style="yellow",
        )
        return None
    return table


def reference_table(device: Device) -> Table | None:
    """The table that this package ships for a GPU, if any; its kernels may be an older set."""
    for file in sorted((resources.files("esparse_trt.engine") / "tables").iterdir(), key=str):
        with resources.as_file(file) as path:
            table = load_table(path)
        if table.device.same_gpu(device):
            return table
    return None


# --- what it is used for -----------------------------------------------------------------------------------


def choices(table: Table | None, n: int, k: int, dtype: str, launch: Launch = "plain") -> str | None:
    """The plugin's field "1=name,2=name,..." for a layer, ascending; None where nothing was measured."""
    rows = table.of_layer(n, k, dtype) if table else []
    return ",".join(f"{row.m}={row.sparse(launch).kernel}" for row in rows) or None


def serving(rows: Sequence[Row], m: int) -> Row | None:
    """The row of a layer (ascending) that speaks for m tokens: the next above; above all buckets the last."""
    above = next((row for row in rows if row.m >= m), None)
    return above or (rows[-1] if rows and rows[-1].m >= BUCKETS[-1] else None)


def times(rows: Sequence[Row], m: int, launch: Launch = "plain") -> tuple[float, float] | None:
    """Microseconds of a layer for m tokens, sparse and dense, from its rows (ascending).

    Between rows both are interpolated, in logarithms; below the first they are the first's, and above the
    last bucket proportional to m.

    Returns:
        None where no row serves m.
    """
    above = serving(rows, m)
    if above is None:
        return None
    ours, dense = above.sparse(launch).us, above.dense.us
    if m > above.m:
        return ours * m / above.m, dense * m / above.m
    below = next((row for row in reversed(rows) if row.m <= m), None)
    if below is None or below.m == above.m:
        return ours, dense
    share = math.log(m / below.m) / math.log(above.m / below.m)
    return (
        below.sparse(launch).us ** (1 - share) * ours**share,
        below.dense.us ** (1 - share) * dense**share,
    )
