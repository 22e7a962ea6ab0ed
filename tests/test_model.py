"""Finding, checking and reading the dense model; every way in which a model folder can be wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf as gguf_format
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, T5Config

from esparse_trt import gguf, model
from esparse_trt.artifacts import BuildDir
from esparse_trt.errors import EsparseError
from esparse_trt.sections import ModelSection


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def fails(call, *parts: str) -> EsparseError:
    """The call raises one EsparseError with a fix, whose text has all the parts."""
    with pytest.raises(EsparseError) as caught:
        call()
    text = str(caught.value)
    assert caught.value.fix
    for part in parts:
        assert part in text, text
    return caught.value


# --- resolve -------------------------------------------------------------------------------------------


def test_a_local_folder_is_taken_as_it_is(folder: Path) -> None:
    assert model.resolve(ModelSection(path=folder)) == folder


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    fails(lambda: model.resolve(ModelSection(path=tmp_path / "none")), str(tmp_path / "none"), "not exist")


def test_a_file_that_is_no_gguf_is_not_a_model_folder(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"x")
    fails(lambda: model.resolve(ModelSection(path=tmp_path / "model.pt")), "is a file, not a folder")


def test_a_folder_without_config_says_what_it_holds(folder: Path) -> None:
    (folder / "config.json").unlink()
    fails(lambda: model.resolve(ModelSection(path=folder)), "no config.json", "generation_config.json")


def test_pickled_weights_are_refused_with_the_command_that_converts_them(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    fails(
        lambda: model.resolve(ModelSection(path=folder)),
        "only pickled weights (pytorch_model.bin)", f"M.from_pretrained('{folder}'", "save_pretrained",
    )  # fmt: skip


def test_a_hub_id_offline_says_so() -> None:
    section = ModelSection(hub="example/not-in-the-cache")
    fails(lambda: model.resolve(section), "example/not-in-the-cache", "HF_HUB_OFFLINE", "model.path")


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (GatedRepoError, ["must be granted", "hf auth login"]),
        (RepositoryNotFoundError, ["no such model", "check model.hub"]),
        (RevisionNotFoundError, ["no revision 'v9'", "model.revision"]),
        (OSError, ["downloading failed: no space left", "try again"]),
    ],
)
def test_each_refusal_of_the_hub_has_its_own_fix(kind, parts, monkeypatch: pytest.MonkeyPatch) -> None:
    error = kind.__new__(kind)  # the library's constructors want a server's response
    error.args = ("no space left",)

    def refuse(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    fails(lambda: model.resolve(ModelSection(hub="a/b", revision="v9")), "a/b", *parts)


def test_the_hub_is_asked_for_safetensors_only_and_for_code_only_when_trusted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict] = []

    def download(hub: str, **options) -> str:
        asked.append({"hub": hub, **options})
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert model.resolve(ModelSection(hub="a/b", revision="abc")) == folder
    model.resolve(ModelSection(hub="a/b", trust_remote_code=True))
    assert asked[0]["hub"] == "a/b" and asked[0]["revision"] == "abc"
    plain, trusting = (set(call["allow_patterns"]) for call in asked)
    assert "model-*.safetensors" in plain and not any(".bin" in p or ".py" in p for p in plain)
    assert trusting - plain == {"*.py"}


# --- reading -------------------------------------------------------------------------------------------


def test_config_tokenizer_and_model_load(folder: Path) -> None:
    config = model.load_config(folder)
    tokenizer = model.load_tokenizer(folder)
    model.check_vocabulary(tokenizer, config)
    loaded = model.load_model(folder, torch.float16)
    assert (config.model_type, loaded.dtype, loaded.training) == ("llama", torch.float16, False)
    stored = dict(model.iterate_tensors(folder))
    assert torch.equal(
        loaded.state_dict()["model.layers.1.mlp.down_proj.weight"],
        stored["model.layers.1.mlp.down_proj.weight"].half(),
    )


def test_an_unknown_model_type_is_named(folder: Path) -> None:
    edit_config(folder, model_type="zork")
    fails(lambda: model.load_config(folder), "zork", "config.json")


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path)
    fails(lambda: model.load_config(tmp_path), "'t5'", "decoder-only")


def test_a_quantised_checkpoint_is_refused(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    fails(lambda: model.load_config(folder), "quantised (gptq)")


def test_malformed_config_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    fails(lambda: model.load_config(folder), str(folder / "config.json"))


def test_a_missing_tokenizer_points_at_its_key(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    fails(lambda: model.load_tokenizer(folder), str(folder), "model.tokenizer")


def test_a_tokenizer_larger_than_the_embedding_is_a_mismatch(folder: Path) -> None:
    edit_config(folder, vocab_size=200)
    tokenizer, config = model.load_tokenizer(folder), model.load_config(folder)
    fails(lambda: model.check_vocabulary(tokenizer, config), "300 tokens", "vocab_size is 200")


def test_added_tokens_may_lie_outside_the_embedding_but_not_bos(folder: Path) -> None:
    edit_config(folder, vocab_size=300)
    tokenizer, config = model.load_tokenizer(folder), model.load_config(folder)
    tokenizer.add_tokens(["<image>"])
    model.check_vocabulary(tokenizer, config)
    tokenizer.bos_token = "<image>"
    fails(lambda: model.check_vocabulary(tokenizer, config), "301 tokens", "vocab_size is 300")


# --- fingerprint ---------------------------------------------------------------------------------------


def test_the_fingerprint_follows_weights_and_config_but_not_the_rest(folder: Path) -> None:
    first = model.fingerprint(folder)
    (folder / "README.md").write_text("changed")
    assert model.fingerprint(folder) == first
    edit_config(folder, rope_theta=1.0)
    second = model.fingerprint(folder)
    edit_weights(folder, lambda t: t["model.norm.weight"].add_(1))
    assert len({first, second, model.fingerprint(folder)}) == 3


def test_sharded_and_whole_checkpoints_hold_the_same_tensors(folder: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    shards = model.weight_files(tmp_path / "sharded")
    assert len(shards) > 1
    whole, sharded = dict(model.iterate_tensors(folder)), dict(model.iterate_tensors(tmp_path / "sharded"))
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)
    model.check_weights(tmp_path / "sharded")


# --- weights -------------------------------------------------------------------------------------------


def test_sound_weights_pass(folder: Path) -> None:
    model.check_weights(folder)


def test_tied_embeddings_need_no_head(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    edit_weights(folder, lambda t: t.pop("lm_head.weight"))
    model.check_weights(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    edit_weights(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    fails(lambda: model.check_weights(folder), "1 tensors", "'model.layers.1.mlp.up_proj.weight'")


def test_a_wrong_shape_gives_found_and_expected(folder: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    edit_weights(folder, lambda t: t.update({name: torch.zeros(48, 64)}))
    fails(lambda: model.check_weights(folder), repr(name), "[48, 64]", "[32, 64]")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_weights_are_counted(folder: Path, value: float) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    edit_weights(folder, lambda t: t[name].view(-1)[:3].fill_(value))
    fails(lambda: model.check_weights(folder), repr(name), "3 NaN or Inf of 4096")


def test_a_truncated_file_gives_both_sizes(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    fails(
        lambda: model.check_weights(folder), str(file), f"{len(whole) // 2} bytes", f"promises {len(whole)}"
    )


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, (10).to_bytes(8, "little") + b"not a json"])
def test_a_damaged_header_is_an_error_too(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    fails(lambda: model.check_weights(folder), f"{len(content)} bytes, header unreadable")


def test_an_index_that_disagrees_with_its_files_is_an_error(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    names = load_file(folder / "model.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*names, "extra"], "model.safetensors")}))
    fails(lambda: model.check_weights(folder), "'extra'", str(index))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-2.safetensors")}))
    fails(lambda: model.check_weights(folder), "model-2.safetensors", "missing")
    index.write_text("[]")
    fails(lambda: model.check_weights(folder), str(index), "not a safetensors index")


# --- GGUF ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_file(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2 with random Q8_0 weights and a byte-level tokenizer, written by the gguf library."""
    path = tmp_path_factory.mktemp("gguf") / "tiny-q8_0.gguf"
    tokenizer = model.load_tokenizer(tiny_llama)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    merges = [" ".join(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    hidden, heads, inner, blocks = 64, 4, 96, 2
    writer = gguf_format.GGUFWriter(path, "qwen2")
    writer.add_block_count(blocks)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_eos_token_id(1)
    random = np.random.default_rng(0)
    shapes = {"token_embd.weight": (len(tokens), hidden), "output_norm.weight": (hidden,)}
    for i in range(blocks):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (hidden,), f"blk.{i}.ffn_norm.weight": (hidden,),
            f"blk.{i}.attn_q.weight": (hidden, hidden), f"blk.{i}.attn_q.bias": (hidden,),
            f"blk.{i}.attn_k.weight": (32, hidden), f"blk.{i}.attn_k.bias": (32,),
            f"blk.{i}.attn_v.weight": (32, hidden), f"blk.{i}.attn_v.bias": (32,),
            f"blk.{i}.attn_output.weight": (hidden, hidden),
            f"blk.{i}.ffn_gate.weight": (inner, hidden), f"blk.{i}.ffn_up.weight": (inner, hidden),
            f"blk.{i}.ffn_down.weight": (hidden, inner),
        }  # fmt: skip
    q8 = gguf_format.GGMLQuantizationType.Q8_0
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            writer.add_tensor(name, gguf_format.quants.quantize(values, q8), raw_dtype=q8)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_becomes_an_ordinary_fp16_folder_once(gguf_file: Path, tmp_path: Path) -> None:
    build = BuildDir(tmp_path)
    path = model.resolve(ModelSection(path=gguf_file), build)
    assert path == build.source
    config = model.load_config(path)
    assert (config.model_type, config.hidden_size, config.num_key_value_heads) == ("qwen2", 64, 2)
    tokenizer = model.load_tokenizer(path)
    model.check_vocabulary(tokenizer, config)
    assert (tokenizer.bos_token, tokenizer.eos_token_id) == (None, 1)  # no text begins with it, the file says
    model.check_weights(path)
    stored = dict(model.iterate_tensors(path))
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    reader = gguf_format.GGUFReader(gguf_file)
    down = next(t for t in reader.tensors if t.name == "blk.1.ffn_down.weight")
    expected = gguf_format.quants.dequantize(down.data, down.tensor_type).astype(np.float16)
    np.testing.assert_array_equal(stored["model.layers.1.mlp.down_proj.weight"].numpy(), expected)

    written = (path / "model.safetensors").stat().st_mtime_ns
    assert model.resolve(ModelSection(path=gguf_file), build) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == written  # reused, not converted again


def test_a_changed_gguf_file_is_noticed(gguf_file: Path, tmp_path: Path) -> None:
    build = BuildDir(tmp_path / "build")
    copy = Path(shutil.copy(gguf_file, tmp_path))
    model.resolve(ModelSection(path=copy), build)
    content = bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    fails(lambda: model.resolve(ModelSection(path=copy), build), copy.name, "--fresh")


def test_what_is_no_gguf_or_half_of_one_leaves_nothing_behind(gguf_file: Path, tmp_path: Path) -> None:
    wrong, half = tmp_path / "wrong.gguf", tmp_path / "half.gguf"
    wrong.write_bytes(b"PK\x03\x04....")
    half.write_bytes(gguf_file.read_bytes()[:20000])
    target = tmp_path / "source"
    fails(lambda: gguf.convert(tmp_path / "none.gguf", target), "No such file")
    fails(lambda: gguf.convert(wrong, target), "not a GGUF file", "PK")
    fails(lambda: gguf.convert(half, target), str(half), "cannot read")
    assert not target.exists()


def test_no_disk_space_is_found_before_writing(gguf_file: Path, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(gguf.shutil, "disk_usage", lambda _: usage)
    fails(lambda: gguf.convert(gguf_file, tmp_path / "source"), "GiB free", str(tmp_path))
    assert list(tmp_path.iterdir()) == []
