"""The packed model in PyTorch, on a CPU: the operator, merging, folding, and greedy decoding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from esparse_trt.engine.kernels import Gpu, Problem
from esparse_trt.engine.table import Best, Device, Row, Table
from esparse_trt.errors import EsparseError
from esparse_trt.graph import es24
from esparse_trt.graph.groups import as_numpy
from esparse_trt.runtime import ops
from esparse_trt.runtime.decode import Decoder, generate
from esparse_trt.runtime.linear import GatedMlp, Merged, SparseLinear
from esparse_trt.runtime.load import merge, pack_model
from esparse_trt.runtime.ops import sparse_gemm
from esparse_trt.runtime.packing import interleave, pack

CONFIG = LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=96,
    attention_bias=True,
    bos_token_id=1,
    eos_token_id=2,
)


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """Zero the two smallest of every four along K."""
    groups = weight.view(len(weight), -1, 4)
    mask = torch.zeros_like(groups).scatter_(-1, groups.abs().topk(2, dim=-1).indices, 1)
    return (groups * mask).view_as(weight)


def integers(*shape: int) -> torch.Tensor:
    return torch.randint(-3, 4, shape).to(torch.bfloat16)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_packed_layer_is_the_linear_layer(bias: bool, permuted: bool) -> None:
    torch.manual_seed(0)
    weight, x = two_of_four(integers(200, 384)), integers(2, 3, 384)
    b = integers(200) if bias else None
    order = torch.randperm(384) if permuted else None
    layer = SparseLinear.pack(weight, b, order)
    expected = nn.functional.linear(x if order is None else x[..., order], weight, b)
    assert torch.equal(layer(x), expected)
    assert not list(layer.parameters()), "nothing but the packed weights is held"
    assert layer.weight_bytes < 0.75 * weight.nbytes


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("name", "activation"), [("swiglu", nn.SiLU()), ("geglu", nn.GELU(approximate="tanh"))]
)
def test_packed_gate_and_up_apply_the_activation(bias: bool, name: str, activation: nn.Module) -> None:
    torch.manual_seed(0)
    gate, up = (nn.Linear(384, 104, bias).double() for _ in range(2))
    for layer in (gate, up):
        layer.weight.data = two_of_four(integers(104, 384)).double() / 8
        if bias:
            layer.bias.data = integers(104).double()
    x = integers(2, 3, 384)
    joined = interleave(gate.bias, up.bias).bfloat16() if bias else None
    layer = SparseLinear.pack(interleave(gate.weight, up.weight).bfloat16(), joined, activation=name)
    found, expected = layer(x).double(), activation(gate(x.double())) * up(x.double())
    assert found.shape == (2, 3, 104)
    assert (found - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("shape", [(64, 128), (200, 416), (72, 4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packing_on_the_device_gives_the_same_words(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = two_of_four(torch.randint(-1, 2, shape).to(dtype))  # with many chunks of one and no nonzero
    weight[0] *= -0.0
    values, metadata = pack(weight)
    expected = es24.pack(as_numpy(weight))
    assert np.array_equal(as_numpy(values).view("u2"), expected.values.view("u2"))
    assert np.array_equal(metadata.numpy(), expected.metadata)


def test_dense_weight_is_refused_by_name() -> None:
    with pytest.raises(EsparseError, match="not 2:4") as error:
        SparseLinear.pack(torch.ones(64, 128, dtype=torch.float16), name="down_proj")
    assert error.value.where == "down_proj"


def test_odd_channels_are_refused() -> None:
    with pytest.raises(EsparseError, match="K = 40 is not a multiple of 32"):
        SparseLinear.pack(torch.zeros(64, 40, dtype=torch.float16))


def test_wrong_inputs_are_named() -> None:
    layer = SparseLinear.pack(two_of_four(integers(64, 128)))
    with pytest.raises(EsparseError, match="x has 64 channels, the weight 128"):
        layer(integers(1, 64))
    with pytest.raises(EsparseError, match=r"x is torch\.float32"):
        layer(torch.zeros(1, 128))
    with pytest.raises(EsparseError, match="metadata is"):
        sparse_gemm(integers(1, 128), layer.values, layer.metadata[:, :, :2], None, None)


def test_operator_traces_without_running() -> None:
    layer = SparseLinear.pack(two_of_four(integers(64, 128)))
    for activation in (None, "swiglu"):
        arguments = (integers(5, 128), layer.values, layer.metadata, None, None, activation)
        torch.library.opcheck(sparse_gemm, arguments)


def test_members_share_one_gemm_in_any_order() -> None:
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(x)

    gemm = Counting(8, 6)
    a, b = Merged(gemm, [4, 2]).members()
    x, other = torch.randn(3, 8), torch.randn(3, 8)
    expected = gemm(x).split([4, 2], dim=-1)
    gemm.calls = 0
    assert torch.equal(b(x), expected[1]) and torch.equal(a(x), expected[0])
    assert gemm.calls == 1
    x.copy_(other)  # the same tensor with other contents, as in a CUDA graph
    assert torch.equal(a(x), gemm(other)[..., :4])
    assert torch.equal(b(other), gemm(other)[..., 4:]), "another tensor is never answered from the first"


@pytest.fixture
def permuted_model() -> tuple[LlamaForCausalLM, dict[str, torch.Tensor]]:
    """A model whose layers are 2:4 under permutations of every kind."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).to(torch.bfloat16).eval()
    orders = {}
    for index, block in enumerate(model.model.layers):
        head = torch.stack([torch.randperm(32), torch.randperm(32)])  # one order a KV head
        within = torch.cat([head[h // 2] + 32 * h for h in range(4)])
        attention, mlp = torch.randperm(128), torch.randperm(128)
        for path, order in {
            "self_attn.q_proj": attention,
            "self_attn.k_proj": attention,
            "self_attn.v_proj": attention,
            "self_attn.o_proj": within,
            "mlp.gate_proj": mlp,
            "mlp.up_proj": mlp,
            "mlp.down_proj": torch.randperm(256),
        }.items():
            weight = block.get_submodule(path).weight.data
            weight[:, order] = two_of_four(weight[:, order].contiguous())
            orders[f"model.layers.{index}.{path}"] = order
    return model, orders


def test_packed_model_is_the_pruned_model(permuted_model) -> None:
    model, orders = permuted_model
    ids = torch.randint(0, 96, (2, 9))
    expected = model(ids).logits
    pack_model(model, orders, set(orders), "cpu")
    found = model(ids).logits
    assert (found - expected).norm() / expected.norm() < 1e-2  # bf16: sums in another order
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert linears == ["lm_head"]
    packed = {n: m for n, m in model.named_modules() if isinstance(m, SparseLinear)}
    assert len(packed) == 2 * 4
    assert all(isinstance(block.mlp, GatedMlp) for block in model.model.layers)
    for name, layer in packed.items():
        folded = "o_proj" in name or "down_proj" in name
        assert (layer.permutation is None) == folded, name


def test_an_activation_that_kernels_lack_stays_between_the_gemms(permuted_model) -> None:
    model, orders = permuted_model
    for block in model.model.layers:
        block.mlp.act_fn = nn.GELU()  # the exact one
    ids = torch.randint(0, 96, (2, 9))
    expected = model(ids).logits
    pack_model(model, orders, set(orders), "cpu")
    assert not any(isinstance(module, GatedMlp) for module in model.modules())
    found = model(ids).logits
    assert (found - expected).norm() / expected.norm() < 1e-2


def test_sites_that_stay_dense_are_one_gemm_too(permuted_model) -> None:
    model, orders = permuted_model
    ids = torch.randint(0, 96, (2, 9))
    expected = model(ids).logits
    dense = {"model.layers.0.self_attn.k_proj", "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"}
    pack_model(model, orders, set(orders) - dense, "cpu")
    found = model(ids).logits
    assert (found - expected).norm() / expected.norm() < 1e-2  # bf16: sums in another order
    shapes = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert shapes == {
        "model.layers.0.self_attn.q_proj.merged.gemm": (256, 128),
        "model.layers.1.mlp.gate_proj.merged.gemm": (512, 128),
        "model.layers.1.mlp.down_proj": (128, 256),
        "lm_head": (96, 128),
    }


def test_merging_dense_layers_changes_nothing(permuted_model) -> None:
    model, _ = permuted_model
    model = model.float()
    ids = torch.randint(0, 96, (2, 9))
    expected = model(ids).logits
    merge(model)
    torch.testing.assert_close(model(ids).logits, expected)
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) == 2 * 4 + 1


def test_generate_is_greedy(permuted_model) -> None:
    model, _ = permuted_model
    model = model.float()
    prompt = torch.randint(0, 96, (2, 5))
    ids = prompt
    for _ in range(6):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generate(model, prompt, 6), ids[:, 5:])


def test_sliding_windows_are_refused() -> None:
    config = MistralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=96, sliding_window=8,
    )  # fmt: skip
    with pytest.raises(EsparseError, match="1 of 1 layers have sliding-window attention"):
        generate(MistralForCausalLM(config).eval(), torch.tensor([[1, 2]]), 2)


