"""What the command line prints after a build: the figures that decide, and where everything lies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from esparse_trt.artifacts import Manifest
from esparse_trt.evaluate.verify_record import VerifyRecord
from esparse_trt.records import (
    CertifyRecord,
    DeployRecord,
    EngineRecord,
    FoldRecord,
    PackRecord,
    PruneRecord,
)


def print_summary(console: Console, manifest: Manifest, folder: Path) -> None:
    """Print one line per finished stage that has something to say."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for label, text in _rows(manifest, folder):
        table.add_row(label, Text(text))  # as it is: brackets, as in esparse-trt[rtx], are no markup
    console.print(table)


def _rows(manifest: Manifest, folder: Path) -> Iterator[tuple[str, str]]:
    done = manifest.stages
    if "prune" in done:
        yield "pruned", _pruned(manifest.record("prune", PruneRecord))
    if "fold" in done:
        folded = manifest.record("fold", FoldRecord)
        yield "folded", f"{folded.folded} permutations are free, {len(folded.kept)} stay as Gather"
    if "pack" in done:
        yield "packed", _packed(manifest.record("pack", PackRecord))
    if "certify" in done:
        certified = manifest.record("certify", CertifyRecord)
        yield "certified", f"{len(certified.tensors)} tensors are {certified.pattern} along K"
    if "engine" in done:
        yield "engines", _engines(manifest.record("engine", EngineRecord))
    if "verify" in done:
        yield from _verified(manifest.record("verify", VerifyRecord))
    if "report" in done:
        yield "report", str(folder / "report.html")
    if "deploy" in done:
        deployed = manifest.record("deploy", DeployRecord)
        yield "deploy", f"{folder / 'model_repository'} ({deployed.backend}: {deployed.reason})"
    yield "time", f"{sum(stage.seconds for stage in done.values()):.0f} s"


def _packed(record: PackRecord) -> str:
    if not record.bytes:
        return "nothing: " + "; ".join(sorted({layer.reason for layer in record.dense.values()}))
    packed, dense = (sum(getattr(gemm, key) for gemm in record.gemms) for key in ("bytes", "dense_bytes"))
    layers = sum(len(gemm.layers) for gemm in record.gemms)
    return f"{layers} layers in {len(record.gemms)} SparseGemm operators, {packed / dense:.4f} of dense bytes"


def _pruned(record: PruneRecord) -> str:
    share = record.pruned_parameters / record.parameters
    pruned = [layer for layer in record.layers if layer.pattern]
    return f"{len(pruned)} of {len(record.layers)} linear layers ({share:.0%} of the parameters)"


def _engines(record: EngineRecord) -> str:
    if record.skipped:
        return f"skipped: {record.skipped}"
    built = ", ".join(f"{e.file} {e.bytes / 2**20:.1f} MiB" for e in (record.dense, record.sparse) if e)
    run = "" if record.runnable else f"; not run: {record.not_runnable}"
    return f"{record.flavour} {record.version}: {built}; {plugin_use(record)}{run}"


def plugin_use(record: EngineRecord) -> str:
    """What the plugin does in the sparse engine, or why it is not in it."""
    if record.sparse is None or record.sparse.plugin is None:
        return f"no plugin: {record.no_plugin}"
    layers = record.sparse.layers
    sparse = [layer for layer in layers if layer.kernel == "plugin"]
    measured = sum(layer.choices is not None for layer in sparse)
    how = f"{measured} by measured choices" if measured else "kernels by heuristic"
    return f"plugin: {len(sparse)} of {len(layers)} packed GEMMs, {how}"


def _verified(record: VerifyRecord) -> list[tuple[str, str]]:
    rows = []
    for check in record.fidelity:
        verdict = "agree" if check.passed else f"DIVERGE at {check.first_divergence}"
        rows.append(("fidelity", f"{check.a} and {check.b} {verdict}: logits {check.logits.relative_l2:.1e}"))
    if record.task:
        task = record.task
        rows.append(
            (
                "perplexity",
                f"{task.dense_perplexity:.3f} dense, {task.sparse_perplexity:.3f} sparse "
                f"(x{task.ratio:.3f}), "
                f"KL {task.kl_divergence:.4f} nats, top-1 agreement {task.top1_agreement:.1%}",
            )
        )
    for row in record.zeroshot.scores if record.zeroshot else []:
        verdict = f", {row.verdict}" if row.verdict else ""
        rows.append((row.task, f"{row.metric} {row.dense:.4f} dense, {row.sparse:.4f} sparse{verdict}"))
    return rows
