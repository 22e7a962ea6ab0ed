"""`esparse-trt certify FILE`: the N:M share of every weight of any safetensors or ONNX file."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from numpy.typing import NDArray
from pydantic import Field
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError, safe_open

from esparse_trt.checkpoint import INDEX, weight_files
from esparse_trt.errors import CheckFailed, EsparseError
from esparse_trt.graph.graph import OnnxGraph
from esparse_trt.graph.groups import as_numpy, examine
from esparse_trt.graph.signature import reduction_axis
from esparse_trt.progress import track
from esparse_trt.records import Record
from esparse_trt.sparsity.pattern import Pattern

_DTYPES = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8"}  # others hold packed bits or indices
_NOT_ASKED = ("*embed*", "*wte*", "*wpe*", "*lm_head*")  # 2-D, but as a rule not pruned


class WeightRow(Record):
    """One 2-D weight of a file."""

    file: str
    name: str
    shape: tuple[int, int]
    k_axis: int = Field(description="which axis is K, the input channels")
    groups: int = Field(description="0 where m does not divide K")
    conforming: float = Field(description="share of the groups along K that have at most n nonzeros")
    sparsity: float = Field(description="share of zeros")
    asked: bool = Field(description="whether a violation counts as a failure")
    problem: str | None = Field(description="the first violation, or why there are no groups")


def certify_file(path: Path, pattern: str, globs: list[str] | None = None) -> list[WeightRow]:
    """Look at every 2-D weight of a file along K.

    Args:
        path: a .safetensors file, a safetensors index, a folder with either, or an ONNX file. Safetensors are
            taken to be `[N, K]`, as Hugging Face stores linears; in ONNX the node that reads a weight tells.
        pattern: n:m.
        globs: names of the tensors that are asked for; by default all but embeddings and the head.

    Raises:
        EsparseError: the file cannot be read, holds no 2-D weight, or none that a glob asks for.
    """
    wanted = Pattern.parse(pattern)
    weights = _onnx_weights(path) if path.suffix == ".onnx" else _safetensors_weights(path)
    rows = [
        _row(file, name, values, k_axis, wanted, _is_asked(name, globs))
        for file, name, values, k_axis in track(weights, f"certify {path.name}", unit="tensor")
    ]
    if not rows:
        raise EsparseError("no 2-D weights in the file", where=path, fix="give a file with linear layers")
    for glob in globs or []:
        if not any(fnmatchcase(row.name, glob) for row in rows):
            raise EsparseError(
                f"no 2-D weight is called {glob!r}; the first of {len(rows)} is {rows[0].name!r}",
                where=path,
                fix="correct --tensors; without it all weights are listed",
            )
    return rows


def require_conforming(rows: list[WeightRow], pattern: str) -> None:
    """Raise a CheckFailed naming the first violation among the weights that are asked for."""
    for row in rows:
        if row.asked and row.problem:
            raise CheckFailed(
                f"tensor {row.name!r} is not {pattern} along K: {row.problem}",
                where=row.file,
                fix="name the tensors that should be sparse with --tensors; if the file is part of a build, "
                "its channels may be permuted: certify the build folder instead",
            )


def table(rows: list[WeightRow], pattern: str) -> Table:
    """The rows for people."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("tensor", min_width=max(len(row.name) for row in rows))  # never cut a name
    for heading in ("shape", "K", f"{pattern} groups", "zeros", ""):
        shown.add_column(heading)
    for row in rows:
        share = f"{row.conforming:.2%}" if row.groups else "—"
        verdict = "[green]yes[/]" if not row.problem else "[red]no[/]" if row.asked else "not asked"
        size = " x ".join(str(extent) for extent in row.shape)
        shown.add_row(Text(row.name), size, str(row.shape[row.k_axis]), share, f"{row.sparsity:.1%}", verdict)
    return shown


def _is_asked(name: str, globs: list[str] | None) -> bool:
    if globs:
        return any(fnmatchcase(name, glob) for glob in globs)
    return not any(fnmatchcase(name, glob) for glob in _NOT_ASKED)


def _row(file: Path, name: str, values: NDArray, k_axis: int, pattern: Pattern, asked: bool) -> WeightRow:
    channels = values.shape[k_axis]
    divides = channels % pattern.group == 0
    # Without groups of m, groups of 1 still count the zeros.
    found = examine(values, k_axis, pattern if divides else Pattern(1, 1))
    problem = None if not found.violation else str(found.violation)
    return WeightRow(
        file=str(file),
        name=name,
        shape=(values.shape[0], values.shape[1]),
        k_axis=k_axis,
        groups=found.groups if divides else 0,
        conforming=found.conforming / found.groups if divides and found.groups else 0.0,
        sparsity=found.sparsity,
        asked=asked,
        problem=problem if divides else f"K = {channels} is not a multiple of {pattern.group}",
    )


Weights = Iterator[tuple[Path, str, NDArray, int]]


def _onnx_weights(path: Path) -> Weights:
    """Weights that a MatMul or Gemm multiplies by; embedding tables that are only looked up have no K."""
    graph = OnnxGraph(path)
    for name, tensor in graph.initializers.items():
        k_axis = reduction_axis(graph, name) if len(tensor.dims) == 2 else None
        if k_axis is not None:
            yield path, name, graph.read(name), k_axis


def _safetensors_weights(path: Path) -> Weights:
    for file in _safetensors_files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    entry = tensors.get_slice(name)
                    if len(entry.get_shape()) == 2 and entry.get_dtype() in _DTYPES:
                        yield file, name, as_numpy(tensors.get_tensor(name)), 1
        except (SafetensorError, OSError) as error:
            raise EsparseError(
                f"not a whole safetensors file: {error}", where=file, fix="copy or download it again"
            ) from error


def _safetensors_files(path: Path) -> list[Path]:
    if path.suffix == ".safetensors":
        return [path]
    folder = path.parent if path.name == INDEX else path
    files = weight_files(folder) if folder.is_dir() else []
    if not files:
        raise EsparseError(
            "neither a build folder nor a file with weights",
            where=path,
            fix="give a folder that holds build.json or model.safetensors, or a .safetensors or .onnx file",
        )
    return files
