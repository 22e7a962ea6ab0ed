"""`ablate`: one model pruned by every method, and by E-Sparse with each of its parts taken away.

All variants share the model, the calibration tokens and the evaluation windows, so their differences are
theirs. Every variant is pruned in memory and measured against the dense model in PyTorch; after each one the
table is stored, so that an interrupted run goes on with the next. At the end it is written as a page, too.

Rows that follow each other and differ in `recover.distill` alone start from one pruning, whose seconds count
in each of them.
"""

from __future__ import annotations

import copy
import hashlib
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from esparse_trt.artifacts import BuildDir, write_atomic
from esparse_trt.errors import EsparseError
from esparse_trt.evaluate import ablation_page
from esparse_trt.evaluate.ablation import Ablation, AblationRow, load_ablation
from esparse_trt.evaluate.perplexity import compare_distributions, log_ratio, torch_logits, window_nll
from esparse_trt.model import (
    check_vocabulary,
    check_weights,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    resolve,
    resolve_device,
)
from esparse_trt.progress import note
from esparse_trt.recipe import Recipe
from esparse_trt.sections import PruneSection, TextFile, TextSelf
from esparse_trt.sparsity.models import family_of
from esparse_trt.sparsity.prune import Pruned, distill_model, prune_model, training_tokens
from esparse_trt.text import evaluation_windows, token_windows, tokens_sha256
from esparse_trt.variants import VARIANTS, choose, load_grid
from esparse_trt.workspace import claim

_BATCH = 4  # evaluation windows at a time


@dataclass(frozen=True)
class _Setting:
    """What all variants share."""

    fingerprint: str
    path: Path
    tokenizer: PreTrainedTokenizerBase
    calibration: torch.Tensor
    windows: torch.Tensor
    dense: PreTrainedModel
    sparse: PreTrainedModel  # a copy of `dense` that the variants' masks are applied to


class _Found(NamedTuple):
    """What pruning as a section says gave, and how long it took."""

    section: PruneSection
    pruned: Pruned
    seconds: float


def run_ablation(
    recipe: Recipe, out: Path, *, only: Iterable[str] | None = None, grid: Path | None = None
) -> Ablation:
    """Measure the variants on the recipe's model and texts; `ablation.json` and `.html` in the build folder.

    The plain `e_sparse` row has both shuffles and runtime gathers for the residual stream, with the recipe's
    bins, α and block size; every other row differs from it as its settings say.

    Args:
        out: a build folder of the same recipe, or a new one.
        only: names of the variants to run, in this order; default all.
        grid: a YAML file of variants to run instead of the built-in ones, see `variants`; the baselines that
            it does not name are run too, unless `only` leaves them out.

    Raises:
        EsparseError: no evaluation text, a bad variant, or the folder belongs to another recipe.
    """
    variants = choose(recipe.prune, load_grid(grid) if grid else VARIANTS, only, (grid or out).parent)
    folder = BuildDir(out)
    with claim(recipe, folder):
        setting = _prepare(recipe, folder)
        table = _stored(folder, setting.fingerprint) or _new_table(recipe, setting)
        last: _Found | None = None
        for variant, section in variants:
            settings = variant.settings()
            if any(row.name == variant.name and row.settings == settings for row in table.rows):
                note(f"{variant.name}: already measured", style="dim", variant=variant.name, status="resumed")
                continue
            note(variant.name, style="bold", variant=variant.name, status="started")
            plain = _undistilled(section)
            training = training_tokens(section, recipe.calibration, setting.tokenizer)
            if last is None or last.section != plain:
                last = _prune(recipe, plain, setting)
            found = last if plain == section else _distill(recipe, section, last, setting, training)
            _apply(found.pruned, setting.dense, setting.sparse)
            row = _measure(variant.name, settings, found.seconds, setting)
            rows = [*(old for old in table.rows if old.name != row.name), row]
            table = table.model_copy(update={"rows": rows})
            write_atomic(folder.ablation, table.to_json())
        write_atomic(folder.ablation_html, ablation_page.page(table))
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
        tokenizer=tokenizer,
        calibration=calibrating,
        windows=windows,
        dense=dense,
        sparse=copy.deepcopy(dense),
    )


def _undistilled(section: PruneSection) -> PruneSection:
    """The section without `recover.distill`, where rows may start from the same."""
    if section.recover is None or section.recover.distill is None:
        return section
    recover = section.recover.model_copy(update={"distill": None}) if section.recover.steps else None
    return section.model_copy(update={"recover": recover})


def _prune(recipe: Recipe, section: PruneSection, setting: _Setting) -> _Found:
    start = time.monotonic()
    pruned = prune_model(
        setting.path,
        setting.calibration,
        section,
        batch_size=recipe.calibration.batch_size,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    return _Found(section, pruned, time.monotonic() - start)


def _distill(
    recipe: Recipe, section: PruneSection, plain: _Found, setting: _Setting, training: torch.Tensor | None
) -> _Found:
    """`plain`, trained on `training`, or None for the calibration text; its seconds count too."""
    start = time.monotonic()
    pruned = distill_model(
        setting.path,
        plain.pruned,
        setting.calibration if training is None else training,
        section,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    return _Found(section, pruned, plain.seconds + time.monotonic() - start)


def _new_table(recipe: Recipe, setting: _Setting) -> Ablation:
    nll = window_nll(setting.windows, torch_logits(setting.dense), batch=_BATCH, what="dense model")
    return Ablation(
        model=recipe.model.hub or recipe.name,
        text=_protocol(recipe, setting.windows),
        device=_device_name(setting.dense.device),
        fingerprint=setting.fingerprint,
        dense_perplexity=math.exp(nll.mean().item()),
        dense_nll=nll.tolist(),
        rows=[],
    )


def _apply(pruned: Pruned, dense: PreTrainedModel, sparse: PreTrainedModel) -> None:
    """Make `sparse` the pruned copy of `dense`; every variant prunes the same layers."""
    with torch.no_grad():
        for name in pruned.masks:
            sparse.get_parameter(f"{name}.weight").copy_(dense.get_parameter(f"{name}.weight"))
    pruned.apply(sparse)


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
        nll=found.sparse_nll.tolist(),
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
    table = load_ablation(folder.ablation)
    return table if table and table.fingerprint == shared else None
