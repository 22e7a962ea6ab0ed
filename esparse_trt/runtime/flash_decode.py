"""Attention of one token over a long cache: each (batch, kv head) is shared by several blocks, then combined.

With running maximum m and sum l of block s over its part of the cache, and a = Σ exp(q·k − m) v / l,

    y = Σ_s w_s a_s / Σ_s w_s,    w_s = l_s exp(m_s − max m).

The parts are equal shares of the filled length, read on the GPU: one captured launch serves all lengths.
The first part takes the new token, too: it rotates its key, if that is still to be done, and writes it into
the cache with its value. What the cache holds does not come from the kernel before: it is fetched while that
still runs. The output may go to any places, which is how o, its reader, gets it in its own order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_WARPS = 4
# Cache positions a step, and stages: where blocks share a head, and where not. There are many then, and
# four fit on a multiprocessor: the 512 of 16 sequences of LLaMA-7B at once.
_SPLIT, _WHOLE = (64, 3), (32, 4)
_TILE_BYTES = 32 << 10  # keys of one step at most: with the values and the stages, they fill shared memory
_ROWS = 16  # query heads of one kv head, padded to what tensor cores take
_FETCHED, _LINE = 16 << 10, 128  # bytes of keys, and of values, that a block fetches ahead; of a line
_WAVES = 2  # blocks per multiprocessor to aim for: fewer leave the memory idle, more only add to combine


@triton.jit
def _prefetch(addresses) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Fetch lines into L2. It reads nothing: what is written later is seen."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _states(states, cosine, sine, column, inside, SIZE: tl.constexpr, ROTATED: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Channels `column` of a query or key, in the shape of `inside`; rotated if that is still to be done."""
    if ROTATED:
        column = tl.broadcast_to(column, inside.shape)
        low = column < SIZE // 2
        x = tl.load(states + column, mask=inside, other=0.0)
        other = tl.where(low, column + SIZE // 2, column - SIZE // 2)
        partner = tl.load(states + other, mask=inside, other=0.0)
        along = x * tl.load(cosine + column, mask=inside, other=0.0).to(tl.float32)
        across = partner * tl.load(sine + column, mask=inside, other=0.0).to(tl.float32)
        return (along + tl.where(low, -across, across)).to(x.dtype)
    else:
        return tl.load(states + column, mask=inside, other=0.0)


@triton.jit
def _attend_cached(  # type: ignore[no-untyped-def]  # noqa: ANN202
    q, keys, values, base, begin, end, column, scale,  # noqa: ANN001
    SIZE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Attention of q [ROWS, PADDED] over what the cache of the head at `base` holds from `begin` to `end`.

    Returns the running maximum [ROWS] (of log2), the sum of weights [ROWS], and of weighted values.
    """
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
    return best, total, a


@triton.jit
def _attend_new(q, k, v, best, total, a, scale):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """The same with one more token, of key and value [PADDED]."""
    s = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale
    highest = tl.maximum(best, s)
    weight, before = tl.exp2(s - highest), tl.exp2(best - highest)
    total = total * before + weight
    a = a * before[:, None] + weight[:, None] * v.to(tl.float32)[None, :]
    return highest, total, a


@triton.jit
def _part(  # type: ignore[no-untyped-def]
    query, new_keys, new_values, keys, values, partial, scales, output, places, cosine, sine,  # noqa: ANN001
    position, scale,  # noqa: ANN001
    query_batch, query_head, key_batch, key_head, value_batch, value_head, max_length,  # noqa: ANN001
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, FETCHED: tl.constexpr, LINE: tl.constexpr, PARTS: tl.constexpr,
    PLACED: tl.constexpr, ROTATED: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """One part of one (batch, kv head): a [GROUP, SIZE] and log2 of its weight; y if there is one part."""
    part, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
    length = tl.load(position).to(tl.int32)  # of what the cache holds
    share = tl.cdiv(length, PARTS)
    begin = part * share
    end = tl.minimum(begin + share, length)
    base = head * max_length * SIZE
    if PDL:
        ahead = base + tl.minimum(begin * SIZE + tl.arange(0, FETCHED // LINE) * LINE, length * SIZE)
        _prefetch(keys + ahead)
        _prefetch(values + ahead)
    row, column = tl.arange(0, ROWS), tl.arange(0, PADDED)
    inside = (row[:, None] < GROUP) & (column[None, :] < SIZE)
    batch, kv_head = head // KV_HEADS, head % KV_HEADS
    to = (kv_head * GROUP + row[:, None]) * SIZE + column[None, :]
    if PLACED and PARTS == 1:
        to = tl.load(places + to, mask=inside, other=0)
    if PDL:
        gdc_wait()

    query += batch * query_batch + (kv_head * GROUP + row[:, None]) * query_head
    q = _states(query, cosine, sine, column[None, :], inside, SIZE, ROTATED)
    best, total, a = _attend_cached(
        q, keys, values, base, begin, end, column, scale, SIZE, PADDED, ROWS, TILE
    )
    if part == 0:  # takes the new token, too: here, as the cache's first tiles are not to wait for it
        own = column < SIZE
        new_keys += batch * key_batch + kv_head * key_head
        new_v = tl.load(new_values + batch * value_batch + kv_head * value_head + column, mask=own, other=0.0)
        new_k = _states(new_keys, cosine, sine, column, own, SIZE, ROTATED)
        tl.store(keys + base + length * SIZE + column, new_k, mask=own)
        tl.store(values + base + length * SIZE + column, new_v, mask=own)
        best, total, a = _attend_new(q, new_k, new_v, best, total, a, scale)

    if PARTS == 1:
        output += batch * (KV_HEADS * GROUP * SIZE) + to
        tl.store(output, (a / total[:, None]).to(output.dtype.element_ty), mask=inside)
    else:
        slot = (head * PARTS + part) * GROUP + row
        a = tl.where(total[:, None] > 0, a / total[:, None], 0.0)  # a part behind the length has no sum
        tl.store(partial + slot[:, None] * SIZE + column[None, :], a, mask=inside)
        tl.store(scales + slot, tl.where(total > 0, best + tl.log2(total), float("-inf")), mask=row < GROUP)


@triton.jit
def _combine(  # type: ignore[no-untyped-def]
    partial, scales, output, places,  # noqa: ANN001
    HEADS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr,
    ROUNDED: tl.constexpr, PLACED: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """y of one query head."""
    head, row = tl.program_id(0) // GROUP, tl.program_id(0) % GROUP
    part, column = tl.arange(0, ROUNDED), tl.arange(0, PADDED)
    if PDL:
        gdc_launch_dependents()
    to = tl.program_id(0) % HEADS * SIZE + column
    if PLACED:
        to = tl.load(places + to, mask=column < SIZE, other=0)
    if PDL:
        gdc_wait()
    slot = (head.to(tl.int64) * PARTS + part) * GROUP + row
    scale = tl.load(scales + slot, mask=part < PARTS, other=float("-inf"))
    weight = tl.exp2(scale - tl.max(scale, 0))
    inside = (part[:, None] < PARTS) & (column[None, :] < SIZE)
    a = tl.load(partial + slot[:, None] * SIZE + column[None, :], mask=inside, other=0.0)
    y = tl.sum(a * weight[:, None], 0) / tl.sum(weight, 0)
    output += (tl.program_id(0) // HEADS).to(tl.int64) * (HEADS * SIZE) + to
    tl.store(output, y.to(output.dtype.element_ty), mask=column < SIZE)


def flash_decode(
    query: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    scaling: float,
    places: Tensor | None,
    cosine: Tensor | None,
    sine: Tensor | None,
) -> Tensor:
    """See `attention.decode_attention`."""
    batch, heads, _, size = query.shape
    kv_heads, max_length = keys.shape[1:3]
    group, padded = heads // kv_heads, triton.next_power_of_2(size)
    device = torch.cuda.get_device_properties(query.device)
    pdl = device.major >= 9
    wanted = triton.cdiv(_WAVES * device.multi_processor_count, batch * kv_heads)
    parts = max(1, min(wanted, triton.cdiv(max_length, _SPLIT[0])))
    tile, stages = _SPLIT if parts > 1 else _WHOLE
    tile = min(tile, _TILE_BYTES // (padded * keys.element_size()))
    output = query.new_empty(batch, 1, heads, size)
    partial = query.new_empty((batch * heads * parts, size) if parts > 1 else (1, 1), dtype=torch.float32)
    scales = query.new_empty(batch * heads * parts, dtype=torch.float32)
    _part[parts, batch * kv_heads](
        query, new_keys, new_values, keys, values, partial, scales, output, places, cosine, sine, position,
        scaling * 1.4426950408889634,  # log2 e
        *query.stride()[:2], *new_keys.stride()[:2], *new_values.stride()[:2], max_length,
        KV_HEADS=kv_heads, GROUP=group, SIZE=size, PADDED=padded,
        ROWS=max(_ROWS, triton.next_power_of_2(group)), TILE=tile, FETCHED=_FETCHED // keys.element_size(),
        LINE=_LINE // keys.element_size(), PARTS=parts, PLACED=places is not None,
        ROTATED=cosine is not None,
        PDL=pdl, launch_pdl=pdl, num_warps=_WARPS, num_stages=stages,
    )  # fmt: skip
    if parts > 1:
        _combine[(batch * heads,)](
            partial, scales, output, places,
            HEADS=heads, GROUP=group, SIZE=size, PADDED=padded, PARTS=parts,
            ROUNDED=triton.next_power_of_2(parts), PLACED=places is not None,
            PDL=pdl, launch_pdl=pdl, num_warps=1,
        )  # fmt: skip
    return output
