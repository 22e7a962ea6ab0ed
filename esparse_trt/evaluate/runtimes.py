"""Prefill and decode in ONNX Runtime, through Polygraphy, or in any other runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER
from torch import Tensor

from esparse_trt.evaluate.perplexity import LogitsFn
from esparse_trt.graph.feeds import cache_feed, next_cache, token_feed
from esparse_trt.records import TensorSpec

Arrays = dict[str, np.ndarray]
Runtime = Callable[[Arrays], Arrays]  # graph inputs -> graph outputs


@dataclass(frozen=True)
class Steps:
    """Outputs of a prefill of T − 1 tokens, and of the decode step of one more token that uses its cache."""

    prefill: Arrays
    decode: Arrays

    @property
    def logits(self) -> np.ndarray:
        """Logits of all T positions, [batch, T, vocab]."""
        return np.concatenate([self.prefill["logits"], self.decode["logits"]], axis=1)


@contextmanager
def quiet_polygraphy() -> Iterator[None]:
    """Polygraphy says errors only; also a decorator."""
    with G_LOGGER.verbosity(G_LOGGER.ERROR):
        yield


def run_steps(run: Runtime, inputs: list[TensorSpec], ids: Tensor) -> Steps:
    """Prefill all but the last of the tokens [batch, T], then decode the last one."""
    tokens = ids.numpy()
    first = run(token_feed(inputs, tokens[:, :-1]) | cache_feed(inputs, batch=len(tokens), past=0))
    last = run(token_feed(inputs, tokens[:, -1:], past=tokens.shape[1] - 1) | next_cache(first))
    return Steps(first, last)


def onnx_steps(path: Path, inputs: list[TensorSpec], ids: Tensor) -> Steps:
    """`run_steps` of an ONNX file in ONNX Runtime."""
    with OnnxrtRunner(partial(onnx_session, path), name=path.name) as runner:
        return run_steps(runner.infer, inputs, ids)


def run_onnx(session: Callable[[], onnxruntime.InferenceSession], feed: Mapping, title: str) -> Arrays:
    """All outputs of one run through Polygraphy; the session lives no longer than the run."""
    results = Comparator.run([OnnxrtRunner(session, name=title)], data_loader=[dict(feed)])
    return dict(results[0][1][0].items())


def onnx_session(model: Path | bytes, *, folder: Path | None = None) -> onnxruntime.InferenceSession:
    """A session on the CPU whose weights stay in the file, mapped.

    Constant folding would make an fp32 copy of all fp16 weights, and prepacking another one; without them a
    run is as fast (*measured* on the quickstart model) and two sessions fit where one would not.

    Args:
        model: a file, or a serialised model whose external data lies in `folder`.
        folder: see `model`.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # PyTorch works between runs
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return onnxruntime.InferenceSession(
        model if isinstance(model, bytes) else str(model),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["ConstantFolding"],
    )


def onnx_logits(session: onnxruntime.InferenceSession, inputs: list[TensorSpec]) -> LogitsFn:
    """The logits function of an exported model; see `evaluate.perplexity`."""

    def logits(ids: Tensor) -> Tensor:
        tokens = ids.numpy()
        feed = token_feed(inputs, tokens) | cache_feed(inputs, batch=len(tokens), past=0)
        return torch.from_numpy(session.run(["logits"], feed)[0])

    return logits
