"""The estimate as tables for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from esparse_trt.estimate.findings import HARDLY
from esparse_trt.estimate.record import CellEstimate, Estimate, GemmTime, Phase, SiteEstimate
from esparse_trt.estimate.times import Source

MARKS: dict[Source, str] = {"measured": "", "interpolated": "~", "roofline": "≈"}


def show(found: Estimate) -> Group:
    """All of it, the verdict last, where it is read."""
    parts: list[RenderableType] = [_facts(found), "", _layers(found), "", _cells(found), ""]
    parts += [Text(line, "dim") for line in found.sources]
    parts += ["", *(Text(f"- {line}") for line in found.findings[1:])]
    style = "bold green" if found.speedup >= HARDLY else "bold yellow"
    return Group(*parts, Text(found.findings[0], style))


def _facts(found: Estimate) -> Table:
    sizes = found.sizes
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    share = sizes.pruned / sizes.parameters
    rows = {
        "model": f"{found.model}, {sizes.parameters / 1e6:,.1f} M parameters, {found.dtype}",
        "gpu": found.gpu,
        "pruned": f"{sizes.pruned / 1e6:,.1f} M parameters ({share:.0%}), half of them to zero",
        "runs packed": f"{sizes.packed / 1e6:,.1f} M parameters ({sizes.packed / sizes.parameters:.0%})",
        "files": f"checkpoint {_size(sizes.checkpoint)}; ONNX {_size(sizes.dense_onnx)} dense, "
        f"{_size(sizes.sparse_onnx)} sparse, {_size(sizes.packed_onnx)} packed; "
        f"engines {_size(sizes.dense_engine)} dense, {_size(sizes.sparse_engine)} sparse",
        "weights": f"{_size(sizes.dense_memory)} dense, {_size(sizes.sparse_memory)} sparse on the GPU "
        f"({sizes.sparse_memory / sizes.dense_memory:.3f})",
    }
    for label, text in rows.items():
        table.add_row(label, Text(text))
    return table


def _layers(found: Estimate) -> Table:
    """Speed-up of each GEMM over dense at a few M."""
    table = Table(box=None, pad_edge=False, title="speed-up over dense by M (tokens)", title_justify="left")
    for title in ("site", "[N, K]"):
        table.add_column(title, no_wrap=True)
    table.add_column("count", justify="right")
    shown = next((site.times for site in found.sites if site.times), [])
    for time in shown:
        table.add_column(str(time.m), justify="right")
    for title in ("traffic", "runs", "why"):
        table.add_column(title)
    for site in found.sites:
        cells = [_speedup(time) for time in site.times] or [Text("")] * len(shown)
        total = Text(f"x{site.speedup:.2f}" if site.speedup else "")
        runs = "sparse" if site.kernel == "plugin" else site.kernel
        n, k = site.shape
        table.add_row(
            site.site, f"{n} x {k}", str(site.count), *cells, total, _coloured(runs), _why(site)
        )  # fmt: skip
    return table


def _why(site: SiteEstimate) -> Text:
    return Text(site.code.value if site.speedup else f"{site.code.value}: {site.reason}", "dim")


def _coloured(runs: str) -> Text:
    return Text(runs, "green" if runs == "sparse" else "yellow")


def _speedup(time: GemmTime) -> Text:
    style = "green" if time.speedup > 1 else "red"
    return Text(f"{MARKS[time.source]}{time.speedup:.2f}", style)


def _cells(found: Estimate) -> Table:
    """Prefill and decode, end to end."""
    table = Table(
        box=None, pad_edge=False, title="end to end, milliseconds (PyTorch runtime, CUDA graphs)",
        title_justify="left",
    )  # fmt: skip
    for title in ("batch", "prompt", "phase", "dense", "sparse", "speed-up", "w/o other"):
        table.add_column(title, justify="left" if title == "phase" else "right")
    for title in ("tokens/s", "GEMMs", "head", "attention", "other", "KV cache"):
        table.add_column(title, justify="right")
    for cell in found.cells:
        table.add_row(str(cell.batch), str(cell.prompt), "prefill", *_phase(cell.prefill, cell, cell.prompt))
        table.add_row("", "", "decode", *_phase(cell.decode, cell, 1), _size(cell.cache_bytes))
    return table


def _phase(phase: Phase, cell: CellEstimate, tokens: int) -> list[Text | str]:
    """Times, what they are made of in the sparse model, and the bound on the gain without small kernels."""
    sparse = phase.sparse
    rate = 1e3 * cell.batch * tokens / sparse.total
    parts = (sparse.gemm, sparse.head, sparse.attention, sparse.other)
    return [
        f"{phase.dense.total:.2f}",
        f"{sparse.total:.2f}",
        Text(f"x{phase.speedup:.2f}", "green" if phase.speedup > 1 else "red"),
        f"x{phase.limit:.2f}",
        f"{rate:,.0f}",
        *(f"{part / sparse.total:.0%}" for part in parts),
    ]


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
