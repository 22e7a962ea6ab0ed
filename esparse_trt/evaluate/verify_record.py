"""What the verify stage reports."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from esparse_trt.records import Record


class Comparison(Record):
    """How far one tensor of `b` lies from the same tensor of `a`; the reference is `a`."""

    name: str = Field(description="tensor or module name")
    block: int | None
    step: Literal["prefill", "decode"] = Field("prefill", description="step of the comparison's text")
    max_abs: float
    mean_abs: float
    max_rel: float = Field(description="of |b - a| / |a| where a is not 0")
    mean_rel: float
    relative_l2: float = Field(description="||b - a||_2 / ||a||_2")
    cosine: float


class Fidelity(Record):
    """What the toolchain changed: the same model through two runtimes, `a` the reference."""

    a: str
    b: str
    limit_logits: float = Field(
        description="largest relative L2 distance of the logits that rounding explains"
    )
    limit_layer: float = Field(description="the same for one layer")
    logits: Comparison = Field(description="all positions, prefill and decode, from tokens to logits")
    layers: list[Comparison] = Field(
        description="outputs of linear layers and decoder blocks in execution order, each block given the "
        "same input in both runtimes; empty where a runtime does not show them"
    )
    rounding: dict[str, float] = Field(
        default_factory=dict,
        description="of what is above its limit in fp16: relative L2 distance of `a` from the same in fp32; "
        "up to twice that, and five limits, is accepted as rounding",
    )
    first_divergence: str | None = Field(description="the first layer above its limit, or the logits")
    passed: bool


class TaskLevel(Record):
    """Task-level figures on the evaluation text."""

    text_sha256: str = Field(description="over the token ids of all windows (int64, little endian)")
    tokens: int = Field(description="tokens scored: windows x (length - 1)")
    length: int = Field(description="tokens per window")
    dtype: str
    runtime: str
    protocol: str = Field("", description="how the text was cut and scored, in words")
    dense_perplexity: float
    sparse_perplexity: float
    ratio: float = Field(description="sparse / dense perplexity")
    ln_ratio_ci95: float | None = Field(
        None, description="half width of the 95 % confidence interval of ln(ratio), paired over windows"
    )
    kl_divergence: float = Field(description="mean KL(dense || sparse) of the next-token distribution, nats")
    top1_agreement: float = Field(description="share of positions with the same most probable token")


class TaskScore(Record):
    """One metric of one task, dense and sparse; the change is taken question by question."""

    task: str
    metric: str
    higher_is_better: bool
    questions: int
    dense: float
    dense_stderr: float | None
    sparse: float
    sparse_stderr: float | None
    change: float = Field(description="sparse - dense")
    change_ci95: float | None = Field(description="half width of the 95 % interval of the change, paired")

    @property
    def verdict(self) -> str:
        """Better, worse or within noise; nothing where there is no interval."""
        if self.change_ci95 is None:
            return ""
        if abs(self.change) <= self.change_ci95:
            return "within noise"
        return "better" if (self.change > 0) == self.higher_is_better else "worse"


class ZeroShot(Record):
    """Accuracy on tasks, as lm-eval measures it."""

    harness: str
    shots: int
    limit: int | None = Field(description="questions per task at most")
    dtype: str
    device: str
    scores: list[TaskScore] = Field(description="by task and metric, then means over all tasks")


class VerifyRecord(Record):
    """What pruning cost, and proof that the toolchain added nothing to it."""

    feed: str = Field("", description="the text that the graphs were compared on, in words")
    outputs: list[Comparison] = Field(description="dense against sparse, graph outputs")
    layers: list[Comparison] = Field(
        description="dense against sparse: outputs of linear layers and decoder blocks, in execution order"
    )
    fidelity: list[Fidelity]
    engines_skipped: str | None = Field(None, description="why no engine was compared")
    task: TaskLevel | None
    task_skipped: str | None = Field(description="why there are no task-level figures")
    gate: float | None = Field(description="the recipe's max_perplexity_ratio")
    gate_passed: bool | None
    zeroshot: ZeroShot | None = Field(None, description="null where the recipe asks for none")
