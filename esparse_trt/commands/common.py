"""What all commands share: the application, the console, and how errors are reported.

`--help` prints the docstrings of commands. From the second paragraph on it leaves their lines as they are, so
they fit a terminal of 80 columns.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from esparse_trt import progress
from esparse_trt.errors import EsparseError

app = typer.Typer(
    help="Prune language models to N:M sparsity (E-Sparse) and deploy them with ONNX, TensorRT and Triton.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=True,
)
console = Console(width=None if sys.stdout.isatty() else 1000)  # no lines are folded for programs

RecipeArgument = Annotated[Path, typer.Argument(help="Recipe file (YAML)", show_default=False)]
JsonLogs = Annotated[bool, typer.Option("--json", help="JSON lines on stderr instead of progress bars")]


@contextmanager
def reported(json_logs: bool = False) -> Iterator[None]:
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
