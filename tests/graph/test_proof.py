"""The proof runs models in float64: what rounding does in their own type neither fails it nor hides in it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from esparse_trt.graph.proof import LIMIT, outputs, relative_l2

K = 512


def write(folder: Path, name: str, body: str, weights: dict[str, NDArray]) -> Path:
    """An fp16 model `y = f(x)`, x and y [1, K], with its weights in external data."""
    graph = f"g (float16[1, {K}] x) => (float16[1, {K}] y) {{{body}}}"
    model = parser.parse_model(f'<ir_version: 9, opset_import: ["": 20]> {graph}')
    model.graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in weights.items())
    path = folder / f"{name}.onnx"
    onnx.save(model, path, save_as_external_data=True, location=f"{name}.data", size_threshold=64)
    return path


def as_stored(path: Path, x: NDArray) -> NDArray:
    """What the model gives in its own type."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.fixture
def x() -> NDArray[np.float16]:
    return np.random.default_rng(0).standard_normal((1, K)).astype(np.float16)


def test_a_reordering_that_rounding_amplifies_is_the_same_model(tmp_path: Path, x: NDArray) -> None:
    """Two massive channels that cancel: what the others add meanwhile is rounded to their magnitude."""
    random = np.random.default_rng(1)
    w = random.standard_normal((K, K)).astype(np.float16)
    w[0] = 100
    w[1] = -100
    x[0, :2] = 2000
    order = random.permutation(K)
    body = "h = Gather <axis = -1> (x, order) y = MatMul (h, w)"

    def permuted(name: str, columns: NDArray, rows: NDArray) -> Path:
        return write(tmp_path, name, body, {"w": w[rows], "order": columns})

    before = permuted("before", np.arange(K), np.arange(K))
    after, wrong = permuted("after", order, order), permuted("wrong", order, np.roll(order, 1))
    reference, same, other = (outputs(path, [{"x": x}])[0]["y"] for path in (before, after, wrong))
    assert reference.dtype == np.float64
    assert relative_l2(as_stored(after, x), as_stored(before, x)) > 2e-4
    assert relative_l2(same, reference) <= LIMIT
    assert relative_l2(other, reference) > 0.1


def test_it_computes_what_the_model_says(tmp_path: Path, x: NDArray) -> None:
    """Casts and constants widen too; Erf, for which ONNX Runtime has no float64 kernel, does not."""
    w = np.random.default_rng(2).standard_normal((K, K)).astype(np.float16) / 16
    body = """
        h = MatMul (x, w) f = Cast <to = 1> (h) half = Constant <value = float {0.5}> ()
        g = Mul (f, half) e = Erf (g) d = Cast <to = 10> (e) y = Add (d, h)
    """
    found = outputs(write(tmp_path, "model", body, {"w": w}), [{"x": x}])[0]["y"]
    h = x.astype(np.float64) @ w.astype(np.float64)
    np.testing.assert_allclose(found, np.vectorize(math.erf)(0.5 * h) + h, rtol=1e-6, atol=1e-7)


def test_parts_give_what_the_whole_gives(tmp_path: Path, x: NDArray, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    weights = {name: random.standard_normal((K, K)).astype(np.float16) / 22 for name in ("a", "b", "c")}
    body = "s = MatMul (x, a) t = MatMul (s, b) u = Relu (t) v = MatMul (u, c) y = Add (v, s)"
    path = write(tmp_path, "model", body, weights)
    whole = outputs(path, [{"x": x}, {"x": -x}])
    monkeypatch.setattr("esparse_trt.graph.proof._PART_BYTES", 1)
    for a, b in zip(outputs(path, [{"x": x}, {"x": -x}]), whole, strict=True):
        assert np.array_equal(a["y"], b["y"])
