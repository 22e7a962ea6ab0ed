"""cuBLASLt and cuSPARSELt from Python, through peers.cpp, and the kernel of read.cu."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from esparse_trt.engine.kernels import DTYPES
from esparse_trt.engine.libraries import search_folders
from esparse_trt.engine.operands import Launch, Operands
from esparse_trt.errors import EsparseError

LIBRARY = "libesparse_bench_peers.so"
WORKSPACE = 256 << 20  # bytes: more than any algorithm of either library asks for
HEURISTICS = 8


class Peers:
    """Both libraries, in the versions that torch brings along."""

    def __init__(self) -> None:
        self._lib = _load()
        self.workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda")
        dense, sparse = ctypes.c_size_t(), ctypes.c_int()
        self.call("open_dense", str(_find("libcublasLt.so")).encode(), ctypes.byref(dense))
        self.call("open_sparse", str(_find("libcusparseLt.so")).encode(), ctypes.byref(sparse))
        self.versions = {"cublaslt": dense.value, "cusparselt": sparse.value}

    def call(self, name: str, *arguments: object) -> None:
        """Call a function of the C ABI; its message becomes an EsparseError."""
        if error := getattr(self._lib, f"peers_{name}")(*arguments):
            raise EsparseError(error.decode(), where=f"peers_{name}")

    def read(self, data: Tensor, sink: Tensor) -> None:
        """Enqueue a kernel that does nothing but read the data."""
        self.call("read", *_addresses(data), ctypes.c_size_t(data.nbytes), *_addresses(sink), _stream())

    def destroy(self, name: str, plan: ctypes.c_void_p) -> None:
        """Free a plan."""
        getattr(self._lib, f"peers_{name}_destroy")(plan)


class Dense:
    """Dense GEMM at one shape, with the algorithms that the heuristic of cuBLASLt proposes."""

    def __init__(self, peers: Peers, operands: Operands, m: int) -> None:
        self.peers, self.operands, self.m = peers, operands, m
        self._plan, count = ctypes.c_void_p(), ctypes.c_int()
        shape = [ctypes.c_int64(size) for size in (m, operands.n, operands.k)]
        peers.call(
            "dense_create", *shape, DTYPES.index(operands.dtype), ctypes.c_size_t(WORKSPACE), HEURISTICS,
            ctypes.byref(self._plan), ctypes.byref(count),
        )  # fmt: skip
        self.algorithms = range(count.value)

    def run(self, algorithm: int) -> Launch:
        """What enqueues one of the algorithms."""
        workspace = self.peers.workspace.data_ptr()

        def launch(copy: int, turn: int) -> None:
            x, y = self.operands.at(turn, self.m)
            w = self.operands.dense[copy]
            self.peers.call(
                "dense_run", self._plan, algorithm, *_addresses(w, x, y), ctypes.c_void_p(workspace),
                ctypes.c_size_t(WORKSPACE), _stream(),
            )  # fmt: skip

        return launch

    def __del__(self) -> None:
        if self._plan:
            self.peers.destroy("dense", self._plan)


class Sparse:
    """2:4 GEMM of cuSPARSELt at one shape, after its own search of algorithms and of split-K.

    Every copy of the weights has a plan of its own, all with the algorithm found: the fastest kernels of
    cuSPARSELt 0.8 read the weights that their plan has seen first, whatever a later call names. Each plan
    compresses for itself: a search over what another had compressed failed with an illegal instruction.

    Attributes:
        copies: how many there are, one for each that ours has.
        searched: number of the algorithm and its split-K.
    """

    def __init__(self, peers: Peers, operands: Operands, m: int) -> None:
        self.peers, self.operands, self.m = peers, operands, m
        self.copies = len(operands.sparse)
        self._problem = ctypes.c_void_p()
        self._plans: list[ctypes.c_void_p] = []
        self._weights: list[Tensor] = []
        shape = [ctypes.c_int64(size) for size in (m, operands.n, operands.k)]
        peers.call("sparse_create", *shape, DTYPES.index(operands.dtype), ctypes.byref(self._problem))
        weights = operands.dense[0]
        self._plan(weights)
        self.searched = self._search()
        for _ in range(1, self.copies):
            self._plan(weights)
        self._plan(2 * weights)

    def run(self, copy: int, turn: int, plan: int | None = None) -> None:
        """Enqueue the chosen algorithm, with the plan of this copy or with that of another.

        The copy number `copies` holds twice the weights of the others.
        """
        x, y = self.operands.at(turn, self.m)
        arguments = _addresses(self._weights[copy], x, y, self.peers.workspace)
        self.peers.call("sparse_run", self._plans[copy if plan is None else plan], *arguments, _stream())

    def _plan(self, dense: Tensor) -> None:
        """One more plan, and the weights that it compresses."""
        plan, compressed, scratch = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
        references = [ctypes.byref(made) for made in (plan, compressed, scratch)]
        self.peers.call("sparse_plan", self._problem, *references)
        self._plans.append(plan)
        sizes = (compressed.value, max(1, scratch.value))
        out, work = (torch.empty(size, dtype=torch.uint8, device="cuda") for size in sizes)
        self.peers.call("sparse_compress", plan, *_addresses(dense, out, work), _stream())
        self._weights.append(out)

    def _search(self) -> dict[str, int]:
        x, y = self.operands.at(0, self.m)
        algorithm, split_k = ctypes.c_int(), ctypes.c_int()
        self.peers.call(
            "sparse_search", self._problem, self._plans[0],
            *_addresses(self._weights[0], x, y, self.peers.workspace), ctypes.c_size_t(WORKSPACE), _stream(),
            ctypes.byref(algorithm), ctypes.byref(split_k),
        )  # fmt: skip
        return {"algorithm": algorithm.value, "split_k": split_k.value}

    def __del__(self) -> None:
        for plan in self._plans:
            self.peers.destroy("sparse_plan", plan)
        if self._problem:
            self.peers.destroy("sparse", self._problem)


def _addresses(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)


def _load() -> ctypes.CDLL:
    folders = search_folders()
    for path in (folder / LIBRARY for folder in folders):
        if path.is_file():
            lib = ctypes.CDLL(str(path))
            break
    else:
        raise EsparseError(
            f"{LIBRARY} was not found in {', '.join(map(str, folders))}",
            fix="configure with -DESPARSE_BENCH=ON (it needs the headers of cuBLASLt and cuSPARSELt)",
        )
    for name in ("read", "open_dense", "open_sparse", "dense_create", "dense_run", "sparse_create",
                 "sparse_plan", "sparse_compress", "sparse_search", "sparse_run"):  # fmt: skip
        getattr(lib, f"peers_{name}").restype = ctypes.c_char_p
    return lib


def _find(name: str) -> Path:
    """A library among the packages that torch depends on."""
    packages = Path(torch.__file__).parents[1] / "nvidia"
    found = sorted(packages.glob(f"**/{name}*"))
    if not found:
        raise EsparseError(f"no {name} in {packages}", fix="install a CUDA build of torch")
    return found[0]
