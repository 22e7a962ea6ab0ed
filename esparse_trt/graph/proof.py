"""Proof that two ONNX files compute the same: run both in ONNX Runtime and compare what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from esparse_trt.artifacts import TensorSpec
from esparse_trt.errors import CheckFailed
from esparse_trt.graph.feeds import PAST, example_feed
from esparse_trt.graph.plan import FoldPlan, redo, undo

Tensors = dict[str, NDArray]

LIMITS = {"float32": 1e-5, "float16": 2e-3}  # of the relative L2 distance


def example_feeds(inputs: list[TensorSpec], vocab: int) -> list[Tensors]:
    """A prefill and a decode step with a cache, each of two rows of which one is padded."""
    shapes = [{"sequence": 8, "past": 0, "seed": 0}, {"sequence": 1, "past": 6, "seed": 1}]
    return [example_feed(inputs, batch=2, vocab=vocab, padding=[0, 2], **shape) for shape in shapes]


def outputs(path: Path, feeds: Sequence[Tensors]) -> list[Tensors]:
    """All outputs of a model for each feed.

    The weights stay where they are on disk, mapped: without constant folding and prepacking the runtime makes
    no second copy of them, in fp32 for a CPU that has no fp16, that would outgrow the model itself.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
    )
    names = [output.name for output in session.get_outputs()]
    return [dict(zip(names, session.run(names, feed), strict=True)) for feed in feeds]


def relative_l2(value: NDArray, reference: NDArray) -> float:
    """‖value − reference‖₂ / ‖reference‖₂ in float64; 0 for two zeros."""
    a, b = value.astype(np.float64), reference.astype(np.float64)
    distance, norm = float(np.linalg.norm(a - b)), float(np.linalg.norm(b))
    return distance / norm if norm else float(distance > 0)


def compare(
    reference: Sequence[Tensors], path: Path, feeds: Sequence[Tensors], plan: FoldPlan, limit: float
) -> float:
    """Run a folded model on the same feeds and compare all outputs in the original order.

    Args:
        reference: outputs of the model before folding.
        path: the folded model.
        feeds: its inputs, the cache in original order.
        plan: the changes of basis of its cache.
        limit: of the relative L2 distance of every output.

    Returns:
        The largest distance of the logits.

    Raises:
        CheckFailed: an output is farther away than `limit`; names the output and the feed.
    """
    changed = [{name: redo(plan, name, value) for name, value in feed.items()} for feed in feeds]
    errors = []
    for feed, before, after in zip(feeds, reference, outputs(path, changed), strict=True):
        past = next(value.shape[2] for name, value in feed.items() if name.startswith(PAST))
        for name, value in before.items():
            error = relative_l2(undo(plan, name, after[name]), value)
            if not error <= limit:
                raise CheckFailed(
                    f"folding changed {name!r} by {error:.2e} relative to what it was (limit {limit:.0e}, "
                    f"{'decode with a cache' if past else 'prefill'})",
                    where=path,
                    fix="please report this with the recipe; `prune.permute` set to none avoids it",
                )
            errors += [error] if name == "logits" else []
    return max(errors)
