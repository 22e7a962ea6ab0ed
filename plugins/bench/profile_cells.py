"""What limits the fastest kernels: counters of single launches, by NVIDIA's ncu.

    python plugins/bench/profile_cells.py --out plugins/bench/results/profile_h100

writes profile_h100.json and profile_h100.md, of two kinds of launches:

    cells   N x K x M with what is the fastest there by a result of bench.py (--results): an algorithm of
            cuBLASLt, what cuSPARSELt's search finds, our candidate
    tiles   one tile of a kernel for each multiprocessor, at two values of K: by the difference, how many
            clocks the main loop takes for 32 k, with nothing of filling the pipeline and of storing y in it
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import ncu
import torch
from fit import H100, parse
from machine import environment
from ncu import Row
from peers import Dense, Peers, Sparse

from esparse_trt.artifacts import write_atomic
from esparse_trt.engine import timing
from esparse_trt.engine.kernels import load
from esparse_trt.engine.operands import Operands
from esparse_trt.errors import EsparseError

RESULTS = Path(__file__).parent / "results" / "h100_fp16.json"
CELLS = (
    "1536x1536x128", "4608x3584x256", "22016x4096x256", "8192x8192x512", "4096x4096x4096", "17920x1536x4096",
)  # fmt: skip
KINDS = ("dense", "cusparselt", "ours")
TILES = (
    "wgmma_n128m128", "wgmma_n128m256", "wgmma_n128m256_x2", "wgmma_n192m256", "wgmma_n256m192",
    "cutlass_256x128_c12_w1m",
)  # fmt: skip
TILE_K = (4096, 8192)
ROWS, TOKENS = 12, 11  # tiles along each, a multiprocessor for each
MACS = 2048  # of fp16 in a clock of a multiprocessor; of wgmma.sp twice as many, half of them by zero


class Job(NamedTuple):
    """A GEMM to launch: `key` is bench.py's, an algorithm, a padded M or a candidate."""

    label: str
    n: int
    k: int
    m: int
    kind: str
    key: Any
    bench_us: float | None = None  # microseconds by bench.py

    @property
    def needed(self) -> float:
        """Clocks in which the tensor cores of all multiprocessors make the product."""
        return self.n * self.k * self.m / (MACS if self.kind == "dense" else 2 * MACS) / H100.multiprocessors


def cell_jobs(cells: Sequence[str], results: Mapping[str, Any]) -> list[Job]:
    """The fastest of each kind.

    Raises:
        EsparseError: the results have no such cell.
    """
    fastest = {f"{cell['n']}x{cell['k']}x{cell['m']}": cell for cell in results["cells"]}
    if missing := [cell for cell in cells if cell not in fastest]:
        raise EsparseError(f"no cell {missing[0]} in the results", fix="name one that bench.py measured")
    found = []
    for text in cells:
        n, k, m = map(int, text.split("x"))
        for kind in KINDS:
            entry = fastest[text][kind]
            found.append(Job(f"{text} {kind}", n, k, m, kind, entry["key"], entry["us"]))
    return found


def tile_jobs(candidates: Sequence[str]) -> list[Job]:
    """One tile a multiprocessor, of ours and, of 128 x 256 each, of the others."""
    found = []
    for k in TILE_K:
        n, m = 128 * ROWS, 256 * TOKENS
        found += [Job(f"dense {k}", n, k, m, "dense", 0), Job(f"cusparselt {k}", n, k, m, "cusparselt", m)]
        for candidate in candidates:
            tile = parse(candidate)
            assert tile, candidate
            n, m = tile.rows * ROWS // tile.share_w, tile.tokens * TOKENS * tile.share_w
            found.append(Job(f"{candidate} {k}", n, k, m, "ours", candidate))
    return found


# --- launching ---------------------------------------------------------------------------------------------


def launch_all(jobs: Sequence[Job]) -> None:
    """In the process under ncu: each once, those of a layer on the same operands."""
    kernels, peers = load(), Peers()
    for (n, k), group in groupby(jobs, key=lambda job: (job.n, job.k)):
        mine = list(group)
        rows = max(job.key if job.kind == "cusparselt" else job.m for job in mine)
        operands = Operands(n, k, "float16", rows)
        for job in mine:
            if job.kind == "dense":
                launch, m = Dense(peers, operands, job.m).run(job.key), job.m
            elif job.kind == "cusparselt":
                launch, m = Sparse(peers, operands, job.key).run, job.key
            else:
                launch, m = operands.run_sparse(kernels, job.m, job.key), job.m
            operands.reset(m)
            ncu.launch_once(job.label, partial(launch, 0, 0))
        del operands, launch
        torch.cuda.empty_cache()


# --- what follows, and the page ----------------------------------------------------------------------------


def operands_share(rows: int, tokens: int) -> float:
    """Clocks of shared memory for the operands that wgmma.sp reads in a clock of the tensor cores.

    A wgmma.sp of 64 rows, T tokens and 32 k takes T/2 clocks and reads, 128 bytes a clock, 64 T bytes of x
    and 64 rows of 32 bytes of values. Three warpgroups have no registers for T = 256: each does it by halves.
    """
    at_once = tokens // 2 if (rows, tokens) == (192, 256) else tokens
    return (64 * at_once + 64 * 32) / 128 / (at_once / 2)


