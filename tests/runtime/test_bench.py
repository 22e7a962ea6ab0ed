"""The measuring itself, on a CPU: the same code with a clock that counts."""

from __future__ import annotations

import copy
import itertools
import sys
import types

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from esparse_trt.evaluate.bench_record import Ceilings, LayerTime
from esparse_trt.records import Reason
from esparse_trt.runtime import bench
from esparse_trt.runtime.bench_layers import Layer, floor_us, layers_of, row, why
from esparse_trt.runtime.linear import SparseLinear
from esparse_trt.runtime.load import merge, pack_model
from esparse_trt.runtime.nvml import open_meter
from esparse_trt.sparsity.pattern import Pattern, nm_mask

CONFIG = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=96,
)  # fmt: skip


class CountingClock:
    """Every mark is a millisecond after the one before."""

    def __init__(self) -> None:
        self._now = itertools.count(step=1000)

    def mark(self) -> int:
        return next(self._now)

    def elapsed_us(self, first: int, last: int) -> int:
        return last - first


class StillMeter:
    """A GPU that draws 3 J between any two readings."""

    def __init__(self) -> None:
        self._joules = itertools.count(step=3)

    def joules(self) -> float:
        return next(self._joules)

    def sm_mhz(self) -> int:
        return 1980


@pytest.fixture(scope="module")
def pair() -> dict[str, LlamaForCausalLM]:
    torch.manual_seed(0)
    dense = LlamaForCausalLM(CONFIG).to(torch.bfloat16).eval()
    names = {name for name, module in dense.named_modules() if isinstance(module, torch.nn.Linear)}
    for name in names - {"lm_head"}:
        weight = dense.get_submodule(name).weight.data
        weight.mul_(nm_mask(weight.abs(), Pattern(2, 4)))
    sparse = copy.deepcopy(dense)
    pack_model(sparse, {}, names - {"lm_head"}, "cpu")
    merge(dense)
    return {"dense": dense, "sparse": sparse}


def test_every_step_and_prefill_of_both_models_is_counted(pair) -> None:
    found = bench.measure(pair, 2, 5, 4, clock=CountingClock())
    assert list(found) == ["dense", "sparse"]
    for side in found.values():
        assert side.prefill.count == bench.TURNS
        assert side.decode.count == 4 * bench.TURNS
        assert side.decode.median == side.decode.p99 == 1.0
        assert side.joules_per_token is None and side.sm_mhz is None


def test_energy_is_per_token_and_only_of_long_stretches(pair, monkeypatch) -> None:
    timed, steps = 4 * bench.TURNS, 5 * bench.TURNS
    found = bench.measure(pair, 2, 5, 4, clock=CountingClock(), meter=StillMeter())
    assert found["sparse"].joules_per_token is None  # 12 ms: NVML's counter does not move in that time
    assert found["sparse"].sm_mhz == 1980
    monkeypatch.setattr(bench, "ENERGY_SECONDS", 1e-3 * timed)
    found = bench.measure(pair, 2, 5, 4, clock=CountingClock(), meter=StillMeter())
    assert found["sparse"].joules_per_token == pytest.approx(3 * bench.TURNS / (2 * steps))


def test_packed_model_answers_like_the_masked_one(pair) -> None:
    check = bench.check_logits(pair["dense"], pair["sparse"], steps=6)
    assert check.error <= check.worst < 2e-2  # bf16
    assert 0 < check.dense_rounding < 2e-2 and 0 < check.sparse_rounding < 2e-2
    other = copy.deepcopy(pair["dense"])
    bench.unmask(other)
    assert bench.check_logits(other, pair["sparse"], steps=6).error > 0.1


def test_decoding_step_by_step_gives_the_logits_of_one_forward(pair) -> None:
    ids = torch.randint(0, 96, (1, 7))
    dense = copy.deepcopy(pair["dense"]).float()
    torch.testing.assert_close(bench.teacher_forced(dense, ids), dense(ids).logits[0, 1:].detach())


