"""The kernel of `norm.rms_norm`: one block for each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_PER_THREAD = 16  # channels


@triton.jit
def _normalise(  # type: ignore[no-untyped-def]
    x, addend, weight, order, y, size, eps,  # noqa: ANN001
    BLOCK: tl.constexpr, ADD: tl.constexpr, PERMUTE: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """One row; the kernel before it does not write weight and order."""
    row = tl.program_id(0).to(tl.int64) * size
    channel = tl.arange(0, BLOCK)
    inside = channel < size
    if PDL:
        gdc_launch_dependents()
    scale = tl.load(weight + channel, mask=inside, other=0.0)
    if PERMUTE:
        source = tl.load(order + channel, mask=inside, other=0)
    if PDL:
        gdc_wait()
    h = tl.load(x + row + channel, mask=inside, other=0.0)
    if ADD:
        h += tl.load(addend + row + channel, mask=inside, other=0.0)
    exact = h.to(tl.float32)
    normed = exact * tl.rsqrt(tl.sum(exact * exact, 0) / size + eps)
    out = normed.to(h.dtype) * scale
    if PERMUTE:
        out = tl.gather(out, source, 0)  # through shared memory
    tl.store(y + row + channel, out, mask=inside)


def normalise(x: Tensor, addend: Tensor | None, weight: Tensor, eps: float, order: Tensor | None) -> Tensor:
    """See `norm.rms_norm`."""
    x, addend = x.contiguous(), None if addend is None else addend.contiguous()
    y = torch.empty_like(x)
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    pdl = torch.cuda.get_device_capability(x.device) >= (9, 0)
    _normalise[(x.numel() // size,)](
        x, addend, weight, order, y, size, eps,
        BLOCK=block, ADD=addend is not None, PERMUTE=order is not None,
        PDL=pdl, launch_pdl=pdl, num_warps=min(16, max(1, block // (32 * _PER_THREAD))),
    )  # fmt: skip
    return y
