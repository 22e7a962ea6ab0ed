"""The verify stage: what pruning changed, what the toolchain changed, and what it means for the text.

1. Dense against sparse in ONNX Runtime, on one short text: every linear layer and decoder block, with one
   block in memory at a time, and the graph outputs of a prefill and a decode step. Errors accumulate here:
   each model runs on what its own earlier blocks gave.
2. Fidelity (`evaluate.fidelity`): the ONNX files against PyTorch, and the engines against the ONNX files.
3. Task level (`evaluate.perplexity`): perplexity, KL divergence and agreement on the evaluation text; tasks
   of lm-eval (`evaluate.zeroshot`) on both checkpoints in PyTorch.

Folding stores some tensors in another channel order; `fold_plan.json` says which, and it is undone here
before anything is compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnxruntime
import torch
from polygraphy.comparator import RunResults
from polygraphy.json import save_json
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from esparse_trt import model as models
from esparse_trt import text as texts
from esparse_trt.artifacts import BuildDir
from esparse_trt.errors import CheckFailed
from esparse_trt.evaluate.engines import compare_engines
from esparse_trt.evaluate.fidelity import LIMITS, compare_with_torch, explain
from esparse_trt.evaluate.figures import compare_arrays
from esparse_trt.evaluate.perplexity import compare_distributions, log_ratio
from esparse_trt.evaluate.runtimes import (
    Arrays,
    Steps,
    onnx_logits,
    onnx_session,
    onnx_steps,
    quiet_polygraphy,
)
from esparse_trt.evaluate.sections import Undo, as_stored, block_index, run_sections
from esparse_trt.evaluate.verify_record import Comparison, Fidelity, TaskLevel, VerifyRecord
from esparse_trt.evaluate.zeroshot import zero_shot
from esparse_trt.graph.feeds import PRESENT, cache_feed, token_feed
from esparse_trt.graph.plan import load_plan, undo
from esparse_trt.progress import note, track
from esparse_trt.recipe import Recipe
from esparse_trt.records import EngineRecord, ExportRecord, PruneRecord
from esparse_trt.sections import TextSelf

_TOKENS = 64  # of the text that graphs are compared on; the last one is a decode step


@dataclass(frozen=True)
class Subject:
    """One of the two models: its checkpoint, its ONNX file, and how to put that file's tensors in order."""

    name: str
    checkpoint: Path
    onnx: Path
    undo: Undo


@quiet_polygraphy()
def verify(
    recipe: Recipe, folder: BuildDir, pruned: PruneRecord, exported: ExportRecord, engines: EngineRecord
) -> VerifyRecord:
    """Compare dense and sparse, and the toolchain with PyTorch; see the module docstring.

    A fidelity check or quality gate that fails is in the record: `check_fidelity` and `check_gate` raise.

    Raises:
        EsparseError: the evaluation text is missing or too short.
        CheckFailed: a tensor holds NaN or Inf, so that there is nothing to record; names it.
    """
    source = models.resolve(recipe.model, folder)
    tokenizer = models.load_tokenizer(
        recipe.model.tokenizer or source, trust_remote_code=recipe.model.trust_remote_code
    )
    dense = Subject("dense", source, folder.dense_onnx, as_stored)
    sparse = Subject(
        "sparse", folder.checkpoint, folder.sparse_onnx, partial(undo, load_plan(folder.fold_plan))
    )
    windows = _evaluation_windows(recipe, tokenizer)
    ids, feed = _short_text(recipe, tokenizer, windows)

    layers = _compare_layers(dense, sparse, exported, ids) if recipe.verify.layers else []
    dense_steps = onnx_steps(dense.onnx, exported.inputs, ids)
    sparse_steps = onnx_steps(sparse.onnx, exported.inputs, ids)
    outputs = _compare_outputs(dense_steps, sparse_steps, sparse.undo)
    _save_for_polygraphy(
        folder.polygraphy, exported, ids, {dense.onnx: dense_steps, sparse.onnx: sparse_steps}
    )
    fidelity = [
        _against_torch(recipe, dense, exported, ids, dense_steps),
        _against_torch(recipe, sparse, exported, ids, sparse_steps),
    ]
    engine_checks, engines_skipped = compare_engines(folder, exported, engines, ids, LIMITS[exported.dtype])
    task = _task_level(dense, sparse, exported, windows, tokenizer) if windows is not None else None
    gate = recipe.verify.max_perplexity_ratio
    tasks = recipe.verify.zeroshot
    return VerifyRecord(
        feed=feed,
        outputs=outputs,
        layers=layers,
        fidelity=[*fidelity, *engine_checks],
        engines_skipped=engines_skipped,
        task=task,
        task_skipped=None if task else "the recipe names no evaluation text (verify.text)",
        gate=gate,
        gate_passed=task.ratio <= gate if task and gate is not None else None,
        zeroshot=zero_shot(
            dense.checkpoint, sparse.checkpoint, tokenizer, tasks, models.resolve_device(recipe.prune.device),
            trust_remote_code=recipe.model.trust_remote_code,
        ) if tasks else None,
    )  # fmt: skip


