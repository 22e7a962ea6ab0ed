"""Dense against sparse, end to end, on one GPU: the same model code, only the linear layers differ.

Both run in one process, in turns, so that clocks and temperature are the same for both. The dense model gets
the same merging of q/k/v and gate/up, cuBLAS, and the same captured decode step.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from esparse_trt.errors import EsparseError
from esparse_trt.graph import es24
from esparse_trt.progress import note
from esparse_trt.runtime.decode import Decoder
from esparse_trt.runtime.linear import SparseLinear
from esparse_trt.runtime.load import fuse_norms, merge, pack_model
from esparse_trt.sparsity.models import family_of, linear
from esparse_trt.sparsity.pattern import Pattern, nm_mask

_ROUNDS = 5  # turns of dense and sparse; medians are over all of them


@dataclass(frozen=True)
class Latency:
    """Milliseconds, over all steps or prefills."""

    median: float
    p10: float
    p90: float
    p99: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Latency:
        """Of a list of measurements."""
        cuts = statistics.quantiles(milliseconds, n=100, method="inclusive")
        return cls(statistics.median(milliseconds), cuts[9], cuts[89], cuts[98])


@dataclass(frozen=True)
class Cell:
    """One combination of batch and prompt length.

    Attributes:
        decode: of one token for every sequence, right after the prompt.
        prefill: of the prompt: the time to the first token.
    """

    batch: int
    prompt: int
    decode: dict[str, Latency]
    prefill: dict[str, Latency]

    @property
    def decode_speedup(self) -> float:
        """Dense over sparse."""
        return self.decode["dense"].median / self.decode["sparse"].median

    @property
    def prefill_speedup(self) -> float:
        """Dense over sparse."""
        return self.prefill["dense"].median / self.prefill["sparse"].median


@dataclass
class Benchmark:
    """What one run measured; `cells` fill up as it goes.

    Attributes:
        logits_error: worst ‖sparse − dense‖₂ / ‖dense‖₂ of the logits over teacher-forced steps.
        weight_bytes: of the whole model, dense and sparse.
        layer_bytes: of the layers that are packed, dense and sparse.
    """

    model: str
    device: dict[str, str]
    logits_error: float
    weight_bytes: dict[str, int]
    layer_bytes: dict[str, int]
    cells: list[Cell] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [
            {**asdict(c), "decode_speedup": c.decode_speedup, "prefill_speedup": c.prefill_speedup}
            for c in self.cells
        ]
        return {**asdict(self), "cells": rows}


# --- models ----------------------------------------------------------------------------------------------


@torch.no_grad()
def random_pair(config: LlamaConfig, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A dense model of the shape with random 2:4 weights on the GPU, and its packed twin."""
    with torch.device("cuda"):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            dense = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(default)
    family = family_of(config)
    blocks: Any = dense.get_submodule(family.blocks)
    for block in blocks:
        for site in family.sites:
            for path in site.linears:
                weight = linear(block, path).weight
                weight.mul_(nm_mask(weight.abs(), Pattern(2, 4)))
    sparse = copy.deepcopy(dense)
    linears = {name for name, module in sparse.named_modules() if isinstance(module, nn.Linear)}
    pack_model(sparse, {}, linears - {family.head}, "cuda")
    merge(dense)
    for model in (dense, sparse):
        fuse_norms(model)
    return dense, sparse


# --- measuring -------------------------------------------------------------------------------------------


