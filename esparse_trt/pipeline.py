"""`build`: the ordered list of stages, run in one folder that can be resumed.

This is the only module that imports all stages. Each stage reads its recipe section and the records of the
stages before it, writes its files and returns a record; records go into `build.json` as soon as a stage is
done, so a killed build starts again at the stage (and, while pruning, at the block) where it stopped.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from esparse_trt import system
from esparse_trt.artifacts import BuildDir, Manifest, StageEntry, write_atomic
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
from esparse_trt.records import (
    CertifyRecord,
    DeployRecord,
    EngineRecord,
    ExportRecord,
    FoldRecord,
    PruneRecord,
    Record,
    ReportRecord,
    VerifyRecord,
)
from esparse_trt.sparsity.prune import prune
from esparse_trt.workspace import claim


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
    begin, end = _index(first, len(STAGES)), _index(last, len(STAGES) - 1)
    reread = {section for stage in STAGES[begin:] for section in stage.sections}
    with claim(recipe, folder, fresh=fresh, redo=STAGE_NAMES[begin:], reread=reread) as manifest:
        for stage in STAGES[: end + 1]:
            if _finished(stage, folder, manifest):
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