def name(job: Job, row: Mapping[str, Any]) -> str:
    """Of a kernel: ours has a candidate's."""
    return job.key if job.kind == "ours" else row["kernel"]


def explain(job: Job, row: Mapping[str, Any]) -> Row:
    """A row of a cell with a name and the share of its clocks in which the tensor cores need to be busy."""
    found: Row = {"name": name(job, row), "bench_us": job.bench_us, **row}
    found |= {"clock": 1000 * row["clocks"] / row["ns"], "needed": 100 * job.needed / row["clocks"]}
    if job.kind == "ours" and (tile := parse(job.key)):
        found["model"] = 100 / operands_share(tile.rows, tile.tokens)
    return found


def main_loops(jobs: Sequence[Job], counters: Mapping[str, Mapping[str, Any]]) -> dict[str, Row]:
    """By kernel: clocks for 32 k, and those of the tensor cores."""
    found: dict[str, Row] = {}
    short, long = ([job for job in jobs if job.k == k] for k in TILE_K)
    for few, many in zip(short, long, strict=True):
        clocks_each = [counters[job.label]["clocks"] for job in (few, many)]
        steps = (many.k - few.k) / 32
        loop, tensor = (clocks_each[1] - clocks_each[0]) / steps, (many.needed - few.needed) / steps
        row: Row = {"name": name(many, counters[many.label]), "clocks": loop, "tensor": tensor}
        row["rest"] = clocks_each[0] - loop * few.k / 32
        if many.kind == "ours" and (tile := parse(many.key)):
            row["operands"] = tensor * operands_share(tile.rows, tile.tokens)
        found[many.label.rsplit(" ", 1)[0]] = row
    return found


CELL_COLUMNS = {
    "bench_us": "µs in the benchmark", "us": "µs alone", "clock": "MHz",
    "needed": "product", "tensor": "tensor pipe", "model": "at most", "operands": "operands",
    "shared": "shared", "bank_reads": "bank reads", "bank_writes": "bank writes", "l2": "L2", "dram": "DRAM",
}  # fmt: skip
TILE_COLUMNS = {"clocks": "clocks", "tensor": "tensor cores", "operands": "operands", "rest": "rest"}

LEGEND = """\
## Cells

N x K x M. *In the benchmark*: under sustained load; *alone*: one launch under ncu, caches flushed before,
which all that follows is of. *Product*: share of the clocks in which the tensor cores could make the product;
*tensor pipe*: in which they were busy; *at most*: what reading the operands of wgmma.sp from shared memory,
128 bytes a clock, allows; *operands*: share of the clocks in which they were read; *shared*: in which shared
memory served anything that instructions read or wrote. The others are shares of their peaks.
"""
TILE_LEGEND = """\
## Main loops

Clocks of a multiprocessor for 32 k of its tile, {0} against {1} k; what the tensor cores and, for ours, the
reads of operands take of them; and the clocks that a launch takes beside its main loop.
"""


def page(result: Mapping[str, Any]) -> str:
    """The Markdown file."""
    device, versions = (result["environment"][name] for name in ("device", "versions"))
    facts = [
        f"cuBLASLt {versions['cublaslt']}, cuSPARSELt {versions['cusparselt']}",
        f"kernels {result['environment']['library']['kernel_set']}, {result['environment']['date']}",
    ]
    parts = [f"# What limits the kernels on {device['name']}\n", "; ".join(facts) + ".\n", LEGEND]
    parts += [table(result["cells"], CELL_COLUMNS), TILE_LEGEND.format(*TILE_K)]
    return "\n".join([*parts, table(result["tiles"], TILE_COLUMNS)])


def table(rows: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A line a row."""
    lines = [f"| | kernel | {' | '.join(columns.values())} |", "|---|---|" + "---:|" * len(columns)]
    for label, row in rows.items():
        values = [row.get(column, "") for column in columns]
        texts = [f"{value:.1f}" if isinstance(value, float) else str(value) for value in values]
        lines.append(f"| {label} | `{row['name']}` | {' | '.join(texts)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="without suffix: .json and .md are added")
    parser.add_argument("--cells", nargs="*", default=list(CELLS), metavar="NxKxM")
    parser.add_argument("--tiles", nargs="*", default=list(TILES), metavar="CANDIDATE")
    parser.add_argument("--results", type=Path, default=RESULTS, help="of bench.py: says what is the fastest")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)  # the process under ncu
    options = parser.parse_args()
    cells = cell_jobs(options.cells, json.loads(options.results.read_text()))
    tiles = tile_jobs(options.tiles)
    with torch.cuda.stream(timing.stream()):
        if options.once:
            launch_all([*cells, *tiles])
            return
        where = environment(load(), Peers())
    counters = ncu.run([sys.executable, *sys.argv, "--once"])
    rows = {job.label: explain(job, counters[job.label]) for job in cells}
    loops = main_loops(tiles, counters)
    result = {"environment": where, "cells": rows, "tiles": loops}
    write_atomic(options.out.with_name(f"{options.out.name}.json"), json.dumps(result, indent=1))
    write_atomic(options.out.with_name(f"{options.out.name}.md"), page(result))


if __name__ == "__main__":
    try:
        main()
    except EsparseError as error:
        sys.exit(f"error: {error}")
