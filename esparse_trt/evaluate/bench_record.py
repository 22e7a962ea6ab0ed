"""`bench.json`: what `esparse-trt bench` measured of one model on one GPU, dense against sparse.

Cells are added as they are measured, so that a run resumes; figures of another GPU, driver, kernel set or
package version are never mixed into one file: the file starts anew.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from esparse_trt.artifacts import read_record, write_atomic
from esparse_trt.estimate.record import Prediction
from esparse_trt.records import Reason, Record

LOGITS_LIMIT = 5e-3  # relative L2 distance that fp16 explains
PAPER_SAVING = 0.435  # of the whole model's memory, arXiv 2310.15929


class Latency(Record):
    """Milliseconds of many like calls, on the GPU's own clock."""

    count: int
    median: float
    p10: float
    p90: float
    p99: float

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Latency:
        """Of a list of measurements."""
        if len(milliseconds) == 1:
            milliseconds = [*milliseconds, *milliseconds]
        cuts = statistics.quantiles(milliseconds, n=100, method="inclusive")
        return cls(
            count=len(milliseconds),
            median=statistics.median(milliseconds),
            p10=cuts[9],
            p90=cuts[89],
            p99=cuts[98],
        )


class Measured(Record):
    """One model at one batch and prompt length."""

    prefill: Latency = Field(description="of the prompts up to the first new token: time to first token")
    decode: Latency = Field(description="between two tokens of a sequence: one step for the whole batch")
    peak_bytes: int = Field(
        description="weights, KV cache and the largest activations that lay on the device for this model"
    )
    joules_per_token: float | None = Field(
        None, description="of the whole GPU while decoding, per generated token; null without NVML"
    )
    sm_mhz: int | None = Field(None, description="SM clock while decoding; null without NVML")


class Cell(Record):
    """Both models at one batch and prompt length, in one process."""

    batch: int
    prompt: int = Field(description="tokens of each prompt")
    dense: Measured
    sparse: Measured
    interleaved: bool = Field(
        True, description="in turns; else one after the other, as both KV caches do not fit together"
    )

    @property
    def decode_speedup(self) -> float:
        """Dense over sparse inter-token latency."""
        return self.dense.decode.median / self.sparse.decode.median

    @property
    def prefill_speedup(self) -> float:
        """Dense over sparse time to first token."""
        return self.dense.prefill.median / self.sparse.prefill.median

    def tokens_per_second(self, side: Literal["dense", "sparse"]) -> float:
        """Generated tokens of the whole batch while decoding."""
        return 1e3 * self.batch / (self.dense if side == "dense" else self.sparse).decode.median


class LeftOut(Record):
    """A cell that was not measured."""

    batch: int
    prompt: int
    reason: str


class LayerTime(Record):
    """One GEMM at M tokens, weights out of cache; microseconds."""

    m: int
    kernel: str = Field(description="what runs it packed")
    sparse_us: float
    dense_us: float = Field(description="torch's product, cuBLAS")
    floor_us: float = Field(description="what the packed layer takes at the machine's own ceilings")

    @property
    def share_of_floor(self) -> float:
        """Floor over sparse time: 1 is as fast as the machine can."""
        return self.floor_us / self.sparse_us

    @property
    def speedup(self) -> float:
        """Dense over sparse."""
        return self.dense_us / self.sparse_us


class LayerBench(Record):
    """The GEMMs of one shape in one site; q/k/v and gate/up are one GEMM each."""

    site: str
    shape: tuple[int, int] = Field(description="[N, K]")
    count: int = Field(description="how many the model has")
    sparse: bool = Field(description="packed in the sparse model")
    permuted: bool = Field(False, description="reads its input through a permutation; o only at prompts")
    code: Reason
    reason: str = Field(description="why it runs as it does, and where dense is faster")
    times: list[LayerTime] = Field(description="packed and dense; empty where it cannot be packed")


