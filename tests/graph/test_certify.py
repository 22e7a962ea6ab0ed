"""Certificates: what passes, what does not, and what the error says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file

from esparse_trt.artifacts import Manifest, StageEntry, sha256_file
from esparse_trt.errors import CheckFailed, EsparseError
from esparse_trt.graph import groups
from esparse_trt.graph.certify import certify, certify_build, certify_file, require_conforming, table
from esparse_trt.graph.fold import fold
from esparse_trt.graph.graph import OnnxGraph, write_model
from esparse_trt.records import CertifyRecord, EngineFile, EngineRecord
from esparse_trt.sparsity.pattern import Pattern, nm_mask

DOWN = "model.layers.1.mlp.down_proj"


def sparse(rows: int, channels: int, pattern: str = "2:4", seed: int = 0) -> torch.Tensor:
    """[N, K], N:M along K with exactly n nonzeros a group."""
    weight = torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))
    return weight * nm_mask(weight.abs(), Pattern.parse(pattern))


# --- groups --------------------------------------------------------------------------------------------


def naive(weight: NDArray, pattern: Pattern) -> tuple[int, int]:
    """Groups and conforming groups of a weight [N, K], counted one by one."""
    total = conforming = 0
    for row in weight.astype(np.float64):
        for start in range(0, len(row), pattern.group):
            total += 1
            conforming += sum(value != 0 for value in row[start : start + pattern.group]) <= pattern.kept
    return total, conforming


@pytest.mark.parametrize("k_axis", [0, 1])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8", "7:8"])
@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8]
)
def test_counts_like_a_loop(dtype: Any, pattern: str, k_axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_CHUNK", 60)  # several chunks
    random = np.random.default_rng(0)
    values = random.integers(-3, 4, (12, 32)) * (random.random((12, 32)) < 0.4)
    values[:, :8] = 0
    values[5, 8:16] = 3
    weight = values.astype(dtype)
    wanted = Pattern.parse(pattern)
    found = groups.examine(weight if k_axis else np.ascontiguousarray(weight.T), k_axis, wanted)
    total, conforming = naive(values, wanted)
    assert (found.groups, found.conforming) == (total, conforming)
    assert found.sparsity == pytest.approx((values == 0).mean())
    assert found.violation is not None
    row, group, shown = found.violation
    assert shown == values[row, group * wanted.group : (group + 1) * wanted.group].tolist()
    assert sum(value != 0 for value in shown) > wanted.kept


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_negative_zero_is_zero_and_nan_is_not(dtype: Any) -> None:
    weight = np.array([[-0.0, 1, -0.0, 2]], dtype=dtype)
    assert groups.examine(weight, 1, Pattern(2, 4)).violation is None
    weight[0, 0] = np.nan
    assert groups.examine(weight, 1, Pattern(2, 4)).violation is not None


# --- builds --------------------------------------------------------------------------------------------


@pytest.fixture
def build(families: Callable[..., Any]) -> SimpleNamespace:
    made = families("llama").build("gather")
    fold(made.recipe, made.folder, made.exported)
    return made


def run(build: SimpleNamespace) -> CertifyRecord:
    return certify(build.recipe, build.folder, build.pruned, build.exported)


def rewrite(path: Path, name: str, change: Callable[[NDArray], NDArray]) -> None:
    """Change one initializer of an ONNX file."""
    graph = OnnxGraph(path)
    tensors = {key: graph.read(key) for key in graph.initializers}
    tensors[name] = change(tensors[name])
    write_model(graph.model, tensors.__getitem__, path)


def test_certificate_of_a_build(build: SimpleNamespace) -> None:
    record = run(build)
    files = {"checkpoint", "onnx/explicit.onnx", "onnx/sparse.onnx"}
    assert {(t.where, t.name) for t in record.tensors} == {
        (file, f"{layer.name}.weight") for file in files for layer in build.pruned.layers
    }
    assert all(tensor.sparsity == 0.5 and tensor.groups > 0 for tensor in record.tensors)
    assert CertifyRecord.model_validate_json(build.folder.certificate.read_bytes()) == record
    for file, digest in record.sha256.items():
        assert sha256_file(build.folder.root / file) == digest
    assert {"onnx/sparse.onnx", "onnx/sparse.onnx.data", "checkpoint/model.safetensors"} <= set(record.sha256)


def test_the_checkpoint_is_sparse_only_in_permuted_order(build: SimpleNamespace) -> None:
    build.folder.permutation.unlink()
    with pytest.raises(CheckFailed, match=r"is not 2:4 along K: row .* nonzeros") as failure:
        run(build)
    assert failure.value.where == str(build.folder.checkpoint)


def test_one_weight_too_many_is_named(build: SimpleNamespace) -> None:
    def add(values: NDArray) -> NDArray:  # [K, N]
        values[8:12, 3] = [1, 2, 3, 0]
        return values

    rewrite(build.folder.sparse_onnx, f"{DOWN}.weight", add)
    found = "row 3, group 2 (channels 8 to 11) has 3 nonzeros: [1, 2, 3, 0]"
    with pytest.raises(
        CheckFailed, match=re.escape(f"'{DOWN}.weight' is not 2:4 along K: {found}")
    ) as failure:
        run(build)
    assert failure.value.where == str(build.folder.sparse_onnx)
    assert failure.value.exit_code == 1


def test_sparse_along_n_does_not_pass(build: SimpleNamespace) -> None:
    """Polygraphy's inspection of sparsity accepts this."""

    def along_n(values: NDArray) -> NDArray:  # [K, N]
        return sparse(*values.shape).numpy()

    rewrite(build.folder.explicit_onnx, f"{DOWN}.weight", along_n)
    with pytest.raises(CheckFailed, match="not 2:4 along K") as failure:
        run(build)
    assert failure.value.where == str(build.folder.explicit_onnx)


