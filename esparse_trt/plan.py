"""`build --dry-run`: what a build will do, and what it will need, read from config.json alone.

Sizes follow from the number of parameters and the bytes of the export type. Memory is host memory: a fixed
part for Python with its libraries, plus what each stage holds:

    prune    one decoder block in fp32 with its scores (about 6 copies of it), and the hidden states of the
             whole calibration text, samples · length · hidden · 4 bytes, read and written
    export   a few copies of the largest tensor: weights are streamed
    engine   TensorRT holds the weights of one model about three times
    verify   one model in PyTorch, or two in ONNX Runtime, which computes fp16 in fp32 on a CPU

They are estimates, meant to tell 8 GiB from 80 GiB.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import huggingface_hub
from accelerate import init_empty_weights
from rich.console import Group
from rich.table import Table
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from esparse_trt.artifacts import BuildDir, load_manifest
from esparse_trt.errors import EsparseError
from esparse_trt.model import load_config
from esparse_trt.pipeline import STAGES
from esparse_trt.recipe import LayerSelection, Recipe
from esparse_trt.sparsity.models import family_of

_BASE = 0.8 * 2**30  # Python with torch, transformers and ONNX Runtime loaded
_VERIFY = 1.0 * 2**30  # logits of a window in float64, and the arenas of two ONNX Runtime sessions
GIB = 2**30


def plan_build(recipe: Recipe, out: Path) -> Group:
    """The plan as something rich can print."""
    config = _config(recipe)
    family_of(config)
    with init_empty_weights():
        loader: Any = AutoModelForCausalLM
        model = loader.from_config(config)
    model.tie_weights()
    parameters = sum(p.numel() for p in model.parameters())
    pruned = _selected(model, recipe.prune.layers)

    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column()
    facts.add_row("recipe", f"{recipe.name}: {recipe.description}")
    facts.add_row("model", f"{config.model_type}, {parameters / 1e6:,.1f} M parameters")
    count, share = len(pruned), sum(pruned.values()) / parameters
    facts.add_row(
        "pruned", f"{count} linear layers, {share:.0%} of the parameters, to {recipe.prune.pattern}"
    )
    facts.add_row("folder", str(out))

    folder = BuildDir(out)
    manifest = load_manifest(folder)
    written, memory = _sizes(recipe, parameters), _memory(recipe, model, config, parameters)
    stages = Table("stage", "does", "writes", "memory", "state", box=None)
    for stage in STAGES:
        done = manifest is not None and stage.name in manifest.stages
        size = f"{written[stage.name] / GIB:.2f} GiB" if stage.name in written else ""
        need = f"{memory[stage.name] / GIB:.1f} GiB"
        stages.add_row(stage.name, stage.does, size, need, "[dim]done[/]" if done else "to do")
    total = sum(written.values()) / GIB
    return Group(
        facts,
        "",
        stages,
        "",
        f"disk in all: {total:.2f} GiB; peak memory: {max(memory.values()) / GIB:.1f} GiB",
    )


def _config(recipe: Recipe) -> PretrainedConfig:
    """The model's configuration; of a hub model only config.json is downloaded."""
    section = recipe.model
    if section.path is not None and section.path.suffix != ".gguf":
        return load_config(section.path, trust_remote_code=section.trust_remote_code)
    try:
        if section.path is not None:
            return AutoConfig.from_pretrained(section.path.parent, gguf_file=section.path.name)
        file = huggingface_hub.hf_hub_download(section.hub or "", "config.json", revision=section.revision)
        return load_config(Path(file).parent, trust_remote_code=section.trust_remote_code)
    except (OSError, ValueError) as error:
        raise EsparseError(
            f"cannot read the model's configuration: {str(error).splitlines()[0]}",
            where=section.path or section.hub,
            fix="check model.path or model.hub; a plan needs config.json, not the weights",
        ) from error


def _selected(model: nn.Module, selection: LayerSelection) -> dict[str, int]:
    """Parameters of each linear layer that the globs select."""
    return {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and any(fnmatchcase(name, glob) for glob in selection.include)
        and not any(fnmatchcase(name, glob) for glob in selection.exclude)
    }


def _width(recipe: Recipe) -> int:
    return 2 if recipe.export.dtype == "float16" else 4


def _sizes(recipe: Recipe, parameters: int) -> dict[str, float]:
    """Bytes that each stage leaves on disk; the model repository is made of hard links."""
    onnx = parameters * _width(recipe)
    engines = (2 if recipe.engine.dense else 1) * onnx if recipe.engine.flavour != "none" else 0
    source = 2 * parameters if recipe.model.path is not None and recipe.model.path.suffix == ".gguf" else 0
    return {"prune": 2 * parameters + source, "export": 2 * onnx, "fold": onnx, "engine": engines}


def _memory(recipe: Recipe, model: nn.Module, config: PretrainedConfig, parameters: int) -> dict[str, float]:
    """Peak host memory of each stage in bytes; see the module docstring."""
    block = sum(p.numel() for p in model.get_submodule(family_of(config).blocks)[0].parameters())  # type: ignore[index]
    largest = max(p.numel() for p in model.parameters())
    hidden = recipe.calibration.samples * recipe.calibration.length * config.hidden_size
    runtime = parameters * (_width(recipe) + (4 if _width(recipe) == 2 else 0))
    need = dict.fromkeys((stage.name for stage in STAGES), 0.0)
    need |= {
        "prune": 6 * 4 * block + 2 * 4 * hidden,
        "export": 3 * 4 * largest,
        "fold": runtime + 3 * 4 * largest,
        "engine": 3 * parameters * _width(recipe) if recipe.engine.flavour != "none" else 0,
        "verify": _VERIFY + 2 * runtime,
    }
    return {name: _BASE + extra for name, extra in need.items()}
