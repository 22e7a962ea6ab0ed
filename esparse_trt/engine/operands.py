"""Random operands for timing: a 2:4 layer in every form that a kernel reads, rotated past the cache.

Launch i multiplies copy i of the weights with what launch i - 1 wrote: a chain of dependent GEMMs, as in a
model. Two buffers take turns as x and y, whatever N and K are; what one launch does not overwrite stays from
before. Weights have variance 2/K where they are not zero, so that y has about the variance of x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from esparse_trt.engine import timing
from esparse_trt.engine.kernels import Gemm, Kernels, Problem
from esparse_trt.engine.timing import Replay

Launch = Callable[[int, int], None]  # of (copy of the weights, turn of the buffers)

# The six nibbles of two places among four, and the places they stand for.
_NIBBLES = (0x4, 0x8, 0xC, 0x9, 0xD, 0xE)
TILE_N, TILE_K = 64, 128


class Layer(NamedTuple):
    """One random layer: `values [N, K/2]` and `metadata` in es24-v1, and the same weights dense `[N, K]`."""

    values: Tensor
    metadata: Tensor
    dense: Tensor


def random_layer(n: int, k: int, dtype: torch.dtype, device: str = "cuda", seed: int = 0) -> Layer:
    """A 2:4 layer of normal weights, every pattern of places equally likely.

    Args:
        n: rows, a multiple of 8.
        k: channels, a multiple of 32.
        dtype: float16 or bfloat16.
        device: where.
        seed: of the weights.
    """
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randn(n, k // 2, dtype=dtype, device=device, generator=generator).mul_((2 / k) ** 0.5)
    which = torch.randint(6, (n, k // 4), dtype=torch.uint8, device=device, generator=generator)
    nibbles = torch.tensor(_NIBBLES, dtype=torch.uint8, device=device)[which.int()]
    dense = torch.zeros(n, k // 4, 4, dtype=dtype, device=device)
    places = torch.stack((nibbles & 3, nibbles >> 2), dim=-1).long()
    dense.scatter_(2, places, values.view(n, k // 4, 2))
    return Layer(values, _metadata(nibbles, k), dense.view(n, k))


def _metadata(nibbles: Tensor, k: int) -> Tensor:
    """The words of `graph/es24.py` from the nibbles `[N, K/4]`, made on the device that they are on."""
    n = nibbles.shape[0]
    tiles_n, tiles_k = -(-n // TILE_N), -(-k // TILE_K)
    padded = torch.full(
        (tiles_n * TILE_N, tiles_k * TILE_K // 4), 0x4, dtype=torch.uint8, device=nibbles.device
    )
    padded[:n, : k // 4] = nibbles
    # (nt, r16, n + 8, g, kt, q, h, chunk) to the order of words; chunks 2i and 2i + 1 share a byte.
    halves = padded.view(tiles_n, 4, 2, 8, tiles_k, 4, 2, 4).permute(4, 0, 1, 6, 3, 5, 2, 7)
    pairs = (halves[..., 0::2] | halves[..., 1::2] << 4).contiguous()
    return pairs.view(-1).view(torch.int32)


class Operands:
    """One layer's weights in as many copies as the cache asks for, and the buffers of a chain of GEMMs.

    Attributes:
        n, k, dtype: of the layer.
        sparse: copies of values and metadata.
        dense: copies of the same weights `[N, K]`.
    """

    def __init__(self, n: int, k: int, dtype: str, rows: int) -> None:
        """Make them for up to `rows` tokens on torch's current GPU."""
        self.n, self.k, self.dtype = n, k, dtype
        kind = getattr(torch, dtype)
        layer, cache = random_layer(n, k, kind), timing.l2_bytes()
        self.sparse = [(layer.values, layer.metadata)]
        for _ in range(timing.copies(n * k * 9 // 8, cache) - 1):
            self.sparse.append((layer.values.clone(), layer.metadata.clone()))
        self.dense = [layer.dense]
        self.dense += [layer.dense.clone() for _ in range(timing.copies(2 * n * k, cache) - 1)]
        self._start = torch.randn(rows * max(n, k), dtype=kind, device="cuda")
        self._buffers = (self._start.clone(), self._start.clone())
        self._gemms: dict[tuple[int, int, int], Gemm] = {}

    def at(self, turn: int, m: int) -> tuple[Tensor, Tensor]:
        """x `[m, K]` and y `[m, N]` of every second launch of a chain: `turn` is 0 or 1."""
        source, target = self._buffers[turn], self._buffers[1 - turn]
        return source[: m * self.k].view(m, self.k), target[: m * self.n].view(m, self.n)

    def reset(self, m: int) -> None:
        """Start the chain again, before its values have drifted to zero or to infinity."""
        self._buffers[0][: m * self.k].copy_(self._start[: m * self.k])

    def run_sparse(self, kernels: Kernels, m: int, candidate: str, *, programmatic: bool = False) -> Launch:
        """What enqueues one of our kernels."""
        workspace = kernels.workspace(Problem(m, self.n, self.k, self.dtype), candidate)

        def launch(copy: int, turn: int) -> None:
            self._gemm(kernels, m, copy, turn).run(candidate, workspace, programmatic=programmatic)

        return launch

    def run_dense(self, m: int) -> Launch:
        """What enqueues torch's matrix product, which is cuBLAS."""

        def launch(copy: int, turn: int) -> None:
            x, y = self.at(turn, m)
            torch.mm(x, self.dense[copy].t(), out=y)

        return launch

    def replay(self, m: int, launch: Launch, copies: int, *, graph_us: float) -> Replay:
        """A graph of about `graph_us` microseconds: a chain of launches that rotates over the copies."""
        return timing.capture(
            lambda index: launch(index % copies, index % 2),
            timing.launches(copies, expected_us(m, self.n, self.k), graph_us),
            prepare=lambda: self.reset(m),
        )

    def _gemm(self, kernels: Kernels, m: int, copy: int, turn: int) -> Gemm:
        if (m, copy, turn) not in self._gemms:
            x, y = self.at(turn, m)
            self._gemms[m, copy, turn] = kernels.bind(x, *self.sparse[copy], y)
        return self._gemms[m, copy, turn]


def expected_us(m: int, n: int, k: int) -> float:
    """Microseconds that a GEMM takes, to within a small factor: graphs are sized by it, nothing else."""
    return max(9 / 8 * n * k / 3e6, 2 * m * n * k / 1e9, 4.0)