def check_fidelity(record: VerifyRecord) -> None:
    """Raise CheckFailed for the first runtime that does not agree, naming the layer that diverged first."""
    for check in record.fidelity:
        if not check.passed:
            raise explain(check)


def check_gate(record: VerifyRecord) -> None:
    """Raise CheckFailed if the recipe's quality gate was not passed."""
    if record.gate_passed is False and record.task is not None:
        task = record.task
        raise CheckFailed(
            f"perplexity rose from {task.dense_perplexity:.3f} to {task.sparse_perplexity:.3f}, a ratio of "
            f"{task.ratio:.3f}; the gate is {record.gate:g}",
            where="verify.max_perplexity_ratio",
            fix="prune less (a weaker prune.pattern, more in prune.layers.exclude), calibrate on more text, "
            "or raise the gate",
        )


# --- texts -----------------------------------------------------------------------------------------------


def _evaluation_windows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
    section = recipe.verify
    if section.text is None:
        return None
    return texts.evaluation_windows(section.text, tokenizer, length=section.length, samples=section.samples)


def _short_text(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, windows: Tensor | None
) -> tuple[Tensor, str]:
    """Tokens [1, T] to compare graphs on, and what they are: real text where the recipe has any."""
    if windows is not None:
        ids, what = windows[:1, :_TOKENS], "the start of the evaluation text"
    elif not isinstance(recipe.calibration.text, TextSelf):
        section = recipe.calibration
        length = min(_TOKENS, section.length)
        ids = texts.token_windows(section.text, tokenizer, samples=1, length=length, seed=section.seed)
        what = "a window of the calibration text"
    else:
        generator = torch.Generator().manual_seed(recipe.calibration.seed)
        ids, what = torch.randint(tokenizer.vocab_size, (1, _TOKENS), generator=generator), "random tokens"
    return ids, f"{what}: prefill of {ids.shape[1] - 1} tokens, then 1 decode step"


# --- 1. dense against sparse -----------------------------------------------------------------------------


def _feed(exported: ExportRecord, ids: Tensor) -> Arrays:
    """The prefill of all tokens but the last."""
    return token_feed(exported.inputs, ids[:, :-1].numpy()) | cache_feed(exported.inputs, batch=1, past=0)


def _compare_layers(dense: Subject, sparse: Subject, exported: ExportRecord, ids: Tensor) -> list[Comparison]:
    """Both graphs side by side, block by block; no more than one block's outputs are held."""
    runs = [
        run_sections(subject.onnx, _feed(exported, ids), exported.linears, subject.undo)
        for subject in (dense, sparse)
    ]
    pairs = track(zip(*runs, strict=True), "dense against sparse", total=_count_sections(exported))
    return [
        compare_arrays(name, a.outputs[name], b.outputs[name], block=block_index(name), sides=_SIDES)
        for a, b in pairs
        for name in a.outputs
    ]


