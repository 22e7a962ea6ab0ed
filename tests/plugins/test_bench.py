"""The benchmark's list of layers, and what is rendered from its figures."""

import importlib
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "plugins" / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def entry(us, key):
    return {"key": key, "us": us, "p10": us - 0.1, "p90": us + 0.3}


def cell(m, dense, peer, ours, chain, padded=None):
    return {
        "n": 4096,
        "k": 4096,
        "dtype": "float16",
        "m": m,
        "dense": entry(dense, 3),
        "cusparselt": {**entry(peer, padded or m), "algorithm": 41, "split_k": 1},
        "ours": entry(ours, "decode_a"),
        "ours_pdl": entry(chain, "decode_b"),
        "floor_us": 6.0,
        "bound": "memory",
        "errors": {"ours": 1e-4, "cusparselt": 1e-4},
        "candidates": {"decode_a": ours},
    }


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "gpu.json"
    environment = {
        "device": {"name": "A GPU", "driver": "1.2", "cuda": "13.0"},
        "library": {"version": "0.1.0", "kernel_set": "abc123"},
        "versions": {"torch": "2.11", "cublaslt": 130100, "cusparselt": 800},
        "ceilings": {"read_bytes_per_s": 3e12, "dense_flop_per_s": 7e14},
        "date": "2026-11-22",
        "clocks_after_ceilings": {"clocks.sm": "1755 MHz"},
    }
    cells = [cell(16, 16.0, 8.0, 10.0, 8.0, padded=32), cell(1, 15.0, 12.0, 7.5, 6.0)]
    path.write_text(json.dumps({"environment": environment, "cells": cells}))
    return path


def test_the_layers_are_those_of_the_models(bench):
    names = bench("shapes").names()
    assert names[4096, 4096] == ["LLaMA-7B o", "Llama-3-8B o"]
    assert names[6144, 4096] == ["Llama-3-8B qkv"]
    assert names[10240, 8192] == ["LLaMA-2-70B qkv", "Llama-3-70B qkv"]
    assert names[1152, 896] == ["Qwen2.5-0.5B qkv"]
    assert names[3584, 18944] == ["Qwen2.5-7B down"]


def test_the_page_has_the_figures_their_ratios_and_what_they_hold_for(bench, results):
    bench("render").render(results)
    page = results.with_suffix(".md").read_text()
    assert "# Sparse-GEMM on A GPU" in page and "cuSPARSELt 800" in page and "3.00 TB/s" in page
    assert "## 4096 x 4096" in page
    (row,) = (line for line in page.splitlines() if line.startswith("| 16 |") and "decode_a" in line)
    fields = [field.strip() for field in row.strip("|").split("|")]
    assert fields == [
        "16", "16.00 ± 0.20", "8.00 ± 0.20 [32]", "10.00 ± 0.20", "8.00 ± 0.20",
        "1.60", "2.00", "0.80", "1.00", "60% memory", "`decode_a`",
    ]  # fmt: skip
    assert "| 16 | 1 |" in page and "| 0 of 1 | 0 of 1 |" in page  # as fast is not faster
    ratios = ("2.00 (2.00, 2.00)", "2.50 (2.50, 2.50)", "1.60 (1.60, 1.60)", "2.00 (2.00, 2.00)")
    assert f"| 1 | 1 | {' | '.join(ratios)} | 1 of 1 | 1 of 1 |" in page


def test_the_same_figures_make_the_same_plot(bench, results):
    bench("render").render(results)
    first = results.with_suffix(".svg").read_bytes()
    bench("render").render(results)
    assert first.startswith(b"<?xml") and results.with_suffix(".svg").read_bytes() == first
