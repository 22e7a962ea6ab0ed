"""`build --dry-run`: what a build will do, and what it will need, read from config.json alone.

Sizes follow from the number of parameters and the bytes of the export type. Memory is host memory: a fixed
part for Python with its libraries, plus what each stage holds:

    prune    one decoder block in fp32 with its scores (about 6 copies of it), and the hidden states of the
             whole calibration text, samples · length · hidden · 4 bytes, read and written; those of the
             dense model too where they are needed; to weight tokens, what every block reads of as many
             sequences as fit in 4 GiB; for weight updates and `permute.refine` six matrices K x K of the
             widest layer; to distill, five copies of the model in fp32
    export   a few copies of the largest tensor: weights are streamed
    fold     the same, once in float64: the proof runs the graph in small parts
    pack     the same
    engine   TensorRT holds the weights of one model about six times (*measured*: 7 GiB for 1.2 GiB in fp16)
    verify   one model in PyTorch, or two in ONNX Runtime, which computes fp16 in fp32 on a CPU

They are estimates, meant to tell 8 GiB from 80 GiB.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import PretrainedConfig

from esparse_trt.artifacts import BuildDir
from esparse_trt.layout import empty_model, read_config, selected_linears
from esparse_trt.pipeline import STAGES, preview
from esparse_trt.recipe import Recipe
from esparse_trt.sparsity.models import family_of
from esparse_trt.sparsity.tokens import KEPT

_BASE = 0.8 * 2**30  # Python with torch, transformers and ONNX Runtime loaded
_VERIFY = 1.0 * 2**30  # logits of a window in float64, and the arenas of two ONNX Runtime sessions
GIB = 2**30


def plan_build(
    recipe: Recipe, out: Path, *, fresh: bool = False, first: str | None = None, last: str | None = None
) -> Group:
    """The plan as something rich can print; the options are those of `pipeline.build`.

    Raises:
        EsparseError: the model's configuration cannot be read, or the folder belongs to another recipe.
    """
    states = preview(recipe, BuildDir(out), fresh=fresh, first=first, last=last)
    config = read_config(recipe.model)
    model = empty_model(config)
    parameters = sum(p.numel() for p in model.parameters())
    pruned = selected_linears(model, recipe.prune.layers)

    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column()
    facts.add_row("recipe", Text(": ".join(filter(None, [recipe.name, recipe.description]))))
    facts.add_row("model", f"{config.model_type}, {parameters / 1e6:,.1f} M parameters")
    count, share = len(pruned), sum(linear.weight.numel() for linear in pruned.values()) / parameters
    facts.add_row(
        "pruned", f"{count} linear layers, {share:.0%} of the parameters, to {recipe.prune.pattern}"
    )
    facts.add_row("folder", Text(str(out)))

    written, memory = _sizes(recipe, parameters), _memory(recipe, model, config, parameters)
    stages = Table("stage", "does", "writes", "memory", "state", box=None)
    for stage, done in states:
        size = _size(written[stage.name]) if written.get(stage.name) else ""
        need = _size(memory[stage.name])
        stages.add_row(stage.name, stage.does, size, need, "[dim]done[/]" if done else "to do")
    total = sum(written.get(stage.name, 0) for stage, _ in states)
    peak = max(memory[stage.name] for stage, _ in states)
    return Group(
        facts,
        "",
        stages,
        "",
        f"disk in all: {_size(total)}; peak memory: {_size(peak)}",
    )


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def _width(recipe: Recipe) -> int:
    return 2 if recipe.export.dtype == "float16" else 4


def _sizes(recipe: Recipe, parameters: int) -> dict[str, float]:
    """Bytes that each stage leaves on disk; of a model repository with an ONNX model, which is copied.

    TensorRT-RTX gives every profile a copy of the weights that are multiplied (*measured*: of 1.2 GiB of ONNX
    it makes an engine of 1.2 GiB with one profile and of 2.1 GiB with two).
    """
    onnx = parameters * _width(recipe)
    engines = (2 if recipe.engine.dense else 1) * len(recipe.engine.profiles) * onnx
    source = 2 * parameters if recipe.model.path is not None and recipe.model.path.suffix == ".gguf" else 0
    return {
        "prune": 2 * parameters + source,
        "export": 2 * onnx,
        "fold": onnx,
        "pack": 0.5625 * onnx,
        "engine": engines if recipe.engine.flavour != "none" else 0,
        "deploy": onnx,
    }


def _memory(recipe: Recipe, model: nn.Module, config: PretrainedConfig, parameters: int) -> dict[str, float]:
    """Peak host memory of each stage in bytes; see the module docstring."""
    first: nn.Module = model.get_submodule(family_of(config).blocks)[0]  # type: ignore[index]
    block = sum(p.numel() for p in first.parameters())
    largest = max(p.numel() for p in model.parameters())
    hidden = recipe.calibration.samples * recipe.calibration.length * config.hidden_size
    recover = recipe.prune.recover
    widest = max(m.in_features for m in first.modules() if isinstance(m, nn.Linear))
    square = widest**2 if recipe.prune.update.method == "obs" or recipe.prune.refine else 0
    prune = 6 * 4 * block + (4 if recipe.prune.follows_dense else 2) * 4 * hidden + 6 * 4 * square
    if recipe.prune.tokens == "effect":
        prune += min(KEPT, 2 * hidden * config.num_hidden_layers)
    if recover and recover.distill:
        prune = max(prune, 5 * 4 * parameters)
    runtime = parameters * (_width(recipe) + (4 if _width(recipe) == 2 else 0))
    need = dict.fromkeys((stage.name for stage in STAGES), 0.0)
    need |= {
        "prune": prune,
        "export": 3 * 4 * largest,
        "fold": 3 * 4 * largest,
        "pack": 3 * 4 * largest,
        "engine": 6 * parameters * _width(recipe) if recipe.engine.flavour != "none" else 0,
        "verify": _VERIFY + 2 * runtime,
    }
    return {name: _BASE + extra for name, extra in need.items()}
