"""Whether what was timed computes the product, and from the weights in memory that it was given."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from peers import Dense, Sparse
from torch import Tensor

from esparse_trt.engine.operands import Launch, Operands
from esparse_trt.engine.tune import Layer

LIMITS = {"float16": 2e-3, "bfloat16": 1e-2}  # relative L2 distance of two rounded products
CACHED = 0.95  # of the time in which memory is read: what takes less has read a cache


def errors(layer: Layer, m: int, fastest: Mapping[str, Any], dense: Dense, peer: Sparse) -> dict[str, float]:
    """Relative L2 distances: of ours and cuSPARSELt to dense; of programmatic launch to none.

    `cusparselt_weights` is that of cuSPARSELt's product with doubled weights to the doubled product: its
    other copies all hold the same weights, so this alone tells whether a launch reads the copy it should.
    """
    operands, chained = layer.operands, fastest["ours_pdl"]["key"]
    expected = _chain(operands, m, dense.run(fastest["dense"]["key"]))
    ours = _chain(operands, m, operands.run_sparse(layer.kernels, m, fastest["ours"]["key"]))
    theirs = _chain(operands, m, peer.run)
    doubled = _chain(operands, m, lambda _, turn: peer.run(peer.copies, turn))
    plain, programmatic = (
        _chain(operands, m, operands.run_sparse(layer.kernels, m, chained, programmatic=on), launches=4)
        for on in (False, True)
    )
    return {
        "ours": _distance(ours, expected),
        "cusparselt": _distance(theirs, expected),
        "cusparselt_weights": _distance(doubled, 2 * theirs),
        "ours_pdl": _distance(programmatic, plain),
    }


def remembers(operands: Operands, m: int, peer: Sparse) -> bool:
    """Whether cuSPARSELt's plan of the first copy, called with twice the weights, multiplies by the first."""
    first = _chain(operands, m, peer.run)
    called = _chain(operands, m, lambda _, turn: peer.run(peer.copies, turn, plan=0))
    return _distance(called, first) < _distance(called, 2 * first)


def right(cell: Mapping[str, Any]) -> bool:
    """Whether ours computed the product, and no faster than its weights can be read; says who did not."""
    wrong = {
        name: f"is off by {error:.1e}"
        for name, error in cell["errors"].items()
        if not error <= LIMITS[cell["dtype"]]
    }
    for name in ("cusparselt", "ours", "ours_pdl"):
        if cell[name]["us"] < CACHED * cell["read_us"]:
            wrong[name] = f"takes {cell[name]['us']:.2f} us, reading memory alone {cell['read_us']:.2f} us"
    for name, what in wrong.items():
        kernel = cell[name.removesuffix("_weights")]["key"]
        print(f"WRONG: {name}, {kernel}, {what}", file=sys.stderr, flush=True)
    return not any(name.startswith("ours") for name in wrong)


def _chain(operands: Operands, m: int, launch: Launch, launches: int = 1) -> Tensor:
    """The first 256 tokens of what a chain of launches over a poisoned buffer ends with, as fp32."""
    operands.reset(m)
    operands.at(0, m)[1].fill_(float("nan"))
    copies = min(len(operands.sparse), len(operands.dense))
    for index in range(launches):
        launch(index % copies, index % 2)
    return operands.at((launches - 1) % 2, m)[1][:256].float()


def _distance(found: Tensor, expected: Tensor) -> float:
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))
