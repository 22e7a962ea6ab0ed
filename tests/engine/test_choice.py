"""Sparse or dense for each layer: the arithmetic, the reason codes, and what a recipe may ask for."""

from __future__ import annotations

import pytest

from esparse_trt.engine.choice import Layer, choose, counts, judge_rows
from esparse_trt.engine.table import BUCKETS, Best, Device, Row, Table
from esparse_trt.records import Reason
from esparse_trt.sections import TRAFFIC, Traffic

SHAPE = (4096, 4096)


def row(m: int, sparse: float, dense: float, programmatic: float | None = None) -> Row:
    best = [Best("kernel", us, us, us) for us in (sparse, programmatic or sparse, dense)]
    return Row(*SHAPE, "float16", m, *best)


# Sparse wins at 1 and 512 tokens, dense at 64 and 128.
ROWS = [row(1, 7.0, 14.0), row(64, 16.0, 15.0), row(128, 40.0, 20.0), row(512, 20.0, 26.0)]


def table(*rows: Row) -> Table:
    device = Device("NVIDIA H100 80GB HBM3", 90, 132, "", "13.0")
    return Table(device, "0.1.0", "abc123", "2026-11-22", {r.key: r for r in rows})


def test_a_layer_runs_once_per_prefill_and_once_per_generated_token():
    traffic = [Traffic(batch=2, prompt=100, generated=10, weight=3), Traffic(batch=2, prompt=1, generated=5)]
    assert counts(traffic) == {2: 3 * 10 + 1 + 5, 200: 3}
    assert counts(TRAFFIC) == {1: 128, 16: 128, 512: 1, 8192: 1}
    assert counts([Traffic(prompt=64, generated=0)]) == {64: 1}


@pytest.mark.parametrize(
    ("wanted", "sparse", "code", "speedup", "words"),
    [
        ({1: 1, 512: 1}, True, Reason.faster, 40 / 27, "M = 1: 7.0 us sparse, 14.0 us dense (x2.00)"),
        ({64: 3}, False, Reason.dense_faster, 15 / 16, "nothing is faster than dense: M = 64"),
        ({1: 1, 128: 1}, False, Reason.mixed, 34 / 47, "dense is faster over the whole traffic"),
        ({1: 3, 128: 1}, True, Reason.mixed, 62 / 61, "sparse is faster over the whole traffic"),
    ],
)
def test_the_time_over_the_whole_traffic_decides(wanted, sparse, code, speedup, words):
    verdict = judge_rows(ROWS, wanted)
    assert (verdict.sparse, verdict.code) == (sparse, code)
    assert verdict.speedup == pytest.approx(speedup)
    assert words in verdict.reason
    assert verdict.dense_faster_at == (64, 128)


@pytest.mark.parametrize("rows", [ROWS, []])
def test_what_was_not_measured_runs_sparse_and_says_how_to_measure(rows):
    verdict = judge_rows(rows, {1: 1, 4096: 1})
    assert (verdict.sparse, verdict.code, verdict.speedup) == (True, Reason.not_measured, None)
    assert "4096" in verdict.reason and "esparse-trt tune" in verdict.reason


def test_the_way_of_launching_decides_too():
    rows = [row(1, 15.0, 14.0, programmatic=13.0)]
    assert not judge_rows(rows, {1: 1}).sparse
    assert judge_rows(rows, {1: 1}, "programmatic").sparse


def test_equal_times_are_no_reason_for_a_second_format():
    assert judge_rows([row(1, 14.0, 14.0)], {1: 1}).code == Reason.dense_faster


def chosen(wish: str, native: bool, traffic: Traffic, rows=ROWS):
    (layer,) = choose([Layer("a", SHAPE)], table(*rows), [traffic], wish=wish, native=native)
    return layer


FAST, SLOW = Traffic(batch=1, prompt=1, generated=0), Traffic(batch=64, prompt=1, generated=0)


@pytest.mark.parametrize(
    ("wish", "native", "traffic", "kernel", "code"),
    [
        ("auto", True, FAST, "plugin", Reason.faster),
        ("auto", True, SLOW, "native", Reason.dense_faster),
        ("auto", False, SLOW, "dense", Reason.dense_faster),
        ("plugin", True, SLOW, "plugin", Reason.asked),
        ("native", True, FAST, "native", Reason.asked),
        ("dense", True, FAST, "dense", Reason.asked),
    ],
)
def test_a_recipe_may_ask_for_one_kind_of_kernel(wish, native, traffic, kernel, code):
    layer = chosen(wish, native, traffic)
    assert (layer.kernel, layer.code) == (kernel, code)
    assert layer.choices == ("1=kernel,64=kernel,128=kernel,512=kernel" if kernel == "plugin" else None)
    assert layer.dense_faster_at == [64, 128]


def test_without_a_table_every_layer_is_in_the_plugin():
    (layer,) = choose([Layer("a", SHAPE)], None, TRAFFIC)
    assert (layer.kernel, layer.code, layer.choices) == ("plugin", Reason.not_measured, None)


def test_above_the_last_bucket_times_go_on_in_proportion():
    verdict = judge_rows([row(BUCKETS[-1], 400.0, 500.0)], {4 * BUCKETS[-1]: 1})
    assert verdict.code == Reason.faster and verdict.speedup == pytest.approx(1.25)
