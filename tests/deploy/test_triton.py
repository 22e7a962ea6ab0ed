"""The Triton model repository: configurations that fit Triton's own schema, models that answer right."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format
from transformers import AutoTokenizer, ByT5Tokenizer

from esparse_trt.artifacts import BuildDir
from esparse_trt.deploy import triton
from esparse_trt.errors import EsparseError
from esparse_trt.graph.feeds import read_specs
from esparse_trt.recipe import Recipe, parse_recipe
from esparse_trt.records import EngineFile, EngineRecord, ExportRecord, PluginRecord, TensorSpec


def load_file(path: Path) -> ModuleType:
    """Import a file by its path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toy = load_file(Path(__file__).with_name("toy.py"))
# Triton's own schema; by its path, as importing `tritonclient.grpc` would need gRPC, which parsing does not.
_client = Path(importlib.util.find_spec("tritonclient").submodule_search_locations[0])
schema = load_file(_client / "grpc" / "model_config_pb2.py")
ModelConfig = schema.ModelConfig

NO_ENGINE = EngineRecord(
    flavour=None, version=None, skipped="no TensorRT is installed", dense=None, sparse=None, profiles={},
    runnable=False, not_runnable="there is no engine",
)  # fmt: skip


def engine_of(flavour: str) -> EngineRecord:
    plan = EngineFile(
        file="engine/sparse.plan", bytes=4, seconds=1.0, onnx="onnx/sparse.onnx", onnx_sha256={},
        sparse_weights=True,
    )  # fmt: skip
    return NO_ENGINE.model_copy(
        update={"flavour": flavour, "version": "10.13.3", "skipped": None, "sparse": plan}
    )


def specs_of(positions: bool, layers: int, kv_heads: int, dim: int, dtype: str, vocab: int):
    """Inputs and outputs of an exported model."""
    tokens = {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "past + sequence"]}
    if positions:
        tokens["position_ids"] = ["batch", "sequence"]
    inputs = [TensorSpec(name=name, dtype="int64", shape=shape) for name, shape in tokens.items()]
    outputs = [TensorSpec(name="logits", dtype=dtype, shape=["batch", "sequence", vocab])]
    for layer in range(layers):
        for part in ("key", "value"):
            inputs.append(
                TensorSpec(
                    name=f"past_key_values.{layer}.{part}",
                    dtype=dtype,
                    shape=["batch", kv_heads, "past", dim],
                )
            )
            outputs.append(
                TensorSpec(
                    name=f"present.{layer}.{part}",
                    dtype=dtype,
                    shape=["batch", kv_heads, "past + sequence", dim],
                )
            )
    return inputs, outputs


FAMILIES = {
    "llama": specs_of(True, 2, 2, 64, "float16", 4096),
    "gemma3": specs_of(True, 3, 1, 256, "float16", 262144),
    "opt": specs_of(True, 2, 12, 64, "float32", 50272),
    "bloom": specs_of(False, 2, 16, 64, "float16", 250880),
}


def make_recipe(folder: Path, **sections: object) -> Recipe:
    data = {
        "name": "toy",
        "model": {"path": "model"},
        "calibration": {"text": {"source": "file", "path": "calibration.txt"}},
        **sections,
    }
    return parse_recipe(data, base=folder)


def make_exported(inputs: list[TensorSpec], outputs: list[TensorSpec]) -> ExportRecord:
    return ExportRecord(
        dtype=outputs[0].dtype, opset=20, inputs=inputs, outputs=outputs, linears={}, gathers=[],
        bytes={"dense": 0, "explicit": 0},
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Path) -> BuildDir:
    """A finished build of the toy model, with the configuration and tokenizer of the tiny LLaMA."""
    folder = BuildDir(tmp_path / "a build")
    toy.save_toy(folder.sparse_onnx)
    folder.engine.mkdir()
    folder.sparse_plan.write_bytes(b"plan")
    folder.checkpoint.mkdir()
    for file in tiny_llama.glob("*.json"):
        shutil.copy(file, folder.checkpoint)
    return folder


def deploy_toy(folder: BuildDir, engines: EngineRecord = NO_ENGINE, **sections: object):
    exported = make_exported(*read_specs(folder.sparse_onnx))
    return triton.deploy(make_recipe(folder.root, **sections), folder, exported, engines)


def read_config(folder: BuildDir, name: str) -> ModelConfig:
    text = (folder.model_repository / name / "config.pbtxt").read_text()
    return text_format.Parse(text, ModelConfig())


