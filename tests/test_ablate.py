"""The ablation command: rows, settings, resumption, and that it measures what it says."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from esparse_trt import ablate, pipeline
from esparse_trt.ablate import run_ablation
from esparse_trt.artifacts import BuildDir, load_manifest
from esparse_trt.cli import app
from esparse_trt.errors import EsparseError
from esparse_trt.evaluate.ablation import Ablation
from esparse_trt.evaluate.report import report
from esparse_trt.recipe import load_recipe
from esparse_trt.sparsity.pruned import Pruned
from esparse_trt.variants import VARIANTS, choose, load_grid, section

runner = CliRunner()
RECIPES = Path(__file__).resolve().parent.parent / "recipes"
ONLY = ["magnitude", "wanda", "e_sparse, residual none"]


@pytest.fixture(scope="module")
def measured(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ablation") / "tiny"
    run_ablation(load_recipe(tiny_recipe), out, only=ONLY)
    return out


@pytest.fixture
def out(measured: Path, tmp_path: Path) -> Path:
    return shutil.copytree(measured, tmp_path / "tiny")


@pytest.fixture
def pruned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """What is pruned from now on: method and whether local shuffle is on."""
    calls = []
    prune = ablate.prune_model

    def count(path, windows, section, **options):
        calls.append((section.score.method, section.permute.local is not None))
        return prune(path, windows, section, **options)

    monkeypatch.setattr(ablate, "prune_model", count)
    return calls


def table(out: Path) -> Ablation:
    return Ablation.model_validate_json((out / "ablation.json").read_bytes())


def test_rows_say_what_differs(measured: Path):
    rows = {row.name: row for row in table(measured).rows}
    assert list(rows) == ONLY
    assert rows["wanda"].settings == {
        "score.method": "wanda", "permute.global": "none", "permute.local": None, "permute.residual": "none",
    }  # fmt: skip
    assert rows["e_sparse, residual none"].settings == {"permute.residual": "none"}
    assert rows["wanda"].perplexity != rows["magnitude"].perplexity
    assert all(row.kl > 0 and row.ln_ratio_ci95 > 0 and row.top1 < 1 for row in rows.values())
    assert {path.name for path in measured.iterdir()} == {
        ".lock", "build.json", "ablation.json", "ablation.html",
    }  # fmt: skip


def test_every_variant_is_a_valid_section_of_its_own():
    recipe = load_recipe(RECIPES / "quickstart.yaml")
    sections = [section(recipe.prune, variant).model_dump_json() for variant in VARIANTS]
    assert len(set(sections)) == len(VARIANTS)
    assert len({variant.name for variant in VARIANTS}) == len(VARIANTS)


@pytest.mark.parametrize("grid", sorted((RECIPES / "grids").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_grids_are_valid_and_have_the_baselines(grid: Path):
    variants = load_grid(grid)
    recipe = load_recipe(RECIPES / "quickstart.yaml")
    sections = [section(recipe.prune, variant).model_dump_json() for variant in variants]
    assert len(set(sections)) == len(variants)
    assert {"wanda", "sparsegpt"} <= {variant.name for variant in variants}


def test_a_measured_row_is_not_pruned_again(out: Path, tiny_recipe: Path, pruned: list):
    before = {row.name: row for row in table(out).rows}
    run_ablation(load_recipe(tiny_recipe), out, only=["wanda", "e_sparse, local off"])
    assert pruned == [("e_sparse", False)]
    after = {row.name: row for row in table(out).rows}
    assert list(after) == [*ONLY, "e_sparse, local off"]
    assert {name: after[name] for name in ONLY} == before


def test_an_interrupted_table_goes_on(out: Path, tiny_recipe: Path, pruned: list, monkeypatch):
    (out / "ablation.json").unlink()
    with monkeypatch.context() as patch:
        measure = ablate._measure

        def stop(name, *rest):
            if name == "wanda":
                raise KeyboardInterrupt
            return measure(name, *rest)

        patch.setattr(ablate, "_measure", stop)
        with pytest.raises(KeyboardInterrupt):
            run_ablation(load_recipe(tiny_recipe), out, only=["magnitude", "wanda"])
    assert [row.name for row in table(out).rows] == ["magnitude"]
    run_ablation(load_recipe(tiny_recipe), out, only=["magnitude", "wanda"])
    assert pruned == [("magnitude", False), ("wanda", False), ("wanda", False)]
    assert [row.name for row in table(out).rows] == ["magnitude", "wanda"]


def test_rows_measured_on_another_text_are_not_kept(
    out: Path, tiny_recipe: Path, tmp_path: Path, pruned: list
):
    recipe = load_recipe(tiny_recipe)
    text = tmp_path / "text.txt"
    text.write_text("Quite other words than those before, over and over again.\n" * 60)
    section = recipe.verify.model_copy(update={"text": recipe.verify.text.model_copy(update={"path": text})})
    (out / "build.json").unlink()
    (out / "ablation.json").rename(tmp_path / "ablation.json")
    shutil.rmtree(out)
    other = recipe.model_copy(update={"verify": section})
    run_ablation(other, out, only=["magnitude"])
    shutil.copy(tmp_path / "ablation.json", out)
    run_ablation(other, out, only=["magnitude"])
    assert len(pruned) == 2
    assert [row.name for row in table(out).rows] == ["magnitude"]


def test_the_dense_model_against_itself(tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without masks the table must show no difference at all."""
    monkeypatch.setattr(ablate, "prune_model", lambda *args, **options: Pruned())
    found = run_ablation(load_recipe(tiny_recipe), tmp_path / "out", only=["wanda"])
    (row,) = found.rows
    assert row.perplexity == pytest.approx(found.dense_perplexity)
    assert (row.ln_ratio, row.kl, row.top1) == (pytest.approx(0), pytest.approx(0, abs=1e-9), 1)


