"""From what the command line is given to the estimate."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from esparse_trt.engine import flavour as flavours
from esparse_trt.engine.table import load_table
from esparse_trt.errors import EsparseError
from esparse_trt.estimate.gpus import DEFAULT, NAMES, Gpu, gpu_of, gpu_of_device
from esparse_trt.estimate.predict import Subject, estimate, find_tables
from esparse_trt.estimate.record import Estimate
from esparse_trt.layout import read_config
from esparse_trt.progress import note
from esparse_trt.recipe import Recipe, load_recipe
from esparse_trt.runtime.shapes import NAMES as SHAPES
from esparse_trt.runtime.shapes import config_of
from esparse_trt.sections import TRAFFIC, EngineSection, PruneSection, Traffic


def ask(
    recipe: Path | None = None,
    shape: str | None = None,
    gpu: str | None = None,
    table: Path | None = None,
    batches: Sequence[int] = (),
    prompts: Sequence[int] = (),
    generated: int | None = None,
) -> Estimate:
    """The estimate for a recipe's model, or for a well-known shape pruned by default.

    Args:
        recipe: file of the recipe; or `shape`.
        shape: name in `runtime.shapes`.
        gpu: name in `gpus`; None: that of the table, of this machine, or an H100.
        table: of the tuner; None: where it leaves it.
        batches: with `prompts`, instead of the recipe's traffic: every batch with every prompt length.
        prompts: tokens.
        generated: tokens after each prompt.

    Raises:
        EsparseError: neither or both of recipe and shape; one of them, the GPU or the table is not known.
    """
    if (recipe is None) == (shape is None):
        raise EsparseError(
            "give a recipe or --shape" if recipe is None else "a recipe and --shape exclude each other",
            fix=f"esparse-trt estimate recipe.yaml, or --shape with one of {', '.join(SHAPES)}",
        )
    loaded = load_recipe(recipe) if recipe is not None else None
    chosen = _gpu(gpu, table)
    known = find_tables(chosen, table or (loaded.engine.table if loaded else None))
    traffic = _traffic(loaded.traffic if loaded else TRAFFIC, batches, prompts, generated)
    if loaded is not None:
        return estimate(_of_recipe(loaded), chosen, known, traffic)
    assert shape is not None
    subject = Subject(shape, config_of(shape), PruneSection(), EngineSection())
    return estimate(subject, chosen, known, traffic)


def _of_recipe(recipe: Recipe) -> Subject:
    config = read_config(recipe.model)
    return Subject(recipe.name, config, recipe.prune, recipe.engine, recipe.export.dtype)


def _gpu(name: str | None, table: Path | None) -> Gpu:
    if name is not None:
        return gpu_of(name)
    if table is not None:
        device = load_table(table).device.name
        if (measured := gpu_of_device(device)) is None:
            raise EsparseError(
                f"measured on {device}, of which nothing is known here",
                where=table,
                fix=f"give --gpu with one of {', '.join(NAMES)}",
            )
        return measured
    here = flavours.find_gpu()
    if isinstance(here, str):
        note(f"no --gpu, and {here}: estimated for an {gpu_of(DEFAULT).title}")
        return gpu_of(DEFAULT)
    if (found := gpu_of_device(here.name)) is None:
        raise EsparseError(
            f"nothing is known of this machine's {here.name}",
            where="--gpu",
            fix=f"name one of {', '.join(NAMES)}, or add its row to esparse_trt/estimate/gpus.py",
        )
    return found


def _traffic(
    given: Sequence[Traffic], batches: Sequence[int], prompts: Sequence[int], generated: int | None
) -> list[Traffic]:
    """The recipe's traffic, or a grid of what the command line names; what it leaves out is the default."""
    if not batches and not prompts and generated is None:
        return list(given)
    default = Traffic()
    cells = product(batches or [default.batch], prompts or [default.prompt])
    tokens = default.generated if generated is None else generated
    return [Traffic(batch=batch, prompt=prompt, generated=tokens) for batch, prompt in cells]
