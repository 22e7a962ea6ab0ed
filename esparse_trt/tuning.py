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
from esparse_trt.engine.table import BUCKETS, Row, Table, choices, decide, default_path
from esparse_trt.engine.tune import open_table, this_device, tune
from esparse_trt.errors import EsparseError
from esparse_trt.graph import es24
from esparse_trt.plan import empty_model, selected_linears
from esparse_trt.progress import note
from esparse_trt.recipe import Recipe
from esparse_trt.records import PackRecord
from esparse_trt.sections import EngineSection
from esparse_trt.sparsity.models import family_of

Shape = tuple[int, int]  # [N, K]


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
    kernels = library.load()
    device = this_device(kernels)
    layers: dict[Shape, list[str]] = {shape: [] for shape in shapes} or layer_shapes(recipe, folder)
    dtype = dtype or (recipe.export.dtype if recipe else "float16")
    tokens = tokens or BUCKETS
    for n, k in layers:
        require_kernels(n, k, dtype)
    path = path or default_path(device.name)
    table = open_table(path, kernels, device)
    tune(kernels, table, path, list(layers), dtype, tokens)
    console.print(grid(table, layers, dtype, tokens))
    note(f"table: {path}", path=str(path))
    if recipe and set(tokens) == set(BUCKETS):
        say_decisions(table, layers, dtype, profile_tokens(recipe.engine))
    return table


def require_kernels(n: int, k: int, dtype: str) -> None:
    """Refuse what the layout cannot hold.

    Raises:
        EsparseError: with the reason.
    """
    known = {str(kind): kind for kind in es24.DTYPES}
    reason = es24.why_not(n, k, known[dtype]) if dtype in known else f"it holds {' or '.join(known)}"
    if reason:
        raise EsparseError(
            f"there are no Sparse-GEMM kernels for [{n}, {k}] in {dtype}: {reason}",
            fix="set export.dtype: float16, or give --dtype float16",
        )


def profile_tokens(section: EngineSection) -> list[int]:
    """The numbers of tokens that the recipe's engines are built for: each profile's optimum."""
    return sorted({profile.batch[1] * profile.sequence[1] for profile in section.profiles.values()})


# --- which layers ------------------------------------------------------------------------------------------


def layer_shapes(recipe: Recipe | None, folder: Path | None) -> dict[Shape, list[str]]:
    """[N, K] of the model's GEMMs as the pack stage makes them, each with the layers that have it.

    Raises:
        EsparseError: there is no recipe, or no layer of its model can be packed.
    """
    if recipe is None:
        raise EsparseError("which layers?", fix="name a recipe, or give --shape NxK")
    packed = _packed_shapes(folder) if folder else {}
    shapes = packed or _planned_shapes(recipe)
    if not shapes:
        raise EsparseError(
            "no layer of the model can be packed",
            where=recipe.name,
            fix="the pack stage of `esparse-trt build` says why, layer by layer",
        )
    return shapes


def _packed_shapes(folder: Path) -> dict[Shape, list[str]]:
    """From the record of a finished pack stage."""
    manifest = load_manifest(BuildDir(folder))
    if manifest is None or "pack" not in manifest.stages:
        return {}
    gemms = manifest.record("pack", PackRecord).gemms
    return _by_shape((gemm.shape, gemm.name) for gemm in gemms)


def _planned_shapes(recipe: Recipe) -> dict[Shape, list[str]]:
    """From the model's configuration: layers that share a site, a parent and a bias are one GEMM."""
    config, model = empty_model(recipe)
    sites = {linear: site.name for site in family_of(config).sites for linear in site.linears}
    found: dict[tuple[str, str, bool], dict[str, Shape]] = {}
    for name, linear in selected_linears(model, recipe.prune.layers).items():
        shape = (linear.out_features, linear.in_features)
        if es24.why_not(*shape, es24.DTYPES[0]) is None:
            site = next((site for end, site in sites.items() if name.endswith(f".{end}")), name)
            key = (site, name.rpartition(".")[0], linear.bias is not None)
            found.setdefault(key, {})[name] = shape
    return _by_shape(map(_merged, found.values()))


def _merged(linears: dict[str, Shape]) -> tuple[Shape, str]:
    """Shape and name of the GEMM that layers of one input become."""
    first, *others = linears
    name = "+".join([first, *(other.rpartition(".")[2] for other in others)])
    return (sum(n for n, _ in linears.values()), linears[first][1]), name


def _by_shape(gemms: Iterable[tuple[Shape, str]]) -> dict[Shape, list[str]]:
    shapes: dict[Shape, list[str]] = {}
    for shape, name in gemms:
        shapes.setdefault(shape, []).append(name)
    return shapes


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
    """The rows of these layers."""
    made = Grid(box=None, pad_edge=False)
    made.add_column("[N, K]")
    for title in ("M", "us", "± us", "dense us", "speed-up"):
        made.add_column(title, justify="right")
    made.add_column("kernel")
    for n, k in shapes:
        for row in table.of_layer(n, k, dtype):
            if row.m in tokens:
                made.add_row(*_cells(row))
    return made


def _cells(row: Row) -> list[Text | str]:
    style = "green" if row.speedup > 1 else "red"
    return [
        f"{row.n} x {row.k}",
        str(row.m),
        f"{row.us:.2f}",
        f"{(row.p90 - row.p10) / 2:.2f}",
        f"{row.dense_us:.2f}",
        Text(f"x{row.speedup:.2f}", style),
        row.candidate,
    ]


def say_decisions(table: Table, shapes: dict[Shape, list[str]], dtype: str, tokens: Sequence[int]) -> None:
    """For each layer whether `auto` runs it sparse at the recipe's numbers of tokens, and why."""
    for (n, k), names in shapes.items():
        decision = decide(table, n, k, dtype, tokens)
        layers = names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        style = "" if decision.sparse else "yellow"
        note(
            f"{'sparse' if decision.sparse else 'dense ':6} [{n}, {k}] {layers}: {decision.reason}",
            style=style, shape=[n, k], sparse=decision.sparse, code=decision.code,
            choices=choices(table, n, k, dtype),
        )  # fmt: skip