def test_masks_of_one_variant_leave_nothing_behind(tiny_llama: Path):
    from esparse_trt.model import load_model

    dense = load_model(tiny_llama, torch.float32)
    sparse = copy.deepcopy(dense)
    name = "model.layers.0.mlp.up_proj"
    shape = dense.get_submodule(name).weight.shape
    first = torch.zeros(shape, dtype=torch.bool)
    for mask in (first, ~first):
        ablate._apply(Pruned(masks={name: mask}), dense, sparse)
        torch.testing.assert_close(sparse.get_submodule(name).weight, dense.get_submodule(name).weight * mask)


def test_rows_run_in_the_order_that_was_asked_for(tiny_recipe: Path):
    base = load_recipe(tiny_recipe).prune
    chosen = choose(base, VARIANTS, ["wanda", "magnitude", "wanda"], tiny_recipe.parent)
    assert [variant.name for variant, _ in chosen] == ["wanda", "magnitude"]


def test_an_unknown_variant(tiny_recipe: Path, tmp_path: Path):
    result = runner.invoke(
        app, ["ablate", str(tiny_recipe), "--out", str(tmp_path / "out"), "--only", "wonder"]
    )
    assert result.exit_code == 2
    assert "no variant is called 'wonder'" in result.output
    assert "e_sparse, no shuffle" in result.output
    assert not (tmp_path / "out").exists()


def test_a_grid_of_ones_own(tiny_recipe: Path, tmp_path: Path):
    grid, out = tmp_path / "grid.yaml", tmp_path / "out"
    plain, changed = "score: { method: wanda }", 'pattern: "1:4"'
    grid.write_text(
        f"wanda, refitted: {{ {plain}, update: {{ method: obs }} }}\nwanda, 1 of 4: {{ {plain}, {changed} }}"
    )
    command = ["ablate", str(tiny_recipe), "--out", str(out), "--grid", str(grid)]
    assert runner.invoke(app, command).exit_code == 0
    rows = {row.name: row for row in table(out).rows}
    assert rows.keys() == {"wanda", "sparsegpt", "wanda, refitted", "wanda, 1 of 4"}
    assert rows["wanda, refitted"].settings == {"score.method": "wanda", "update.method": "obs"}
    assert rows["wanda, refitted"].kl < rows["wanda, 1 of 4"].kl


