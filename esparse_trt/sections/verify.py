"""What is measured, reported and deployed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from esparse_trt.sections.base import Section
from esparse_trt.sections.text import EvaluationSource


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class ZeroShotSection(Section):
    """Tasks of lm-eval on the dense and the sparse checkpoint (pip install 'esparse-trt[eval]')."""

    tasks: Annotated[list[str], BeforeValidator(_one_or_more), Field(min_length=1)] = Field(
        ["suite"],
        description="Names of tasks; suite stands for hellaswag, openbookqa, piqa, sciq and logiqa",
    )
    include: Path | None = Field(None, description="Folder with task files of your own")
    shots: int = Field(0, ge=0, description="Solved examples before each question")
    limit: int | None = Field(None, ge=1, description="Questions per task at most; none: all")
    batch_size: int = Field(8, ge=1, description="Answers that are scored at a time")


class VerifySection(Section):
    """Comparison of dense and sparse, and of the toolchain with PyTorch."""

    text: EvaluationSource | None = Field(
        None, description="Evaluation text; none: task-level figures are skipped"
    )
    length: int = Field(512, ge=8, description="Tokens per evaluation window")
    samples: int | None = Field(None, ge=1, description="Evaluation windows at most; none: the whole text")
    max_perplexity_ratio: float | None = Field(
        None, gt=0, description="Quality gate: sparse / dense perplexity above this fails the build"
    )
    layers: bool = Field(True, description="Compare per layer, block by block, besides the outputs")
    zeroshot: ZeroShotSection | None = Field(
        None, description="Accuracy on tasks, before and after pruning; or null"
    )

    @model_validator(mode="after")
    def _gate_has_text(self) -> VerifySection:
        if self.max_perplexity_ratio is not None and self.text is None:
            raise ValueError("max_perplexity_ratio needs an evaluation text: set `verify.text`")
        return self


class ReportSection(Section):
    """The accuracy-diff report."""

    title: str | None = Field(None, description="Heading; none: the recipe's name")


class DeploySection(Section):
    """The Triton Inference Server model repository."""

    model_name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="none: the recipe's name"
    )
    backend: Literal["auto", "tensorrt", "onnxruntime", "python"] = Field(
        "auto",
        description="auto: the engine if TensorRT proper built it, else the ONNX model; python: ONNX Runtime "
        "on the CPU inside Triton's Python backend, for servers without the onnxruntime backend",
    )
    text: bool = Field(
        True, description="Add a model that takes and returns text, next to the one on tensors"
    )
    max_batch_size: int | None = Field(
        None, ge=1, description="none: the largest batch that every profile takes"
    )
    instances: int = Field(1, ge=1, description="Model instances per GPU")
