"""The PyTorch runtime on a GPU: attention, packed layers, CUDA graphs. Needs the kernel library.

ESPARSE_LIBRARY_DIR=build/plugins python -m pytest tests/gpu/test_runtime.py
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from esparse_trt.errors import EsparseError
from esparse_trt.runtime.attention import decode_attention
from esparse_trt.runtime.bench import shuffle_channels
from esparse_trt.runtime.compile import compile_layers
from esparse_trt.runtime.decode import Decoder, generate
from esparse_trt.runtime.linear import GatedMlp, SparseLinear
from esparse_trt.runtime.load import merge, pack_model
from esparse_trt.runtime.norm import rms_norm
from esparse_trt.sparsity.pattern import Pattern, nm_mask

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CONFIG = LlamaConfig(
    hidden_size=512, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=8,
    num_key_value_heads=4, vocab_size=1000,
)  # fmt: skip
LIMIT = 5e-3  # relative L2 distance of logits in fp16


@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "size", "longest"),
    [
        (1, 32, 32, 128, 700),
        (16, 32, 8, 128, 300),
        (64, 8, 8, 64, 130),
        (3, 12, 2, 80, 2000),
        (1, 4, 4, 256, 64),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_attention_over_every_part_of_the_cache(batch, heads, kv_heads, size, longest, dtype) -> None:
    torch.manual_seed(0)
    query = torch.randn(batch, heads, 1, size, device="cuda", dtype=dtype)
    keys, values = torch.randn(2, batch, kv_heads, longest, size, device="cuda", dtype=dtype)
    for length in sorted(
        {1, 2, 63, 64, longest // 2, longest - 1, longest} & set(range(1, longest + 1)), reverse=True
    ):
        new = [t[:, :, length - 1 : length].clone() for t in (keys, values)]
        angle = torch.rand(1, 1, size // 2, device="cuda").repeat(1, 1, 2)
        angles = [angle.cos().to(dtype), angle.sin().to(dtype)] if length % 2 else [None, None]
        turned, here = query, new[0]
        if length % 2:
            exact = (t.float() for t in (query, new[0], *angles))
            turned, here = (t.to(dtype) for t in apply_rotary_pos_emb(*exact))
        keys[:, :, length - 1 : length] = here
        k, v = (t[:, :, :length].double().repeat_interleave(heads // kv_heads, 1) for t in (keys, values))
        expected = (turned.double() @ k.transpose(2, 3) * size**-0.5).softmax(-1) @ v
        keys[:, :, length - 1 :] = values[:, :, length - 1 :] = float("nan")  # must not be read
        position = torch.tensor([length - 1], device="cuda")
        places = torch.randperm(heads * size, device="cuda").int() if length % 2 else None
        found = decode_attention(query, *new, keys, values, position, size**-0.5, places, *angles)
        if places is not None:
            found = found.flatten(1)[:, places].view_as(found)
        found = found.transpose(1, 2).double()
        for written, given in zip((keys, values), (here, new[1]), strict=True):
            torch.testing.assert_close(written[:, :, length - 1 : length], given)
            assert written[:, :, length:].isnan().all()
        assert (found - expected).norm() / expected.norm() < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("size", [64, 1000, 4096, 5120])
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("permute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_is_the_cpus(size: int, add: bool, permute: bool, dtype) -> None:
    torch.manual_seed(size)
    x, addend = torch.randn(2, 3, 7, size).to(dtype)
    weight = torch.randn(size).to(dtype)
    order = torch.randperm(size).int() if permute else None
    arguments = x, addend if add else None, weight, 1e-5, order
    expected = rms_norm(*arguments).double()
    found = rms_norm(*(a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments)).cpu().double()
    assert ((found - expected).abs() <= 2 * torch.finfo(dtype).eps * expected.abs()).all()


@pytest.fixture(scope="module")
def models() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A masked dense model in fp16, 2:4 under permutations, and its packed twin, both compiled."""
    try:
        from esparse_trt.engine import kernels

        kernels.load()
    except EsparseError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    dense = LlamaForCausalLM(CONFIG).half().cuda().eval()
    layers = {n: m for n, m in dense.model.named_modules() if isinstance(m, nn.Linear)}
    for layer in layers.values():
        layer.weight.data.mul_(nm_mask(layer.weight.data.abs(), Pattern(2, 4)))
    orders = shuffle_channels(dense)
    sparse = copy.deepcopy(dense)
    pack_model(sparse, orders, {f"model.{name}" for name in layers}, "cuda")
    assert (
        sum(isinstance(module, SparseLinear) for module in sparse.modules()) == 4 * CONFIG.num_hidden_layers
    )
    assert sum(isinstance(module, GatedMlp) for module in sparse.modules()) == CONFIG.num_hidden_layers
    merge(dense)
    for model in (dense, sparse):
        compile_layers(model)
    return dense, sparse


