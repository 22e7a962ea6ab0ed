"""The dry run: what a build will do and need; nothing is written, and refusals are those of the build."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from esparse_trt import pipeline
from esparse_trt.cli import app
from esparse_trt.plan import _memory, _sizes
from esparse_trt.recipe import load_recipe

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
runner = CliRunner()


def dry_run(*arguments: str | Path, code: int = 0) -> str:
    result = runner.invoke(app, ["build", *map(str, arguments), "--dry-run"])
    assert result.exit_code == code, result.output
    return result.output


def states(output: str) -> dict[str, str]:
    """Stage -> last column."""
    rows = re.findall(r"^ (\w+) .* (done|to do) *$", output, re.M)
    return dict(rows)


def test_the_quickstart(tmp_path: Path):
    output = dry_run(RECIPES / "quickstart.yaml", "--out", tmp_path / "out")
    assert "llama, 5.8 M parameters" in output
    assert "42 linear layers, 82% of the parameters, to 2:4" in output
    assert states(output) == dict.fromkeys(pipeline.STAGE_NAMES, "to do")
    # A checkpoint, ONNX models, two engines and a model repository, of 11.1 MiB in fp16 each or more.
    assert 6 * 11 < float(re.search(r"disk in all: ([\d.]+) MiB", output)[1]) < 10 * 11
    assert not (tmp_path / "out").exists()


def test_what_is_done_already(tiny_recipe: Path, tmp_path: Path):
    out = tmp_path / "out"
    pipeline.build(tiny_recipe, out, last="prune")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    output = dry_run(tiny_recipe, "--out", out, "--to", "fold")
    assert states(output) == {"prune": "done", "export": "to do", "fold": "to do"}
    assert states(dry_run(tiny_recipe, "--out", out, "--to", "prune", "--fresh")) == {"prune": "to do"}
    assert states(dry_run(tiny_recipe, "--out", out, "--from", "prune"))["prune"] == "to do"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    shutil.rmtree(out / "checkpoint")
    assert states(dry_run(tiny_recipe, "--out", out))["prune"] == "to do"


def test_a_hub_model_needs_its_config_only(
    tiny_recipe: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = tmp_path / "hub.yaml"
    recipe.write_text(tiny_recipe.read_text().replace(f"path: {tiny_llama}", "hub: nobody/tiny"))
    asked = []

    def download(hub: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((hub, allow_patterns))
        (tmp_path / "cache").mkdir()
        shutil.copy(tiny_llama / "config.json", tmp_path / "cache")
        return str(tmp_path / "cache")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert "llama, 0.1 M parameters" in dry_run(recipe, "--out", tmp_path / "out")
    assert asked == [("nobody/tiny", ["config.json"])]


def test_a_hub_model_that_cannot_be_reached(tmp_path: Path):
    output = dry_run(RECIPES / "llama-7b.yaml", "--out", tmp_path / "out", code=2)
    assert "huggyllama/llama-7b: the model is not in the local cache" in output


def test_estimates_tell_small_models_from_large_ones():
    """Against what the design promises: pruning and export hold one block, not the model."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, LlamaConfig

    recipe = load_recipe(RECIPES / "llama-7b.yaml")
    config = LlamaConfig()  # that of LLaMA-7B
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    parameters = sum(p.numel() for p in model.parameters())
    memory = _memory(recipe, model, config, parameters)
    fp16 = 2 * parameters
    assert 12e9 < fp16 < 14e9
    assert memory["export"] < 1.5 * fp16
    assert memory["engine"] > fp16
    hidden = recipe.calibration.samples * recipe.calibration.length * 4096 * 4
    block = 4 * 202_383_360
    hessian = 4 * 11008**2
    most = 4 * hidden + 8 * block + 8 * hessian  # the states of the dense model, too
    assert hidden + block + hessian < memory["prune"] < most
    assert 5.9 * fp16 < sum(_sizes(recipe, parameters).values()) < 10 * fp16
