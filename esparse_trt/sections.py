"""The sections of a recipe, one per stage, with their defaults; `recipe.py` puts them together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """Base of every recipe section: immutable, and strict about keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


# --- model ---------------------------------------------------------------------------------------------


class ModelSection(Section):
    """Where the dense model comes from: exactly one of `path` and `hub`."""

    path: Path | None = Field(None, description="Local Hugging Face folder, or a .gguf file")
    hub: str | None = Field(None, description="Hugging Face hub id, such as Qwen/Qwen2.5-0.5B")
    revision: str | None = Field(None, description="Branch, tag or commit of the hub repository")
    tokenizer: Path | None = Field(None, description="Tokenizer folder, when it does not lie with the model")
    trust_remote_code: bool = Field(False, description="Run Python code that the hub repository ships")

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give exactly one of `path` (a folder or .gguf file) and `hub` (a hub id)")
        return self


# --- text ----------------------------------------------------------------------------------------------


class TextFile(Section):
    """Plain UTF-8 text, cut into windows of equal length."""

    source: Literal["file"] = "file"
    path: Path = Field(description="A UTF-8 text file")


BUILDERS = ("json", "text", "csv", "parquet")  # of the datasets library: they read local files or URLs


class TextDataset(Section):
    """A data set loaded through the `datasets` library."""

    source: Literal["dataset"]
    name: str = Field(description="Hub id or builder name: Salesforce/wikitext, allenai/c4, json, text, ...")
    config: str | None = Field(None, description="Configuration of the data set, such as wikitext-2-raw-v1")
    split: str = Field("train", description="Split to read")
    column: str = Field("text", description="Column that holds the text")
    rows: Literal["documents", "lines"] = Field(
        "documents", description="documents: each row is a text of its own; lines: all rows are one text"
    )
    data_files: list[str] | None = Field(
        None, description="Files inside the data set; of a builder, local files"
    )
    streaming: bool = Field(False, description="Read only as much of the data set as is needed")
    documents: int | None = Field(None, ge=1, description="Read at most this many rows")


class TextSelf(Section):
    """Text that the model writes itself by sampling from its own distribution, starting from BOS."""

    source: Literal["self"]
    temperature: float = Field(1.0, gt=0, description="Sampling temperature")


def _file_by_default(value: Any) -> Any:
    return {"source": "file", **value} if isinstance(value, dict) else value


TextSource = Annotated[
    TextFile | TextDataset | TextSelf, Field(discriminator="source"), BeforeValidator(_file_by_default)
]
EvaluationSource = Annotated[
    TextFile | TextDataset, Field(discriminator="source"), BeforeValidator(_file_by_default)
]


class CalibrationSection(Section):
    """The text that the scores are measured on."""

    text: TextSource
    samples: int = Field(128, ge=1, description="Number of sequences")
    length: int = Field(2048, ge=8, description="Tokens per sequence")
    seed: int = Field(0, ge=0, description="Seed of the choice of windows and of sampling")
    batch_size: int = Field(8, ge=1, description="Sequences that pass through a block at a time")


# --- prune ---------------------------------------------------------------------------------------------


class ScoreSection(Section):
    """How important a weight is (DESIGN section 4)."""

    method: Literal["e_sparse", "wanda", "magnitude", "ria", "obd", "obs"] = "e_sparse"
    bins: int = Field(128, ge=2, le=4096, description="e_sparse: bins of each channel's histogram")
    alpha: float = Field(
        256.0, ge=0, description="e_sparse: weight of the channel's RMS norm against its entropy in nats"
    )
    information: Literal["entropy", "differential", "kl", "mutual", "none"] = Field(
        "entropy",
        description="e_sparse: what a channel's information is measured by: the entropy of its histogram, "
        "its differential entropy (as an amplitude), its KL divergence from a Gaussian of the same variance, "
        "its mutual information with the norm of the output; none drops the term",
    )
    damping: float = Field(
        0.01, ge=0, le=1, description="obs: share of the Hessian's mean diagonal that is added to it"
    )


