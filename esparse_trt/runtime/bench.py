"""Dense against sparse, end to end, on one GPU: the same model code, only the linear layers differ.

Both run in one process, in turns, so that clocks and temperature are the same for both. The dense model gets
the same merging of q/k/v and gate/up, cuBLAS, and the same captured graphs. Its weights are not masked: zeros
draw less power, which on a GPU at its power limit is speed.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from esparse_trt.engine.timing import Clock, CudaClock
from esparse_trt.evaluate.bench_record import Latency, LogitsCheck, Measured
from esparse_trt.runtime.compile import compile_layers
from esparse_trt.runtime.decode import Decoder
from esparse_trt.runtime.load import merge, pack_model
from esparse_trt.runtime.nvml import Meter
from esparse_trt.sparsity.models import family_of, linear
from esparse_trt.sparsity.pattern import Pattern, nm_mask

TURNS = 3
ENERGY_SECONDS = 1.0  # NVML's counter moves ten times a second: shorter stretches say nothing
# Longer prompts are not captured: launch gaps vanish in them, and a graph keeps its activations.
CAPTURED_TOKENS = 16384

Models = Mapping[str, PreTrainedModel]


# --- models ----------------------------------------------------------------------------------------------


@torch.no_grad()
def random_model(config: LlamaConfig, dtype: torch.dtype, device: str = "cuda") -> PreTrainedModel:
    """A model of that shape, its layers but the head masked 2:4.

    Embeddings have variance 1, and what the layers add is scaled by (2 · layers)^-½, as in GPT-2. With the
    initialisation of LLaMA the first layers drown the embeddings, and roundings grow on their way: the fp16
    model is then 6e-3 from the same in fp32, and a check of logits sees nothing below that.
    """
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(default)
    model.get_input_embeddings().weight.normal_()
    ends = [path for site in family_of(config).sites if site.reads != "residual" for path in site.linears]
    for name, layer in _block_linears(model).items():
        layer.weight.mul_(nm_mask(layer.weight.abs(), Pattern(2, 4)))
        if name.endswith(tuple(ends)):
            layer.weight.mul_((2 * config.num_hidden_layers) ** -0.5)
    return model


@torch.no_grad()
def shuffle_channels(model: PreTrainedModel) -> dict[str, Tensor]:
    """Permute the input channels of a masked model's layers, in place, those of a site alike.

    Returns:
        layer -> int64 [K], the permutation under which its weight is 2:4, as a build has it.
    """
    family, orders = family_of(model.config), {}
    blocks: Any = model.get_submodule(family.blocks)
    for index, block in enumerate(blocks):
        for site in family.sites:
            order = torch.randperm(linear(block, site.linears[0]).in_features)
            for path in site.linears:
                weight = linear(block, path).weight
                weight[:, order.to(weight.device)] = weight.clone()
                orders[f"{family.blocks}.{index}.{path}"] = order
    return orders


def packed_twin(model: PreTrainedModel, orders: dict[str, Tensor]) -> PreTrainedModel:
    """A copy of a masked model with packed layers.

    Args:
        model: 2:4, layers in `orders` under their permutation.
        orders: as `shuffle_channels` returns them.
    """
    twin = copy.deepcopy(model)
    pack_model(twin, orders, set(_block_linears(twin)), twin.device)
    compile_layers(twin)
    return twin


def make_peer(model: PreTrainedModel) -> PreTrainedModel:
    """Give a dense model, in place, whatever else the packed one has."""
    merge(model)
    compile_layers(model)
    return model


@torch.no_grad()
def unmask(model: PreTrainedModel) -> None:
    """Give a random model, in place, random weights where it has zeros."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(std=module.weight.std().item())


def _block_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    family = family_of(model.config)
    blocks: Any = model.get_submodule(family.blocks)
    return {
        f"{family.blocks}.{index}.{path}": linear(block, path)
        for index, block in enumerate(blocks)
        for site in family.sites
        for path in site.linears
    }


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the storages of all parameters and buffers, each counted once."""
    storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


# --- the same answers ------------------------------------------------------------------------------------


def check_logits(dense: PreTrainedModel, sparse: PreTrainedModel, steps: int = 256) -> LogitsCheck:
    """Distance of the logits over teacher-forced decode steps of one sequence of random tokens.

    Args:
        dense: the masked dense model.
        sparse: its packed twin.
        steps: how many.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, dense.config.vocab_size, (1, steps + 1), generator=generator).to(dense.device)
    a, b = (teacher_forced(model, ids) for model in (dense, sparse))
    exact = _in_fp32(dense, ids)
    return LogitsCheck(
        steps=steps,
        error=_distance(b, a),
        worst=((b - a).norm(dim=1) / a.norm(dim=1)).max().item(),
        dense_rounding=None if exact is None else _distance(a, exact),
        sparse_rounding=None if exact is None else _distance(b, exact),
    )