def test_random_model_is_2_4_with_quiet_residual_branches() -> None:
    torch.manual_seed(0)
    model = bench.random_model(CONFIG, torch.float32, "cpu")
    block = model.model.layers[1]
    for layer in (block.self_attn.q_proj, block.self_attn.o_proj, block.mlp.up_proj, block.mlp.down_proj):
        assert torch.equal(
            (layer.weight.view(-1, 4) != 0).sum(1), torch.full((layer.weight.numel() // 4,), 2)
        )
    assert model.lm_head.weight.count_nonzero() == model.lm_head.weight.numel()
    ratio = (block.self_attn.o_proj.weight.std() / block.self_attn.q_proj.weight.std()).item()
    assert ratio == pytest.approx((2 * 2) ** -0.5, rel=0.05)
    loudness = block.mlp.down_proj.weight.std().item()
    bench.unmask(model)
    assert block.mlp.down_proj.weight.count_nonzero() == block.mlp.down_proj.weight.numel()
    assert block.mlp.down_proj.weight.std().item() == pytest.approx(loudness, rel=0.05)


def test_shuffled_channels_are_read_through_permutations() -> None:
    torch.manual_seed(0)
    model = bench.random_model(CONFIG, torch.bfloat16, "cpu")
    orders = bench.shuffle_channels(model)
    query = "model.layers.0.self_attn.q_proj"
    assert orders[query] is orders["model.layers.0.self_attn.v_proj"]
    weight = model.get_submodule(query).weight
    assert torch.equal(weight[:, orders[query]] != 0, nm_mask(weight[:, orders[query]].abs(), Pattern(2, 4)))
    twin = bench.packed_twin(model, orders)
    layers = layers_of(twin, {})
    assert [layer.site for layer in layers if layer.permuted] == ["o"], "norms permute, down is folded"
    assert [layer.site for layer in layers if layer.attended] == ["o"]
    ids = torch.randint(0, 96, (2, 9))
    expected = model(ids).logits
    assert (twin(ids).logits - expected).norm() / expected.norm() < 1e-2  # bf16


def test_shared_weights_are_counted_once() -> None:
    a, b = torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(8, 4, bias=False)
    b.weight = a.weight
    assert bench.weight_bytes(torch.nn.ModuleList([a, b])) == 4 * 8 * 4


def test_layers_are_found_by_site_with_their_number(pair) -> None:
    found = layers_of(pair["sparse"], {"lm_head": "excluded by the recipe"})
    rows = [(layer.site, layer.n, layer.k, layer.sparse, count) for layer, count in found.items()]
    assert rows == [
        ("qkv", 256, 128, True, 2),
        ("o", 128, 128, True, 2),
        ("gate_up", 512, 128, True, 2),
        ("down", 128, 256, True, 2),
        ("lm_head", 96, 128, False, 1),
    ]
    packed = [module for module in pair["sparse"].modules() if isinstance(module, SparseLinear)]
    held = sum(layer.packed_bytes * count for layer, count in found.items() if layer.sparse)
    assert held == sum(layer.weight_bytes for layer in packed)
    head = list(found)[-1]
    assert why(head, "bfloat16", []) == (Reason.not_selected, "excluded by the recipe")


def test_a_site_stays_dense_for_the_reason_of_any_of_its_layers(pair) -> None:
    key = "model.layers.1.self_attn.k_proj"
    found = layers_of(pair["dense"], {key: "it is the most sensitive"})
    reasons = [(layer.site, layer.dense_reason, count) for layer, count in found.items()]
    assert reasons[0] == ("qkv", None, 1)
    assert ("qkv", "it is the most sensitive", 1) in reasons


def layer(n: int = 4096, k: int = 4096, *, sparse: bool = True) -> Layer:
    return Layer("o", n, k, sparse, bias=False, permuted=False, dense_reason=None)


def times(*speedups: float) -> list[LayerTime]:
    return [
        LayerTime(m=2**i, kernel="k", sparse_us=10, dense_us=10 * s, floor_us=5)
        for i, s in enumerate(speedups)
    ]


@pytest.mark.parametrize(
    ("speedups", "code", "text"),
    [
        ((1.5, 1.2), Reason.faster, "every M"),
        ((1.5, 0.9, 0.8), Reason.mixed, "dense is faster at M = 2, 4"),
        ((0.9, 0.8), Reason.dense_faster, "dense is faster at every M"),
        ((), Reason.not_measured, "no kernel"),
    ],
)
def test_reason_of_a_sparse_layer(speedups, code, text) -> None:
    made = row(layer(), 32, "float16", times(*speedups))
    assert made.code == code and text in made.reason
    assert [time.share_of_floor for time in made.times] == [0.5] * len(speedups)


def test_what_the_layout_cannot_hold_says_so() -> None:
    assert why(layer(4096, 40, sparse=False), "float16", [])[0] == Reason.not_eligible_shape


def test_a_2_4_layer_that_runs_dense_was_chosen_to() -> None:
    code, reason = why(layer(sparse=False), "float16", [])
    assert code == Reason.dense_faster and reason.startswith("2:4, but")


def test_floor_is_memory_for_one_token_and_arithmetic_for_many() -> None:
    ceilings = Ceilings(read_gb_per_s=3000, dense_tflop_per_s=600)
    assert floor_us(layer(), 1, ceilings) == pytest.approx((0.5625 * 2 * 4096**2 + 4 * 4096) / 3e6)
    assert floor_us(layer(), 8192, ceilings) == pytest.approx(2 * 8192 * 4096**2 / (2 * 600e6))


class FakeNvml(types.ModuleType):
    """pynvml on a machine with one GPU, which may refuse to tell its energy."""

    NVML_CLOCK_SM = 1

    class NVMLError(Exception):
        pass

    def __init__(self, *, energy: bool) -> None:
        super().__init__("pynvml")
        self._energy = energy

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if not self._energy:
            raise self.NVMLError("Not Supported")
        assert handle == "GPU-abc"
        return 2500

    def nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:
        return 1755

    nvmlDeviceGetMaxClockInfo = nvmlDeviceGetClockInfo

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return 700_000


def test_meter_reads_joules_watts_and_megahertz_or_says_why_not(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: types.SimpleNamespace(uuid="abc"))
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(energy=True))
    meter = open_meter()
    assert (meter.joules(), meter.power_limit_w(), meter.sm_mhz()) == (2.5, 700, 1755)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(energy=False))
    assert open_meter() == "NVML gives no energy or clocks here: Not Supported"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install nvidia-ml-py" in open_meter()
