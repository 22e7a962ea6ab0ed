"""The kernel library from Python, as far as that goes without a GPU; and the operands that it is timed on."""

import re

import pytest
import torch

from esparse_trt.engine import libraries
from esparse_trt.engine.kernels import Gpu, Kernels, Problem, load
from esparse_trt.engine.operands import random_layer
from esparse_trt.errors import EsparseError
from esparse_trt.graph import es24

H100 = Gpu(90, 132)


@pytest.fixture(scope="module")
def kernels():
    try:
        return load()
    except EsparseError as error:
        pytest.skip(error.what)


# --- the library -------------------------------------------------------------------------------------------


def test_candidates_have_names_that_stay(kernels):
    assert len(set(kernels.candidates)) == len(kernels.candidates)
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in kernels.candidates)
    assert kernels.candidates[-1] == "reference"
    assert re.fullmatch(r"\d+\.\d+\.\d+", kernels.version)
    assert re.fullmatch(r"[0-9a-f]{12}", kernels.kernel_set)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (Problem(1, 4096, 48), "k is 48, must be a positive multiple of 32"),
        (Problem(1, 12, 4096), "n is 12, must be a positive multiple of 8"),
        (Problem(65537, 64, 64), "m is 65537"),
        (Problem(1, 72, 64, activation="swiglu"), "n is 72, must be a multiple of 16 with an activation"),
    ],
)
def test_what_the_layout_cannot_hold_is_refused_by_name(kernels, problem, reason):
    assert reason in kernels.why_not(problem, "reference", H100)
    assert kernels.supporting(problem, H100) == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "extra", [{}, {"bias": True}, {"permutation": True}, {"activation": "geglu"}], ids=str
)
@pytest.mark.parametrize("gpu", [Gpu(80, 108), Gpu(89, 128), H100, Gpu(120, 170)], ids=str)
def test_there_is_a_default_for_every_problem_and_it_runs(kernels, dtype, extra, gpu):
    for m in (1, 2, 9, 16, 17, 64, 65, 100, 256, 1000, 65536):
        for n, k in ((16, 32), (80, 160), (896, 4864), (4096, 4096), (4096, 14336), (57344, 8192)):
            problem = Problem(m, n, k, dtype, **extra)
            chosen = kernels.default(problem, gpu)
            assert chosen is not None
            assert kernels.why_not(problem, chosen, gpu) is None


def test_who_has_no_activation_says_so(kernels):
    problem = Problem(64, 4096, 4096, activation="swiglu")
    able = {name.partition("_")[0] for name in kernels.supporting(problem, H100)}
    assert able == {"wgmma", "ampere", "reference"}
    assert "16 rows" in kernels.why_not(Problem(1, 4096, 4096, activation="geglu"), "decode_r1k8u8_s2", H100)
    with pytest.raises(EsparseError, match="no activation 'relu'"):
        kernels.supporting(Problem(1, 64, 64, activation="relu"), H100)


def test_the_permutation_needs_scratch_memory_only_where_the_kernel_does_not_read_through_it(kernels):
    assert kernels.workspace_bytes(Problem(16, 64, 64, permutation=True), "reference") == 0
    for name in kernels.supporting(Problem(16, 4096, 4096), H100):
        plain = kernels.workspace_bytes(Problem(16, 4096, 4096), name)
        assert kernels.workspace_bytes(Problem(16, 4096, 4096, permutation=True), name) >= plain


def test_an_unknown_candidate_says_that_the_table_is_of_another_library(kernels):
    with pytest.raises(EsparseError, match="no candidate 'decode_from_the_future'") as error:
        kernels.why_not(Problem(1, 64, 64), "decode_from_the_future", H100)
    assert "tune" in error.value.fix


