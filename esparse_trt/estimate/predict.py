"""The estimate of a model, put together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import product
from pathlib import Path

from torch import nn
from transformers import PretrainedConfig

from esparse_trt.engine.choice import counts, judge
from esparse_trt.engine.table import Launch, Table, default_path, load_table
from esparse_trt.errors import EsparseError
from esparse_trt.estimate.findings import findings
from esparse_trt.estimate.gpus import Gpu, gpu_of_device
from esparse_trt.estimate.record import CellEstimate, Estimate, GemmTime, SiteEstimate, Sizes
from esparse_trt.estimate.steps import WIDTH, Dimensions, Model, Packed
from esparse_trt.estimate.times import Times
from esparse_trt.layout import Gemm, empty_model, gemms, selected_linears
from esparse_trt.records import Kernel, Reason
from esparse_trt.sections import EngineSection, PruneSection, Traffic
from esparse_trt.sparsity.models import family_of

SHOWN = (1, 8, 16, 64, 256, 1024, 4096)  # values of M in the table of layers
# The PyTorch runtime launches our kernels, and those before them, programmatically.
LAUNCH: Launch = "programmatic"


@dataclass(frozen=True)
class Subject:
    """What is estimated: a model's configuration, and what a recipe would do with it."""

    name: str
    config: PretrainedConfig
    prune: PruneSection
    engine: EngineSection
    dtype: str = "float16"


@dataclass(frozen=True)
class Known:
    """A table of times, and what it is called."""

    title: str
    table: Table


def find_tables(gpu: Gpu, path: Path | None = None) -> list[Known]:
    """What was measured on a GPU: the tuner's table, and the reference that this package ships.

    Args:
        gpu: the GPU.
        path: of the tuner's table; None: where the tuner leaves it.

    Raises:
        EsparseError: there is no table at `path`, or it is of another GPU.
    """
    found = []
    for place in [path] if path else [default_path(name) for name in gpu.cuda_names]:
        if path or place.is_file():
            table = load_table(place)
            if (measured := gpu_of_device(table.device.name)) != gpu:
                title = measured.title if measured else table.device.name
                raise EsparseError(
                    f"measured on {title}, not on {gpu.title}",
                    where=place,
                    fix=f"give --gpu {measured.name}" if measured else "leave out --table",
                )
            found.append(Known(f"the tuner's table {place}", table))
    shipped = resources.files("esparse_trt.engine") / "tables" / f"{gpu.name}.json"
    if shipped.is_file():
        with resources.as_file(shipped) as file:
            found.append(Known("the reference table that esparse-trt ships", load_table(file)))
    return found


def estimate(subject: Subject, gpu: Gpu, known: Sequence[Known], traffic: Sequence[Traffic]) -> Estimate:
    """What to expect of a model on a GPU.

    Raises:
        EsparseError: the model's family is not supported.
    """
    model = empty_model(subject.config)
    layers = gemms(subject.config, model, subject.prune, subject.dtype)
    times = Times(gpu, [one.table for one in known], "float16", LAUNCH)
    sites = [_site(group, times, traffic, subject.engine) for group in _alike(layers)]
    sparse = {(site.site, site.shape) for site in sites if site.kernel == "plugin"}
    chosen = [(gemm, (gemm.site, gemm.shape) in sparse and gemm.stays is None) for gemm in layers]
    sizes = _sizes(subject, model, chosen)
    runs = decoder(subject.config, chosen, times)
    weights = sizes.dense_memory, sizes.sparse_memory
    cells = [runs.cell(entry, weights) for entry in traffic]
    result = Estimate(
        model=subject.name,
        gpu=gpu.title,
        gpu_source=gpu.source,
        dtype=subject.dtype,
        traffic=[entry.model_dump() for entry in traffic],
        sources=_sources(known, times, [site.shape for site in sites], {*SHOWN, *counts(traffic)}),
        sites=sites,
        sizes=sizes,
        cells=cells,
        speedup=_over_traffic(cells, traffic),
        findings=[],
    )
    return result.model_copy(update={"findings": findings(result, gpu)})


def decoder(config: PretrainedConfig, chosen: Sequence[tuple[Gemm, bool]], times: Times) -> Model:
    """The model as a sum of GEMMs and the rest; `chosen` says which of its linear layers run sparse."""
    family = family_of(config)
    head = next(pair for pair in chosen if pair[0].site == family.head)
    inside = [pair for pair in chosen if pair[0].layers[0].startswith(f"{family.blocks}.")]
    blocks = {gemm.layers[0].removeprefix(f"{family.blocks}.").partition(".")[0] for gemm, _ in inside}
    mlp = next(site.name for site in family.sites if site.reads == "mlp")
    inner = next(gemm.shape[1] for gemm, _ in inside if gemm.site == mlp)
    packed = Packed.of(inside, len(blocks), family)
    return Model(Dimensions.of(config, len(blocks), inner), inside, head, packed, times)


# --- layers ------------------------------------------------------------------------------------------------


