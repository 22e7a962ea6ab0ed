"""Bad input through the whole command: one error with file or key, value and fix; nothing is left behind."""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from esparse_trt.artifacts import sha256_file
from esparse_trt.cli import app
from esparse_trt.engine import flavour as flavours
from esparse_trt.engine import libraries
from esparse_trt.sparsity import journal, save

runner = CliRunner()
FULL = OSError(errno.ENOSPC, "No space left on device")


def run(*arguments: str | Path) -> tuple[int, str]:
    """Exit code, and what was printed, on one line."""
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, SystemExit | None), result.exc_info
    return result.exit_code, re.sub(r"\s+", " ", result.output)


def refused(*arguments: str | Path, code: int = 2) -> str:
    """The one error that a command ends with."""
    found, output = run(*arguments)
    assert found == code, output
    assert output.count("error:") == 1
    assert "fix:" in output
    assert "Traceback" not in output
    return output.partition("error: ")[2]


def tree(folder: Path) -> dict[str, str]:
    """Every file with its SHA-256."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}


class Case(NamedTuple):
    """A recipe, of which tests change single keys, and the folder that it builds in."""

    recipe: Path
    out: Path
    model: Path

    def set(self, **values: Any) -> None:
        """Change keys; `__` stands for the dot in a dotted key."""
        data = yaml.safe_load(self.recipe.read_text())
        for key, value in values.items():
            *sections, last = key.split("__")
            target = data
            for section in sections:
                target = target.setdefault(section, {})
            target[last] = value
        self.recipe.write_text(yaml.safe_dump(data))

    def edit_config(self, **values: Any) -> None:
        file = self.model / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    def edit_weight(self, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        file = self.model / "model.safetensors"
        weights = load_file(file)
        weights[name] = change(weights[name].clone()).contiguous()
        save_file(weights, file, {"format": "pt"})

    def prune(self) -> tuple[int, str]:
        return run("build", self.recipe, "--out", self.out, "--to", "prune")

    def refused(self) -> str:
        """The error of a build that leaves nothing behind."""
        error = refused("build", self.recipe, "--out", self.out)
        assert not self.out.exists(), tree(self.out)
        return error


@pytest.fixture
def case(tiny_recipe: Path, tiny_llama: Path, tmp_path: Path) -> Case:
    case = Case(tmp_path / "tiny.yaml", tmp_path / "build" / "tiny", tmp_path / "model")
    shutil.copyfile(tiny_recipe, case.recipe)
    shutil.copytree(tiny_llama, case.model)
    case.set(model__path=str(case.model), prune__permute={"local": None})  # quick
    return case


# --- the recipe ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["build"], ["build", "--dry-run"], ["ablate"], ["recipe", "check"]])
def test_a_recipe_that_is_missing_or_no_yaml(case: Case, command: list[str]):
    assert "nowhere.yaml: cannot read the recipe: No such file" in refused(*command, "nowhere.yaml")
    case.recipe.write_text("prune: {pattern: '2:4'\nmodel: [")
    assert f"{case.recipe}, line 2, column 1: not valid YAML" in refused(*command, case.recipe)
    case.recipe.write_bytes(b"\x7fELF\x02\xff")
    assert f"{case.recipe}: not UTF-8: byte 0xff at offset 5" in refused(*command, case.recipe)
    assert not (Path("build") / "tiny").exists()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"prune__patern": "2:4"}, ["unknown key `prune.patern`", "did you mean `pattern`?"]),
        ({"prume": {}}, ["unknown key `prume`", "did you mean `prune`?"]),
        ({"prune__score": {"method": "wonda"}}, ["`prune.score.method`", "'wonda'", "did you mean `wanda`?"]),
        ({"prune__pattern": "4:2"}, ["`prune.pattern`", "0 < n < m", "'4:2'"]),
        ({"calibration__samples": "many"}, ["`calibration.samples`", "'many'"]),
        ({"name": ".."}, ["`name`", "'..'"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_unknown_key_method_or_value(case: Case, change: dict[str, Any], parts: list[str]):
    case.set(**change)
    for error in (case.refused(), refused("ablate", case.recipe, "--out", case.out)):
        assert error.startswith(f"{case.recipe}: ")
        assert all(part in error for part in parts), error
    assert not case.out.exists()


def test_a_pattern_that_does_not_divide_k(case: Case):
    case.set(prune__pattern="3:7")
    error = case.refused()
    assert "model.layers.0.self_attn.q_proj" in error
    assert "64" in error
    assert "3:7" in error


def test_an_unknown_device(case: Case):
    case.set(prune__device="gpu")
    assert "prune.device: device 'gpu' cannot be used" in case.refused()


# --- the engine and its deployment -----------------------------------------------------------------------


@pytest.fixture
def rtx(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Case:
    """A machine with TensorRT-RTX alone, and no plugin library."""
    monkeypatch.setattr(flavours, "installed_version", {"tensorrt_rtx": "1.7.1"}.get)
    monkeypatch.setenv(libraries.VARIABLE, str(tmp_path))
    case.set(export__dtype="float16", engine__flavour="auto")
    return case


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"engine__flavour": "tensorrt"}, "engine.flavour: tensorrt: TensorRT is not installed"),
        (
            {"engine__sparse_gemm": "plugin"},
            f"engine.sparse_gemm: plugin: {libraries.VARIABLE}: {libraries.PLUGIN} was not found in ",
        ),
        (
            {"engine__sparse_gemm": "plugin", "export__dtype": "float32"},
            "engine.sparse_gemm: plugin: its kernels are for float16 and bfloat16, the model is float32",
        ),
        ({"engine__plugin_library": "/nowhere/lib.so"}, "/nowhere/lib.so: there is no such library"),
        ({"engine__table": "/nowhere.json"}, "engine.table: /nowhere.json: there is no such file"),
        ({"engine__table": __file__}, f"{__file__}: not a tuning table: "),
        (
            {"deploy__backend": "tensorrt"},
            "deploy.backend: tensorrt: cannot deploy an engine: the engines are",
        ),
        (
            {"deploy__max_batch_size": 99},
            "deploy.max_batch_size: 99 is larger than the largest batch of the profiles, 4",
        ),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) else "",
)
def test_what_a_late_stage_would_refuse_is_refused_before_pruning(
    rtx: Case, change: dict[str, Any], error: str
):
    rtx.set(**change)
    assert rtx.refused().startswith(error)
    assert rtx.prune()[0] == 0, "another machine may build the engines"


# --- the model -------------------------------------------------------------------------------------------


def test_model_files_that_are_missing(case: Case):
    weights = case.model / "model.safetensors"
    weights.rename(case.model / "pytorch_model.bin")
    assert "only pickled weights (pytorch_model.bin)" in case.refused()
    (case.model / "config.json").unlink()
    assert f"{case.model}: no config.json in the model folder" in case.refused()
    shutil.rmtree(case.model)
    assert f"{case.model}: the model folder does not exist" in case.refused()
    case.set(model__path=str(case.model / "model.gguf"))
    assert f"{case.model}/model.gguf: cannot read the GGUF file: No such file" in case.refused()


def test_a_shard_that_is_missing(case: Case):
    index = {"weight_map": dict.fromkeys(load_file(case.model / "model.safetensors"), "model-2.safetensors")}
    (case.model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"{case.model}/model-2.safetensors: this file of the model is missing" in case.refused()


def test_a_truncated_file(case: Case):
    file = case.model / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size - 100)
    error = case.refused()
    assert f"{file}: not a whole safetensors file ({size - 100} bytes, its header promises {size})" in error


def test_a_wrong_shape(case: Case):
    case.edit_weight("model.layers.1.mlp.up_proj.weight", lambda w: w[:-8])
    error = case.refused()
    assert (
        "'model.layers.1.mlp.up_proj.weight' has shape [120, 64], but config.json makes it [128, 64]" in error
    )


@pytest.mark.parametrize("command", ["build", "ablate"])
def test_nan_or_inf_in_a_weight(case: Case, command: str):
    def spoil(weight: torch.Tensor) -> torch.Tensor:
        weight[3, 5], weight[0, 0] = torch.nan, -torch.inf
        return weight

    case.edit_weight("model.layers.1.mlp.up_proj.weight", spoil)
    error = refused(command, case.recipe, "--out", case.out)
    assert (
        f"{case.model}: tensor 'model.layers.1.mlp.up_proj.weight' has 2 NaN or Inf of 8192 values" in error
    )
    assert not case.out.exists()


def test_activations_that_overflow(case: Case):
    case.edit_weight("model.layers.0.input_layernorm.weight", lambda w: w * 3e38)
    assert "NaN or Inf" in case.refused()
    case.set(prune__tokens="equal")  # no backward pass, which sees the outputs first
    error = case.refused()
    assert re.match(r"model\.layers\.0\.self_attn\.q_proj: .*NaN or Inf.*batch 0", error)


@pytest.mark.parametrize("command", ["build", "ablate"])
def test_a_tokenizer_of_another_model(case: Case, command: str):
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(400)}, unk_token="w0"))
    other = case.recipe.parent / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(other)
    case.set(model__tokenizer=str(other))
    error = refused(command, case.recipe, "--out", case.out)
    assert f"{other}: the tokenizer has 400 tokens but the model's vocab_size is 320" in error
    assert not case.out.exists()


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"model_type": "gpt2"}, "model type 'gpt2' is not supported fix: use one of bloom"),
        ({"model_type": "t5"}, "model type 't5' is not a causal language model"),
        ({"model_type": "frobnicator"}, "`frobnicator` but Transformers does not recognize"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_an_architecture_that_is_not_supported(case: Case, config: dict[str, Any], part: str):
    case.edit_config(**config)
    assert part in case.refused()
    assert part in refused("build", case.recipe, "--out", case.out, "--dry-run")


def test_a_rotary_embedding_that_cannot_be_exported_is_refused_before_pruning(case: Case):
    case.edit_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert "rotary embedding 'dynamic' changes with the length of the input" in case.refused()
    assert case.prune()[0] == 0


# --- texts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", ["calibration", "verify"])
def test_a_text_that_is_missing_empty_or_binary(case: Case, section: str):
    text = case.recipe.parent / "words.txt"
    case.set(**{f"{section}__text": {"source": "file", "path": str(text)}})
    assert f"{text}: cannot read the text: No such file" in case.refused()
    text.write_text(" \n\n")
    assert f"{text}: the text is empty" in case.refused()
    text.write_bytes(b"abc\xff")
    assert f"{text}: not UTF-8: byte 0xff at offset 3" in case.refused()


def test_a_calibration_text_that_is_too_short(case: Case):
    text = case.recipe.parent / "words.txt"
    text.write_text("A few words only.")
    case.set(calibration__text={"source": "file", "path": str(text)})
    error = case.refused()
    assert re.search(rf"{text}: the text of calibration has \d+ tokens; 8 samples of 32 need 248", error)
    assert "calibration.samples" in error


# --- the disk --------------------------------------------------------------------------------------------


def test_too_little_space_is_found_before_pruning(case: Case, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(case.model)._replace(free=4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    error = case.refused()
    assert f"{case.out}: pruning needs 0.00 GiB of disk space and 0.00 GiB are free" in error


def full_while_copying(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up half-way through the checkpoint."""

    def copy(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes()[:100])
        raise FULL

    monkeypatch.setattr(save.shutil, "copyfile", copy)