def test_cache_overflow_is_refused(permuted_model) -> None:
    decoder = Decoder(permuted_model[0], 1, 4)
    decoder.prefill(torch.tensor([[1, 2, 3]]))
    decoder.step()
    with pytest.raises(ValueError, match="holds 4 tokens, 5 are needed"):
        decoder.step()


def test_tables_name_the_candidate_the_users_before_the_shipped_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        candidates = ("small", "large", "static", "shipped")

        def current_gpu(self) -> Gpu:
            return Gpu(90, 132)

        def why_not(self, problem: Problem, candidate: str, gpu: Gpu) -> str | None:
            return "no permutation" if problem.permutation and candidate == "small" else None

        def default(self, problem: Problem, gpu: Gpu) -> str:
            return "static"

    def row(m: int, kernel: str) -> Row:
        best = Best(kernel, 1.0, 1.0, 1.0)
        return Row(64, 128, "float16", m, plain=Best("plain", 1.0, 1.0, 1.0), programmatic=best, dense=best)

    def table(*rows: Row) -> Table:
        device = Device("GPU", 90, 132, "1", "13")
        return Table(device, "1", "kernels", "2026-01-01", {row.key: row for row in rows})

    monkeypatch.setattr(ops.kernels, "load", Library)
    monkeypatch.setattr(ops, "tuned_table", lambda: table(row(4, "small"), row(16, "large")))
    monkeypatch.setattr(ops, "shipped_table", lambda: None)
    ops.candidate_for.cache_clear()
    chosen = [ops.candidate_for(Problem(m, 64, 128)) for m in (1, 4, 5, 16, 17)]
    assert chosen == ["small", "small", "large", "large", "static"]
    assert ops.candidate_for(Problem(1, 64, 128, permutation=True)) == "static"
    assert ops.candidate_for(Problem(1, 128, 128)) == "static"

    monkeypatch.setattr(ops, "shipped_table", lambda: table(row(8, "shipped"), row(32, "of earlier kernels")))
    ops.candidate_for.cache_clear()
    assert ops.candidate_for(Problem(1, 64, 128)) == "small"
    assert ops.candidate_for(Problem(1, 64, 128, permutation=True)) == "shipped"
    assert ops.candidate_for(Problem(1, 64, 128, "bfloat16")) == "shipped"
    assert ops.candidate_for(Problem(20, 64, 128)) == "static"
    ops.candidate_for.cache_clear()
