"""`ablate`: one model pruned by every method, and by E-Sparse with each of its parts taken away.

All variants share the model, the calibration tokens and the evaluation windows, so their differences are
theirs. Every variant is pruned in memory and measured against the dense model in PyTorch; after each one the
table is stored, so that an interrupted run goes on with the next.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from esparse_trt.artifacts import BuildDir, load_ablation, write_atomic
from esparse_trt.errors import EsparseError
from esparse_trt.evaluate.perplexity import compare_distributions, log_ratio, perplexity, torch_logits
from esparse_trt.model import (
    check_vocabulary,
    check_weights,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    resolve,
)
from esparse_trt.progress import note
from esparse_trt.recipe import Recipe
from esparse_trt.records import Ablation, AblationRow
from esparse_trt.sections import LocalShuffle, PruneSection, TextFile, TextSelf
from esparse_trt.sparsity.blockwise import resolve_device
from esparse_trt.sparsity.models import family_of
from esparse_trt.sparsity.prune import Pruned, prune_model
from esparse_trt.text import evaluation_windows, token_windows, tokens_sha256
from esparse_trt.workspace import claim

_BATCH = 4  # evaluation windows at a time
_UNPERMUTED = {"global": "none", "local": None, "residual": "none"}


@dataclass(frozen=True)
class Variant:
    """A row of the table: what it changes in the recipe's prune section."""

    name: str
    score: dict[str, Any] = field(default_factory=dict)
    permute: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """The changes by dotted recipe key."""
        score = {f"score.{key}": value for key, value in self.score.items()}
        return score | {f"permute.{key}": value for key, value in self.permute.items()}


VARIANTS = (
    Variant("magnitude", {"method": "magnitude"}, _UNPERMUTED),
    Variant("wanda", {"method": "wanda"}, _UNPERMUTED),
    Variant("ria", {"method": "ria"}, _UNPERMUTED),
    Variant("e_sparse, no shuffle", {}, _UNPERMUTED),
    Variant("e_sparse"),
    Variant("e_sparse, entropy off", {"entropy": False}),
    Variant("e_sparse, global off", {}, {"global": "none"}),
    Variant("e_sparse, global sorted", {}, {"global": "sort"}),
    Variant("e_sparse, local off", {}, {"local": None}),
    Variant("e_sparse, local full width", {}, {"local": {"block": 1 << 20}}),
    Variant("e_sparse, objective score", {}, {"objective": "score"}),
    Variant("e_sparse, residual shared", {}, {"residual": "shared"}),
    Variant("e_sparse, residual none", {}, {"residual": "none"}),
)


@dataclass(frozen=True)
class _Setting:
    """What all variants share."""

    fingerprint: str
    path: Path
    calibration: torch.Tensor
    windows: torch.Tensor
    dense: PreTrainedModel
    sparse: PreTrainedModel  # a copy of `dense` that the variants' masks are applied to


def run_ablation(recipe: Recipe, out: Path, *, only: Iterable[str] | None = None) -> Ablation:
    """Measure the variants on the recipe's model and texts, and store `ablation.json` in the build folder.

    The plain `e_sparse` row has both shuffles and runtime gathers for the residual stream, with the recipe's
    bins, α and block size; every other row differs from it as its settings say.

    Args:
        out: a build folder of the same recipe, or a new one.
        only: names of the variants to run; default all.

    Raises:
        EsparseError: no evaluation text, an unknown variant, or the folder belongs to another recipe.
    """
    variants = _chosen(only)
    folder = BuildDir(out)
    with claim(recipe, folder):
        setting = _prepare(recipe, folder)
        table = _stored(folder, setting.fingerprint) or Ablation(
            model=recipe.model.hub or (recipe.model.path.name if recipe.model.path else recipe.name),
            text=_protocol(recipe, setting.windows),
            device=_device_name(setting.dense.device),
            fingerprint=setting.fingerprint,
            dense_perplexity=perplexity(setting.windows, torch_logits(setting.dense), batch=_BATCH),
            rows=[],
        )
        for variant in variants:
            section = _section(recipe.prune, variant)
            settings = variant.settings()
            if any(row.name == variant.name and row.settings == settings for row in table.rows):
                note(f"{variant.name}: already measured", style="dim", variant=variant.name, status="resumed")
                continue
            note(variant.name, style="bold", variant=variant.name, status="started")
            start = time.monotonic()
            pruned = prune_model(
                setting.path,
                setting.calibration,
                section,
                batch_size=recipe.calibration.batch_size,
                trust_remote_code=recipe.model.trust_remote_code,
            )
            seconds = time.monotonic() - start
            _apply(pruned, setting.dense, setting.sparse)
            row = _measure(variant.name, settings, seconds, setting)
            rows = [*(old for old in table.rows if old.name != row.name), row]
            table = table.model_copy(update={"rows": rows})
            write_atomic(folder.ablation, table.model_dump_json(indent=1))
    return table


