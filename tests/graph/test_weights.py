"""Weights from checkpoint to ONNX: one at a time, atomic, and with errors that name the tensor."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections import namedtuple
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from onnxscript import ir
from safetensors.torch import save_file

from esparse_trt.errors import EsparseError
from esparse_trt.graph.trace import TracedGraph
from esparse_trt.graph.weights import Checkpoint, write_model

SHAPES = {"model.embed.weight": (12, 8), "model.fc.weight": (6, 8), "model.norm.weight": (8,)}


def graph(dtype: ir.DataType = ir.DataType.FLOAT) -> TracedGraph:
    """Initializers without data: `fc` is wanted transposed, the others as they are."""
    values = [
        ir.Value(name=name, shape=ir.Shape(shape[::-1] if "fc" in name else shape), type=ir.TensorType(dtype))
        for name, shape in SHAPES.items()
    ]
    inner = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 20}, name="test")
    return TracedGraph(ir.Model(inner, ir_version=10), {name: "fc" in name for name in SHAPES})


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor], **options: object) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    return Checkpoint(folder, **options)


def stored(path: Path) -> dict[str, torch.Tensor]:
    initializers = onnx.load(path).graph.initializer
    return {tensor.name: torch.tensor(numpy_helper.to_array(tensor)) for tensor in initializers}


def test_values_are_cast_permuted_and_transposed(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    order = torch.randperm(8)
    source = checkpoint(tmp_path, {name: tensor.bfloat16() for name, tensor in weights.items()})
    written = write_model(graph(ir.DataType.FLOAT16), tmp_path / "m.onnx", source, {"model.fc.weight": order})
    values = stored(tmp_path / "m.onnx")
    assert all(tensor.dtype == torch.float16 for tensor in values.values())
    assert torch.equal(values["model.embed.weight"], weights["model.embed.weight"].bfloat16().half())
    assert torch.equal(values["model.fc.weight"], weights["model.fc.weight"].bfloat16().half()[:, order].T)
    assert written == sum((tmp_path / name).stat().st_size for name in ("m.onnx", "m.onnx.data"))


def test_one_tensor_at_a_time(
    tmp_path: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(tmp_path, weights)
    alive: list[weakref.ref[torch.Tensor]] = []
    read = Checkpoint.read

    def counted(self: Checkpoint, parameter: str) -> torch.Tensor:
        gc.collect()
        assert not [ref for ref in alive if ref() is not None], f"before {parameter}"
        tensor = read(self, parameter)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Checkpoint, "read", counted)
    write_model(graph(), tmp_path / "m.onnx", source, {})
    assert len(alive) == len(SHAPES)


def test_shards(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    names = {name: f"model-{i}-of-3.safetensors" for i, name in enumerate(weights)}
    for name, file in names.items():
        save_file({name: weights[name]}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    source = Checkpoint(tmp_path)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in weights.items())


def test_names_with_and_without_the_base_model_prefix(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    bare = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    source = checkpoint(tmp_path, bare, prefix="model")
    assert torch.equal(source.read("model.fc.weight"), weights["model.fc.weight"])
    source = checkpoint(tmp_path, weights, prefix="model")
    assert torch.equal(source.read("fc.weight"), weights["model.fc.weight"])


def test_tied_parameters_are_read_from_their_partner(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    ties = {"lm_head.weight": "model.embed.weight"}
    source = checkpoint(tmp_path, weights, tied=ties)
    assert torch.equal(source.read("lm_head.weight"), weights["model.embed.weight"])
    head = torch.zeros(12, 8)
    source = checkpoint(tmp_path, weights | {"lm_head.weight": head}, tied=ties)
    assert torch.equal(source.read("lm_head.weight"), head)


@pytest.mark.parametrize(
    ("name", "tensor", "message", "fix"),
    [
        ("model.fc.weight", None, "no tensor 'model.fc.weight'", "belong to the same model"),
        ("model.fc.weight", torch.ones(8, 6), r"'model.fc.weight' is \[8, 6\].*\[6, 8\]", "same model"),
        (
            "model.norm.weight",
            torch.full((8,), 7e4),
            "'model.norm.weight' does not fit float16: .* 70000",
            "export.dtype: float32",
        ),
        ("model.norm.weight", torch.full((8,), torch.nan), "'model.norm.weight'", "it holds NaN or Inf"),
    ],
)
def test_errors_name_the_tensor_and_leave_nothing(
    tmp_path: Path,
    weights: dict[str, torch.Tensor],
    name: str,
    tensor: torch.Tensor | None,
    message: str,
    fix: str,
) -> None:
    tensors = {key: value for key, value in weights.items() if key != name}
    source = checkpoint(tmp_path, tensors if tensor is None else tensors | {name: tensor})
    with pytest.raises(EsparseError, match=message) as caught:
        write_model(graph(ir.DataType.FLOAT16), tmp_path / "onnx" / "m.onnx", source, {})
    assert fix in str(caught.value)
    assert list((tmp_path / "onnx").iterdir()) == []


def test_a_failed_write_keeps_the_previous_files(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    write_model(graph(), tmp_path / "m.onnx", checkpoint(tmp_path, weights), {})
    before = stored(tmp_path / "m.onnx")
    del weights["model.norm.weight"]
    with pytest.raises(EsparseError):
        write_model(graph(), tmp_path / "m.onnx", checkpoint(tmp_path, weights), {})
    after = stored(tmp_path / "m.onnx")
    assert all(torch.equal(after[name], before[name]) for name in SHAPES)


def test_no_disk_space(
    tmp_path: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 10))
    with pytest.raises(EsparseError, match="disk has 0 MiB left"):
        write_model(graph(), tmp_path / "m.onnx", checkpoint(tmp_path, weights), {})


def test_unreadable_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(EsparseError, match="cannot read the weights"):
        Checkpoint(tmp_path)
