"""Constants of `esparse_trt/estimate/steps.py`, fitted to what `esparse-trt bench` measured.

    python tests/benchmarks/fit_estimate.py llama-7b=llama-7b.json llama-3-8b=llama-3-8b.json

takes records of well-known shapes and prints the `Runtime` whose `block_us` and `attention_bandwidth` have
the least squared ln(estimated / measured) over prefill and decode of the dense models, and whose
`overlap_us` has it over the decoding of the first sparse one; then how far off all gains are, those of the
others unseen. The other constants, which these times hardly tell apart, stay as they are.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from scipy.optimize import least_squares

from esparse_trt.estimate.gpus import gpu_of_device
from esparse_trt.estimate.predict import LAUNCH, decoder, find_tables
from esparse_trt.estimate.record import CellEstimate
from esparse_trt.estimate.steps import RUNTIME, Model, Runtime
from esparse_trt.estimate.times import Times
from esparse_trt.evaluate.bench_record import Bench, Cell, load_bench
from esparse_trt.layout import empty_model, gemms
from esparse_trt.runtime.shapes import config_of
from esparse_trt.sections import PruneSection, Traffic

Runs = Sequence[tuple[Model, Bench]]
Misses = Callable[[CellEstimate, Cell], Iterable[float]]


def model_of(shape: str, bench: Bench) -> Model:
    """The sum of GEMMs and the rest, every 2:4 layer packed."""
    gpu = gpu_of_device(bench.setting.device.name)
    if gpu is None:
        raise SystemExit(f"nothing is known of {bench.setting.device.name}")
    config = config_of(shape)
    layers = gemms(config, empty_model(config), PruneSection(), "float16")
    times = Times(gpu, [one.table for one in find_tables(gpu)], "float16", LAUNCH)
    return decoder(config, [(gemm, gemm.stays is None) for gemm in layers], times)


def pairs(runs: Runs, runtime: Runtime) -> Iterator[tuple[CellEstimate, Cell]]:
    """Estimate and measurement of every cell."""
    for model, bench in runs:
        model.runtime = runtime
        for cell in bench.cells:
            entry = Traffic(batch=cell.batch, prompt=cell.prompt, generated=bench.setting.generated)
            yield model.cell(entry, (0, 0)), cell


def of_dense(found: CellEstimate, cell: Cell) -> Iterator[float]:
    """ln(estimated / measured) of the dense model."""
    for phase in ("decode", "prefill"):
        yield math.log(getattr(found, phase).dense.total / getattr(cell.dense, phase).median)


def of_sparse(found: CellEstimate, cell: Cell) -> Iterator[float]:
    """The same of the sparse model's decoding."""
    yield math.log(found.decode.sparse.total / cell.sparse.decode.median)


def fitted(runtime: Runtime, names: Sequence[str], runs: Runs, misses: Misses) -> Runtime:
    """The constants with the best values of those that are named."""

    def having(logarithms: Sequence[float]) -> Runtime:
        return replace(runtime, **{name: math.exp(x) for name, x in zip(names, logarithms, strict=True)})

    def residuals(logarithms: Sequence[float]) -> list[float]:
        return [miss for found, cell in pairs(runs, having(logarithms)) for miss in misses(found, cell)]

    fit = least_squares(residuals, [math.log(getattr(runtime, name)) for name in names])
    best = having(fit.x)
    values = ", ".join(f"{name}={getattr(best, name):.3g}" for name in names)
    print(f"{values}, root mean square {100 * math.sqrt(2 * fit.cost / len(fit.fun)):.1f} %")
    return best


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("records", nargs="+", metavar="SHAPE=FILE")
    runs = []
    for text in parser.parse_args().records:
        shape, _, path = text.partition("=")
        bench = load_bench(Path(path))
        if bench is None:
            parser.error(f"there is no {path}")
        runs.append((model_of(shape, bench), bench))
    runtime = fitted(RUNTIME, ["block_us", "attention_bandwidth"], runs, of_dense)
    runtime = fitted(runtime, ["overlap_us"], runs[:1], of_sparse)
    for found, cell in pairs(runs, runtime):
        gains = [
            f"{phase} {measured:.2f}x, estimated {estimated:.2f}x ({estimated / measured - 1:+.0%})"
            for phase, measured, estimated in (
                ("decode", cell.decode_speedup, found.decode.speedup),
                ("prefill", cell.prefill_speedup, found.prefill.speedup),
            )
        ]
        print(f"batch {cell.batch}, prompt {cell.prompt}: {'; '.join(gains)}")


if __name__ == "__main__":
    main()
