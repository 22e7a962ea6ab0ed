"""The verdicts of the fidelity check, and its PyTorch side, without an export."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from esparse_trt.artifacts import BuildDir, Comparison, EngineFile, EngineRecord, ExportRecord, TensorSpec
from esparse_trt.errors import CheckFailed
from esparse_trt.evaluate import engines as engine_module
from esparse_trt.evaluate.engines import compare_engines
from esparse_trt.evaluate.fidelity import LIMITS, _float32, compare_with_torch, explain, judge
from esparse_trt.evaluate.runtimes import Steps, run_steps
from esparse_trt.evaluate.sections import SectionResult, block_of


def error(name: str, relative_l2: float) -> Comparison:
    return Comparison(
        name=name, block=None, max_abs=0, mean_abs=0, max_rel=0, mean_rel=0, relative_l2=relative_l2, cosine=1
    )


LAYERS = [error("q", 1e-3), error("k", 3e-3), error("o", 1e-1)]


def test_the_first_layer_above_the_limit_is_named_and_not_the_worst():
    check = judge("PyTorch", "ORT", error("logits", 1.0), LAYERS, LIMITS["float16"])
    assert (check.passed, check.first_divergence) == (False, "k")
    problem = explain(check)
    assert problem.where == "k" and "3.00e-03" in problem.what and "2e-03" in problem.what
    assert "--from export" in problem.fix


def test_logits_that_diverge_while_no_layer_does():
    check = judge("PyTorch", "ORT", error("logits", 6e-3), LAYERS[:1], LIMITS["float16"])
    assert (check.passed, check.first_divergence) == (False, "logits")
    assert "float32" in explain(check).fix and "5e-03" in explain(check).what


def test_an_engine_that_diverges_is_to_be_built_again():
    check = judge("ORT", "TensorRT", error("logits", 6e-3), [], LIMITS["float16"])
    assert "--from engine" in explain(check).fix


def test_agreement():
    check = judge("PyTorch", "ORT", error("logits", 4.9e-3), LAYERS[:1], LIMITS["float16"])
    assert (check.passed, check.first_divergence) == (True, None)


# --- PyTorch ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float16).eval()


IDS = torch.arange(3, 23).view(1, -1)


def test_fp32_arithmetic_on_fp16_weights(half, tiny_llama):
    """Block by block the same as the whole model in fp32, and the model is left as it was."""
    before = {name: tensor.clone() for name, tensor in half.state_dict().items()}
    widened = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float16).eval().float()
    with _float32(half):
        found = half(input_ids=IDS).logits
        assert half.model.layers[0].mlp.up_proj.weight.dtype == torch.float16  # narrow again after its turn
    with torch.no_grad():
        expected = widened(input_ids=IDS).logits
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    after = half.state_dict()
    assert all(
        tensor.dtype == after[name].dtype and torch.equal(tensor, after[name])
        for name, tensor in before.items()
    )


def torch_sections(model, ids: torch.Tensor, change=lambda name, array: array) -> list[SectionResult]:
    """What ONNX Runtime would give, from PyTorch in fp32; `change` spoils it."""
    outputs: dict[str, np.ndarray] = {}

    def keep(name):
        def hook(module, args, output):
            value = change(name, output)
            outputs[name] = value.numpy().copy()
            return value

        return hook

    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    names += [f"model.layers.{i}" for i in range(2)]
    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with _float32(model):
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    by_block: dict[str | None, dict[str, np.ndarray]] = {}
    for name, array in outputs.items():
        by_block.setdefault(block_of(name), {})[name] = array
    return [SectionResult(block, found) for block, found in by_block.items()]


def torch_logits(model) -> np.ndarray:
    with _float32(model):
        return model(input_ids=IDS).logits.numpy()


def test_the_same_model_agrees_to_the_last_bit(half):
    check = compare_with_torch(
        half, torch_sections(half, IDS[:, :-1]), torch_logits(half), IDS, LIMITS["float32"], a="a", b="b"
    )
    assert check.passed and check.logits.relative_l2 == 0
    leaves = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
              "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
    blocks = [[*(f"model.layers.{i}.{leaf}" for leaf in leaves), f"model.layers.{i}"] for i in range(2)]
    assert [item.name for item in check.layers] == [*blocks[0], *blocks[1], "lm_head"]
    assert all(item.relative_l2 == 0 for item in check.layers)


def test_a_block_that_is_wrong_does_not_taint_the_ones_after_it(half):
    """Each block is given the input that the other runtime gave it, so only the culprit stands out."""
    culprit = "model.layers.0.self_attn.o_proj"
    sections = torch_sections(half, IDS[:, :-1], lambda name, x: x * 1.5 if name == culprit else x)
    check = compare_with_torch(half, sections, torch_logits(half), IDS, LIMITS["float32"], a="a", b="b")
    assert (check.passed, check.first_divergence) == (False, culprit)
    wrong = [item.name for item in check.layers if item.relative_l2 > 1e-5]
    assert wrong and all(name.startswith("model.layers.0") for name in wrong)
    assert "model.layers.1.mlp.down_proj" not in wrong and "lm_head" not in wrong


# --- engines ---------------------------------------------------------------------------------------------

SPECS = [
    TensorSpec(name="input_ids", dtype="int64", shape=["batch", "sequence"]),
    TensorSpec(name="past_key_values.0.key", dtype="float32", shape=["batch", 1, "past", 4]),
]
EXPORTED = ExportRecord(
    dtype="float32", opset=20, inputs=SPECS, outputs=[], linears={}, gathers=[], bytes={}
)  # fmt: skip


PROFILES = [
    {"input_ids": ((1, 1), (1, 4), (2, 6)), SPECS[1].name: ((1, 1, 0, 4), (1, 1, 0, 4), (2, 1, 0, 4))},
    {"input_ids": ((1, 1), (1, 1), (2, 1)), SPECS[1].name: ((1, 1, 1, 4), (1, 1, 4, 4), (2, 1, 9, 4))},
]


class Running:
    """A stand-in for an engine on a GPU: sums of all tokens so far, kept in the cache."""

    profiles = PROFILES
    factor = 1.0

    def __init__(self, plan, flavour):
        self.plan = plan

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __call__(self, feed):
        ids, past = feed["input_ids"], feed["past_key_values.0.key"]
        total = past[:, 0, :, :1].sum(1, keepdims=True) + ids.cumsum(1)[..., None]
        new = np.repeat(ids[:, None, :, None].astype(np.float32), 4, axis=-1)
        spoiled = self.factor if "sparse" in self.plan.name else 1.0
        return {
            "logits": (total * spoiled).astype(np.float32),
            "present.0.key": np.concatenate([past, new], axis=2),
        }


def record(runnable: bool = True, **changes) -> EngineRecord:
    def file(name):
        return EngineFile(
            file=f"engine/{name}.plan", onnx=f"onnx/{name}.onnx", onnx_sha256={}, bytes=1, seconds=1,
            sparse_weights=False,
        )  # fmt: skip

    fields = {
        "flavour": "tensorrt_rtx", "version": "1.7", "skipped": None, "dense": file("dense"),
        "sparse": file("sparse"), "profiles": {}, "runnable": runnable,
        "not_runnable": None if runnable else "no NVIDIA driver",
    }  # fmt: skip
    return EngineRecord(**(fields | changes))


@pytest.fixture
def fake_engines(monkeypatch):
    seen = []

    def steps(path, inputs, ids) -> Steps:
        seen.append((path.name, ids.shape[1]))
        return run_steps(Running(SimpleNamespace(name=""), ""), inputs, ids)

    monkeypatch.setattr(engine_module, "EngineRunner", Running)
    monkeypatch.setattr(engine_module, "onnx_steps", steps)
    return seen


def test_engines_run_as_many_tokens_as_their_profiles_hold(fake_engines, tmp_path):
    checks, skipped = compare_engines(BuildDir(tmp_path), EXPORTED, record(), IDS, LIMITS["float32"])
    assert fake_engines == [("dense.onnx", 7), ("sparse.onnx", 7)]  # a prefill of 6 and one more
    assert skipped is None
    assert [(c.a, c.b, c.passed) for c in checks] == [
        ("ONNX Runtime onnx/dense.onnx", "TensorRT-RTX engine/dense.plan", True),
        ("ONNX Runtime onnx/sparse.onnx", "TensorRT-RTX engine/sparse.plan", True),
    ]


def test_an_engine_that_is_off(fake_engines, tmp_path, monkeypatch):
    monkeypatch.setattr(Running, "factor", 1.01)
    checks, _ = compare_engines(BuildDir(tmp_path), EXPORTED, record(), IDS, LIMITS["float16"])
    assert [check.passed for check in checks] == [True, False]
    assert checks[1].logits.relative_l2 == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(CheckFailed, match=r"sparse\.plan"):
        raise explain(checks[1])


def test_engines_whose_profiles_hold_no_prefill(fake_engines, tmp_path, monkeypatch):
    monkeypatch.setattr(Running, "profiles", PROFILES[1:])
    checks, skipped = compare_engines(BuildDir(tmp_path), EXPORTED, record(), IDS, LIMITS["float16"])
    assert checks == [] and "no profile" in skipped


@pytest.mark.parametrize(
    ("engines", "reason"),
    [
        (record(runnable=False), "no NVIDIA driver"),
        (record(flavour=None, dense=None, sparse=None, skipped="no TensorRT is installed"), "no TensorRT"),
    ],
)
def test_engines_that_cannot_run_say_why(engines, reason, tmp_path):
    checks, skipped = compare_engines(BuildDir(tmp_path), EXPORTED, engines, IDS, LIMITS["float16"])
    assert checks == [] and reason in skipped
