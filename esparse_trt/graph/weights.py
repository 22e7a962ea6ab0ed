"""Fill a traced graph with the weights of a checkpoint, one tensor at a time.

The ONNX file carries names, shapes and offsets; the values go to `<name>.onnx.data` beside it, each read from
safetensors, cast, permuted and transposed by itself, so that memory never holds more than one of them.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from onnxscript import ir
from safetensors import SafetensorError, safe_open
from torch import Tensor

from esparse_trt import model as models
from esparse_trt.errors import EsparseError
from esparse_trt.graph.trace import TracedGraph
from esparse_trt.progress import track

_ALIGNMENT = 4096  # one page, so that runtimes can map each tensor


class Checkpoint:
    """The tensors of a Hugging Face folder, by parameter name.

    Args:
        folder: holds `model.safetensors`, or shards and `model.safetensors.index.json`.
        prefix: the architecture's base model prefix; some checkpoints leave it out of their names.
        tied: parameter name -> the parameter that it is tied to, for those that the folder does not hold.
    """

    def __init__(self, folder: Path, *, prefix: str = "", tied: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.prefix = f"{prefix}."
        self.tied = dict(tied or {})
        self._files = _files_by_tensor(folder)

    def read(self, parameter: str) -> Tensor:
        """One tensor. The file is mapped only for as long as the tensor lives.

        Raises:
            EsparseError: the checkpoint has no such tensor.
        """
        names = (parameter, parameter.removeprefix(self.prefix), self.prefix + parameter)
        for name in names:
            if name in self._files:
                with safe_open(self._files[name], framework="pt") as file:
                    return file.get_tensor(name)
        if parameter in self.tied:
            return self.read(self.tied[parameter])
        raise EsparseError(
            f"the checkpoint has no tensor {parameter!r}, which its config.json asks for",
            where=self.folder,
            fix="check that config.json and the safetensors files belong to the same model",
        )


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    files = {}
    for path in models.weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                files.update(dict.fromkeys(file.keys(), path))
        except (OSError, SafetensorError) as error:
            raise EsparseError(
                f"cannot read the weights: {error}", where=path, fix="download or prune the model again"
            ) from error
    return files


def write_model(
    traced: TracedGraph, path: Path, checkpoint: Checkpoint, permutations: Mapping[str, Tensor]
) -> int:
    """Write `path` and `path` + `.data`, each under a temporary name until it is complete.

    Args:
        traced: the graph; its weights are given their place in the data file.
        path: the ONNX file.
        checkpoint: where the weights are read.
        permutations: initializer name -> order of its input channels, int64 `[K]`, where it is not the
            checkpoint's own.

    Returns:
        Bytes of both files together.

    Raises:
        EsparseError: a tensor is missing, has another shape, or does not fit the dtype; the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_name(f"{path.name}.data")
    places = _assign_places(traced, data.name)
    _check_space(path.parent, sum(place.length or 0 for place in places.values()))
    with _replacing(path) as new_path, _replacing(data) as new_data:
        with new_data.open("wb") as file:
            for name, place in track(list(places.items()), f"write {data.name}", unit="tensor"):
                file.seek(place.offset or 0)
                # No tensor outlives its line: the next one would be in memory beside it.
                file.write(_bytes(_values(place, traced.weights[name], checkpoint, permutations.get(name))))
            _flush(file)
        with new_path.open("wb") as file:
            file.write(ir.to_proto(traced.model).SerializeToString())
            _flush(file)
    return path.stat().st_size + data.stat().st_size


def _bytes(values: Tensor) -> memoryview:
    return values.view(-1).numpy().data.cast("B")


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _assign_places(traced: TracedGraph, location: str) -> dict[str, ir.ExternalTensor]:
    """Give every weight its offset in the data file, in the order of the graph's initializers."""
    places: dict[str, ir.ExternalTensor] = {}
    offset = 0
    for name, value in traced.model.graph.initializers.items():
        if name not in traced.weights:
            continue
        assert value.dtype is not None and value.shape is not None
        length = int(value.dtype.itemsize * math.prod(value.shape.numpy()))
        value.const_value = places[name] = ir.ExternalTensor(
            location, offset, length, value.dtype, shape=value.shape, name=name
        )
        offset += -(-length // _ALIGNMENT) * _ALIGNMENT
    return places


def _values(
    place: ir.ExternalTensor, transposed: bool, checkpoint: Checkpoint, permutation: Tensor | None
) -> Tensor:
    """The contiguous values of one initializer."""
    source = checkpoint.read(place.name)
    shape = tuple(place.shape.numpy())
    expected = shape[::-1] if transposed else shape
    if tuple(source.shape) != expected:
        raise EsparseError(
            f"tensor {place.name!r} is {list(source.shape)}, config.json makes it {list(expected)}",
            where=checkpoint.folder,
            fix="check that config.json and the safetensors files belong to the same model",
        )
    values = source.to(_TORCH[place.dtype])
    if not values.isfinite().all():
        largest = source.abs().max().item()
        raise EsparseError(
            f"tensor {place.name!r} does not fit {place.dtype.name.lower()}: its largest magnitude is "
            f"{largest:g}",
            where=checkpoint.folder,
            fix="set export.dtype: float32"
            if source.isfinite().all()
            else "repair the model: it holds NaN or Inf",
        )
    if permutation is not None:
        values = values[:, permutation]
    return (values.T if transposed else values).contiguous()


_TORCH = {ir.DataType.FLOAT16: torch.float16, ir.DataType.FLOAT: torch.float32}


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EsparseError(
            f"the weights need {needed / 2**20:.0f} MiB, the disk has {free / 2**20:.0f} MiB left",
            where=folder,
            fix="free disk space, or choose another folder with --out",
        )


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block succeeds, and is removed if not."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
