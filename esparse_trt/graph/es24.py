"""`es24-v1`: 2:4 weights compressed to 9/16 of their size, in the words that sparse tensor cores read.

A weight `[N, K]` of fp16 or bf16 becomes

- `values [N, K/2]`, row-major: the two kept values of every 4 consecutive k ("chunk"), in ascending k;
- `metadata`, int32 `[ceil(K/128), ceil(N/64), 4, 2, 8, 4]`, indexed (kt, nt, r16, h, g, q). One word
  describes rows `n = 64 nt + 16 r16 + g` (bits 0-15) and `n + 8` (bits 16-31) at the 16 k from
  `128 kt + 32 q + 16 h`; its nibble c, least significant first, describes chunk c as `i0 | i1 << 2`: the
  places of the two values.

`i0 < i1` always, as `mma.sp` with ordered metadata asks: a chunk with one nonzero at i < 3 stores (i, 3), one
at 3 stores (0, 3), and one with none (0, 1); the missing values are +0. Minus zero counts as zero. Rows and
chunks that only fill up the last tile have the nibble of an empty chunk. Words are little-endian.

The order is that of the CUTLASS sm90 sparse metadata atom; plugins/include/esparse/es24.h is its twin in C++.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from esparse_trt.errors import EsparseError

LAYOUT = "es24-v1"
TILE_N, TILE_K = 64, 128  # of one metadata tile
DTYPES = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
_MAX_RATIO = 0.6  # of the dense size: padded metadata makes small layers larger than that

_EMPTY = 0x4  # the nibble (0, 1)
_BLOCK = 1 << 19  # weights packed in one go: what they need stays in the cache
# By the set of nonzeros, bit j for place j; sets of more than two do not occur.
_NIBBLES = np.array(
    [_EMPTY, 0xC, 0xD, 0x4, 0xE, 0x8, 0x9, 0, 0xC, 0xC, 0xD, 0, 0xE, 0, 0, 0], dtype=np.uint16
)
_COUNTS = np.array([bin(places).count("1") for places in range(16)], dtype=np.uint8)
# Halves of words by row and chunk, (nt, r16, n+8, g, kt, q, h), to the order of the metadata; and back.
_TO_WORDS = (4, 0, 1, 6, 3, 5, 2)
_TO_ROWS = tuple(int(axis) for axis in np.argsort(_TO_WORDS))


class Packed(NamedTuple):
    """A compressed weight: `values [N, K/2]` and `metadata` as in the module's description."""

    values: NDArray
    metadata: NDArray[np.int32]


