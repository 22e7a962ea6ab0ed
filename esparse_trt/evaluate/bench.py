"""`esparse-trt bench`: dense against sparse on this machine's GPU, cell by cell, into one record.

The record is written after every step; run again on the same GPU with the same versions, it measures what is
missing. The order is: the same answers first, then end to end, then layer by layer, then TensorRT engines.
"""

from __future__ import annotations

from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel

from esparse_trt import system
from esparse_trt.engine import kernels as library
from esparse_trt.engine.tune import driver_version
from esparse_trt.errors import EsparseError
from esparse_trt.evaluate.bench_grid import Grid
from esparse_trt.evaluate.bench_record import (
    Bench,
    Cell,
    Device,
    LeftOut,
    ModelSize,
    Setting,
    load_bench,
    save_bench,
)
from esparse_trt.graph import es24
from esparse_trt.progress import note, track
from esparse_trt.runtime import bench as measuring
from esparse_trt.runtime.bench_layers import layers_of, measure_ceilings, measure_layers
from esparse_trt.runtime.linear import SparseLinear
from esparse_trt.runtime.nvml import Meter, open_meter


class Subject(Protocol):
    """A model to measure."""

    @property
    def name(self) -> str:
        """Of the model."""

    @property
    def weights(self) -> str:
        """What tells its weights from others: random, or a digest."""

    @property
    def dtype(self) -> str:
        """float16 or bfloat16."""

    @property
    def reasons(self) -> dict[str, str]:
        """Linear layer -> why it was not pruned."""

    @property
    def command(self) -> str:
        """What measures it, without the options of the grid."""

    def sparse(self) -> PreTrainedModel:
        """The packed model, on the GPU. Called first."""

    def masked(self) -> PreTrainedModel:
        """The masked dense model: what the packed one should answer like. Called second, if at all."""

    def dense(self) -> tuple[PreTrainedModel, str]:
        """The dense model that speed is compared with, in words too; the masked one may be gone then."""


def run(subject: Subject, grid: Grid, path: Path) -> Bench:
    """Measure what the record at `path` lacks.

    Raises:
        EsparseError: no GPU, no kernel library, both models do not fit on it together, or the file at `path`
            is not such a record.
    """
    meter = open_meter() if torch.cuda.is_available() else "no GPU"
    setting = this_setting(subject, grid, meter)
    stored = _stored(path, setting)
    cells = [pair for pair in product(grid.batches, grid.prompts) if stored is None or not stored.cell(*pair)]
    tokens = _untimed(stored, grid)
    if stored is not None and not cells and not tokens:
        note(f"{path}: everything was measured before", style="dim", path=str(path))
        return stored
    try:
        dense, sparse, bench = _models(subject, grid, setting, stored, meter)
    except torch.OutOfMemoryError as error:
        raise EsparseError(
            f"the dense and the sparse model do not fit together into {_gib(setting.device.memory_bytes)} of "
            f"GPU memory: {str(error).splitlines()[0]}",
            where=subject.name,
            fix="use a GPU with more memory, or the shape of a smaller model",
        ) from error
    save_bench(bench, path)
    models = {"dense": dense, "sparse": sparse}
    for batch, prompt in track(cells, "measuring", total=len(cells), unit="cell"):
        bench = _with_cell(bench, batch, prompt, measure_cell(models, batch, prompt, grid.generated, meter))
        save_bench(bench, path)
    if tokens:
        layers = layers_of(sparse, subject.reasons)
        del models, dense, sparse
        measuring.release()
        ceilings = bench.ceilings or measure_ceilings()
        rows = measure_layers(layers, sorted(tokens), grid.batches, subject.dtype, ceilings)
        bench = bench.model_copy(update={"ceilings": ceilings, "layers": rows})
        save_bench(bench, path)
    return bench


def _untimed(bench: Bench | None, grid: Grid) -> set[int]:
    """The numbers of tokens to time layers at: all that are wanted if some are missing, else none."""
    if bench is None or not bench.layers:
        return grid.layer_tokens()
    timed = {time.m for row in bench.layers for time in row.times}
    return set() if grid.layer_tokens() <= timed else grid.layer_tokens() | timed


# --- what it holds for -----------------------------------------------------------------------------------


def this_setting(subject: Subject, grid: Grid, meter: Meter | str) -> Setting:
    """The GPU, the versions and the model.

    Raises:
        EsparseError: there is no GPU, or no kernel library.
    """
    system.require_gpu("run it on the machine that will serve the model; `--show FILE` prints an earlier run")
    kernels = library.load()
    gpu = torch.cuda.get_device_properties()
    device = Device(
        name=gpu.name,
        capability=f"{gpu.major}.{gpu.minor}",
        multiprocessors=gpu.multi_processor_count,
        memory_bytes=gpu.total_memory,
        driver=driver_version(),
        power_limit_w=None if isinstance(meter, str) else meter.power_limit_w(),
        max_sm_mhz=None if isinstance(meter, str) else meter.max_sm_mhz(),
    )
    versions = {
        "esparse-trt": kernels.version,
        "kernels": kernels.kernel_set,
        "layout": es24.LAYOUT,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "transformers": system.package_version("transformers") or "unknown",
    }
    return Setting(
        model=subject.name, weights=subject.weights, device=device, versions=versions, dtype=subject.dtype,
        generated=grid.generated,
    )  # fmt: skip


