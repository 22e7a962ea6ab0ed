"""Task accuracy of the dense and the sparse checkpoint, by lm-eval (EleutherAI's evaluation harness).

The harness chooses prompts, answers and metrics, as in published tables. Both models answer the same
questions, so a change is taken question by question; where its 95 % interval contains zero it is noise.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from esparse_trt.errors import EsparseError
from esparse_trt.evaluate.perplexity import log_ratio
from esparse_trt.evaluate.verify_record import TaskScore, ZeroShot
from esparse_trt.model import load_model
from esparse_trt.progress import note
from esparse_trt.sections import ZeroShotSection

SUITE = ("hellaswag", "openbookqa", "piqa", "sciq", "logiqa")  # what `suite` stands for
_WHERE = "verify.zeroshot"

Scores = dict[str, list[float]]  # metric -> figure of every question
Results = dict[str, tuple[Scores, dict[str, Any]]]  # task -> the same, and the harness' own figures


def load_tasks(section: ZeroShotSection) -> dict[str, Any]:
    """The harness' tasks by name, their data loaded: before hours of work, not after.

    Raises:
        EsparseError: lm-eval is not installed, it knows no such task, or a data set cannot be loaded.
    """
    if find_spec("lm_eval") is None:
        raise EsparseError(
            "zero-shot tasks need lm-eval", where=_WHERE, fix="pip install 'esparse-trt[eval]', or lm-eval"
        )
    from datasets.exceptions import DatasetsError
    from lm_eval.tasks import TaskManager

    names = [name for item in section.tasks for name in (SUITE if item == "suite" else (item,))]
    with _quiet():
        include = str(section.include) if section.include else None
        manager = TaskManager(include_path=include, include_defaults=False)
        if not set(names) <= set(manager.all_tasks):  # looking through the harness' own takes seconds
            manager = TaskManager(include_path=include)
        unknown = [name for name in names if name not in manager.all_tasks]
        if unknown:
            close = get_close_matches(unknown[0], manager.all_tasks, n=3)
            raise EsparseError(
                f"lm-eval has no task {unknown[0]!r}",
                where=f"{_WHERE}.tasks",
                fix=f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists all",
            )
        loaded: dict[str, Any] = {}
        for name in names:
            try:
                loaded |= manager.load([name])["tasks"]
            except (ConnectionError, DatasetsError, OSError, ValueError) as error:
                raise EsparseError(
                    f"cannot load the data of task {name}: {error}",
                    where=f"{_WHERE}.tasks",
                    fix="connect to the network (unset HF_HUB_OFFLINE), leave the task out, or put local "
                    "data into a task file of your own (`include`)",
                ) from error
    return loaded


def zero_shot(
    dense: Path,
    sparse: Path,
    tokenizer: PreTrainedTokenizerBase,
    section: ZeroShotSection,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
) -> ZeroShot:
    """Run the tasks on both checkpoints, one in memory at a time, in fp32 on a CPU and as stored on a GPU.

    Raises:
        EsparseError: as `load_tasks`.
    """
    tasks = load_tasks(section)
    dtype: torch.dtype | Literal["auto"] = torch.float32 if device.type == "cpu" else "auto"
    found = []
    for name, path in (("dense", dense), ("sparse", sparse)):
        note(f"{', '.join(tasks)} on the {name} model")
        model = load_model(path, dtype, device, trust_remote_code=trust_remote_code)
        found.append(_evaluate(model, tokenizer, tasks, section))
        dtype = model.dtype
        del model
    scores = [row for name in tasks for row in _compare(name, found[0][name], found[1][name])]
    return ZeroShot(
        harness=f"lm-eval {metadata.version('lm-eval')}",
        shots=section.shots,
        limit=section.limit,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        scores=[*scores, *_means(scores, len(tasks))],
    )


def _evaluate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: dict[str, Any],
    section: ZeroShotSection,
) -> Results:
    """Every question's figures, task by task."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with _quiet():
        results = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=section.batch_size),
            tasks=list(tasks.values()),
            task_manager=TaskManager(include_defaults=False),  # they are loaded: its own search takes seconds
            num_fewshot=section.shots,
            limit=section.limit,
        )
    made: Results = {}
    for name, samples in results["samples"].items():
        metrics = [key for key in samples[0]["metrics"] if isinstance(samples[0][key], (bool, int, float))]
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        scores = {metric: [float(sample[metric]) for sample in samples] for metric in metrics}
        made[name] = scores, results["results"][name] | {"better": results["higher_is_better"][name]}
    return made


def _compare(task: str, dense: tuple[Scores, Any], sparse: tuple[Scores, Any]) -> Iterator[TaskScore]:
    for metric, before in dense[0].items():
        after = sparse[0][metric]
        change, interval = log_ratio(torch.tensor(before), torch.tensor(after))
        yield TaskScore(
            task=task,
            metric=metric,
            higher_is_better=dense[1]["better"].get(metric, True),
            questions=len(before),
            dense=_figure(dense[1], metric),
            dense_stderr=_figure(dense[1], f"{metric}_stderr"),
            sparse=_figure(sparse[1], metric),
            sparse_stderr=_figure(sparse[1], f"{metric}_stderr"),
            change=change,
            change_ci95=interval,
        )


def _means(scores: list[TaskScore], tasks: int) -> Iterator[TaskScore]:
    """The mean over all tasks of every metric that all have; the tasks are independent."""
    for metric in dict.fromkeys(row.metric for row in scores):
        rows = [row for row in scores if row.metric == metric]
        if len(rows) == tasks > 1:
            yield TaskScore(
                task=f"mean of {tasks}",
                metric=metric,
                higher_is_better=rows[0].higher_is_better,
                questions=sum(row.questions for row in rows),
                dense=sum(row.dense for row in rows) / tasks,
                dense_stderr=_of_mean([row.dense_stderr for row in rows]),
                sparse=sum(row.sparse for row in rows) / tasks,
                sparse_stderr=_of_mean([row.sparse_stderr for row in rows]),
                change=sum(row.change for row in rows) / tasks,
                change_ci95=_of_mean([row.change_ci95 for row in rows]),
            )


def _of_mean(errors: list[float | None]) -> float | None:
    """The error of a mean from those of its independent terms."""
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(known) if len(known) == len(errors) else None


def _figure(results: dict[str, Any], name: str) -> Any:
    """The harness names its figures `acc,none`, the filter of the answers after the comma."""
    found = next(value for key, value in results.items() if key.split(",")[0] == name)
    return None if isinstance(found, str) else found  # "N/A"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the harness logs off the terminal, unless something is wrong."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
