"""How the model is pruned."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from esparse_trt.sections.base import Section
from esparse_trt.sections.text import EvaluationSource


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
        "full", description="Channels per block; full: all"
    )
    rounds: int = Field(200, ge=1, description="Rounds of simultaneous swaps at most")


class RefineShuffle(Section):
    """Channel swaps that lower the layer's output error itself."""

    rounds: int = Field(12, ge=1, description="Rounds of simultaneous swaps at most")
    correct: float = Field(
        0.0,
        ge=0,
        le=1,
        description="How far the swaps are to make up for what was lost before the layer, in its inputs: "
        "better on the quickstart model, much worse on Qwen2.5-Coder",
    )


class PermuteSection(Section):
    """Channel permutations chosen so that N:M pruning loses less (DESIGN section 5)."""

    global_: Literal["deal", "sort", "none"] = Field(
        "none",
        alias="global",
        description="Global naive shuffle, before the local one, which on both models that we measured "
        "ends better without it",
    )
    local: LocalShuffle | None = Field(
        default_factory=LocalShuffle, description="Local block shuffle, or null"
    )
    assign: int = Field(
        0, ge=0, description="Rounds of linear-assignment refinement after the shuffles, as in RIA"
    )
    refine: RefineShuffle | None = Field(
        None,
        description="After the other searches, if there are any, swaps that lower the output error on the "
        "calibration text, where the permutation is the layer's own and free; or null. The score magnitude, "
        "which reads no text, goes without",
    )
    attention: Literal["fold", "gather"] = Field(
        "gather",
        description="Layers that read the attention's output: a permutation within each head, which folds "
        "into the values' weights, or any permutation and a runtime gather",
    )
    residual: Literal["gather", "shared", "none"] = Field(
        "gather",
        description="Layers that read the residual stream: own permutation and a runtime gather, one shared "
        "permutation for the whole model, or none",
    )
    rows: Literal["effect", "equal"] = Field(
        "effect",
        description="How much each output of layers that share a permutation counts when it is chosen: by "
        "what it does to what the block puts out, or all the same; where the permutation is their own",
    )
    objective: Literal["error", "score"] = Field(
        "error",
        description="What the permutations keep as much of as they can: squared scores, which for norm-based "
        "scores is to lose the least output error, or plain scores",
    )


class UpdateSection(Section):
    """Re-fitting of the kept weights, so that the layer's outputs change least."""

    method: Literal["none", "obs"] = Field(
        "none", description="obs: SparseGPT's sweep over the columns, then what `descent` and `refit` say"
    )
    mask: Literal["adaptive", "fixed"] = Field(
        "adaptive",
        description="adaptive: chosen from the updated weights, the score then only chooses the permutation; "
        "fixed: chosen by the score",
    )
    damping: float = Field(
        0.01, ge=0, le=1, description="Share of the Hessian's mean diagonal that is added to it"
    )
    correct: float = Field(
        0.5,
        ge=0,
        le=1,
        description="How far a layer is first re-fitted to make up for what was lost before it, in its "
        "inputs and in the residual stream: 0 not at all, 1 to the least squared error",
    )
    block: int = Field(128, ge=1, description="Columns whose changes are handed on to the rest at a time")
    descent: int = Field(
        3, ge=0, description="Passes over the groups after the sweep, each choosing mask and values anew"
    )
    refit: int = Field(32, ge=0, description="Conjugate gradient steps on the finished mask")


class DistillSection(Section):
    """Training of the whole model towards the dense model's next-token distributions."""

    steps: int = Field(200, ge=1, description="AdamW steps at most")
    seconds: float | None = Field(None, gt=0, description="Stop after this long; none: only by steps")
    learning_rate: float = Field(5e-5, gt=0, description="Peak; 5 % warm-up, then a cosine to zero")
    batch_size: int = Field(4, ge=1, description="Sequences per step")
    text: EvaluationSource | None = Field(
        None,
        description="A longer text to train on, which overfits less; none: the calibration text",
    )
    samples: int = Field(1024, ge=1, description="Sequences of `text`, as long as those of calibration")


