"""Greedy generation with a static KV cache, its decode step (and prefill, if asked) captured as CUDA graphs.

A captured step runs without Python and without launch gaps, which is how an inference server runs it: what is
left is the time of the kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from esparse_trt.runtime.attention import NAME, SlotCache

_WARM_UP = 2  # eager runs before a capture: lazy initialisation must not be captured


class Decoder:
    """One sequence batch in flight: `prefill` reads the prompts, then every `step` gives the next tokens.

    Args:
        model: a causal language model in evaluation mode.
        batch: number of sequences.
        max_length: longest sequence, prompt included, that the cache holds.

    Raises:
        EsparseError: a layer has sliding-window attention.

    Attributes:
        tokens: int64 [batch, 1], the last tokens; `step` reads and overwrites them.
        logits: [batch, vocabulary], of the last position.
    """

    def __init__(self, model: PreTrainedModel, batch: int, max_length: int) -> None:
        self.model = model
        self.device = model.device
        self._position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._replaced = model._supports_attention_backend  # not BLOOM's attention
        self.cache = SlotCache(
            model.config, batch, max_length, self._position, model.dtype, deferred=self._replaced
        )
        if self._replaced:
            model.set_attn_implementation(NAME)
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        self.logits: Tensor | None = None
        self._max_length = max_length
        self._length = 0
        self._step: torch.cuda.CUDAGraph | None = None
        self._prefills: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @torch.no_grad()
    def prefill(self, prompts: Tensor) -> Tensor:
        """Read prompts [batch, length] from an empty cache; returns the first new tokens [batch, 1]."""
        self._rewind(0)
        if prompts.shape[1] in self._prefills:
            graph, ids = self._prefills[prompts.shape[1]]
            ids.copy_(prompts)
            graph.replay()
            self._length = prompts.shape[1]
        else:
            self._forward(prompts)
        return self.tokens

    @torch.no_grad()
    def capture_prefill(self, prompts: Tensor) -> None:
        """Let `prefill` replay a CUDA graph for prompts of this shape; it holds its activations."""
        ids = prompts.clone()
        self._prefills[ids.shape[1]] = self._capture(lambda: self._forward(ids), start=0), ids

    @torch.no_grad()
    def step(self) -> Tensor:
        """One more token for each sequence, [batch, 1]: the same tensor at every call."""
        if self.device.type != "cuda":
            self._forward(self.tokens)
            return self.tokens
        self._require_room(1)
        if self._step is None:
            tokens = self.tokens.clone()
            self._step = self._capture(lambda: self._forward(self.tokens), start=self._length)
            self.tokens.copy_(tokens)
        self._step.replay()
        self._length += 1
        return self.tokens

    def _forward(self, ids: Tensor) -> None:
        self._require_room(ids.shape[1])
        new = ids.shape[1]
        options: dict[str, Tensor] = {}
        if self._replaced:
            options["attention_mask"] = self._position.view(1, 1, 1, 1)  # how `attend` knows the length
            options["position_ids"] = self._position + torch.arange(new, device=self.device)[None]
        output = self.model(ids, past_key_values=self.cache, logits_to_keep=1, use_cache=True, **options)
        logits = output.logits[:, -1]
        if self.logits is None:
            self.logits = logits.clone()
        self.logits.copy_(logits)
        self.tokens.copy_(logits.argmax(-1, keepdim=True))
        self._position += new
        self._length += new

    def _require_room(self, new: int) -> None:
        if self._length + new > self._max_length:
            raise ValueError(f"the cache holds {self._max_length} tokens, {self._length + new} are needed")

    def _capture(self, forward: Callable[[], None], start: int) -> torch.cuda.CUDAGraph:
        """A graph of `forward`, which the cache's length is set back to `start` for, before and after."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._rewind(start)
                forward()
            self._rewind(start)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            forward()
        self._rewind(start)
        return graph

    def _rewind(self, length: int) -> None:
        """Forget what the cache holds behind `length` tokens: it is not read, and overwritten."""
        self._position.fill_(length)
        self._length = length


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
