"""Inputs for exported models."""

from __future__ import annotations

import numpy as np

from esparse_trt.graph.feeds import cache_feed, example_feed, next_cache, token_feed
from esparse_trt.records import TensorSpec

TOKENS = ["input_ids", "attention_mask", "position_ids"]
INPUTS = [TensorSpec(name=name, dtype="int64", shape=["batch", "sequence"]) for name in TOKENS] + [
    TensorSpec(name=f"past_key_values.{name}", dtype="float16", shape=["batch", 2, "past", 8])
    for name in ("0.key", "0.value")
]


def test_mask_and_positions_of_a_prefill_with_padding() -> None:
    feed = token_feed(INPUTS, np.zeros((2, 4), np.int64), padding=[0, 2])
    assert feed["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert feed["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]


def test_mask_and_positions_of_a_decode_step() -> None:
    feed = token_feed(INPUTS, np.zeros((2, 1), np.int64), past=4, padding=[0, 2])
    assert feed["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert feed["position_ids"].tolist() == [[4], [2]]


def test_only_the_models_own_inputs_are_fed() -> None:
    without = [spec for spec in INPUTS if spec.name != "position_ids"]
    assert "position_ids" not in token_feed(without, np.zeros((1, 2), np.int64))


def test_example_feed_is_complete_and_reproducible() -> None:
    feed = example_feed(INPUTS, batch=3, sequence=2, past=5, vocab=11, seed=7)
    assert list(feed) == [spec.name for spec in INPUTS]
    assert feed["input_ids"].shape == (3, 2) and feed["attention_mask"].shape == (3, 7)
    assert feed["input_ids"].min() >= 0 and feed["input_ids"].max() < 11
    cache = feed["past_key_values.0.key"]
    assert cache.shape == (3, 2, 5, 8) and cache.dtype == np.float16
    assert cache.std() > 0.5 and not np.array_equal(cache, feed["past_key_values.0.value"])
    again = example_feed(INPUTS, batch=3, sequence=2, past=5, vocab=11, seed=7)
    assert all(np.array_equal(feed[name], again[name]) for name in feed)


def test_the_cache_goes_round() -> None:
    empty = cache_feed(INPUTS, batch=1, past=0)
    assert empty["past_key_values.0.key"].shape == (1, 2, 0, 8)
    key = np.ones((1, 2, 1, 8))
    assert next_cache({"logits": key, "present.0.key": key}) == {"past_key_values.0.key": key}
