"""The accuracy-diff report: one self-contained page for people, and the same facts as JSON for machines.

Both are made from the manifest alone (and `ablation.json` and `bench.json`, where they are), so a report can
be written again at any time. What a partial build lacks is named as missing; nothing is filled in.
"""

from __future__ import annotations

from math import exp
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from esparse_trt.artifacts import BuildDir, Manifest, load_manifest, write_atomic
from esparse_trt.errors import EsparseError
from esparse_trt.evaluate.ablation import Ablation, load_ablation
from esparse_trt.evaluate.bench_record import Bench, load_bench
from esparse_trt.evaluate.page import render
from esparse_trt.evaluate.verify_record import Comparison, TaskLevel, VerifyRecord
from esparse_trt.recipe import Recipe, parse_recipe
from esparse_trt.records import (
    CertifyRecord,
    DeployRecord,
    EngineRecord,
    ExportRecord,
    FoldRecord,
    LayerRecord,
    PackRecord,
    PruneRecord,
    Record,
    ReportRecord,
)

NEEDED = ("prune", "export", "fold", "pack", "certify", "engine", "verify")  # `deploy` runs after the report

R = TypeVar("R", bound=Record)


class Headline(Record):
    """The figures that decide. Null means that the stage which measures it has not run or was skipped."""

    dense_perplexity: float | None = None
    sparse_perplexity: float | None = None
    perplexity_ratio: float | None = Field(None, description="sparse / dense")
    perplexity_ratio_ci95: tuple[float, float] | None = Field(
        None, description="95 % confidence interval of the ratio, paired over evaluation windows"
    )
    kl_divergence: float | None = Field(None, description="mean KL(dense || sparse), nats per token")
    top1_agreement: float | None = Field(None, description="share of positions with the same first token")
    layers: int | None = Field(None, description="linear layers of the model")
    layers_pruned: int | None = None
    weights_pruned: float | None = Field(
        None, description="zeros in the linear layers / weights in the linear layers"
    )
    parameters_pruned: float | None = Field(None, description="the same zeros / all parameters of the model")
    dense_onnx_bytes: int | None = Field(None, description="dense.onnx with its external data")
    sparse_onnx_bytes: int | None = Field(
        None, description="sparse.onnx with its external data: zeros included"
    )
    packed_onnx_bytes: int | None = Field(
        None, description="packed.onnx with its external data; null where nothing could be packed"
    )
    certified_tensors: int | None = None
    decode_speedup: float | None = Field(
        None, description="dense / sparse time of a token at the smallest batch and prompt measured"
    )
    prefill_speedup: float | None = Field(
        None, description="dense / sparse time to the first token at the smallest batch, longest prompt"
    )
    weight_saving: float | None = Field(
        None, description="share of the model's weight bytes on the GPU that is gone"
    )
    fidelity_passed: bool | None = None
    gate_passed: bool | None = Field(None, description="null also when the recipe sets no quality gate")


class LayerRow(LayerRecord):
    """A linear layer: what pruning did to it, and how far its output moved."""

    error: Comparison | None = Field(description="output of the layer, dense against sparse")


class StageTime(Record):
    """What a stage cost."""

    seconds: float
    peak_rss_bytes: int
    finished: str = Field(description="ISO 8601, UTC")


class Report(Record):
    """`report.json`. `headline` and `layers` are derived; the records after them are those of the stages."""

    schema_version: Literal[1]
    title: str
    description: str
    version: str = Field(description="esparse-trt that built it")
    fingerprint: str = Field(description="SHA-256 of the canonical recipe")
    recipe: dict[str, Any] = Field(description="canonical form, all defaults filled in")
    environment: dict[str, str]
    headline: Headline
    layers: list[LayerRow] = Field(description="every linear layer, in model order")
    stages: dict[str, StageTime]
    missing: list[str] = Field(description="stages that have not run: what they would report is absent below")
    prune: PruneRecord | None
    export: ExportRecord | None
    fold: FoldRecord | None
    pack: PackRecord | None
    certify: CertifyRecord | None
    engine: EngineRecord | None
    verify: VerifyRecord | None
    deploy: DeployRecord | None
    ablation: Ablation | None
    bench: Bench | None


def report(recipe: Recipe, folder: BuildDir, manifest: Manifest) -> ReportRecord:
    """Write `report.html` and `report.json`.

    Raises:
        EsparseError: a record of the manifest, `ablation.json` or `bench.json` does not fit this version.
    """
    facts = assemble(recipe, folder, manifest)
    page = render(facts)
    write_atomic(folder.report_json, facts.model_dump_json(indent=1, by_alias=True) + "\n")
    write_atomic(folder.report_html, page)
    return ReportRecord(html=folder.report_html.name, json_file=folder.report_json.name)


