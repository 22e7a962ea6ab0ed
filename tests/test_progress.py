"""Progress: plain lines, JSON lines, and the bars of other libraries kept away from both."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from esparse_trt import progress
from esparse_trt.artifacts import Manifest, StageEntry
from esparse_trt.cli import app
from esparse_trt.engine import flavour
from esparse_trt.progress import configure, note, track
from esparse_trt.records import EngineFile, EngineLayer, EngineRecord, PluginRecord
from esparse_trt.summary import plugin_use, print_summary


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    mode, stderr = progress._mode, sys.stderr
    yield
    configure(mode)
    sys.stderr = stderr


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_library_says_nothing(capsys: pytest.CaptureFixture[str]):
    configure("silent")
    note("unheard")
    assert list(track(range(3), "work")) == [0, 1, 2]
    assert lines(capsys) == []


def test_a_line_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]):
    configure("rich")
    long = "engines skipped: pip install 'esparse-trt[rtx]' " + "x" * 200
    note(long, style="bold", fact=1)
    assert list(track([1, 2], "work")) == [1, 2]
    assert lines(capsys) == [long]


def test_json_lines_hold_message_and_facts(capsys: pytest.CaptureFixture[str]):
    configure("json")
    note("prune    [bold] starts", style="bold", stage="prune", folder=Path("x"))
    (record,) = map(json.loads, lines(capsys))
    assert record.pop("time") > 0
    assert record == {"message": "prune [bold] starts", "stage": "prune", "folder": "x"}


def test_json_progress_ends_with_the_whole(capsys: pytest.CaptureFixture[str]):
    configure("json")
    assert list(track(iter("abc"), "work", total=3, unit="letter")) == ["a", "b", "c"]
    last = json.loads(lines(capsys)[-1])
    assert (last["message"], last["done"], last["total"], last["unit"]) == ("work", 3, 3, "letter")
    assert last["seconds_left"] == 0
    assert last["rate"] > 0


def test_what_others_write_is_wrapped_in_json(capsys: pytest.CaptureFixture[str]):
    configure("json")
    configure("json")  # again: wrapped once all the same
    print("UserWarning: an old API", file=sys.stderr)
    sys.stderr.write("Loading:  50%\rLoading: 100%\nand half")
    sys.stderr.write(" a line\n\n")
    records = [json.loads(line) for line in lines(capsys)]
    assert all(record["source"] == "stderr" for record in records)
    assert [record["message"] for record in records] == [
        "UserWarning: an old API", "Loading: 50%", "Loading: 100%", "and half a line",
    ]  # fmt: skip


def test_the_command_line_keeps_the_bars_of_libraries_away(tiny_recipe: Path, tmp_path: Path):
    """In processes of their own: libraries read their settings when they are imported."""
    script = Path(sysconfig.get_path("scripts")) / "esparse-trt"
    command = [script, "ablate", tiny_recipe, "--out", tmp_path / "out", "--only", "magnitude"]
    logged = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stderr
    records = [json.loads(line) for line in logged.splitlines()]
    started = {"message": "magnitude", "variant": "magnitude", "status": "started"}
    assert any(started.items() <= record.items() for record in records)
    assert not any("source" in record for record in records)
    plain = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert plain.splitlines() == ["magnitude: already measured"]


@pytest.mark.parametrize(
    ("sparse", "choices", "said"),
    [
        ((True, True), None, "plugin: 2 of 2 packed GEMMs, kernels by heuristic"),
        ((True, False), "1=a", "plugin: 1 of 2 packed GEMMs, 1 by measured choices"),
        (None, None, "no plugin: no layer could be packed"),
    ],
)
def test_the_summary_says_what_the_plugin_does(sparse, choices: str | None, said: str):
    layers = [
        EngineLayer(name="a", kernel="plugin" if s else "native", code="faster", choices=choices, reason="")
        for s in sparse or ()
    ]
    plugin = PluginRecord(library="p.so", version="0.1.0", layout="es24-v1", kernel_set="0", table=None)
    file = EngineFile(
        file="engine/sparse.plan", bytes=1, seconds=1, onnx="onnx/engine.onnx", onnx_sha256={},
        sparse_weights=True, plugin=plugin if sparse else None, layers=layers,
    )  # fmt: skip
    record = EngineRecord(
        flavour="tensorrt", version="10.14", skipped=None, dense=None, sparse=file, profiles={},
        no_plugin=None if sparse else "no layer could be packed", runnable=True, not_runnable=None,
    )  # fmt: skip
    assert plugin_use(record) == said


def test_brackets_are_no_markup_in_tables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(flavour, "unusable", lambda name: "not installed")
    monkeypatch.setattr(flavour, "installed_version", lambda name: None)
    printed = CliRunner().invoke(app, ["doctor"]).stdout
    assert all(install in printed for install in flavour.INSTALL.values())
    assert "[rtx]" in printed

    skipped = EngineRecord(
        flavour=None, version=None, skipped=flavour.INSTALL["tensorrt_rtx"], dense=None, sparse=None,
        profiles={}, runnable=False, not_runnable=None,
    )  # fmt: skip
    entry = StageEntry(seconds=1, peak_rss_bytes=1, finished="", record=skipped.model_dump())
    manifest = Manifest(version="", recipe={}, fingerprint="", environment={}, stages={"engine": entry})
    print_summary(Console(width=200), manifest, Path("out"))
    assert f"skipped: {skipped.skipped}" in capsys.readouterr().out
