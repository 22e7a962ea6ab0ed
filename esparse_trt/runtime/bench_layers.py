"""Each GEMM of a sparse model alone: the kernel that runs it, its time and dense's, and the machine's floor.

Floors come from ceilings measured in the same process: a GEMM reads its weights and x and writes y, at the
speed of a large sum; and it multiplies at twice the speed of a large dense product, which is what sparse
tensor cores are sold for. The larger of the two is the floor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from esparse_trt.engine import kernels as library
from esparse_trt.engine import timing
from esparse_trt.engine.kernels import Gemm, Kernels, Problem
from esparse_trt.engine.operands import Operands
from esparse_trt.evaluate.bench_record import Ceilings, LayerBench, LayerTime
from esparse_trt.graph import es24
from esparse_trt.progress import track
from esparse_trt.records import Reason
from esparse_trt.runtime import ops
from esparse_trt.runtime.linear import SparseLinear
from esparse_trt.sparsity.models import family_of

BUDGET_US, WARM_US = 10_000.0, 5_000.0


@dataclass(frozen=True)
class Layer:
    """What GEMMs of one row of the table have in common; `dense_reason`: why their weights are not 2:4."""

    site: str
    n: int
    k: int
    sparse: bool
    bias: bool
    permuted: bool
    dense_reason: str | None

    @property
    def packed_bytes(self) -> int:
        """Values and metadata, in a type of two bytes."""
        return self.n * self.k + 4 * math.prod(es24.metadata_shape(self.n, self.k))


def layers_of(model: PreTrainedModel, reasons: Mapping[str, str]) -> dict[Layer, int]:
    """The GEMMs of a sparse model, in order, each with how many there are.

    Args:
        model: from `runtime.load` or `bench.packed_twin`.
        reasons: linear layer -> why it was not pruned.
    """
    family = family_of(model.config)
    sites = {path: site for site in family.sites for path in site.linears}
    found: dict[Layer, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, SparseLinear | nn.Linear):
            continue
        path = next((path for path in sites if f".{path}." in f".{name}."), None)
        sparse = isinstance(module, SparseLinear)
        members = [name]
        if path and ".merged." in name:  # under the name of its first layer
            members = [name.partition(path)[0] + other for other in sites[path].linears]
        layer = Layer(
            sites[path].name if path else name,
            module.out_features,
            module.in_features,
            sparse,
            module.bias is not None,
            sparse and module.permutation is not None,
            None if sparse else next((reasons[member] for member in members if member in reasons), None),
        )
        found[layer] = found.get(layer, 0) + 1
    return found


def measure_layers(
    layers: Mapping[Layer, int], tokens: Sequence[int], dtype: str, ceilings: Ceilings
) -> list[LayerBench]:
    """Time the GEMMs at these numbers of tokens, on random weights, in CUDA graphs of dependent launches.

    Ours are launched programmatically, as in the model.
    """
    kernels = library.load()
    rows = []
    with torch.cuda.stream(timing.stream()):
        for layer, count in track(layers.items(), "layers", total=len(layers), unit="layer"):
            times = [] if not_eligible(layer, dtype) else _times(kernels, layer, dtype, tokens, ceilings)
            rows.append(row(layer, count, dtype, times))
    return rows


def row(layer: Layer, count: int, dtype: str, times: list[LayerTime]) -> LayerBench:
    """A row of the table, with the reason for what runs."""
    code, reason = why(layer, dtype, times)
    return LayerBench(
        site=layer.site, shape=(layer.n, layer.k), count=count, sparse=layer.sparse, permuted=layer.permuted,
        code=code, reason=reason, times=times,
    )  # fmt: skip


def why(layer: Layer, dtype: str, times: Sequence[LayerTime]) -> tuple[Reason, str]:
    """The code of a row, and the same for people."""
    if not layer.sparse:
        if reason := not_eligible(layer, dtype):
            return Reason.not_eligible_shape, reason
        if layer.dense_reason:
            return Reason.not_selected, layer.dense_reason
        return Reason.dense_faster, "2:4, but the recipe or the tuning table keeps it dense"
    slower = [str(time.m) for time in times if time.speedup < 1]
    if not times:
        return Reason.not_measured, "no kernel was timed"
    if not slower:
        return Reason.faster, "sparse is faster at every M measured"
    if len(slower) == len(times):
        return Reason.dense_faster, "dense is faster at every M measured"
    return Reason.mixed, f"dense is faster at M = {', '.join(slower)}"


def not_eligible(layer: Layer, dtype: str) -> str | None:
    """Why the layout cannot hold a layer; None if it can."""
    kind = next(kind for kind in es24.DTYPES if str(kind) == dtype)
    return es24.why_not(layer.n, layer.k, kind)


# --- one GEMM --------------------------------------------------------------------------------------------


def _times(
    kernels: Kernels, layer: Layer, dtype: str, tokens: Sequence[int], ceilings: Ceilings
) -> list[LayerTime]:
    operands = Operands(layer.n, layer.k, dtype, rows=max(tokens))
    found = []
    for m in sorted(tokens):
        problem = Problem(m, layer.n, layer.k, dtype, permutation=layer.permuted)
        candidate = ops.candidate_for(problem)
        dense = operands.run_dense(m)
        contestants = {
            "sparse": _sparse_replay(kernels, operands, problem, candidate),
            "dense": operands.replay(m, dense, len(operands.dense), graph_us=timing.GRAPH_US),
        }
        times = timing.measure(contestants, budget_us=BUDGET_US, warm_us=WARM_US)
        sparse_us, dense_us = times["sparse"].us, times["dense"].us
        floor = floor_us(layer, m, ceilings)
        found.append(LayerTime(m=m, kernel=candidate, sparse_us=sparse_us, dense_us=dense_us, floor_us=floor))
    return found


def _sparse_replay(kernels: Kernels, operands: Operands, problem: Problem, candidate: str) -> timing.Replay:
    """A chain of the kernel as the model runs it: with the permutation of x, if the layer has one."""
    order = torch.randperm(problem.k, dtype=torch.int32, device="cuda") if problem.permutation else None
    workspace = kernels.workspace(problem, candidate)
    gemms: dict[tuple[int, int], Gemm] = {}

    def launch(copy: int, turn: int) -> None:
        if (copy, turn) not in gemms:
            x, y = operands.at(turn, problem.m)
            gemms[copy, turn] = kernels.bind(x, *operands.sparse[copy], y, permutation=order)
        gemms[copy, turn].run(candidate, workspace, programmatic=True)

    return operands.replay(problem.m, launch, len(operands.sparse), graph_us=timing.GRAPH_US)


def floor_us(layer: Layer, m: int, ceilings: Ceilings) -> float:
    """Microseconds that the machine needs at least for the packed layer."""
    moved = layer.packed_bytes + 2 * m * (layer.k + layer.n)
    operations = 2 * m * layer.n * layer.k
    return max(1e-3 * moved / ceilings.read_gb_per_s, 1e-6 * operations / (2 * ceilings.dense_tflop_per_s))


def measure_ceilings() -> Ceilings:
    """The bandwidth of a large read and the speed of a large dense fp16 product, on this GPU."""
    size = 8192
    big = torch.randn(1 << 29, device="cuda")  # 2 GiB of fp32: no cache holds it
    a, b = (torch.randn(size, size, dtype=torch.float16, device="cuda") for _ in range(2))
    c, total = torch.empty_like(a), torch.empty((), device="cuda")

    def read(_: int) -> None:
        torch.sum(big, (0,), out=total)

    def multiply(_: int) -> None:
        torch.mm(a, b.t(), out=c)

    with torch.cuda.stream(timing.stream()):
        contestants = {"read": timing.capture(read, 4), "product": timing.capture(multiply, 4)}
        times = timing.measure(contestants, budget_us=100_000, warm_us=100_000)
    return Ceilings(
        read_gb_per_s=big.nbytes / times["read"].us / 1e3,
        dense_tflop_per_s=2 * size**3 / times["product"].us / 1e6,
    )
