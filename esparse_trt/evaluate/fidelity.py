"""Fidelity: what the toolchain changed, apart from what pruning changed.

The same model runs in PyTorch (from its checkpoint) and in ONNX Runtime (from the exported and folded file),
and both must agree: limits on the relative L2 norm of the difference, by export dtype, are in `LIMITS`.

Two passes over a short text, because rounding accumulates over depth and a mistake should not hide in it:

- *Layers*: every decoder block gets the very input that it had in the ONNX graph, so that what is compared is
  the block alone, at any depth. The outputs of its linear layers and its own output are compared in execution
  order. A mistake shows up in the first layer that it touches and does not taint the blocks that follow.
- *Logits*: the whole model from tokens to logits, with nothing replaced, in one pass in PyTorch and in
  prefill and decode steps in ONNX Runtime, so that the cache is checked too.

PyTorch computes in fp32 from the weights as rounded to the export dtype, one decoder block in fp32 at a time.
For an fp16 export that is the more accurate reference: two fp16 runs differ by the rounding of both, and one
overflow that they share would go unseen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from esparse_trt.artifacts import Comparison, Fidelity
from esparse_trt.errors import CheckFailed
from esparse_trt.evaluate.figures import compare_arrays
from esparse_trt.evaluate.sections import SectionResult, block_index, block_of


@dataclass(frozen=True)
class Limits:
    """Largest relative L2 distances that rounding explains."""

    layer: float
    logits: float


LIMITS = {"float32": Limits(1e-5, 1e-5), "float16": Limits(2e-3, 5e-3)}


def compare_with_torch(
    model: PreTrainedModel, sections: list[SectionResult], logits: np.ndarray, ids: Tensor, limits: Limits,
    *, a: str, b: str,
) -> Fidelity:  # fmt: skip
    """Compare a model in PyTorch with what ONNX Runtime computed for the same tokens.

    Args:
        model: on the CPU, with weights as exported; its blocks are in fp32 only while they run.
        sections: of the ONNX graph run on the first T − 1 tokens, in the channel order of the checkpoint.
        logits: [1, T, V] of the ONNX graph, from prefill and decode.
        ids: tokens [1, T].
        limits: see `LIMITS`.
        a: what PyTorch ran, for the record.
        b: what ONNX Runtime ran.
    """
    with _float32(model):
        reference = model(input_ids=ids, use_cache=False).logits
        whole = compare_arrays("logits", reference.numpy(), logits, sides=(a, b))
        layers = _compare_layers(model, sections, ids[:, :-1], (a, b))
    return judge(a, b, whole, layers, limits)


def judge(a: str, b: str, logits: Comparison, layers: list[Comparison], limits: Limits) -> Fidelity:
    """The verdict: the first layer, in execution order, above its limit, else the logits."""
    diverging = [item.name for item in layers if item.relative_l2 > limits.layer]
    if not diverging and logits.relative_l2 > limits.logits:
        diverging = [logits.name]
    return Fidelity(
        a=a,
        b=b,
        limit_logits=limits.logits,
        limit_layer=limits.layer,
        logits=logits,
        layers=layers,
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


@contextmanager
def _float32(model: PreTrainedModel) -> Iterator[None]:
    """Compute in fp32 with the weights as they are: blocks are widened while they run, the rest at once."""
    dtype = model.dtype
    blocks = _blocks(model)
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
        with torch.inference_mode():
            yield
    finally:
        _cast(rest, dtype)
        for handle in handles:
            handle.remove()


def _cast(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """In place, so that tied parameters stay tied."""
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder blocks."""
    names = dict.fromkeys(block for name, _ in model.named_parameters() if (block := block_of(name)))
    return [model.get_submodule(name) for name in names]


def _compare_layers(
    model: PreTrainedModel, sections: list[SectionResult], ids: Tensor, sides: tuple[str, str]
) -> list[Comparison]:
    """Run the model with each block's output replaced by that of the ONNX graph, comparing on the way."""
    found: list[Comparison] = []

    def hook_for(name: str, theirs: np.ndarray, replace: bool) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            ours = output[0] if isinstance(output, tuple) else output
            array = ours.numpy().reshape(theirs.shape)  # OPT flattens batch and sequence
            found.append(compare_arrays(name, array, theirs, block=block_index(name), sides=sides))
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
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found
