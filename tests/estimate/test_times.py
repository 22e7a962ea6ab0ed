"""Times of GEMMs: the roofline by hand, how far off it and the interpolation are, the data of the GPUs."""

from __future__ import annotations

import importlib.util
import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from esparse_trt.engine.table import Best, Device, Row, Table
from esparse_trt.errors import EsparseError
from esparse_trt.estimate.gpus import GPUS, gpu_of, gpu_of_device
from esparse_trt.estimate.predict import find_tables
from esparse_trt.estimate.times import DENSE, SPARSE, Times

ROOT = Path(__file__).parents[2]
H100 = gpu_of("h100")
SIDES = ("sparse", "dense")


def shipped() -> Table:
    (known,) = [one for one in find_tables(H100) if "ships" in one.title]
    return known.table


def errors(predicted: Times, rows: list[Row]) -> dict[str, list[float]]:
    """|predicted / measured − 1| by side."""
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for row in rows:
        pair = predicted.gemm(row.n, row.k, row.m)
        for side, measured in zip(SIDES, (row.sparse(predicted.launch).us, row.dense.us), strict=True):
            found[side].append(abs(getattr(pair, side) / measured - 1))
    return found


# --- the roofline ------------------------------------------------------------------------------------------


def test_memory_bound_by_hand():
    """M = 1, [8192, 8192]: 128 MiB dense, 72 MiB packed, and x and y of 32 KiB."""
    pair = Times(H100).gemm(8192, 8192, 1)
    assert pair.source == "roofline"
    assert pair.dense == pytest.approx(3.2 + (2**27 + 2**15) / (0.89 * 3.35e6), rel=1e-6)
    assert pair.sparse == pytest.approx(2.3 + (9 * 2**23 + 2**15) / (0.94 * 3.35e6), rel=1e-6)


def test_bound_by_the_tensor_cores_by_hand():
    """M = 8192, [8192, 8192]: 2^40 operations."""
    pair = Times(H100).gemm(8192, 8192, 8192)
    assert pair.dense == pytest.approx(3.2 + 2**40 / (0.67 * 989.4e6), rel=1e-6)
    assert pair.sparse == pytest.approx(2.3 + 2**40 / (0.45 * 2 * 989.4e6), rel=1e-6)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_more_work_never_takes_less_time(gpu):
    times = Times(gpu)
    base = times.roofline(2048, 2048, 64)
    for more in ((4096, 2048, 64), (2048, 4096, 64), (2048, 2048, 65), (2048, 2048, 4096)):
        assert all(a >= b for a, b in zip(times.roofline(*more), base, strict=True))


def test_a_faster_gpu_never_takes_longer():
    slow = Times(H100)
    fast = Times(replace(H100, bandwidth=2 * H100.bandwidth, dense=2 * H100.dense, sparse=2 * H100.sparse))
    for m in (1, 64, 4096):
        assert all(
            a < b for a, b in zip(fast.roofline(4096, 4096, m), slow.roofline(4096, 4096, m), strict=True)
        )


def test_no_speedup_of_the_roofline_beats_the_formats():
    """16 / 9 in memory and twice in the tensor cores, times what the kernels reach, without the start."""
    for m in (1, 16, 256, 4096):
        sparse, dense = Times(H100).roofline(16384, 16384, m)
        assert dense / sparse < max(
            16 / 9 * SPARSE["programmatic"].bandwidth / DENSE.bandwidth,
            2 * SPARSE["programmatic"].tensor / DENSE.tensor,
        )


def test_the_roofline_is_this_far_off_what_an_h100_took():
    rows = list(shipped().rows.values())
    found = errors(Times(H100), rows)
    assert len(rows) == 270
    assert statistics.median(found["dense"]) < 0.05
    assert statistics.median(found["sparse"]) < 0.08
    assert statistics.quantiles(found["dense"], n=10)[-1] < 0.15
    assert statistics.quantiles(found["sparse"], n=10)[-1] < 0.25


# --- tables ------------------------------------------------------------------------------------------------


def test_what_was_measured_comes_out_as_it_was():
    table = shipped()
    assert all(max(side) == 0 for side in errors(Times(H100, [table]), list(table.rows.values())).values())


