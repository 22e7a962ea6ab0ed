"""Greedy generation with a static KV cache, its decode step captured once as a CUDA graph.

A captured step runs without Python and without launch gaps, which is how an inference server runs it: what is
left is the time of the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

_WARM_UP = 3  # eager steps before the capture: lazy initialisation must not be captured


class Decoder:
    """One sequence batch in flight: `prefill` reads the prompts, then every `step` gives the next tokens.

    Args:
        model: a causal language model in evaluation mode.
        batch: number of sequences.
        max_length: longest sequence, prompt included, that the cache holds.

    Attributes:
        tokens: int64 [batch, 1], the last tokens; `step` reads and overwrites them.
        logits: [batch, vocabulary], of the last position.
    """

    def __init__(self, model: PreTrainedModel, batch: int, max_length: int) -> None:
        self.model = model
        self.device = model.device
        self.cache = StaticCache(config=model.config, max_cache_len=max_length)
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        self.logits: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._length = 0
        self._max_length = max_length

    @torch.no_grad()
    def prefill(self, prompts: Tensor) -> Tensor:
        """Read prompts [batch, length] from an empty cache; returns the first new tokens [batch, 1]."""
        self.cache.reset()
        self._length = 0
        self._forward(prompts)
        return self.tokens

    @torch.no_grad()
    def step(self) -> Tensor:
        """One more token for each sequence, [batch, 1]: the same tensor at every call."""
        if self.device.type != "cuda":
            self._forward(self.tokens)
            return self.tokens
        if self._graph is None:
            self._capture()
        self._require_room(1)
        self._graph.replay()  # type: ignore[union-attr]
        self._length += 1
        return self.tokens

    def _forward(self, ids: Tensor) -> None:
        self._require_room(ids.shape[1])
        logits = self.model(ids, past_key_values=self.cache, logits_to_keep=1, use_cache=True).logits[:, -1]
        if self.logits is None:
            self.logits = logits.clone()
        self.logits.copy_(logits)
        self.tokens.copy_(logits.argmax(-1, keepdim=True))
        self._length += ids.shape[1]

    def _require_room(self, new: int) -> None:
        if self._length + new > self._max_length:
            raise ValueError(f"the cache holds {self._max_length} tokens, {self._length + new} are needed")

    def _capture(self) -> None:
        """Capture a step. Warming up and capturing leave cache and tokens as they were."""
        with self._unchanged():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    self._rewind()
                    self._forward(self.tokens)
                self._rewind()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._forward(self.tokens)

    def _rewind(self) -> None:
        """Let the next step write the slot that the last one wrote: a warm-up needs no room of its own."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self._start)  # type: ignore[union-attr]
        self._length = self._start

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        self._start = self._length
        tokens, logits = self.tokens.clone(), None if self.logits is None else self.logits.clone()
        yield
        self._rewind()
        self.tokens.copy_(tokens)
        if logits is not None and self.logits is not None:
            self.logits.copy_(logits)


@torch.no_grad()
def generate(model: PreTrainedModel, prompts: Tensor, new_tokens: int) -> Tensor:
    """Greedy continuation of prompts of equal length, without an end-of-text check.

    Args:
        prompts: int64 [batch, length].
        new_tokens: how many to add.

    Returns:
        int64 [batch, new_tokens].
    """
    decoder = Decoder(model, prompts.shape[0], prompts.shape[1] + new_tokens)
    found = [decoder.prefill(prompts.to(model.device)).clone()]
    found += [decoder.step().clone() for _ in range(new_tokens - 1)]
    return torch.cat(found, dim=1)