# --- configurations --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["tensorrt", "onnxruntime", "python"])
def test_config_holds_every_tensor_of_the_model(folder, family, backend):
    inputs, outputs = FAMILIES[family]
    recipe = make_recipe(folder.root, deploy={"backend": backend, "model_name": family, "instances": 2})
    record = triton.deploy(recipe, folder, make_exported(inputs, outputs), engine_of("tensorrt"))
    config = read_config(folder, family)
    assert (config.name, config.backend, config.max_batch_size) == (family, backend, 4)
    assert (record.backend, record.max_batch_size) == (backend, 4)
    types = {"int64": schema.TYPE_INT64, "float16": schema.TYPE_FP16, "float32": schema.TYPE_FP32}
    for specs, tensors in ((inputs, config.input), (outputs, config.output)):
        assert [tensor.name for tensor in tensors] == [spec.name for spec in specs]
        for spec, tensor in zip(specs, tensors, strict=True):
            assert tensor.data_type == types[spec.dtype]
            # Triton puts the batch in front of these, and -1 takes any size, zero included.
            assert [-1, *tensor.dims] == [-1 if isinstance(size, str) else size for size in spec.shape]
    group = config.instance_group[0]
    kinds = {"tensorrt": "KIND_GPU", "onnxruntime": "KIND_AUTO", "python": "KIND_CPU"}
    assert schema.ModelInstanceGroup.Kind.Name(group.kind) == kinds[backend]
    assert group.count == 2
    assert list(group.profile) == (["0", "1"] if backend == "tensorrt" else [])
    assert config.HasField("dynamic_batching") == (backend != "python")


def test_config_agrees_with_the_onnx_file_that_is_served(folder):
    deploy_toy(folder)
    config = read_config(folder, "toy")
    served = folder.model_repository / "toy" / "1" / "model.onnx"
    graph = onnx.load(served, load_external_data=False).graph
    types = {onnx.TensorProto.FLOAT: schema.TYPE_FP32, onnx.TensorProto.INT64: schema.TYPE_INT64}
    for tensors, values in ((config.input, graph.input), (config.output, graph.output)):
        assert len(tensors) == len(values)
        for tensor, value in zip(tensors, values, strict=True):
            assert tensor.name == value.name
            assert tensor.data_type == types[value.type.tensor_type.elem_type]
            dims = [dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim]
            assert [-1, *tensor.dims] == dims


def engine_with_plugin(library: Path) -> EngineRecord:
    record = engine_of("tensorrt")
    plugin = PluginRecord(
        library=str(library), version="0.1.0", layout="es24-v1", kernel_set="0123456789ab", table=None
    )
    return record.model_copy(update={"sparse": record.sparse.model_copy(update={"plugin": plugin})})


def test_the_plugin_goes_with_the_engine_that_needs_it(folder, tmp_path):
    library = tmp_path / "libesparse_trt_plugin.so"
    library.write_bytes(b"library")
    record = deploy_toy(folder, engine_with_plugin(library))
    copied = folder.model_repository / "toy" / "1" / library.name
    assert copied.read_bytes() == b"library"
    assert str(copied.relative_to(folder.root)) in record.files
    option = "--backend-config=tensorrt,plugins=/models/toy/1/libesparse_trt_plugin.so"
    assert option in record.command
    assert option in (folder.model_repository / "README.md").read_text()
    assert (
        "plugins=<this folder>/1/libesparse_trt_plugin.so"
        in (folder.model_repository / "toy" / "config.pbtxt").read_text()
    )
    assert read_config(folder, "toy").backend == "tensorrt"


def test_no_plugin_goes_with_an_engine_without_it_or_with_the_onnx_model(folder, tmp_path):
    for engines, backend in (
        (engine_of("tensorrt"), "auto"),
        (engine_with_plugin(tmp_path / "gone.so"), "onnxruntime"),
    ):
        record = deploy_toy(folder, engines, deploy={"backend": backend})
        assert "plugins" not in record.command
        assert not list(folder.model_repository.rglob("*.so"))


def test_a_plugin_that_is_gone_is_named_and_the_old_repository_stays(folder, tmp_path):
    deploy_toy(folder)
    before = sorted(folder.model_repository.rglob("*"))
    with pytest.raises(EsparseError, match="cannot be copied: No such file") as error:
        deploy_toy(folder, engine_with_plugin(tmp_path / "gone.so"))
    assert error.value.where == str(tmp_path / "gone.so")
    assert sorted(folder.model_repository.rglob("*")) == before