def test_a_shape_that_was_left_out_is_interpolated_from_the_others():
    table = shipped()
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for shape in {key[:2] for key in table.rows}:
        others = {key: row for key, row in table.rows.items() if key[:2] != shape}
        times = Times(H100, [replace(table, rows=others)])
        left_out = table.of_layer(*shape, "float16")
        assert times.gemm(*shape, 1).source == "interpolated"
        for side, values in errors(times, left_out).items():
            found[side] += values
    assert statistics.median(found["dense"]) < 0.04
    assert statistics.median(found["sparse"]) < 0.06


def test_the_first_table_that_has_a_shape_wins():
    table = shipped()
    best = [Best("mine", us, us, us) for us in (3.0, 2.0, 8.0)]
    mine = replace(table, rows={(4096, 4096, "float16", 8192): Row(4096, 4096, "float16", 8192, *best)})
    times = Times(H100, [mine, table])
    assert times.gemm(4096, 4096, 1).sparse == 2.0
    assert times.gemm(12288, 4096, 1).sparse == table.rows[12288, 4096, "float16", 1].programmatic.us


def test_beyond_many_tokens_the_time_grows_with_them():
    table = shipped()
    at, beyond = (Times(H100, [table]).gemm(4096, 4096, m) for m in (4096, 16384))
    assert (at.source, beyond.source) == ("measured", "interpolated")
    assert beyond.dense == pytest.approx(4 * at.dense) and beyond.sparse == pytest.approx(4 * at.sparse)


def test_beyond_what_was_measured_there_is_the_roofline():
    device = Device("NVIDIA H100 80GB HBM3", 90, 132, "", "13.0")
    best = [Best("k", us, us, us) for us in (8.0, 7.0, 14.0)]
    table = Table(
        device,
        "0.1.0",
        "abc",
        "2026-11-22",
        {(4096, 4096, "float16", 1): Row(4096, 4096, "float16", 1, *best)},
    )
    assert Times(H100, [table]).gemm(4096, 4096, 1).source == "measured"
    assert Times(H100, [table]).gemm(4096, 4096, 512).source == "roofline"


def test_the_reference_is_the_committed_benchmark():
    """Made by plugins/bench/to_table.py: its docstring has the command."""
    spec = importlib.util.spec_from_file_location("to_table", ROOT / "plugins/bench/to_table.py")
    to_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(to_table)
    results = json.loads((ROOT / "plugins/bench/results/h100_fp16.json").read_text())
    assert to_table.convert(results) == shipped()


def test_a_table_of_another_gpu_is_refused(tmp_path):
    path = tmp_path / "table.json"
    shipped().save(path)
    with pytest.raises(EsparseError, match="measured on H100 SXM 80GB, not on L4") as error:
        find_tables(gpu_of("l4"), path)
    assert error.value.fix == "give --gpu h100"


def test_the_tuner_s_table_comes_before_the_reference(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert [one.title for one in find_tables(H100)] == ["the reference table that esparse-trt ships"]
    shipped().save(tmp_path / "esparse-trt/tune/nvidia-h100-80gb-hbm3.json")
    first, second = find_tables(H100)
    assert first.title.startswith("the tuner's table") and "ships" in second.title
    assert find_tables(gpu_of("a100")) == []


# --- GPUs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA T4", None),
    ],
)
def test_cudas_names(device, name):
    found = gpu_of_device(device)
    assert (found.name if found else None) == name


def test_the_data_is_plausible():
    for gpu in GPUS:
        assert gpu.sparse == 2 * gpu.dense and gpu.source
        assert 0.2e12 < gpu.bandwidth < 10e12 and 50e12 < gpu.dense < 3e15
        assert 5e6 < gpu.l2 < 0.2e9 and 20e9 < gpu.memory < 200e9
        assert (gpu.kernels is None) == (gpu.capability == 90)
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)


def test_an_unknown_gpu_is_an_error_that_lists_the_known():
    with pytest.raises(EsparseError, match="no GPU is called 'h101'") as error:
        gpu_of("h101")
    assert "h100, h100-pcie" in error.value.fix
