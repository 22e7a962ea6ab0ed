"""A causal language model of which one decoder block at a time is in memory.

The module tree is made on the meta device. A block's tensors are read from the memory-mapped safetensors
when the block is entered and dropped when it is left. What the blocks are called with (hidden states, masks,
rotary embeddings, ALiBi) is whatever the model itself passes: its forward runs once over the calibration text
with blocks that do nothing but write down their arguments.

Memory: one block in the compute dtype, and the hidden states of the whole calibration text, samples · length
· hidden, in host memory; where weights are fitted to the dense model, its own too, and a copy of the block's
weights on the device. The compute dtype is float32 on a CPU and the checkpoint's own dtype on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from esparse_trt.checkpoint import weight_files
from esparse_trt.errors import EsparseError
from esparse_trt.model import load_config
from esparse_trt.sparsity.models import Family, family_of, linear, stored_name


@dataclass(frozen=True)
class Call:
    """Arguments of one block's forward besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Enough(Exception):
    """Ends a forward of which the rest is not needed."""


class BlockwiseModel:
    """A model from a local Hugging Face folder, block by block.

    Attributes:
        config: the model's configuration.
        family: its row in the family table.
        model: its modules, with parameters on the meta device outside of `resident`.
        parameters: number of parameters, tied ones counted once.
        blocks: number of decoder blocks.
        dtype: what is computed in.
        stored_dtype: dtype of the checkpoint's linear layers.
        hidden: [samples, length, hidden], the inputs of the next block, in host memory; None before `embed`.
        batch_size: sequences that pass through a block at a time.
        dense: what the next block reads in the dense model, of the same shape; None if nobody follows it.
    """

    def __init__(self, path: Path, device: torch.device, *, trust_remote_code: bool = False) -> None:
        self.path = path
        self.trust_remote_code = trust_remote_code
        self.device = device
        self.config = load_config(path, trust_remote_code=trust_remote_code)
        self.family: Family = family_of(self.config)
        self._files = _tensor_files(path)
        self.stored_dtype = self._linear_dtype()
        self.dtype = torch.float32 if device.type == "cpu" else self.stored_dtype
        loader: Any = AutoModelForCausalLM
        with init_empty_weights(include_buffers=False):
            self.model = loader.from_config(
                self.config, dtype=self.dtype, trust_remote_code=trust_remote_code
            ).eval()
        self.model.tie_weights()
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self._blocks = self.model.get_submodule(self.family.blocks)
        self.blocks = len(self._blocks)
        self.hidden: Tensor | None = None
        self.dense: Tensor | None = None
        self.batch_size = 1
        self._calls: dict[int, list[Call]] = {}  # batch size -> arguments of each block

    def block_name(self, index: int) -> str:
        """Module name of a block."""
        return f"{self.family.blocks}.{index}"

    def stored(self, parameter: str) -> Tensor:
        """A parameter as the checkpoint has it, memory-mapped; `parameter` is its name in the model."""
        name = self.stored_name(parameter)
        with safe_open(self._files[name], framework="pt") as tensors:
            return tensors.get_tensor(name)

    def stored_name(self, parameter: str) -> str:
        """Name of a parameter in the checkpoint; of the tensor it is tied to, where only that is stored."""
        if parameter not in self._files:
            parameter = (self.model._tied_weights_keys or {}).get(parameter, parameter)
        return stored_name(parameter, self._files, self.model.base_model_prefix)

    def embed(self, windows: Tensor, batch_size: int, *, follow_dense: bool = False) -> None:
        """Set `hidden` (and `dense`) to what the first block reads; learn what every block is called with."""
        outside = [name for name, _ in self.model.base_model.named_children()]
        prefix = self.model.base_model_prefix
        self.batch_size = batch_size
        batches = []
        with self._loaded(*(f"{prefix}.{name}" for name in outside), except_blocks=True):
            for ids in windows.split(batch_size):
                first, calls = self._record_calls(ids.to(self.device))
                self._calls.setdefault(len(ids), calls)
                batches.append(first.cpu())
        self.hidden = self._host(torch.cat(batches))
        self.dense = self._host(self.hidden.clone()) if follow_dense else None

    @property
    def streams(self) -> dict[str, Tensor]:
        """Hidden states to go on from: `hidden`, and `dense` if it is followed; empty before `embed`."""
        streams = {"hidden": self.hidden, "dense": self.dense}
        return {name: stream for name, stream in streams.items() if stream is not None}

    def resume(self, streams: dict[str, Tensor]) -> None:
        """Go on from these hidden states."""
        dense = streams.get("dense")
        self.hidden = self._host(streams["hidden"])
        self.dense = None if dense is None else self._host(dense)

    @contextmanager
    def resident(self, index: int) -> Iterator[nn.Module]:
        """The block with its weights on the device, in the compute dtype."""
        with self._loaded(self.block_name(index)):
            yield self._blocks[index]

    def forward(self, index: int, hidden: Tensor) -> Tensor:
        """What a resident block puts out for as many sequences on the device as a batch has."""
        call = self._calls[len(hidden)][index]
        output = self._blocks[index](hidden, *call.args, **call.kwargs)
        return output[0] if self.family.block_returns == "tuple" else output

    @torch.no_grad()
    def reach(self, index: int, hidden: Tensor, last: str | None) -> None:
        """Run a resident block for what its hooks see, up to the linear layer `last`; None: all of it."""

        def stop(*_: object) -> None:
            raise _Enough

        handle = linear(self.model, last).register_forward_hook(stop) if last else None
        try:
            self.forward(index, hidden)
        except _Enough:
            pass
        finally:
            if handle:
                handle.remove()

    def run(self, index: int, last: str | None = None) -> Iterator[int]:
        """Let a resident block reach `last` for all batches of `hidden`, yielding their numbers."""
        assert self.hidden is not None
        for number, hidden in enumerate(self.hidden.split(self.batch_size)):
            self.reach(index, hidden.to(self.device), last)
            yield number

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of `dense` and of `hidden`, on the device."""
        assert self.hidden is not None and self.dense is not None
        streams = (stream.split(self.batch_size) for stream in (self.dense, self.hidden))
        for dense, hidden in zip(*streams, strict=True):
            yield dense.to(self.device), hidden.to(self.device)

    @contextmanager
    def with_weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Linear layers with other weights [N, K] for a while."""
        layers = {name: linear(self.model, name) for name in weights}
        own = {name: layer.weight.data for name, layer in layers.items()}
        try:
            for name, layer in layers.items():
                layer.weight.data = weights[name]
            yield
        finally:
            for name, layer in layers.items():
                layer.weight.data = own[name]

    @torch.no_grad()
    def advance(self, index: int, stream: Tensor) -> None:
        """Replace `hidden` or `dense` by what a resident block puts out for it."""
        for hidden in stream.split(self.batch_size):
            hidden.copy_(self.forward(index, hidden.to(self.device)))

    def run_final(self, head: Callable[[Tensor], None]) -> Iterator[int]:
        """Pass the last hidden states through the final norm, and each batch on to `head`."""
        assert self.hidden is not None
        final = self._final()
        with self._loaded(*final), torch.no_grad():
            for number, hidden in enumerate(self.hidden.split(self.batch_size)):
                head(_through(final.values(), hidden.to(self.device)))
                yield number

    @contextmanager
    def loaded_tail(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """What turns the last hidden states [B, length, hidden] into logits, its weights on the device."""
        head = self.model.get_output_embeddings()
        (name,) = (name for name, module in self.model.named_modules() if module is head)
        tail = {**self._final(), name: head}
        with self._loaded(*tail):
            yield lambda x: _through(tail.values(), x)

    @contextmanager
    def loaded_linear(self, name: str) -> Iterator[nn.Linear]:
        """A linear layer outside the blocks, with its weight on the device."""
        with self._loaded(name):
            yield linear(self.model, name)

    def _linear_dtype(self) -> torch.dtype:
        """Dtype of the first block's first linear layer, which stands for all of them."""
        first = f"{self.family.blocks.rpartition('.')[2]}.0.{self.family.sites[0].linears[0]}.weight"
        for name, file in self._files.items():
            if name.endswith(first):
                with safe_open(file, framework="pt") as tensors:
                    return tensors.get_slice(name)[:1].dtype
        raise EsparseError(
            "the checkpoint has no such tensor",
            where=f"{self.path}: {first}",
            fix="config.json and the weights belong to different models: download both again",
        )

    def _final(self) -> dict[str, nn.Module]:
        """The modules between the last block and the head, by name."""
        found = {name: self._optional(name) for name in self.family.final}
        return {name: module for name, module in found.items() if module is not None}

    def _optional(self, name: str) -> nn.Module | None:
        parent, _, child = name.rpartition(".")
        module = getattr(self.model.get_submodule(parent), child)
        return module if isinstance(module, nn.Module) else None

    @contextmanager
    def _loaded(self, *names: str, except_blocks: bool = False) -> Iterator[None]:
        """Load the parameters of modules, and drop them afterwards."""
        with ExitStack() as stack:
            for name in names:
                module = self.model.get_submodule(name)
                keys = [
                    key
                    for key in module.state_dict()
                    if not (except_blocks and f"{name}.{key}".startswith(f"{self.family.blocks}."))
                ]
                state = {k: self._to_device(self.stored(f"{name}.{k}")) for k in keys}
                module.load_state_dict(state, strict=False, assign=True)
                for child in module.modules():
                    for key, buffer in child.named_buffers(recurse=False):
                        setattr(child, key, buffer.to(self.device))
                empty = {k: t.to("meta") for k, t in state.items()}
                stack.callback(module.load_state_dict, empty, strict=False, assign=True)
            yield

    def _host(self, stream: Tensor) -> Tensor:
        """Page-locked where a GPU reads it: it is copied there for every pass."""
        return stream.pin_memory() if self.device.type == "cuda" else stream

    def _to_device(self, tensor: Tensor) -> Tensor:
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self.device, dtype, copy=True)  # never a view of the memory-mapped file

    def _record_calls(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        """Run the model with blocks that do nothing; the first block's input and the calls of all blocks."""
        calls: list[Call] = []
        inputs: list[Tensor] = []

        def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            inputs.append(hidden_states)
            calls.append(Call(args, kwargs))
            if len(calls) == self.blocks:
                raise _Enough
            return (hidden_states,) if self.family.block_returns == "tuple" else hidden_states

        for block in self._blocks:
            block.forward = record
        try:
            with torch.no_grad():
                self.model.base_model(ids, use_cache=False)
        except _Enough:
            pass
        finally:
            for block in self._blocks:
                del block.forward
        return inputs[0], calls


def _through(modules: Iterable[nn.Module], x: Tensor) -> Tensor:
    for module in modules:
        x = module(x)
    return x


def _tensor_files(path: Path) -> dict[str, Path]:
    """Stored tensor name -> file."""
    files = {}
    for file in weight_files(path):
        with safe_open(file, framework="pt") as tensors:
            files.update(dict.fromkeys(tensors.keys(), file))
    return files
