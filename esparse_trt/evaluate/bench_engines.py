"""The TensorRT engines of a build at the cells of a benchmark, where they run on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from esparse_trt.artifacts import BuildDir
from esparse_trt.engine import plugin
from esparse_trt.engine.runner import EngineRunner, choose_profile
from esparse_trt.errors import EsparseError
from esparse_trt.evaluate.bench_record import EngineCell, Latency
from esparse_trt.graph.feeds import example_feed
from esparse_trt.progress import track
from esparse_trt.records import EngineFile, EngineRecord, ExportRecord

WARM_UP, REPEATS = 3, 20
DEVICE = "cuda"  # where inputs lie


def measure_engines(
    folder: BuildDir,
    exported: ExportRecord,
    engines: EngineRecord,
    vocabulary: int,
    cells: Iterable[tuple[int, int]],
    generated: int,
) -> tuple[list[EngineCell], str | None]:
    """Prefill, and a decode step in the middle of the generated tokens, of each engine.

    Times are those of the call, until the device is done: TensorRT's own launching is in them.

    Args:
        cells: (batch, prompt).
        generated: tokens after each prompt.

    Returns:
        what was measured, and why the rest was not.
    """
    if engines.flavour is None:
        return [], engines.skipped
    found: list[EngineCell] = []
    shapes = list(cells)
    for engine in filter(None, (engines.dense, engines.sparse)):
        try:
            with _runner(folder, engines, engine) as runner:
                for batch, prompt in track(shapes, engine.file, total=len(shapes), unit="cell"):
                    prefill, decode = (
                        _latency(runner, exported, batch, sequence, past, vocabulary)
                        for sequence, past in ((prompt, 0), (1, prompt + generated // 2))
                    )
                    found.append(
                        EngineCell(
                            file=engine.file, batch=batch, prompt=prompt, prefill=prefill, decode=decode
                        )
                    )
        except EsparseError as error:
            return found, f"{engine.file}: {error.what}"
    return found, None


def _runner(folder: BuildDir, engines: EngineRecord, engine: EngineFile) -> EngineRunner:
    assert engines.flavour is not None
    path = folder.root / engine.file
    if not path.is_file():
        raise EsparseError("the engine is not on this machine", where=path)
    if engine.plugin is not None:
        plugin.load(engines.flavour, Path(engine.plugin.library))
    return EngineRunner(path, engines.flavour)


def _latency(
    runner: EngineRunner, exported: ExportRecord, batch: int, sequence: int, past: int, vocabulary: int
) -> Latency | None:
    """Of one set of shapes; None where no profile of the engine holds them."""
    arrays = example_feed(
        exported.inputs, batch=batch, sequence=sequence, past=past, vocab=vocabulary, seed=0
    )
    shapes = {name: arrays[name].shape for name in runner.inputs}
    if choose_profile(shapes, runner.profiles) is None:
        return None
    feed = {name: torch.from_numpy(array).to(DEVICE) for name, array in arrays.items()}
    runner.seconds(feed, WARM_UP)
    return Latency.of([1e3 * seconds for seconds in runner.seconds(feed, REPEATS)])
