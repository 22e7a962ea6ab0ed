import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from esparse_trt.errors import EsparseError
from esparse_trt.model import resolve_device
from esparse_trt.sparsity.blockwise import BlockwiseModel
from esparse_trt.sparsity.models import FAMILIES as TABLE
from esparse_trt.sparsity.models import family_of, linear, stored_name

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "opt", "opt_post_norm", "bloom"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_is_the_model(family, make_model, windows):
    """Masks, rotary embeddings, ALiBi, sliding windows, the smaller last batch, as in the model itself."""
    path = make_model(family)
    model = BlockwiseModel(path, CPU)
    model.embed(windows, batch_size=2)
    for index in range(model.blocks):
        with model.resident(index):
            assert list(model.run(index)) == [0, 1, 2]
            model.advance(index, model.hidden)
    final = []
    for _ in model.run_final(final.append):
        pass
    whole = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        expected = whole(windows).logits
        torch.testing.assert_close(whole.lm_head(torch.cat(final)), expected, rtol=1e-4, atol=1e-5)


def test_nothing_stays_loaded(make_model, windows):
    model = BlockwiseModel(make_model("llama"), CPU)
    model.embed(windows, batch_size=5)
    with model.resident(1) as block:
        assert {p.device.type for p in block.parameters()} == {"cpu"}
        assert sum(p.device.type == "cpu" for p in model.model.parameters()) == len(list(block.parameters()))
    assert {p.device.type for p in model.model.parameters()} == {"meta"}


def test_pruning_a_loaded_block_leaves_the_file_alone(make_model):
    path = make_model("llama")
    before = (path / "model.safetensors").read_bytes()
    model = BlockwiseModel(path, CPU)
    with model.resident(0) as block, torch.no_grad():
        linear(block, "mlp.down_proj").weight.zero_()
    assert (path / "model.safetensors").read_bytes() == before
    assert model.stored("model.layers.0.mlp.down_proj.weight").any()


def test_half_precision_is_computed_in_float32_on_a_cpu(make_model):
    model = BlockwiseModel(make_model("llama", torch.float16), CPU)
    assert (model.stored_dtype, model.dtype) == (torch.float16, torch.float32)
    with model.resident(0) as block:
        assert {p.dtype for p in block.parameters()} == {torch.float32}


def test_a_checkpoint_of_the_bare_decoder(make_model, windows, tmp_path):
    """BLOOM's files on the hub say `h.0...` where the model says `transformer.h.0...`."""
    path = make_model("bloom")
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(path / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    a, b = BlockwiseModel(path, CPU), BlockwiseModel(tmp_path, CPU)
    name = "transformer.h.1.mlp.dense_4h_to_h.weight"
    assert b.stored_name(name) == "h.1.mlp.dense_4h_to_h.weight"
    assert torch.equal(a.stored(name), b.stored(name))
    for model in (a, b):
        model.embed(windows, batch_size=5)
    assert torch.equal(a.hidden, b.hidden)


def test_a_tied_head_is_found_where_it_is_stored(make_model):
    model = BlockwiseModel(make_model("qwen2"), CPU)
    assert model.stored_name("lm_head.weight") == "model.embed_tokens.weight"


@pytest.mark.parametrize(
    "stored, expected", [(["a.b.c"], "a.b.c"), (["b.c"], "b.c"), (["a.a.b.c"], "a.a.b.c"), (["x"], None)]
)
def test_stored_name(stored, expected):
    if expected:
        assert stored_name("a.b.c", stored, "a") == expected
    else:
        with pytest.raises(EsparseError, match="no such tensor"):
            stored_name("a.b.c", stored, "a")


def test_unsupported_architecture_lists_what_is_supported():
    with pytest.raises(EsparseError, match="'gpt2' is not supported") as error:
        family_of(GPT2Config())
    assert all(t in error.value.fix for family in TABLE for t in family.model_types)


def test_no_model_type_is_in_two_rows():
    types = [t for family in TABLE for t in family.model_types]
    assert len(types) == len(set(types))


def test_a_layer_of_another_kind_is_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, vocab_size=9)
        )
    with pytest.raises(EsparseError, match="found LlamaRMSNorm"):
        linear(model, "model.norm")
    with pytest.raises(EsparseError, match="found NoneType"):
        linear(model, "model.layers.0.mlp.gate_up_proj")


@pytest.mark.parametrize("name", ["cuda:99", "gpu"])
def test_unusable_device(name):
    with pytest.raises(EsparseError, match=name) as error:
        resolve_device(name)
    assert error.value.where == "prune.device"