def test_a_grids_paths_start_at_the_grid(tiny_recipe: Path, sample_text: Path, tmp_path: Path):
    shutil.copy(sample_text, tmp_path / "longer.txt")
    grid, text = tmp_path / "grid.yaml", "text: { path: longer.txt }, samples: 2"
    grid.write_text(f"distilled: {{ recover: {{ steps: 0, distill: {{ steps: 1, {text} }} }} }}")
    found = run_ablation(load_recipe(tiny_recipe), tmp_path / "out", grid=grid, only=["distilled"])
    (row,) = found.rows
    assert row.settings["recover.distill.text.path"] == "longer.txt"


def test_rows_that_differ_in_distillation_share_a_pruning(tiny_recipe: Path, tmp_path: Path, pruned: list):
    grid, first = tmp_path / "grid.yaml", "score: { method: wanda }, update: { method: obs }"
    recover = "recover: { steps: 0, distill: { steps: 3, learning_rate: 0.01 } }"
    grid.write_text(f"plain: {{ {first} }}\ntrained: {{ {first}, {recover} }}\nother: {{ {recover} }}")
    recipe, rows = load_recipe(tiny_recipe), {}
    for order in (["plain", "trained", "other"], ["trained"]):
        out = tmp_path / str(len(order))
        found = run_ablation(recipe, out, grid=grid, only=order)
        assert [row.name for row in found.rows] == order
        rows |= {(len(order), row.name): row for row in found.rows}
    assert len(pruned) == 3, "once for plain and trained, once for other, once for trained alone"
    assert rows[3, "trained"].nll == rows[1, "trained"].nll != rows[3, "plain"].nll
    assert rows[3, "trained"].seconds >= rows[3, "plain"].seconds


@pytest.mark.parametrize(
    "text, message",
    [
        ("[wanda]", "mapping of row names"),
        ("wanda: { score: { methods: wanda } }", "method"),
        ("wanda: { update: { method: obs, damping: -1 } }", "damping"),
    ],
)
def test_a_bad_grid(text: str, message: str, tiny_recipe: Path, tmp_path: Path):
    grid = tmp_path / "grid.yaml"
    grid.write_text(text)
    with pytest.raises(EsparseError, match=message):
        run_ablation(load_recipe(tiny_recipe), tmp_path / "out", grid=grid)
    assert not (tmp_path / "out").exists()


def test_it_needs_an_evaluation_text(tiny_recipe: Path, tmp_path: Path):
    data = yaml.safe_load(tiny_recipe.read_text())
    del data["verify"]
    bad = tmp_path / "tiny.yaml"
    bad.write_text(yaml.safe_dump(data))
    with pytest.raises(EsparseError, match="evaluation text") as error:
        run_ablation(load_recipe(bad), tmp_path / "out")
    assert error.value.where == "verify.text"
    assert not (tmp_path / "out").exists()


def test_the_command_prints_the_table_best_first(out: Path, tiny_recipe: Path):
    result = runner.invoke(app, ["ablate", str(tiny_recipe), "--out", str(out), "--only", "wanda"])
    assert result.exit_code == 0
    printed = re.findall(r"^(.+?) +([\d.]+) +-?[\d.]+ ± [\d.]+ ", result.stdout, re.M)
    figures = {row.name: f"{row.perplexity:.3f}" for row in table(out).rows}
    assert dict(printed) == figures
    assert [float(p) for _, p in printed] == sorted(float(p) for p in figures.values())


def test_the_report_shows_the_table(out: Path, tiny_recipe: Path):
    pipeline.build(tiny_recipe, out, last="prune")  # in the same folder: it belongs to the same recipe
    folder = BuildDir(out)
    assert runner.invoke(app, ["report", str(out)]).exit_code == 0
    found = table(out)
    assert json.loads(folder.report_json.read_text())["ablation"] == found.model_dump(mode="json")
    page = folder.report_html.read_text()
    for row in found.rows:
        assert row.name in page
        assert f"{row.perplexity:.3f}" in page
    (out / "ablation.json").unlink()
    report(load_recipe(tiny_recipe), folder, load_manifest(folder))
    assert json.loads(folder.report_json.read_text())["ablation"] is None