class EngineCell(Record):
    """One TensorRT engine of the build at one batch and prompt length, inputs and outputs on the device."""

    file: str
    batch: int
    prompt: int
    prefill: Latency | None = Field(description="null where no profile holds the shapes")
    decode: Latency | None


class Device(Record):
    """The GPU, its driver and limits."""

    name: str
    capability: str
    multiprocessors: int
    memory_bytes: int
    driver: str
    power_limit_w: float | None = None
    max_sm_mhz: int | None = None


class Ceilings(Record):
    """What the machine reached in this run; floors of the layers are computed from it."""

    read_gb_per_s: float = Field(description="of a large sum over device memory")
    dense_tflop_per_s: float = Field(description="of a large fp16 product; the sparse floor is twice that")


class ModelSize(Record):
    """Bytes of one model on the device."""

    weight_bytes: int = Field(description="storages of all parameters and buffers")
    pruned_layer_bytes: int = Field(description="those of the layers that the sparse model packs")


class LogitsCheck(Record):
    """Sparse against the masked dense model, both fp16 (or bf16), teacher-forced, relative L2."""

    steps: int
    error: float = Field(description="over the logits of all steps together")
    worst: float = Field(description="of the worst single step")
    dense_rounding: float | None = Field(
        None,
        description="of the masked dense model, the same as `error` against itself in fp32; null: no room",
    )
    sparse_rounding: float | None = Field(None, description="of the sparse model against the same in fp32")
    limit: float = LOGITS_LIMIT

    @property
    def passed(self) -> bool:
        """Whether the distance is within the limit."""
        return self.error <= self.limit


class Setting(Record):
    """What every figure of a file was measured under."""

    model: str
    weights: str = Field(description="random, or the SHA-256 of the pruned model's recipe")
    device: Device
    versions: dict[str, str]
    dtype: str
    generated: int = Field(description="tokens generated after each prompt")


class Bench(Record):
    """`bench.json`."""

    schema_version: Literal[1] = 1
    command: str = Field(description="what measured it")
    finished: str = Field(description="ISO 8601, UTC")
    setting: Setting
    dense_model: str = Field(description="what the dense figures are of")
    dense: ModelSize
    sparse: ModelSize
    logits: LogitsCheck | None = None
    ceilings: Ceilings | None = None
    cells: list[Cell] = Field(default_factory=list, description="by batch, then prompt")
    left_out: list[LeftOut] = Field(default_factory=list)
    predictions: list[Prediction] = Field(
        default_factory=list,
        description="what `esparse-trt estimate` says of the cells, from the configuration",
    )
    layers: list[LayerBench] = Field(default_factory=list)
    engines: list[EngineCell] = Field(default_factory=list)
    engines_skipped: str | None = Field(None, description="why no engine was measured")
    no_energy: str | None = Field(None, description="why there is no energy and no clock")

    @property
    def weight_saving(self) -> float:
        """Share of the whole model's weight bytes that is gone."""
        return 1 - self.sparse.weight_bytes / self.dense.weight_bytes

    @property
    def layer_ratio(self) -> float | None:
        """Bytes of the packed layers over the same layers dense."""
        dense = self.dense.pruned_layer_bytes
        return self.sparse.pruned_layer_bytes / dense if dense else None

    def cell(self, batch: int, prompt: int) -> Cell | None:
        """The cell that was measured there."""
        return next((c for c in self.cells if (c.batch, c.prompt) == (batch, prompt)), None)


def load_bench(path: Path) -> Bench | None:
    """The record at `path`, or None where there is none.

    Raises:
        EsparseError: the file is there but cannot be read.
    """
    return read_record(
        path,
        Bench,
        "a benchmark",
        "name a record of `esparse-trt bench`; if it is one, move it away and run that again",
    )


def save_bench(bench: Bench, path: Path) -> None:
    """Write the record, under a temporary name first."""
    write_atomic(path, bench.model_dump_json(indent=1) + "\n")