@torch.no_grad()
def teacher_forced(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [T − 1, vocabulary] in fp32 on the CPU, one decode step for each of ids[:, 1:], [1, T]."""
    decoder = Decoder(model, 1, ids.shape[1])
    decoder.prefill(ids[:, :1])
    found = torch.empty(ids.shape[1] - 1, model.config.vocab_size)
    for step, token in enumerate(ids[0, 1:]):
        decoder.tokens.copy_(token)
        decoder.step()
        assert decoder.logits is not None
        found[step] = decoder.logits[0]
    return found


@torch.no_grad()
def _in_fp32(model: PreTrainedModel, ids: Tensor) -> Tensor | None:
    """The same logits in fp32, from one plain forward; None where a copy of the model does not fit."""
    try:
        return copy.deepcopy(model).float()(ids).logits[0, 1:].cpu()
    except torch.OutOfMemoryError:
        return None
    finally:
        release()


def _distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# --- one cell --------------------------------------------------------------------------------------------


@dataclass
class _Running:
    """One model while a cell is measured."""

    decoder: Decoder
    peak_bytes: int
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    steps: int = 0
    joules: float = 0.0
    sm_mhz: int | None = None

    def result(self, batch: int) -> Measured:
        enough = sum(self.decode) >= 1e3 * ENERGY_SECONDS
        return Measured(
            prefill=Latency.of(self.prefill),
            decode=Latency.of(self.decode),
            peak_bytes=self.peak_bytes,
            joules_per_token=self.joules / (batch * self.steps) if self.joules and enough else None,
            sm_mhz=self.sm_mhz,
        )


def measure(
    models: Models,
    batch: int,
    prompt: int,
    generated: int,
    *,
    meter: Meter | None = None,
    clock: Clock | None = None,
) -> dict[str, Measured]:
    """Time to first token and inter-token latency of every model, in turns.

    Args:
        models: by name, of the same vocabulary.
        batch: sequences.
        prompt: tokens of each, random.
        generated: decode steps that are timed after each prefill.
        meter: for energy and clocks.
        clock: for tests.

    Raises:
        torch.OutOfMemoryError: their caches and activations do not fit together.
    """
    first = next(iter(models.values()))
    generator = torch.Generator().manual_seed(batch * 100003 + prompt)
    ids = torch.randint(0, first.config.vocab_size, (batch, prompt), generator=generator).to(first.device)
    clock = clock or CudaClock()
    running = {name: _start(model, ids, generated) for name, model in models.items()}
    for _ in range(TURNS):
        for one in running.values():
            _turn(one, ids, generated, clock, meter)
    return {name: one.result(batch) for name, one in running.items()}


def release() -> None:
    """Give back what earlier cells held: their decoders, graphs and caches."""
    gc.collect()
    torch.cuda.empty_cache()


def _start(model: PreTrainedModel, ids: Tensor, generated: int) -> _Running:
    """Capture what will be replayed, and see what it takes in memory."""
    batch, prompt = ids.shape
    on_gpu = ids.device.type == "cuda"
    before = torch.cuda.memory_allocated()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    decoder = Decoder(model, batch, prompt + generated + 1)
    if on_gpu and ids.numel() <= CAPTURED_TOKENS:
        decoder.capture_prefill(ids)
    decoder.prefill(ids)
    decoder.step()  # captures itself
    grown = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    return _Running(decoder, weight_bytes(model) + grown)


def _turn(one: _Running, ids: Tensor, generated: int, clock: Clock, meter: Meter | None) -> None:
    """A prefill, and `generated` times from one token to the next."""
    start = clock.mark()
    one.decoder.prefill(ids)
    one.prefill.append(clock.elapsed_us(start, clock.mark()) / 1e3)
    before = meter.joules() if meter else 0.0
    marks = []
    for _ in range(generated + 1):  # the first only fills the queue: the device had to wait for the host
        one.decoder.step()
        marks.append(clock.mark())
    if meter:
        one.sm_mhz = meter.sm_mhz()  # while the device still works off its queue
    one.decode += [clock.elapsed_us(a, b) / 1e3 for a, b in pairwise(marks)]
    one.steps += len(marks)
    if meter:
        one.joules += meter.joules() - before