class LocalShuffle(Section):
    """Local block shuffle: greedy channel swaps inside blocks of the input channels."""

    block: Annotated[int, Field(ge=4)] | Literal["full"] = Field(
        256, description="Channels per block; full: all"
    )
    rounds: int = Field(200, ge=1, description="Rounds of simultaneous swaps at most")


class PermuteSection(Section):
    """Channel permutations chosen so that N:M pruning loses less (DESIGN section 5)."""

    global_: Literal["deal", "sort", "none"] = Field(
        "deal", alias="global", description="Global naive shuffle"
    )
    local: LocalShuffle | None = Field(
        default_factory=LocalShuffle, description="Local block shuffle, or null"
    )
    assign: int = Field(
        0, ge=0, description="Rounds of linear-assignment refinement after the shuffles, as in RIA"
    )
    residual: Literal["gather", "shared", "none"] = Field(
        "gather",
        description="Layers that read the residual stream: own permutation and a runtime gather, one shared "
        "permutation for the whole model, or none",
    )
    objective: Literal["error", "score"] = Field(
        "error",
        description="What the permutations keep as much of as they can: squared scores, which for norm-based "
        "scores is to lose the least output error, or plain scores",
    )


class UpdateSection(Section):
    """Re-fitting of the kept weights, so that the layer's outputs change least."""

    method: Literal["none", "obs"] = Field(
        "none", description="obs: optimal brain surgeon, in a sweep over the columns"
    )
    mask: Literal["adaptive", "fixed"] = Field(
        "adaptive",
        description="adaptive: chosen during the sweep from the updated weights, the score then only chooses "
        "the permutation; fixed: chosen by the score",
    )
    sweep: Literal["group", "column"] = Field(
        "group", description="group: a group of m at a time, its masks by their exact cost; column: SparseGPT"
    )
    damping: float = Field(
        0.01, ge=0, le=1, description="Share of the Hessian's mean diagonal that is added to it"
    )
    correct: float = Field(
        0.5,
        ge=0,
        le=1,
        description="How far the layer is first re-fitted to put out what it does in the dense model, given "
        "inputs that pruned blocks have changed: 0 not at all, 1 to the least squared error",
    )
    block: int = Field(128, ge=1, description="Columns that the sweep hands on to the rest at a time")
    refit: int = Field(
        32, ge=0, description="Conjugate gradient steps on the finished mask; 0: leave what the sweep gave"
    )


class DistillSection(Section):
    """Training of the whole model towards the dense model's next-token distributions."""

    steps: int = Field(200, ge=1, description="AdamW steps at most")
    seconds: float | None = Field(None, gt=0, description="Stop after this long; none: only by steps")
    learning_rate: float = Field(1e-4, gt=0, description="Peak; 5 % warm-up, then a cosine to zero")
    batch_size: int = Field(4, ge=1, description="Sequences of the calibration text per step")


class RecoverSection(Section):
    """Training of the kept weights, masks frozen, on the calibration text."""

    steps: int = Field(200, ge=0, description="AdamW steps for each decoder block; 0: none")
    learning_rate: float = Field(5e-4, gt=0, description="Peak; 5 % warm-up, then a cosine to zero")
    distill: DistillSection | None = Field(None, description="Then train the whole model at once; or null")


class BudgetSection(Section):
    """What pruning may cost; the layers that cost most per parameter stay dense to meet it."""

    perplexity_ratio: float = Field(gt=1, description="Sparse / dense perplexity, estimated before recovery")
    samples: int = Field(16, ge=1, description="Sequences of the calibration text it is estimated on")


class LayerSelection(Section):
    """Which linear layers are pruned, by glob on the module name; exclude wins."""

    include: list[str] = Field(default_factory=lambda: ["*"])
    exclude: list[str] = Field(default_factory=lambda: ["lm_head"])