def _stored(path: Path, setting: Setting) -> Bench | None:
    """The record to go on with; one that was measured under another setting is left behind, with a note."""
    bench = load_bench(path)
    if bench is None or bench.setting == setting:
        return bench
    was, now = bench.setting.model_dump(), setting.model_dump()
    changed = ", ".join(f"{key} was {was[key]}, is {now[key]}" for key in now if was[key] != now[key])
    note(f"{path} starts anew: {changed}", style="yellow")
    return None


# --- models ----------------------------------------------------------------------------------------------


def _models(
    subject: Subject, grid: Grid, setting: Setting, bench: Bench | None, meter: Meter | str
) -> tuple[PreTrainedModel, PreTrainedModel, Bench]:
    """Both models ready to be timed, and the record with their sizes and the check of their logits."""
    note(f"{subject.name}: loading the packed and the dense model")
    sparse = subject.sparse()
    logits = bench.logits if bench else None
    if logits is None:
        logits = measuring.check_logits(subject.masked(), sparse)
        measuring.release()
    dense, text = subject.dense()
    packed = [module for module in sparse.modules() if isinstance(module, SparseLinear)]
    found = Bench(
        command=f"{subject.command} {_all_cells(bench, grid).options()}",
        finished=_now(),
        setting=setting,
        dense_model=text,
        dense=ModelSize(
            weight_bytes=measuring.weight_bytes(dense),
            pruned_layer_bytes=sum(2 * layer.in_features * layer.out_features for layer in packed),
        ),
        sparse=ModelSize(
            weight_bytes=measuring.weight_bytes(sparse),
            pruned_layer_bytes=sum(layer.weight_bytes for layer in packed),
        ),
        logits=logits,
        no_energy=meter if isinstance(meter, str) else None,
    )
    if bench is not None:
        measured = ("cells", "left_out", "layers", "ceilings", "engines", "engines_skipped")
        found = found.model_copy(update={name: getattr(bench, name) for name in measured})
    return dense, sparse, found


def _all_cells(bench: Bench | None, grid: Grid) -> Grid:
    """The grid that holds what was asked for before, too."""
    before: list[Cell | LeftOut] = [*bench.cells, *bench.left_out] if bench else []
    return Grid(
        tuple(sorted({*grid.batches, *(cell.batch for cell in before)})),
        tuple(sorted({*grid.prompts, *(cell.prompt for cell in before)})),
        grid.generated,
    )


# --- cells -----------------------------------------------------------------------------------------------


def measure_cell(
    models: measuring.Models, batch: int, prompt: int, generated: int, meter: Meter | str
) -> Cell | LeftOut:
    """One cell, in turns (where both caches do not fit, one after the other), or why there is none."""
    positions = min(model.config.max_position_embeddings for model in models.values())
    if prompt + generated > positions:
        reason = f"the model has {positions} positions, {prompt + generated} are needed"
        return _say(LeftOut(batch=batch, prompt=prompt, reason=reason))
    for groups in ([models], [{name: model} for name, model in models.items()]):
        found: dict[str, measuring.Measured] = {}
        for group in groups:
            part = _measure(group, batch, prompt, generated, meter)
            measuring.release()  # not in an `except`: the error would keep the cache alive
            found |= part or {}
        if len(found) == len(models):
            return _say(Cell(batch=batch, prompt=prompt, interleaved=len(groups) == 1, **found))
    return _say(LeftOut(batch=batch, prompt=prompt, reason="the GPU's memory is full"))


def _measure(
    models: measuring.Models, batch: int, prompt: int, generated: int, meter: Meter | str
) -> dict[str, measuring.Measured] | None:
    try:
        return measuring.measure(
            models, batch, prompt, generated, meter=None if isinstance(meter, str) else meter
        )
    except torch.OutOfMemoryError:
        return None


def _say(found: Cell | LeftOut) -> Cell | LeftOut:
    at = f"batch {found.batch}, prompt {found.prompt}"
    if isinstance(found, LeftOut):
        note(f"{at}: left out, {found.reason}", style="yellow")
    else:
        note(
            f"{at}: decode {found.dense.decode.median:.2f} -> {found.sparse.decode.median:.2f} ms "
            f"(x{found.decode_speedup:.2f}), first token {found.dense.prefill.median:.1f} -> "
            f"{found.sparse.prefill.median:.1f} ms (x{found.prefill_speedup:.2f})",
            batch=found.batch, prompt=found.prompt, decode_speedup=round(found.decode_speedup, 4),
            prefill_speedup=round(found.prefill_speedup, 4),
        )  # fmt: skip
    return found


def _with_cell(bench: Bench, batch: int, prompt: int, found: Cell | LeftOut) -> Bench:
    """The record with a cell, or with the reason why there is none."""
    others = [item for item in bench.left_out if (item.batch, item.prompt) != (batch, prompt)]
    update: dict[str, object] = {"finished": _now(), "left_out": others}
    if isinstance(found, Cell):
        update["cells"] = sorted([*bench.cells, found], key=lambda cell: (cell.batch, cell.prompt))
    else:
        update["left_out"] = [*others, found]
    return bench.model_copy(update=update)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
