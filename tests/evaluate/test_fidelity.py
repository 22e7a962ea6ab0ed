"""The verdicts of the fidelity check, and its PyTorch side, without an export."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from esparse_trt.artifacts import BuildDir
from esparse_trt.errors import CheckFailed
from esparse_trt.evaluate import engines as engine_module
from esparse_trt.evaluate.engines import compare_engines
from esparse_trt.evaluate.fidelity import LIMITS, Limits, _float32, compare_with_torch, explain, judge
from esparse_trt.evaluate.runtimes import Steps, run_steps
from esparse_trt.evaluate.sections import SectionResult, block_of
from esparse_trt.evaluate.verify_record import Comparison
from esparse_trt.records import EngineFile, EngineRecord, ExportRecord, TensorSpec


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
    with torch.inference_mode(), _float32(half):
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


def run_elsewhere(model, arithmetic, change=lambda name, x: x) -> tuple[list[SectionResult], np.ndarray]:
    """What another runtime would give: PyTorch in some arithmetic, spoiled by `change`."""
    outputs: dict[str, np.ndarray] = {}

    def keep(name):
        def hook(module, args, output):
            value = change(name, output)
            outputs[name] = value.numpy().copy()
            return value

        return hook

    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    names += [f"model.layers.{i}" for i in range(2)]
    with torch.inference_mode(), arithmetic(model):
        logits = model(input_ids=IDS).logits.numpy()
        handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
        model(input_ids=IDS[:, :-1])
        for handle in handles:
            handle.remove()
    by_block: dict[str | None, dict[str, np.ndarray]] = {}
    for name, array in outputs.items():
        by_block.setdefault(block_of(name), {})[name] = array
    return [SectionResult(block, found) for block, found in by_block.items()], logits


def test_the_same_arithmetic_agrees_to_the_last_bit(half):
    sections, logits = run_elsewhere(half, nullcontext)
    check = compare_with_torch(half, sections, logits, IDS, Limits(0, 0), a="a", b="b")
    assert check.passed and check.logits.relative_l2 == 0
    leaves = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
              "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
    blocks = [[*(f"model.layers.{i}.{leaf}" for leaf in leaves), f"model.layers.{i}"] for i in range(2)]
    assert [item.name for item in check.layers] == [*blocks[0], *blocks[1], "lm_head"]
    assert all(item.relative_l2 == 0 for item in check.layers)
    assert check.rounding == {}


CULPRIT = "model.layers.0.self_attn.o_proj"


def test_a_block_that_is_wrong_does_not_taint_the_ones_after_it(half):
    """Each block is given the input that the other runtime gave it, so only the culprit stands out."""
    sections, logits = run_elsewhere(half, nullcontext, lambda name, x: x * 1.5 if name == CULPRIT else x)
    check = compare_with_torch(half, sections, logits, IDS, LIMITS["float16"], a="a", b="b")
    assert (check.passed, check.first_divergence) == (False, CULPRIT)
    wrong = [item.name for item in check.layers if item.relative_l2 > 0]
    assert wrong[0] == CULPRIT and all(name.startswith("model.layers.0") for name in wrong)


def test_what_is_above_the_limit_by_rounding_alone_passes(half):
    """The other runtime computes in fp32: all that it differs by is the rounding of fp16."""
    sections, logits = run_elsewhere(half, _float32)
    check = compare_with_torch(half, sections, logits, IDS, Limits(2e-4, 2e-4), a="a", b="b")
    suspects = {item.name: item for item in [*check.layers, check.logits] if item.relative_l2 > 2e-4}
    assert check.passed and check.rounding.keys() == suspects.keys() and CULPRIT in suspects
    for name, item in suspects.items():
        assert check.rounding[name] == pytest.approx(item.relative_l2, rel=1e-2)


def test_rounding_excuses_no_mistake(half):
    sections, logits = run_elsewhere(half, _float32, lambda name, x: x * 1.01 if name == CULPRIT else x)
    check = compare_with_torch(half, sections, logits, IDS, Limits(2e-4, 2e-4), a="a", b="b")
    assert (check.passed, check.first_divergence) == (False, CULPRIT)
    assert check.rounding[CULPRIT] < 1e-3


@pytest.mark.parametrize(("rounding", "passed"), [(0.9e-3, False), (1.6e-3, True), (1.0, True)])
@pytest.mark.parametrize("name", ["k", "logits"])
def test_relief_is_twice_the_rounding(name, rounding, passed):
    layers = [error("k", 3e-3)] if name == "k" else []
    logits = error("logits", 3e-3 if name == "logits" else 0)
    check = judge("a", "b", logits, layers, Limits(2e-3, 2e-3), {name: rounding})
    assert (check.passed, check.first_divergence) == (passed, None if passed else name)


def test_relief_ends_at_five_limits():
    check = judge("a", "b", error("logits", 0), [error("k", 1.01e-2)], LIMITS["float16"], {"k": 1.0})
    assert check.first_divergence == "k"


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
