"""What a recipe will do, stage by stage, in plain words."""

from __future__ import annotations

from esparse_trt.recipe import Recipe
from esparse_trt.sections import (
    BudgetSection,
    Profile,
    RecoverSection,
    TextDataset,
    TextFile,
    TextSelf,
    UpdateSection,
)


def explain(recipe: Recipe) -> str:
    """A few lines for `esparse-trt recipe check`: one a stage, with the values that matter."""
    rows = [
        ("model", _model(recipe)),
        ("calibrate", _calibration(recipe)),
        ("prune", _prune(recipe)),
        ("permute", _permute(recipe)),
        ("export", f"ONNX with KV cache, {recipe.export.dtype}, opset {recipe.export.opset}"),
        ("traffic", _traffic(recipe)),
        ("engine", _engine(recipe)),
        *((f"  {name}", _profile(profile)) for name, profile in _profiles(recipe)),
        ("verify", _verify(recipe)),
        ("deploy", _deploy(recipe)),
    ]
    width = max(len(name) for name, _ in rows)
    head = f"{recipe.name}: {recipe.description}" if recipe.description else recipe.name
    return "\n".join([head, *(f"  {name:<{width}}  {text}" for name, text in rows)])


def _model(recipe: Recipe) -> str:
    model = recipe.model
    if model.hub is not None:
        source = f"{model.hub} from the Hugging Face hub"
        source += f", revision {model.revision}" if model.revision else ""
    else:
        source = str(model.path)
        if model.path is not None and model.path.suffix == ".gguf":
            source += ", dequantised to fp16 once"
        source += "" if model.path is not None and model.path.exists() else " (not there yet)"
    if model.tokenizer is not None:
        source += f"; tokenizer from {model.tokenizer}"
    return source + ("; runs the repository's own code" if model.trust_remote_code else "")


def _calibration(recipe: Recipe) -> str:
    section = recipe.calibration
    amount = f"{section.samples} × {section.length} = {section.samples * section.length:,} tokens"
    return f"{amount} of {_text(section.text)}, seed {section.seed}"


def _text(source: TextFile | TextDataset | TextSelf) -> str:
    if isinstance(source, TextSelf):
        return f"text that the model writes itself at temperature {source.temperature:g}"
    if isinstance(source, TextFile):
        return f"{source.path}{'' if source.path.exists() else ' (not there yet)'}"
    config = f"/{source.config}" if source.config else ""
    return f"{source.name}{config}, split {source.split}{', streamed' if source.streaming else ''}"


def _prune(recipe: Recipe) -> str:
    prune, score = recipe.prune, recipe.prune.score
    kept, _, group = prune.pattern.partition(":")
    how = {
        "e_sparse": f"E-Sparse score ({score.information}, {score.bins} bins, alpha {score.alpha:g})",
        "wanda": "Wanda score",
        "magnitude": "magnitude",
        "ria": "RIA score",
        "obd": "OBD score",
        "obs": f"OBS score (damping {score.damping:g})",
    }[score.method]
    if prune.update.method == "obs":
        how = f"{_update(prune.update)}, masks {'by ' + how if prune.update.mask == 'fixed' else 'adaptive'}"
    if prune.recover is not None:
        how += f"; {_recover(prune.recover)}"
    if prune.budget is not None:
        how += f"; {_budget(prune.budget)}"
    which = ", ".join(prune.layers.include)
    without = f" except {', '.join(prune.layers.exclude)}" if prune.layers.exclude else ""
    layers = f"linear layers {which}{without}"
    return f"keep {kept} of every {group} weights along K by {how}; {layers}; device {prune.device}"


def _budget(budget: BudgetSection) -> str:
    """What becomes of the most sensitive layers, in words."""
    wanted = []
    if budget.perplexity_ratio is not None:
        wanted.append(f"perplexity is within {budget.perplexity_ratio:g} times dense")
    if budget.speedup is not None:
        wanted.append(f"linear layers are {budget.speedup:g} times as fast")
    return f"the most sensitive layers {budget.sensitive}, so that {' and '.join(wanted)}"


