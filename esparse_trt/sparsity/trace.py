"""Passes through a resident block that are watched, or of which a graph is kept for a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from esparse_trt.sparsity.blockwise import BlockwiseModel
from esparse_trt.sparsity.models import linear


@contextmanager
def watched(model: BlockwiseModel, names: Iterable[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Layer -> what it last read, [..., K], and put out, [..., N]; what was never called is absent."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        linear(model.model, name).register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: (inputs[0], output)})
        )
        for name in dict.fromkeys(names)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on a GPU, and nothing on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def traced(model: BlockwiseModel, hidden: Tensor, work: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The hidden states on the model's device in float32, and what they become, with its graph."""
    with torch.enable_grad(), autocast(model.device):
        x = hidden.to(model.device, torch.float32, copy=True).requires_grad_()
        return x, work(x)
