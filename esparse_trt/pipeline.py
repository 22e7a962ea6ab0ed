"""`build`: the ordered list of stages, run in one folder that can be resumed.

This is the only module that imports all stages. Each stage reads its recipe section and the records of the
stages before it, writes its files and returns a record; records go into `build.json` as soon as a stage is
done, so a killed build starts again at the stage (and, while pruning, at the block) where it stopped.
"""

from __future__ import annotations

import errno
import fcntl
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from esparse_trt import system
from esparse_trt.artifacts import (
    BuildDir,
    CertifyRecord,
    DeployRecord,
    EngineRecord,
    ExportRecord,
    FoldRecord,
    Manifest,
    PruneRecord,
    Record,
    ReportRecord,
    StageEntry,
    VerifyRecord,
    load_manifest,
    write_atomic,
)
from esparse_trt.deploy.triton import deploy
from esparse_trt.engine.build import build_engines
from esparse_trt.errors import EsparseError
from esparse_trt.evaluate.compare import check_fidelity, check_gate, verify
from esparse_trt.evaluate.report import report
from esparse_trt.graph.certify import certify
from esparse_trt.graph.export import export
from esparse_trt.graph.fold import fold
from esparse_trt.progress import note
from esparse_trt.recipe import Recipe, load_recipe
from esparse_trt.sparsity.prune import prune


@dataclass(frozen=True)
class Stage:
    """One stage: what it reads from the recipe, what it leaves in the folder, and the call that does it."""

    name: str
    does: str
    sections: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Callable[[Recipe, BuildDir, Manifest], Record]


def _prune(recipe: Recipe, folder: BuildDir, done: Manifest) -> PruneRecord:
    return prune(recipe, folder)


def _export(recipe: Recipe, folder: BuildDir, done: Manifest) -> ExportRecord:
    return export(recipe, folder, done.record("prune", PruneRecord))


def _fold(recipe: Recipe, folder: BuildDir, done: Manifest) -> FoldRecord:
    return fold(recipe, folder, done.record("export", ExportRecord))


def _certify(recipe: Recipe, folder: BuildDir, done: Manifest) -> CertifyRecord:
    return certify(recipe, folder, done.record("prune", PruneRecord), done.record("export", ExportRecord))


def _engine(recipe: Recipe, folder: BuildDir, done: Manifest) -> EngineRecord:
    return build_engines(recipe, folder, done.record("export", ExportRecord))


def _verify(recipe: Recipe, folder: BuildDir, done: Manifest) -> VerifyRecord:
    pruned = done.record("prune", PruneRecord)
    exported = done.record("export", ExportRecord)
    return verify(recipe, folder, pruned, exported, done.record("engine", EngineRecord))


def _report(recipe: Recipe, folder: BuildDir, done: Manifest) -> ReportRecord:
    return report(recipe, folder, done)


def _deploy(recipe: Recipe, folder: BuildDir, done: Manifest) -> DeployRecord:
    return deploy(recipe, folder, done.record("export", ExportRecord), done.record("engine", EngineRecord))


STAGES = (
    Stage("prune", "calibrate, permute and prune, block by block", ("model", "calibration", "prune"),
          ("checkpoint", "permutation"), _prune),
    Stage("export", "trace once, write dense.onnx and explicit.onnx", ("export",),
          ("dense_onnx", "explicit_onnx"), _export),
    Stage("fold", "fold permutations into adjacent layers", (), ("sparse_onnx", "fold_plan"), _fold),
    Stage("certify", "check every sparse tensor in true K order", (), ("certificate",), _certify),
    Stage("engine", "build TensorRT engines", ("engine",), (), _engine),
    Stage("verify", "compare dense and sparse, and the toolchain with PyTorch", ("verify",), (), _verify),
    Stage("report", "write the accuracy-diff report", ("report",), ("report_html", "report_json"), _report),
    Stage("deploy", "write the Triton model repository", ("deploy",), ("model_repository",), _deploy),
)  # fmt: skip
STAGE_NAMES = tuple(stage.name for stage in STAGES)


