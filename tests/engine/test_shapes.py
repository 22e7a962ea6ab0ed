"""Shapes of the optimisation profiles."""

import pytest

from esparse_trt.engine.shapes import Range, dimension, input_ranges
from esparse_trt.errors import EsparseError
from esparse_trt.records import TensorSpec
from esparse_trt.sections import Profile

INPUTS = [
    TensorSpec(name="input_ids", dtype="int64", shape=["batch", "sequence"]),
    TensorSpec(name="attention_mask", dtype="int64", shape=["batch", "past + sequence"]),
    TensorSpec(name="past_key_values.0.key", dtype="float16", shape=["batch", 2, "past", 64]),
]


@pytest.mark.parametrize(
    ("size", "value"), [(7, 7), ("past", 5), ("past + sequence", 8), ("sequence+past", 8), ("past + 1", 6)]
)
def test_a_dimension_is_a_number_a_symbol_or_a_sum(size, value):
    assert dimension(size, {"past": 5, "sequence": 3}) == value


def test_prefill_has_an_empty_cache_and_decode_a_mask_one_longer_than_the_cache():
    prefill = input_ranges(INPUTS, Profile(batch=(1, 2, 4), sequence=(1, 128, 512), past=(0, 0, 0)))
    assert prefill == {
        "input_ids": Range((1, 1), (2, 128), (4, 512)),
        "attention_mask": Range((1, 1), (2, 128), (4, 512)),
        "past_key_values.0.key": Range((1, 2, 0, 64), (2, 2, 0, 64), (4, 2, 0, 64)),
    }
    decode = input_ranges(INPUTS, Profile(batch=(1, 1, 1), sequence=(1, 1, 1), past=(1, 100, 2047)))
    assert decode["attention_mask"] == Range((1, 2), (1, 101), (1, 2048))
    assert decode["past_key_values.0.key"].max == (1, 2, 2047, 64)


def test_an_unknown_dimension_names_the_input():
    strange = TensorSpec(name="attention_mask", dtype="int64", shape=["batch", "s54"])
    with pytest.raises(EsparseError, match=r"`attention_mask` has the dynamic dimension 's54'"):
        input_ranges([strange], Profile(sequence=(1, 1, 1), past=(1, 1, 1)))
