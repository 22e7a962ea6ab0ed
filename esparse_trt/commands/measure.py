"""The commands about time: estimate, tune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from esparse_trt.commands.common import JsonLogs, app, console, reported


@app.command(
    epilog="Examples:\n\n  esparse-trt estimate recipes/llama-7b.yaml --gpu a100\n\n"
    "  esparse-trt estimate --shape llama-3-8b --batch 1,64 --prompt 2048"
)
def estimate(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe file (YAML)", show_default=False)] = None,
    shape: Annotated[
        str | None, typer.Option(help="A well-known shape instead, such as llama-7b or qwen2.5-0.5b")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="h100, a100, l40s, rtx4090, b200 ... (default: this machine's, or h100)"),
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="Table of `tune` (default: that of the GPU in the user's cache)")
    ] = None,
    batch: Annotated[
        str | None, typer.Option(help="Numbers of sequences, such as 1,16 (default: the recipe's traffic)")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Tokens of each prompt, such as 512,4096")] = None,
    generated: Annotated[int | None, typer.Option(min=0, help="Tokens generated after each prompt")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the estimate as JSON")] = False,
) -> None:
    """Say before any work whether sparsity will pay: per layer, end to end, in memory and on disk.

    Reads the model's configuration only. Times come from the tuner's table of the
    GPU, from the reference that this package ships for the H100, or else from a
    roofline; the output says which.
    """
    with reported():
        from esparse_trt.estimate.ask import ask
        from esparse_trt.estimate.show import show
        from esparse_trt.evaluate.bench_grid import parse_numbers

        batches = parse_numbers(batch, "--batch", 1, 1024) if batch else ()
        prompts = parse_numbers(prompt, "--prompt", 1, 1 << 20) if prompt else ()
        found = ask(recipe, shape, gpu, table, batches, prompts, generated)
        if json_output:
            print(found.model_dump_json(indent=1))
        else:
            console.print(show(found))


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
    json_logs: JsonLogs = False,
) -> None:
    """Time every Sparse-GEMM kernel on this GPU for a model's layers, and keep the fastest of each.

    The table says which kernel runs at which number of tokens, and which layers
    dense is faster for. Rows are written as they come: run again, it measures
    what is missing.
    """
    with reported(json_logs):
        from esparse_trt import tuning
        from esparse_trt.recipe import load_recipe

        loaded = load_recipe(recipe) if recipe else None
        folder = out or (Path("build") / loaded.name if loaded else None)
        tuning.run(console, loaded, folder, [tuning.parse_shape(s) for s in shape or []], m, dtype, table)
