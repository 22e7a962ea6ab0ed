"""Attention of one token over a long cache: each (batch, kv head) is shared by several blocks, then combined.

With running maximum m and sum l of block s over its part of the cache, and a = Σ exp(q·k − m) v / l,

    y = Σ_s w_s a_s / Σ_s w_s,    w_s = l_s exp(m_s − max m).

The parts are equal shares of the filled length, read on the GPU: one captured launch serves all lengths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_TILE, _WARPS, _STAGES = 64, 4, 3
_TILE_BYTES = 32 << 10  # keys of one step at most: with the values and the stages, they fill shared memory
_ROWS = 16  # query heads of one kv head, padded to what tensor cores take
_WAVES = 2  # blocks per multiprocessor to aim for: fewer leave the memory idle, more only add to combine


@triton.jit
def _part(  # type: ignore[no-untyped-def]
    query, keys, values, partial, scales, output, position, scale,  # noqa: ANN001
    query_batch, query_head, max_length,  # noqa: ANN001
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """One part of one (batch, kv head): a [GROUP, SIZE] and log2 of its weight; y if there is one part."""
    part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    length = tl.load(position).to(tl.int32) + 1
    share = tl.cdiv(tl.cdiv(length, PARTS), TILE) * TILE
    begin = part * share
    end = tl.minimum(begin + share, length)

    row, column = tl.arange(0, ROWS), tl.arange(0, PADDED)
    inside = (row[:, None] < GROUP) & (column[None, :] < SIZE)
    query += (head // KV_HEADS) * query_batch + (head % KV_HEADS) * GROUP * query_head
    q = tl.load(query + row[:, None] * query_head + column[None, :], mask=inside, other=0.0)
    base = head * max_length * SIZE
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    a = tl.zeros([ROWS, PADDED], tl.float32)
    for start in range(begin, end, TILE):
        place = start + tl.arange(0, TILE)
        tile = base + place[:, None] * SIZE + column[None, :]
        filled = (place[:, None] < end) & (column[None, :] < SIZE)
        k = tl.load(keys + tile, mask=filled, other=0.0)
        v = tl.load(values + tile, mask=filled, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = tl.where(place[None, :] < end, s, float("-inf"))
        higher = tl.maximum(best, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(best - higher)
        total = total * shrink + tl.sum(p, 1)
        a = tl.dot(p.to(v.dtype), v, a * shrink[:, None], input_precision="ieee")
        best = higher

    if PARTS == 1:
        output += (head * GROUP + row[:, None]) * SIZE + column[None, :]
        tl.store(output, (a / total[:, None]).to(output.dtype.element_ty), mask=inside)
    else:
        slot = (head * PARTS + part) * GROUP + row
        a = tl.where(total[:, None] > 0, a / total[:, None], 0.0)  # a part behind the length has no sum
        tl.store(partial + slot[:, None] * SIZE + column[None, :], a, mask=inside)
        tl.store(scales + slot, tl.where(total > 0, best + tl.log2(total), float("-inf")), mask=row < GROUP)


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    partial, scales, output,  # noqa: ANN001
    GROUP: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr, ROUNDED: tl.constexpr,
    PDL: tl.constexpr,
) -> None:  # fmt: skip
    """y of one query head."""
    head, row = tl.program_id(0) // GROUP, tl.program_id(0) % GROUP
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    part, column = tl.arange(0, ROUNDED), tl.arange(0, PADDED)
    slot = (head.to(tl.int64) * PARTS + part) * GROUP + row
    scale = tl.load(scales + slot, mask=part < PARTS, other=float("-inf"))
    weight = tl.exp2(scale - tl.max(scale, 0))
    inside = (part[:, None] < PARTS) & (column[None, :] < SIZE)
    a = tl.load(partial + slot[:, None] * SIZE + column[None, :], mask=inside, other=0.0)
    y = tl.sum(a * weight[:, None], 0) / tl.sum(weight, 0)
    output += tl.program_id(0).to(tl.int64) * SIZE + column
    tl.store(output, y.to(output.dtype.element_ty), mask=column < SIZE)


def flash_decode(query: Tensor, keys: Tensor, values: Tensor, position: Tensor, scaling: float) -> Tensor:
    """See `attention.decode_attention`."""
    batch, heads, _, size = query.shape
    kv_heads, max_length = keys.shape[1:3]
    group, padded = heads // kv_heads, triton.next_power_of_2(size)
    device = torch.cuda.get_device_properties(query.device)
    pdl = device.major >= 9  # nothing is read or written before the wait
    wanted = triton.cdiv(_WAVES * device.multi_processor_count, batch * kv_heads)
    tile = min(_TILE, _TILE_BYTES // (padded * keys.element_size()))  # cache positions a step
    parts = max(1, min(wanted, triton.cdiv(max_length, tile)))
    output = query.new_empty(batch, 1, heads, size)
    partial = query.new_empty((batch * heads * parts, size) if parts > 1 else (1, 1), dtype=torch.float32)
    scales = query.new_empty(batch * heads * parts, dtype=torch.float32)
    _part[parts, batch * kv_heads](
        query, keys, values, partial, scales, output, position,
        scaling * 1.4426950408889634,  # log2 e
        query.stride(0), query.stride(1), max_length,
        KV_HEADS=kv_heads, GROUP=group, SIZE=size, PADDED=padded,
        ROWS=max(_ROWS, triton.next_power_of_2(group)), TILE=tile, PARTS=parts,
        PDL=pdl, launch_pdl=pdl, num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    if parts > 1:
        _combine[(batch * heads,)](
            partial, scales, output,
            GROUP=group, SIZE=size, PADDED=padded, PARTS=parts, ROUNDED=triton.next_power_of_2(parts),
            PDL=pdl, launch_pdl=pdl, num_warps=1,
        )  # fmt: skip
    return output
