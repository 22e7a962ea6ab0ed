"""The interface of exported models: what their inputs are called, and consistent values for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from esparse_trt.records import TensorSpec

PAST = "past_key_values."
PRESENT = "present."


def read_specs(path: Path) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of an ONNX file, whose weights are not read."""
    graph = onnx.load(path, load_external_data=False).graph
    return [_spec(value) for value in graph.input], [_spec(value) for value in graph.output]


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    return TensorSpec(
        name=value.name,
        dtype=helper.tensor_dtype_to_np_dtype(tensor.elem_type).name,
        shape=[dim.dim_param or dim.dim_value for dim in tensor.shape.dim],
    )


def token_feed(
    inputs: list[TensorSpec],
    input_ids: NDArray[np.int64],
    *,
    past: int = 0,
    padding: Sequence[int] | None = None,
) -> dict[str, NDArray]:
    """The token inputs: ids, and the mask and positions that go with them, without the cache.

    Args:
        inputs: the model's inputs; only those it has are fed.
        input_ids: int64 `[batch, sequence]`.
        past: tokens that are in the cache already.
        padding: for each row, how many of its first tokens (cache included) are padding; default none.
    """
    batch, sequence = input_ids.shape
    columns = np.arange(past + sequence)
    mask = (columns >= np.asarray(padding or [0] * batch)[:, None]).astype(np.int64)
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, past:]
    values = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
    names = {spec.name for spec in inputs}
    return {name: value for name, value in values.items() if name in names}


def cache_feed(
    inputs: list[TensorSpec], *, batch: int, past: int, random: np.random.Generator | None = None
) -> dict[str, NDArray]:
    """A cache of `past` tokens, zeros or standard normal; `past = 0` is the empty cache of a prefill."""
    feed = {}
    for spec in inputs:
        if spec.name.startswith(PAST):
            _, heads, _, dim = spec.shape
            shape = (batch, int(heads), past, int(dim))
            values = np.zeros(shape) if random is None else random.standard_normal(shape)
            feed[spec.name] = values.astype(spec.dtype)
    return feed


def next_cache(outputs: dict[str, NDArray]) -> dict[str, NDArray]:
    """The cache inputs of the next step from the outputs of this one."""
    return {
        PAST + name.removeprefix(PRESENT): value
        for name, value in outputs.items()
        if name.startswith(PRESENT)
    }


def example_feed(
    inputs: list[TensorSpec],
    *,
    batch: int,
    sequence: int,
    past: int,
    vocab: int,
    seed: int,
    padding: Sequence[int] | None = None,
) -> dict[str, NDArray]:
    """A complete and consistent set of inputs: random ids, a random cache, right mask and positions.

    Args:
        inputs: the model's inputs.
        batch: rows.
        sequence: new tokens per row.
        past: tokens in the cache.
        vocab: ids are drawn from `[0, vocab)`.
        seed: of ids and cache.
        padding: for each row, how many of its first tokens (cache included) are padding; default none.
    """
    random = np.random.default_rng(seed)
    ids = random.integers(0, vocab, (batch, sequence), dtype=np.int64)
    tokens = token_feed(inputs, ids, past=past, padding=padding)
    return tokens | cache_feed(inputs, batch=batch, past=past, random=random)
