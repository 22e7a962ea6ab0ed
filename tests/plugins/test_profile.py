"""The profile of kernels: ncu's output, the launches compared, what operands take of shared memory."""

import importlib
from pathlib import Path

import pytest

from esparse_trt.errors import EsparseError

BENCH = Path(__file__).parents[2] / "plugins" / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def ncu_csv(metrics, *kernels):
    """What ncu prints of (range, kernel, nanoseconds), all other counters the same."""
    ranges = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"
    names = ["ID", "Kernel Name", ranges, *metrics.values()]
    rows = [names, [""] * len(names)]
    for number, (label, kernel, ns) in enumerate(kernels):
        values = [ns if name == "ns" else "1,234.5" for name in metrics]
        rows.append([str(number), kernel, f"7 <default domain>:{label}:none:none", *values])
    lines = [",".join(f'"{field}"' for field in row) for row in rows]
    return "\n".join(["==PROF== Connected to process 7", "what the program prints", *lines])


def test_counters_are_found_by_the_range_and_those_of_the_longest_kernel_count(bench):
    ncu = bench("ncu")
    text = ncu_csv(
        ncu.METRICS,
        (f"{ncu.MARK}64x128x16 dense", "splitKreduce", "2,000"),
        (f"{ncu.MARK}64x128x16 dense", "nvjet_128x256", "10,500"),
        (f"{ncu.MARK}wgmma_n64m64 4096", "gemm", "5000"),
        ("another", "memset", "7"),
    )
    found = ncu.read(text)
    assert set(found) == {"64x128x16 dense", "wgmma_n64m64 4096"}
    dense = found["64x128x16 dense"]
    assert (dense["kernel"], dense["us"], dense["tensor"]) == ("nvjet_128x256", 12.5, 1234.5)


def test_no_counters_are_no_rows(bench):
    assert bench("ncu").read("==PROF== Connected\nno kernels were profiled") == {}


def test_cells_are_launched_as_the_results_say_and_others_are_refused(bench):
    profile = bench("profile_cells")
    keys = {"dense": 3, "cusparselt": 32, "ours": "decode_a"}
    times = {kind: {"key": key, "us": 7.5} for kind, key in keys.items()}
    results = {"cells": [{"n": 64, "k": 128, "m": 16, **times}]}
    jobs = profile.cell_jobs(["64x128x16"], results)
    assert {job.label: job.key for job in jobs} == {f"64x128x16 {kind}": key for kind, key in keys.items()}
    assert {(job.n, job.k, job.m, job.bench_us) for job in jobs} == {(64, 128, 16, 7.5)}
    with pytest.raises(profile.EsparseError, match="no cell 64x128x32"):
        profile.cell_jobs(["64x128x32"], results)


def test_each_multiprocessor_has_a_tile(bench):
    profile = bench("profile_cells")
    names = ["wgmma_n192m256_x2", "cutlass_256x128_c12_w1m"]
    sizes = {job.key: (job.n, job.m) for job in profile.tile_jobs(names) if job.kind == "ours"}
    assert sizes == {names[0]: (12 * 192, 11 * 256), names[1]: (6 * 256, 22 * 128)}
    for job in profile.tile_jobs(names):
        macs = 2048 if job.kind == "dense" else 4096
        assert job.needed == pytest.approx(job.n * job.k * job.m / 132 / macs)


def test_a_main_loop_is_the_difference_between_two_lengths(bench):
    """128 x 256 by hand: 32 k are 2 x 128 clocks of the tensor cores and of 2 x (16 + 2) KiB."""
    profile = bench("profile_cells")
    jobs = profile.tile_jobs(["wgmma_n128m256"])
    counters = {job.label: {"clocks": 5000 + job.k / 32 * 300, "kernel": "gemm"} for job in jobs}
    found = profile.main_loops(jobs, counters)
    assert list(found) == ["dense", "cusparselt", "wgmma_n128m256"]
    ours = found["wgmma_n128m256"]
    assert (ours["clocks"], ours["rest"]) == pytest.approx((300, 5000))
    assert (ours["tensor"], ours["operands"]) == pytest.approx((256, 2 * 18 * 1024 / 128))
    assert found["dense"]["tensor"] == pytest.approx(512)


def test_what_operands_take_is_least_for_the_widest_wgmma(bench):
    share = bench("profile_cells").operands_share
    assert share(128, 256) == 144 / 128
    assert share(192, 256) == share(256, 128) == 80 / 64


def test_the_page_names_ours_by_the_candidate_and_the_others_by_the_kernel(bench):
    profile = bench("profile_cells")
    jobs = [profile.Job(f"64x128x16 {kind}", 64, 128, 16, kind, "wgmma_n64m64") for kind in ("dense", "ours")]
    rows = {
        job.label: profile.explain(job, {"kernel": "nvjet", "clocks": 10.0, "ns": 8.0, "l2": 7.0})
        for job in jobs
    }
    where = {
        "device": {"name": "A GPU"},
        "versions": {"cublaslt": 130100, "cusparselt": 800},
        "library": {"kernel_set": "abc123"},
        "date": "2026-11-22",
    }
    page = profile.page({"environment": where, "cells": rows, "tiles": {}})
    assert "# What limits the kernels on A GPU" in page and "cuSPARSELt 800" in page
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if "|" in line}
    assert "`nvjet`" in lines["64x128x16 dense"] and "`wgmma_n64m64`" in lines["64x128x16 ours"]
    assert "| 1250.0 |" in lines["64x128x16 ours"] and "| 66.7 |" in lines["64x128x16 ours"]
    assert "| 66.7 |" not in lines["64x128x16 dense"] and "| 7.0 |" in lines["64x128x16 dense"]


def test_a_machine_without_ncu_is_told_so(bench, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EsparseError, match="ncu is not on the PATH"):
        bench("ncu").run(["true"])
