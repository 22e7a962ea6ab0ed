"""`esparse::sparse_gemm` as a PyTorch operator: traceable by torch.compile, capturable in CUDA graphs.

On a GPU it enqueues the candidate that the tuner's table of this GPU (`esparse-trt tune`, in the user's
cache) names for (N, K, dtype, M), or the library's static choice; on a CPU it decompresses the weight and
multiplies, which is slow and right.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from esparse_trt.engine import kernels
from esparse_trt.engine.table import Table, default_path, reference_table, usable_table
from esparse_trt.engine.tune import this_device
from esparse_trt.errors import EsparseError
from esparse_trt.graph import es24
from esparse_trt.graph.groups import as_numpy


@torch.library.custom_op("esparse::sparse_gemm", mutates_args=(), device_types="cuda")
def sparse_gemm(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    permutation: Tensor | None,
    activation: str | None = None,
) -> Tensor:
    """y = x Wᵀ + b, or, of a W that holds gate and up as `packing.interleave` does, act(gate) · up.

    Args:
        x: [..., K], of the type of `values`.
        values: [N, K/2], fp16 or bf16.
        metadata: int32, `es24.metadata_shape(N, K)`.
        bias: [N] or None.
        permutation: int32 [K] or None: W's channel j reads x[..., permutation[j]].
        activation: "swiglu", "geglu" (GELU by its approximation with tanh) or None.

    Returns:
        [..., N]; with an activation [..., N/2], rounded once.

    Raises:
        EsparseError: shapes or types that do not fit together, or no kernel library.
    """
    _check(x, values, metadata)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = rows.new_empty(len(rows), _columns(values, activation))
    library = kernels.load()
    gemm = library.bind(rows, values, metadata, y, bias=bias, permutation=permutation, activation=activation)
    candidate = candidate_for(gemm.problem)
    gemm.run(candidate, library.workspace(gemm.problem, candidate), programmatic=True)
    return y.view(*x.shape[:-1], -1)


@sparse_gemm.register_kernel("cpu")
def _(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    permutation: Tensor | None,
    activation: str | None = None,
) -> Tensor:
    _check(x, values, metadata)
    dense = es24.unpack(es24.Packed(as_numpy(values), metadata.numpy()))
    weight = torch.from_numpy(dense.view("int16")).view(values.dtype)
    if permutation is not None:
        x = x[..., permutation.long()]
    y = functional.linear(x, weight, bias)
    if activation is None:
        return y
    gate, up = y.float().unflatten(-1, (-1, 2, 8)).unbind(-2)
    return (gated(activation, gate) * up).flatten(-2).to(x.dtype)


@sparse_gemm.register_fake
def _(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    permutation: Tensor | None,
    activation: str | None = None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], _columns(values, activation))


@torch.library.custom_op("esparse::permute", mutates_args=())
def permute(x: Tensor, order: Tensor, places: Tensor) -> Tensor:
    """x[..., order]: how a compiled layer says that a GEMM reads x so, until `fuse` finds who writes x so.

    Args:
        x: [..., K].
        order: int32 [K].
        places: int32 [K], its inverse.
    """
    return x.index_select(-1, order)


@permute.register_fake
def _(x: Tensor, order: Tensor, places: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def gated(activation: str, gate: Tensor) -> Tensor:
    """What an activation multiplies up by."""
    return functional.silu(gate) if activation == "swiglu" else functional.gelu(gate, approximate="tanh")


@cache
def candidate_for(problem: kernels.Problem) -> str:
    """What runs the problem on this machine's GPU."""
    library = kernels.load()
    gpu = library.current_gpu()
    for table, dtype in ((tuned_table(), problem.dtype), (shipped_table(), "float16")):
        rows = table.of_layer(problem.n, problem.k, dtype) if table else []
        if row := next((row for row in rows if row.m >= problem.m), None):
            tuned = row.sparse("programmatic").kernel
            # Tables know no bias, permutation and activation, and a shipped one may be of other kernels.
            if tuned in library.candidates and library.why_not(problem, tuned, gpu) is None:
                return tuned
    found = library.default(problem, gpu)
    assert found is not None  # the reference kernel takes everything that `bind` accepts
    return found


@cache
def tuned_table() -> Table | None:
    """The tuner's table of this machine's GPU, if there is one for these kernels."""
    library = kernels.load()
    path = default_path(torch.cuda.get_device_name())
    return usable_table(path, library.kernel_set, this_device(library))


@cache
def shipped_table() -> Table | None:
    """What was measured on a GPU like this one. It holds for bfloat16 too, whose kernels do the same work."""
    return reference_table(this_device(kernels.load()))


def _columns(values: Tensor, activation: str | None) -> int:
    return values.shape[0] // 2 if activation else values.shape[0]


def _check(x: Tensor, values: Tensor, metadata: Tensor) -> None:
    rows, channels = values.shape[0], 2 * values.shape[1]
    wrong = None
    if x.shape[-1] != channels:
        wrong = f"x has {x.shape[-1]} channels, the weight {channels}"
    elif x.dtype != values.dtype:
        wrong = f"x is {x.dtype}, the weight {values.dtype}"
    elif tuple(metadata.shape) != es24.metadata_shape(rows, channels) or metadata.dtype != torch.int32:
        expected = list(es24.metadata_shape(rows, channels))
        wrong = f"metadata is {metadata.dtype} {list(metadata.shape)}, must be int32 {expected}"
    if wrong:
        raise EsparseError(wrong, where="esparse::sparse_gemm", fix="pack the weight with SparseLinear.pack")
