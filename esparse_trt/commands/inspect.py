"""The commands that look at files and at the machine: certify, report, table, recipe, doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from esparse_trt.commands.common import RecipeArgument, app, console, reported
from esparse_trt.errors import EsparseError

recipe_app = typer.Typer(
    help="Look at recipes: their JSON schema, or what one of them will do.", no_args_is_help=True
)
app.add_typer(recipe_app, name="recipe")


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

    A build folder is checked strictly: every tensor that its recipe made sparse,
    in every file. For a single file every 2-D weight is listed, and the first
    violation among those asked for makes the exit code 1.
    """
    with reported():
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
    with reported():
        from esparse_trt.evaluate import report as reports

        if schema:
            print(json.dumps(reports.report_schema(), indent=2))
            return
        if folder is None:
            raise EsparseError("no build is named", fix="give the folder of a build")
        reports.report_again(folder)
        print(folder / "report.html")


@app.command(
    epilog="Examples:\n\n  esparse-trt table recipes/results/ablation-quickstart.json\n\n"
    "  esparse-trt table build/quickstart --html ablation.html\n\n"
    "  esparse-trt table build/gpu0 build/gpu1 --json ablation.json"
)
def table(
    paths: Annotated[
        list[Path],
        typer.Argument(
            help="ablation.json or the build folder it is in; the rows of several are joined",
            show_default=False,
        ),
    ],
    html: Annotated[Path | None, typer.Option(help="Write the page with the plots to this file")] = None,
    to_json: Annotated[Path | None, typer.Option("--json", help="Write the table to this file")] = None,
) -> None:
    """Print the table of an ablation as Markdown, best row first, baselines and the dense model included."""
    with reported():
        from esparse_trt.artifacts import BuildDir, write_atomic
        from esparse_trt.evaluate import ablation_page
        from esparse_trt.evaluate.ablation import join, load_ablation

        tables = []
        for path in paths:
            table = load_ablation(BuildDir(path).ablation if path.is_dir() else path)
            if table is None:
                raise EsparseError(
                    "no ablation table there", where=path, fix="make one with `esparse-trt ablate RECIPE`"
                )
            tables.append(table)
        found = join(tables)
        if to_json is not None:
            write_atomic(to_json, found.to_json())
        if html is not None:
            write_atomic(html, ablation_page.page(found))
        print(ablation_page.markdown(found), end="")


@recipe_app.command("schema", epilog="Example:\n\n  esparse-trt recipe schema > esparse-recipe.schema.json")
def recipe_schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from esparse_trt.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(by_alias=True), indent=2))


@recipe_app.command("check", epilog="Example:\n\n  esparse-trt recipe check recipes/quickstart.yaml")
def recipe_check(recipe: RecipeArgument) -> None:
    """Validate a recipe and explain what it will do."""
    with reported():
        from esparse_trt.recipe import load_recipe
        from esparse_trt.recipe_explain import explain

        print(explain(load_recipe(recipe)))


@app.command()
def doctor(
    json_output: Annotated[bool, typer.Option("--json", help="Print the findings as JSON")] = False,
) -> None:
    """Show what is installed, what a build would skip, and why."""
    with reported():
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
