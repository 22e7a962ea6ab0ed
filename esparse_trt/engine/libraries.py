"""Where the shared libraries of `plugins/` lie: libesparse_kernels.so and libesparse_trt_plugin.so.

Looked for in this order: the folder that the environment variable ESPARSE_LIBRARY_DIR names (and then nowhere
else), the one that is packaged with this module, and build folders at the root of a source tree.
"""

from __future__ import annotations

import os
from pathlib import Path

from esparse_trt.errors import EsparseError

KERNELS = "libesparse_kernels.so"
PLUGIN = "libesparse_trt_plugin.so"
VARIABLE = "ESPARSE_LIBRARY_DIR"
BUILD = "`cmake -S . -B build -G Ninja && cmake --build build` in the source tree (needs nvcc)"

_PACKAGE = Path(__file__).resolve().parents[1]


def search_folders() -> list[Path]:
    """The folders in which libraries are looked for, first the one that wins."""
    if chosen := os.environ.get(VARIABLE):
        return [Path(chosen)]
    source_tree = _PACKAGE.parent
    return [_PACKAGE / "lib", *sorted(source_tree.glob("build*/plugins"))]


def find_library(name: str) -> Path:
    """The path of a library, `KERNELS` or `PLUGIN`.

    Raises:
        EsparseError: it is in none of the folders; names them.
    """
    folders = search_folders()
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise EsparseError(
        f"{name} was not found in {', '.join(map(str, folders))}",
        where=VARIABLE if os.environ.get(VARIABLE) else None,
        fix=f"build it with {BUILD}, or set {VARIABLE} to the folder that holds it",
    )
