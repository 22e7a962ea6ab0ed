"""Reading recipes: what is accepted, and what a wrong one is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from esparse_trt.errors import EsparseError
from esparse_trt.recipe import Recipe, load_recipe, parse_recipe
from esparse_trt.recipe_explain import explain
from esparse_trt.sections import TextDataset

BASE = {"model": {"path": "model"}, "calibration": {"text": {"path": "text.txt"}}}


def load(tmp_path: Path, content: object) -> Recipe:
    """Load a recipe written as text, bytes, or plain values laid over a minimal recipe."""
    path = tmp_path / "recipe.yaml"
    if isinstance(content, dict):
        content = yaml.safe_dump(BASE | content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_recipe(path)


def complaint(tmp_path: Path, content: object) -> str:
    with pytest.raises(EsparseError) as caught:
        load(tmp_path, content)
    assert caught.value.exit_code == 2
    assert str(tmp_path / "recipe.yaml") in str(caught.value.where)
    assert caught.value.fix
    return caught.value.what


# --- accepted ------------------------------------------------------------------------------------------


def test_the_shortest_recipe_is_a_model_and_a_text(tmp_path: Path) -> None:
    recipe = load(tmp_path, {})
    assert recipe.name == "recipe"
    assert recipe.calibration.text.source == "file"
    assert (recipe.prune.pattern, recipe.prune.score.method) == ("2:4", "e_sparse")


def test_relative_paths_are_taken_from_the_recipe_file(tmp_path: Path) -> None:
    text = {"source": "dataset", "name": "json", "data_files": ["a.json", "https://example.org/b.json"]}
    recipe = load(tmp_path, {"verify": {"text": text}})
    assert recipe.model.path == tmp_path / "model"
    assert recipe.calibration.text.path == tmp_path / "text.txt"
    assert recipe.verify.text.data_files == [str(tmp_path / "a.json"), "https://example.org/b.json"]


def test_files_inside_a_hub_data_set_are_left_alone(tmp_path: Path) -> None:
    text = {"source": "dataset", "name": "allenai/c4", "data_files": ["en/part.json.gz"]}
    source = load(tmp_path, {"calibration": {"text": text}}).calibration.text
    assert isinstance(source, TextDataset) and source.data_files == ["en/part.json.gz"]


def test_canonical_form_reads_back_as_the_same_recipe(tmp_path: Path) -> None:
    recipe = load(tmp_path, {"prune": {"permute": {"global": "sort", "local": None}}})
    again = parse_recipe(recipe.canonical(), base=Path("/elsewhere"))
    assert again == recipe and again.fingerprint() == recipe.fingerprint()
    assert load(tmp_path, {}).fingerprint() != recipe.fingerprint()


# --- files that are no recipe ----------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EsparseError, match="No such file") as caught:
        load_recipe(tmp_path / "none.yaml")
    assert str(tmp_path / "none.yaml") in str(caught.value) and "recipes/quickstart.yaml" in caught.value.fix


def test_malformed_yaml_gives_line_and_column(tmp_path: Path) -> None:
    with pytest.raises(EsparseError) as caught:
        load(tmp_path, "model: {path: x\ncalibration: [")
    assert caught.value.where == f"{tmp_path / 'recipe.yaml'}, line 2, column 12"
    assert "not valid YAML: expected ',' or '}'" in caught.value.what


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "holds nothing"),
        ("# only a comment\n", "holds nothing"),
        ("- model\n- calibration\n", "holds a list"),
        ("model", "holds a str"),
        ("a: *b", "undefined alias"),
        ("model:\n\tpath: x", "character '\\t'"),
        ("model: {path: a}\nmodel: {path: b}", "key 'model' is given twice"),
        ("model: {path: a, path: b}", "key 'path' is given twice"),
        (b"model: \xe9\n", "not UTF-8: byte 0xe9 at offset 7"),
        (b"model: \x00\n", "not valid YAML"),
    ],
)
def test_what_is_no_mapping_of_sections_says_what_it_is(tmp_path: Path, content, part: str) -> None:
    assert part in complaint(tmp_path, content)


# --- unknown keys, at every depth ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "key", "nearest", "valid"),
    [
        ({"prun": {}}, "prun", "prune", "verify"),
        ({"calibration": {"text": {"path": "x"}, "lenght": 3}}, "calibration.lenght", "length", "samples"),
        ({"prune": {"score": {"metod": "wanda"}}}, "prune.score.metod", "method", "alpha"),
        ({"prune": {"permute": {"globl": "deal"}}}, "prune.permute.globl", "global", "residual"),
        ({"prune": {"permute": {"local": {"blok": 8}}}}, "prune.permute.local.blok", "block", "rounds"),
        (
            {"engine": {"profiles": {"file": {"sequnce": [1, 1, 1]}}}},
            "engine.profiles.file.sequnce",
            "sequence",
            "past",
        ),
        (
            {"calibration": {"text": {"source": "dataset", "name": "x", "colum": "y"}}},
            "calibration.text.colum",
            "column",
            "streaming",
        ),
        ({"verify": {"text": {"pathh": "x", "path": "x"}}}, "verify.text.pathh", "path", "source"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(tmp_path, content, key: str, nearest: str, valid: str) -> None:
    what = complaint(tmp_path, content)
    assert f"unknown key `{key}`; did you mean `{nearest}`?" in what
    assert valid in what.partition("(valid:")[2]


def test_only_the_keys_of_the_chosen_source_are_valid(tmp_path: Path) -> None:
    what = complaint(tmp_path, {"calibration": {"text": {"source": "file", "path": "x", "streaming": True}}})
    assert what == "unknown key `calibration.text.streaming` (valid: source, path)"


@pytest.mark.parametrize("name", ["file", "dataset", "self"])
def test_a_key_called_like_a_source_is_not_swallowed(tmp_path: Path, name: str) -> None:
    assert f"unknown key `{name}`" in complaint(tmp_path, {name: {"a": 1}})
    profile = {"sequence": [9, 1, 1], "past": [0, 0, 0]}
    assert f"`engine.profiles.{name}`" in complaint(tmp_path, {"engine": {"profiles": {name: profile}}})


# --- wrong values ----------------------------------------------------------------------------------------


def profile(**ranges: list[int]) -> dict:
    return {"engine": {"profiles": {"p": {"sequence": [1, 2, 3], "past": [0, 0, 0]} | ranges}}}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (
            {"prune": {"score": {"method": "wander"}}},
            ["`prune.score.method`", "did you mean `wanda`?", "e_sparse", "got 'wander'"],
        ),
        (
            {"calibration": {"text": {"source": "files", "path": "x"}}},
            ["`calibration.text.source`", "did you mean `file`?", "dataset", "got 'files'"],
        ),
        (
            {"verify": {"text": {"source": "self"}}},
            ["`verify.text.source`", "(valid: file, dataset)", "'self'"],
        ),
        (
            {"calibration": {"text": {"path": "x"}, "samples": "many"}},
            ["`calibration.samples`", "integer", "'many'"],
        ),
        (
            {"calibration": {"text": {"path": "x"}, "samples": 0}},
            ["`calibration.samples`", "equal to 1", "got 0"],
        ),
        ({"calibration": {"text": "x.txt"}}, ["`calibration.text` must be a section", "'x.txt'"]),
        ({"calibration": {}}, ["`calibration.text` is missing"]),
        ({"calibration": {"text": {"source": "dataset"}}}, ["`calibration.text.name` is missing"]),
        ({"prune": None}, ["`prune` must be a section", "got nothing"]),
        ({"prune": "2:4"}, ["`prune` must be a section", "got '2:4'"]),
        ({"prune": {"pattern": "4:2"}}, ["`prune.pattern`", "0 < n < m", "'4:2'"]),
        ({"prune": {"pattern": "half"}}, ["`prune.pattern`", "such as 2:4", "'half'"]),
        ({"prune": {"pattern": 124}}, ["`prune.pattern`", "in quotes", "124"]),
        ({"model": {}}, ["`model`", "exactly one of `path`"]),
        ({"model": {"path": "a", "hub": "b/c"}}, ["`model`", "exactly one of `path`"]),
        ({"name": "a b"}, ["`name`", "'a b'"]),
        ({"verify": {"max_perplexity_ratio": 1.2}}, ["`verify`", "set `verify.text`"]),
        (profile(sequence=[5, 1, 9]), ["`engine.profiles.p`", "sequence", "ascending", "[5, 1, 9]"]),
        (profile(past=[3, 2, 1]), ["`engine.profiles.p`", "past", "ascending", "[3, 2, 1]"]),
        (profile(past=[1, 2]), ["`engine.profiles.p.past` has too few values", "[1, 2]"]),
        (profile(past=[1, 2, 3, 4]), ["`engine.profiles.p.past`", "at most 3", "[1, 2, 3, 4]"]),
    ],
)
def test_a_wrong_value_is_named_with_its_key(tmp_path: Path, content: dict, parts: list[str]) -> None:
    what = complaint(tmp_path, content)
    assert "problems" not in what  # one mistake, one complaint
    for part in parts:
        assert part in what


def test_yaml_makes_a_number_of_an_unquoted_pattern(tmp_path: Path) -> None:
    what = complaint(tmp_path, "model: {path: m}\ncalibration: {text: {path: x}}\nprune: {pattern: 2:4}")
    assert 'write it in quotes, "2:4"' in what


def test_several_mistakes_are_all_listed(tmp_path: Path) -> None:
    what = complaint(tmp_path, {"model": {"pth": "m"}, "prun": {}, "export": {"opset": 5}})
    assert what.startswith("3 problems") or what.startswith("4 problems")
    assert "`model.pth`" in what and "`prun`" in what and "`export.opset`" in what


# --- explain ---------------------------------------------------------------------------------------------


def test_the_explanation_says_what_each_stage_will_do(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        {
            "description": "For the test",
            "model": {"path": "m.gguf", "tokenizer": "t"},
            "calibration": {"text": {"source": "self", "temperature": 0.7}, "samples": 4, "length": 100},
            "prune": {
                "pattern": "1:8",
                "score": {"method": "ria"},
                "permute": {"global": "none", "local": {"block": 64}},
                "layers": {"include": ["*mlp*"], "exclude": []},
            },
            "engine": {"profiles": {"only": {"sequence": [1, 8, 16], "past": [0, 0, 0]}}, "dense": False},
            "verify": {"text": {"path": "text.txt"}, "max_perplexity_ratio": 1.25, "samples": 7},
        },
    )
    text = explain(recipe)
    for part in (
        "recipe: For the test",
        "m.gguf, dequantised to fp16 once (not there yet); tokenizer from",
        "4 × 100 = 400 tokens",
        "writes itself at temperature 0.7",
        "keep 1 of every 8",
        "RIA",
        "*mlp*; device",
        "swap inside blocks of 64",
        "sparse only",
        "sequence 1 to 16, best 8; past 0",
        "7 windows of 512",
        "fails above 1.25",
        "model recipe, backend auto",
    ):
        assert part in text, f"{part!r} not in\n{text}"


@pytest.mark.parametrize(
    ("engine", "text"),
    [
        ({}, "2:4 layers in the Sparse-GEMM plugin where that is faster, TensorRT"),
        ({"sparse_gemm": "plugin", "plugin_library": "p.so"}, "packed layers in the Sparse-GEMM plugin ("),
        ({"sparse_gemm": "native"}, "2:4 layers in TensorRT's own kernels, TensorRT"),
        ({"sparse_gemm": "dense"}, "no kernels for sparse weights, TensorRT"),
        ({"table": "h100.json"}, "h100.json, TensorRT"),
    ],
)
def test_the_explanation_of_what_multiplies(tmp_path: Path, engine: dict, text: str) -> None:
    assert text in explain(load(tmp_path, {"engine": engine}))


def test_an_unknown_kind_of_kernel_is_an_error(tmp_path: Path) -> None:
    valid = r"`engine\.sparse_gemm`: unknown value \(valid: auto, plugin, native, dense\)"
    with pytest.raises(EsparseError, match=valid):
        load(tmp_path, {"engine": {"sparse_gemm": "always"}})


def test_the_traffic_in_words(tmp_path: Path) -> None:
    traffic = [{"batch": 1, "weight": 3}, {"batch": 64, "prompt": 2048, "generated": 256}]
    text = explain(load(tmp_path, {"traffic": traffic}))
    assert "75% batch 1, prompt 512, 128 generated; 25% batch 64, prompt 2048, 256 generated" in text


@pytest.mark.parametrize(
    ("traffic", "words"),
    [
        ([], "traffic"),
        ([{"batch": 0}], "traffic.0.batch"),
        ([{"weight": 0}], "traffic.0.weight"),
        ([{"promt": 512}], "did you mean `prompt`"),
        ({"batch": 1}, "traffic"),
    ],
)
def test_traffic_that_is_none_is_an_error(tmp_path: Path, traffic, words: str) -> None:
    with pytest.raises(EsparseError, match=re.escape(words)):
        load(tmp_path, {"traffic": traffic})


def test_the_explanation_of_what_is_left_out(tmp_path: Path) -> None:
    recipe = load(
        tmp_path,
        {"engine": {"flavour": "none"}, "prune": {"permute": {"global": "none", "local": None}}},
    )
    text = explain(recipe)
    assert "none is built" in text and "prefill" not in text
    assert "channels stay in their order" in text and "there is no perplexity" in text
