"""Zero-shot tasks through the real harness, on a task file and data of our own."""

from __future__ import annotations

import builtins
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from esparse_trt import pipeline
from esparse_trt.artifacts import BuildDir, load_manifest
from esparse_trt.errors import EsparseError
from esparse_trt.evaluate import zeroshot
from esparse_trt.evaluate.verify_record import TaskScore, VerifyRecord
from esparse_trt.evaluate.zeroshot import SUITE, load_tasks, zero_shot
from esparse_trt.recipe import parse_recipe
from esparse_trt.sections import ZeroShotSection

harness = pytest.importorskip("lm_eval.tasks")

WORDS = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog", "weights", "little", "moves", "channels"]
QUESTIONS = [
    {"question": f"Question {i}: {WORDS[i % 11]} {WORDS[i * 7 % 11]}",
     "choices": [f" {WORDS[(i + step) % 11]}" for step in (1, 4, 9)], "answer": i % 3}
    for i in range(24)
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_search() -> Iterator[None]:
    """The harness looks through its own tasks once, not in every test: that takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "TaskManager", functools.cache(harness.TaskManager))
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two task files over one local data file."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "data.jsonl"
    data.write_text("\n".join(json.dumps(question) for question in QUESTIONS))
    for name, shown in (("ours", "{{question}}"), ("ours_too", "{{question}}, and")):
        task = {
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": shown,
            "doc_to_choice": "{{choices}}", "doc_to_target": "answer", "target_delimiter": "",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(scope="module")
def halved(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with half of its weights at zero."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(torch.rand_like(weight) < 0.5)
    folder = tmp_path_factory.mktemp("halved")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


def section(**changes: object) -> ZeroShotSection:
    return ZeroShotSection.model_validate({"tasks": ["ours"]} | changes)


def accuracies(path: Path) -> list[float]:
    """Whether the most likely answer is the right one, question by question, by definition."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    right = []
    for question in QUESTIONS:
        likelihoods = []
        for choice in question["choices"]:
            asked = tokenizer(question["question"], add_special_tokens=False).input_ids
            whole = tokenizer(question["question"] + choice, add_special_tokens=False).input_ids
            with torch.no_grad():
                log_p = model(torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
            answer = range(len(asked), len(whole))
            likelihoods.append(sum(float(log_p[i - 1, whole[i]]) for i in answer))
        right.append(float(likelihoods.index(max(likelihoods)) == question["answer"]))
    return right


def test_the_harness_measures_what_the_definition_says(tasks: Path, tiny_llama: Path, halved: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    found = zero_shot(tiny_llama, halved, tokenizer, section(include=tasks), torch.device("cpu"))
    assert (found.shots, found.limit, found.dtype, found.device) == (0, None, "float32", "cpu")
    assert found.harness.startswith("lm-eval ")
    (accuracy,) = (row for row in found.scores if row.metric == "acc")
    dense, sparse = torch.tensor(accuracies(tiny_llama)), torch.tensor(accuracies(halved))
    assert (accuracy.task, accuracy.questions, accuracy.higher_is_better) == ("ours", 24, True)
    assert accuracy.change != 0 and accuracy.dense == pytest.approx(dense.mean().item())
    assert accuracy.sparse == pytest.approx(sparse.mean().item())
    assert accuracy.dense_stderr == pytest.approx(dense.std().item() / math.sqrt(24))
    assert accuracy.change == pytest.approx((sparse - dense).mean().item())
    assert accuracy.change_ci95 == pytest.approx(
        2.069 * (sparse - dense).std().item() / math.sqrt(24), rel=0.01
    )


def test_the_dense_model_against_itself_changes_nothing(tasks: Path, tiny_llama: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    asked = section(tasks=["ours", "ours_too"], include=tasks, limit=6, shots=1)
    found = zero_shot(tiny_llama, tiny_llama, tokenizer, asked, torch.device("cpu"))
    assert [(row.task, row.metric) for row in found.scores] == [
        (task, metric) for task in ("ours", "ours_too") for metric in ("acc", "acc_norm")
    ] + [("mean of 2", "acc"), ("mean of 2", "acc_norm")]
    assert all(row.change == 0 and row.verdict == "within noise" for row in found.scores)
    assert [row.questions for row in found.scores] == [6, 6, 6, 6, 12, 12]
    first, second, mean = found.scores[0], found.scores[2], found.scores[4]
    assert mean.dense == pytest.approx((first.dense + second.dense) / 2)
    assert mean.dense_stderr == pytest.approx(math.hypot(first.dense_stderr, second.dense_stderr) / 2)


@pytest.mark.parametrize(
    "change, half, higher, verdict",
    [(-0.1, 0.05, True, "worse"), (0.1, 0.05, True, "better"), (-0.1, 0.05, False, "better"),
     (-0.1, 0.1, True, "within noise"), (-0.1, None, True, "")],
)  # fmt: skip
def test_verdicts(change: float, half: float | None, higher: bool, verdict: str):
    row = TaskScore(
        task="t", metric="acc", higher_is_better=higher, questions=9, dense=0.5, dense_stderr=None,
        sparse=0.4, sparse_stderr=None, change=change, change_ci95=half,
    )  # fmt: skip
    assert row.verdict == verdict


def test_the_suite_is_what_the_harness_has():
    assert SUITE == ("hellaswag", "openbookqa", "piqa", "sciq", "logiqa")
    assert set(SUITE) <= set(harness.TaskManager(include_path=None).all_subtasks)


def test_data_that_is_not_there(tasks: Path, tmp_path: Path):
    lost = yaml.safe_load((tasks / "ours.yaml").read_text()) | {"task": "lost"}
    lost["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "nowhere.jsonl")}}
    (tmp_path / "lost.yaml").write_text(yaml.safe_dump(lost))
    with pytest.raises(EsparseError, match="cannot load the data of task lost") as error:
        load_tasks(section(tasks=["lost"], include=tmp_path))
    assert error.value.where == "verify.zeroshot.tasks"
    with pytest.raises(EsparseError, match="cannot load the data of task hellaswag") as error:
        load_tasks(section(tasks="suite"))  # HF_HUB_OFFLINE is set
    assert "HF_HUB_OFFLINE" in error.value.fix


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(zeroshot, "find_spec", lambda name: None)
    real = builtins.__import__

    def refuse(name: str, *rest: object) -> object:
        assert not name.startswith("lm_eval")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(EsparseError, match="need lm-eval") as error:
        load_tasks(section())
    assert "esparse-trt[eval]" in error.value.fix


def test_a_build_reports_them(tasks: Path, tiny_recipe: Path, tmp_path: Path):
    data = yaml.safe_load(tiny_recipe.read_text())
    data["verify"] |= {"layers": False, "zeroshot": {"tasks": "ours", "include": str(tasks), "limit": 8}}
    recipe = parse_recipe({"name": "tiny", **data}, base=tmp_path)
    folder = BuildDir(tmp_path / "out")
    pipeline.build(recipe, folder.root, last="report")
    record = load_manifest(folder).record("verify", VerifyRecord)
    assert record.zeroshot is not None and len(record.zeroshot.scores) == 2
    assert all(row.questions == 8 for row in record.zeroshot.scores)
    assert json.loads(folder.report_json.read_text())["verify"]["zeroshot"]["limit"] == 8
    shown = folder.report_html.read_text()
    for row in record.zeroshot.scores:
        assert f"{row.sparse:.4f}" in shown and row.metric in shown


def test_a_build_that_lacks_a_task_fails_before_it_prunes(tiny_recipe: Path, tmp_path: Path):
    data = yaml.safe_load(tiny_recipe.read_text())
    data["verify"] |= {"zeroshot": {"tasks": ["helaswag"]}}
    recipe = parse_recipe({"name": "tiny", **data}, base=tmp_path)
    with pytest.raises(EsparseError, match="no task 'helaswag'") as error:
        pipeline.build(recipe, tmp_path / "out")
    assert "hellaswag" in error.value.fix
    assert not (tmp_path / "out" / "checkpoint").exists()