def report_again(folder: Path) -> ReportRecord:
    """The report of a build folder as it stands.

    Raises:
        EsparseError: it is no build folder, or whatever `report` raises.
    """
    build = BuildDir(folder)
    manifest = load_manifest(build)
    if manifest is None:
        raise EsparseError("no build.json there", where=folder, fix="give the folder of a build")
    return report(parse_recipe(manifest.recipe, base=build.root, where=build.manifest), build, manifest)


def report_schema() -> dict[str, Any]:
    """JSON schema of `report.json`."""
    return Report.model_json_schema(mode="serialization")


def assemble(recipe: Recipe, folder: BuildDir, manifest: Manifest) -> Report:
    """Gather the facts of a build, finished or not."""
    pruned = _record(manifest, "prune", PruneRecord)
    exported = _record(manifest, "export", ExportRecord)
    folded = _record(manifest, "fold", FoldRecord)
    packed = _record(manifest, "pack", PackRecord)
    certified = _record(manifest, "certify", CertifyRecord)
    verified = _record(manifest, "verify", VerifyRecord)
    errors = {item.name: item for item in verified.layers} if verified else {}
    bench = load_bench(folder.bench)
    stages = {
        name: StageTime(**entry.model_dump(exclude={"record"})) for name, entry in manifest.stages.items()
    }
    return Report(
        schema_version=1,
        title=recipe.report.title or recipe.name,
        description=recipe.description,
        version=manifest.version,
        fingerprint=manifest.fingerprint,
        recipe=manifest.recipe,
        environment=manifest.environment,
        headline=Headline(
            **_headline(pruned, exported, folded, packed, certified, verified), **_speed(bench)
        ),
        layers=[
            LayerRow(**layer.model_dump(), error=errors.get(layer.name))
            for layer in (pruned.layers if pruned else [])
        ],
        stages=stages,
        missing=[name for name in NEEDED if name not in manifest.stages],
        prune=pruned,
        export=exported,
        fold=folded,
        pack=packed,
        certify=certified,
        engine=_record(manifest, "engine", EngineRecord),
        verify=verified,
        deploy=_record(manifest, "deploy", DeployRecord),
        ablation=load_ablation(folder.ablation),
        bench=bench,
    )


def _record(manifest: Manifest, stage: str, kind: type[R]) -> R | None:
    return manifest.record(stage, kind) if stage in manifest.stages else None


def _headline(
    pruned: PruneRecord | None,
    exported: ExportRecord | None,
    folded: FoldRecord | None,
    packed: PackRecord | None,
    certified: CertifyRecord | None,
    verified: VerifyRecord | None,
) -> dict[str, Any]:
    """The figures of whichever stages have run."""
    facts: dict[str, Any] = {}
    if pruned:
        weights = sum(layer.shape[0] * layer.shape[1] for layer in pruned.layers)
        zeros = sum(layer.shape[0] * layer.shape[1] * layer.sparsity for layer in pruned.layers)
        facts |= {
            "layers": len(pruned.layers),
            "layers_pruned": sum(layer.pattern is not None for layer in pruned.layers),
            "weights_pruned": zeros / weights if weights else None,
            "parameters_pruned": zeros / pruned.parameters,
        }
    if exported:
        facts["dense_onnx_bytes"] = exported.bytes["dense"]
    if folded:
        facts["sparse_onnx_bytes"] = folded.bytes
    if packed and packed.bytes:
        facts["packed_onnx_bytes"] = packed.bytes
    if certified:
        facts["certified_tensors"] = len(certified.tensors)
    if verified:
        facts["fidelity_passed"] = (
            all(check.passed for check in verified.fidelity) if verified.fidelity else None
        )
        facts["gate_passed"] = verified.gate_passed
        if task := verified.task:
            facts |= {
                "dense_perplexity": task.dense_perplexity,
                "sparse_perplexity": task.sparse_perplexity,
                "perplexity_ratio": task.ratio,
                "perplexity_ratio_ci95": _interval(task),
                "kl_divergence": task.kl_divergence,
                "top1_agreement": task.top1_agreement,
            }
    return facts


def _speed(bench: Bench | None) -> dict[str, Any]:
    """The figures of `bench.json`."""
    if bench is None or not bench.cells:
        return {}
    least = min(cell.batch for cell in bench.cells)
    row = [cell for cell in bench.cells if cell.batch == least]
    return {
        "decode_speedup": min(row, key=lambda cell: cell.prompt).decode_speedup,
        "prefill_speedup": max(row, key=lambda cell: cell.prompt).prefill_speedup,
        "weight_saving": bench.weight_saving,
    }


def _interval(task: TaskLevel) -> tuple[float, float] | None:
    """Confidence interval of the perplexity ratio, from that of its logarithm."""
    if task.ln_ratio_ci95 is None:
        return None
    return task.ratio * exp(-task.ln_ratio_ci95), task.ratio * exp(task.ln_ratio_ci95)
