"""TensorRT engines against the ONNX files they were built from."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from esparse_trt.artifacts import BuildDir
from esparse_trt.engine import plugin
from esparse_trt.engine.flavour import TITLE
from esparse_trt.engine.runner import EngineRunner, choose_profile
from esparse_trt.evaluate.fidelity import Limits, judge
from esparse_trt.evaluate.figures import compare_arrays
from esparse_trt.evaluate.runtimes import onnx_steps, run_steps
from esparse_trt.evaluate.verify_record import Fidelity
from esparse_trt.graph.feeds import cache_feed, token_feed
from esparse_trt.records import EngineRecord, ExportRecord, TensorSpec


def compare_engines(
    folder: BuildDir, exported: ExportRecord, engines: EngineRecord, ids: Tensor, limits: Limits
) -> tuple[list[Fidelity], str | None]:
    """Run every engine of the build on tokens [1, T], prefill and decode, and compare the logits.

    Returns:
        one verdict for each engine, and the reason where an engine was not compared.
    """
    if engines.flavour is None or not engines.runnable:
        return [], engines.skipped or engines.not_runnable
    checks: list[Fidelity] = []
    for engine in (engines.dense, engines.sparse):
        if engine is None:
            continue
        if engine.plugin is not None:
            plugin.load(engines.flavour, Path(engine.plugin.library))
        with EngineRunner(folder.root / engine.file, engines.flavour) as runner:
            tokens = _longest(runner, exported.inputs, ids)
            if tokens is None:
                return checks, "no profile holds a prefill with an empty cache and a decode step after it"
            found = run_steps(runner, exported.inputs, tokens)
        reference = onnx_steps(folder.root / engine.onnx, exported.inputs, tokens)
        a, b = f"ONNX Runtime {engine.onnx}", f"{TITLE[engines.flavour]} {engine.file}"
        logits = compare_arrays("logits", reference.logits, found.logits, sides=(a, b))
        checks.append(judge(a, b, logits, [], limits))
    return checks, None


def _longest(runner: EngineRunner, inputs: list[TensorSpec], ids: Tensor) -> Tensor | None:
    """The longest start of the tokens that the engine's profiles hold as a prefill and a decode step."""
    for count in range(ids.shape[1], 1, -1):
        tokens, past = ids[:, :count].numpy(), count - 1
        prefill = token_feed(inputs, tokens[:, :-1]) | cache_feed(inputs, batch=1, past=0)
        decode = token_feed(inputs, tokens[:, -1:], past=past) | cache_feed(inputs, batch=1, past=past)
        shapes = [{name: array.shape for name, array in feed.items()} for feed in (prefill, decode)]
        if all(choose_profile(item, runner.profiles) is not None for item in shapes):
            return ids[:, :count]
    return None
