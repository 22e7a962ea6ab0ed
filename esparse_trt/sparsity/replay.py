"""Many small GPU operations as one CUDA graph: a loop over columns is bound by launches, not by arithmetic.

A function of tensors is captured once for each combination of shapes, and replayed from then on. It must not
look at values on the host, nor keep state. On a CPU it is simply called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_KEPT = 16  # graphs kept: a model has a handful of layer shapes

Key = tuple[torch.Size, torch.dtype, torch.device] | None
Function = Callable[..., tuple[Tensor, ...]]


def replay(function: Function, *tensors: Tensor | None, **constants: Any) -> tuple[Tensor, ...]:
    """`function(*tensors, **constants)`.

    Args:
        tensors: all on one device; None is passed on.
        constants: hashable.

    Returns:
        what it returns; on a GPU valid until the next call with the same shapes.
    """
    first = next(t for t in tensors if t is not None)
    if not first.is_cuda:
        return function(*tensors, **constants)
    keys = tuple(None if t is None else (t.shape, t.dtype, t.device) for t in tensors)
    return _captured(function, keys, tuple(constants.items()))(*tensors)


class _Captured:
    """One captured call: tensors are copied to where the graph reads them."""

    def __init__(self, function: Function, keys: tuple[Key, ...], constants: dict[str, Any]) -> None:
        self.inputs = [
            None if key is None else torch.ones(key[0], dtype=key[1], device=key[2]) for key in keys
        ]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries set themselves up on a first call, outside of the capture
            function(*self.inputs, **constants)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function(*self.inputs, **constants)

    def __call__(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        for mine, given in zip(self.inputs, tensors, strict=True):
            if mine is not None and given is not None:
                mine.copy_(given)
        self.graph.replay()
        return self.outputs


@lru_cache(maxsize=_KEPT)
def _captured(function: Function, keys: tuple[Key, ...], constants: tuple[tuple[str, Any], ...]) -> _Captured:
    return _Captured(function, keys, dict(constants))
