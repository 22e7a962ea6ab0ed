"""A language model of three dozen numbers with the interface of an exported one, and its reference in numpy.

Its next token depends on every cached value, on the mask and on the positions: get one of them wrong, and the
text comes out different.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

VOCAB, HEADS, DIM = 320, 2, 4

_random = np.random.default_rng(7)
EMBEDDING = _random.standard_normal((VOCAB, HEADS * DIM)).astype(np.float32)
HEAD = _random.standard_normal((HEADS * DIM, VOCAB)).astype(np.float32)

_GRAPH = """
<ir_version: 10, opset_import: ["": 20]>
toy (
  int64[batch, sequence] input_ids, int64[batch, past_and_sequence] attention_mask,
  int64[batch, sequence] position_ids,
  float[batch, 2, past, 4] past_key, float[batch, 2, past, 4] past_value
) => (
  float[batch, sequence, 320] logits,
  float[batch, 2, total, 4] present_key, float[batch, 2, total, 4] present_value
)
<float[320, 8] embedding, float[8, 320] head,
 int64[4] split = {0, 0, 2, 4}, int64[3] merge = {0, 1, 8}, int64[1] two = {2}, int64[2] tail = {1, 3},
 float unit = {0.05}, float none = {0.0}>
{
  embedded = Gather (embedding, input_ids)
  positions = Cast <to: int = 1> (position_ids)
  scaled = Mul (positions, unit)
  column = Unsqueeze (scaled, two)
  x = Add (embedded, column)
  parts = Reshape (x, split)
  heads = Transpose <perm: ints = [0, 2, 1, 3]> (parts)
  present_key = Concat <axis: int = 2> (past_key, heads)
  present_value = Concat <axis: int = 2> (past_value, heads)
  mask = Cast <to: int = 1> (attention_mask)
  weights = Unsqueeze (mask, tail)
  product = Mul (present_key, present_value)
  seen = Mul (product, weights)
  context = ReduceSum <keepdims: int = 1> (seen, two)
  turned = Transpose <perm: ints = [0, 2, 1, 3]> (context)
  flat = Reshape (turned, merge)
  last = MatMul (flat, head)
  all = MatMul (x, head)
  shape_only = Mul (all, none)
  logits = Add (shape_only, last)
}
"""


def save_toy(path: Path) -> None:
    """Write the model with its weights as external data, as the fold stage does."""
    model = onnx.parser.parse_model(_GRAPH)
    model.graph.initializer.extend(
        [numpy_helper.from_array(EMBEDDING, "embedding"), numpy_helper.from_array(HEAD, "head")]
    )
    names = {
        "past_key": "past_key_values.0.key", "past_value": "past_key_values.0.value",
        "present_key": "present.0.key", "present_value": "present.0.value",
    }  # fmt: skip
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in [*model.graph.input, *model.graph.output]:
        value.name = names.get(value.name, value.name)
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in ("past_and_sequence", "total"):
                dim.dim_param = "past + sequence"
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)


def next_logits(tokens: list[int]) -> NDArray[np.float64]:
    """Logits `[VOCAB]` after the tokens, computed at once and without a cache."""
    x = EMBEDDING[tokens].astype(np.float64) + 0.05 * np.arange(len(tokens))[:, None]
    return (x * x).sum(axis=0) @ HEAD.astype(np.float64)


def continuation(tokens: list[int], count: int) -> list[int]:
    """Greedy continuation by `count` tokens."""
    new: list[int] = []
    for _ in range(count):
        new.append(int(next_logits([*tokens, *new]).argmax()))
    return new