def test_text_config_parses(folder):
    record = deploy_toy(folder)
    config = read_config(folder, record.text_model)
    assert (config.name, config.backend, config.max_batch_size) == ("toy_text", "python", 0)
    assert [(tensor.name, tensor.optional) for tensor in config.input] == [
        ("text_input", False), ("max_tokens", True), ("temperature", True), ("seed", True),
    ]  # fmt: skip
    assert {tensor.data_type for tensor in config.output} == {schema.TYPE_STRING}


def test_every_profile_of_the_engine_is_offered(folder):
    profiles = {
        name: {"batch": [1, 1, batch], "sequence": [1, 1, 8], "past": [0, 0, 8]}
        for name, batch in (("a", 2), ("b", 16), ("c", 8))
    }
    record = deploy_toy(folder, engine_of("tensorrt"), engine={"profiles": profiles})
    config = read_config(folder, "toy")
    assert list(config.instance_group[0].profile) == ["0", "1", "2"]
    assert record.max_batch_size == config.max_batch_size == 2  # what every profile takes
    record = deploy_toy(
        folder, engine_of("tensorrt"), engine={"profiles": profiles}, deploy={"max_batch_size": 16}
    )
    assert record.max_batch_size == read_config(folder, "toy").max_batch_size == 16
    with pytest.raises(EsparseError, match="17 is larger than the largest batch of the profiles, 16"):
        deploy_toy(folder, engine={"profiles": profiles}, deploy={"max_batch_size": 17})


def test_a_batch_of_one_needs_no_batcher(folder):
    deploy_toy(folder, deploy={"max_batch_size": 1})
    assert not read_config(folder, "toy").HasField("dynamic_batching")


def test_a_tensor_without_batch_is_refused(folder):
    inputs, outputs = FAMILIES["llama"]
    fixed = [inputs[0].model_copy(update={"shape": [1, "sequence"]}), *inputs[1:]]
    with pytest.raises(EsparseError, match="first dimension of `input_ids`"):
        triton.deploy(make_recipe(folder.root), folder, make_exported(fixed, outputs), NO_ENGINE)
    assert not folder.model_repository.exists()


# --- which backend ---------------------------------------------------------------------------------------


def test_engine_of_tensorrt_proper_is_served_as_it_is(folder):
    record = deploy_toy(folder, engine_of("tensorrt"))
    assert (record.backend, record.reason) == ("tensorrt", "engine of TensorRT 10.13.3")
    plan = folder.model_repository / "toy" / "1" / "model.plan"
    assert plan.read_bytes() == b"plan"
    assert plan.samefile(folder.sparse_plan)  # no second copy on the disk
    assert not list(folder.model_repository.rglob("*.onnx*"))
    assert "10.13.3" in (folder.model_repository / "README.md").read_text()


@pytest.mark.parametrize(
    ("engines", "why"),
    [(NO_ENGINE, "no TensorRT is installed"), (engine_of("tensorrt_rtx"), "engines of TensorRT proper only")],
)
def test_without_such_an_engine_the_onnx_model_is_served_and_the_reason_given(folder, engines, why):
    record = deploy_toy(folder, engines)
    assert record.backend == "onnxruntime"
    assert why in record.reason
    assert why in (folder.model_repository / "README.md").read_text()
    with pytest.raises(EsparseError, match="cannot deploy an engine") as error:
        deploy_toy(folder, engines, deploy={"backend": "tensorrt"})
    assert why in error.value.what
    assert error.value.where == "deploy.backend: tensorrt"


def test_onnx_backend_can_be_asked_for_beside_an_engine(folder):
    record = deploy_toy(folder, engine_of("tensorrt"), deploy={"backend": "onnxruntime"})
    assert (record.backend, record.reason) == ("onnxruntime", "the recipe asks for it")


# --- files -----------------------------------------------------------------------------------------------


def test_served_onnx_runs_and_the_original_still_loads(folder):
    deploy_toy(folder)
    served = folder.model_repository / "toy" / "1" / "model.onnx"
    logits = run_network(served, {"input_ids": np.array([[3, 5, 9]])})["logits"]
    np.testing.assert_allclose(logits[0, -1], toy.next_logits([3, 5, 9]), rtol=1e-4)
    for path in (served, folder.sparse_onnx):  # onnx refuses data files with more than one hard link
        onnx.load(path)
        onnx.checker.check_model(path)


def test_record_lists_every_file(folder):
    record = deploy_toy(folder)
    assert {folder.root / name for name in record.files} == {
        path for path in folder.model_repository.rglob("*") if path.is_file()
    }


