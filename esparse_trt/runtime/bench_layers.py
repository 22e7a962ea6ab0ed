"""Each GEMM of a sparse model alone: the kernel that runs it, its time and dense's, and the machine's floor.

Floors come from ceilings measured in the same process: a GEMM reads its weights and x and writes y, at the
speed of a large sum; and it multiplies at twice the speed of a large dense product, which is what sparse
tensor cores are sold for. The larger of the two is the floor. The time of a sparse GEMM of gate and up has
the activation in it, for which the dense model has a kernel of its own.
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
from esparse_trt.runtime.norm import RmsNorm
from esparse_trt.sparsity.models import family_of

BUDGET_US, WARM_US = 10_000.0, 5_000.0


@dataclass(frozen=True)
class Layer:
    """What GEMMs of one row of the table have in common.

    Attributes:
        permuted: the GEMM reads x through a permutation, as nobody wrote x in its order (`fuse`).
        attended: x is the output of attention, which is in order where each sequence has one token.
        activation: that the GEMM applies to gate and up.
        dense_reason: why the weights are not 2:4.
    """

    site: str
    n: int
    k: int
    sparse: bool
    bias: bool
    permuted: bool
    dense_reason: str | None
    attended: bool = False
    activation: str | None = None

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
    in_order = any(isinstance(module, RmsNorm) for module in model.modules())
    found: dict[Layer, int] = {}
    for name, module in model.named_modules():
        if not isinstance(module, SparseLinear | nn.Linear):
            continue
        path = next((path for path in sites if f".{path}." in f".{name}."), None)
        sparse = isinstance(module, SparseLinear)
        members = [name]
        if path and ".merged." in name:  # under the name of its first layer
            members = [name.partition(path)[0] + other for other in sites[path].linears]
        reads = sites[path].reads if path else None
        layer = Layer(
            sites[path].name if path else name,
            module.out_features,
            module.in_features,
            sparse,
            module.bias is not None,
            sparse and module.permutation is not None and not (in_order and reads == "residual"),
            None if sparse else next((reasons[member] for member in members if member in reasons), None),
            reads == "attention" and model._supports_attention_backend,
            module.activation if isinstance(module, SparseLinear) else None,
        )
        found[layer] = found.get(layer, 0) + 1
    return found


def measure_layers(
    layers: Mapping[Layer, int], tokens: Sequence[int], batches: Sequence[int], dtype: str, ceilings: Ceilings
) -> list[LayerBench]:
    """Time the GEMMs on random weights in CUDA graphs of dependent launches, ours programmatic.

    Args:
        layers: from `layers_of`.
        tokens: numbers of them, of prompts and batches.
        batches: those that are decoded, one token for each sequence.
        dtype: of the model.
        ceilings: of this GPU.
    """
    kernels = library.load()
    rows = []
    with torch.cuda.stream(timing.stream()):
        for layer, count in track(layers.items(), "layers", total=len(layers), unit="layer"):
            times = (
                []
                if not_eligible(layer, dtype)
                else _times(kernels, layer, dtype, {m: m in batches for m in sorted(tokens)}, ceilings)
            )
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
    kernels: Kernels, layer: Layer, dtype: str, tokens: Mapping[int, bool], ceilings: Ceilings
) -> list[LayerTime]:
    """Of one layer; `tokens` tells which are decoded."""
    operands = Operands(layer.n, layer.k, dtype, rows=max(tokens))
    found = []
    for m, decoded in tokens.items():
        permuted = layer.permuted and not (decoded and layer.attended)
        problem = Problem(m, layer.n, layer.k, dtype, permutation=permuted, activation=layer.activation)
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
    """A chain of the kernel as the model runs it: with the layer's permutation of x and activation."""
    order = torch.randperm(problem.k, dtype=torch.int32, device="cuda") if problem.permutation else None
    workspace = kernels.workspace(problem, candidate)
    gemms: dict[tuple[int, int], Gemm] = {}

    def launch(copy: int, turn: int) -> None:
        if (copy, turn) not in gemms:
            # Activations in a chain fade to zeros, so all of them read the same x.
            x, y = operands.at(0 if problem.activation else turn, problem.m)
            y = y.view(-1)[: problem.m * problem.columns].view(problem.m, problem.columns)
            gemms[copy, turn] = kernels.bind(
                x, *operands.sparse[copy], y, permutation=order, activation=problem.activation
            )
        gemms[copy, turn].run(candidate, workspace, programmatic=True)

    return operands.replay(problem.m, launch, len(operands.sparse), graph_us=timing.GRAPH_US)


def floor_us(layer: Layer, m: int, ceilings: Ceilings) -> float:
    """Microseconds that the machine needs at least for the packed layer."""
    moved = layer.packed_bytes + 2 * m * (layer.k + (layer.n // 2 if layer.activation else layer.n))
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
