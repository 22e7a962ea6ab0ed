"""What pruning decided, on its way from the pruner to a model, a journal or a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from esparse_trt.records import ChannelProfile, LayerChoice, LayerRecord, RecoverRecord
from esparse_trt.sparsity.models import linear


@dataclass(frozen=True)
class Pruned:
    """What was decided: for one step (a block, or the head), or for a whole model.

    Attributes:
        masks: layer -> bool [N, K] in host memory, True where the weight is kept; original channel order.
        values: layer -> weight[mask] in the checkpoint's dtype, of layers whose kept weights were re-fitted.
        permutations: layer -> int64 [K] in host memory; layers that are not permuted are absent.
        layers: a record for every linear layer, dense ones too.
        choice: of layers, if there is a budget.
        recovered: what training the kept weights gave.
        channels: profiles for the report, of the first, middle and last block and of the head.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    permutations: dict[str, Tensor] = field(default_factory=dict)
    layers: list[LayerRecord] = field(default_factory=list)
    channels: list[ChannelProfile] = field(default_factory=list)
    choice: LayerChoice | None = None
    recovered: list[RecoverRecord] = field(default_factory=list)

    def add(self, other: Pruned) -> None:
        """Take in what another step decided."""
        self.masks.update(other.masks)
        self.values.update(other.values)
        self.permutations.update(other.permutations)
        self.layers.extend(other.layers)
        self.channels.extend(other.channels)
        self.recovered.extend(other.recovered)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Turn the dense model into the pruned one, in place."""
        for name, mask in self.masks.items():
            weight = linear(model, name).weight
            mask = mask.to(weight.device)
            weight.mul_(mask)
            if name in self.values:
                weight.masked_scatter_(mask, self.values[name].to(weight))