def run(
    name: str,
    dense: PreTrainedModel,
    sparse: PreTrainedModel,
    *,
    batches: Iterable[int],
    prompts: Sequence[int],
    new_tokens: int,
) -> Benchmark:
    """Measure decode and prefill of both models over batches and prompt lengths.

    Args:
        new_tokens: decode steps per cell, over all turns.

    Raises:
        EsparseError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise EsparseError("this benchmark measures a GPU, and there is none", fix="run it on a GPU machine")
    models = {"dense": dense, "sparse": sparse}
    packed = [module for module in sparse.modules() if isinstance(module, SparseLinear)]
    found = Benchmark(
        model=name,
        device=_device(),
        logits_error=compare_logits(dense, sparse, steps=256),
        weight_bytes={key: _weight_bytes(model) for key, model in models.items()},
        layer_bytes={
            "dense": sum(2 * layer.in_features * layer.out_features for layer in packed),
            "sparse": sum(layer.weight_bytes for layer in packed),
        },
    )
    for batch in batches:
        for prompt in prompts:
            try:
                cell = _cell(models, batch, prompt, new_tokens)
            except torch.cuda.OutOfMemoryError:
                note(f"batch {batch}, prompt {prompt}: left out, the GPU's memory is full")
                torch.cuda.empty_cache()
                continue
            note(
                f"batch {batch}, prompt {prompt}: decode {cell.decode['sparse'].median:.2f} ms "
                f"({cell.decode_speedup:.2f}x), prefill {cell.prefill['sparse'].median:.1f} ms "
                f"({cell.prefill_speedup:.2f}x)"
            )
            found.cells.append(cell)
    return found


@torch.no_grad()
def compare_logits(dense: PreTrainedModel, sparse: PreTrainedModel, steps: int) -> float:
    """Worst relative L2 distance of the logits over `steps` teacher-forced decode steps of one sequence."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, dense.config.vocab_size, (1, steps + 1), generator=generator).to(dense.device)
    decoders = [Decoder(model, 1, steps + 1) for model in (dense, sparse)]
    for decoder in decoders:
        decoder.prefill(ids[:, :1])
    worst = 0.0
    for step in range(1, steps + 1):
        logits = []
        for decoder in decoders:
            decoder.tokens.copy_(ids[:, step : step + 1])
            decoder.step()
            assert decoder.logits is not None
            logits.append(decoder.logits.double())
        worst = max(worst, ((logits[1] - logits[0]).norm() / logits[0].norm()).item())
    return worst


def _cell(models: dict[str, PreTrainedModel], batch: int, prompt: int, new_tokens: int) -> Cell:
    generator = torch.Generator().manual_seed(batch * 100003 + prompt)
    vocabulary = next(iter(models.values())).config.vocab_size
    ids = torch.randint(0, vocabulary, (batch, prompt), generator=generator).cuda()
    steps = -(-new_tokens // _ROUNDS)
    decoders = {key: Decoder(model, batch, prompt + _ROUNDS * steps + 1) for key, model in models.items()}
    decode: dict[str, list[float]] = {key: [] for key in models}
    prefill: dict[str, list[float]] = {key: [] for key in models}
    for decoder in decoders.values():
        decoder.capture_prefill(ids)
        decoder.prefill(ids)
        decoder.step()  # captures itself
    for _ in range(_ROUNDS):
        for key, decoder in decoders.items():
            prefill[key] += _times(lambda decoder=decoder: decoder.prefill(ids), 2)
            decode[key] += _times(decoder.step, steps)
    return Cell(
        batch,
        prompt,
        {key: Latency.of(times) for key, times in decode.items()},
        {key: Latency.of(times) for key, times in prefill.items()},
    )


def _times(call: Any, repeats: int) -> list[float]:
    """Milliseconds of each of some calls, by events on the GPU's own clock."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def _weight_bytes(model: PreTrainedModel) -> int:
    tensors: dict[int, Tensor] = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    return sum(tensor.nbytes for tensor in tensors.values())


def _device() -> dict[str, str]:
    from esparse_trt.engine import kernels

    library = kernels.load()
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": f"{properties.total_memory / 2**30:.1f}",
        "sm_clock_mhz": str(torch.cuda.clock_rate()),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "kernels": f"{library.version} ({library.kernel_set})",
        "layout": es24.LAYOUT,
    }
