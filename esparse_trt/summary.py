"""What the command line prints after a build: the figures that decide, and where everything lies."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from esparse_trt.artifacts import (
    CertifyRecord,
    DeployRecord,
    EngineRecord,
    FoldRecord,
    Manifest,
    PruneRecord,
    VerifyRecord,
)


def print_summary(console: Console, manifest: Manifest, folder: Path) -> None:
    """Print one line per finished stage that has something to say."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    done = manifest.stages
    if "prune" in done:
        table.add_row("pruned", _pruned(manifest.record("prune", PruneRecord)))
    if "fold" in done:
        folded = manifest.record("fold", FoldRecord)
        table.add_row("folded", f"{folded.folded} permutations are free, {len(folded.kept)} stay as Gather")
    if "certify" in done:
        certified = manifest.record("certify", CertifyRecord)
        table.add_row("certified", f"{len(certified.tensors)} tensors are {certified.pattern} along K")
    if "engine" in done:
        table.add_row("engines", _engines(manifest.record("engine", EngineRecord)))
    if "verify" in done:
        for label, text in _verified(manifest.record("verify", VerifyRecord)):
            table.add_row(label, text)
    if "report" in done:
        table.add_row("report", str(folder / "report.html"))
    if "deploy" in done:
        deployed = manifest.record("deploy", DeployRecord)
        table.add_row("deploy", f"{folder / 'model_repository'} ({deployed.backend}: {deployed.reason})")
    table.add_row("time", f"{sum(stage.seconds for stage in done.values()):.0f} s")
    console.print(table)


def _pruned(record: PruneRecord) -> str:
    share = record.pruned_parameters / record.parameters
    pruned = [layer for layer in record.layers if layer.pattern]
    return f"{len(pruned)} of {len(record.layers)} linear layers ({share:.0%} of the parameters)"


def _engines(record: EngineRecord) -> str:
    if record.skipped:
        return f"skipped: {record.skipped}"
    built = ", ".join(f"{e.file} {e.bytes / 2**20:.1f} MiB" for e in (record.dense, record.sparse) if e)
    run = "" if record.runnable else f"; not run: {record.not_runnable}"
    return f"{record.flavour} {record.version}: {built}{run}"


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
    return rows
