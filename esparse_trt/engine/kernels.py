"""The Sparse-GEMM kernels from Python: `libesparse_kernels.so` through ctypes, torch tensors for the data.

    kernels = load()
    gemm = kernels.bind(x, values, metadata, y)
    gemm.run("decode_...")  # y = x W^T on torch's current stream; may be captured in a CUDA graph

No TensorRT in here. The C ABI, plugins/include/esparse/sparse_gemm.h, says what each argument means.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esparse_trt.engine import abi
from esparse_trt.engine.libraries import BUILD, KERNELS, find_library
from esparse_trt.errors import EsparseError

DTYPES = ("float16", "bfloat16")  # in the order of the C enumeration
ACTIVATIONS = (None, "swiglu", "geglu")  # the same
_SUCCESS = 0
_SOMEWHERE = 256  # an aligned address that stands for a tensor where none is read


class Gpu(NamedTuple):
    """What a candidate may depend on: capability is 10 * major + minor."""

    capability: int
    multiprocessors: int


@dataclass(frozen=True)
class Problem:
    """y[m, n] = x[m, k] W[n, k]^T, with or without a bias and a permutation of x's channels.

    With an activation, one of `ACTIVATIONS`, W holds gate and up in turn, 8 rows of each, and y is [m, n/2].
    """

    m: int
    n: int
    k: int
    dtype: str = "float16"
    bias: bool = False
    permutation: bool = False
    activation: str | None = None

    @property
    def columns(self) -> int:
        """Of y."""
        return self.n // 2 if self.activation else self.n


# --- numbers of the C ABI --------------------------------------------------------------------------------


def _shape_only(problem: Problem) -> abi.Gemm:
    """The problem with addresses that are only compared with null."""
    return abi.Gemm(
        problem.m,
        problem.n,
        problem.k,
        _dtype_number(problem.dtype),
        _activation_number(problem.activation),
        _SOMEWHERE,
        _SOMEWHERE,
        _SOMEWHERE,
        _SOMEWHERE if problem.bias else None,
        _SOMEWHERE if problem.permutation else None,
        _SOMEWHERE,
    )


def _dtype_number(dtype: str) -> int:
    if dtype not in DTYPES:
        raise EsparseError(
            f"the Sparse-GEMM kernels take {' and '.join(DTYPES)}, not {dtype}", fix="export in float16"
        )
    return DTYPES.index(dtype)


def _activation_number(activation: str | None) -> int:
    if activation not in ACTIVATIONS:
        known = ", ".join(map(str, ACTIVATIONS))
        raise EsparseError(
            f"the Sparse-GEMM kernels know no activation {activation!r}", fix=f"use one of {known}"
        )
    return ACTIVATIONS.index(activation)


# --- the library ---------------------------------------------------------------------------------------


class Kernels:
    """One loaded library.

    Attributes:
        path: the file.
        version: of the library.
        kernel_set: digest of its kernels; a table of timings is valid for one such digest.
        candidates: names of the kernels with their launch parameters, in the library's order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._lib = abi.declare(ctypes.CDLL(str(path)))
        except (OSError, AttributeError) as error:
            raise EsparseError(
                f"cannot be used as the kernel library: {error}", where=path, fix=f"build it again: {BUILD}"
            ) from error
        self.version: str = self._lib.esparse_version().decode()
        self.kernel_set: str = self._lib.esparse_kernel_set().decode()
        count = self._lib.esparse_candidate_count()
        self.candidates = tuple(self._lib.esparse_candidate_name(i).decode() for i in range(count))
        self._numbers = {name: number for number, name in enumerate(self.candidates)}

    def current_gpu(self) -> Gpu:
        """The GPU that is current in this thread.

        Raises:
            EsparseError: there is none.
        """
        gpu, message = abi.Gpu(), abi.Message()
        if self._lib.esparse_current_gpu(ctypes.byref(gpu), ctypes.byref(message)) != _SUCCESS:
            raise EsparseError(message.text.decode(), fix="run this on a machine with an NVIDIA GPU")
        return Gpu(gpu.capability, gpu.multiprocessors)

    def why_not(self, problem: Problem, candidate: str, gpu: Gpu) -> str | None:
        """The library's reason why the candidate cannot run the problem on that GPU; None if it can."""
        gemm, message = _shape_only(problem), abi.Message()
        status = self._lib.esparse_check(ctypes.byref(gemm), ctypes.byref(message))
        if status == _SUCCESS:
            status = self._lib.esparse_supports(
                ctypes.byref(gemm),
                ctypes.byref(abi.Gpu(*gpu)),
                self._number(candidate),
                ctypes.byref(message),
            )
        return None if status == _SUCCESS else message.text.decode()

    def supporting(self, problem: Problem, gpu: Gpu) -> list[str]:
        """The candidates that can run the problem on that GPU."""
        return [name for name in self.candidates if self.why_not(problem, name, gpu) is None]

    def default(self, problem: Problem, gpu: Gpu) -> str | None:
        """The candidate of the static heuristic, for a problem of which nothing was measured."""
        number = self._lib.esparse_default_candidate(
            ctypes.byref(_shape_only(problem)), ctypes.byref(abi.Gpu(*gpu))
        )
        return self.candidates[number] if number >= 0 else None

    def workspace_bytes(self, problem: Problem, candidate: str) -> int:
        """Scratch memory that the candidate needs for the problem."""
        return self._lib.esparse_workspace_bytes(ctypes.byref(_shape_only(problem)), self._number(candidate))

    def bind(
        self,
        x: Tensor,
        values: Tensor,
        metadata: Tensor,
        y: Tensor,
        *,
        bias: Tensor | None = None,
        permutation: Tensor | None = None,
        activation: str | None = None,
    ) -> Gemm:
        """A GEMM on these tensors, to be run by any candidate, any number of times.

        Args:
            x: `[M, K]`, fp16 or bf16 like values, bias and y.
            values: `[N, K/2]`.
            metadata: int32, of any shape with the layout's number of words.
            y: `[M, N]`, written; `[M, N/2]` with an activation.
            bias: `[N]`.
            permutation: int32 `[K]`: column j of W reads `x[:, permutation[j]]`.
            activation: one of `ACTIVATIONS`.

        Raises:
            EsparseError: a tensor of the wrong shape, type or device, or one that is not contiguous.
        """
        (m, k), n = x.shape, values.shape[0]
        dtype = str(x.dtype).removeprefix("torch.")
        problem = Problem(m, n, k, dtype, bias is not None, permutation is not None, activation)
        words = self._lib.esparse_metadata_words(n, k)
        _require("x", x, (m, k), x.dtype, x.device)
        _require("values", values, (n, k // 2), x.dtype, x.device)
        _require("metadata", metadata.view(-1), (words,), torch.int32, x.device)
        _require("y", y, (m, problem.columns), x.dtype, x.device)
        if bias is not None:
            _require("bias", bias, (n,), x.dtype, x.device)
        if permutation is not None:
            _require("permutation", permutation, (k,), torch.int32, x.device)
        tensors = (x, values, metadata, bias, permutation, y)
        addresses = (tensor.data_ptr() if tensor is not None else None for tensor in tensors)
        numbers = _dtype_number(dtype), _activation_number(activation)
        return Gemm(self, problem, abi.Gemm(m, n, k, *numbers, *addresses), tensors)

    def workspace(self, problem: Problem, candidate: str) -> Tensor | None:
        """Scratch memory for the candidate on torch's current device; None where it needs none."""
        needed = self.workspace_bytes(problem, candidate)
        return torch.empty(needed, dtype=torch.uint8, device="cuda") if needed else None

    def enqueue(self, gemm: Any, candidate: str, launch: abi.Launch) -> None:
        """What `Gemm.run` calls."""
        message = abi.Message()
        status = self._lib.esparse_gemm_run(
            gemm, self._number(candidate), ctypes.byref(launch), ctypes.byref(message)
        )
        if status != _SUCCESS:
            raise EsparseError(message.text.decode(), where=candidate)

    def _number(self, candidate: str) -> int:
        if candidate not in self._numbers:
            raise EsparseError(
                f"the library has no candidate {candidate!r} (it has {len(self.candidates)}: "
                f"{', '.join(self.candidates[:4])} ...)",
                where=self.path,
                fix="use a table of this library's version, or run `esparse-trt tune` again",
            )
        return self._numbers[candidate]


class Gemm:
    """One problem on given tensors, which it keeps alive."""

    def __init__(
        self, kernels: Kernels, problem: Problem, gemm: abi.Gemm, tensors: tuple[Tensor | None, ...]
    ) -> None:
        self.problem = problem
        self._kernels = kernels
        self._gemm = ctypes.byref(gemm)
        self._tensors = tensors

    def run(self, candidate: str, workspace: Tensor | None = None, *, programmatic: bool = False) -> None:
        """Enqueue it on torch's current stream.

        Args:
            candidate: the kernel.
            workspace: from `Kernels.workspace`.
            programmatic: programmatic dependent launch.

        Raises:
            EsparseError: the library refused; carries its message.
        """
        launch = abi.Launch(
            torch.cuda.current_stream().cuda_stream,
            workspace.data_ptr() if workspace is not None else None,
            workspace.numel() if workspace is not None else 0,
            programmatic,
        )
        self._kernels.enqueue(self._gemm, candidate, launch)


@cache
def load(path: Path | None = None) -> Kernels:
    """The kernel library, from `path` or from where `libraries.find_library` finds it.

    Raises:
        EsparseError: it is not there, is not a library of these kernels, or is of another version.
    """
    kernels = Kernels(path or find_library(KERNELS))
    try:
        package = metadata.version("esparse-trt")
    except metadata.PackageNotFoundError:  # a source tree that was not installed
        return kernels
    if kernels.version != package:
        raise EsparseError(
            f"the library is of version {kernels.version}, esparse-trt is {package}",
            where=kernels.path,
            fix=f"build it again: {BUILD}",
        )
    return kernels


def _require(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: object, device: object) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
        raise EsparseError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, must be {dtype} "
            f"{list(shape)} on {device}"
        )
    if not tensor.is_contiguous():
        raise EsparseError(f"{name} is not contiguous")
