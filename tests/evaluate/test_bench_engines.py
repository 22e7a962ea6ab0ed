"""Which engines are measured at which cells, with a stand-in for TensorRT."""

from __future__ import annotations

from pathlib import Path

import pytest

from esparse_trt.artifacts import BuildDir
from esparse_trt.errors import EsparseError
from esparse_trt.evaluate import bench_engines
from esparse_trt.records import EngineFile, EngineRecord, ExportRecord, TensorSpec

INPUTS = [
    TensorSpec(name="input_ids", dtype="int64", shape=["batch", "sequence"]),
    TensorSpec(name="past_key_values.0.key", dtype="float16", shape=["batch", 2, "past", 8]),
]
EXPORTED = ExportRecord(
    dtype="float16", opset=20, inputs=INPUTS, outputs=[], linears={}, gathers=[], bytes={}
)


def profile(batch: int, sequence: int, past: int) -> dict[str, tuple]:
    """Ranges of the inputs from one token and no cache up to these sizes."""
    ids, cache = (batch, sequence), (batch, 2, past, 8)
    return {INPUTS[0].name: ((1, 1), ids, ids), INPUTS[1].name: ((1, 2, 0, 8), cache, cache)}


class Runner:
    """Takes a millisecond a token; holds batches to 4, prompts to 512."""

    def __init__(self, path: Path, flavour: str) -> None:
        if "sparse" in path.name:
            raise EsparseError("tensorrt_rtx 1.7 cannot load the engine: unsupported GPU", where=path)
        self.inputs = [spec.name for spec in INPUTS]
        self.profiles = [profile(4, 512, 0), profile(4, 1, 640)]

    def seconds(self, feed: dict, repeats: int) -> list[float]:
        assert all(tensor.device.type == "cpu" for tensor in feed.values())
        return [1e-3 * feed["input_ids"].shape[1]] * repeats

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def record(*names: str) -> EngineRecord:
    files = {
        name: EngineFile(
            file=f"{name}.plan", bytes=1, seconds=1, onnx="", onnx_sha256={}, sparse_weights=False
        )
        for name in names
    }
    return EngineRecord(
        flavour="tensorrt_rtx", version="1.7", skipped=None, dense=files.get("dense"),
        sparse=files.get("sparse"), profiles={}, runnable=True, not_runnable=None,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> BuildDir:
    for name in ("dense", "sparse"):
        (tmp_path / f"{name}.plan").touch()
    monkeypatch.setattr(bench_engines, "EngineRunner", Runner)
    monkeypatch.setattr(bench_engines, "DEVICE", "cpu")
    return BuildDir(tmp_path)


def test_an_engine_is_measured_where_its_profiles_reach(folder: BuildDir):
    cells = [(1, 128), (4, 512), (4, 600), (8, 128)]
    found, skipped = bench_engines.measure_engines(folder, EXPORTED, record("dense"), 100, cells, 128)
    assert skipped is None
    times = [(item.prefill and item.prefill.median, item.decode and item.decode.median) for item in found]
    assert times == [(128, 1), (512, 1), (None, None), (None, None)]
    assert [(item.batch, item.prompt) for item in found] == cells


def test_an_engine_that_does_not_run_here_is_named_with_the_reason(folder: BuildDir):
    both = record("dense", "sparse")
    found, skipped = bench_engines.measure_engines(folder, EXPORTED, both, 100, [(1, 128)], 128)
    assert [item.file for item in found] == ["dense.plan"]
    assert skipped == "sparse.plan: tensorrt_rtx 1.7 cannot load the engine: unsupported GPU"


def test_an_engine_that_is_not_there_is_said_to_be_missing(folder: BuildDir):
    (folder.root / "dense.plan").unlink()
    found, skipped = bench_engines.measure_engines(folder, EXPORTED, record("dense"), 100, [(1, 128)], 128)
    assert (found, skipped) == ([], "dense.plan: the engine is not on this machine")


def test_without_engines_the_build_says_why(folder: BuildDir):
    none = record().model_copy(update={"flavour": None, "skipped": "no TensorRT"})
    assert bench_engines.measure_engines(folder, EXPORTED, none, 100, [(1, 128)], 128) == ([], "no TensorRT")