def build(
    recipe: Recipe | Path | str,
    out: Path | str | None = None,
    *,
    fresh: bool = False,
    first: str | None = None,
    last: str | None = None,
) -> Manifest:
    """Run a recipe from a dense model to a verified, deployable sparse one.

    Args:
        recipe: a recipe or the path of one.
        out: build folder; default `build/<recipe name>`.
        fresh: delete an earlier build in that folder first.
        first: run this stage and those after it again, even if they are finished.
        last: stop after this stage.

    Returns:
        the manifest, with one record per finished stage.

    Raises:
        EsparseError: bad input, or the folder belongs to another recipe.
        CheckFailed: a certificate, the fidelity check or the quality gate failed; all artifacts are kept.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    folder = BuildDir(out if out is not None else Path("build") / recipe.name)
    begin, end = _index(first, 0), _index(last, len(STAGES) - 1)
    with _owned(folder):
        manifest = _open(recipe, folder, fresh, first)
        for number, stage in enumerate(STAGES[: end + 1]):
            if (first is None or number < begin) and _finished(stage, folder, manifest):
                note(f"[dim]{stage.name:8} already done[/]", stage=stage.name, status="resumed")
            else:
                manifest = _run(stage, recipe, folder, manifest)
            if stage.name == "report":  # only now, so that a failed build has a report that says why
                verified = manifest.record("verify", VerifyRecord)
                check_fidelity(verified)
                check_gate(verified)
    return manifest


def _index(stage: str | None, default: int) -> int:
    if stage is None:
        return default
    if stage not in STAGE_NAMES:
        raise EsparseError(f"no stage is called {stage!r}", fix=f"choose one of {', '.join(STAGE_NAMES)}")
    return STAGE_NAMES.index(stage)


def _finished(stage: Stage, folder: BuildDir, manifest: Manifest) -> bool:
    return stage.name in manifest.stages and all(getattr(folder, name).exists() for name in stage.outputs)


def _run(stage: Stage, recipe: Recipe, folder: BuildDir, manifest: Manifest) -> Manifest:
    """Run one stage and store its record; records of later stages described older inputs and go."""
    note(f"[bold]{stage.name:8}[/] {stage.does}", stage=stage.name, status="started")
    system.reset_peak_rss()
    start = time.monotonic()
    try:
        record = stage.run(recipe, folder, manifest)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder.root).free
        raise EsparseError(
            f"the disk is full ({free / 2**20:.0f} MiB left) in stage `{stage.name}`",
            where=folder.root,
            fix="make room and run the same command again: it resumes; --dry-run prints what a build needs",
        ) from error
    entry = StageEntry(
        seconds=round(time.monotonic() - start, 3),
        peak_rss_bytes=system.peak_rss_bytes(),
        finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        record=record.model_dump(mode="json"),
    )
    earlier = STAGE_NAMES[: STAGE_NAMES.index(stage.name)]
    stages = {name: manifest.stages[name] for name in earlier if name in manifest.stages}
    manifest = manifest.model_copy(update={"stages": {**stages, stage.name: entry}})
    write_atomic(folder.manifest, manifest.model_dump_json(indent=1))
    note(
        f"         {entry.seconds:.1f} s, peak {entry.peak_rss_bytes / 2**30:.2f} GiB",
        stage=stage.name, status="finished", seconds=entry.seconds, peak_rss_bytes=entry.peak_rss_bytes,
    )  # fmt: skip
    return manifest


# --- the folder ----------------------------------------------------------------------------------------


@contextmanager
def _owned(folder: BuildDir) -> Iterator[None]:
    """Make the folder and hold its lock, so that two builds never write into it at once."""
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        lock = (folder.root / ".lock").open("w")
    except OSError as error:
        raise EsparseError(
            f"cannot write here: {error.strerror}",
            where=folder.root,
            fix="choose a writable folder with --out",
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EsparseError(
                "another esparse-trt process is building here",
                where=folder.root,
                fix="wait for it, or use --out",
            ) from error
        yield


def _open(recipe: Recipe, folder: BuildDir, fresh: bool, first: str | None) -> Manifest:
    """The folder's manifest: a new one, the one to resume, or an error if it is not ours."""
    if fresh:
        _clear(folder)
    if first == STAGE_NAMES[0]:
        shutil.rmtree(folder.journal, ignore_errors=True)
    old = load_manifest(folder)
    new = Manifest(
        version=system.package_version("esparse-trt") or "source tree",
        recipe=recipe.canonical(),
        fingerprint=recipe.fingerprint(),
        environment=system.environment(),
    )
    if old is None:
        strangers = [path.name for path in folder.root.iterdir() if path.name != ".lock"]
        if strangers:
            raise EsparseError(
                f"the folder is not empty and no build of ours (it holds {', '.join(sorted(strangers)[:5])})",
                where=folder.root,
                fix="choose another folder with --out",
            )
    elif old.fingerprint == new.fingerprint:
        new = new.model_copy(update={"stages": old.stages})
    else:
        new = _adopt(old, new, folder, first)
    write_atomic(folder.manifest, new.model_dump_json(indent=1))
    return new


def _adopt(old: Manifest, new: Manifest, folder: BuildDir, first: str | None) -> Manifest:
    """Accept a changed recipe only if every change concerns stages that `--from` runs again."""
    changed = sorted(_differences(old.recipe, new.recipe))
    reread = {section for stage in STAGES[_index(first, len(STAGES)) :] for section in stage.sections}
    harmless = {"name", "description"}
    if not all(key.split(".")[0] in reread | harmless for key in changed):
        owner = next(
            (s.name for s in STAGES if {k.split(".")[0] for k in changed} & set(s.sections)), "prune"
        )
        raise EsparseError(
            f"the folder belongs to another recipe (different: {', '.join(changed[:6])})",
            where=folder.root,
            fix=f"use --out for a new folder, --from {owner} to redo what changed, or --fresh to start over",
        )
    return new.model_copy(update={"stages": old.stages})


def _differences(a: object, b: object, prefix: str = "") -> Iterator[str]:
    """Dotted keys at which two canonical recipes differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            yield from _differences(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)
    elif a != b:
        yield prefix


def _clear(folder: BuildDir) -> None:
    """Delete an earlier build of ours, and nothing else."""
    if not any(folder.root.iterdir()):
        return
    if not folder.manifest.exists() and {path.name for path in folder.root.iterdir()} != {".lock"}:
        raise EsparseError(
            "no build of ours lies here, so --fresh deletes nothing",
            where=folder.root,
            fix="use another --out",
        )
    for path in folder.root.iterdir():
        if path.name == ".lock":
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