def metadata_shape(rows: int, channels: int) -> tuple[int, int, int, int, int, int]:
    """Shape of the metadata of a weight `[rows, channels]`."""
    return -(-channels // TILE_K), -(-rows // TILE_N), 4, 2, 8, 4


def packed_bytes(rows: int, channels: int) -> int:
    """Bytes of values and metadata: 9/16 of the dense weight's where no metadata is padding."""
    return rows * channels + 4 * math.prod(metadata_shape(rows, channels))


def why_not(rows: int, channels: int, dtype: np.dtype) -> str | None:
    """Why the kernels cannot take a weight `[N, K] = [rows, channels]` in this layout; None if they can."""
    if dtype not in DTYPES:
        return f"{LAYOUT} holds float16 or bfloat16, not {dtype.name}"
    if channels % 32 or not channels:
        return f"K = {channels} is not a multiple of 32"
    if rows % 8 or not rows:
        return f"N = {rows} is not a multiple of 8"
    ratio = packed_bytes(rows, channels) / (2 * rows * channels)
    if ratio > _MAX_RATIO:
        return f"padded to whole tiles it would be {ratio:.3f} of its dense size, more than {_MAX_RATIO}"
    return None


# --- packing -------------------------------------------------------------------------------------------


def pack(weight: NDArray, name: str = "weight") -> Packed:
    """Compress a 2:4 weight.

    Args:
        weight: `[N, K]` of fp16 or bf16 and of any strides, K a multiple of 4.
        name: for messages.

    Raises:
        EsparseError: another dtype or K, or more than two nonzeros in a chunk; names row, chunk and values.
    """
    values, places = compress(weight, name)
    return Packed(values, tile([places], weight.shape[1]))


def compress(weight: NDArray, name: str = "weight") -> tuple[NDArray, NDArray[np.uint16]]:
    """The values of a weight `[N, K]` and, `[N, ceil(K/16)]`, the nibbles of 4 chunks in 16 bits.

    Weights that are to be one, with their rows one after the other, are compressed one by one and then tiled
    together. Arguments and errors are those of `pack`.
    """
    rows, channels = weight.shape
    if weight.dtype not in DTYPES or channels % 4:
        raise EsparseError(
            f"{LAYOUT} holds fp16 or bf16 weights with K a multiple of 4, this one is {weight.dtype.name} "
            f"with K = {channels}",
            where=name,
            fix="export in float16, and leave layers dense that `why_not` has a reason for",
        )
    bits = weight.view(np.uint16)
    pairs = np.empty((rows, channels // 4), dtype="<u4")  # of values: the first is the low half
    nibbles = np.full((rows, -(-channels // 16) * 4), _EMPTY, dtype=np.uint16)
    step = max(1, _BLOCK // max(1, channels))
    for start in range(0, rows, step):
        block = slice(start, start + step)
        pairs[block], nibbles[block, : channels // 4], bad = _compress(bits[block])
        if bad is not None:
            row, chunk = start + bad[0], bad[1]
            values = weight[row, 4 * chunk : 4 * chunk + 4].astype(float)
            found = ", ".join(f"{value:.4g}" for value in values)
            raise EsparseError(
                f"not 2:4: row {row}, chunk {chunk} (channels {4 * chunk} to {4 * chunk + 3}) "
                f"holds [{found}]",
                where=name,
                fix="prune it to 2:4 along K first",
            )
    shifts = np.arange(0, 16, 4, dtype=np.uint16)
    places = np.bitwise_or.reduce(nibbles.reshape(rows, -1, 4) << shifts, axis=-1)
    return pairs.view(weight.dtype), places


def _compress(
    bits: NDArray[np.uint16],
) -> tuple[NDArray[np.uint32], NDArray[np.uint16], tuple[int, int] | None]:
    """Values (in pairs) and nibbles of some rows, and the first (row, chunk) that is not 2:4."""
    slots = [bits[:, place::4] for place in range(4)]
    present = [(slot & 0x7FFF) != 0 for slot in slots]
    slots = [slot * there for slot, there in zip(slots, present, strict=True)]  # −0.0 becomes +0
    places = present[0] | present[1] << np.uint8(1) | present[2] << np.uint8(2) | present[3] << np.uint8(3)
    first = np.where(present[0], slots[0], np.where(present[1], slots[1], slots[2]))
    second = slots[0] ^ slots[1] ^ slots[2] ^ slots[3] ^ first  # there are no others
    excess = _COUNTS[places] > 2
    bad = np.unravel_index(excess.argmax(), excess.shape) if excess.any() else None
    pairs = first | second.astype(np.uint32) << 16
    return pairs, _NIBBLES[places], None if bad is None else (int(bad[0]), int(bad[1]))


def tile(places: Sequence[NDArray[np.uint16]], channels: int) -> NDArray[np.int32]:
    """The metadata of weights `[N_i, K]`, their rows one after the other, from their `compress`ed places."""
    rows = sum(len(part) for part in places)
    shape = kt, nt, *_ = metadata_shape(rows, channels)
    padded = np.full((nt * TILE_N, kt * TILE_K // 16), 0x1111 * _EMPTY, dtype="<u2")
    start = 0
    for part in places:
        padded[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    halves = padded.reshape(nt, 4, 2, 8, kt, 4, 2).transpose(_TO_WORDS)
    return np.ascontiguousarray(halves).view("<i4").reshape(shape)


def unpack(packed: Packed) -> NDArray:
    """The weight `[N, K]` that was compressed, bit for bit but for the sign of zeros.

    Raises:
        EsparseError: the metadata does not belong to the values, or holds places that are not in order.
    """
    values, metadata = packed
    rows, channels = values.shape[0], 2 * values.shape[1]
    expected = metadata_shape(rows, channels)
    if metadata.shape != expected or metadata.dtype != np.int32:
        raise EsparseError(
            f"values {list(values.shape)} need int32 metadata {list(expected)}, found {metadata.dtype.name} "
            f"{list(metadata.shape)}",
            where=LAYOUT,
            fix="pack the weight again",
        )
    kt, nt, *_ = expected
    halves = np.ascontiguousarray(metadata).view("<u2").reshape(kt, nt, 4, 2, 8, 4, 2).transpose(_TO_ROWS)
    shifts = np.arange(0, 16, 4, dtype=np.uint16)
    nibbles = (halves.reshape(nt * TILE_N, kt * TILE_K // 16, 1)[:rows] >> shifts).astype(np.uint8) & 0xF
    nibbles = nibbles.reshape(rows, -1)[:, : channels // 4]
    first, second = nibbles & 3, nibbles >> 2
    if (first >= second).any():
        row, chunk = (int(i) for i in np.argwhere(first >= second)[0])
        raise EsparseError(
            f"row {row}, chunk {chunk} has the nibble {nibbles[row, chunk]:#x}: its places do not ascend",
            where=LAYOUT,
            fix="the metadata was damaged: pack the weight again",
        )
    bits = values.view(np.uint16)
    weight = np.empty((rows, channels), dtype=np.uint16)
    for place in range(4):
        weight[:, place::4] = bits[:, ::2] * (first == place) | bits[:, 1::2] * (second == place)
    return weight.view(values.dtype)