class PruneSection(Section):
    """One-shot pruning."""

    pattern: str = Field("2:4", description="n:m, n kept of every m consecutive input channels")
    score: ScoreSection = Field(default_factory=ScoreSection)
    permute: PermuteSection = Field(default_factory=PermuteSection)
    update: UpdateSection = Field(default_factory=UpdateSection)
    recover: RecoverSection | None = Field(None, description="Train the kept weights afterwards; or null")
    layers: LayerSelection = Field(default_factory=LayerSelection)
    budget: BudgetSection | None = Field(
        None, description="Keep the most sensitive layers dense to meet a perplexity budget; or null"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")

    @property
    def follows_dense(self) -> bool:
        """Whether the dense model's hidden states are needed beside those of the pruned one."""
        corrects = self.update.method == "obs" and self.update.correct > 0
        return corrects or (self.recover is not None and self.recover.steps > 0)

    @field_validator("pattern", mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        if isinstance(value, int):
            raise ValueError(
                f'write it in quotes, "2:4": YAML reads an unquoted one as a number, here {value}'
            )
        return value

    @field_validator("pattern")
    @classmethod
    def _pattern(cls, value: str) -> str:
        kept, _, group = value.partition(":")
        if not (kept.isdigit() and group.isdigit() and 0 < int(kept) < int(group)):
            raise ValueError(f"pattern must be n:m with 0 < n < m, such as 2:4, not {value!r}")
        return value


# --- export, engine ------------------------------------------------------------------------------------


class ExportSection(Section):
    """ONNX export with KV cache."""

    dtype: Literal["float16", "float32"] = Field("float16", description="Type of weights and activations")
    opset: int = Field(20, ge=18, le=22, description="ONNX opset")


class Profile(Section):
    """An optimisation profile: [minimum, optimum, maximum] of each dynamic dimension."""

    batch: tuple[int, int, int] = (1, 1, 4)
    sequence: tuple[int, int, int]
    past: tuple[int, int, int]

    @model_validator(mode="after")
    def _ordered(self) -> Profile:
        for name in ("batch", "sequence", "past"):
            low, best, high = getattr(self, name)
            if not 0 <= low <= best <= high:
                raise ValueError(
                    f"{name} must be [minimum, optimum, maximum] in ascending order, not {[low, best, high]}"
                )
        if self.batch[0] < 1 or self.sequence[0] < 1:
            raise ValueError("batch and sequence start at 1; only past may be 0")
        return self


class EngineSection(Section):
    """TensorRT engines."""

    flavour: Literal["auto", "tensorrt", "tensorrt_rtx", "none"] = Field(
        "auto", description="Which TensorRT builds the engines; auto takes tensorrt, then tensorrt_rtx"
    )
    dense: bool = Field(True, description="Also build the dense engine, to compare with")
    plugin: Literal["auto", "required", "none"] = Field(
        "auto",
        description="The Sparse-GEMM plugin: auto runs packed layers in it where it can and dense is not "
        "faster, required runs all of them in it or fails, none builds from sparse.onnx",
    )
    plugin_library: Path | None = Field(
        None, description="libesparse_trt_plugin.so; none: the packaged one, or of the source tree's build"
    )
    table: Path | None = Field(
        None, description="Table of `esparse-trt tune`; none: the one in the user's cache for this GPU"
    )
    sparse_weights: bool = Field(True, description="Set SPARSE_WEIGHTS for the sparse engine")
    profiles: dict[str, Profile] = Field(
        default_factory=lambda: {
            "prefill": Profile(sequence=(1, 512, 2048), past=(0, 0, 0)),
            "decode": Profile(sequence=(1, 1, 1), past=(1, 512, 2048)),
        }
    )
    workspace_mib: int | None = Field(
        None, ge=1, description="Workspace limit in MiB; none: the builder's own"
    )
    compute_capabilities: list[Annotated[str, Field(pattern=r"^\d+\.\d$")]] | None = Field(
        None,
        min_length=1,
        description='TensorRT-RTX only: GPUs to build for, such as ["8.6", "8.9"]; none: all from Ampere on',
    )
    run: Literal["auto", "never"] = Field("auto", description="Run the engines where a GPU can")


# --- verify, report, deploy ----------------------------------------------------------------------------


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
