"""`esparse-trt tune`: from a recipe to the tuned table of its layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from esparse_trt.artifacts import BuildDir, load_manifest
from esparse_trt.engine import kernels as library
from esparse_trt.engine.choice import counts, judge_rows
from esparse_trt.engine.table import BUCKETS, LAUNCHES, Launch, Row, Table, default_path
from esparse_trt.engine.tune import open_table, this_device, tune
from esparse_trt.errors import EsparseError
from esparse_trt.graph import es24
from esparse_trt.layout import Shape, by_shape, empty_model, gemms, read_config
from esparse_trt.progress import note
from esparse_trt.recipe import Recipe
from esparse_trt.records import PackRecord
from esparse_trt.sections import Traffic


def run(
    console: Console,
    recipe: Recipe | None,
    folder: Path | None,
    shapes: Sequence[Shape] = (),
    tokens: Sequence[int] | None = None,
    dtype: str | None = None,
    path: Path | None = None,
) -> Table:
    """Measure what the table lacks, print its rows and what they mean for each layer.

    Args:
        console: where the rows are printed.
        recipe: whose model's layers are measured.
        folder: its build folder, if there is one; a packed model there says which layers are one GEMM.
        shapes: [N, K], instead of the recipe's.
        tokens: the values of M; none: all buckets.
        dtype: float16 or bfloat16; none: the export type of the recipe.
        path: of the table; none: in the user's cache.

    Raises:
        EsparseError: no library, no GPU, no layer to measure, or a table of another GPU.
    """
    layers: dict[Shape, list[str]] = {shape: [] for shape in shapes} or layer_shapes(recipe, folder)
    dtype = dtype or (recipe.export.dtype if recipe else "float16")
    tokens = tokens or BUCKETS
    for n, k in layers:
        require_kernels(n, k, dtype)
    kernels = library.load()
    device = this_device(kernels)
    path = path or default_path(device.name)
    table = open_table(path, kernels, device)
    tune(kernels, table, path, list(layers), dtype, tokens)
    console.print(grid(table, layers, dtype, tokens))
    note(f"table: {path}", path=str(path))
    if recipe and set(tokens) == set(BUCKETS):
        say_decisions(table, layers, dtype, recipe.traffic)
    return table


def require_kernels(n: int, k: int, dtype: str) -> None:
    """Refuse what the layout cannot hold.

    Raises:
        EsparseError: with the reason.
    """
    known = {str(kind): kind for kind in es24.DTYPES}
    if dtype not in known:
        raise EsparseError(
            f"there are no Sparse-GEMM kernels for {dtype}: they take {' or '.join(known)}",
            fix="set export.dtype: float16, or give --dtype float16",
        )
    if reason := es24.why_not(n, k, known[dtype]):
        raise EsparseError(
            f"there are no Sparse-GEMM kernels for [{n}, {k}]: {reason}",
            fix="give another --shape: such a layer stays dense",
        )


# --- which layers ------------------------------------------------------------------------------------------


def layer_shapes(recipe: Recipe | None, folder: Path | None) -> dict[Shape, list[str]]:
    """[N, K] of the model's GEMMs as the pack stage makes them, each with the layers that have it.

    Raises:
        EsparseError: there is no recipe, or no layer of its model can be packed.
    """
    if recipe is None:
        raise EsparseError("no layers are named", fix="give a recipe, or --shape NxK")
    shapes = (_packed_shapes(folder) if folder else {}) or _planned_shapes(recipe)
    if not shapes:
        raise EsparseError(
            "no layer of the model can be packed",
            where=recipe.name,
            fix="`esparse-trt estimate` says why, layer by layer",
        )
    return shapes


def _packed_shapes(folder: Path) -> dict[Shape, list[str]]:
    """From the record of a finished pack stage."""
    manifest = load_manifest(BuildDir(folder))
    if manifest is None or "pack" not in manifest.stages:
        return {}
    shapes: dict[Shape, list[str]] = {}
    for gemm in manifest.record("pack", PackRecord).gemms:
        shapes.setdefault(gemm.shape, []).append(gemm.name)
    return shapes


def _planned_shapes(recipe: Recipe) -> dict[Shape, list[str]]:
    """From the model's configuration; which shapes fit is the same for both types of two bytes."""
    config = read_config(recipe.model)
    found = gemms(config, empty_model(config), recipe.prune, "float16")
    return by_shape(gemm for gemm in found if gemm.stays is None)


def parse_shape(text: str) -> Shape:
    """[N, K] from "NxK".

    Raises:
        EsparseError: it is not of that form.
    """
    if match := re.fullmatch(r"(\d+)x(\d+)", text):
        return int(match[1]), int(match[2])
    raise EsparseError(f"{text!r} is not a shape", where="--shape", fix="write N x K as 4096x11008")


# --- what is printed ---------------------------------------------------------------------------------------


def grid(table: Table, shapes: Iterable[Shape], dtype: str, tokens: Sequence[int]) -> Grid:
    """The rows of these layers: dense, and ours by way of launching with its gain over dense."""
    made = Grid(box=None, pad_edge=False)
    made.add_column("[N, K]")
    for title in ("M", "dense us", "plain us", "±", "speed-up"):
        made.add_column(title, justify="right")
    made.add_column("kernel")
    for title in ("programmatic us", "±", "speed-up"):
        made.add_column(title, justify="right")
    made.add_column("kernel")
    for n, k in shapes:
        for row in table.of_layer(n, k, dtype):
            if row.m in tokens:
                ours = (cell for launch in LAUNCHES for cell in _cells(row, launch))
                made.add_row(f"{row.n} x {row.k}", str(row.m), f"{row.dense.us:.2f}", *ours)
    return made


def _cells(row: Row, launch: Launch) -> list[Text | str]:
    ours, speedup = row.sparse(launch), row.speedup(launch)
    return [
        f"{ours.us:.2f}",
        f"{(ours.p90 - ours.p10) / 2:.2f}",
        Text(f"x{speedup:.2f}", "green" if speedup > 1 else "red"),
        ours.kernel,
    ]


def say_decisions(
    table: Table, shapes: dict[Shape, list[str]], dtype: str, traffic: Sequence[Traffic]
) -> None:
    """For each layer whether `auto` runs it sparse in TensorRT under the recipe's traffic, and why."""
    for (n, k), names in shapes.items():
        verdict = judge_rows(table.of_layer(n, k, dtype), counts(traffic))
        layers = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        slower = ", ".join(map(str, verdict.dense_faster_at))
        note(
            f"{'sparse' if verdict.sparse else 'dense ':6} [{n}, {k}] {layers}: {verdict.reason}"
            + (f"; dense is faster at M = {slower}" if slower else ""),
            style="" if verdict.sparse else "yellow",
            shape=[n, k],
            sparse=verdict.sparse,
            code=verdict.code.value,
            speedup=verdict.speedup,
            dense_faster_at=verdict.dense_faster_at,
        )
