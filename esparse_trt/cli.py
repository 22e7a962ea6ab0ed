"""The command line: parse, call, print. Everything it does is also there as a Python function."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from esparse_trt import progress
from esparse_trt.errors import EsparseError

app = typer.Typer(
    help="Prune language models to N:M sparsity (E-Sparse) and deploy them with ONNX, TensorRT and Triton.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=True,
)
recipe_app = typer.Typer(
    help="Look at recipes: their JSON schema, or what one of them will do.", no_args_is_help=True
)
app.add_typer(recipe_app, name="recipe")
console = Console(width=None if sys.stdout.isatty() else 1000)  # no lines are folded for programs


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


def _print_version(asked: bool) -> None:
    if asked:
        print(f"esparse-trt {metadata.version('esparse-trt')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version")
    ] = False,
) -> None:
    pass


RecipeArgument = Annotated[Path, typer.Argument(help="Recipe file (YAML)", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON lines on stderr instead of progress bars")]


@contextmanager
def _reported(json_logs: bool = False) -> Iterator[None]:
    """Turn our errors into one message and an exit code; anything else is a bug and keeps its traceback."""
    progress.configure("json" if json_logs else "rich")
    try:
        yield
    except EsparseError as error:
        if json_logs:
            progress.note(
                "error", what=error.what, where=error.where, fix=error.fix, exit_code=error.exit_code
            )
        else:
            Console(stderr=True).print("[bold red]error:[/]", end=" ")
            print(error, file=sys.stderr)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        progress.note("interrupted; the same command resumes where it stopped", exit_code=130)
        raise typer.Exit(130) from error


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
    json_logs: JsonOption = False,
) -> None:
    """From a recipe to a verified sparse model, engines, a report and a Triton repository.

    Run again with the same recipe, it resumes where it stopped.
    """
    with _reported(json_logs):
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
    "  esparse-trt ablate recipes/quickstart.yaml --only wanda --only e_sparse"
)
def ablate(
    recipe: RecipeArgument,
    out: Annotated[Path | None, typer.Option(help="Build folder (default: build/<recipe name>)")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run only this row; may be repeated")] = None,
    grid: Annotated[Path | None, typer.Option(help="YAML file with rows to run instead")] = None,
    json_logs: JsonOption = False,
) -> None:
    """Prune one model with every method and with each part of E-Sparse taken away, and compare.

    Writes ablation.json into the build folder, row by row, so that it resumes; the report shows the table.
    """
    with _reported(json_logs):
        from esparse_trt.ablate import print_table, run_ablation
        from esparse_trt.recipe import load_recipe

        loaded = load_recipe(recipe)
        table = run_ablation(loaded, out or Path("build") / loaded.name, only=only, grid=grid)
        print_table(console, table)


@app.command(
    epilog="Examples:\n\n  esparse-trt certify build/quickstart\n\n"
    "  esparse-trt certify model.safetensors --pattern 2:4 --tensors '*mlp*'"
)
def certify(
    path: Annotated[
        Path, typer.Argument(help="A build folder, or a .safetensors or .onnx file", show_default=False)
    ],
    pattern: Annotated[str, typer.Option(help="Pattern to look for in a file, n:m")] = "2:4",
    tensors: Annotated[list[str] | None, typer.Option(help="Glob of tensor names; may be repeated")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the rows as JSON")] = False,
) -> None:
    """Check that weights are N:M sparse along K, the input-channel axis.

    A build folder is checked strictly: every tensor that its recipe made sparse, in every file. For a single
    file every 2-D weight is listed, and the first violation among those asked for makes the exit code 1.
    """
    with _reported():
        from esparse_trt.graph import certify as certificates

        if path.is_dir() and (path / "build.json").exists():
            record = certificates.certify_build(path)
            if json_output:
                print(record.model_dump_json(indent=1))
            else:
                print(f"{len(record.tensors)} tensors are {record.pattern} along K: {path}")
            return
        rows = certificates.certify_file(path, pattern, tensors)
        if json_output:
            print(json.dumps([row.model_dump() for row in rows], indent=1))
        else:
            console.print(certificates.table(rows, pattern))
        certificates.require_conforming(rows, pattern)


@app.command(epilog="Examples:\n\n  esparse-trt report build/quickstart\n\n  esparse-trt report --schema")
def report(
    folder: Annotated[Path | None, typer.Argument(help="A build folder", show_default=False)] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of report.json")] = False,
) -> None:
    """Write report.html and report.json of a build again."""
    with _reported():
        from esparse_trt.artifacts import BuildDir, load_manifest
        from esparse_trt.evaluate import report as reports
        from esparse_trt.recipe import parse_recipe

        if schema:
            print(json.dumps(reports.report_schema(), indent=2))
            return
        if folder is None:
            raise EsparseError("which build?", fix="give the folder of a build")
        build = BuildDir(folder)
        manifest = load_manifest(build)
        if manifest is None:
            raise EsparseError("no build.json there", where=folder, fix="give the folder of a build")
        recipe = parse_recipe(manifest.recipe, base=build.root, where=build.manifest)
        reports.report(recipe, build, manifest)
        print(folder / "report.html")


@app.command(
    epilog="Examples:\n\n  esparse-trt tune recipes/llama-3-8b.yaml\n\n"
    "  esparse-trt tune --shape 6144x4096 --m 1 --m 16"
)
def tune(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe file (YAML)", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Build folder (default: build/<recipe name>)")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="NxK of a layer, instead of the recipe's; may be repeated")
    ] = None,
    m: Annotated[
        list[int] | None, typer.Option(min=1, max=65536, help="Number of tokens; may be repeated")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float16 or bfloat16 (default: the recipe's export.dtype)")
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="Table to fill (default: one per GPU in the user's cache)")
    ] = None,
    json_logs: JsonOption = False,
) -> None:
    """Time every Sparse-GEMM kernel on this GPU for a model's layers, and keep the fastest of each.

    The table says which kernel runs at which number of tokens, and which layers dense is faster for. Rows are
    written as they come: run again, it measures what is missing.
    """
    with _reported(json_logs):
        from esparse_trt import tuning
        from esparse_trt.recipe import load_recipe

        loaded = load_recipe(recipe) if recipe else None
        folder = out or (Path("build") / loaded.name if loaded else None)
        tuning.run(console, loaded, folder, [tuning.parse_shape(s) for s in shape or []], m, dtype, table)


@recipe_app.command("schema", epilog="Example:\n\n  esparse-trt recipe schema > esparse-recipe.schema.json")
def recipe_schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from esparse_trt.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(by_alias=True), indent=2))


@recipe_app.command("check", epilog="Example:\n\n  esparse-trt recipe check recipes/quickstart.yaml")
def recipe_check(recipe: RecipeArgument) -> None:
    """Validate a recipe and explain what it will do."""
    with _reported():
        from esparse_trt.recipe import load_recipe
        from esparse_trt.recipe_explain import explain

        print(explain(load_recipe(recipe)))


@app.command()
def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Print the findings as JSON")] = False,
) -> None:
    """Show what is installed, what a build would skip, and why."""
    with _reported():
        from esparse_trt.doctor import diagnose

        findings = diagnose()
        if json_output:
            print(json.dumps([finding.__dict__ for finding in findings], indent=1))
            return
        table = Table(box=None, show_header=False, pad_edge=False)
        colours = {"ok": "green", "warning": "yellow", "missing": "red"}
        for finding in findings:
            said = Text(f"{finding.detail} → {finding.consequence}")  # no markup: there are brackets in it
            if finding.fix:
                said.append(f"\nfix: {finding.fix}")
            table.add_row(Text(finding.status, colours[finding.status]), finding.name, said)
        console.print(table)


def main() -> None:
    """Entry point of the console script."""
    app()