def test_tensors_that_do_not_fit_are_refused_by_name(kernels):
    layer = random_layer(64, 128, torch.float16, device="cpu")
    x, y = torch.zeros(3, 128, dtype=torch.float16), torch.zeros(3, 64, dtype=torch.float16)
    assert kernels.bind(x, layer.values, layer.metadata, y).problem == Problem(3, 64, 128)
    with pytest.raises(EsparseError, match=r"metadata is torch.int32 \[255\].* must be torch.int32 \[256\]"):
        kernels.bind(x, layer.values, layer.metadata[:-1], y)
    with pytest.raises(EsparseError, match=r"values is torch.bfloat16"):
        kernels.bind(x, layer.values.bfloat16(), layer.metadata, y)
    with pytest.raises(EsparseError, match=r"y is torch.float16 \[2, 64\]"):
        kernels.bind(x, layer.values, layer.metadata, y[:2])
    with pytest.raises(EsparseError, match=r"y is torch.float16 \[3, 64\].* must be torch.float16 \[3, 32\]"):
        kernels.bind(x, layer.values, layer.metadata, y, activation="swiglu")
    with pytest.raises(EsparseError, match=r"permutation is torch\.int64"):
        kernels.bind(x, layer.values, layer.metadata, y, permutation=torch.arange(128))
    with pytest.raises(EsparseError, match="x is not contiguous"):
        kernels.bind(x.t().contiguous().t(), layer.values, layer.metadata, y)
    with pytest.raises(EsparseError, match="float16 and bfloat16, not float32"):
        kernels.bind(x.float(), layer.values.float(), layer.metadata, y.float())


# --- finding it --------------------------------------------------------------------------------------------


def test_a_library_that_is_not_there_names_the_folders(monkeypatch, tmp_path):
    monkeypatch.setenv(libraries.VARIABLE, str(tmp_path))
    with pytest.raises(EsparseError, match=re.escape(str(tmp_path))) as error:
        libraries.find_library(libraries.KERNELS)
    assert "cmake" in error.value.fix


def test_the_variable_wins_over_every_other_folder(monkeypatch, tmp_path):
    (tmp_path / libraries.KERNELS).touch()
    monkeypatch.setenv(libraries.VARIABLE, str(tmp_path))
    assert libraries.find_library(libraries.KERNELS) == tmp_path / libraries.KERNELS


def test_a_file_that_is_no_such_library_is_an_error(tmp_path):
    path = tmp_path / libraries.KERNELS
    path.write_text("not a library")
    with pytest.raises(EsparseError, match="cannot be used as the kernel library"):
        Kernels(path)


def test_a_library_of_another_version_is_an_error(monkeypatch, kernels):
    monkeypatch.setattr("esparse_trt.engine.kernels.metadata.version", lambda package: "9.9.9")
    with pytest.raises(EsparseError, match=rf"version {kernels.version}, esparse-trt is 9\.9\.9"):
        load(kernels.path)


# --- operands ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (72, 160), (8, 32), (200, 416)])
def test_the_random_layer_is_the_same_compressed_and_dense(n, k, dtype):
    layer = random_layer(n, k, dtype, device="cpu", seed=3)
    numpy_dtype = es24.DTYPES[dtype == torch.bfloat16]
    values = layer.values.view(torch.int16).numpy().view(numpy_dtype)
    metadata = layer.metadata.numpy().reshape(es24.metadata_shape(n, k))
    dense = es24.unpack(es24.Packed(values, metadata)).view("int16")
    assert (dense == layer.dense.view(torch.int16).numpy()).all()
    chunks = (layer.dense.view(n, k // 4, 4) != 0).sum(-1)
    assert chunks.max() == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_candidate_gives_the_dense_product(kernels, dtype):
    n, k, m = 192, 416, 13
    layer = random_layer(n, k, dtype)
    x, bias = torch.randn(m, k, device="cuda", dtype=dtype), torch.randn(n, device="cuda", dtype=dtype)
    permutation = torch.randperm(k, device="cuda").int()
    expected = x[:, permutation].double() @ layer.dense.double().t() + bias
    gate, up = expected.unflatten(-1, (-1, 2, 8)).unbind(-2)
    gated = (torch.nn.functional.silu(gate) * up).flatten(-2)
    limit = 2e-3 if dtype == torch.float16 else 1e-2
    for activation, wanted in ((None, expected), ("swiglu", gated)):
        y = torch.empty_like(wanted, dtype=dtype)
        gemm = kernels.bind(
            x, layer.values, layer.metadata, y, bias=bias, permutation=permutation, activation=activation
        )
        for candidate in kernels.supporting(gemm.problem, kernels.current_gpu()):
            y.fill_(float("nan"))
            gemm.run(candidate, kernels.workspace(gemm.problem, candidate))
            error = (y - wanted).norm() / wanted.norm()
            assert error <= limit, candidate
