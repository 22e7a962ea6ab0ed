"""The estimate held against what `esparse-trt bench` measured."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from esparse_trt.estimate.gpus import gpu_of_device
from esparse_trt.estimate.predict import Subject, estimate, find_tables
from esparse_trt.estimate.record import Prediction
from esparse_trt.evaluate.bench_record import Bench
from esparse_trt.sections import EngineSection, PruneSection, Traffic

ALL_PACKED = EngineSection(sparse_gemm="plugin")  # what the runtime does with a model that is 2:4


def predict(bench: Bench, config: PretrainedConfig, prune: PruneSection) -> list[Prediction]:
    """The estimate for every cell of a benchmark, from its model's configuration; [] for an unknown GPU."""
    gpu = gpu_of_device(bench.setting.device.name)
    if gpu is None or not bench.cells:
        return []
    traffic = [
        Traffic(batch=cell.batch, prompt=cell.prompt, generated=bench.setting.generated)
        for cell in bench.cells
    ]
    subject = Subject(bench.setting.model, config, prune, ALL_PACKED, bench.setting.dtype)
    found = estimate(subject, gpu, find_tables(gpu), traffic)
    return [
        Prediction(batch=cell.batch, prompt=cell.prompt, prefill=cell.prefill, decode=cell.decode)
        for cell in found.cells
    ]


@dataclass(frozen=True)
class Gain:
    """A speed-up over dense."""

    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Checked:
    """A cell that was predicted and measured."""

    batch: int
    prompt: int
    decode: Gain
    prefill: Gain


def check(bench: Bench) -> list[Checked]:
    """Every cell of a benchmark that has a prediction."""
    found = []
    for item in bench.predictions:
        if (cell := bench.cell(item.batch, item.prompt)) is not None:
            decode = Gain(cell.decode_speedup, item.decode.speedup)
            prefill = Gain(cell.prefill_speedup, item.prefill.speedup)
            found.append(Checked(item.batch, item.prompt, decode, prefill))
    return found
