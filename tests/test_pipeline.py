"""The build as a whole: order, resumption, ownership of the folder, gates."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

import pytest
import yaml

from esparse_trt import pipeline
from esparse_trt.artifacts import BuildDir, load_manifest, sha256_file
from esparse_trt.errors import CheckFailed, EsparseError
from esparse_trt.recipe import load_recipe


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tiny_recipe: Path) -> BuildDir:
    folder = tmp_path_factory.mktemp("out") / "tiny"
    pipeline.build(tiny_recipe, folder)
    return BuildDir(folder)


@pytest.fixture
def build_copy(built: BuildDir, tmp_path: Path) -> BuildDir:
    shutil.copytree(built.root, tmp_path / "copy")
    return BuildDir(tmp_path / "copy")


def changed(recipe: Path, tmp_path: Path, section: str, **values: object) -> Path:
    """A copy of a recipe, of the same name, with some values of one section replaced."""
    data = yaml.safe_load(recipe.read_text())
    data.setdefault(section, {}).update(values)
    path = tmp_path / "changed" / recipe.name
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(data))
    return path


def test_every_promised_file_is_there(built: BuildDir):
    for name in (
        "checkpoint", "permutation.safetensors", "onnx/dense.onnx", "onnx/explicit.onnx", "onnx/sparse.onnx",
        "fold_plan.json", "certificate.json", "report.html", "report.json", "model_repository",
    ):  # fmt: skip
        assert (built.root / name).exists(), name
    assert tuple(load_manifest(built).stages) == pipeline.STAGE_NAMES
    assert not list(built.root.rglob("*.tmp")), "temporary files were left"
    assert not built.journal.exists()


def test_a_finished_build_is_not_done_again(build_copy: BuildDir, tiny_recipe: Path):
    before = build_copy.manifest.read_bytes()
    pipeline.build(tiny_recipe, build_copy.root)
    assert (
        load_manifest(build_copy).stages == type(load_manifest(build_copy)).model_validate_json(before).stages
    )


def test_a_lost_file_is_made_again_with_the_same_bytes(build_copy: BuildDir, tiny_recipe: Path):
    before = sha256_file(build_copy.sparse_onnx)
    build_copy.sparse_onnx.unlink()
    pipeline.build(tiny_recipe, build_copy.root)
    assert sha256_file(build_copy.sparse_onnx) == before


def test_another_recipe_is_refused_by_key(build_copy: BuildDir, tiny_recipe: Path, tmp_path: Path):
    other = changed(tiny_recipe, tmp_path, "calibration", samples=4)
    with pytest.raises(EsparseError, match=r"calibration\.samples"):
        pipeline.build(other, build_copy.root)


def test_a_later_section_may_change_with_from(build_copy: BuildDir, tiny_recipe: Path, tmp_path: Path):
    other = changed(tiny_recipe, tmp_path, "report", title="Another title")
    with pytest.raises(EsparseError, match=r"report\.title"):
        pipeline.build(other, build_copy.root)
    pruned = load_manifest(build_copy).stages["prune"]
    pipeline.build(other, build_copy.root, first="report")
    assert "Another title" in build_copy.report_html.read_text()
    assert load_manifest(build_copy).stages["prune"] == pruned


def test_to_stops_and_the_next_run_goes_on(tiny_recipe: Path, tmp_path: Path):
    folder = tmp_path / "out"
    assert tuple(pipeline.build(tiny_recipe, folder, last="export").stages) == ("prune", "export")
    assert not BuildDir(folder).sparse_onnx.exists()
    assert tuple(pipeline.build(tiny_recipe, folder, last="fold").stages) == ("prune", "export", "fold")


def test_fresh_deletes_only_a_build_of_ours(build_copy: BuildDir, tiny_recipe: Path, tmp_path: Path):
    stranger = tmp_path / "photos"
    stranger.mkdir()
    (stranger / "cat.jpg").write_bytes(b"cat")
    for fresh in (False, True):
        with pytest.raises(EsparseError, match=r"cat\.jpg"):
            pipeline.build(tiny_recipe, stranger, fresh=fresh)
    assert [path.name for path in stranger.iterdir()] == ["cat.jpg"]
    (build_copy.root / "left_over").touch()
    pipeline.build(tiny_recipe, build_copy.root, fresh=True, last="prune")
    assert not (build_copy.root / "left_over").exists()
    assert not build_copy.report_html.exists()


def test_two_builds_at_once_are_refused(tiny_recipe: Path, tmp_path: Path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(EsparseError, match="another esparse-trt process"):
            pipeline.build(tiny_recipe, tmp_path)


def test_the_quality_gate_fails_the_build_and_keeps_everything(
    build_copy: BuildDir, tiny_recipe: Path, tmp_path: Path
):
    strict = changed(tiny_recipe, tmp_path, "verify", max_perplexity_ratio=0.01)
    shutil.rmtree(build_copy.model_repository)
    with pytest.raises(CheckFailed, match=r"0\.01"):
        pipeline.build(strict, build_copy.root, first="verify")
    assert build_copy.report_html.exists()
    assert build_copy.sparse_onnx.exists()
    assert not build_copy.model_repository.exists(), "a model that failed its gate is not deployed"


def test_stages_can_be_called_one_by_one(tiny_recipe: Path, tmp_path: Path):
    from esparse_trt.sparsity.prune import prune

    recipe, folder = load_recipe(tiny_recipe), BuildDir(tmp_path / "alone")
    folder.root.mkdir()
    record = prune(recipe, folder)
    assert record.pruned_parameters > 0
    assert (folder.checkpoint / "model.safetensors").exists()


def test_an_unwritable_folder(tiny_recipe: Path, tmp_path: Path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(EsparseError, match="cannot write here"):
        pipeline.build(tiny_recipe, tmp_path / "file" / "out")


def test_unknown_stage(tiny_recipe: Path, tmp_path: Path):
    with pytest.raises(EsparseError, match="prunes"):
        pipeline.build(tiny_recipe, tmp_path / "out", first="prunes")
