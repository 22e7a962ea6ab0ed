"""The commands that make a model: build, ablate."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from esparse_trt import progress
from esparse_trt.commands.common import JsonLogs, RecipeArgument, app, console, reported


class StageName(str, Enum):
    """Stages in the order in which they run; spelled out here so that `--help` needs no torch."""

    prune = "prune"
    export = "export"
    fold = "fold"
    pack = "pack"
    certify = "certify"
    engine = "engine"
    verify = "verify"
    report = "report"
    deploy = "deploy"


@app.command(
    epilog="Examples:\n\n  esparse-trt build recipes/quickstart.yaml\n\n"
    "  esparse-trt build recipes/llama-7b.yaml --out /data/llama --dry-run\n\n"
    "  esparse-trt build recipes/llama-7b.yaml --from verify"
)
def build(
    recipe: RecipeArgument,
    out: Annotated[Path | None, typer.Option(help="Build folder (default: build/<recipe name>)")] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete an earlier build in the folder first")
    ] = False,
    first: Annotated[
        StageName | None, typer.Option("--from", help="Run this stage and later ones again")
    ] = None,
    last: Annotated[StageName | None, typer.Option("--to", help="Stop after this stage")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print plan, sizes and memory; do nothing")
    ] = False,
    json_logs: JsonLogs = False,
) -> None:
    """From a recipe to a verified sparse model, engines, a report and a Triton repository.

    Run again with the same recipe, it resumes where it stopped.
    """
    with reported(json_logs):
        from esparse_trt import pipeline
        from esparse_trt.recipe import load_recipe

        loaded = load_recipe(recipe)
        folder = out if out is not None else Path("build") / loaded.name
        extent = {"first": first and first.value, "last": last and last.value}
        if dry_run:
            from esparse_trt.plan import plan_build

            console.print(plan_build(loaded, folder, fresh=fresh, **extent))
            return
        manifest = pipeline.build(loaded, folder, fresh=fresh, **extent)
        if json_logs:
            progress.note("done", folder=str(folder), stages=list(manifest.stages))
        else:
            from esparse_trt.summary import print_summary

            print_summary(console, manifest, folder)


@app.command(
    epilog="Examples:\n\n  esparse-trt ablate recipes/quickstart.yaml\n\n"
    "  esparse-trt ablate recipes/quickstart.yaml --only wanda --only e_sparse\n\n"
    "  esparse-trt ablate recipes/quickstart.yaml --grid recipes/grids/quickstart.yaml"
)
def ablate(
    recipe: RecipeArgument,
    out: Annotated[Path | None, typer.Option(help="Build folder (default: build/<recipe name>)")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run only this row; may be repeated")] = None,
    grid: Annotated[Path | None, typer.Option(help="YAML file with rows to run instead")] = None,
    json_logs: JsonLogs = False,
) -> None:
    """Prune one model with every method and with each part of E-Sparse taken away, and compare.

    Writes ablation.json into the build folder, row by row, so that it resumes,
    and ablation.html; the report shows the table, too.
    """
    with reported(json_logs):
        from esparse_trt.ablate import run_ablation
        from esparse_trt.evaluate.ablation_page import print_table
        from esparse_trt.recipe import load_recipe

        loaded = load_recipe(recipe)
        table = run_ablation(loaded, out or Path("build") / loaded.name, only=only, grid=grid)
        print_table(console, table)