def full_in_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors has its own exception for a full disk, and may leave part of the file."""
    write = journal.save_file

    def fail(tensors: dict, path: Path, metadata: dict | None = None) -> None:
        if "block-00001" in path.name:
            path.write_bytes(b"part")
            raise SafetensorError("Error while serializing: No space left on device (os error 28)")
        write(tensors, path, metadata)

    monkeypatch.setattr(journal, "save_file", fail)


@pytest.mark.parametrize("fill", [full_while_copying, full_in_safetensors])
def test_a_disk_that_fills_up(case: Case, fill: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with monkeypatch.context() as patch:
        fill(patch)
        error = refused("build", case.recipe, "--out", case.out)
    assert re.match(rf"{case.out}: the disk is full \(\d+ MiB left\) fix: make room", error)
    assert {path.name for path in case.out.iterdir()} == {".lock", "build.json", "journal"}
    assert not list(case.out.rglob("*.tmp"))

    assert case.prune()[0] == 0
    resumed = tree(case.out / "checkpoint")
    assert run("build", case.recipe, "--out", tmp_path / "other", "--to", "prune")[0] == 0
    assert tree(tmp_path / "other" / "checkpoint") == resumed
    modes = {name: (case.out / name).stat().st_mode for name in ("permutation.safetensors", "build.json")}
    assert len(set(modes.values())) == 1, "safetensors makes files that only their owner may read"


# --- the build folder ------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written(case: Case, monkeypatch: pytest.MonkeyPatch):
    (case.recipe.parent / "file").write_text("mine")
    inside = case.recipe.parent / "file" / "out"
    assert f"{inside}: cannot write here: Not a directory" in refused("build", case.recipe, "--out", inside)
    assert (case.recipe.parent / "file").read_text() == "mine"

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(case.out))

    with monkeypatch.context() as patch:  # root may write anywhere
        patch.setattr(Path, "mkdir", refuse)
        assert f"{case.out}: cannot write here: Permission denied" in case.refused()
    with monkeypatch.context() as patch:
        patch.setattr(save.shutil, "copyfile", refuse)
        error = refused("build", case.recipe, "--out", case.out)
    assert f"{case.out}: the system says: Permission denied" in error


def test_a_folder_of_somebody_else(case: Case):
    case.out.mkdir(parents=True)
    (case.out / "cat.jpg").write_bytes(b"cat")
    for options in ([], ["--fresh"], ["--dry-run"]):
        error = refused("build", case.recipe, "--out", case.out, *options)
        assert f"{case.out}: the folder is not empty and no build of ours (it holds cat.jpg)" in error
    assert tree(case.out).keys() == {"cat.jpg"}


def test_a_folder_of_another_recipe(case: Case):
    assert case.prune()[0] == 0
    before = tree(case.out)
    case.set(calibration__samples=4)
    for options in ([], ["--dry-run"], ["--from", "export"]):
        error = refused("build", case.recipe, "--out", case.out, *options)
        assert f"{case.out}: the folder belongs to another recipe" in error
        assert "calibration.samples was 8 and is 4" in error
    assert "belongs to another recipe" in refused("ablate", case.recipe, "--out", case.out)
    assert tree(case.out) == before


def test_a_killed_run_is_not_resumed_with_a_changed_recipe(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    write = journal.Journal.write

    def stop(self: journal.Journal, step: int, *rest: Any) -> None:
        if step == 1:
            raise KeyboardInterrupt
        write(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "write", stop)
        code, output = case.prune()
    assert code == 130
    assert "the same command resumes" in output
    before = tree(case.out)
    assert "journal/block-00000.safetensors" in before

    original = case.recipe.read_text()
    case.set(prune__score={"method": "wanda"})
    error = refused("build", case.recipe, "--out", case.out)
    assert "prune.score.method was 'e_sparse' and is 'wanda'" in error
    assert "--fresh" in error
    assert tree(case.out) == before

    case.recipe.write_text(original)
    code, output = case.prune()
    assert code == 0
    assert "pruning resumes after 1 of 2 steps" in output
    run("build", case.recipe, "--out", tmp_path / "other", "--to", "prune")
    assert tree(case.out / "checkpoint") == tree(tmp_path / "other" / "checkpoint")


def test_a_corrected_recipe_may_use_the_folder_of_its_failed_build(case: Case):
    case.out.mkdir(parents=True)
    good = case.recipe.read_text()
    case.set(calibration__samples=10_000)
    refused("build", case.recipe, "--out", case.out)
    assert not list(case.out.iterdir())
    case.edit_weight("model.layers.0.input_layernorm.weight", lambda w: w * 3e38)
    case.recipe.write_text(good)
    assert "NaN or Inf" in refused("build", case.recipe, "--out", case.out)
    assert not list(case.out.iterdir())
    case.edit_weight("model.layers.0.input_layernorm.weight", lambda w: w / 3e38)
    case.set(calibration__samples=4)
    assert case.prune()[0] == 0


def test_a_build_json_that_is_damaged_or_of_another_version(case: Case):
    assert case.prune()[0] == 0
    manifest = case.out / "build.json"
    data = json.loads(manifest.read_text())
    data["stages"]["prune"]["record"]["layers"] = "all"
    manifest.write_text(json.dumps(data))
    error = refused("report", case.out)
    assert "the record of stage `prune` is not one that this version understands" in error
    assert "--from prune" in error
    data["recipe"]["prune"]["patterns"] = data["recipe"]["prune"].pop("pattern")
    manifest.write_text(json.dumps(data))
    assert "unknown key `prune.patterns`" in refused("report", case.out)
    manifest.write_text(manifest.read_text()[:200])
    before = tree(case.out)
    for command in (["build", case.recipe, "--out"], ["report"], ["certify"]):
        assert f"{manifest}: not a manifest" in refused(*command, case.out)
    assert tree(case.out) == before


def test_stages_in_the_wrong_order(case: Case):
    error = refused("build", case.recipe, "--out", case.out, "--from", "verify", "--to", "prune")
    assert "--from verify starts after --to prune ends" in error
    assert not case.out.exists()


# --- results that fail a check ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gated(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose quality gate no pruned model passes."""
    data = yaml.safe_load(tiny_recipe.read_text())
    data["verify"]["max_perplexity_ratio"] = 0.01
    recipe = tmp_path_factory.mktemp("gated") / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(data))
    return recipe