def _prepare(recipe: Recipe, folder: BuildDir) -> _Setting:
    """Check and load the model and cut both texts."""
    text, calibration = recipe.verify.text, recipe.calibration
    if text is None:
        raise EsparseError(
            "an ablation needs an evaluation text", where="verify.text", fix="name one in the recipe"
        )
    trust = recipe.model.trust_remote_code
    path = resolve(recipe.model, folder)
    config = load_config(path, trust_remote_code=trust)
    family_of(config)
    check_weights(path, trust_remote_code=trust)
    device = resolve_device(recipe.prune.device)
    tokenizer = load_tokenizer(recipe.model.tokenizer or path, trust_remote_code=trust)
    check_vocabulary(tokenizer, config)
    # A CPU computes in fp32, as pruning does; a GPU in the checkpoint's own type.
    dense = load_model(
        path, torch.float32 if device.type == "cpu" else "auto", device, trust_remote_code=trust
    )
    calibrating = token_windows(
        calibration.text, tokenizer, samples=calibration.samples, length=calibration.length,
        seed=calibration.seed, model=dense if isinstance(calibration.text, TextSelf) else None,
    )  # fmt: skip
    windows = evaluation_windows(text, tokenizer, length=recipe.verify.length, samples=recipe.verify.samples)
    shared = [
        fingerprint(path),
        tokens_sha256(calibrating),
        tokens_sha256(windows),
        recipe.prune.model_dump_json(by_alias=True, exclude={"device"}),
    ]
    return _Setting(
        fingerprint=hashlib.sha256("\n".join(shared).encode()).hexdigest(),
        path=path,
        calibration=calibrating,
        windows=windows,
        dense=dense,
        sparse=copy.deepcopy(dense),
    )


def print_table(console: Console, table: Ablation) -> None:
    """Print the rows, best first."""
    title = f"{table.model}: dense perplexity {table.dense_perplexity:.3f} on {table.text}"
    shown = Table(box=None, title=Text(title), title_justify="left", pad_edge=False)
    for heading in ("variant", "perplexity", "ln ratio", "± 95 %", "KL, nats", "top-1", "s"):
        shown.add_column(heading, justify="left" if heading == "variant" else "right")
    for row in sorted(table.rows, key=lambda row: row.perplexity):
        interval = "" if row.ln_ratio_ci95 is None else f"{row.ln_ratio_ci95:.4f}"
        figures = (f"{row.perplexity:.3f}", f"{row.ln_ratio:.4f}", interval, f"{row.kl:.4f}")
        shown.add_row(row.name, *figures, f"{row.top1:.1%}", f"{row.seconds:.0f}")
    console.print(shown)


def _chosen(only: Iterable[str] | None) -> tuple[Variant, ...]:
    names = [variant.name for variant in VARIANTS]
    wanted = list(only) if only else names
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise EsparseError(f"no variant is called {unknown[0]!r}", fix=f"choose from: {'; '.join(names)}")
    return tuple(variant for variant in VARIANTS if variant.name in wanted)


def _section(base: PruneSection, variant: Variant) -> PruneSection:
    """The recipe's prune section with E-Sparse and both shuffles on, less what the variant changes."""
    local = base.permute.local or LocalShuffle()
    both = {"global": "deal", "local": local.model_dump(), "residual": "gather", "objective": "error"}
    score = {**base.score.model_dump(), "method": "e_sparse", "entropy": True, **variant.score}
    return PruneSection.model_validate(
        {**base.model_dump(by_alias=True), "score": score, "permute": {**both, **variant.permute}}
    )


def _apply(pruned: Pruned, dense: PreTrainedModel, sparse: PreTrainedModel) -> None:
    """Make `sparse` the masked copy of `dense`; every variant masks the same layers."""
    weights, masked = dict(dense.named_parameters()), dict(sparse.named_parameters())
    with torch.no_grad():
        for name, mask in pruned.masks.items():
            weight = weights[f"{name}.weight"]
            masked[f"{name}.weight"].copy_(weight * mask.to(weight.device))


def _measure(name: str, settings: dict[str, Any], seconds: float, setting: _Setting) -> AblationRow:
    found = compare_distributions(
        setting.windows, torch_logits(setting.dense), torch_logits(setting.sparse), batch=_BATCH
    )
    ratio, interval = log_ratio(found.dense_nll, found.sparse_nll)
    return AblationRow(
        name=name,
        settings=settings,
        perplexity=found.sparse_perplexity,
        ln_ratio=ratio,
        ln_ratio_ci95=interval,
        kl=found.kl_divergence,
        top1=found.top1_agreement,
        seconds=round(seconds, 2),
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _protocol(recipe: Recipe, windows: torch.Tensor) -> str:
    count, length = windows.shape
    text = recipe.verify.text
    name = text.path.name if isinstance(text, TextFile) else getattr(text, "name", "")
    return f"{name}: {count} windows of {length} tokens"


def _stored(folder: BuildDir, shared: str) -> Ablation | None:
    """The table to go on with, None if there is none or its rows were measured on something else."""
    table = load_ablation(folder)
    return table if table and table.fingerprint == shared else None