def test_a_new_repository_replaces_the_old_one(folder):
    deploy_toy(folder, deploy={"model_name": "first"})
    deploy_toy(folder, deploy={"model_name": "second", "text": False})
    assert {path.name for path in folder.model_repository.iterdir()} == {"second", "README.md"}
    assert sorted(path.name for path in folder.root.iterdir()) == [
        "checkpoint", "engine", "model_repository", "onnx",
    ]  # fmt: skip


def test_a_failure_leaves_the_old_repository_alone(folder):
    deploy_toy(folder)
    before = {path: path.read_bytes() for path in folder.model_repository.rglob("*") if path.is_file()}
    (folder.checkpoint / "tokenizer.json").write_text("{")
    with pytest.raises(EsparseError, match="tokenizer"):
        deploy_toy(folder, deploy={"model_name": "other"})
    assert {p: p.read_bytes() for p in folder.model_repository.rglob("*") if p.is_file()} == before
    assert not (folder.root / ".model_repository.tmp").exists()


def test_tokenizer_is_deployed_whole(folder):
    record = deploy_toy(folder)
    deployed = AutoTokenizer.from_pretrained(folder.model_repository / record.text_model / "1" / "tokenizer")
    original = AutoTokenizer.from_pretrained(folder.checkpoint)
    text = "The quick brown fox, 1234."
    assert deployed(text)["input_ids"] == original(text)["input_ids"]
    assert deployed.bos_token == "<s>"


def test_no_text_model_where_the_tokenizer_has_no_tokenizer_json(folder):
    for file in folder.checkpoint.glob("tokenizer*"):
        file.unlink()
    ByT5Tokenizer().save_pretrained(folder.checkpoint)
    record = deploy_toy(folder)
    assert record.text_model is None
    readme = (folder.model_repository / "README.md").read_text()
    assert "toy_text" not in readme
    assert "pip install" not in record.command


def test_command_is_one_shell_line_that_mounts_the_repository(folder):
    record = deploy_toy(folder)
    words = shlex.split(record.command)
    assert words[:2] == ["docker", "run"]
    assert words[words.index("-v") + 1] == f"{folder.model_repository}:/models:ro"  # a path with a space
    assert words[words.index("-p") + 1].startswith("127.0.0.1:")
    assert record.command in (folder.model_repository / "README.md").read_text()


# --- the Python models -----------------------------------------------------------------------------------


def run_network(path: Path, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Prefill with ONNX Runtime."""
    batch, length = feed["input_ids"].shape
    empty = np.zeros((batch, toy.HEADS, 0, toy.DIM), dtype=np.float32)
    whole = {
        "attention_mask": np.ones((batch, length), dtype=np.int64),
        "position_ids": np.arange(length)[None].repeat(batch, axis=0),
        "past_key_values.0.key": empty,
        "past_key_values.0.value": empty,
        **feed,
    }
    session = onnxruntime.InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, whole), strict=True))


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class Request:
    """A request as a Python model sees it."""

    def __init__(self, outputs: list[str] = (), **inputs: np.ndarray) -> None:
        self.inputs = {name: Tensor(name, np.asarray(value)) for name, value in inputs.items()}
        self.outputs = list(outputs)

    def requested_output_names(self) -> list[str]:
        return self.outputs


class Response:
    def __init__(self, output_tensors: list[Tensor] = (), error: Exception | None = None) -> None:
        self._tensors, self._error = list(output_tensors), error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> SimpleNamespace:
        return SimpleNamespace(message=lambda: str(self._error))

    def output_tensors(self) -> list[Tensor]:
        return self._tensors


def load_model(repository: Path, name: str) -> object:
    """An initialised model of the repository, as Triton's Python backend would make it."""
    folder = repository / name
    config = text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())
    tensors = {kind: [{"name": t.name} for t in getattr(config, kind)] for kind in ("input", "output")}
    model = load_file(folder / "1" / "model.py").TritonPythonModel()
    model.initialize(
        {"model_repository": str(folder), "model_version": "1", "model_config": json.dumps(tensors)}
    )
    return model


