"""Fidelity: what the toolchain changed, apart from what pruning changed.

The same model runs in PyTorch (from its checkpoint, in the export dtype) and in ONNX Runtime (from the
exported and folded file), and both must agree: the relative L2 norm of the difference has limits, `LIMITS`.

Two passes over a short text, because rounding accumulates over depth and a mistake should not hide in it:

- *Layers*: every decoder block gets the very input that it had in the ONNX graph, so that what is compared is
  the block alone, at any depth. The outputs of its linear layers and its own output are compared in execution
  order. A mistake shows up in the first layer that it touches and does not taint the blocks that follow.
- *Logits*: the whole model from tokens to logits, with nothing replaced, in one pass in PyTorch and in
  prefill and decode steps in ONNX Runtime, so that the cache is checked too.

Some layers amplify rounding beyond any fixed limit. *Measured* on Qwen2.5-Coder-0.5B, whose keys have large
biases: attention of block 4 differs by 2.3e-3 between the runtimes, and by 2.1e-3 between fp16 and fp32 in
PyTorch alone, on the same weights and input. What is above its limit in fp16 therefore gets a second opinion,
PyTorch in fp32 arithmetic: it may be twice as far away as PyTorch's own fp16 result is from that one, and
`RELIEF` limits at most. Two swapped input channels of K move a layer by about 2/√K, which is twice as much
even at the K = 11008 of LLaMA-7B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from esparse_trt.errors import CheckFailed
from esparse_trt.evaluate.figures import compare_arrays
from esparse_trt.evaluate.sections import SectionResult, block_index, block_of
from esparse_trt.evaluate.verify_record import Comparison, Fidelity


@dataclass(frozen=True)
class Limits:
    """Largest relative L2 distances that rounding explains in most models."""

    layer: float
    logits: float


LIMITS = {"float32": Limits(1e-5, 1e-5), "float16": Limits(2e-3, 5e-3)}
RELIEF = 5.0  # times the limit, at most, where rounding is shown to be the cause


def judge(
    a: str,
    b: str,
    logits: Comparison,
    layers: list[Comparison],
    limits: Limits,
    rounding: Mapping[str, float] | None = None,
) -> Fidelity:
    """The verdict: the first layer, in execution order, above its limit, else the logits.

    Args:
        a, b: the runtimes, for the record.
        logits: from tokens to logits.
        layers: outputs of linear layers and blocks.
        limits: see `LIMITS`.
        rounding: of those above the limit, how far PyTorch in the export dtype is from PyTorch in fp32.
    """
    rounding = rounding or {}

    def diverges(item: Comparison, limit: float) -> bool:
        return item.relative_l2 > max(limit, min(2 * rounding.get(item.name, 0.0), RELIEF * limit))

    diverging = [item.name for item in layers if diverges(item, limits.layer)]
    if not diverging and diverges(logits, limits.logits):
        diverging = [logits.name]
    return Fidelity(
        a=a,
        b=b,
        limit_logits=limits.logits,
        limit_layer=limits.layer,
        logits=logits,
        layers=layers,
        rounding=dict(rounding),
        first_divergence=diverging[0] if diverging else None,
        passed=not diverging,
    )


def explain(check: Fidelity) -> CheckFailed:
    """The error of a check that did not pass."""
    worst = next((item for item in check.layers if item.name == check.first_divergence), check.logits)
    limit = check.limit_logits if worst is check.logits else check.limit_layer
    if worst is not check.logits:
        fix = "the ONNX file is not the checkpoint: build again --from export"
    elif check.layers:
        fix = "no layer diverges by itself, so rounding adds up over the layers: set export.dtype: float32"
    else:
        fix = "build the engine again: --from engine"
    return CheckFailed(
        f"{check.a} and {check.b} diverge here first: relative L2 distance {worst.relative_l2:.2e}, limit "
        f"{limit:.0e} (logits: {check.logits.relative_l2:.2e})",
        where=check.first_divergence,
        fix=f"{fix}; if it stays, please report it with build.json",
    )


# --- PyTorch ---------------------------------------------------------------------------------------------


@torch.inference_mode()
def compare_with_torch(
    model: PreTrainedModel, sections: list[SectionResult], logits: np.ndarray, ids: Tensor, limits: Limits,
    *, a: str, b: str,
) -> Fidelity:  # fmt: skip
    """Compare a model in PyTorch with what ONNX Runtime computed for the same tokens.

    Args:
        model: on the CPU, in the export dtype.
        sections: of the ONNX graph run on the first T − 1 tokens.
        logits: [1, T, V] of the ONNX graph, from prefill and decode.
        ids: tokens [1, T].
        limits: see `LIMITS`.
        a: what PyTorch ran, for the record.
        b: what ONNX Runtime ran.
    """
    suspects: dict[str, np.ndarray] = {}  # outputs of PyTorch that are above the limit

    def compare(name: str, ours: Tensor, theirs: np.ndarray, limit: float) -> Comparison:
        array = ours.numpy().reshape(theirs.shape)  # OPT flattens batch and sequence
        found = compare_arrays(name, array, theirs, block=block_index(name), sides=(a, b))
        if found.relative_l2 > limit:
            suspects[name] = array.copy()
        return found

    whole = compare("logits", _logits(model, ids), logits, limits.logits)
    layers: list[Comparison] = []

    def see(name: str, ours: Tensor, theirs: np.ndarray) -> None:
        layers.append(compare(name, ours, theirs, limits.layer))

    _run_blocks(model, sections, ids, see)
    rounding: dict[str, float] = {}
    if suspects and model.dtype != torch.float32:
        rounding = _rounding(model, sections, ids, suspects)
    return judge(a, b, whole, layers, limits, rounding)


def _rounding(
    model: PreTrainedModel, sections: list[SectionResult], ids: Tensor, suspects: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Relative L2 distance of some outputs from the same computed in fp32 arithmetic."""
    found: dict[str, float] = {}

    def see(name: str, exact: Tensor, _: object) -> None:
        if name in suspects:
            rounded = suspects[name]
            found[name] = compare_arrays(name, exact.numpy().reshape(rounded.shape), rounded).relative_l2

    with _float32(model):
        _run_blocks(model, sections, ids, see)
        if "logits" in suspects:
            see("logits", _logits(model, ids), None)
    return found


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def _run_blocks(
    model: PreTrainedModel,
    sections: list[SectionResult],
    ids: Tensor,
    see: Callable[[str, Tensor, np.ndarray], Any],
) -> None:
    """Run the model on all tokens but the last with each block's output replaced by that of the ONNX graph.

    `see` gets the name, the output in PyTorch and the output in the ONNX graph, in execution order.
    """

    def hook_for(name: str, theirs: np.ndarray, replace: bool) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            ours = output[0] if isinstance(output, tuple) else output
            see(name, ours, theirs)
            if not replace:
                return None
            forced = torch.from_numpy(theirs).to(ours.dtype).view_as(ours)
            return (forced, *output[1:]) if isinstance(output, tuple) else forced

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(hook_for(name, theirs, name == section.block))
        for section in sections
        for name, theirs in section.outputs.items()
    ]
    try:
        model(input_ids=ids[:, :-1], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _float32(model: PreTrainedModel) -> Iterator[None]:
    """Compute in fp32 with the weights as they are: blocks are widened while they run, the rest at once."""
    dtype = model.dtype
    names = dict.fromkeys(block for name, _ in model.named_parameters() if (block := block_of(name)))
    blocks = [model.get_submodule(name) for name in names]
    inside = {id(p) for block in blocks for p in block.parameters()}
    rest = [p for p in model.parameters() if id(p) not in inside]

    def widen(module: nn.Module, args: Any) -> None:
        _cast(module.parameters(), torch.float32)

    def narrow(module: nn.Module, args: Any, output: Any) -> None:
        _cast(module.parameters(), dtype)

    handles = [block.register_forward_pre_hook(widen) for block in blocks]
    handles += [block.register_forward_hook(narrow) for block in blocks]
    _cast(rest, torch.float32)
    try:
        yield
    finally:
        _cast(rest, dtype)
        for handle in handles:
            handle.remove()


def _cast(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """In place, so that tied parameters stay tied."""
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)
