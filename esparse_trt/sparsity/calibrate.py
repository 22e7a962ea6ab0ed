"""Streaming statistics of the tensors that linear layers read: memory O(K·bins) per site, never O(T·K).

Only methods that need the Hessian Xᵀ X take O(K²), in float32. Tokens may be weighted in it and in the norms
(see `tokens`).

The norm takes one pass over the calibration inputs. The information measures take two: the histogram of a
channel lies between its own minimum and maximum, which the first pass finds. Counts are integers and squares
are summed in float64, so the result does not depend on how the inputs were cut into batches, nor on the order
of a GPU's atomic additions.

With p_b the histogram of a channel over bins of width w, h = −Σ_b p_b ln (p_b / w) and σ² its variance:

    entropy       H = −Σ_b p_b ln p_b
    differential  exp(h) / √(2πe), which is σ for a Gaussian: the root of Shannon's entropy power. h itself
                  may be negative, and a score may not.
    kl            ½ ln (2πe σ²) − h, the KL divergence from a Gaussian of the same variance
    mutual        H(x) + H(y) − H(x, y) with y the norm of the output, over 16 bins, of the site's first layer

A constant channel has none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor, nn

from esparse_trt.errors import EsparseError
from esparse_trt.sparsity.score import ChannelStatistics

_CHUNK_ELEMENTS = 1 << 22  # inputs binned in one go; their bin numbers are 64 bit
_OUTPUT_BINS = 16


class ChannelRange:
    """Minimum and maximum of each channel, and of the output's norm."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.low = torch.full((channels,), torch.inf, device=device)
        self.high = torch.full((channels,), -torch.inf, device=device)
        self.norm = (torch.tensor(torch.inf, device=device), torch.tensor(-torch.inf, device=device))
        self.tokens = 0

    def update(self, x: Tensor, y: Tensor) -> None:
        """Take in x [T, K] and what the layer made of it, y [T, N]."""
        self.tokens += len(x)
        self.low = torch.minimum(self.low, x.amin(0).float())
        self.high = torch.maximum(self.high, x.amax(0).float())
        norm = torch.linalg.vector_norm(y, dim=1, dtype=torch.float32)
        self.norm = (torch.minimum(self.norm[0], norm.amin()), torch.maximum(self.norm[1], norm.amax()))

    def is_finite(self) -> bool:
        """Whether no NaN or Inf was seen: both reductions pass them on."""
        return bool((self.low.isfinite() & self.high.isfinite()).all())


