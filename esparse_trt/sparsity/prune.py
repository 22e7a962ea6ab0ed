"""The prune stage: calibrate and prune block by block, resumably, and write the sparse checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from esparse_trt.artifacts import BuildDir
from esparse_trt.checkpoint import check_weights, fingerprint, weight_files
from esparse_trt.model import (
    check_vocabulary,
    load_config,
    load_model,
    load_tokenizer,
    resolve,
    resolve_device,
)
from esparse_trt.progress import note, track
from esparse_trt.recipe import Recipe
from esparse_trt.records import LayerChoice, PruneRecord
from esparse_trt.sections import CalibrationSection, PruneSection, TextSelf
from esparse_trt.sparsity.blockwise import BlockwiseModel
from esparse_trt.sparsity.budget import choose_layers
from esparse_trt.sparsity.journal import Journal, save
from esparse_trt.sparsity.models import family_of
from esparse_trt.sparsity.pruned import Pruned
from esparse_trt.sparsity.pruner import Pruner
from esparse_trt.sparsity.recover import distill
from esparse_trt.sparsity.save import require_space, write_checkpoint
from esparse_trt.text import token_windows, tokens_sha256


def prune_model(
    path: Path,
    windows: Tensor,
    section: PruneSection,
    *,
    batch_size: int = 8,
    trust_remote_code: bool = False,
) -> Pruned:
    """Prune a model without writing anything; may be called again and again on the same folder.

    What `recover.distill` asks for is left to `distill_model`.

    Args:
        path: local Hugging Face folder of the dense model.
        windows: int64 token ids [samples, length] of the calibration text.
        section: the recipe's prune section; its device is used.
        batch_size: sequences that pass through a block at a time.
    """
    model = BlockwiseModel(path, resolve_device(section.device), trust_remote_code=trust_remote_code)
    pruner = Pruner(model, windows, section, batch_size)
    choice = _choose_layers(pruner) if section.budget else None
    if choice is not None:
        pruner = pruner.like(choice=choice)
    pruned = _prune_all(pruner, Pruned(choice=choice))
    return replace(pruned, layers=pruned.layers + pruner.dense_layers())


def distill_model(
    path: Path, pruned: Pruned, windows: Tensor, section: PruneSection, *, trust_remote_code: bool = False
) -> Pruned:
    """What `prune_model` gave, trained as the section's `recover.distill` says; `pruned` stays as it is.

    Args:
        windows: int64 token ids [samples, length] of the text to train on.
    """
    assert section.recover is not None and section.recover.distill is not None
    model = BlockwiseModel(path, resolve_device(section.device), trust_remote_code=trust_remote_code)
    result = Pruned(choice=pruned.choice)
    result.add(pruned)
    result.add(distill(model, pruned, windows, section.recover.distill))
    return result


def training_tokens(
    section: PruneSection, calibration: CalibrationSection, tokenizer: PreTrainedTokenizerBase
) -> Tensor | None:
    """Token ids [samples, length] of the text that `recover.distill` names, or None if it names none.

    Raises:
        EsparseError: the text is missing, unreadable or too short.
    """
    distilled = section.recover.distill if section.recover else None
    if distilled is None or distilled.text is None:
        return None
    return token_windows(
        distilled.text, tokenizer, samples=distilled.samples, length=calibration.length,
        seed=calibration.seed, key="prune.recover.distill",
    )  # fmt: skip


def _prune_all(pruner: Pruner, pruned: Pruned) -> Pruned:
    """Take all steps, in memory."""
    if pruner.needs_shared:
        pruner.shared = pruner.choose_shared()
    for index in track(range(pruner.steps), "pruning"):
        pruned.add(pruner.step(index))
    return pruned


def _choose_layers(pruner: Pruner) -> LayerChoice:
    """What the budget makes of each site: from a pruning without recovery, and perhaps one to 4:8."""
    section = pruner.section
    assert section.budget is not None
    plain = section.model_copy(update={"recover": None})
    pruned, finer = _prune_all(pruner.like(plain), Pruned()), None
    if section.budget.sensitive != "dense":
        other = plain.model_copy(update={"pattern": section.budget.sensitive})
        finer = _prune_all(pruner.like(other), Pruned())
    return choose_layers(pruner.model, pruned, finer, pruner.dense_layers(), pruner.windows, section)


def prune(recipe: Recipe, folder: BuildDir) -> PruneRecord:
    """Prune the recipe's model into `folder.checkpoint` and `folder.permutation`.

    A run that was interrupted goes on at the block where it stopped, and ends with the same bytes.

    Raises:
        EsparseError: anything wrong with model, text, recipe, disk space, or a changed recipe on resuming.
    """
    trust = recipe.model.trust_remote_code
    source = resolve(recipe.model, folder)
    family_of(load_config(source, trust_remote_code=trust))  # before the weights, which take long to check
    check_weights(source, trust_remote_code=trust)
    source_sha256 = fingerprint(source)
    model = BlockwiseModel(source, resolve_device(recipe.prune.device), trust_remote_code=trust)
    tokenizer = load_tokenizer(recipe.model.tokenizer or source, trust_remote_code=trust)
    check_vocabulary(tokenizer, model.config)
    journal = Journal(folder.journal)
    windows = _calibration_tokens(recipe, model, tokenizer, journal)
    training = training_tokens(recipe.prune, recipe.calibration, tokenizer)
    pruner = Pruner(model, windows, recipe.prune, recipe.calibration.batch_size)
    require_space(folder.root, _bytes_needed(pruner) - journal.bytes())
    journal.open(_fingerprint(recipe, source_sha256, model, windows, training))
    if journal.tokens() is None:
        journal.save_tokens(windows)
    choice = None
    if recipe.prune.budget is not None:
        choice = journal.layers() or _choose_layers(pruner)
        journal.save_layers(choice)
        pruner = pruner.like(choice=choice)
    _run(pruner, journal)

    decided = journal.decided()
    distilled = _distill(recipe, model, journal, windows if training is None else training)
    decided.add(distilled)
    masks = (
        (model.stored_name(f"{name}.weight"), mask, distilled.values.get(name, values))
        for name, mask, values in journal.masks()
    )
    write_checkpoint(source, folder.checkpoint, masks, tokenizer if recipe.model.tokenizer else None)
    save(folder.permutation, decided.permutations)
    layers = decided.layers + pruner.dense_layers()
    journal.close()
    return PruneRecord(
        model_type=model.config.model_type,
        parameters=model.parameters,
        pruned_parameters=sum(layer.shape[0] * layer.shape[1] for layer in layers if layer.pattern),
        dtype=str(model.stored_dtype).removeprefix("torch."),
        source_sha256=source_sha256,
        calibration_sha256=tokens_sha256(windows),
        calibration_tokens=windows.numel(),
        training_sha256=None if training is None else tokens_sha256(training),
        device=str(model.device),
        layers=layers,
        channels=decided.channels,
        choice=choice,
        recovered=decided.recovered,
    )


def _distill(recipe: Recipe, model: BlockwiseModel, journal: Journal, windows: Tensor) -> Pruned:
    """Train the whole model if the recipe wants it and the journal does not have it yet."""
    section = recipe.prune.recover.distill if recipe.prune.recover else None
    if section is None:
        return Pruned()
    if (stored := journal.distilled()) is not None:
        return stored
    found = list(journal.masks())
    pruned = Pruned(
        masks={name: mask for name, mask, _ in found},
        values={name: values for name, _, values in found if values is not None},
    )
    result = distill(model, pruned, windows, section)
    journal.save_distilled(result)
    return result


def _calibration_tokens(
    recipe: Recipe, model: BlockwiseModel, tokenizer: PreTrainedTokenizerBase, journal: Journal
) -> Tensor:
    section = recipe.calibration
    writer = None
    if isinstance(section.text, TextSelf):
        # Sampling is slow, so an interrupted run keeps what it sampled; whether the recipe has changed since
        # is checked like everything else when the journal is opened.
        if (stored := journal.tokens()) is not None:
            return stored
        trust = recipe.model.trust_remote_code
        writer = load_model(model.path, model.dtype, model.device, trust_remote_code=trust)
    return token_windows(
        section.text,
        tokenizer,
        samples=section.samples,
        length=section.length,
        seed=section.seed,
        model=writer,
    )


def _fingerprint(
    recipe: Recipe, source_sha256: str, model: BlockwiseModel, windows: Tensor, training: Tensor | None
) -> dict[str, Any]:
    """Everything that the pruned bytes depend on."""
    return {
        "prune": recipe.prune.model_dump(mode="json", by_alias=True, exclude={"device"}),
        "calibration": recipe.calibration.model_dump(mode="json", by_alias=True),
        "device": str(model.device),
        "model_sha256": source_sha256,
        "calibration_sha256": tokens_sha256(windows),
        "training_sha256": None if training is None else tokens_sha256(training),
    }


def _bytes_needed(pruner: Pruner) -> int:
    """The checkpoint, and the journal at its largest: a bit a weight, values, hidden states twice."""
    model = pruner.model
    checkpoint = sum(file.stat().st_size for file in weight_files(model.path))
    hidden = sum(stream.nbytes for stream in model.streams.values())
    recover = pruner.section.recover
    values = checkpoint * (pruner.updated + bool(recover and recover.distill))
    return checkpoint + values + model.parameters // 8 + 2 * hidden


def _run(pruner: Pruner, journal: Journal) -> None:
    """Take the steps that the journal does not have yet."""
    if pruner.needs_shared and (stored := journal.shared()) is not None:
        pruner.shared = stored
    if pruner.needs_shared:
        pruner.shared = pruner.choose_shared()
        journal.save_shared(pruner.shared)
    if journal.done:
        note(f"pruning resumes after {journal.done} of {pruner.steps} steps")
        if pruner.calibrated and journal.done < pruner.steps:
            pruner.model.resume(journal.streams())
    for index in track(range(journal.done, pruner.steps), "pruning"):
        journal.write(index, pruner.step(index), pruner.model.streams)
