"""`bench` around the measuring: what is kept, what starts anew, and how it is shown."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from esparse_trt.artifacts import BuildDir, Manifest, StageEntry
from esparse_trt.cli import app
from esparse_trt.errors import EsparseError
from esparse_trt.evaluate import bench, bench_text
from esparse_trt.evaluate.bench_grid import Grid, parse_numbers
from esparse_trt.evaluate.bench_record import (
    Bench,
    Ceilings,
    Cell,
    Device,
    Latency,
    LayerBench,
    LayerTime,
    LeftOut,
    LogitsCheck,
    Measured,
    ModelSize,
    Setting,
    load_bench,
    save_bench,
)
from esparse_trt.evaluate.report import report_again
from esparse_trt.recipe import parse_recipe
from esparse_trt.records import LayerRecord, PruneRecord, Reason

runner = CliRunner()


def measured(decode: float, prefill: float) -> Measured:
    return Measured(
        prefill=Latency.of([prefill, prefill]), decode=Latency.of([decode, decode, 3 * decode]),
        peak_bytes=14 << 30, joules_per_token=2.5, sm_mhz=1755,
    )  # fmt: skip


def make_cell(batch: int, prompt: int, gain: float = 1.5) -> Cell:
    return Cell(batch=batch, prompt=prompt, dense=measured(6.0, 80.0), sparse=measured(6.0 / gain, 60.0))


def make_setting(**changes: object) -> Setting:
    device = Device(
        name="H100", capability="9.0", multiprocessors=132, memory_bytes=80 << 30, driver="580",
        power_limit_w=700, max_sm_mhz=1980,
    )  # fmt: skip
    facts = {"model": "tiny", "weights": "random", "device": device, "versions": {"torch": "2.11"}}
    return Setting.model_validate({**facts, "dtype": "float16", "generated": 128, **changes})


def make_bench(cells: list[Cell], **changes: object) -> Bench:
    row = LayerBench(
        site="qkv", shape=(12288, 4096), count=32, sparse=True, code=Reason.mixed,
        reason="dense is faster at M = 64",
        times=[LayerTime(m=1, kernel="decode_a", sparse_us=20.0, dense_us=36.0, floor_us=18.0),
               LayerTime(m=64, kernel="wgmma_b", sparse_us=41.0, dense_us=40.0, floor_us=18.5)],
    )  # fmt: skip
    head = LayerBench(
        site="lm_head", shape=(32000, 4096), count=1, sparse=False, code=Reason.not_selected,
        reason="excluded by the recipe", times=[],
    )  # fmt: skip
    facts = {
        "command": "esparse-trt bench --shape tiny",
        "finished": "2026-11-22T01:02:03+00:00",
        "setting": make_setting(),
        "dense_model": "random weights",
        "dense": ModelSize(weight_bytes=1000, pruned_layer_bytes=800),
        "sparse": ModelSize(weight_bytes=650, pruned_layer_bytes=450),
        "logits": LogitsCheck(
            steps=256, error=2e-3, worst=3e-3, dense_rounding=1.5e-3, sparse_rounding=1.6e-3
        ),
        "ceilings": Ceilings(read_gb_per_s=3000, dense_tflop_per_s=650),
        "cells": cells,
        "layers": [row, head],
    }
    return Bench.model_validate({**facts, **changes})


# --- the command's logic ---------------------------------------------------------------------------------


class Subject:
    """A model that is never loaded."""

    name, weights, dtype, command = "tiny", "random", "float16", "esparse-trt bench --shape tiny"

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self.loaded = 0

    def sparse(self) -> torch.nn.Module:
        self.loaded += 1
        return torch.nn.Linear(4, 4)

    masked = sparse

    def dense(self) -> tuple[torch.nn.Module, str]:
        return torch.nn.Linear(4, 4), "random weights"


@pytest.fixture
def gpu(monkeypatch) -> SimpleNamespace:
    """Stands for a GPU: counts what is measured; `full` holds cells that do not fit."""
    state = SimpleNamespace(cells=[], layers=[], checks=0, full=set(), setting=make_setting())

    def cell(models, batch, prompt, generated, meter):
        state.cells.append((batch, prompt))
        if (batch, prompt) in state.full:
            return LeftOut(batch=batch, prompt=prompt, reason="the GPU's memory is full")
        return make_cell(batch, prompt)

    def check(masked, sparse):
        state.checks += 1
        return LogitsCheck(steps=256, error=2e-3, worst=3e-3)

    def layers(found, tokens, batches, dtype, ceilings):
        assert set(batches) <= set(tokens)
        state.layers.append(tokens)
        row = make_bench([]).layers[0]
        times = [row.times[0].model_copy(update={"m": m}) for m in tokens]
        return [row.model_copy(update={"times": times})]

    monkeypatch.setattr(bench, "this_setting", lambda *_: state.setting)
    monkeypatch.setattr(bench, "measure_cell", cell)
    monkeypatch.setattr(bench, "layers_of", lambda *_: {})
    monkeypatch.setattr(bench, "measure_layers", layers)
    monkeypatch.setattr(
        bench, "measure_ceilings", lambda: Ceilings(read_gb_per_s=3000, dense_tflop_per_s=650)
    )
    monkeypatch.setattr(bench.measuring, "check_logits", check)
    return state


def test_a_run_measures_every_cell_and_layer_once(gpu, tmp_path: Path):
    subject, path = Subject(), tmp_path / "bench.json"
    found = bench.run(subject, Grid((1, 16), (512, 9000), 128), path)
    assert gpu.cells == [(1, 512), (1, 9000), (16, 512), (16, 9000)]
    assert gpu.layers == [[1, 16, 512]]  # no layer is timed at 9000 tokens
    assert load_bench(path) == found
    assert gpu.checks == 1
    assert bench.run(subject, Grid((1, 16), (512, 9000), 128), path) == found
    assert (len(gpu.cells), subject.loaded) == (4, 2), "nothing is loaded when nothing is missing"


def test_a_killed_run_goes_on_where_it_stopped(gpu, tmp_path: Path, monkeypatch):
    path, grid = tmp_path / "bench.json", Grid((1, 4), (128,), 128)
    whole = bench.measure_cell

    def dies(models, batch, *rest):
        if batch == 4:
            raise KeyboardInterrupt
        return whole(models, batch, *rest)

    monkeypatch.setattr(bench, "measure_cell", dies)
    with pytest.raises(KeyboardInterrupt):
        bench.run(Subject(), grid, path)
    monkeypatch.setattr(bench, "measure_cell", whole)
    found = bench.run(Subject(), grid, path)
    assert gpu.cells == [(1, 128), (4, 128)]
    assert [cell.batch for cell in found.cells] == [1, 4]
    assert gpu.checks == 1
    save_bench(found.model_copy(update={"layers": []}), path)  # as if it had died before the layers
    assert bench.run(Subject(), grid, path).layers == found.layers


def test_more_cells_are_added_to_the_same_file(gpu, tmp_path: Path):
    path = tmp_path / "bench.json"
    bench.run(Subject(), Grid((4,), (128,), 128), path)
    found = bench.run(Subject(), Grid((1,), (128,), 128), path)
    assert [(cell.batch, cell.prompt) for cell in found.cells] == [(1, 128), (4, 128)]
    assert found.command == "esparse-trt bench --shape tiny --batch 1,4 --prompt 128 --generated 128"
    assert gpu.layers[-1] == [1, 4, 128], "layers are timed again for all numbers of tokens"


def test_figures_of_another_gpu_are_not_mixed_in(gpu, tmp_path: Path):
    path = tmp_path / "bench.json"
    bench.run(Subject(), Grid((1, 4), (128,), 128), path)
    gpu.setting = make_setting(versions={"torch": "2.12"})
    found = bench.run(Subject(), Grid((4,), (128,), 128), path)
    assert [cell.batch for cell in found.cells] == [4]
    assert found.setting == gpu.setting


def test_what_does_not_fit_is_left_out_with_the_reason_and_tried_again(gpu, tmp_path: Path):
    path, grid = tmp_path / "bench.json", Grid((1, 64), (8192,), 128)
    gpu.full = {(64, 8192)}
    found = bench.run(Subject(), grid, path)
    assert [(item.batch, item.reason) for item in found.left_out] == [(64, "the GPU's memory is full")]
    assert "batch 64, prompt 8192: not measured, the GPU's memory is full" in bench_text.markdown(found)
    gpu.full = set()
    found = bench.run(Subject(), grid, path)
    assert gpu.cells[2:] == [(64, 8192)]
    assert not found.left_out and len(found.cells) == 2


def test_two_models_that_do_not_fit_are_said_to(gpu, tmp_path: Path):
    class Large(Subject):
        def sparse(self) -> torch.nn.Module:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore")

    with pytest.raises(EsparseError, match=r"do not fit together into 80\.0 GiB of GPU memory") as error:
        bench.run(Large(), Grid(), tmp_path / "bench.json")
    assert "smaller model" in str(error.value.fix)


@pytest.fixture
def models() -> dict[str, torch.nn.Module]:
    model = torch.nn.Linear(4, 4)
    model.config = SimpleNamespace(max_position_embeddings=1024)
    return {"dense": model, "sparse": model}


def test_a_cell_whose_caches_do_not_fit_together_is_measured_apart(models, monkeypatch):
    tried = []

    def measure(group, batch, *_, **__):
        tried.append(sorted(group))
        if len(group) == 2 or batch == 64:
            raise torch.OutOfMemoryError
        return {name: measured(6.0, 80.0) for name in group}

    monkeypatch.setattr(bench.measuring, "measure", measure)
    cell = bench.measure_cell(models, 16, 128, 128, "no NVML")
    assert isinstance(cell, Cell) and not cell.interleaved
    assert tried == [["dense", "sparse"], ["dense"], ["sparse"]]
    left_out = bench.measure_cell(models, 64, 128, 128, "no NVML")
    assert isinstance(left_out, LeftOut) and "memory is full" in left_out.reason
    too_long = bench.measure_cell(models, 1, 1000, 128, "no NVML")
    assert too_long.reason == "the model has 1024 positions, 1128 are needed"


@pytest.mark.parametrize("text", ["", "1,,2", "a", "0", "1,2000"])
def test_lists_of_numbers_are_checked(text):
    with pytest.raises(EsparseError, match="not a list of numbers from 1 to 1024"):
        parse_numbers(text, "--batch", 1, 1024)
    assert parse_numbers("64, 1,16,1", "--batch", 1, 1024) == (1, 16, 64)


# --- the record ------------------------------------------------------------------------------------------


def test_figures_that_are_derived():
    cell, found = make_cell(16, 512, gain=1.25), make_bench([])
    assert cell.decode_speedup == pytest.approx(1.25)
    assert cell.prefill_speedup == pytest.approx(80 / 60)
    assert cell.tokens_per_second("dense") == pytest.approx(16 / 6e-3)
    assert found.weight_saving == pytest.approx(0.35)
    assert found.layer_ratio == pytest.approx(0.5625)
    assert found.layers[0].times[0].share_of_floor == pytest.approx(0.9)
    assert found.logits.passed
    assert not LogitsCheck(steps=1, error=6e-3, worst=6e-3).passed


def test_quantiles_of_one_and_many_measurements():
    assert Latency.of([3.0]).p99 == 3.0
    found = Latency.of([float(i) for i in range(101)])
    assert (found.count, found.median, found.p10, found.p90, found.p99) == (101, 50, 10, 90, 99)


def test_a_file_that_is_none_is_a_clear_error(tmp_path: Path):
    path = tmp_path / "bench.json"
    assert load_bench(path) is None
    path.write_text('{"cells": 3}')
    with pytest.raises(EsparseError, match="not a benchmark") as error:
        load_bench(path)
    assert str(path) in str(error.value)


# --- how it is shown -------------------------------------------------------------------------------------


def test_markdown_has_every_figure():
    found = make_bench([make_cell(1, 512), make_cell(16, 512, gain=0.8)], engines_skipped="no TensorRT")
    text = bench_text.markdown(found)
    assert "| 1 | 512 | 167 → 250 | 1.50x | 80.0 → 60.0 | 1.33x | 6.00 → 4.00 | 17.76 → 11.84 |" in text
    assert "35.0% less (the paper: 43.5%); pruned layers take 0.5625 of dense" in text
    assert "2.0e-03 relative L2" in text and "the dense model is 1.5e-03, the sparse one 1.6e-03" in text
    assert "SM clock 1755 to 1755 MHz of 1980, power limit 700 W" in text
    times = "20.0 / 36.0 (90%) | 41.0 / 40.0 (45%)"
    assert f"| qkv | 12288 x 4096 | 32 | {times} | sparse | dense is faster at M = 64 |" in text
    assert "| lm_head | 32000 x 4096 | 1 | – | – | dense | excluded by the recipe |" in text


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ((1.5, 1.2), "decoding: sparse is faster in all 2 cells, at most 1.50x at batch 1, prompt 128"),
        (
            (1.5, 0.9),
            "decoding: at most 1.50x at batch 1, prompt 128; sparse does not pay at batch x prompt 16 x 128",
        ),
        (
            (0.8, 0.9),
            "decoding: sparse does not pay in any of the 2 cells, at best 0.90x at batch 16, prompt 128",
        ),
    ],
)
def test_where_sparse_pays_is_said(gains, said):
    cells = [make_cell(batch, 128, gain) for batch, gain in zip((1, 16), gains, strict=True)]
    assert any(line.startswith(said) for line in bench_text.findings(make_bench(cells)))


@pytest.fixture
def build(tmp_path: Path) -> BuildDir:
    """A build folder whose pattern has no packed form, with nothing but a prune record."""
    text = {"source": "file", "path": "calibration.txt"}
    data = {"name": "tiny", "model": {"path": "model"}, "calibration": {"text": text}}
    recipe = parse_recipe(data, base=tmp_path)
    layer = LayerRecord(
        name="model.layers.0.mlp.up_proj", site="gate_up", block=0, shape=(128, 64), pattern="4:8",
        reason=None, permuted=False, sparsity=0.5, kept=None,
    )  # fmt: skip
    pruned = PruneRecord(
        model_type="llama", parameters=10000, pruned_parameters=4096, dtype="float16", source_sha256="a" * 64,
        calibration_sha256="b" * 64, calibration_tokens=64, device="cpu", layers=[layer], channels=[],
    )  # fmt: skip
    entry = StageEntry(
        seconds=1,
        peak_rss_bytes=1,
        finished="2026-11-22T01:02:03+00:00",
        record=pruned.model_dump(mode="json"),
    )
    manifest = Manifest(
        version="0.1.0", recipe=recipe.canonical(), fingerprint=recipe.fingerprint(), environment={},
        stages={"prune": entry},
    )  # fmt: skip
    folder = BuildDir(tmp_path)
    folder.manifest.write_text(manifest.model_dump_json())
    return folder


def rows_of(html: str) -> list[list[str]]:
    """The texts of all table cells."""
    rows = [
        re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S) for row in re.findall(r"<tr.*?</tr>", html, re.S)
    ]
    return [[" ".join(re.sub(r"<[^>]*>", "", cell).split()) for cell in row] for row in rows]


def test_report_shows_the_benchmark(build: BuildDir):
    evil = "<script>alert(1)</script>"
    found = make_bench([make_cell(b, p) for b in (1, 16) for p in (128, 512)], no_energy=evil)
    save_bench(found, build.bench)
    report_again(build.root)
    html, data = build.report_html.read_text(), json.loads(build.report_json.read_text())
    assert Bench.model_validate(data["bench"]) == found
    assert data["headline"]["decode_speedup"] == pytest.approx(1.5)
    assert data["headline"]["weight_saving"] == pytest.approx(0.35)
    assert html.count('id="crossover-caption"') == html.count('aria-labelledby="crossover-caption"') == 1
    rows = rows_of(html)
    assert ["16", "512", "2,667 → 4,000", "1.50x", "80.0 → 60.0", "1.33x"] in [row[:6] for row in rows]
    assert ["qkv", "12288 × 4096", "32", "1", "decode_a", "20.0", "36.0", "1.80", "90 %"] in [
        r[:9] for r in rows
    ]
    assert ["lm_head", "32000 × 4096", "1"] in [row[:3] for row in rows]
    assert html.count("<script") == 1 and "&lt;script&gt;alert(1)" in html


def test_report_without_a_benchmark_has_no_such_section(build: BuildDir):
    report_again(build.root)
    assert 'id="speed"' not in build.report_html.read_text()
    assert json.loads(build.report_json.read_text())["bench"] is None


# --- the command line ------------------------------------------------------------------------------------


def invoke(*arguments: object) -> str:
    result = runner.invoke(app, ["bench", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    assert "fix:" in result.output and "Traceback" not in result.output
    return " ".join(result.output.split())


def test_command_refuses_what_it_cannot_measure(tmp_path: Path):
    assert "give either a build or a shape" in invoke()
    assert "give either a build or a shape" in invoke(tmp_path, "--shape", "llama-7b")
    assert "no build.json there" in invoke(tmp_path)
    assert "no model shape is called 'llama-8'" in invoke("--shape", "llama-8")
    assert "'1;2' is not a list of numbers" in invoke("--shape", "llama-7b", "--batch", "1;2")
    assert "no such file" in invoke("--show", tmp_path / "gone.json")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_command_needs_a_gpu():
    assert "torch finds none" in invoke("--shape", "llama-7b")


def test_command_refuses_a_build_without_2_4_layers(build: BuildDir):
    assert "no layer of this build is 2:4" in invoke(build.root)


def test_show_prints_markdown_without_a_gpu(tmp_path: Path):
    found = make_bench([make_cell(1, 512)])
    save_bench(found, tmp_path / "a.json")
    result = runner.invoke(app, ["bench", "--show", str(tmp_path / "a.json")])
    assert result.exit_code == 0
    assert bench_text.markdown(found) in result.output


RESULTS = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_records_are_readable_and_name_their_command(path: Path):
    found = load_bench(path)
    assert found.cells
    assert path.stem.startswith(found.setting.model)
    assert found.command.startswith("esparse-trt bench ")
    for name in ("torch", "kernels"):
        assert found.setting.versions[name] in bench_text.markdown(found)