def _count_sections(exported: ExportRecord) -> int:
    """Decoder blocks, and what follows the last one."""
    return len({block_index(name) for name in exported.linears} | {None})


_SIDES = ("dense.onnx", "sparse.onnx")


def _compare_outputs(dense: Steps, sparse: Steps, undo: Undo) -> list[Comparison]:
    """Logits of both steps, and the cache as the prefill left it."""
    prefill = [
        compare_arrays(name, a, undo(name, sparse.prefill[name]), block=_cache_block(name), sides=_SIDES)
        for name, a in dense.prefill.items()
    ]
    a, b = dense.decode["logits"], sparse.decode["logits"]
    return [*prefill, compare_arrays("logits", a, b, step="decode", sides=_SIDES)]


def _cache_block(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith(PRESENT) else None


def _save_for_polygraphy(folder: Path, exported: ExportRecord, ids: Tensor, steps: dict[Path, Steps]) -> None:
    """The inputs and the logits of the prefill, as `polygraphy run` and `polygraphy inspect data` read them.

    Not the cache: sparse.onnx has it in a folded order, and comparing that by name would mislead.
    """
    results = RunResults()
    for path, item in steps.items():
        results.add([{"logits": item.prefill["logits"]}], runner_name=path.name)
    folder.mkdir(exist_ok=True)
    for name, content in {"inputs.json": [_feed(exported, ids)], "outputs.json": results}.items():
        temporary = folder / f".{name}.tmp"
        save_json(content, str(temporary))
        temporary.replace(folder / name)


# --- 2. fidelity -----------------------------------------------------------------------------------------


def _against_torch(
    recipe: Recipe, subject: Subject, exported: ExportRecord, ids: Tensor, steps: Steps
) -> Fidelity:
    note(f"comparing {subject.onnx.name} with PyTorch")
    sections = list(run_sections(subject.onnx, _feed(exported, ids), exported.linears, subject.undo))
    model = models.load_model(
        subject.checkpoint,
        getattr(torch, exported.dtype),
        trust_remote_code=recipe.model.trust_remote_code,
    )
    return compare_with_torch(
        model, sections, steps.logits, ids, LIMITS[exported.dtype],
        a=f"PyTorch {subject.name}", b=f"ONNX Runtime {subject.onnx.name}",
    )  # fmt: skip


# --- 3. task level ---------------------------------------------------------------------------------------


def _task_level(
    dense: Subject,
    sparse: Subject,
    exported: ExportRecord,
    windows: Tensor,
    tokenizer: PreTrainedTokenizerBase,
) -> TaskLevel:
    sessions = [onnx_session(subject.onnx) for subject in (dense, sparse)]
    found = compare_distributions(windows, *(onnx_logits(session, exported.inputs) for session in sessions))
    count, length = windows.shape
    first = "BOS" if tokenizer.bos_token_id is not None else "text (the tokenizer has no BOS)"
    return TaskLevel(
        text_sha256=texts.tokens_sha256(windows),
        tokens=count * (length - 1),
        length=length,
        dtype=exported.dtype,
        runtime=f"ONNX Runtime {onnxruntime.__version__} on the CPU",
        protocol=f"{count} consecutive windows of {length} tokens without overlap, each from an empty cache; "
        f"every token after the first, which is {first}, is scored; log-softmax in float64",
        dense_perplexity=found.dense_perplexity,
        sparse_perplexity=found.sparse_perplexity,
        ratio=found.sparse_perplexity / found.dense_perplexity,
        ln_ratio_ci95=log_ratio(found.dense_nll, found.sparse_nll)[1],
        kl_divergence=found.kl_divergence,
        top1_agreement=found.top1_agreement,
    )
