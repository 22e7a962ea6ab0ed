"""An ONNX file as a graph: who makes and who reads each tensor, its shape, and weights read one at a time.

Only the structure is in memory; tensors in external data are read when asked for, and `write_model` writes
them one by one, so that neither needs more memory than the largest tensor, whatever the size of the model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    external_data_helper,
    numpy_helper,
)

from esparse_trt.errors import EsparseError
from esparse_trt.graph.basis import Dim, Shape

_INLINE_BYTES = 1024  # smaller tensors, such as scalars and axes, stay inside the .onnx file
_PAGE = 4096  # alignment that the ONNX standard recommends, so that runtimes can map the file


class OnnxGraph:
    """A graph without its large tensors.

    Attributes:
        model: the file's contents; external data is not loaded.
        shapes: of every tensor whose rank is known; symbolic sizes are names, unknown ones None.
        producers: tensor -> the node that makes it.
        consumers: tensor -> the nodes that read it, also from inside control flow, in graph order.
        initializers: name -> tensor without its external data.
        inputs, outputs: names of the graph's own.
    """

    def __init__(self, path: Path) -> None:
        """Read the structure of an ONNX file.

        Raises:
            EsparseError: the file cannot be read or is not an ONNX model.
        """
        self.path = path
        self.model = _load(path)
        graph = self.model.graph
        self.initializers: dict[str, TensorProto] = {t.name: t for t in graph.initializer}
        self.inputs = [v.name for v in graph.input if v.name not in self.initializers]
        self.outputs = [v.name for v in graph.output]
        self.shapes = _shapes(self.model, path)
        self.producers: dict[str, NodeProto] = {name: n for n in graph.node for name in n.output if name}
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in reads(node):
                self.consumers.setdefault(name, []).append(node)

    def read(self, name: str) -> NDArray:
        """The values of an initializer."""
        return read_tensor(self.initializers[name], self.path)

    def constant(self, name: str) -> NDArray | None:
        """The value of an initializer or Constant node, or None if the tensor is computed."""
        if name in self.initializers:
            return self.read(name)
        node = self.producers.get(name)
        if node is None or node.op_type != "Constant":
            return None
        value = onnx.helper.get_attribute_value(node.attribute[0])
        return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """An attribute of a node, or `default` where it is absent."""
    for item in node.attribute:
        if item.name == name:
            return onnx.helper.get_attribute_value(item)
    return default


def reads(node: NodeProto) -> list[str]:
    """The tensors that a node reads; of control flow also every name inside, as it may come from outside."""
    return [name for name in dict.fromkeys([*node.input, *_inside(node)]) if name]


def _inside(node: NodeProto) -> list[str]:
    graphs: list[GraphProto] = []
    for item in node.attribute:
        graphs += [item.g] if item.type == AttributeProto.GRAPH else []
        graphs += item.graphs if item.type == AttributeProto.GRAPHS else []
    names: list[str] = []
    for graph in graphs:
        names += [value.name for value in graph.output]
        for inner in graph.node:
            names += reads(inner)
    return names


def _load(path: Path) -> ModelProto:
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise EsparseError(
            f"cannot read the ONNX file: {error.strerror or error}", where=path, fix="give the path of a file"
        ) from error
    except DecodeError as error:
        raise EsparseError(
            "not an ONNX file, or cut short", where=path, fix="export the model again"
        ) from error
    if not model.graph.node:
        raise EsparseError("the ONNX file holds no graph", where=path, fix="export the model again")
    return model


def _shapes(model: ModelProto, path: Path) -> dict[str, Shape]:
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise EsparseError(
            f"shapes in the ONNX file contradict each other: {error}",
            where=path,
            fix="export the model again",
        ) from error
    shapes: dict[str, Shape] = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        tensor = value.type.tensor_type
        if tensor.HasField("shape"):
            shapes[value.name] = tuple(_dim(dim) for dim in tensor.shape.dim)
    shapes.update((t.name, tuple(t.dims)) for t in graph.initializer)
    return shapes


def _dim(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    if dim.HasField("dim_value"):
        return dim.dim_value
    return dim.dim_param or None


# --- tensors -------------------------------------------------------------------------------------------


def tensor_bytes(tensor: TensorProto) -> int:
    """Size of a tensor's values."""
    return math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def read_tensor(tensor: TensorProto, model: Path) -> NDArray:
    """The values of a tensor of the ONNX file `model`, from the file itself or its external data.

    Raises:
        EsparseError: the external data is missing or too short.
    """
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    info = external_data_helper.ExternalDataInfo(tensor)
    path = model.parent / info.location
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    count = math.prod(tensor.dims)
    try:
        values = np.fromfile(path, dtype=dtype, count=count, offset=info.offset or 0)
    except OSError as error:
        raise EsparseError(
            f"cannot read the external data of {tensor.name!r}: {error.strerror or error}",
            where=path,
            fix=f"keep it beside {model.name}, or export the model again",
        ) from error
    if values.size != count:
        raise EsparseError(
            f"{tensor.name!r} needs {count * dtype.itemsize} bytes at offset {info.offset or 0}, but the "
            f"file has {path.stat().st_size} bytes",
            where=path,
            fix="the file was cut short: copy it or export the model again",
        )
    return values.reshape(tuple(tensor.dims))


def write_model(model: ModelProto, read: Callable[[str], NDArray], path: Path) -> int:
    """Write a model with all its larger tensors in one file `<name>.data` beside it.

    Both are written under temporary names and renamed; the data first, since the model refers to it.

    Args:
        model: the graph; its initializers give the names and are overwritten.
        read: the values of an initializer, by name.
        path: the .onnx file.

    Returns:
        Bytes of both files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_name(f"{path.name}.data")
    with _replacing(data) as file:
        for tensor in model.graph.initializer:
            _store(tensor, np.asarray(read(tensor.name), order="C"), file, data.name)
    with _replacing(path) as file:
        file.write(model.SerializeToString())
    return path.stat().st_size + data.stat().st_size


def _store(tensor: TensorProto, values: NDArray, file: BinaryIO, location: str) -> None:
    """Give an initializer its values: in the model if they are few, else at the end of `file`."""
    name, doc = tensor.name, tensor.doc_string
    if values.nbytes < _INLINE_BYTES:
        tensor.CopyFrom(numpy_helper.from_array(values, name))
        tensor.doc_string = doc
        return
    offset = file.seek(-(-file.tell() // _PAGE) * _PAGE)
    file.write(values.view(np.uint8).reshape(-1).data)
    data_type = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
    tensor.CopyFrom(TensorProto(name=name, data_type=data_type, dims=values.shape, doc_string=doc))
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", values.nbytes)):
        tensor.external_data.add(key=key, value=str(value))


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place when the block succeeds and its data is on disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def keep(items: Any, wanted: Callable[[Any], bool]) -> None:
    """Filter a repeated protobuf field in place."""
    kept = [item for item in items if wanted(item)]
    del items[:]
    items.extend(kept)
