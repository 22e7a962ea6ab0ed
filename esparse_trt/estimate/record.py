"""What `esparse-trt estimate` says, as data: `--json` prints it."""

from __future__ import annotations

from pydantic import Field

from esparse_trt.estimate.times import Source
from esparse_trt.records import Kernel, Reason, Record


class GemmTime(Record):
    """One GEMM at m tokens, microseconds."""

    m: int
    sparse_us: float
    dense_us: float
    source: Source

    @property
    def speedup(self) -> float:
        """Dense over sparse."""
        return self.dense_us / self.sparse_us


class SiteEstimate(Record):
    """The GEMMs of one shape in one site."""

    site: str = Field(description="qkv, o, gate_up, down ..., or the head")
    layers: str = Field(description="the layers in each, such as q_proj+k_proj+v_proj")
    shape: tuple[int, int] = Field(description="[N, K] of each")
    count: int = Field(description="how many the model has")
    kernel: Kernel
    code: Reason
    reason: str
    speedup: float | None = Field(description="over the traffic; null where it cannot run sparse")
    dense_faster_at: list[int] = Field(description="of the M in `times` and in the traffic")
    times: list[GemmTime] = Field(description="what it would take sparse, whatever was chosen")


class Step(Record):
    """Milliseconds of one pass through the model: all prompts of a batch, or one token for each of them."""

    gemm: float = Field(description="linear layers of the blocks")
    head: float
    attention: float = Field(description="reading the KV cache, or multiplying in prefill")
    other: float = Field(description="norms, rotary embedding, activation, residual adds, launches")

    @property
    def total(self) -> float:
        """All of it."""
        return self.gemm + self.head + self.attention + self.other


class Phase(Record):
    """Prefill or decode, dense and sparse."""

    dense: Step
    sparse: Step

    @property
    def speedup(self) -> float:
        """End to end, in this package's PyTorch runtime."""
        return self.dense.total / self.sparse.total

    @property
    def limit(self) -> float:
        """The same if everything but GEMMs, head and attention took no time."""
        dense, sparse = (step.total - step.other for step in (self.dense, self.sparse))
        return dense / sparse


class CellEstimate(Record):
    """A batch of prompts."""

    batch: int
    prompt: int
    generated: int
    prefill: Phase
    decode: Phase = Field(description="a step in the middle of generation")
    cache_bytes: int = Field(description="keys and values at the end of generation")
    fits: dict[str, bool] = Field(description="dense, sparse: whether weights and cache fit into the GPU")


class Sizes(Record):
    """Bytes."""

    parameters: int
    pruned: int = Field(description="parameters of the layers that are pruned, zeros included")
    packed: int = Field(description="of those in layers that run packed")
    checkpoint: int = Field(description="the pruned checkpoint: zeros are stored")
    dense_onnx: int
    sparse_onnx: int
    packed_onnx: int
    dense_engine: int
    sparse_engine: int
    dense_memory: int = Field(description="weights on the device in the PyTorch runtime")
    sparse_memory: int


class Estimate(Record):
    """Everything."""

    model: str
    gpu: str
    gpu_source: str
    dtype: str
    traffic: list[dict[str, float]]
    sources: list[str] = Field(description="where the times of GEMMs come from, for people")
    sites: list[SiteEstimate]
    sizes: Sizes
    cells: list[CellEstimate]
    speedup: float = Field(description="end to end over the whole traffic")
    findings: list[str] = Field(description="what to know before deciding, the verdict first")


class Prediction(Record):
    """What was estimated for a cell that was then measured."""

    batch: int
    prompt: int
    prefill: Phase
    decode: Phase