def test_a_missing_tensor_is_named(build: SimpleNamespace) -> None:
    linears = {**build.exported.linears, DOWN: "elsewhere"}
    exported = build.exported.model_copy(update={"linears": linears})
    with pytest.raises(CheckFailed, match="no tensor 'elsewhere'"):
        certify(build.recipe, build.folder, build.pruned, exported)
    file = build.folder.checkpoint / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != f"{DOWN}.weight"}, file)
    with pytest.raises(CheckFailed, match=f"no tensor '{DOWN}.weight'"):
        run(build)


def test_a_wrong_shape_is_named(build: SimpleNamespace) -> None:
    linears = {**build.exported.linears, DOWN: DOWN.replace("down", "up") + ".weight"}
    exported = build.exported.model_copy(update={"linears": linears})
    with pytest.raises(
        CheckFailed, match=r"shape \[32, 48\], but the layer that was pruned needs \[48, 32\]"
    ):
        certify(build.recipe, build.folder, build.pruned, exported)
    rewrite(build.folder.sparse_onnx, f"{DOWN}.weight", lambda values: values[:44])
    with pytest.raises(EsparseError, match="shapes in the ONNX file contradict each other"):
        run(build)


# --- finished builds -----------------------------------------------------------------------------------


def finish(build: SimpleNamespace, engine_sha256: dict[str, str] | None = None) -> Path:
    """Write `build.json` as the pipeline does."""
    record = run(build)
    records = {"prune": build.pruned, "export": build.exported, "certify": record}
    if engine_sha256 is not None:
        file = EngineFile(
            file="engine/sparse.plan",
            bytes=1,
            seconds=1,
            onnx="onnx/sparse.onnx",
            onnx_sha256={**record.sha256, **engine_sha256},
            sparse_weights=True,
        )
        records["engine"] = EngineRecord(
            flavour="tensorrt",
            version="1",
            skipped=None,
            dense=None,
            sparse=file,
            profiles={},
            runnable=False,
            not_runnable=None,
        )
    manifest = Manifest(
        version="0",
        recipe=build.recipe.canonical(),
        fingerprint="",
        environment={},
        stages={
            name: StageEntry(seconds=0, peak_rss_bytes=0, finished="", record=value.model_dump(mode="json"))
            for name, value in records.items()
        },
    )
    build.folder.manifest.write_text(manifest.model_dump_json())
    return build.folder.root


def test_certify_build(build: SimpleNamespace) -> None:
    path = finish(build, {})
    record = certify_build(path)
    assert len(record.tensors) == 3 * len(build.pruned.layers)


def test_certify_build_notices_another_file(build: SimpleNamespace) -> None:
    path = finish(build)
    with build.folder.sparse_onnx.with_name("sparse.onnx.data").open("ab") as file:
        file.write(b"\0")  # still N:M
    with pytest.raises(CheckFailed, match="not the file that was certified") as failure:
        certify_build(path)
    assert str(failure.value.where).endswith("sparse.onnx.data")


def test_certify_build_notices_an_engine_of_another_model(build: SimpleNamespace) -> None:
    path = finish(build, {"onnx/sparse.onnx": "0" * 64})
    with pytest.raises(CheckFailed, match=r"not the file that engine/sparse.plan was built from"):
        certify_build(path)


def test_certify_build_needs_a_build(tmp_path: Path) -> None:
    with pytest.raises(EsparseError, match=r"no build\.json"):
        certify_build(tmp_path)


