"""Linear layers that hold only packed weights, and the merging of layers that read the same tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from esparse_trt.errors import EsparseError
from esparse_trt.runtime.ops import permute, sparse_gemm
from esparse_trt.runtime.packing import pack, why_not


class SparseLinear(nn.Module):
    """y = x Wᵀ + b with W [N, K] in 2:4 form, stored in `es24-v1` and nowhere else.

    With an activation W holds gate and up, as `packing.interleave` lays their rows, and y = act(gate) · up.

    Attributes:
        in_features: K.
        out_features: N, of which y has half with an activation.
        values: [N, K/2], fp16 or bf16.
        metadata: int32, of the shape that `es24.metadata_shape` gives.
        bias: [N] or None.
        permutation: int32 [K] or None: channel j of W reads x[..., permutation[j]].
        places: its inverse.
        activation: "swiglu", "geglu" or None.
    """

    values: Tensor
    metadata: Tensor
    bias: Tensor | None
    permutation: Tensor | None
    places: Tensor | None

    def __init__(
        self,
        values: Tensor,
        metadata: Tensor,
        bias: Tensor | None,
        permutation: Tensor | None,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.in_features, self.out_features = 2 * values.shape[1], values.shape[0]
        self.register_buffer("values", values)
        self.register_buffer("metadata", metadata)
        self.register_buffer("bias", bias)
        self.register_buffer("permutation", permutation)
        self.register_buffer("places", None if permutation is None else permutation.argsort().int())

    @classmethod
    def pack(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        permutation: Tensor | None = None,
        activation: str | None = None,
        *,
        name: str = "weight",
    ) -> SparseLinear:
        """Pack a weight [N, K] that is 2:4 along K as it stands: in permuted order, if there is one.

        Raises:
            EsparseError: it is not 2:4, or its type or shape has no packed form.
        """
        weight = weight.detach().contiguous()
        if reason := why_not(weight):
            raise EsparseError(reason, where=name, fix="leave this layer dense")
        return cls(
            *pack(weight, name),
            None if bias is None else bias.detach().clone(),
            None if permutation is None else permutation.to(weight.device, torch.int32),
            activation,
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of values and metadata."""
        return self.values.nbytes + self.metadata.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N], with an activation [..., N/2]."""
        order = self.permutation
        if order is not None and self.places is not None and torch.compiler.is_compiling():
            x, order = permute(x, order, self.places), None
        return sparse_gemm(x, self.values, self.metadata, self.bias, order, self.activation)

    def extra_repr(self) -> str:
        """As of nn.Linear."""
        permuted = ", permuted" if self.permutation is not None else ""
        activation = f", {self.activation}" if self.activation else ""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}{permuted}{activation}"


class GatedMlp(nn.Module):
    """down(act(gate) · up), gate and up one GEMM that applies the activation to its sums.

    Attributes:
        gate_proj: that GEMM, under the name of its first layer.
        down_proj: any linear layer.
    """

    def __init__(self, gate_up: SparseLinear, down: nn.Module) -> None:
        super().__init__()
        self.gate_proj = gate_up
        self.down_proj = down

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., K]."""
        return self.down_proj(self.gate_proj(x))


class Merged(nn.Module):
    """One GEMM for layers that read the same tensor (q/k/v, gate and up), behind a module for each of them.

    The first member that is called with a tensor runs the GEMM; the others take their share of its result. A
    member that is called again runs it again, so that nothing depends on which of them the model calls first.
    """

    def __init__(self, gemm: nn.Module, sizes: Sequence[int]) -> None:
        super().__init__()
        self.gemm = gemm
        self.sizes = list(sizes)
        self._input: Tensor | None = None
        self._ready: dict[int, Tensor] = {}

    def members(self) -> list[Member]:
        """One module for each of the layers; the first owns the GEMM's parameters."""
        return [Member(self, index) for index in range(len(self.sizes))]

    def take(self, index: int, x: Tensor) -> Tensor:
        """Output [..., N_index] of one layer."""
        if x is not self._input or index not in self._ready:
            self._input = x
            self._ready = dict(enumerate(self.gemm(x).split(self.sizes, dim=-1)))
        output = self._ready.pop(index)
        if not self._ready:
            self._input = None  # the activations are not kept alive
        return output


class Member(nn.Module):
    """One of the layers of a `Merged` GEMM."""

    def __init__(self, merged: Merged, index: int) -> None:
        super().__init__()
        if index == 0:
            self.merged = merged
        else:
            object.__setattr__(self, "merged", merged)  # a reference, not a second registration
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N_index]."""
        return self.merged.take(self.index, x)

    def extra_repr(self) -> str:
        """Which share of the merged GEMM this is."""
        return f"{self.index} of {len(self.merged.sizes)}"