@pytest.fixture(scope="module")
def failed_gate(gated: Path) -> Path:
    """Its build."""
    out = gated.parent / "out"
    refused("build", gated, "--out", out, code=1)
    return out


def test_a_quality_gate_names_the_report(gated: Path, failed_gate: Path):
    before = tree(failed_gate)
    error = refused("build", gated, "--out", failed_gate, code=1)
    assert re.match(r"verify.max_perplexity_ratio: perplexity rose .* the gate is 0.01 fix: ", error)
    assert f"{failed_gate}/report.html shows every figure" in error
    assert tree(failed_gate) == before
    assert {"onnx/sparse.onnx", "report.html"} <= before.keys()
    assert not (failed_gate / "model_repository").exists()


# --- other commands --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (["report"], "no build is named"),
        (["bench"], "give either a build or a shape"),
        (["tune"], "no layers are named"),
        (["tune", "--shape", "4096"], "--shape: '4096' is not a shape"),
        (["tune", "--shape", "64x48"], "there are no Sparse-GEMM kernels for [64, 48]: K = 48 is not"),
        (["tune", "--shape", "64x64", "--dtype", "int4"], "there are no Sparse-GEMM kernels for int4"),
        (
            ["bench", "--show", __file__],
            f"{__file__}: not a benchmark that this version understands: Invalid",
        ),
        (["table", __file__], f"{__file__}: not an ablation table that this version understands: Invalid"),
        (["table", "nowhere.json"], "nowhere.json: no ablation table there"),
        (["estimate"], "give a recipe or --shape"),
        (["estimate", "--shape", "llama-7"], "no model shape is called 'llama-7'"),
        (["estimate", "--shape", "llama-7b", "--gpu", "h1"], "--gpu: no GPU is called 'h1' here"),
        (["estimate", "--shape", "llama-7b", "--table", "gone.json"], "gone.json: cannot read the table: No"),
    ],
    ids=" ".join,
)
def test_arguments_are_checked_before_the_machine(command: list[str], error: str):
    assert error in refused(*command)


