"""`es24-v1` packing on the device where the weight lies: the torch twin of `graph.es24.pack`, for loading."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from esparse_trt.graph import es24
from esparse_trt.graph.groups import as_numpy

_NUMPY = {torch.float16: np.dtype(np.float16), torch.bfloat16: np.dtype(ml_dtypes.bfloat16)}


def why_not(weight: Tensor) -> str | None:
    """Why a weight [N, K] has no packed form; None if it has one."""
    if weight.dtype not in _NUMPY:
        return f"{es24.LAYOUT} holds float16 or bfloat16, not {weight.dtype}"
    return es24.why_not(weight.shape[0], weight.shape[1], _NUMPY[weight.dtype])


def pack(weight: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """Compress a 2:4 weight [N, K] of fp16 or bf16, K a multiple of 4.

    Returns:
        values [N, K/2] and int32 metadata, as `es24` describes them, bit for bit what `es24.pack` gives.

    Raises:
        EsparseError: more than two nonzeros in a chunk; names row, chunk and values.
    """
    rows, channels = weight.shape
    chunks = weight.view(rows, channels // 4, 4)
    nonzero = (chunks != 0).byte()
    count = nonzero.sum(-1)
    if count.numel() and count.max() > 2:
        es24.compress(as_numpy(weight.cpu()), name)  # raises, with the place
    first, second = nonzero.argmax(-1), 3 - nonzero.flip(-1).argmax(-1)
    first = torch.where((count == 0) | (first == 3), 0, first)
    second = torch.where(count == 0, 1, torch.where(count == 1, 3, second))
    places = torch.stack([first, second], dim=-1)
    values = (chunks.gather(-1, places) + 0).view(rows, channels // 2)  # −0.0 + 0 is +0
    return values, _tile((first | second << 2).int(), rows, channels)


def interleave(gate: Tensor, up: Tensor) -> Tensor:
    """Rows [2I, ...] of one GEMM with an activation: 8 rows of gate, the same 8 of up, and so on.

    Args:
        gate: [I, ...], I a multiple of 8: weights or biases.
        up: of the same shape.
    """
    return torch.stack([gate.unflatten(0, (-1, 8)), up.unflatten(0, (-1, 8))], dim=1).flatten(0, 2)


def _tile(nibbles: Tensor, rows: int, channels: int) -> Tensor:
    """Nibbles [N, K/4] to words."""
    shape = kt, nt, *_ = es24.metadata_shape(rows, channels)
    padded = nibbles.new_full((nt * es24.TILE_N, kt * es24.TILE_K // 4), 0x4)
    padded[:rows, : channels // 4] = nibbles
    shifts = torch.arange(0, 16, 4, device=nibbles.device, dtype=torch.int32)
    halves = (padded.view(-1, kt * es24.TILE_K // 16, 4) << shifts).sum(-1, dtype=torch.int32)
    low, high = halves.view(nt, 4, 2, 8, kt, 4, 2).unbind(2)  # rows n and n + 8
    words = low | high << 16  # (nt, r16, g, kt, q, h)
    return words.permute(3, 0, 1, 5, 2, 4).contiguous().view(shape)
