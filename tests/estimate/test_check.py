"""The estimate against benchmarks: the arithmetic, where it is shown, and how far off it is on an H100."""

from __future__ import annotations

from pathlib import Path

import pytest

from esparse_trt.estimate.check import check, predict
from esparse_trt.evaluate import bench_text
from esparse_trt.evaluate.bench_record import (
    Bench,
    Cell,
    Device,
    Latency,
    Measured,
    ModelSize,
    Setting,
    load_bench,
)
from esparse_trt.runtime.shapes import config_of
from esparse_trt.sections import PruneSection


@pytest.fixture(autouse=True)
def no_tuner_table(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def make_bench(device: str, *cells: Cell) -> Bench:
    gpu = Device(name=device, capability="9.0", multiprocessors=132, memory_bytes=80 << 30, driver="580")
    setting = Setting(
        model="llama-7b", weights="random", device=gpu, versions={}, dtype="float16", generated=128
    )
    size = ModelSize(weight_bytes=2, pruned_layer_bytes=1)
    return Bench(
        command="esparse-trt bench --shape llama-7b", finished="", setting=setting, dense_model="random",
        dense=size, sparse=size, cells=list(cells),
    )  # fmt: skip


def make_cell(batch: int, prompt: int, decode: tuple[float, float], prefill: tuple[float, float]) -> Cell:
    dense, sparse = (
        Measured(decode=Latency.of([d]), prefill=Latency.of([p]), peak_bytes=1)
        for d, p in zip(decode, prefill, strict=True)
    )
    return Cell(batch=batch, prompt=prompt, dense=dense, sparse=sparse)


H100 = "NVIDIA H100 80GB HBM3"
LLAMA = config_of("llama-7b")


def test_every_cell_is_predicted_and_compared():
    cells = make_cell(1, 512, (6.0, 4.0), (12.0, 10.0)), make_cell(16, 512, (7.5, 5.5), (180.0, 140.0))
    bench = make_bench(H100, *cells)
    bench = bench.model_copy(update={"predictions": predict(bench, LLAMA, PruneSection())})
    first, second = check(bench)
    assert (first.batch, first.prompt, second.batch) == (1, 512, 16)
    assert first.decode.measured == 1.5
    assert first.decode.predicted == bench.predictions[0].decode.speedup
    assert first.decode.error == pytest.approx(first.decode.predicted / 1.5 - 1)
    assert second.prefill.measured == pytest.approx(180 / 140)
    text = bench_text.markdown(bench)
    assert f"| 1 | 512 | 1.50x | {first.decode.predicted:.2f}x | {first.decode.error:+.0%} |" in text


def test_nothing_is_predicted_of_a_gpu_that_is_not_known():
    bench = make_bench("NVIDIA T4", make_cell(1, 512, (6.0, 4.0), (12.0, 10.0)))
    assert predict(bench, LLAMA, PruneSection()) == [] and check(bench) == []
    assert "predicts" not in bench_text.markdown(bench)


def test_a_prediction_without_its_cell_is_left_out():
    bench = make_bench(H100, make_cell(1, 512, (6.0, 4.0), (12.0, 10.0)))
    predictions = predict(bench, LLAMA, PruneSection())
    assert check(bench.model_copy(update={"predictions": predictions, "cells": []})) == []


# --- on an H100 --------------------------------------------------------------------------------------------

MEASURED = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("llama-*-h100.json"))


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_the_gain_of_decoding_is_predicted_within_ten_percent(path):
    """Records of `esparse-trt bench --shape NAME`; the sparse models were not looked at by the fit."""
    bench = load_bench(path)
    predictions = predict(bench, config_of(bench.setting.model), PruneSection())
    found = check(bench.model_copy(update={"predictions": predictions}))
    assert found
    for cell in found:
        assert abs(cell.decode.error) < 0.10, cell
        assert abs(cell.prefill.error) < 0.20, cell
