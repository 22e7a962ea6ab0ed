"""Constants of `esparse_trt/estimate/steps.py`, fitted to what `esparse-trt bench` measured of dense models.

    python tests/benchmarks/fit_estimate.py llama-7b=llama-7b.json llama-3-8b=llama-3-8b.json

takes records of well-known shapes and prints the `Runtime` whose `block_us` and `attention_bandwidth` have
the least squared ln(estimated / measured) over prefill and decode of the dense models; and, for either way of
launching, how far off the gains of the sparse ones are then, of which the fit knows nothing. The other
constants, which these times hardly tell apart, stay as they are.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from scipy.optimize import least_squares

from esparse_trt.engine.table import LAUNCHES, Launch
from esparse_trt.estimate.gpus import gpu_of_device
from esparse_trt.estimate.predict import decoder, find_tables
from esparse_trt.estimate.record import CellEstimate
from esparse_trt.estimate.steps import RUNTIME, Model, Runtime
from esparse_trt.estimate.times import Times
from esparse_trt.evaluate.bench_record import Bench, Cell, load_bench
from esparse_trt.layout import empty_model, gemms
from esparse_trt.runtime.shapes import config_of
from esparse_trt.sections import PruneSection, Traffic

FITTED = ("block_us", "attention_bandwidth")


def model_of(shape: str, bench: Bench, launch: Launch) -> Model:
    """The sum of GEMMs and the rest, every 2:4 layer packed."""
    gpu = gpu_of_device(bench.setting.device.name)
    if gpu is None:
        raise SystemExit(f"nothing is known of {bench.setting.device.name}")
    config = config_of(shape)
    layers = gemms(config, empty_model(config), PruneSection(), "float16")
    times = Times(gpu, [one.table for one in find_tables(gpu)], "float16", launch)
    return decoder(config, [(gemm, gemm.stays is None) for gemm in layers], times)


def pairs(runs: Sequence[tuple[Model, Bench]], runtime: Runtime) -> Iterator[tuple[CellEstimate, Cell]]:
    """Estimate and measurement of every cell."""
    for model, bench in runs:
        model.runtime = runtime
        for cell in bench.cells:
            entry = Traffic(batch=cell.batch, prompt=cell.prompt, generated=bench.setting.generated)
            yield model.cell(entry, (0, 0)), cell


def misses(runs: Sequence[tuple[Model, Bench]], runtime: Runtime) -> list[float]:
    """ln(estimated / measured) of every time of the dense models."""
    return [
        math.log(getattr(found, phase).dense.total / getattr(cell.dense, phase).median)
        for found, cell in pairs(runs, runtime)
        for phase in ("decode", "prefill")
    ]


def with_values(logarithms: Sequence[float]) -> Runtime:
    """The constants with other values of the fitted ones."""
    return replace(RUNTIME, **{name: math.exp(x) for name, x in zip(FITTED, logarithms, strict=True)})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("records", nargs="+", metavar="SHAPE=FILE")
    benches = []
    for text in parser.parse_args().records:
        shape, _, path = text.partition("=")
        bench = load_bench(Path(path))
        if bench is None:
            parser.error(f"there is no {path}")
        benches.append((shape, bench))
    runs = [(model_of(shape, bench, "plain"), bench) for shape, bench in benches]
    fit = least_squares(
        lambda x: misses(runs, with_values(x)), [math.log(getattr(RUNTIME, name)) for name in FITTED]
    )
    runtime = with_values(fit.x)
    fitted = ", ".join(f"{name}={getattr(runtime, name):.3g}" for name in FITTED)
    print(f"{fitted}, root mean square {100 * math.sqrt(2 * fit.cost / len(fit.fun)):.1f} %")
    for launch in LAUNCHES:
        print(f"gains, {launch} launches:")
        runs = [(model_of(shape, bench, launch), bench) for shape, bench in benches]
        for found, cell in pairs(runs, runtime):
            gains = [
                f"{phase} {measured:.2f}x, estimated {estimated:.2f}x ({estimated / measured - 1:+.0%})"
                for phase, measured, estimated in (
                    ("decode", cell.decode_speedup, found.decode.speedup),
                    ("prefill", cell.prefill_speedup, found.prefill.speedup),
                )
            ]
            print(f"  batch {cell.batch}, prompt {cell.prompt}: {'; '.join(gains)}")


if __name__ == "__main__":
    main()