# --- files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_any_safetensors_file(dtype: torch.dtype, tmp_path: Path) -> None:
    dense = torch.full((8, 16), 0.5)
    tensors = {
        "model.embed_tokens.weight": dense,
        "mlp.up.weight": sparse(8, 16),
        "mlp.down.weight": torch.cat([sparse(8, 8), dense[:, :8]], dim=1),
        "norm.weight": torch.ones(8),
    }
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, path)
    rows = {row.name: row for row in certify_file(path, "2:4")}
    assert set(rows) == set(tensors) - {"norm.weight"}
    assert rows["mlp.up.weight"].conforming == 1 and rows["mlp.up.weight"].problem is None
    assert rows["mlp.down.weight"].conforming == 0.5 and rows["mlp.down.weight"].groups == 32
    assert not rows["model.embed_tokens.weight"].asked
    with pytest.raises(CheckFailed, match=r"'mlp.down.weight' is not 2:4 along K: row 0, group 2"):
        require_conforming(list(rows.values()), "2:4")
    asked = certify_file(path, "2:4", ["*up*"])
    require_conforming(asked, "2:4")
    assert len(asked) == 3
    assert table(asked, "2:4").row_count == 3


def test_a_sharded_checkpoint(tmp_path: Path) -> None:
    names = {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}
    for name, file in names.items():
        save_file({name: sparse(4, 8)}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    for path in (tmp_path, index):
        rows = certify_file(path, "2:4")
        assert [row.name for row in rows] == ["a.weight", "b.weight"]
        require_conforming(rows, "2:4")


def test_k_that_m_does_not_divide(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(4, 6)}, tmp_path / "w.safetensors")
    (row,) = certify_file(tmp_path / "w.safetensors", "2:4")
    assert (row.groups, row.conforming, row.sparsity) == (0, 0, 1)
    with pytest.raises(CheckFailed, match="K = 6 is not a multiple of 4"):
        require_conforming([row], "2:4")


def test_onnx_finds_k_from_the_node(tmp_path: Path) -> None:
    weight = sparse(16, 16).numpy()  # square, so that only the graph tells N from K
    nodes = [
        helper.make_node("MatMul", ["x", "matmul"], ["a"]),
        helper.make_node("Gemm", ["a", "gemm"], ["b"], transB=1),
        helper.make_node("Transpose", ["tied"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["b", "turned"], ["c"]),
        helper.make_node("MatMul", ["c", "along_n"], ["d"]),
        helper.make_node("Gather", ["looked_up", "ids"], ["e"]),
    ]
    tensors = {"matmul": weight.T, "gemm": weight, "tied": weight, "along_n": weight, "looked_up": weight}
    graph = helper.make_graph(
        nodes,
        "test",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16]),
            helper.make_tensor_value_info("ids", TensorProto.INT64, [2]),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("d", "e")],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in tensors.items()],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph), path)
    rows = {row.name: row for row in certify_file(path, "2:4")}
    assert set(rows) == set(tensors) - {"looked_up"}
    assert {name: row.k_axis for name, row in rows.items()} == {
        "matmul": 0,
        "gemm": 1,
        "tied": 1,
        "along_n": 0,
    }
    assert [name for name, row in rows.items() if row.problem] == ["along_n"]


def test_bad_files(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file({"w": sparse(64, 64)}, whole)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole.read_bytes()[:-100])
    text = tmp_path / "text.onnx"
    text.write_text("this is not a model")
    norms = tmp_path / "norms.safetensors"
    save_file({"norm": torch.ones(4)}, norms)
    for path, what in [
        (cut, "not a whole safetensors file"),
        (text, "not an ONNX file"),
        (norms, "no 2-D weights"),
        (tmp_path / "absent.onnx", "cannot read"),
        (tmp_path / "absent.safetensors", "not a whole safetensors file|[Nn]o such file"),
        (tmp_path / "absent", "neither a build folder nor a file with weights"),
    ]:
        with pytest.raises(EsparseError, match=what) as failure:
            certify_file(path, "2:4")
        assert failure.value.where == str(path)
        assert failure.value.exit_code == 2
    with pytest.raises(EsparseError, match=r"called '\*typo\*'; the first of 1 is 'w'"):
        certify_file(whole, "2:4", ["*typo*"])
    with pytest.raises(EsparseError, match="not an N:M pattern"):
        certify_file(whole, "4:2")


def test_onnx_with_missing_or_short_data(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(sparse(64, 64).numpy(), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weight],
    )
    path = tmp_path / "model.onnx"
    write_model(helper.make_model(graph), lambda _: numpy_helper.to_array(weight), path)
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(EsparseError, match="'w' needs 16384 bytes at offset 0, but the file has 16383"):
        certify_file(path, "2:4")
    data.unlink()
    with pytest.raises(EsparseError, match="cannot read the external data of 'w'"):
        certify_file(path, "2:4")
