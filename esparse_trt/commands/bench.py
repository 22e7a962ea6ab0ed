"""The command `bench`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from esparse_trt.commands.common import JsonLogs, app, reported
from esparse_trt.errors import EsparseError


class HalfType(str, Enum):
    """Types that packed weights come in."""

    float16 = "float16"
    bfloat16 = "bfloat16"


@app.command(
    epilog="Examples:\n\n  esparse-trt bench build/quickstart\n\n"
    "  esparse-trt bench --shape llama-7b --batch 1,16 --prompt 512,4096\n\n"
    "  esparse-trt bench --show build/quickstart/bench.json"
)
def bench(
    folder: Annotated[Path | None, typer.Argument(help="A build folder", show_default=False)] = None,
    shape: Annotated[
        str | None, typer.Option(help="Instead of a build: a model shape, random weights (llama-7b, ...)")
    ] = None,
    batch: Annotated[str, typer.Option(help="Numbers of sequences")] = "1,4,16,64",
    prompt: Annotated[str, typer.Option(help="Tokens of each prompt")] = "128,512,2048,8192",
    generated: Annotated[int, typer.Option(min=8, max=4096, help="Tokens generated after a prompt")] = 128,
    dtype: Annotated[HalfType, typer.Option(help="Type of weights and activations")] = HalfType.float16,
    out: Annotated[
        Path | None,
        typer.Option(help="Record (default: bench.json in the build, build/bench/<shape>.json)"),
    ] = None,
    show: Annotated[
        list[Path] | None, typer.Option(help="Print a record as Markdown, measure nothing; may be repeated")
    ] = None,
    json_logs: JsonLogs = False,
) -> None:
    """Measure prefill and decode of the sparse model against the dense one on this GPU, end to end.

    Both run the same code, in turns, in one process: static KV cache, CUDA
    graphs; dense layers by cuBLAS. Also memory, energy, each layer's kernel and
    time, and the distance of the logits. Run again, it measures what is missing.
    The build's report shows it.
    """
    with reported(json_logs):
        if show:
            _show(show)
            return
        from esparse_trt.evaluate import bench_text
        from esparse_trt.evaluate.bench_grid import Grid, parse_numbers
        from esparse_trt.evaluate.bench_subjects import bench_build, bench_shape

        if (folder is None) == (shape is None):
            raise EsparseError(
                "give either a build or a shape", fix="name the folder of a build, or --shape llama-7b"
            )
        grid = Grid(
            parse_numbers(batch, "--batch", 1, 1024),
            parse_numbers(prompt, "--prompt", 1, 1 << 20),
            generated,
        )
        if shape is not None:
            found = bench_shape(shape, grid, dtype.value, out or Path("build/bench") / f"{shape}.json")
        else:
            assert folder is not None
            from esparse_trt.evaluate.report import report_again

            found = bench_build(folder, grid, dtype.value, out or folder / "bench.json")
            report_again(folder)
        print(bench_text.markdown(found))


def _show(paths: list[Path]) -> None:
    from esparse_trt.evaluate import bench_text
    from esparse_trt.evaluate.bench_record import load_bench

    for path in paths:
        found = load_bench(path)
        if found is None:
            raise EsparseError("there is no such file", where=path, fix="name a record of `bench`")
        print(bench_text.markdown(found))
