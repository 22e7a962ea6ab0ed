"""What each output of a block's layers does to what the block puts out.

Layers that read the same tensor share a permutation, and their outputs are not alike: an error in a value
reaches the block's output as it is, one in a query only as far as it moves the softmax. Where a permutation
is chosen, output i therefore counts by its effect: the root of the mean over tokens t of ‖∂ŷ_t/∂y_ti‖². Here
ŷ_t is what the block puts out, divided by its norm, as the norms that follow do (see `recover`). For z of
independent signs that is E (∂⟨z, ŷ⟩/∂y_ti)² (Hutchinson 1989), so one backward pass gives all of them. In a
squared error the effect's square would count; the effect itself is less uneven. The weighing is our own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from esparse_trt.sparsity.blockwise import BlockwiseModel
from esparse_trt.sparsity.trace import traced, watched

_BATCHES = 2  # of the calibration text


def effects(model: BlockwiseModel, index: int, names: Sequence[str]) -> dict[str, Tensor]:
    """The effects of the outputs of layers of a resident block, which is still dense.

    Args:
        index: of the block; its inputs are `model.hidden`.
        names: of the layers; what is never called is left out.

    Returns:
        layer -> float32 [N], up to a factor that all share.
    """
    assert model.hidden is not None
    signs = torch.Generator(device=model.device).manual_seed(index)
    sums: dict[str, Tensor] = {}
    for hidden in model.hidden.split(model.batch_size)[:_BATCHES]:
        for name, squares in _squares(model, index, names, hidden, signs).items():
            sums[name] = sums[name] + squares if name in sums else squares
    return {name: squares.sqrt() for name, squares in sums.items()}


def _squares(
    model: BlockwiseModel, index: int, names: Sequence[str], hidden: Tensor, signs: torch.Generator
) -> dict[str, Tensor]:
    """Squared gradients of ⟨z, ŷ⟩ by the outputs, summed over the tokens of one batch."""

    def product(x: Tensor) -> Tensor:
        y = model.forward(index, x).float()
        size = torch.linalg.vector_norm(y.detach(), dim=-1, keepdim=True)
        z = torch.randint(2, y.shape, generator=signs, device=y.device) * 2 - 1
        return (y * z / size.clamp_min(torch.finfo(y.dtype).tiny)).sum() * math.sqrt(y.shape[-1])

    with watched(model, names) as seen:
        _, total = traced(model, hidden, product)
    gradients = torch.autograd.grad(total, [output for _, output in seen.values()]) if seen else ()
    return {
        name: gradient.flatten(0, -2).float().square().sum(0)
        for name, gradient in zip(seen, gradients, strict=True)
    }
