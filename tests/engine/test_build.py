"""Real engines of a tiny LLaMA, built by TensorRT-RTX on this machine's CPU."""

import re
import shutil
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest

from esparse_trt.artifacts import BuildDir, sha256_file
from esparse_trt.engine import build, flavour
from esparse_trt.engine.build import build_engines, config_loader
from esparse_trt.engine.runner import EngineRunner
from esparse_trt.engine.shapes import input_ranges
from esparse_trt.errors import EsparseError
from esparse_trt.graph.export import export_models
from esparse_trt.graph.feeds import cache_feed, next_cache, token_feed
from esparse_trt.recipe import parse_recipe
from esparse_trt.sections import Profile

try:
    import tensorrt_rtx as rtx
except ImportError:
    rtx = None

PROFILES = {
    "prefill": {"batch": [1, 1, 2], "sequence": [1, 16, 64], "past": [0, 0, 0]},
    "decode": {"batch": [1, 1, 2], "sequence": [1, 1, 1], "past": [1, 16, 64]},
}
needs_rtx = pytest.mark.skipif(rtx is None, reason="TensorRT-RTX is not installed")


def recipe(tmp_path, **engine):
    data = {
        "name": "tiny",
        "model": {"path": "model"},
        "calibration": {"text": {"source": "file", "path": "text.txt"}},
        "engine": {"profiles": PROFILES, "flavour": "tensorrt_rtx", **engine},
    }
    return parse_recipe(data, base=tmp_path)


@pytest.fixture(scope="module")
def exported(tiny_llama, tmp_path_factory):
    """A build folder with dense.onnx and sparse.onnx (fp16; the same weights do here), and its record."""
    folder = BuildDir(tmp_path_factory.mktemp("build"))
    folder.onnx.mkdir()
    record = export_models(
        tiny_llama, tiny_llama, {}, dense_path=folder.dense_onnx, explicit_path=folder.sparse_onnx,
        dtype="float16", opset=20,
    )  # fmt: skip
    return folder, record


@pytest.fixture
def copied(exported, tmp_path):
    """The same in a folder that a test may spoil."""
    folder, record = exported
    shutil.copytree(folder.onnx, tmp_path / "onnx")
    return BuildDir(tmp_path), record


@pytest.fixture(scope="module")
def built(exported, tmp_path_factory):
    folder, record = exported
    return folder, build_engines(recipe(folder.root, workspace_mib=64), folder, record)


@needs_rtx
def test_both_engines_are_real_and_recorded(built, exported):
    folder, record = built
    assert (record.flavour, record.version, record.skipped) == ("tensorrt_rtx", rtx.__version__, None)
    for name, engine in (("dense", record.dense), ("sparse", record.sparse)):
        plan = folder.root / engine.file
        assert plan == folder.engine / f"{name}.plan"
        data = plan.read_bytes()
        weights = (folder.onnx / f"{name}.onnx.data").stat().st_size
        assert engine.bytes == len(data) > weights
        for tensor in (*exported[1].inputs, *exported[1].outputs):
            assert tensor.name.encode() in data
        assert engine.sparse_weights == (name == "sparse")
        assert engine.onnx_sha256 == {
            file: sha256_file(folder.root / file) for file in (f"onnx/{name}.onnx", f"onnx/{name}.onnx.data")
        }
    left = {path.name for path in folder.engine.iterdir()}
    assert left == {"dense.plan", "sparse.plan", "build_dense.log", "build_sparse.log"}


@needs_rtx
def test_the_log_says_what_was_built(built):
    folder, record = built
    log = (folder.engine / "build_sparse.log").read_text()
    assert "SPARSE_WEIGHTS" in log
    assert "SPARSE_WEIGHTS" not in (folder.engine / "build_dense.log").read_text()
    assert "past_key_values.1.value" in log
    assert "Finished engine building" in log
    assert list(record.profiles) == ["prefill", "decode"]
    assert record.profiles["decode"]["attention_mask"] == {"min": (1, 2), "opt": (1, 17), "max": (2, 65)}


@needs_rtx
def test_a_machine_without_a_gpu_does_not_claim_to_run_them(built):
    record = built[1]
    gpu = flavour.find_gpu()
    assert record.runnable == (record.not_runnable is None)
    if isinstance(gpu, str):
        assert record.not_runnable == gpu


