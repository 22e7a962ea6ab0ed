"""Optimisation profiles: the range of every input's shape, from a recipe's ranges of three symbols.

An exported model's dynamic dimensions are `batch`, `sequence` (new tokens), `past` (tokens in the KV cache)
or sums of them, such as `past + sequence`, the length that an attention mask spans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from esparse_trt.errors import EsparseError
from esparse_trt.records import TensorSpec
from esparse_trt.sections import Profile

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Range:
    """Smallest, best and largest shape of one input."""

    min: Shape
    opt: Shape
    max: Shape


def dimension(size: int | str, values: Mapping[str, int]) -> int:
    """The value of a static dimension, a symbol, or a sum of symbols and numbers.

    Raises:
        KeyError: a symbol has no value.
    """
    if isinstance(size, int):
        return size
    terms = [term.strip() for term in size.split("+")]
    return sum(int(term) if term.isdigit() else values[term] for term in terms)


def input_ranges(inputs: Sequence[TensorSpec], profile: Profile) -> dict[str, Range]:
    """The range of each input's shape under one profile.

    Raises:
        EsparseError: an input has a dimension that the profile does not determine.
    """
    corners = [
        {"batch": profile.batch[i], "sequence": profile.sequence[i], "past": profile.past[i]}
        for i in range(3)
    ]
    ranges = {}
    for spec in inputs:
        try:
            shapes = [tuple(dimension(size, corner) for size in spec.shape) for corner in corners]
        except KeyError as error:
            raise EsparseError(
                f"input `{spec.name}` has the dynamic dimension {error.args[0]!r}, which no profile sets: "
                f"{spec.shape}",
                where="engine.profiles",
                fix="export the model again: its dynamic dimensions must be sums of batch, sequence and past",
            ) from error
        ranges[spec.name] = Range(*shapes)
    return ranges
