import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from esparse_trt.artifacts import BuildDir
from esparse_trt.errors import EsparseError
from esparse_trt.recipe import Recipe
from esparse_trt.sections import PruneSection
from esparse_trt.sparsity.pattern import Pattern, conforming_share, kept_score, nm_mask
from esparse_trt.sparsity.prune import prune, prune_model
from esparse_trt.text import token_windows

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "opt", "opt_post_norm", "bloom"]
INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def section(**changes):
    return PruneSection.model_validate({"permute": {"local": {"block": 16}}, "device": "cpu"} | changes)


def only(*globs, **changes):
    return section(layers={"include": list(globs)}, **changes)


def files_of(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# --- the stage, end to end -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, dtype, make_model, make_recipe, tmp_path):
    path = make_model(family, dtype)
    recipe, folder = make_recipe(path), BuildDir(tmp_path / "build")
    record = prune(recipe, folder)
    assert not folder.journal.exists()

    # Kept weights are the original bits, pruned ones zero; everything else is untouched.
    tokens = token_windows(
        recipe.calibration.text, AutoTokenizer.from_pretrained(path), samples=5, length=40, seed=0
    )
    in_memory = prune_model(path, tokens, recipe.prune, batch_size=2)
    before, after = (load_file(p / "model.safetensors") for p in (path, folder.checkpoint))
    assert list(before) == list(after)
    for name, tensor in before.items():
        mask = in_memory.masks.get(name.removesuffix(".weight"))
        bits = tensor.view(INTEGERS[dtype])
        expected = bits if mask is None else torch.where(mask, bits, torch.zeros_like(bits))
        assert torch.equal(after[name].view(INTEGERS[dtype]), expected), name

    # It is an ordinary checkpoint: transformers loads it, and it equals the dense model with masks applied.
    sparse, loading = AutoModelForCausalLM.from_pretrained(
        folder.checkpoint, dtype="auto", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    masked = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    in_memory.apply(masked)
    with torch.no_grad():
        assert torch.equal(sparse(tokens).logits, masked(tokens).logits)
    assert AutoTokenizer.from_pretrained(folder.checkpoint)("fox").input_ids

    # The certificate holds under the stored permutations, and only under them.
    permutations = load_file(folder.permutation)
    assert permutations.keys() == in_memory.permutations.keys()
    pruned = [layer for layer in record.layers if layer.pattern]
    assert len(pruned) == len(in_memory.masks)
    for layer in pruned:
        weight = sparse.get_submodule(layer.name).weight
        pi = permutations[layer.name]
        assert layer.permuted and pi.dtype == torch.int64
        assert conforming_share(weight[:, pi], Pattern(2, 4)) == 1
        assert conforming_share(weight, Pattern(2, 4)) < 1
        assert layer.sparsity == float((weight == 0).double().mean())
        if layer.site in ("o", "down", "fc1", "fc2"):  # of layers that share a site only the sum must rise
            assert layer.kept.final >= layer.kept.global_

    assert (record.model_type, record.dtype) == (masked.config.model_type, str(dtype).removeprefix("torch."))
    assert record.parameters == sum(p.numel() for p in masked.parameters())
    assert record.pruned_parameters == sum(m.numel() for m in in_memory.masks.values())
    assert record.calibration_tokens == 200 and record.device == "cpu"
    assert {layer.name: layer.reason for layer in record.layers if not layer.pattern}.keys() >= {"lm_head"}


def test_sharded_bfloat16(make_model, make_recipe, tmp_path):
    path = make_model("llama", torch.bfloat16)
    sharded, folder = tmp_path / "sharded", BuildDir(tmp_path / "build")
    AutoModelForCausalLM.from_pretrained(path, dtype="auto").save_pretrained(sharded, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(path).save_pretrained(sharded)
    record = prune(make_recipe(sharded), folder)
    assert record.dtype == "bfloat16"
    names = sorted(f.name for f in sharded.glob("model*"))
    assert len(names) > 3 and sorted(f.name for f in folder.checkpoint.glob("model*")) == names
    whole = AutoModelForCausalLM.from_pretrained(folder.checkpoint, dtype="auto")
    dense = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    for layer in record.layers:
        sparse, original = (m.get_submodule(layer.name).weight for m in (whole, dense))
        assert layer.sparsity == float((sparse == 0).double().mean())
        kept = sparse != 0
        assert torch.equal(sparse[kept].view(torch.int16), original[kept].view(torch.int16))


def test_a_tokenizer_that_lies_elsewhere_is_saved_with_the_model(
    make_model, make_recipe, tmp_path, tiny_llama
):
    bare, folder = tmp_path / "bare", BuildDir(tmp_path / "build")
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((make_model("llama") / name).read_bytes())
    (bare / "pytorch_model.bin").write_bytes(b"the same weights, not pruned")
    plain = make_recipe(bare).model_dump(mode="json", by_alias=True)
    plain["model"]["tokenizer"] = str(tiny_llama)
    prune(Recipe.model_validate(plain), folder)
    assert AutoTokenizer.from_pretrained(folder.checkpoint)("fox").input_ids
    assert not (folder.checkpoint / "pytorch_model.bin").exists()


def test_running_twice_gives_the_same_bytes(make_model, make_recipe, tmp_path):
    path = make_model("llama")
    results = []
    for name in ("a", "b"):
        folder = BuildDir(tmp_path / name)
        record = prune(make_recipe(path), folder)
        results.append((files_of(folder.root), record))
    assert results[0] == results[1]


# --- what the decisions rest on --------------------------------------------------------------------------


def inputs_of(model, name, windows):
    """What a layer of an ordinary model reads, as float64 [T, K]."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(windows)
    handle.remove()
    return seen[0].flatten(0, -2).double()


def naive_mask(weight, x, pattern):
    """E-Sparse with the default fields, from all inputs at once in float64."""
    low, high = x.amin(0), x.amax(0)
    index = ((x - low) / (high - low) * 128).long().clamp(max=127)
    p = torch.nn.functional.one_hot(index, 128).double().mean(0)
    channel = torch.special.entr(p).sum(1) + 256 * x.square().mean(0).sqrt()
    return nm_mask(weight.double().abs() * channel, pattern)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8"])
def test_later_blocks_see_what_pruned_blocks_put_out(pattern, make_model, windows):
    """Against a whole model that is pruned by hand: block 1 is scored behind a pruned block 0."""
    path, name = make_model("llama"), "model.layers.1.mlp.down_proj"
    off = {"tokens": "equal", "permute": {"global": "none", "local": None, "residual": "none"}}
    model = AutoModelForCausalLM.from_pretrained(path)
    weight, parsed = model.get_submodule(name).weight, Pattern.parse(pattern)

    alone = prune_model(path, windows, only(name, pattern=pattern, **off), batch_size=2)
    x_dense = inputs_of(model, name, windows)
    behind_dense = naive_mask(weight, x_dense, parsed)
    assert (alone.masks[name] != behind_dense).double().mean() < 1e-3, "but for ties in float32"

    every = prune_model(path, windows, section(pattern=pattern, **off), batch_size=2)
    for other, mask in every.masks.items():
        if other.startswith("model.layers.0."):
            model.get_submodule(other).weight.data.mul_(mask)
    behind_pruned = naive_mask(weight, inputs_of(model, name, windows), parsed)
    assert (every.masks[name] != behind_pruned).double().mean() < 1e-3
    assert (every.masks[name] != behind_dense).double().mean() > 0.01


def test_layers_of_one_site_share_a_permutation(make_model, windows):
    folded = section(permute={"attention": "fold"})
    permutations = prune_model(make_model("llama"), windows, folded).permutations
    for index in range(2):
        q, k, v, o, gate, up, down = (
            permutations[f"model.layers.{index}.{name}"]
            for name in (
                "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
            )
        )  # fmt: skip
        assert torch.equal(q, k) and torch.equal(q, v) and torch.equal(gate, up)
        assert not torch.equal(q, gate)
        assert len(down) == 64
        heads = o.view(4, 8) - torch.arange(4).unsqueeze(1) * 8
        assert ((heads >= 0) & (heads < 8)).all(), "channels stay within their head"
        assert torch.equal(heads[0], heads[1]) and torch.equal(heads[2], heads[3]), "equal in a KV group"


def test_a_dense_layer_of_a_permuted_site_carries_its_permutation(make_model, windows):
    pruned = prune_model(make_model("llama"), windows, only("*.q_proj"))
    records = {layer.name: layer for layer in pruned.layers}
    assert pruned.masks.keys() == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}
    assert len(pruned.permutations) == 6
    k = records["model.layers.0.self_attn.k_proj"]
    assert k.permuted and k.pattern is None and k.kept is None and "include" in k.reason
    assert not records["model.layers.0.mlp.up_proj"].permuted


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt", "opt_post_norm", "bloom"])
def test_one_shared_permutation_of_the_residual_stream(family, make_model, windows):
    permute = {"local": {"block": 16}, "residual": "shared"}
    pruned = prune_model(make_model(family), windows, section(permute=permute), batch_size=2)
    residual = [layer for layer in pruned.layers if layer.pattern and layer.site in ("qkv", "gate_up", "fc1")]
    first = pruned.permutations[residual[0].name]
    assert all(torch.equal(pruned.permutations[layer.name], first) for layer in residual)
    # It is chosen on all of them together, so together they keep more than in the natural order.
    gain = sum((x.kept.final - x.kept.natural) * x.shape[0] for x in residual)
    assert gain > 0


def test_the_shared_permutation_is_chosen_on_a_sample_of_rows(make_model, windows, monkeypatch):
    shared = section(permute={"residual": "shared"})
    every = prune_model(make_model("llama"), windows, shared).permutations
    monkeypatch.setattr("esparse_trt.sparsity.pruner._SHARED_ROWS", 100)
    sampled = prune_model(make_model("llama"), windows, shared).permutations
    name = "model.layers.0.mlp.up_proj"
    assert not torch.equal(every[name], sampled[name])


def test_without_permutations_nothing_is_stored(make_model, make_recipe, tmp_path):
    folder = BuildDir(tmp_path / "build")
    off = {"global": "none", "local": None}
    record = prune(make_recipe(make_model("llama"), permute=off), folder)
    assert load_file(folder.permutation) == {}
    for layer in record.layers:
        assert not layer.permuted
        if layer.pattern:
            assert layer.kept.natural == layer.kept.global_ == layer.kept.final
    checkpoint = load_file(folder.checkpoint / "model.safetensors")
    pruned = [layer.name for layer in record.layers if layer.pattern]
    assert all(conforming_share(checkpoint[f"{n}.weight"], Pattern(2, 4)) == 1 for n in pruned)


def test_residual_none_permutes_the_free_sites_only(make_model, windows):
    pruned = prune_model(make_model("llama"), windows, section(permute={"residual": "none"}))
    assert {layer.site for layer in pruned.layers if layer.permuted} == {"o", "down"}


def test_magnitude_needs_no_calibration(make_model, windows, monkeypatch):
    monkeypatch.setattr("esparse_trt.sparsity.blockwise.BlockwiseModel.embed", None)  # not even called
    off = {"global": "none", "local": None}
    path = make_model("llama")
    pruned = prune_model(path, windows, section(score={"method": "magnitude"}, permute=off))
    weight = load_file(path / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(pruned.masks["model.layers.1.mlp.up_proj"], nm_mask(weight.abs(), Pattern(2, 4)))
    assert pruned.layers[0].kept.final == pytest.approx(
        kept_score(
            load_file(path / "model.safetensors")[f"{pruned.layers[0].name}.weight"].square(), Pattern(2, 4)
        )
    )


@pytest.mark.parametrize("method", ["wanda", "ria"])
def test_the_other_methods(method, make_model, windows):
    path = make_model("qwen3")
    pruned = prune_model(path, windows, section(score={"method": method}))
    default = prune_model(path, windows, section())
    assert all(profile.entropy is None for profile in pruned.channels)
    assert any(not torch.equal(pruned.masks[n], default.masks[n]) for n in pruned.masks)


def test_an_untied_head_is_pruned_on_request(make_model, make_recipe, tmp_path):
    folder, path = BuildDir(tmp_path / "build"), make_model("llama")
    record = prune(make_recipe(path, layers={"exclude": []}), folder)
    head = next(layer for layer in record.layers if layer.name == "lm_head")
    assert head.pattern == "2:4" and head.block is None and head.permuted
    weight = load_file(folder.checkpoint / "model.safetensors")["lm_head.weight"]
    assert conforming_share(weight[:, load_file(folder.permutation)["lm_head"]], Pattern(2, 4)) == 1
    assert "lm_head" in {profile.site for profile in record.channels}


def test_a_tied_head_stays_dense_and_says_why(make_model, windows):
    pruned = prune_model(make_model("qwen2"), windows, section(layers={"exclude": []}))
    head = next(layer for layer in pruned.layers if layer.name == "lm_head")
    assert head.pattern is None and "embeddings" in head.reason and "lm_head" not in pruned.masks


def test_channel_profiles(make_model, windows, monkeypatch):
    monkeypatch.setattr("esparse_trt.sparsity.site._PROFILE_CHANNELS", 20)
    pruned = prune_model(make_model("llama", num_hidden_layers=5), windows, section())
    blocks = {profile.site.split(".")[2] for profile in pruned.channels}
    assert blocks == {"0", "2", "4"} and len(pruned.channels) == 12
    for profile in pruned.channels:
        lengths = {len(profile.channels), len(profile.score), len(profile.position), len(profile.entropy)}
        assert lengths == {20}
        pi = pruned.permutations[profile.site]
        assert [int(pi[p]) for p in profile.position] == profile.channels
        assert all(e > 0 for e in profile.entropy)


# --- bad input -------------------------------------------------------------------------------------------


def test_a_pattern_that_does_not_divide_k(make_model, windows, monkeypatch):
    monkeypatch.setattr("esparse_trt.sparsity.blockwise.BlockwiseModel.embed", None)  # before any work
    with pytest.raises(EsparseError, match="K = 32") as error:
        prune_model(make_model("llama"), windows, section(pattern="2:5"))
    assert error.value.where == "model.layers.0.self_attn.q_proj"


def test_no_layer_selected(make_model, windows):
    with pytest.raises(EsparseError, match="no linear layer") as error:
        prune_model(make_model("llama"), windows, only("*.fc1"))
    assert "model.layers.0.self_attn.q_proj" in error.value.fix


def test_activations_that_overflow(make_model, windows, tmp_path):
    path = make_model("llama")
    model = AutoModelForCausalLM.from_pretrained(path)
    model.model.layers[1].input_layernorm.weight.data.fill_(3e38)
    model.save_pretrained(tmp_path)
    with pytest.raises(EsparseError, match=r"NaN or Inf.*batch 0") as error:
        prune_model(tmp_path, windows, section(tokens="equal"))
    assert error.value.where == "model.layers.1.self_attn.q_proj"


def test_not_enough_disk_space(make_model, make_recipe, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("esparse_trt.sparsity.save.shutil.disk_usage", lambda _: usage)
    folder = BuildDir(tmp_path / "build")
    with pytest.raises(EsparseError, match=r"needs .* GiB .* free"):
        prune(make_recipe(make_model("llama")), folder)
    assert not folder.root.exists(), "nothing half-written"


def test_unsupported_architecture(make_model, make_recipe, tmp_path):
    path = make_model("llama")
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "granite"}))
    with pytest.raises(EsparseError, match="'granite' is not supported"):
        prune_model(tmp_path, torch.zeros(1, 8, dtype=torch.int64), section())


# --- weight updates --------------------------------------------------------------------------------------

OBS = {"method": "obs"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["adaptive", "fixed"])
def test_updated_weights_reach_the_checkpoint(mask, dtype, make_model, make_recipe, tmp_path):
    path = make_model("llama", dtype)
    recipe = make_recipe(path, update={**OBS, "mask": mask}, layers={"exclude": ["*.k_proj"]})
    folder = BuildDir(tmp_path / "build")
    record = prune(recipe, folder)
    tokens = token_windows(
        recipe.calibration.text, AutoTokenizer.from_pretrained(path), samples=5, length=40, seed=0
    )
    in_memory = prune_model(path, tokens, recipe.prune, batch_size=2)
    sparse, expected = (
        AutoModelForCausalLM.from_pretrained(p, dtype="auto") for p in (folder.checkpoint, path)
    )
    dense = {name: p.detach().clone() for name, p in expected.named_parameters()}
    in_memory.apply(expected)
    for (name, got), (_, want) in zip(sparse.named_parameters(), expected.named_parameters(), strict=True):
        assert got.dtype == dtype and torch.equal(got, want), name
    permutations = load_file(folder.permutation)
    for layer in record.layers:
        weight, before = sparse.get_submodule(layer.name).weight, dense[f"{layer.name}.weight"]
        if layer.pattern is None:
            assert layer.update is None and torch.equal(weight, before)
            continue
        assert conforming_share(weight[:, permutations[layer.name]], Pattern(2, 4)) == 1
        kept = weight != 0
        assert (weight[kept] != before[kept]).double().mean() > 0.5, "the kept weights have moved"
        assert layer.update.damping == 0.01 and layer.update.error < layer.update.masked_error


def test_updates_lower_the_error_of_a_layers_output(make_model, windows):
    """Measured on the outputs themselves, not by the Hessian."""
    path, name = make_model("llama"), "model.layers.0.mlp.down_proj"
    model = AutoModelForCausalLM.from_pretrained(path)
    x, weight = inputs_of(model, name, windows), model.get_submodule(name).weight.double()
    errors = []
    for update in ({"method": "none"}, OBS):
        wanted = only(name, update=update, score={"method": "wanda"}, tokens="equal")
        pruned = prune_model(path, windows, wanted)
        sparse = torch.zeros_like(weight).masked_scatter(
            pruned.masks[name], pruned.values.get(name, weight[pruned.masks[name]]).double()
        )
        errors.append(float((x @ (weight - sparse).T).square().sum() / (x @ weight.T).square().sum()))
        record = next(layer for layer in pruned.layers if layer.name == name)
        if record.update:
            assert record.update.error == pytest.approx(errors[-1], rel=1e-3)
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("family", ["llama", "gemma3", "bloom"])
def test_correcting_for_pruned_blocks_brings_the_model_closer_to_the_dense_one(family, make_model):
    path, windows = make_model(family), torch.randint(2, 320, (24, 40), generator=torch.manual_seed(1))
    dense = AutoModelForCausalLM.from_pretrained(path)
    errors, first = [], []
    with torch.no_grad():
        wanted = dense(windows, output_hidden_states=True).hidden_states[-1]
        for correct in (0, 0.5):
            sparse = AutoModelForCausalLM.from_pretrained(path)
            pruned = prune_model(path, windows, section(update={**OBS, "correct": correct}), batch_size=9)
            pruned.apply(sparse)
            got = sparse(windows, output_hidden_states=True).hidden_states[-1]
            errors.append(float((got - wanted).square().sum() / wanted.square().sum()))
            first.append(next(iter(pruned.values.values())))
    assert errors[1] < 0.97 * errors[0]
    assert torch.equal(*first), "nothing is pruned before the first block"


def test_the_score_only_steers_the_permutation_of_adaptive_masks(make_model, windows):
    off = {"global": "none", "local": None, "residual": "none"}
    path = make_model("llama")
    masks = {
        (method, mask): prune_model(
            path, windows, section(score={"method": method}, permute=off, update={**OBS, "mask": mask})
        ).masks["model.layers.0.mlp.up_proj"]
        for method in ("magnitude", "wanda")
        for mask in ("adaptive", "fixed")
    }
    assert torch.equal(masks["magnitude", "adaptive"], masks["wanda", "adaptive"])
    assert not torch.equal(masks["magnitude", "fixed"], masks["wanda", "fixed"])


def test_a_site_shares_its_hessian_and_not_its_rows(make_model, windows):
    """Stacking q, k and v gives each what it gets alone."""
    path, off = make_model("llama"), {"global": "none", "local": None, "residual": "none"}
    name = "model.layers.0.self_attn.v_proj"
    together = prune_model(path, windows, section(permute=off, update=OBS, tokens="equal"))
    alone = prune_model(path, windows, only(name, permute=off, update=OBS, tokens="equal"))
    assert torch.equal(together.masks[name], alone.masks[name])
    torch.testing.assert_close(together.values[name], alone.values[name])
