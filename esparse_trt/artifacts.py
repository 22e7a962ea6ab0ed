"""What passes between stages: the layout of a build folder and its manifest.

Every stage writes its files under temporary names, renames them, and returns its record (`records.py`); the
pipeline stores the records in `build.json`.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from esparse_trt.errors import EsparseError
from esparse_trt.records import Record


class BuildDir:
    """The folder of one build. Paths only: nothing is created or read here."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).resolve()

    def __getattr__(self, name: str) -> Path:
        if name in _LAYOUT:
            return self.root / _LAYOUT[name]
        raise AttributeError(name)


_LAYOUT = {
    "manifest": "build.json",
    "source": "source",  # the dense model as a local folder, when it came from a GGUF file
    "journal": "journal",  # pruned blocks of an unfinished prune stage
    "checkpoint": "checkpoint",
    "permutation": "permutation.safetensors",
    "onnx": "onnx",
    "dense_onnx": "onnx/dense.onnx",
    "explicit_onnx": "onnx/explicit.onnx",
    "sparse_onnx": "onnx/sparse.onnx",
    "packed_onnx": "onnx/packed.onnx",
    "engine_onnx": "onnx/engine.onnx",  # packed.onnx as the plugin's engine is built from it
    "fold_plan": "fold_plan.json",
    "certificate": "certificate.json",
    "engine": "engine",
    "dense_plan": "engine/dense.plan",
    "sparse_plan": "engine/sparse.plan",
    "polygraphy": "polygraphy",  # inputs and logits of the comparison, for Polygraphy's own tools
    "ablation": "ablation.json",
    "ablation_html": "ablation.html",
    "bench": "bench.json",
    "report_html": "report.html",
    "report_json": "report.json",
    "model_repository": "model_repository",
}


# --- manifest --------------------------------------------------------------------------------------------

R = TypeVar("R", bound=Record)


class StageEntry(Record):
    """A finished stage."""

    seconds: float
    peak_rss_bytes: int = Field(description="largest resident set of the process while the stage ran")
    finished: str = Field(description="ISO 8601, UTC")
    record: dict[str, Any]


class Manifest(Record):
    """`build.json`: the recipe that owns the folder and everything its finished stages reported."""

    schema_version: int = 1
    version: str = Field(description="esparse-trt that wrote it")
    recipe: dict[str, Any] = Field(description="canonical form, all defaults filled in")
    fingerprint: str = Field(description="SHA-256 of the canonical recipe")
    environment: dict[str, str]
    stages: dict[str, StageEntry] = Field(default_factory=dict)

    def record(self, stage: str, kind: type[R]) -> R:
        """The record of a finished stage.

        Raises:
            EsparseError: the stage has not run yet, or another version of this package wrote its record.
        """
        if stage not in self.stages:
            done = ", ".join(self.stages) or "none"
            raise EsparseError(
                f"stage `{stage}` has not run (finished: {done})", fix="run `esparse-trt build` again"
            )
        try:
            return kind.model_validate(self.stages[stage].record)
        except ValidationError as error:
            raise EsparseError(
                f"the record of stage `{stage}` is not one that this version understands: {_fault(error)}",
                where="build.json",
                fix=f"`esparse-trt build RECIPE --from {stage}` writes it again",
            ) from error


def load_manifest(folder: BuildDir) -> Manifest | None:
    """The manifest of a build folder, or None where there is none yet.

    Raises:
        EsparseError: `build.json` is there but cannot be read.
    """
    return read_record(folder.manifest, Manifest, "a manifest", "start over with --fresh")


# --- files -----------------------------------------------------------------------------------------------


def read_record(path: Path, kind: type[R], what: str, fix: str) -> R | None:
    """A record from its JSON file, or None where there is none.

    Args:
        path: the file.
        kind: its class.
        what: what it should be, as the error calls it: "a manifest".
        fix: what the error tells to do.

    Raises:
        EsparseError: the file is there but cannot be read.
    """
    if not path.exists():
        return None
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise EsparseError(f"cannot read it: {error.strerror}", where=path, fix=fix) from error
    except ValidationError as error:
        raise EsparseError(
            f"not {what} that this version understands: {_fault(error)}", where=path, fix=fix
        ) from error


def _fault(error: ValidationError) -> str:
    """The first of what pydantic found, on one line, and how many there are."""
    first, *more = error.errors()
    place = ".".join(map(str, first["loc"]))
    found = f"`{place}`: {first['msg']}" if place else first["msg"]
    return f"{found} (and {len(more)} more)" if more else found


def sha256_file(path: Path, chunk: int = 1 << 22) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(chunk):
            digest.update(block)
    return digest.hexdigest()


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file under a temporary name beside it, flush it to disk and rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
