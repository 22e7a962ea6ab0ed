"""The operator's function bodies in ONNX Runtime and in the ONNX reference implementation."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from esparse_trt.graph import es24, sparse_gemm

VARIANTS = list(sparse_gemm.VARIANTS)
HALF, BFLOAT = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)


class Case(NamedTuple):
    """A model of one node, with the weights that it holds in float64."""

    model: ModelProto
    weight: NDArray
    bias: NDArray | None
    permutation: NDArray | None

    def expected(self, x: NDArray) -> NDArray:
        x = x.astype(np.float64)
        x = x if self.permutation is None else x[..., self.permutation]
        return x @ self.weight.T + (0 if self.bias is None else self.bias)


def make_case(
    variant: str, rows: int = 72, channels: int = 160, dtype: np.dtype = HALF, opset: int = 20, rank: int = 3
) -> Case:
    """Small integers, so that every order of summation is exact."""
    random = np.random.default_rng(0)
    has_bias, has_permutation = sparse_gemm.VARIANTS[variant]
    kept = random.random((rows, channels // 4, 4)).argsort(axis=-1) < 2
    weight = (random.integers(-4, 5, kept.shape) * kept).reshape(rows, channels).astype(dtype)
    bias = random.integers(-4, 5, rows).astype(dtype) if has_bias else None
    permutation = random.permutation(channels).astype(np.int32) if has_permutation else None
    packed = es24.pack(weight)
    tensors = {"values": packed.values, "metadata": packed.metadata, "bias": bias, "permutation": permutation}
    node = sparse_gemm.make_node(
        "fc", "x", "y", shape=(rows, channels), bias=has_bias, permutation=has_permutation
    )
    element = helper.np_dtype_to_tensor_dtype(dtype)
    leading = [f"d{axis}" for axis in range(rank - 1)]
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", element, [*leading, channels])],
        [helper.make_tensor_value_info("y", element, [None] * rank)],
        [numpy_helper.from_array(t, f"fc.{name}") for name, t in tensors.items() if t is not None],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    sparse_gemm.add_functions(model)
    wide = None if bias is None else bias.astype(np.float64)
    return Case(model, weight.astype(np.float64), wide, permutation)


def integers(*shape: int, dtype: np.dtype = HALF) -> NDArray:
    return np.random.default_rng(1).integers(-3, 4, shape).astype(dtype)


def run(model: ModelProto, x: NDArray) -> NDArray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_runtimes_multiply_exactly(variant: str) -> None:
    case = make_case(variant)
    onnx.checker.check_model(case.model, full_check=True)
    session = onnxruntime.InferenceSession(case.model.SerializeToString())
    reference = ReferenceEvaluator(case.model)
    for leading in [(1, 1), (2, 3), (3, 0)]:
        x = integers(*leading, 160)
        for y in (session.run(None, {"x": x})[0], reference.run(None, {"x": x})[0]):
            assert y.dtype == np.float16
            np.testing.assert_array_equal(y.astype(np.float64), case.expected(x))


@pytest.mark.parametrize("shape", [(8, 32), (64, 128), (136, 96), (24, 288), (200, 416)])
def test_padding_of_the_metadata_is_dropped(shape: tuple[int, int]) -> None:
    case = make_case("SparseGemmBiasPermute", *shape)
    x = integers(2, 3, shape[1])
    np.testing.assert_array_equal(run(case.model, x).astype(np.float64), case.expected(x))


@pytest.mark.parametrize("opset", [18, 19, 21, 22])
def test_every_opset_that_a_recipe_may_name(opset: int) -> None:
    case = make_case("SparseGemmBiasPermute", opset=opset)
    x = integers(2, 3, 160)
    np.testing.assert_array_equal(run(case.model, x).astype(np.float64), case.expected(x))


@pytest.mark.parametrize("rank", [2, 4])
def test_any_leading_dimensions(rank: int) -> None:
    case = make_case("SparseGemmBiasPermute", rank=rank)
    x = integers(*range(2, rank + 1), 160)
    np.testing.assert_array_equal(run(case.model, x).astype(np.float64), case.expected(x))


def test_bfloat16() -> None:
    """ONNX Runtime has no bfloat16 kernels for the CPU; the reference implementation does."""
    case = make_case("SparseGemmBiasPermute", dtype=BFLOAT)
    x = integers(2, 3, 160, dtype=BFLOAT)
    y = ReferenceEvaluator(case.model).run(None, {"x": x})[0]
    assert y.dtype == BFLOAT
    np.testing.assert_array_equal(y, case.expected(x).astype(BFLOAT))


def test_values_that_are_not_finite_stay_in_their_row() -> None:
    case = make_case("SparseGemm")
    values = numpy_helper.to_array(case.model.graph.initializer[0]).copy()
    values[5, 7], values[70, 0] = np.inf, np.nan
    case.model.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "fc.values"))
    y = run(case.model, np.ones((1, 1, 160), dtype=np.float16))[0, 0]
    assert y[5] == np.inf
    assert list(np.flatnonzero(~np.isfinite(y))) == [5, 70]


@pytest.mark.parametrize("variant", VARIANTS)
def test_shapes_are_inferred_through_the_function(variant: str) -> None:
    inferred = onnx.shape_inference.infer_shapes(make_case(variant).model, strict_mode=True, data_prop=True)
    dims = inferred.graph.output[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["d0", "d1", 72]


def test_what_the_plugin_reads() -> None:
    """Attributes are on every node: TensorRT does not see the defaults of the function."""
    model = make_case("SparseGemmBiasPermute").model
    (node,) = model.graph.node
    assert node.domain == "esparse"
    assert list(node.input) == ["x", "fc.values", "fc.metadata", "fc.bias", "fc.permutation"]
    assert {a.name: helper.get_attribute_value(a) for a in node.attribute} == {
        "pattern": b"2:4",
        "in_features": 160,
        "out_features": 72,
        "layout": b"es24-v1",
        "plugin_version": b"1",
        "plugin_namespace": b"esparse",
        "choices": b"",
    }
    (function,) = model.functions
    assert {*function.attribute, *(a.name for a in function.attribute_proto)} == {
        a.name for a in node.attribute
    }
    assert all(inner.domain == "" for inner in function.node)


def test_only_functions_in_use_are_carried() -> None:
    model = make_case("SparseGemmPermute").model
    assert [(f.domain, f.name) for f in model.functions] == [("esparse", "SparseGemmPermute")]
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20, "esparse": 1}