@pytest.fixture
def served(folder: BuildDir, monkeypatch: pytest.MonkeyPatch):
    """Both models of a repository with the python backend, behind a stand-in for the server.

    The stand-in checks what Triton checks: names, types, and shapes against `max_batch_size` and `dims`. The
    real server runs the same files in test_tritonserver.py.
    """
    server = ModuleType("triton_python_backend_utils")
    models: dict[str, object] = {}
    calls: list[dict[str, tuple[int, ...]]] = []

    class InferenceRequest:
        def __init__(self, model_name, requested_output_names, inputs, preferred_memory):
            assert preferred_memory == ("CPU", 0)
            config = read_config(folder, model_name)
            types = {schema.TYPE_INT64: np.int64, schema.TYPE_FP32: np.float32}
            given = {tensor.name(): tensor.as_numpy() for tensor in inputs}
            assert given.keys() == {tensor.name for tensor in config.input}
            for tensor in config.input:
                value = given[tensor.name]
                assert value.dtype == types[tensor.data_type]
                assert 1 <= value.shape[0] <= config.max_batch_size
                assert all(
                    want in (-1, size) for want, size in zip(tensor.dims, value.shape[1:], strict=True)
                )
            calls.append({name: value.shape for name, value in given.items()})
            self.call = models[model_name], Request(requested_output_names, **given)

        def exec(self):
            model, request = self.call
            return model.execute([request])[0]

    server.Tensor, server.InferenceRequest, server.InferenceResponse = Tensor, InferenceRequest, Response
    server.TritonError, server.PreferredMemory = RuntimeError, lambda kind, number: (kind, number)
    server.TRITONSERVER_MEMORY_CPU = "CPU"
    server.get_input_tensor_by_name = lambda request, name: request.inputs.get(name)
    monkeypatch.setitem(sys.modules, server.__name__, server)
    record = deploy_toy(folder, deploy={"backend": "python"})
    models |= {name: load_model(folder.model_repository, name) for name in ("toy", record.text_model)}

    def ask(text: str | bytes, **options: object) -> str:
        raw = text if isinstance(text, bytes) else text.encode()
        request = Request(
            text_input=np.array([raw], dtype=object), **{k: np.array([v]) for k, v in options.items()}
        )
        response = models[record.text_model].execute([request])[0]
        if response.has_error():
            raise RuntimeError(response.error().message())
        return response.output_tensors()[0].as_numpy()[0].decode()

    return SimpleNamespace(ask=ask, calls=calls, models=models, folder=folder)


def expected_text(folder: BuildDir, text: str, count: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder.checkpoint)
    prompt = [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    return tokenizer.decode(toy.continuation(prompt, count), skip_special_tokens=True)


def test_text_model_continues_as_the_reference_without_cache(served):
    for text in ("The quick brown", "7"):
        answer = served.ask(text, max_tokens=9)
        assert answer == expected_text(served.folder, text, 9)
    pasts = [shapes["past_key_values.0.key"][2] for shapes in served.calls[:9]]
    lengths = [shapes["input_ids"][1] for shapes in served.calls[:9]]
    assert (pasts[0], lengths[1:]) == (0, [1] * 8)  # an empty cache first, then one token a step
    assert pasts[1:] == list(range(lengths[0], lengths[0] + 8))


def test_text_model_samples_by_seed(served):
    same = [served.ask("The", max_tokens=12, temperature=1.5, seed=5) for _ in range(2)]
    other = served.ask("The", max_tokens=12, temperature=1.5, seed=6)
    assert same[0] == same[1] != other


def test_text_model_stops_at_the_end_of_text(served):
    first = toy.continuation([0, 40], 1)[0]
    settings = served.folder.model_repository / "toy_text" / "1" / "settings.json"
    assert json.loads(settings.read_text())["stop"] == [1]  # of the tiny LLaMA
    model = served.models["toy_text"]
    model.settings["stop"] = [first]
    assert model.generate(model.tokenizer.decode([40]), max_tokens=50, temperature=0.0, seed=None) == ""


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("The", {"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ("The", {"temperature": -1.0}, "temperature must be 0 or more"),
        ("The", {"temperature": float("nan")}, "temperature must be 0 or more"),
        ("The", {"max_tokens": 256}, "exceed 256 in all"),
        ("fox " * 400, {}, "the model takes 256 at once"),
        (b"\xff\xfe", {}, "utf-8"),
    ],
)
def test_text_model_refuses_what_the_network_cannot_take(served, text, options, message):
    with pytest.raises(RuntimeError, match=message):
        served.ask(text, **options)
    assert served.calls == []


def test_errors_of_the_network_reach_the_caller(served):
    served.models["toy_text"].settings["longest_sequence"] = None
    served.models["toy"].session.run = lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        served.ask("The")


def test_engine_profiles_limit_the_lengths(folder):
    profiles = {
        "prefill": {"sequence": [1, 8, 32], "past": [0, 0, 0]},
        "decode": {"sequence": [1, 1, 1], "past": [1, 8, 47]},
    }
    record = deploy_toy(folder, engine_of("tensorrt"), engine={"profiles": profiles})
    path = folder.model_repository / record.text_model / "1" / "settings.json"
    settings = json.loads(path.read_text())
    assert (settings["longest_prompt"], settings["longest_sequence"]) == (32, 48)