def _alike(layers: Iterable[Gemm]) -> list[list[Gemm]]:
    """GEMMs of one site, shape and fate together."""
    groups: dict[object, list[Gemm]] = {}
    for gemm in layers:
        key = gemm.site, gemm.shape, gemm.stays and (gemm.stays.code, gemm.stays.reason)
        groups.setdefault(key, []).append(gemm)
    return list(groups.values())


def _site(
    group: Sequence[Gemm], times: Times, traffic: Sequence[Traffic], engine: EngineSection
) -> SiteEstimate:
    gemm = group[0]
    n, k = gemm.shape
    verdict = judge(counts(traffic), lambda m: _pair(times, n, k, m), also=SHOWN)
    if gemm.stays is not None:
        kernel: Kernel = "dense"
        code, reason = gemm.stays.code, gemm.stays.reason
    elif engine.sparse_gemm == "auto":
        kernel = "plugin" if verdict.sparse else "dense"
        code, reason = verdict.code, verdict.reason
    else:
        kernel = engine.sparse_gemm
        code, reason = Reason.asked, f"the recipe sets engine.sparse_gemm: {kernel}; {verdict.reason}"
    return SiteEstimate(
        site=gemm.site,
        layers="+".join(layer.rpartition(".")[2] for layer in gemm.layers),
        shape=gemm.shape,
        count=len(group),
        kernel=kernel,
        code=code,
        reason=reason,
        speedup=None if gemm.stays else verdict.speedup,
        dense_faster_at=[] if gemm.stays else list(verdict.dense_faster_at),
        times=[] if gemm.stays else [_time(times, n, k, m) for m in SHOWN],
    )


def _pair(times: Times, n: int, k: int, m: int) -> tuple[float, float]:
    pair = times.gemm(n, k, m)
    return pair.sparse, pair.dense


def _time(times: Times, n: int, k: int, m: int) -> GemmTime:
    pair = times.gemm(n, k, m)
    return GemmTime(m=m, sparse_us=round(pair.sparse, 3), dense_us=round(pair.dense, 3), source=pair.source)


def _sources(
    known: Sequence[Known], times: Times, shapes: Iterable[tuple[int, int]], tokens: Iterable[int]
) -> list[str]:
    """What the times come from, one line for each kind that occurs."""
    kinds = {times.gemm(*shape, m).source for shape, m in product(shapes, tokens)}
    gpu = times.gpu
    lines = [
        f"measured: {one.title} ({one.table.device.name}, kernels {one.table.kernel_set}, {one.table.date})"
        for one in known
        if kinds - {"roofline"}
    ]
    if "interpolated" in kinds:
        lines.append(
            "interpolated: between and beyond the shapes and M of those tables, where they have none"
        )
    if "roofline" in kinds:
        lines.append(
            f"roofline: never measured on {gpu.title}; what NVIDIA states of it ({gpu.source}), and the "
            "share of that which this package's kernels and cuBLAS reach on an H100"
        )
    return lines


# --- the whole ---------------------------------------------------------------------------------------------


def _over_traffic(cells: Sequence[CellEstimate], traffic: Sequence[Traffic]) -> float:
    def spent(side: str) -> float:
        return sum(
            entry.weight
            * (getattr(cell.prefill, side).total + entry.generated * getattr(cell.decode, side).total)
            for cell, entry in zip(cells, traffic, strict=True)
        )

    return spent("dense") / spent("sparse")


def _sizes(subject: Subject, model: nn.Module, chosen: Sequence[tuple[Gemm, bool]]) -> Sizes:
    """Files and memory; graphs, indices and biases in fp32 are left out: they are below 1 %.

    TensorRT-RTX gives every profile a copy of the weights that its own kernels multiply, TensorRT does not.
    """
    parameters = sum(weight.numel() for weight in model.parameters())
    selected = selected_linears(model, subject.prune.layers).values()
    width = WIDTH if subject.dtype in ("float16", "bfloat16") else 4
    packable = [gemm for gemm, _ in chosen if gemm.stays is None]
    ours = [gemm for gemm, sparse in chosen if sparse]
    engine = subject.engine
    copies = len(engine.profiles) - 1 if engine.flavour == "tensorrt_rtx" else 0
    multiplied = width * sum(gemm.parameters for gemm, _ in chosen)
    dense = width * parameters
    sparse = dense - _saved(ours, width)
    return Sizes(
        parameters=parameters,
        pruned=sum(linear.weight.numel() for linear in selected),
        packed=sum(gemm.parameters for gemm in ours),
        checkpoint=WIDTH * parameters,
        dense_onnx=dense,
        sparse_onnx=dense,
        packed_onnx=dense - _saved(packable, width),
        dense_engine=dense + copies * multiplied,
        sparse_engine=sparse + copies * (multiplied - width * sum(gemm.parameters for gemm in ours)),
        dense_memory=dense,
        sparse_memory=sparse,
    )


def _saved(packed: Iterable[Gemm], width: int) -> int:
    return sum(width * gemm.parameters - gemm.packed_bytes for gemm in packed)
