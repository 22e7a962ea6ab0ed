"""The model on text: tokenizer and KV-cache loop around the network, in Triton's Python backend."""

from __future__ import annotations

import json
from pathlib import Path

from esparse_trt import model as models
from esparse_trt.artifacts import BuildDir
from esparse_trt.deploy.render import copy_template, render
from esparse_trt.graph.feeds import PAST
from esparse_trt.progress import note
from esparse_trt.recipe import Recipe
from esparse_trt.records import ExportRecord


def write_text_model(
    recipe: Recipe, folder: BuildDir, exported: ExportRecord, staging: Path, name: str, backend: str
) -> bool:
    """Write `<name>_text`; false where the recipe or the kind of tokenizer rules it out."""
    if not recipe.deploy.text:
        return False
    trust = recipe.model.trust_remote_code
    tokenizer = models.load_tokenizer(folder.checkpoint, trust_remote_code=trust)
    if not tokenizer.is_fast:
        note("no text model: the tokenizer has no tokenizer.json, which is all that the text model can read")
        return False
    target = staging / f"{name}_text"
    version = target / "1"
    version.mkdir(parents=True)
    tokenizer.save_pretrained(version / "tokenizer")
    copy_template("text_model.py", version / "model.py")
    config = models.load_config(folder.checkpoint, trust_remote_code=trust).get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    prompt, total = _length_limits(recipe, context) if backend == "tensorrt" else (context, context)
    settings = {
        "network": name,
        "inputs": [spec.name for spec in exported.inputs if not spec.name.startswith(PAST)],
        "cache": {
            spec.name: [spec.shape[1], spec.shape[3]]
            for spec in exported.inputs
            if spec.name.startswith(PAST)
        },
        "cache_dtype": exported.dtype,
        "bos": tokenizer.bos_token_id,
        "stop": _stop_tokens(folder.checkpoint, tokenizer.eos_token_id),
        "longest_prompt": prompt,
        "longest_sequence": total,
    }
    (version / "settings.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    (target / "config.pbtxt").write_text(
        render("text_config.pbtxt.j2", name=target.name, instances=recipe.deploy.instances), encoding="utf-8"
    )
    return True


def _length_limits(recipe: Recipe, context: int | None) -> tuple[int, int]:
    """Longest prompt and longest sequence, in tokens, that the profiles of an engine take."""
    profiles = recipe.engine.profiles.values()
    prompt = max((p.sequence[2] for p in profiles if p.past[0] == 0), default=0)
    total = max(p.past[2] + p.sequence[2] for p in profiles)
    return prompt, min(total, context) if context else total


def _stop_tokens(checkpoint: Path, eos: int | None) -> list[int]:
    """The tokens that end a text: `generation_config.json` knows best, then the tokenizer."""
    path = checkpoint / "generation_config.json"
    stop = json.loads(path.read_text()).get("eos_token_id") if path.exists() else None
    stop = eos if stop is None else stop
    return [stop] if isinstance(stop, int) else list(stop or [])
