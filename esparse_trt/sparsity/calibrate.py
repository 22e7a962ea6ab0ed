"""Streaming statistics of the tensors that linear layers read: memory O(K·bins) per site, never O(T·K).

The norm takes one pass over the calibration inputs. The entropy takes two: the histogram of a channel lies
between its own minimum and maximum, which the first pass finds. Counts are integers and squares are summed in
float64, so the result does not depend on how the inputs were cut into batches, nor on the order of a GPU's
atomic additions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from esparse_trt.errors import EsparseError
from esparse_trt.sparsity.score import ChannelStatistics

_CHUNK_ELEMENTS = 1 << 22  # inputs binned in one go; their bin numbers are 64 bit


class ChannelRange:
    """Minimum and maximum of each channel."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self.low = torch.full((channels,), torch.inf, device=device)
        self.high = torch.full((channels,), -torch.inf, device=device)
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Take in x [T, K]."""
        self.tokens += len(x)
        self.low = torch.minimum(self.low, x.amin(0).float())
        self.high = torch.maximum(self.high, x.amax(0).float())

    def is_finite(self) -> bool:
        """Whether no NaN or Inf was seen: both reductions pass them on."""
        return bool((self.low.isfinite() & self.high.isfinite()).all())


class ChannelMoments:
    """Sum of squares of each channel, and its histogram where the ranges are given."""

    def __init__(self, channels: int, device: torch.device, bins: int, range_: ChannelRange | None) -> None:
        self.squares = torch.zeros(channels, dtype=torch.float64, device=device)
        self.tokens = 0
        self.bins = bins
        self.range = range_
        if range_ is not None:
            self.counts = torch.zeros(channels * bins, dtype=torch.int64, device=device)
            width = range_.high - range_.low
            # A constant channel falls into bin 0 as a whole: entropy 0.
            self.width = torch.where(width > 0, width, torch.ones_like(width))
            self.offset = torch.arange(channels, device=device) * bins

    def update(self, x: Tensor) -> None:
        """Take in x [T, K]."""
        self.tokens += len(x)
        for chunk in x.split(max(1, _CHUNK_ELEMENTS // x.shape[1])):
            chunk = chunk.float()
            self.squares += (chunk * chunk).sum(0, dtype=torch.float64)
            if self.range is not None:
                share = (chunk - self.range.low) / self.width
                index = (share * self.bins).long().clamp_(0, self.bins - 1) + self.offset
                self.counts += torch.bincount(index.flatten(), minlength=len(self.counts))

    def is_finite(self) -> bool:
        """Whether no NaN or Inf was seen."""
        return bool(self.squares.isfinite().all())

    def statistics(self) -> ChannelStatistics:
        """Norm and, where histograms were taken, entropy in nats."""
        entropy = None
        if self.range is not None:
            p = self.counts.view(-1, self.bins).double() / self.tokens
            entropy = torch.special.entr(p).sum(1)  # −p ln p, 0 at p = 0
        return ChannelStatistics(self.squares.sqrt(), entropy, self.tokens)


def collect(
    readers: dict[str, nn.Linear], run: Callable[[], Iterable[int]], *, bins: int | None
) -> dict[str, ChannelStatistics]:
    """Statistics of the inputs of several layers, in one pass over the calibration batches or two.

    Args:
        readers: site -> a linear layer that reads the site's tensor.
        run: runs all calibration batches through the layers; yields the number of each finished batch.
        bins: bins of the histograms, None if the entropy is not needed.

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
        name: ChannelMoments(layer.in_features, layer.weight.device, bins or 0, ranges[name])
        for name, layer in readers.items()
    }
    _stream(readers, moments, run)
    return {name: moment.statistics() for name, moment in moments.items()}


def _stream(
    readers: dict[str, nn.Linear],
    accumulators: dict[str, ChannelRange] | dict[str, ChannelMoments],
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
def _hooks(
    readers: dict[str, nn.Linear], accumulators: dict[str, ChannelRange] | dict[str, ChannelMoments]
) -> Iterator[None]:
    def feed(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: accumulators[name].update(inputs[0].detach().flatten(0, -2))

    handles = [layer.register_forward_pre_hook(feed(name)) for name, layer in readers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