class RecoverSection(Section):
    """Training of the kept weights, masks frozen, on the calibration text."""

    steps: int = Field(200, ge=0, description="AdamW steps for each decoder block; 0: none")
    learning_rate: float = Field(5e-4, gt=0, description="Peak; 5 % warm-up, then a cosine to zero")
    distill: DistillSection | None = Field(None, description="Then train the whole model at once; or null")


class BudgetSection(Section):
    """What pruning may cost or must gain; the layers that cost most stay dense to meet it."""

    perplexity_ratio: float | None = Field(
        None, gt=1, description="Sparse / dense perplexity at most, estimated before recovery"
    )
    speedup: float | None = Field(
        None,
        gt=1,
        description="Dense / sparse time of all linear layers in a decode step of one sequence at least; "
        "without a perplexity_ratio as many sensitive layers stay dense as this allows",
    )
    gpu: str | None = Field(
        None, description="GPU whose times count, as in `estimate --gpu`; none: bytes of weights"
    )
    sensitive: Literal["dense", "4:8"] = Field(
        "dense",
        description="What the most sensitive layers become: dense, or 4:8 as far as the perplexity allows; "
        "4:8 has no fast kernel yet and takes as long as dense",
    )
    samples: int = Field(16, ge=1, description="Sequences of the calibration text it is estimated on")

    @model_validator(mode="after")
    def _has_one(self) -> BudgetSection:
        if self.perplexity_ratio is None and self.speedup is None:
            raise ValueError("a budget sets perplexity_ratio, speedup or both")
        if self.gpu is not None and self.speedup is None:
            raise ValueError("gpu is for a speedup: set one, or leave gpu out")
        return self


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
    tokens: Literal["effect", "equal"] = Field(
        "effect",
        description="How much each token of the calibration text counts for each output, in scores and in "
        "the errors that `permute.refine` and `update` lower: by what the output does to the model's "
        "predictions there, found by a backward pass, so that attention sinks count for what they are; or "
        "all the same, as in the papers",
    )
    recover: RecoverSection | None = Field(None, description="Train the kept weights afterwards; or null")
    layers: LayerSelection = Field(default_factory=LayerSelection)
    budget: BudgetSection | None = Field(
        None, description="Keep the most sensitive layers dense to meet a perplexity budget; or null"
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")

    @model_validator(mode="after")
    def _budget_fits(self) -> PruneSection:
        if self.budget and self.budget.speedup and self.pattern != "2:4":
            raise ValueError(
                f"budget.speedup needs pattern 2:4: there are no fast kernels for {self.pattern}"
            )
        if self.budget and self.budget.sensitive == self.pattern:
            raise ValueError(f"budget.sensitive is the pattern itself, {self.pattern}")
        return self

    @property
    def follows_dense(self) -> bool:
        """Whether the dense model's hidden states are needed beside those of the pruned one."""
        return self.corrects or (self.recover is not None and self.recover.steps > 0)

    @property
    def corrects(self) -> bool:
        """Whether a layer is to make up for what was lost before it, by its permutation or its weights."""
        if self.update.method == "obs":
            return self.update.correct > 0
        return self.refine is not None and self.refine.correct > 0

    @property
    def refine(self) -> RefineShuffle | None:
        """`permute.refine` where it has something to refine, and a text to do it on."""
        return self.permute.refine if self._searches_on_text else None

    @property
    def weighs_rows(self) -> bool:
        """Whether permutations are chosen by what outputs do, too."""
        return self.permute.rows == "effect" and self._searches_on_text

    @property
    def _searches_on_text(self) -> bool:
        """Whether permutations are chosen, and by a score that reads the calibration text."""
        permute = self.permute
        searches = permute.global_ != "none" or permute.local is not None or permute.assign > 0
        return searches and self.score.method != "magnitude"

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