def _update(update: UpdateSection) -> str:
    return f"OBS update (damping {update.damping:g}, {update.descent} descents, {update.refit} refit steps)"


def _recover(recover: RecoverSection) -> str:
    """The training of the kept weights in words."""
    parts = [f"train each block for {recover.steps} steps"] if recover.steps else []
    if recover.distill is not None:
        parts.append(f"distill the whole model for {recover.distill.steps} steps")
    return ", then ".join(parts)


def _permute(recipe: Recipe) -> str:
    permute = recipe.prune.permute
    steps = {
        "deal": ["deal channels out by score"],
        "sort": ["lay channels out by score"],
        "none": [],
    }[permute.global_]
    if permute.local is not None:
        block = permute.local.block
        steps.append("swap channels" if block == "full" else f"swap inside blocks of {block} channels")
    if permute.assign:
        steps.append(f"reassign slots {permute.assign} times")
    if recipe.prune.refine is not None:
        steps.append("swap for less output error")
    if not steps:
        return "channels stay in their order"
    residual = {
        "gather": "layers that read the residual stream get a runtime gather",
        "shared": "layers that read the residual stream share one permutation",
        "none": "layers that read the residual stream keep their order",
    }[permute.residual]
    attention = {
        "gather": "layers that read the attention's output get a runtime gather",
        "fold": "channels of the attention's output stay in their heads",
    }[permute.attention]
    return f"{', then '.join(steps)}; {residual}; {attention}"


def _profiles(recipe: Recipe) -> list[tuple[str, Profile]]:
    return [] if recipe.engine.flavour == "none" else list(recipe.engine.profiles.items())


def _engine(recipe: Recipe) -> str:
    engine = recipe.engine
    if engine.flavour == "none":
        return "none is built"
    which = "dense and sparse" if engine.dense else "sparse only"
    run = "run where a GPU can" if engine.run == "auto" else "not run"
    how = {
        "auto": "2:4 layers in the Sparse-GEMM plugin where that is faster",
        "plugin": "all packed layers in the Sparse-GEMM plugin",
        "native": "2:4 layers in TensorRT's own kernels",
        "dense": "no kernels for sparse weights",
    }[engine.sparse_gemm]
    how += f" ({engine.plugin_library})" if engine.plugin_library else ""
    how += f", by {engine.table}" if engine.table else ""
    return f"{which}, {how}, TensorRT flavour {engine.flavour}, {run}"


def _traffic(recipe: Recipe) -> str:
    total = sum(entry.weight for entry in recipe.traffic)
    return "; ".join(
        f"{entry.weight / total:.0%} batch {entry.batch}, prompt {entry.prompt}, {entry.generated} generated"
        for entry in recipe.traffic
    )


def _profile(profile: Profile) -> str:
    parts = []
    for name in ("batch", "sequence", "past"):
        low, best, high = getattr(profile, name)
        parts.append(f"{name} {low}" if low == high else f"{name} {low} to {high}, best {best}")
    return "; ".join(parts)


def _verify(recipe: Recipe) -> str:
    verify = recipe.verify
    tasks = f"; tasks of lm-eval: {', '.join(verify.zeroshot.tasks)}" if verify.zeroshot else ""
    if verify.text is None:
        return f"outputs and layers only: without verify.text there is no perplexity{tasks}"
    windows = f"{verify.samples} windows" if verify.samples else "all windows"
    gate = verify.max_perplexity_ratio
    limit = f"; fails above {gate:g} × dense perplexity" if gate is not None else "; no quality gate"
    return f"perplexity on {windows} of {verify.length} tokens of {_text(verify.text)}{limit}{tasks}"


def _deploy(recipe: Recipe) -> str:
    deploy = recipe.deploy
    return f"Triton model repository, model {deploy.model_name or recipe.name}, backend {deploy.backend}"