class ChannelMoments:
    """Sums of squares of each channel, its histogram where the ranges are given, and Xᵀ X where wanted."""

    def __init__(
        self,
        channels: int,
        device: torch.device,
        bins: int,
        range_: ChannelRange | None,
        measure: str,
        hessian: bool,
        weights: Tensor | None = None,
    ) -> None:
        self.squares = torch.zeros(channels, dtype=torch.float64, device=device)
        self.weighted = self.squares if weights is None else torch.zeros_like(self.squares)
        self.sums = torch.zeros(channels, dtype=torch.float64, device=device)
        self.tokens = 0
        self.bins = bins
        self.outputs = _OUTPUT_BINS if measure == "mutual" else 1
        self.range = range_
        self.measure = measure
        self.hessian = torch.zeros(channels, channels, device=device) if hessian else None
        self.weights = weights
        if range_ is not None:
            self.counts = torch.zeros(channels * bins * self.outputs, dtype=torch.int64, device=device)
            self.offset = torch.arange(channels, device=device) * bins

    def update(self, x: Tensor, y: Tensor) -> None:
        """Take in x [T, K] and what the layer made of it, y [T, N]."""
        rows = max(1, _CHUNK_ELEMENTS // x.shape[1])
        for chunk, output in zip(x.split(rows), y.split(rows), strict=True):
            chunk = weighted = chunk.float()
            if self.weights is not None:
                weighted = chunk * self.weights[self.tokens : self.tokens + len(chunk)].unsqueeze(1)
                self.weighted += (weighted * chunk).sum(0, dtype=torch.float64)
            self.squares += (chunk * chunk).sum(0, dtype=torch.float64)
            if self.hessian is not None:
                self.hessian.addmm_(weighted.T, chunk)
            self.tokens += len(chunk)
            if self.range is not None:
                self.sums += chunk.sum(0, dtype=torch.float64)
                index = _bin(chunk, self.range.low, self.range.high, self.bins) + self.offset
                if self.outputs > 1:
                    norm = torch.linalg.vector_norm(output, dim=1, keepdim=True, dtype=torch.float32)
                    index = index * self.outputs + _bin(norm, *self.range.norm, self.outputs)
                self.counts += torch.bincount(index.flatten(), minlength=len(self.counts))

    def is_finite(self) -> bool:
        """Whether no NaN or Inf was seen."""
        return bool(self.squares.isfinite().all())

    def statistics(self) -> ChannelStatistics:
        """Norm and, where they were taken, information and Hessian."""
        information = None if self.range is None else self._information(self.range)
        return ChannelStatistics(self.weighted.sqrt(), information, self.tokens, self.hessian)

    def _information(self, range_: ChannelRange) -> Tensor:
        """The measure of the module docstring: float64 [K]."""
        joint = self.counts.view(-1, self.bins, self.outputs).double() / self.tokens
        entropy = torch.special.entr(joint.sum(2)).sum(1)  # −p ln p, 0 at p = 0
        if self.measure == "entropy":
            return entropy
        if self.measure == "mutual":
            return entropy + torch.special.entr(joint.sum(1)).sum(1) - torch.special.entr(joint).sum((1, 2))
        differential = entropy + ((range_.high - range_.low).double() / self.bins).log()
        if self.measure == "differential":
            return differential.exp() / math.sqrt(2 * math.pi * math.e)
        variance = self.squares / self.tokens - (self.sums / self.tokens).square()
        divergence = (2 * math.pi * math.e * variance).log() / 2 - differential
        return torch.where(range_.high > range_.low, divergence.clamp_min(0), 0)


def _bin(x: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """Which of `bins` equal bins between low and high; the first where those are equal."""
    width = torch.where(high > low, high - low, 1)
    return ((x - low) / width * bins).long().clamp_(0, bins - 1)


Accumulators = dict[str, ChannelRange] | dict[str, ChannelMoments]


def collect(
    readers: dict[str, nn.Linear],
    run: Callable[[], Iterable[int]],
    *,
    bins: int | None,
    measure: str = "entropy",
    hessian: bool = False,
    weights: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, ChannelStatistics]:
    """Statistics of the inputs of several layers, in one pass over the calibration batches or two.

    Args:
        readers: site -> a linear layer that reads the site's tensor.
        run: runs all calibration batches through the layers; yields the number of each finished batch.
        bins: bins of the histograms, None if no information measure is needed.
        measure: which of the module docstring.
        hessian: whether Xᵀ X is needed.
        weights: site -> c [T], how much each token counts in norms and in Xᵀ X, which becomes Xᵀ diag(c) X;
            those absent count 1.

    Raises:
        EsparseError: NaN or Inf in the inputs, naming site and batch; or a site was never reached.
    """
    ranges: dict[str, ChannelRange | None] = dict.fromkeys(readers)
    if bins is not None:
        found = {
            name: ChannelRange(layer.in_features, layer.weight.device) for name, layer in readers.items()
        }
        _stream(readers, found, run)
        ranges.update(found)
    moments = {
        name: ChannelMoments(
            layer.in_features,
            layer.weight.device,
            bins or 0,
            ranges[name],
            measure,
            hessian,
            weights.get(name),
        )
        for name, layer in readers.items()
    }
    _stream(readers, moments, run)
    return {name: moment.statistics() for name, moment in moments.items()}


def _stream(
    readers: dict[str, nn.Linear],
    accumulators: Accumulators,
    run: Callable[[], Iterable[int]],
) -> None:
    """Run all batches and feed each layer's inputs to its accumulator."""
    with _hooks(readers, accumulators):
        for batch in run():
            for name, accumulator in accumulators.items():
                if not accumulator.tokens:
                    raise EsparseError(
                        "the layer is never called, so there is nothing to measure its weights with",
                        where=name,
                        fix="turn off options of the model's config.json that bypass its linear layers "
                        "(slow_but_exact in BLOOM), or add the layer to prune.layers.exclude",
                    )
                if not accumulator.is_finite():
                    raise EsparseError(
                        f"NaN or Inf in the activations that the layer reads, in calibration batch {batch}",
                        where=name,
                        fix="see whether the dense model overflows in float16 (try a float32 or bfloat16 "
                        "checkpoint, or prune.device: cpu), and whether the checkpoint is sound",
                    )


@contextmanager
def _hooks(readers: dict[str, nn.Linear], accumulators: Accumulators) -> Iterator[None]:
    def feed(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, inputs, output: accumulators[name].update(
            inputs[0].detach().flatten(0, -2), output.detach().flatten(0, -2)
        )

    handles = [layer.register_forward_hook(feed(name)) for name, layer in readers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
