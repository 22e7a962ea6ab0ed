"""`build`: the ordered list of stages, run in one folder that can be resumed.

This is the only module that imports all stages. Each stage reads its recipe section and the records of the
stages before it, writes its files and returns a record; records go into `build.json` as soon as a stage is
done, so a killed build starts again at the stage (and, while pruning, at the block) where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import takewhile
from pathlib import Path

from esparse_trt import system, workspace
from esparse_trt.artifacts import BuildDir, Manifest, StageEntry, write_atomic
from esparse_trt.deploy.triton import choose_backend, deploy, max_batch_size
from esparse_trt.engine.build import build_engines
from esparse_trt.engine.source import require_usable
from esparse_trt.errors import CheckFailed, EsparseError
from esparse_trt.evaluate.compare import check_fidelity, check_gate, verify
from esparse_trt.evaluate.report import report
from esparse_trt.evaluate.verify_record import VerifyRecord
from esparse_trt.evaluate.zeroshot import load_tasks
from esparse_trt.graph.certify import certify
from esparse_trt.graph.export import export, require_exportable
from esparse_trt.graph.fold import fold
from esparse_trt.graph.pack import pack
from esparse_trt.progress import note
from esparse_trt.recipe import Recipe, load_recipe
from esparse_trt.records import (
    CertifyRecord,
    DeployRecord,
    EngineRecord,
    ExportRecord,
    FoldRecord,
    PackRecord,
    PruneRecord,
    Record,
    ReportRecord,
)
from esparse_trt.sparsity.prune import prune
from esparse_trt.text import require_readable


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


def _pack(recipe: Recipe, folder: BuildDir, done: Manifest) -> PackRecord:
    return pack(folder, done.record("export", ExportRecord))


def _certify(recipe: Recipe, folder: BuildDir, done: Manifest) -> CertifyRecord:
    return certify(recipe, folder, done.record("prune", PruneRecord), done.record("export", ExportRecord))


def _engine(recipe: Recipe, folder: BuildDir, done: Manifest) -> EngineRecord:
    packed = done.record("pack", PackRecord)
    return build_engines(recipe, folder, done.record("export", ExportRecord), packed)


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
    # No file of its own to look for: where nothing can be packed, none is written.
    Stage("pack", "compress 2:4 layers into SparseGemm operators", (), (), _pack),
    Stage("certify", "check every sparse tensor in true K order", (), ("certificate",), _certify),
    Stage("engine", "build TensorRT engines", ("traffic", "engine"), (), _engine),
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
        EsparseError: bad input, the folder belongs to another recipe, or a stage lacks what it needs here.
        CheckFailed: a certificate, the fidelity check or the quality gate failed; all artifacts are kept.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    folder = BuildDir(out if out is not None else Path("build") / recipe.name)
    stages, again = _extent(first, last)
    with workspace.claim(recipe, folder, fresh=fresh, **again) as manifest:
        _require_possible(recipe, {stage.name for stage in stages if not _finished(stage, folder, manifest)})
        for stage in stages:
            if _finished(stage, folder, manifest):
                note(f"{stage.name:8} already done", style="dim", stage=stage.name, status="resumed")
            else:
                manifest = _run(stage, recipe, folder, manifest)
            if stage.name == "report":  # only now, so that a failed build has a report that says why
                _check(manifest.record("verify", VerifyRecord), folder)
    return manifest


def preview(
    recipe: Recipe,
    folder: BuildDir,
    *,
    fresh: bool = False,
    first: str | None = None,
    last: str | None = None,
) -> list[tuple[Stage, bool]]:
    """The stages that `build` would go through, each with whether it is done already; nothing is written.

    Raises:
        EsparseError: no such stage, or the folder belongs to another recipe.
    """
    stages, again = _extent(first, last)
    manifest = workspace.preview(recipe, folder, fresh=fresh, **again)
    done = list(takewhile(lambda stage: _finished(stage, folder, manifest), stages))
    return [(stage, stage in done) for stage in stages]


def _require_possible(recipe: Recipe, ahead: set[str]) -> None:
    """Refuse now what a stage still ahead would refuse after hours of pruning."""
    if "prune" in ahead and "export" in ahead:
        require_exportable(recipe.model)
    if "verify" in ahead:
        require_readable(recipe.verify.text)
        if recipe.verify.zeroshot:
            load_tasks(recipe.verify.zeroshot)
    if "engine" in ahead:
        choice = require_usable(recipe)
        if "deploy" in ahead:
            max_batch_size(recipe)
            choose_backend(recipe.deploy.backend, choice.flavour, choice.version, choice.skipped)


def _extent(first: str | None, last: str | None) -> tuple[tuple[Stage, ...], dict[str, set[str]]]:
    """The stages up to `last`; and what runs again from `first` on, and the recipe sections it reads."""
    for name in (first, last):
        if name is not None and name not in STAGE_NAMES:
            raise EsparseError(f"no stage is called {name!r}", fix=f"choose one of {', '.join(STAGE_NAMES)}")
    begin = len(STAGES) if first is None else STAGE_NAMES.index(first)
    end = len(STAGES) if last is None else STAGE_NAMES.index(last) + 1
    if first is not None and begin >= end:
        raise EsparseError(
            f"--from {first} starts after --to {last} ends",
            fix=f"the order is {', '.join(STAGE_NAMES)}",
        )
    reread = {section for stage in STAGES[begin:] for section in stage.sections}
    return STAGES[:end], {"redo": set(STAGE_NAMES[begin:]), "reread": reread}


def _check(record: VerifyRecord, folder: BuildDir) -> None:
    """Raise a CheckFailed that points at the report if the fidelity check or the quality gate failed."""
    try:
        check_fidelity(record)
        check_gate(record)
    except CheckFailed as error:
        fix = f"{folder.report_html} shows every figure; {error.fix}"
        raise CheckFailed(error.what, where=error.where, fix=fix) from error


def _finished(stage: Stage, folder: BuildDir, manifest: Manifest) -> bool:
    """Whether the stage has run and its files are still there."""
    return stage.name in manifest.stages and all(getattr(folder, name).exists() for name in stage.outputs)


def _run(stage: Stage, recipe: Recipe, folder: BuildDir, manifest: Manifest) -> Manifest:
    """Run one stage and store its record; records of later stages described older inputs and go."""
    note(f"{stage.name:8} {stage.does}", style="bold", stage=stage.name, status="started")
    system.reset_peak_rss()
    start = time.monotonic()
    record = stage.run(recipe, folder, manifest)
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