@needs_rtx
def test_engines_agree_with_onnxruntime_where_they_run(built, exported):
    folder, record = built
    if not record.runnable:
        pytest.skip(record.not_runnable)
    inputs = exported[1].inputs
    session = onnxruntime.InferenceSession(folder.sparse_onnx, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    tokens = np.random.default_rng(0).integers(0, 300, (2, 12))
    cache = cache_feed(inputs, batch=2, past=0)
    with EngineRunner(folder.sparse_plan, record.flavour) as engine:
        for past in (0, 12, 13):
            feed = token_feed(inputs, tokens, past=past) | cache
            expected = dict(zip(names, session.run(names, feed), strict=True))
            outputs = engine(feed)
            for name, want in expected.items():
                error = np.linalg.norm(outputs[name].astype(float) - want) / np.linalg.norm(
                    want.astype(float)
                )
                assert error < 5e-3, (past, name)
            tokens, cache = expected["logits"][:, -1:].argmax(-1), next_cache(outputs)


@pytest.fixture
def network(exported):
    """A parsed network with its builder, and the profiles."""
    trt = flavour.activate("tensorrt_rtx")
    from polygraphy.backend.trt import NetworkFromOnnxPath

    folder, record = exported
    builder, parsed, parser = NetworkFromOnnxPath(str(folder.sparse_onnx), strongly_typed=True)()
    profiles = {k: input_ranges(record.inputs, Profile.model_validate(p)) for k, p in PROFILES.items()}
    yield trt, builder, parsed, profiles
    del parser


@needs_rtx
@pytest.mark.parametrize("sparse", [False, True])
def test_the_builder_gets_what_the_recipe_says(network, sparse, tmp_path):
    trt, builder, parsed, profiles = network
    config = config_loader(trt, profiles, sparse, 48, ["8.6", "12.0"], tmp_path / "cache")(builder, parsed)
    assert config.get_flag(trt.BuilderFlag.SPARSE_WEIGHTS) == sparse
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 48 << 20
    assert config.num_optimization_profiles == 2
    capabilities = [config.get_compute_capability(i) for i in range(config.num_compute_capabilities)]
    assert capabilities == [trt.ComputeCapability.SM86, trt.ComputeCapability.SM120]


@needs_rtx
def test_the_configuration_for_tensorrt_proper_has_the_same_settings(network, tmp_path):
    """Polygraphy's configuration for TensorRT proper, as far as the builder of TensorRT-RTX can show it."""
    trt, builder, parsed, profiles = network
    proper = SimpleNamespace(__name__="tensorrt", MemoryPoolType=trt.MemoryPoolType)
    config = config_loader(proper, profiles, True, 48, None, tmp_path / "cache")(builder, parsed)
    assert config.get_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 48 << 20
    assert config.num_optimization_profiles == 2


@needs_rtx
def test_a_damaged_file_gives_the_parser_s_own_words(copied):
    folder, record = copied
    data = folder.sparse_onnx.read_bytes()
    folder.sparse_onnx.write_bytes(data[: len(data) // 2])
    with pytest.raises(EsparseError, match=r"cannot parse it: .+") as error:
        build_engines(recipe(folder.root, dense=False), folder, record)
    assert error.value.where == str(folder.sparse_onnx)
    assert "build_sparse.log" in error.value.fix
    assert not folder.sparse_plan.exists()


@needs_rtx
def test_missing_external_data_is_named_and_nothing_is_printed(copied, capfd):
    folder, record = copied
    (folder.onnx / "sparse.onnx.data").unlink()
    with pytest.raises(EsparseError, match=r"Failed to open file: .*sparse\.onnx\.data"):
        build_engines(recipe(folder.root, dense=False), folder, record)
    assert capfd.readouterr() == ("", "")


@needs_rtx
def test_an_operator_that_tensorrt_lacks_is_named_with_its_node(copied):
    folder, record = copied
    model = onnx.load(folder.sparse_onnx, load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Softmax")
    node.op_type, node.domain = "Hardmax2", "com.example"
    onnx.save(model, folder.sparse_onnx)
    with pytest.raises(EsparseError, match=rf"{re.escape(node.name)} and operator: Hardmax2"):
        build_engines(recipe(folder.root, dense=False), folder, record)


@needs_rtx
def test_an_unsupported_gpu_is_refused(copied):
    folder, record = copied
    with pytest.raises(EsparseError, match=r"Compute capability 3\.0"):
        build_engines(recipe(folder.root, dense=False, compute_capabilities=["3.0"]), folder, record)


def test_without_tensorrt_the_stage_is_skipped_and_says_what_to_install(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(flavour, "find_spec", lambda name: None)
    record = build_engines(recipe(tmp_path, flavour="auto"), BuildDir(tmp_path), exported[1])
    assert "pip install 'esparse-trt[rtx]'" in record.skipped
    assert (record.flavour, record.dense, record.sparse, record.runnable) == (None, None, None, False)
    assert list(tmp_path.iterdir()) == []


class Engine:
    """Stands for an engine on a GPU: only the decision that follows from running it is tested here."""

    def __init__(self, plan, name):
        if "refused" in plan.name:
            raise EsparseError("tensorrt_rtx 1.7.1.116 cannot load the engine: unsupported device")
        self.calls = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def smallest_feed(self):
        return {}

    def __call__(self, feed):
        return {}


def test_runnable_is_what_a_run_has_shown(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "EngineRunner", Engine)
    section = recipe(tmp_path).engine
    assert build.why_not_runnable(tmp_path / "sparse.plan", "tensorrt_rtx", section) is None
    assert "unsupported device" in build.why_not_runnable(tmp_path / "refused.plan", "tensorrt_rtx", section)
    never = recipe(tmp_path, run="never").engine
    assert build.why_not_runnable(tmp_path / "sparse.plan", "tensorrt_rtx", never) == (
        "the recipe sets engine.run: never"
    )