@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 16, 17, 100, 300])
def test_activated_gemm_is_the_cpus(activation, permuted, dtype, tokens: int) -> None:
    torch.manual_seed(tokens)
    weight = torch.randn(2 * 1000, 512) / 16
    weight *= nm_mask(weight.abs(), Pattern(2, 4))
    order = torch.randperm(512) if permuted else None
    layer = SparseLinear.pack(weight.to(dtype), torch.randn(2000).to(dtype), order, activation)
    x = torch.randn(tokens, 512).to(dtype)
    expected = layer(x).double()
    found = layer.cuda()(x.cuda()).cpu().double()
    assert (found - expected).norm() / expected.norm() < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 15, 16, 17, 32, 33, 64])
def test_sparse_logits_are_the_masked_dense_ones(models, batch: int) -> None:
    """Two models in one process, in turns; every step a graph replay, the prompt of any length eager."""
    torch.manual_seed(batch)
    ids = torch.randint(0, CONFIG.vocab_size, (batch, 23 + batch), device="cuda")
    decoders = [Decoder(model, batch, ids.shape[1]) for model in models]
    prompt = ids.shape[1] - 8
    exact = copy.deepcopy(models[0]).float()(ids).logits
    for decoder in decoders:
        decoder.prefill(ids[:, :prompt])
    for step in range(prompt, ids.shape[1]):
        found = []
        for decoder in decoders:
            decoder.tokens.copy_(ids[:, step : step + 1])
            decoder.step()
            found.append(decoder.logits.clone())
        for logits in found:
            assert (logits - exact[:, step]).norm() / exact[:, step].norm() < LIMIT
        assert (found[1] - found[0]).norm() / found[0].norm() < LIMIT


@pytest.mark.parametrize("length", [1, 2, 100, 129])
def test_captured_prefill_is_the_eager_one(models, length: int) -> None:
    torch.manual_seed(length)
    first, second = torch.randint(0, CONFIG.vocab_size, (2, 2, length), device="cuda")
    for model in models:
        eager, captured = Decoder(model, 2, length + 4), Decoder(model, 2, length + 4)
        captured.capture_prefill(first)
        for prompts in (second, first):  # other tokens than those of the capture, too
            a, b = eager.prefill(prompts).clone(), captured.prefill(prompts).clone()
            assert torch.equal(a, b)
            assert torch.equal(eager.logits, captured.logits)
            for _ in range(4):
                assert torch.equal(eager.step(), captured.step())


@pytest.mark.parametrize("batch", [1, 16])
def test_replays_of_one_graph_repeat_themselves(models, batch: int) -> None:
    """Bitwise: a kernel that begins early and reads too early would not."""
    prompts = torch.randint(0, CONFIG.vocab_size, (batch, 40), device="cuda")
    for model in models:
        decoder = Decoder(model, batch, 300)
        runs = []
        for _ in range(3):
            decoder.prefill(prompts)
            runs.append(torch.cat([decoder.step().clone() for _ in range(250)]))
        assert torch.equal(runs[0], runs[1])
        assert torch.equal(runs[0], runs[2])
        assert torch.equal(generate(model, prompts, 251)[:, 1:], runs[0].view(250, batch).T)