def test_a_grid_that_is_missing_or_a_recipe(case: Case):
    out = ["--out", case.out, "--grid"]
    assert "gone.yaml: cannot read the grid: No such file" in refused(
        "ablate", case.recipe, *out, "gone.yaml"
    )
    error = refused("ablate", case.recipe, *out, case.recipe)
    assert error.startswith("variant 'calibration': ") and "unknown key `batch_size`" in error
    assert not case.out.exists()


# --- certify ---------------------------------------------------------------------------------------------


def test_certify_a_file(tmp_path: Path):
    file = tmp_path / "w.safetensors"
    sparse = torch.tensor([[1.0, 2, 0, 0], [0, 3, 0, 4]])
    save_file({"mlp.weight": sparse, "o.weight": torch.tensor([[1.0, 0, 2, 0], [1, 0, 2, 3]])}, file)
    error = refused("certify", file, code=1)
    assert f"{file}: tensor 'o.weight' is not 2:4 along K: row 1, group 0" in error
    assert "[1, 0, 2, 3]" in error
    assert run("certify", file, "--tensors", "mlp*")[0] == 0
    assert run("certify", file, "--pattern", "3:4")[0] == 0
    assert "no 2-D weight is called 'attn*'" in refused("certify", file, "--tensors", "attn*")
    assert "4:2" in refused("certify", file, "--pattern", "4:2")
    file.write_bytes(file.read_bytes()[:-4])
    assert f"{file}: not a whole safetensors file" in refused("certify", file)
    (tmp_path / "w.onnx").write_bytes(b"no ONNX")
    assert "w.onnx" in refused("certify", tmp_path / "w.onnx")
    assert "gone.onnx" in refused("certify", tmp_path / "gone.onnx")


def test_certify_a_build_that_was_tampered_with(failed_gate: Path):
    code, output = run("certify", failed_gate)
    assert code == 0
    assert f"42 tensors are 2:4 along K: {failed_gate}" in output
    code, output = run("certify", failed_gate, "--json")
    assert len(json.loads(output)["tensors"]) == 42

    file = failed_gate / "checkpoint" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"] += 1
    save_file(weights, file, {"format": "pt"})
    error = refused("certify", failed_gate, code=1)
    assert "tensor 'model.layers.1.mlp.up_proj.weight' is not 2:4 along K" in error
    weights["model.layers.1.mlp.up_proj.weight"] *= 0  # still sparse, but not what was certified
    save_file(weights, file, {"format": "pt"})
    assert f"{file}: this is not the file that was certified" in refused("certify", failed_gate, code=1)
