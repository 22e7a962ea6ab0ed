"""Benchmark of the Sparse-GEMM kernels against dense cuBLASLt and cuSPARSELt, all timed by the same code.

    python plugins/bench/bench.py --out plugins/bench/results/h100

writes h100.json, h100.md and plots. Per shape and number of tokens M it times, one replay of each in turn
(esparse_trt/engine/timing.py):

    dense       cuBLASLt, the fastest of the algorithms that its heuristic proposes
    cusparselt  after its own search; for M <= 16 the fastest of M padded to 8, 16, 32 and 64
    ours        the fastest candidate
    ours_pdl    the same with programmatic dependent launch

Every launch reads what the one before it wrote, so that the last is what a chain of GEMMs gets. The floor is
the larger of the time to read the compressed weights at the measured bandwidth of reading and the time of the
multiplications at twice the measured rate of a large dense product.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from checks import errors, remembers, right
from machine import clocks, environment, floor_us
from peers import Dense, Peers, Sparse
from render import render
from shapes import TOKENS, names

from esparse_trt import progress
from esparse_trt.artifacts import write_atomic
from esparse_trt.engine import timing
from esparse_trt.engine.kernels import Gpu, Kernels, load
from esparse_trt.engine.operands import Operands
from esparse_trt.engine.tune import QUICK_GRAPH_US, WARM_US, Layer, finalists
from esparse_trt.errors import EsparseError

PADDED = (8, 16, 32, 64)  # what cuSPARSELt may run for M <= 16
TIMED = 3  # of each peer in the last pass, whose clocks are those of sustained load
ROUNDS = (9, 50)  # of the last pass, least and most
FINAL_BUDGET_US = 60_000.0


# --- one shape ---------------------------------------------------------------------------------------------


class Shape:
    """One layer, with its weights in all three formats."""

    def __init__(
        self, kernels: Kernels, peers: Peers, gpu: Gpu, n: int, k: int, dtype: str, rows: int
    ) -> None:
        self.layer = Layer(kernels, gpu, n, k, dtype, rows=max(rows, *PADDED))
        self.operands: Operands = self.layer.operands
        self.peers = peers
        self.searched: dict[int, Sparse] = {}

    def cell(self, m: int, ceilings: Mapping[str, float]) -> dict[str, Any]:
        """Time everything at M = m."""
        ours = self.layer.quick(m)
        ranked = sorted(ours, key=lambda name: ours[name])
        chained = self.layer.quick_programmatic(m, ours)
        dense = Dense(self.peers, self.operands, m)
        padded = [size for size in PADDED if size >= m] if m <= 16 else [m]
        peers = {size: self.sparse(size) for size in padded}

        def contest(
            chosen: Mapping[str, Iterable[Any]], graph_us: float, **limits: Any
        ) -> dict[tuple[str, Any], timing.Timing]:
            replays = {
                "dense": lambda i: self.operands.replay(
                    m, dense.run(i), len(self.operands.dense), graph_us=graph_us
                ),
                "cusparselt": lambda size: self.operands.replay(
                    size, peers[size].run, peers[size].copies, graph_us=graph_us
                ),
                "ours": lambda name: self.layer.replay(m, name, graph_us=graph_us),
                "ours_pdl": lambda name: self.layer.replay(m, name, programmatic=True, graph_us=graph_us),
            }
            made = {(kind, key): replays[kind](key) for kind, keys in chosen.items() for key in keys}
            return timing.measure(made, **limits)

        quick = contest(
            {"dense": dense.algorithms, "cusparselt": padded},
            QUICK_GRAPH_US, budget_us=1.0, rounds=(3, 3),
        )  # fmt: skip
        final = contest(
            {
                "dense": _best(quick, "dense", TIMED),
                "cusparselt": _best(quick, "cusparselt", TIMED),
                "ours": finalists(m, ours),
                "ours_pdl": finalists(m, chained),
            },
            timing.GRAPH_US, budget_us=FINAL_BUDGET_US, warm_us=WARM_US, rounds=ROUNDS,
        )  # fmt: skip
        fastest = _fastest(final)
        sparse = peers[fastest["cusparselt"]["key"]]
        remembered = remembers(self.operands, m, sparse)
        floors = floor_us(m, self.operands.n, self.operands.k, ceilings)
        for size in set(padded) - set(PADDED):
            del self.searched[size]  # no other cell needs these copies of the weights
        return {
            "n": self.operands.n,
            "k": self.operands.k,
            "dtype": self.operands.dtype,
            "m": m,
            **fastest,
            "cusparselt": {**fastest["cusparselt"], **sparse.searched, "remembers_weights": remembered},
            "floor_us": max(floors.values()),
            "bound": max(floors, key=lambda name: floors[name]),
            "read_us": floors["memory"],
            "errors": errors(self.layer, m, fastest, dense, sparse),
            "candidates": {name: round(ours[name], 3) for name in ranked},
        }

    def sparse(self, m: int) -> Sparse:
        """cuSPARSELt at M = m, whose search runs once."""
        if m not in self.searched:
            self.searched[m] = Sparse(self.peers, self.operands, m)
        return self.searched[m]


def _best(times: Mapping[tuple[str, Any], timing.Timing], kind: str, most: int) -> list[Any]:
    """Keys of the fastest of one kind."""
    found = sorted((time.us, key) for (name, key), time in times.items() if name == kind)
    return [key for _, key in found[:most]]


def _fastest(times: Mapping[tuple[str, Any], timing.Timing]) -> dict[str, dict[str, Any]]:
    """The fastest of each kind, with its key: an algorithm, a padded M or a candidate."""
    found: dict[str, dict[str, Any]] = {}
    for (kind, key), spread in sorted(times.items(), key=lambda item: -item[1].us):
        found[kind] = {"key": key, **{name: round(value, 3) for name, value in asdict(spread).items()}}
    return found


# --- all of them -------------------------------------------------------------------------------------------


def main() -> None:
    """The command line."""
    options = arguments()
    progress.configure("rich")
    started = time.monotonic()
    path = options.out.with_name(f"{options.out.name}.json")
    kernels = load()
    gpu = kernels.current_gpu()
    with torch.cuda.stream(timing.stream()):
        peers = Peers()
        result = {"environment": environment(kernels, peers), "cells": []}
        if options.resume and path.exists():
            result = resume(path, result)
        run(options, kernels, peers, gpu, result, lambda: time.monotonic() - started > options.budget_seconds)
    save(path, result)
    render(path)
    print(f"{len(result['cells'])} cells in {path}, {time.monotonic() - started:.0f} s in this run")


def run(
    options: argparse.Namespace,
    kernels: Kernels,
    peers: Peers,
    gpu: Gpu,
    result: dict[str, Any],
    spent: Callable[[], bool],
) -> None:
    """Fill the cells that are missing until the time is spent; one with a wrong result is left out."""
    path = options.out.with_name(f"{options.out.name}.json")
    done = {(cell["n"], cell["k"], cell["m"], cell["dtype"]) for cell in result["cells"]}
    for n, k in options.shapes:
        missing = [m for m in options.m if (n, k, m, options.dtype) not in done]
        if not missing or spent():
            continue
        shape = Shape(kernels, peers, gpu, n, k, options.dtype, max(missing))
        for m in missing:
            if spent():
                break
            start = time.monotonic()
            cell = shape.cell(m, result["environment"]["ceilings"])
            cell["seconds"] = round(time.monotonic() - start, 2)
            print(line(cell), flush=True)
            if right(cell):
                result["cells"].append(cell)
                save(path, result)
        del shape
        torch.cuda.empty_cache()
    result["environment"]["clocks_at_the_end"] = clocks()


def line(cell: Mapping[str, Any]) -> str:
    """One cell for the terminal."""
    dense, peer, ours, chain = (cell[kind] for kind in ("dense", "cusparselt", "ours", "ours_pdl"))
    floor = cell["floor_us"] / ours["us"]
    return (
        f"{cell['n']:5d}x{cell['k']:<5d} M {cell['m']:4d}  dense {dense['us']:8.2f}  cslt {peer['us']:8.2f}"
        f"  ours {ours['us']:8.2f} x{dense['us'] / ours['us']:.2f} / {peer['us'] / ours['us']:.2f}"
        f"  pdl {chain['us']:8.2f} x{dense['us'] / chain['us']:.2f}  floor {floor:4.0%}"
        f"  {ours['key']} {chain['key']}  {cell['seconds']:.1f} s"
    )


def resume(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """The earlier result, if it is of this GPU and this library.

    Raises:
        EsparseError: it is not.
    """
    earlier = json.loads(path.read_text())
    mine, theirs = fresh["environment"], earlier["environment"]
    for name in ("device", "library", "versions"):
        if mine[name] != theirs[name]:
            raise EsparseError(
                f"the earlier run had {name} {theirs[name]}, this one has {mine[name]}",
                where=path,
                fix="leave out --resume, or name another file with --out",
            )
    return earlier


def save(path: Path, result: Mapping[str, Any]) -> None:
    """Write the JSON file."""
    write_atomic(path, json.dumps(result, indent=1))


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="results, without suffix: .json, .md and .svg are added"
    )
    parser.add_argument("--shapes", nargs="*", metavar="NxK", help="default: of all models in shapes.py")
    parser.add_argument("--m", type=int, nargs="*", default=list(TOKENS), help="numbers of tokens")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--resume", action="store_true", help="add to the results that are there")
    parser.add_argument(
        "--budget-seconds", type=float, default=float("inf"), help="start no cell after that time"
    )
    options = parser.parse_args()
    texts = options.shapes or [f"{n}x{k}" for n, k in names()]
    options.shapes = [tuple(int(size) for size in text.split("x")) for text in texts]
    return options


if __name__ == "__main__":
    try:
        main()
    except EsparseError as error:
        sys.exit(f"error: {error}")
