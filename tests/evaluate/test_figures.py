"""The figures of a comparison, against Polygraphy's own and in the corner cases."""

from __future__ import annotations

import numpy as np
import pytest
from polygraphy.comparator import IterationResult
from polygraphy.comparator.compare import CosineSimilarityCompareFunc, L2CompareFunc, SimpleCompareFunc

from esparse_trt.errors import CheckFailed, EsparseError
from esparse_trt.evaluate import figures
from esparse_trt.evaluate.figures import compare_arrays


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_against_polygraphy(dtype, chunk, monkeypatch):
    monkeypatch.setattr(figures, "_CHUNK", chunk)
    rng = np.random.default_rng(0)
    a = rng.normal(size=(3, 5, 11)).astype(dtype)
    b = (a + 0.1 * rng.normal(size=a.shape)).astype(dtype)
    reference, other = IterationResult({"x": a}), IterationResult({"x": b})
    simple = SimpleCompareFunc()(other, reference)["x"]
    l2 = L2CompareFunc()(other, reference)["x"].l2_norm
    cosine = CosineSimilarityCompareFunc()(other, reference)["x"].cosine_similarity

    found = compare_arrays("x", a, b, block=4, step="decode")

    assert (found.name, found.block, found.step) == ("x", 4, "decode")
    assert found.max_abs == pytest.approx(simple.max_absdiff, rel=1e-5)
    assert found.mean_abs == pytest.approx(simple.mean_absdiff, rel=1e-5)
    assert found.max_rel == pytest.approx(simple.max_reldiff, rel=1e-5)
    assert found.mean_rel == pytest.approx(simple.mean_reldiff, rel=1e-5)
    assert found.relative_l2 == pytest.approx(l2 / np.linalg.norm(a.astype(np.float64)), rel=1e-5)
    assert found.cosine == pytest.approx(cosine, rel=1e-5)


def test_zeros_of_the_reference_do_not_drown_the_relative_error():
    found = compare_arrays("x", np.array([0.0, 2.0, -4.0]), np.array([0.5, 3.0, -4.0]))
    assert (found.max_abs, found.max_rel, found.mean_rel) == (1.0, 0.5, 0.25)


@pytest.mark.parametrize(
    ("a", "b", "relative_l2", "cosine"),
    [
        ([0, 0], [0, 0], 0.0, 1.0),
        ([0, 0], [3, 4], 1.0, 0.0),
        ([3, 4], [0, 0], 1.0, 0.0),
        ([1, 0], [-1, 0], 2.0, -1.0),
    ],
)
def test_zero_tensors(a, b, relative_l2, cosine):
    found = compare_arrays("x", np.array(a, np.float32), np.array(b, np.float32))
    assert (found.relative_l2, found.cosine) == (relative_l2, cosine)


def test_fp16_values_whose_squares_overflow_fp16():
    a = np.full((2, 300), 60000, np.float16)
    assert compare_arrays("x", a, a // 2).relative_l2 == pytest.approx(0.5)


def test_an_empty_cache_compares_equal():
    empty = np.zeros((1, 2, 0, 16), np.float16)
    assert compare_arrays("past", empty, empty).relative_l2 == 0.0


def test_different_shapes():
    with pytest.raises(EsparseError, match=r"\[2\] and \[3\]") as error:
        compare_arrays("logits", np.zeros(2), np.zeros(3))
    assert error.value.where == "logits"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_name_tensor_and_side(value):
    a, b = np.ones(4, np.float16), np.array([1, 1, value, 1], np.float16)
    with pytest.raises(CheckFailed, match=r"tensor in sparse\.onnx") as error:
        compare_arrays("model.layers.3.fc1", a, b, sides=("dense.onnx", "sparse.onnx"))
    assert error.value.where == "model.layers.3.fc1"
    with pytest.raises(CheckFailed, match=r"in dense\.onnx and sparse\.onnx"):
        compare_arrays("x", b, b, sides=("dense.onnx", "sparse.onnx"))
