"""The command line: parse, call, print. Everything it does is also there as a Python function."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

import typer

from esparse_trt.commands import bench, build, inspect, measure  # noqa: F401 (they register their commands)
from esparse_trt.commands.common import app

# As somebody who is new here needs them; `--help` lists them so, and groups (recipe) at the end.
ORDER = ("build", "estimate", "bench", "report", "certify", "tune", "ablate", "table", "doctor")
app.registered_commands.sort(key=lambda command: ORDER.index(command.callback.__name__))  # type: ignore[union-attr]


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


def main() -> None:
    """Entry point of the console script."""
    app()
