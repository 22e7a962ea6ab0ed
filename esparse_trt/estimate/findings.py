"""What a reader should know before deciding: the verdict, and where sparsity does not pay."""

from __future__ import annotations

from collections.abc import Iterator

from esparse_trt.estimate.gpus import Gpu
from esparse_trt.estimate.record import CellEstimate, Estimate, SiteEstimate

HARDLY = 1.05  # a gain below this is within the error of the estimate


def findings(found: Estimate, gpu: Gpu) -> list[str]:
    """One sentence each, the verdict first."""
    return [
        _verdict(found, gpu),
        *_phases(found),
        *_sites(found),
        *_memory(found, gpu),
        *([gpu.kernels] if gpu.kernels else []),
    ]


def _verdict(found: Estimate, gpu: Gpu) -> str:
    if not any(site.kernel == "plugin" for site in found.sites):
        reasons = "; ".join(dict.fromkeys(site.reason for site in found.sites))
        return f"Sparsity cannot pay: no layer runs sparse ({reasons})"
    saved = 1 - found.sizes.sparse_memory / found.sizes.dense_memory
    gain = f"{found.speedup:.2f}x end to end over the traffic"
    memory = f"weights take {saved:.1%} less memory"
    if found.sizes.sparse_memory < gpu.l2:
        return (
            "Not known whether sparsity pays in time: all weights fit into the L2 cache "
            f"({gpu.l2 / 1e6:.0f} MB), from which dense gains more, and the times are of weights that come "
            f"from memory; {memory}"
        )
    guessed = any(time.source == "roofline" for site in found.sites for time in site.times)
    said = "By a roofline, sparsity would" if guessed else "Sparsity"
    pay, does = ("pay", "") if guessed else ("pays", "does ")
    if found.speedup >= HARDLY:
        return f"{said} {pay}: {gain}, and {memory}"
    if found.speedup >= 1:
        return f"{said} hardly {pay} in time, {gain}; {memory}"
    return f"{said} {does}not pay in time: {gain}; {memory}"


def _phases(found: Estimate) -> Iterator[str]:
    """Prefill or decode that gains nothing, with what takes its time instead."""
    for cell in found.cells:
        for name, phase in (("prefill", cell.prefill), ("decode", cell.decode)):
            if phase.speedup < HARDLY:
                step = phase.sparse
                parts = {"attention": step.attention, "the small kernels": step.other, "GEMMs": step.gemm}
                largest = max(parts, key=lambda part: parts[part])
                yield (
                    f"{_title(cell)}: {name} gains {phase.speedup:.2f}x only; {largest} "
                    f"take{'s' if largest == 'attention' else ''} {parts[largest] / step.total:.0%} of it"
                )


def _sites(found: Estimate) -> Iterator[str]:
    """Layers that are dense, or would be faster so at some M."""
    for site in found.sites:
        n, k = site.shape
        title = f"{site.site} [{n}, {k}]"
        if site.speedup is None:
            share = n * k * site.count / found.sizes.parameters
            yield f"{title} stays dense, {share:.1%} of the parameters: {site.reason}"
        elif site.kernel != "plugin":
            yield f"{title} stays dense: {site.reason}"
        elif site.dense_faster_at:
            yield f"{title}: dense is faster at M = {_list(site)}; over the traffic sparse is"


def _list(site: SiteEstimate) -> str:
    return ", ".join(map(str, site.dense_faster_at))


def _memory(found: Estimate, gpu: Gpu) -> Iterator[str]:
    for cell in found.cells:
        if not cell.fits["dense"]:
            verb = "does" if cell.fits["sparse"] else "does not either"
            yield (
                f"{_title(cell)}: the dense model with its KV cache does not fit into "
                f"{gpu.memory / 1e9:.0f} GB, the sparse one {verb}; the times assume that both do"
            )


def _title(cell: CellEstimate) -> str:
    return f"batch {cell.batch}, prompt {cell.prompt}"
