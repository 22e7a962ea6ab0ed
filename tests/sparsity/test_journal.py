"""An interrupted run goes on where it stopped, and ends with the bytes of an uninterrupted one."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from esparse_trt.artifacts import BuildDir
from esparse_trt.errors import EsparseError
from esparse_trt.sparsity import prune as stage
from esparse_trt.sparsity.journal import Journal, pack, unpack
from esparse_trt.sparsity.prune import prune

# Runs the stage, and dies by SIGKILL instead of renaming the file whose name is given.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
recipe, build, fatal = sys.argv[1:]
rename = Path.replace
def replace(self, target):
    if Path(target).name == fatal:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.replace = replace
from esparse_trt.artifacts import BuildDir
from esparse_trt.recipe import Recipe
from esparse_trt.sparsity.prune import prune
prune(Recipe.model_validate_json(recipe), BuildDir(build))
"""


def files_of(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def run_until(fatal, recipe, folder):
    """Run the stage in a process that kills itself just before it would rename a file to `fatal`."""
    command = [sys.executable, "-c", KILLED, recipe.model_dump_json(by_alias=True), str(folder.root), fatal]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize("residual, update", [("gather", "none"), ("shared", "none"), ("gather", "obs")])
def test_kill_9_and_again(residual, update, make_model, make_recipe, tmp_path):
    path = make_model("llama")
    permute = {"local": {"block": 16}, "residual": residual}
    recipe = make_recipe(path, permute=permute, update={"method": update}, layers={"exclude": []})
    whole, killed = BuildDir(tmp_path / "whole"), BuildDir(tmp_path / "killed")
    record = prune(recipe, whole)

    run_until("block-00001.safetensors", recipe, killed)  # its hidden states are written, its masks are not
    journal = Journal(killed.journal)
    assert journal.done == 1 and not killed.checkpoint.exists()
    assert {f.name for f in killed.journal.glob("hidden-*")} == {
        "hidden-00000.safetensors", "hidden-00001.safetensors"
    }  # fmt: skip
    if residual == "gather" and update == "none":
        run_until("checkpoint", recipe, killed)  # all blocks and the head are done
        assert Journal(killed.journal).done == 3 and not killed.checkpoint.exists()

    assert prune(recipe, killed) == record
    assert files_of(killed.root) == files_of(whole.root)


def test_resuming_does_not_repeat_finished_blocks(make_model, make_recipe, tmp_path, monkeypatch):
    recipe, folder = make_recipe(make_model("llama")), BuildDir(tmp_path / "build")
    interrupt_after(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        prune(recipe, folder)
    monkeypatch.undo()
    steps = []
    step = stage.Pruner.step
    monkeypatch.setattr(stage.Pruner, "step", lambda self, index: steps.append(index) or step(self, index))
    prune(recipe, folder)
    assert steps == [1]


def interrupt_after(steps, monkeypatch):
    write = Journal.write

    def write_and_stop(self, step, result, streams):
        write(self, step, result, streams)
        if step + 1 == steps:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "write", write_and_stop)


@pytest.mark.parametrize(
    "change, key, was, becomes",
    [
        ({"prune": {"pattern": "1:4"}}, "prune.pattern", "'2:4'", "'1:4'"),
        ({"prune": {"score": {"alpha": 1.0}}}, "prune.score.alpha", "256.0", "1.0"),
        ({"calibration": {"samples": 4}}, "calibration.samples", "5", "4"),
        ({"model": None}, "model_sha256", "'", "'"),
        ({"text": None}, "calibration_sha256", "'", "'"),
    ],
)
def test_a_changed_recipe_is_refused(
    change, key, was, becomes, make_model, make_recipe, tmp_path, monkeypatch, sample_text
):
    recipe, folder = make_recipe(make_model("llama")), BuildDir(tmp_path / "build")
    interrupt_after(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        prune(recipe, folder)
    monkeypatch.undo()
    before = files_of(folder.root)
    ((section, values),) = change.items()
    if section == "model":
        recipe = make_recipe(make_model("qwen3"))
    elif section == "text":
        other = tmp_path / "other.txt"
        other.write_text(sample_text.read_text()[::-1])
        text = recipe.calibration.text.model_copy(update={"path": other})
        recipe = recipe.model_copy(
            update={"calibration": recipe.calibration.model_copy(update={"text": text})}
        )
    else:
        plain = recipe.model_dump(mode="json", by_alias=True)
        for name, value in values.items():
            old = plain[section][name]
            plain[section][name] = old | value if isinstance(old, dict) else value
        recipe = type(recipe).model_validate(plain)
    with pytest.raises(EsparseError, match="stopped after 1 steps") as error:
        prune(recipe, folder)
    assert f"{key} was {was}" in str(error.value) and f"is {becomes}" in str(error.value)
    assert "--fresh" in error.value.fix
    assert files_of(folder.root) == before, "the journal is left as it was"


def test_sampled_text_is_kept_for_the_resumed_run(make_model, make_recipe, tmp_path, monkeypatch):
    recipe, folder = make_recipe(make_model("llama")), BuildDir(tmp_path / "build")
    plain = recipe.model_dump(mode="json", by_alias=True)
    plain["calibration"] |= {"text": {"source": "self"}, "samples": 2, "length": 12}
    recipe = type(recipe).model_validate(plain)
    interrupt_after(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        prune(recipe, folder)
    monkeypatch.undo()
    tokens = load_file(folder.journal / "calibration.safetensors")["tokens"]
    assert tokens.shape == (2, 12)
    monkeypatch.setattr(stage, "token_windows", None)  # not sampled again
    assert prune(recipe, folder).calibration_tokens == 24


def test_recovery_is_resumed_too(make_model, make_recipe, tmp_path):
    recover = {"steps": 3, "distill": {"steps": 3, "batch_size": 2}}
    recipe = make_recipe(make_model("llama"), update={"method": "obs"}, recover=recover)
    whole, killed = BuildDir(tmp_path / "whole"), BuildDir(tmp_path / "killed")
    record = prune(recipe, whole)
    run_until("block-00001.safetensors", recipe, killed)
    assert Journal(killed.journal).done == 1
    run_until("checkpoint", recipe, killed)  # blocks and the whole model are trained
    assert Journal(killed.journal).distilled() is not None
    assert prune(recipe, killed) == record
    assert files_of(killed.root) == files_of(whole.root)


@pytest.mark.parametrize("shape", [(3, 8), (5, 4), (1, 12), (7, 20)])
def test_packed_masks(shape):
    mask = torch.rand(shape) > 0.5
    assert torch.equal(unpack(pack(mask), shape), mask)
    assert pack(mask).numel() == -(-mask.numel() // 8)
